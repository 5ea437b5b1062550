//! Who the peers are, and by which virtual address the WireGuard engine knows them.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use clan_tunnel::{PathChoice, Paths};
use clan_types::MachineId;

/// Where one packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    Direct(SocketAddr, MachineId),
    Carrier(MachineId),
}

/// The state that sender, receiver and prober share.
pub(crate) struct Directory {
    epoch: Instant,
    state: Mutex<State>,
}

pub(crate) struct State {
    pub(crate) paths: Paths,
    by_virtual: HashMap<SocketAddr, MachineId>,
    virtuals: HashMap<MachineId, SocketAddr>,
    next_virtual: u64,
}

impl Directory {
    pub(crate) fn new(paths: Paths) -> Self {
        let state = State { paths, by_virtual: HashMap::new(), virtuals: HashMap::new(), next_virtual: 1 };
        Self { epoch: Instant::now(), state: Mutex::new(state) }
    }

    pub(crate) fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    pub(crate) fn epoch(&self) -> Instant {
        self.epoch
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent between any two statements, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The virtual address of a peer, allotted on first use.
    pub(crate) fn allot(&mut self, peer: MachineId) -> SocketAddr {
        if let Some(known) = self.virtuals.get(&peer) {
            return *known;
        }
        let mut octets = [0; 16];
        octets[0] = 0xfd;
        octets[8..].copy_from_slice(&self.next_virtual.to_be_bytes());
        self.next_virtual += 1;
        let virtual_addr = SocketAddr::new(IpAddr::V6(Ipv6Addr::from(octets)), 1);
        self.virtuals.insert(peer, virtual_addr);
        self.by_virtual.insert(virtual_addr, peer);
        virtual_addr
    }

    pub(crate) fn remove(&mut self, peer: MachineId) {
        self.paths.remove_peer(peer);
        if let Some(virtual_addr) = self.virtuals.remove(&peer) {
            self.by_virtual.remove(&virtual_addr);
        }
    }

    pub(crate) fn virtual_of(&self, peer: MachineId) -> Option<SocketAddr> {
        self.virtuals.get(&peer).copied()
    }

    /// The peer that sends from `src`, as its virtual address.
    pub(crate) fn virtual_at(&self, src: SocketAddr) -> Option<SocketAddr> {
        self.virtual_of(self.paths.peer_at(src)?)
    }

    /// How to send to a virtual address now; whether the prober must look again.
    pub(crate) fn route(&mut self, virtual_addr: SocketAddr, now: Duration) -> Option<(Route, bool)> {
        let peer = *self.by_virtual.get(&virtual_addr)?;
        let wake = self.paths.note_traffic(peer, now);
        let route = match self.paths.path(peer, now) {
            PathChoice::Direct { addr, .. } => Route::Direct(addr, peer),
            PathChoice::Carrier => Route::Carrier(peer),
        };
        Some((route, wake))
    }
}
