//! Inviting.

use std::time::Duration;

use clan_api::{ApiProblem, CreateInvite, ErrorCode, Invite};
use clan_ledger::Body;
use clan_os::channel::Channel;
use clan_types::{InviteId, InviteLink, InviteSecret, PeerAddr, Purpose, RelayAddr, Role};
use clan_wire::control::{ControlRequest, ControlResponse};
use ed25519_dalek::SigningKey;
use zeroize::Zeroizing;

use crate::{
    clan::{Clan, fingerprint},
    guest,
    manager::Shared,
    problem, sign,
    tasks::now,
};

const DEFAULT_EXPIRY: Duration = Duration::from_secs(24 * 3600);
const MAX_EXPIRY: Duration = Duration::from_secs(366 * 24 * 3600);
const MAX_USES: u32 = 10_000;
/// A link takes so many addresses of the machine here.
const MAX_ADDRS: usize = 16;
/// And so many other machines, for when this one is off, with so many addresses each: a link has to fit a QR code.
const MAX_OTHERS: usize = 3;
const MAX_OTHER_ADDRS: usize = 3;
/// And so many relays.
const MAX_RELAYS: usize = 2;

/// Makes an invite and its link.
pub(crate) async fn make(shared: &Shared, clan: &Clan, request: &CreateInvite) -> Result<Invite, ApiProblem> {
    let bad = |message: &str| Err(ApiProblem::new(ErrorCode::BadRequest, message));
    let role = request.role.unwrap_or(Role::Member);
    let uses = request.uses.unwrap_or(1);
    let approval = request.approval;
    let expires_in = request.expires_in.map_or(DEFAULT_EXPIRY, Duration::from_secs);
    if uses == 0 || uses > MAX_USES {
        return bad("an invite has between 1 and 10000 uses");
    }
    if expires_in.is_zero() || expires_in > MAX_EXPIRY {
        return bad("an invite lasts between a second and a year");
    }
    let control = clan.control().map_err(|e| problem::guest(&e))?;
    let mut secret = Zeroizing::new([0; 32]);
    getrandom::fill(secret.as_mut_slice()).map_err(|e| {
        ApiProblem::new(ErrorCode::Internal, "the operating system gives no randomness").why(e.to_string())
    })?;
    let key = SigningKey::from_bytes(&secret);
    let invite = InviteId::from_bytes(key.verifying_key().to_bytes());
    let expires = now().plus(expires_in);
    sign::decide(clan, |_| Ok(Body::Invite { invite, role, uses, expires, approval })).await?;
    let record = clan.record.get();
    let (peers, relays) = ways(shared, clan, &control).await?;
    let secret = InviteSecret::from_bytes(*secret);
    let link = InviteLink { purpose: Purpose::Join, clan: record.id, secret, peers, relays };
    let (words, words_expire) = crate::words::open(&control, &link).await.unzip();
    tracing::info!(clan = %record.name, invite = %invite.short(), %role, uses, "made an invite");
    Ok(Invite {
        link: link.to_string(),
        invite,
        clan_name: record.name,
        fingerprint: fingerprint(&record.id),
        role,
        uses,
        approval,
        expires,
        words_relay: link.relays.first().filter(|_| words.is_some()).map(crate::words::place),
        words: words.map(|words| words.to_string()),
        words_expire,
    })
}

/// Machines that a link names, the one here first; and relays that lead to them.
pub(crate) async fn ways(
    shared: &Shared,
    clan: &Clan,
    control: &Channel,
) -> Result<(Vec<PeerAddr>, Vec<RelayAddr>), ApiProblem> {
    let machine = guest::identify(control).await.map_err(|e| problem::guest(&e))?.machine;
    // What leads here from other computers first; what the machine itself knows after it.
    let mut addrs = crate::link::environment(&clan.record.get(), &shared.images).await.quic;
    let status = guest::status(control, guest::PATIENCE).await.map_err(|e| problem::guest(&e))?;
    addrs.extend(status.quic);
    let mut relays = status.relays;
    let mut seen = std::collections::HashSet::new();
    addrs.retain(|a| seen.insert(*a));
    addrs.truncate(MAX_ADDRS);
    relays.truncate(MAX_RELAYS);
    Ok((std::iter::once(PeerAddr { machine, addrs }).chain(others(control).await).collect(), relays))
}

/// Other machines that can admit a newcomer.
async fn others(control: &Channel) -> Vec<PeerAddr> {
    let mut others = members(control).await;
    others.truncate(MAX_OTHERS);
    others.iter_mut().for_each(|other| other.addrs.truncate(MAX_OTHER_ADDRS));
    others
}

/// Other machines that the one here has heard of lately.
pub(crate) async fn members(control: &Channel) -> Vec<PeerAddr> {
    match guest::open(control, &ControlRequest::Peers, guest::PATIENCE).await {
        Ok((_, ControlResponse::Peers(others))) => others,
        outcome => {
            // A controller of an earlier version does not know the question.
            tracing::debug!(?outcome, "the machine here names no other");
            Vec::new()
        }
    }
}
