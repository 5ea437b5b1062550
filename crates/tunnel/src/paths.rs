//! The paths to all peers.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    time::Duration,
};

use clan_types::MachineId;

use crate::{
    peer::{PathChange, PathChoice, Peer, canonical},
    probe::{Probe, ProbeKey, network_of, tag_of},
    rng::Rng,
};

/// A datagram to send from the WireGuard port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// Where to.
    pub to: SocketAddr,
    /// What.
    pub bytes: Vec<u8>,
}

/// INVARIANT: no more own addresses than this are told to others, however many peers say how they see this machine.
pub const MAX_OBSERVED: usize = 4;

/// The paths to all peers of one machine.
pub struct Paths {
    local: MachineId,
    /// Which network this machine is in, as it tells its peers.
    network: u8,
    rng: Rng,
    peers: BTreeMap<MachineId, Peer>,
    by_tag: BTreeMap<[u8; 8], MachineId>,
    /// Who sends from an address. INVARIANT: each address is among its peer's candidates.
    by_addr: BTreeMap<SocketAddr, MachineId>,
    transmits: VecDeque<Transmit>,
    changes: VecDeque<PathChange>,
}

impl Paths {
    /// No peers yet. `seed` must be secret and fresh: probes' nonces are drawn from it.
    pub fn new(local: MachineId, seed: [u8; 32]) -> Self {
        Self {
            local,
            network: 0,
            rng: Rng::new(seed),
            peers: BTreeMap::new(),
            by_tag: BTreeMap::new(),
            by_addr: BTreeMap::new(),
            transmits: VecDeque::new(),
            changes: VecDeque::new(),
        }
    }

    /// Adds a peer and begins to probe `candidates`. A peer that exists with the same key only gets new candidates.
    pub fn add_peer(&mut self, peer: MachineId, key: ProbeKey, candidates: &[SocketAddr], now: Duration) {
        if self.peers.get(&peer).is_none_or(|known| known.key != key) {
            self.remove_peer(peer);
            let new = Peer::new(key);
            self.by_tag.insert(new.tag, peer);
            self.peers.insert(peer, new);
        }
        self.set_candidates(peer, candidates, now);
    }

    /// Replaces the addresses at which `peer` may be reachable; at most [`crate::MAX_CANDIDATES`] are kept. Unknown
    /// peers are ignored.
    pub fn set_candidates(&mut self, peer: MachineId, candidates: &[SocketAddr], now: Duration) {
        if let Some(known) = self.peers.get_mut(&peer) {
            known.set_candidates(candidates, now);
            self.forget_stale_addresses(peer);
        }
    }

    /// Forgets a peer.
    pub fn remove_peer(&mut self, peer: MachineId) {
        if let Some(known) = self.peers.remove(&peer) {
            self.by_tag.retain(|tag, owner| *tag != known.tag || *owner != peer);
            self.by_addr.retain(|_, owner| *owner != peer);
        }
    }

    /// Says that a packet is being sent to `peer`: its direct path is then watched closely. True if
    /// [`Self::next_timeout`] may have moved.
    pub fn note_traffic(&mut self, peer: MachineId, now: Duration) -> bool {
        self.peers.get_mut(&peer).is_some_and(|known| known.note_traffic(now))
    }

    /// Says that this machine is in another network now: no address has proven itself there. Peers are told, and asked.
    pub fn moved(&mut self, now: Duration) {
        self.network = self.network.wrapping_add(1);
        for (id, peer) in &mut self.peers {
            let had = peer.used();
            peer.moved(now);
            if peer.used() != had {
                self.changes.push_back(PathChange { peer: *id, path: peer.path(now) });
            }
        }
    }

    /// Says that a packet of `peer` came inside the carrier; who speaks there was proven by whoever runs it. True if
    /// [`Self::next_timeout`] may have moved.
    pub fn note_carried(&mut self, peer: MachineId, now: Duration) -> bool {
        let doubted = self.peers.get_mut(&peer).is_some_and(|known| known.doubt(now));
        if doubted {
            self.changes.push_back(PathChange { peer, path: PathChoice::Carrier });
        }
        doubted
    }

