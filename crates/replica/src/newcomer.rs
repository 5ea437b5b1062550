//! What is asked of the entries with which a newcomer comes.

use clan_ledger::{Body, Entry, InviteProblem, MAX_AHEAD, RedeemProblem, State, VoidReason};
use clan_types::{DEVICE_LINK_LIFETIME, DeviceId, InviteId, Timestamp};
use clan_wire::peer::{EncodedEntry, JoinRefusal};

/// A newcomer's log is their admission and one machine; more is not looked at.
const MAX_NEWCOMER_ENTRIES: usize = 4;

/// Decodes the entries with which a newcomer asks to be admitted.
pub fn decode_newcomer(encoded: &[EncodedEntry]) -> Result<Vec<Entry>, JoinRefusal> {
    if encoded.len() > MAX_NEWCOMER_ENTRIES {
        return Err(JoinRefusal::Malformed);
    }
    encoded.iter().map(|bytes| Entry::decode(bytes)).collect::<Result<_, _>>().map_err(|_| JoinRefusal::Malformed)
}

/// Whether what somebody came with is in the clan already: they themselves, their devices and their machines.
pub fn belongs(entries: &[Entry], state: &State) -> bool {
    let person = entries.first().and_then(|entry| state.person_of(&entry.author()));
    let Some(person) = person.filter(|person| state.person(person).is_some()) else { return false };
    entries.iter().all(|entry| match entry.body() {
        Body::Enrol { machine, .. } => state.machine_in_good_standing(machine).is_some_and(|m| m.owner == person),
        Body::AddDevice { device, .. } => state.device_in_good_standing(device).is_some_and(|d| d.owner == person),
        Body::RevokeDevice { device, .. } => state.device_in_good_standing(device).is_none(),
        Body::Admission { .. } => true,
        // What nobody comes with shows nothing: other entries are no secret among members.
        _ => false,
    })
}

/// What an admin has, or has not, said about a newcomer who asked before.
pub(crate) fn awaits(entries: &[Entry], state: &State) -> Option<JoinRefusal> {
    let admission = entries.first()?;
    if state.pending.contains_key(&admission.author().person()) {
        return Some(JoinRefusal::Pending);
    }
    let mut void = state.void.iter().filter(|void| void.entry == admission.id());
    void.any(|void| void.reason == VoidReason::Denied).then_some(JoinRefusal::Denied)
}

/// Whether a key opens the ledger and the image to its holder now: an invite's, or that of a device in good standing.
pub fn check_invite(state: &State, key: &InviteId, at: Timestamp) -> Result<(), JoinRefusal> {
    if may_return(state, &DeviceId::from_bytes(*key.as_bytes()), at)? {
        return Ok(());
    }
    state.check_invite(key, at).map(drop).map_err(refusal)
}

/// Whether the device is one of somebody in the clan. The one that a device link stands for is, for a short time.
pub(crate) fn may_return(state: &State, device: &DeviceId, at: Timestamp) -> Result<bool, JoinRefusal> {
    match state.device_in_good_standing(device) {
        None => Ok(false),
        Some(device) if device.is_link() && at.since(device.since) > DEVICE_LINK_LIFETIME => Err(JoinRefusal::Expired),
        Some(_) => Ok(true),
    }
}

/// Whether these are entries of somebody who is in, with which they add devices and machines of theirs. What they do in
/// the clan otherwise, they do from a machine of theirs.
pub(crate) fn returns(entries: &[Entry], state: &State, at: Timestamp) -> Result<bool, JoinRefusal> {
    let Some(first) = entries.first() else { return Ok(false) };
    if matches!(first.body(), Body::Admission { .. }) || !may_return(state, &first.author().device(), at)? {
        return Ok(false);
    }
    for entry in entries {
        let fits = match entry.body() {
            Body::AddDevice { .. } | Body::RevokeDevice { .. } => true,
            Body::Enrol { name, .. } if state.is_node_name(name) => {
                return Err(JoinRefusal::NameTaken { name: name.to_string() });
            }
            Body::Enrol { .. } => true,
            _ => false,
        };
        if !fits || entry.author() != first.author() || entry.time().wall > at.plus(MAX_AHEAD) {
            return Err(JoinRefusal::Malformed);
        }
    }
    Ok(true)
}

pub(crate) fn redeem_refusal(problem: RedeemProblem) -> JoinRefusal {
    match problem {
        RedeemProblem::Invite(problem) => refusal(problem),
        RedeemProblem::PersonNameTaken(name) => JoinRefusal::NameTaken { name: name.to_string() },
        RedeemProblem::MachineNameTaken(name) => JoinRefusal::NameTaken { name: name.to_string() },
        RedeemProblem::Malformed | RedeemProblem::KeyTaken => JoinRefusal::Malformed,
        RedeemProblem::ClockAhead => JoinRefusal::ClockAhead,
    }
}

fn refusal(problem: InviteProblem) -> JoinRefusal {
    match problem {
        InviteProblem::Unknown => JoinRefusal::UnknownInvite,
        InviteProblem::Used => JoinRefusal::Used,
        InviteProblem::Expired => JoinRefusal::Expired,
        InviteProblem::Revoked => JoinRefusal::Revoked,
    }
}
