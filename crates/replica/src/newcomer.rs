//! What is asked of the entries with which a newcomer comes.

use clan_ledger::{Body, Entry, InviteProblem, RedeemProblem, State, VoidReason};
use clan_types::{InviteId, Timestamp};
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

/// Whether a newcomer and their machines are in the clan already.
pub fn belongs(entries: &[Entry], state: &State) -> bool {
    let person = entries.first().is_some_and(|e| state.person(&e.author().person()).is_some());
    person
        && entries.iter().all(|entry| match entry.body() {
            Body::Enrol { machine, .. } => {
                state.machine_in_good_standing(machine).is_some_and(|m| m.owner == entry.author().person())
            }
            _ => true,
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

/// Whether an invite can be redeemed now.
pub fn check_invite(state: &State, invite: &InviteId, at: Timestamp) -> Result<(), JoinRefusal> {
    state.check_invite(invite, at).map(drop).map_err(refusal)
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