    /// Takes a datagram that [`crate::is_probe`], and returns the reply to send at once. Whatever is not an authentic
    /// probe of a peer is ignored without a reply.
    pub fn handle_probe(&mut self, src: SocketAddr, bytes: &[u8], now: Duration) -> Option<Transmit> {
        let src = canonical(src);
        let id = *self.by_tag.get(&tag_of(bytes)?)?;
        let peer = self.peers.get_mut(&id)?;
        let before = peer.used();
        let reply = match Probe::decode(bytes, &peer.key, &id, &self.local)? {
            Probe::Request { nonce: echo } => {
                let nonce = peer.on_request(src, &mut self.rng, now)?;
                Some(Probe::Answer { nonce, echo, observed: src })
            }
            Probe::Answer { nonce, echo, observed } => {
                if !peer.on_echo(src, echo, now) {
                    return None;
                }
                // INVARIANT: a move is believed only with the echo of a fresh nonce, so no recording can feign one.
                peer.on_network(src, network_of(bytes));
                peer.observed = Some(canonical(observed));
                Some(Probe::Confirm { echo: nonce, observed: src })
            }
            Probe::Confirm { echo, observed } => {
                if !peer.on_echo(src, echo, now) {
                    return None;
                }
                // INVARIANT: a move is believed only with the echo of a fresh nonce, so no recording can feign one.
                peer.on_network(src, network_of(bytes));
                peer.observed = Some(canonical(observed));
                None
            }
        };
        let reply =
            reply.map(|probe| Transmit { to: src, bytes: probe.encode(&peer.key, &self.local, &id, self.network) });
        let proven = peer.is_proven(src);
        if peer.used() != before {
            self.changes.push_back(PathChange { peer: id, path: peer.path(now) });
        }
        self.forget_stale_addresses(id);
        // An address belongs to whoever proved it; a mere request may be a recording, so it takes only what is free.
        let taken = self
            .by_addr
            .get(&src)
            .is_some_and(|owner| *owner != id && self.peers.get(owner).is_some_and(|p| p.is_proven(src)));
        if proven || !taken {
            self.by_addr.insert(src, id);
        }
        reply
    }

    /// Does what is due: requests to send come out of [`Self::poll_transmit`].
    pub fn handle_timeout(&mut self, now: Duration) {
        let (mut changes, mut handled) = (Vec::new(), Vec::new());
        for (id, peer) in &mut self.peers {
            if peer.next_timeout().is_none_or(|at| at > now) {
                continue;
            }
            handled.push(*id);
            let had = peer.used();
            for (to, nonce) in peer.handle_timeout(&mut self.rng, now) {
                self.transmits.push_back(Transmit {
                    to,
                    bytes: Probe::Request { nonce }.encode(&peer.key, &self.local, id, self.network),
                });
            }
            if peer.used() != had {
                changes.push(PathChange { peer: *id, path: peer.path(now) });
            }
        }
        self.changes.extend(changes);
        for id in handled {
            self.forget_stale_addresses(id);
        }
    }

    /// When [`Self::handle_timeout`] must be called next; may move after any other call.
    pub fn next_timeout(&self) -> Option<Duration> {
        self.peers.values().filter_map(Peer::next_timeout).min()
    }

    /// A datagram to send, until `None`.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// A change of path, until `None`.
    pub fn poll_change(&mut self) -> Option<PathChange> {
        self.changes.pop_front()
    }

    /// How to send to `peer` now.
    pub fn path(&self, peer: MachineId, now: Duration) -> PathChoice {
        self.peers.get(&peer).map_or(PathChoice::Carrier, |known| known.path(now))
    }

    /// Whose datagrams come from `src`: a claim that WireGuard still has to verify.
    pub fn peer_at(&self, src: SocketAddr) -> Option<MachineId> {
        self.by_addr.get(&canonical(src)).copied()
    }

    /// This machine's own addresses as peers see them, at most [`MAX_OBSERVED`]: those that most peers see, for behind a
    /// router without a dependable mapping each peer sees another.
    pub fn observed(&self) -> Vec<SocketAddr> {
        let mut seen: BTreeMap<SocketAddr, usize> = BTreeMap::new();
        for addr in self.peers.values().filter_map(|p| p.observed) {
            *seen.entry(addr).or_default() += 1;
        }
        let mut seen: Vec<(Reverse<usize>, SocketAddr)> =
            seen.into_iter().map(|(addr, by)| (Reverse(by), addr)).collect();
        seen.sort_unstable();
        let mut observed: Vec<SocketAddr> = seen.into_iter().take(MAX_OBSERVED).map(|(_, addr)| addr).collect();
        observed.sort_unstable();
        observed
    }

    fn forget_stale_addresses(&mut self, id: MachineId) {
        if let Some(peer) = self.peers.get(&id) {
            self.by_addr.retain(|addr, owner| *owner != id || peer.candidates.iter().any(|c| c.addr == *addr));
        }
    }
}
