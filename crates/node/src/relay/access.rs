//! Who may use a machine's relay: the clan's machines, newcomers while they join, and those who come for four words, shortly.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use clan_relay::{proof_in, words};
use clan_types::MachineId;
use clan_wire::peer::InviteProof;
use iroh::EndpointId;
use iroh_relay::server::{Access, AccessControl, ClientRequest, ConnectionId, clients::Clients};
use tokio::time::Instant;

use super::lobby::Lobby;
use crate::core::{CoreHandle, View, now};

/// Connections that one endpoint may have: its own, and one that it has not yet noticed to be dead, and some.
const PER_ENDPOINT: usize = 4;
/// Newcomers that may be here at once.
const MAX_GUESTS: usize = 16;
/// Longest that a newcomer may stay: an image over a slow line.
const GUEST_LIMIT: Duration = Duration::from_secs(2 * 60 * 60);

/// Those that may be here at once who come for words, and how long: for two round trips and two key agreements.
const MAX_FOR_WORDS: usize = 8;
const WORDS_LIMIT: Duration = Duration::from_secs(60);

/// Judges by the ledger, when somebody comes and for as long as they stay.
pub(crate) struct Door {
    core: CoreHandle,
    lobby: Arc<Lobby>,
    inside: Mutex<HashMap<ConnectionId, Visitor>>,
}

struct Visitor {
    machine: MachineId,
    /// Of a newcomer: why, and since when they have been here.
    guest: Option<(Guest, Instant)>,
}

enum Guest {
    /// They showed this.
    Invited(InviteProof),
    /// Somebody here waits for words that begin as theirs.
    ForWords,
}

impl Guest {
    /// Of these, so many at once.
    const fn room(&self) -> usize {
        match self {
            Self::Invited(_) => MAX_GUESTS,
            Self::ForWords => MAX_FOR_WORDS,
        }
    }

    fn is_like(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }

    fn may_stay(&self, view: &View, machine: &MachineId, since: Instant) -> bool {
        match self {
            Self::Invited(proof) => since.elapsed() < GUEST_LIMIT && is_invited(view, proof, machine),
            Self::ForWords => since.elapsed() < WORDS_LIMIT,
        }
    }
}

impl Door {
    pub(crate) fn new(core: CoreHandle, lobby: Arc<Lobby>) -> Self {
        Self { core, lobby, inside: Mutex::default() }
    }

    /// Turns out whoever may no longer be here.
    pub(crate) fn review(&self, clients: &Clients) {
        let view = self.core.view();
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        let gone: Vec<(MachineId, ConnectionId)> = inside
            .iter_mut()
            .filter_map(|(connection, visitor)| {
                if is_member(&view, &visitor.machine) {
                    visitor.guest = None;
                    return None;
                }
                let guest = visitor.guest.as_ref();
                let stays = guest.is_some_and(|(guest, since)| guest.may_stay(&view, &visitor.machine, *since));
                (!stays).then_some((visitor.machine, *connection))
            })
            .collect();
        drop(inside);
        for (machine, connection) in gone {
            tracing::info!(%machine, "may no longer use the relay");
            if let Ok(endpoint) = EndpointId::from_bytes(machine.as_bytes()) {
                clients.disconnect(endpoint, Some(connection));
            }
        }
    }

    fn judge(&self, view: &View, machine: MachineId, request: &ClientRequest) -> Result<(), &'static str> {
        let guest = if is_member(view, &machine) {
            None
        } else {
            let token = request.auth_token().ok_or("this relay is for its clan")?;
            Some((self.welcome(view, &machine, &token)?, Instant::now()))
        };
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        if inside.values().filter(|v| v.machine == machine).count() >= PER_ENDPOINT {
            return Err("too many connections");
        }
        if let Some((guest, _)) = &guest {
            let alike = inside.values().filter(|v| v.guest.as_ref().is_some_and(|(other, _)| other.is_like(guest)));
            if alike.count() >= guest.room() {
                return Err("too many newcomers at once");
            }
        }
        inside.insert(request.connection_id(), Visitor { machine, guest });
        Ok(())
    }

    /// What a stranger may come for.
    fn welcome(&self, view: &View, machine: &MachineId, token: &str) -> Result<Guest, &'static str> {
        if let Some(channel) = words::pass_in(token) {
            return match self.lobby.find(channel, view) {
                Ok(waiting) if !waiting.is_empty() => Ok(Guest::ForWords),
                _ => Err("nobody waits for such words"),
            };
        }
        let proof = proof_in(token).ok_or("this relay is for its clan")?;
        if is_invited(view, &proof, machine) { Ok(Guest::Invited(proof)) } else { Err("the invite is not valid") }
    }
}

fn is_member(view: &View, machine: &MachineId) -> bool {
    view.state.machine_in_good_standing(machine).is_some()
}

fn is_invited(view: &View, proof: &InviteProof, machine: &MachineId) -> bool {
    // The cheap question first: a stranger's signature is not worth checking if there is no such invite.
    view.state.check_invite(&proof.invite, now()).is_ok() && proof.is_valid(&view.clan, machine)
}

impl fmt::Debug for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Door")
    }
}

impl AccessControl for Door {
    async fn on_connect(&self, request: &ClientRequest) -> Access {
        let machine = MachineId::from_bytes(*request.endpoint_id().as_bytes());
        match self.judge(&self.core.view(), machine, request) {
            Ok(()) => Access::Allow,
            Err(why) => {
                tracing::debug!(%machine, why, "may not use the relay");
                Access::Deny { reason: Some(why.to_owned()) }
            }
        }
    }

    fn on_disconnect(&self, _endpoint: EndpointId, connection: ConnectionId) {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner).remove(&connection);
    }
}
