//! Who the peers are, what they may send from, and which way packets to them go.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use clan_tunnel::{PathChoice, Paths};
use clan_types::MachineId;
use gotatun::noise::Tunn;

/// Where one packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    Direct(SocketAddr),
    Carrier,
}

/// A peer and its sessions.
pub(crate) struct Member {
    pub(crate) id: MachineId,
    /// Speaks WireGuard and nothing else of ours: neither probes nor the carrier.
    pub(crate) standard: bool,
    tunnel: Mutex<Tunn>,
    /// Where a standard peer was heard last.
    endpoint: Mutex<Option<SocketAddr>>,
}

impl Member {
    pub(crate) fn new(id: MachineId, standard: bool, tunnel: Tunn) -> Self {
        Self { id, standard, tunnel: Mutex::new(tunnel), endpoint: Mutex::new(None) }
    }

    /// INVARIANT: nothing else is locked while this is held, except the table of session indices.
    pub(crate) fn tunnel(&self) -> MutexGuard<'_, Tunn> {
        self.tunnel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn endpoint(&self) -> Option<SocketAddr> {
        *self.endpoint.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn moved_to(&self, addr: SocketAddr) {
        *self.endpoint.lock().unwrap_or_else(PoisonError::into_inner) = Some(addr);
    }
}

/// Everybody that packets are exchanged with: replaced as a whole, so that a reader sees one state of it.
#[derive(Default)]
pub(crate) struct Table {
    pub(crate) by_id: BTreeMap<MachineId, Arc<Member>>,
    pub(crate) by_key: HashMap<[u8; 32], Arc<Member>>,
    /// Whose address it is: packets to it go there, and packets from it must come from there.
    pub(crate) by_address: HashMap<IpAddr, Arc<Member>>,
    /// Whether strangers' datagrams may be those of a standard peer that moved.
    pub(crate) has_standard: bool,
}

/// The paths, which sender, receiver and prober share.
pub(crate) struct Directory {
    epoch: Instant,
    paths: Mutex<Paths>,
}

impl Directory {
    pub(crate) fn new(paths: Paths) -> Self {
        Self { epoch: Instant::now(), paths: Mutex::new(paths) }
    }

    pub(crate) fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    pub(crate) fn epoch(&self) -> Instant {
        self.epoch
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Paths> {
        // The state is consistent between any two statements, so a panic elsewhere does not spoil it.
        self.paths.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A packet of a peer came inside the carrier; whether the prober must look again.
    pub(crate) fn note_carried(&self, peer: MachineId) -> bool {
        let now = self.now();
        self.lock().note_carried(peer, now)
    }

    /// How to send to a peer now; whether the prober must look again.
    pub(crate) fn route(&self, peer: MachineId) -> (Route, bool) {
        let now = self.now();
        let mut paths = self.lock();
        let wake = paths.note_traffic(peer, now);
        let route = match paths.path(peer, now) {
            PathChoice::Direct { addr, .. } => Route::Direct(addr),
            PathChoice::Carrier => Route::Carrier,
        };
        (route, wake)
    }
}
