//! What is known about the paths to one peer.

use std::{collections::VecDeque, net::SocketAddr, time::Duration};

use clan_types::MachineId;

use crate::{
    probe::{Nonce, ProbeKey},
    rng::Rng,
};

/// A direct path that carries traffic is given up when no probe on it was answered for this long.
pub const LOST_AFTER: Duration = Duration::from_secs(3);

/// INVARIANT: no peer has more addresses than this; the rest is ignored.
pub const MAX_CANDIDATES: usize = 16;
/// Of these, how many may have been learnt from the peer's own probes.
const MAX_REFLEXIVE: usize = 4;

/// Probes on a direct path that carries traffic.
const BUSY_INTERVAL: Duration = Duration::from_secs(1);
/// Probes on an idle direct path: often enough that a NAT does not forget it.
const IDLE_INTERVAL: Duration = Duration::from_secs(10);
/// The next probe after one that was not answered.
const RETRY: Duration = Duration::from_millis(500);
/// How often to look whether another address has become better.
const COMPARE_INTERVAL: Duration = Duration::from_secs(30);
/// The longest pause between probes while there is no direct path: with and without traffic.
const BUSY_BACKOFF: Duration = Duration::from_secs(5);
const IDLE_BACKOFF: Duration = Duration::from_secs(30);
/// A peer is busy if there was traffic this recently.
const BUSY_FOR: Duration = Duration::from_secs(5);
/// An address that nobody named and that proved nothing is forgotten when the peer was not heard from it for this long.
const FORGET_AFTER: Duration = Duration::from_secs(300);
/// Another path must be at least this much faster before it replaces the one in use.
const WORTHWHILE: Duration = Duration::from_millis(1);
/// What comes inside the carrier so soon after a direct path was proven had been sent before.
const STRAGGLING: Duration = Duration::from_millis(250);
const MAX_OUTSTANDING: usize = 8;

/// How packets to a peer travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathChoice {
    /// Straight over UDP.
    Direct {
        /// To this address.
        addr: SocketAddr,
        /// Measured round-trip time, smoothed.
        rtt: Duration,
    },
    /// Inside the QUIC connection.
    Carrier,
}

/// The path to a peer changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathChange {
    /// The peer.
    pub peer: MachineId,
    /// The path that is used from now on.
    pub path: PathChoice,
}

/// An address at which the peer may be reachable.
#[derive(Debug)]
pub(crate) struct Candidate {
    pub(crate) addr: SocketAddr,
    /// Named by the caller, as opposed to learnt from the peer's probes.
    configured: bool,
    heard: Duration,
    outstanding: VecDeque<(Nonce, Duration)>,
    answered: Option<Duration>,
    unanswered_since: Option<Duration>,
    answers: u32,
    rtt: Duration,
    last_sent: Option<Duration>,
    /// `None`: never probed unasked.
    next_probe: Option<Duration>,
    backoff: Duration,
}

impl Candidate {
    fn new(addr: SocketAddr, configured: bool, now: Duration) -> Self {
        Self {
            addr,
            configured,
            heard: now,
            outstanding: VecDeque::new(),
            answered: None,
            unanswered_since: None,
            answers: 0,
            rtt: Duration::ZERO,
            last_sent: None,
            next_probe: configured.then_some(now),
            backoff: RETRY,
        }
    }

    /// Makes a nonce whose echo will prove that this address works both ways.
    fn challenge(&mut self, rng: &mut Rng, now: Duration) -> Nonce {
        let nonce = rng.nonce();
        if self.outstanding.len() == MAX_OUTSTANDING {
            self.outstanding.pop_front();
        }
        self.outstanding.push_back((nonce, now));
        nonce
    }

    /// What was proven no longer holds.
    fn disprove(&mut self) {
        self.answers = 0;
        self.answered = None;
        self.unanswered_since = None;
        self.outstanding.clear();
    }

    /// Probes soon, but not twice within the retry interval.
    fn hurry(&mut self, now: Duration) {
        if self.configured || self.answers > 0 {
            let earliest = self.last_sent.map_or(now, |sent| now.max(sent + RETRY));
            self.next_probe = Some(self.next_probe.map_or(earliest, |at| at.min(earliest)));
            self.backoff = RETRY;
        }
    }
}

pub(crate) struct Peer {
    pub(crate) key: ProbeKey,
    pub(crate) tag: [u8; 8],
    pub(crate) candidates: Vec<Candidate>,
    /// Index-free reference to the candidate in use.
    active: Option<SocketAddr>,
    last_traffic: Option<Duration>,
    busy_since: Duration,
    /// Our own address, as the peer sees it.
    pub(crate) observed: Option<SocketAddr>,
    /// Which network the peer was in when it last proved an address.
    network: Option<u8>,
}

impl Peer {
    pub(crate) fn new(key: ProbeKey) -> Self {
        let tag = key.tag();
        Self {
            key,
            tag,
            candidates: Vec::new(),
            active: None,
            last_traffic: None,
            busy_since: Duration::ZERO,
            observed: None,
            network: None,
        }
    }

    pub(crate) fn path(&self, now: Duration) -> PathChoice {
        match self.active_candidate() {
            Some(candidate) if self.deadline(candidate).is_none_or(|lost| now < lost) => {
                PathChoice::Direct { addr: candidate.addr, rtt: candidate.rtt }
            }
            _ => PathChoice::Carrier,
        }
    }

    fn active_candidate(&self) -> Option<&Candidate> {
        let active = self.active?;
        self.candidates.iter().find(|c| c.addr == active)
    }

    fn is_busy(&self, now: Duration) -> bool {
        self.last_traffic.is_some_and(|at| now < at + BUSY_FOR)
    }

    /// When the active candidate is lost, unless an answer arrives before.
    fn deadline(&self, active: &Candidate) -> Option<Duration> {
        let quiet = active.unanswered_since.map(|at| at + LOST_AFTER);
        // With traffic, the time since the last answer counts, so that a cut is noticed in time wherever it falls
        // between two probes.
        let busy = self.last_traffic.and_then(|last| {
            let lost = active.answered.unwrap_or_default().max(self.busy_since) + LOST_AFTER;
            (lost < last + BUSY_FOR).then_some(lost)
        });
        match (quiet, busy) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// True if timeouts may have moved.
    pub(crate) fn note_traffic(&mut self, now: Duration) -> bool {
        let was_busy = self.is_busy(now);
        self.last_traffic = Some(now);
        if !was_busy {
            self.busy_since = now;
            for candidate in &mut self.candidates {
                if self.active.is_none_or(|active| active == candidate.addr) {
                    candidate.hurry(now);
                }
            }
        }
        !was_busy
    }

    /// Takes over the caller's addresses; what the peer's own probes taught is kept.
    pub(crate) fn set_candidates(&mut self, addrs: &[SocketAddr], now: Duration) {
        let mut wanted: Vec<SocketAddr> = Vec::new();
        for addr in addrs.iter().map(|a| canonical(*a)).filter(is_usable) {
            if !wanted.contains(&addr) && wanted.len() < MAX_CANDIDATES - MAX_REFLEXIVE {
                wanted.push(addr);
            }
        }
        let active = self.active;
        for candidate in &mut self.candidates {
            candidate.configured = wanted.contains(&candidate.addr);
            if candidate.configured && candidate.next_probe.is_none() {
                candidate.next_probe = Some(now);
            }
        }
        // An address that works stays until it no longer does, whoever has stopped naming it.
        self.candidates.retain(|c| c.configured || c.answers > 0 || Some(c.addr) == active);
        for addr in wanted {
            if !self.candidates.iter().any(|c| c.addr == addr) {
                self.candidates.push(Candidate::new(addr, true, now));
            }
        }
        self.trim_reflexive();
    }

    fn trim_reflexive(&mut self) {
        while self.candidates.iter().filter(|c| !c.configured).count() > MAX_REFLEXIVE {
            let active = self.active;
            // INVARIANT: what never proved itself goes first, so replayed probes cannot push a working address out.
            let oldest = self
                .candidates
                .iter()
                .enumerate()
                .filter(|(_, c)| !c.configured && Some(c.addr) != active)
                .min_by_key(|(_, c)| (c.answers > 0, c.heard));
            let Some((index, _)) = oldest else { return };
            self.candidates.remove(index);
        }
    }

    /// The peer asked from `src`; returns the nonce to send along with the answer.
    pub(crate) fn on_request(&mut self, src: SocketAddr, rng: &mut Rng, now: Duration) -> Option<Nonce> {
        if !self.candidates.iter().any(|c| c.addr == src) {
            self.candidates.push(Candidate::new(src, false, now));
            self.trim_reflexive();
        }
        let candidate = self.candidates.iter_mut().find(|c| c.addr == src)?;
        candidate.heard = now;
        Some(candidate.challenge(rng, now))
    }

    /// A challenge came back from `src`; false if none is outstanding there.
    pub(crate) fn on_echo(&mut self, src: SocketAddr, echo: Nonce, now: Duration) -> bool {
        let (busy, active) = (self.is_busy(now), self.active);
        let Some(candidate) = self.candidates.iter_mut().find(|c| c.addr == src) else { return false };
        // INVARIANT: only the echo of a nonce that we sent to this very address moves a path, and only once.
        let Some(index) = candidate.outstanding.iter().position(|(nonce, _)| *nonce == echo) else { return false };
        let Some((_, sent)) = candidate.outstanding.remove(index) else { return false };
        let rtt = now.saturating_sub(sent);
        if rtt > LOST_AFTER {
            return false;
        }
        candidate.rtt = if candidate.answers == 0 { rtt } else { (candidate.rtt * 7 + rtt) / 8 };
        candidate.answers = candidate.answers.saturating_add(1);
        candidate.answered = Some(now);
        candidate.unanswered_since = None;
        candidate.heard = now;
        candidate.backoff = RETRY;
        let interval = match active {
            Some(active) if active != src => COMPARE_INTERVAL,
            _ if busy => BUSY_INTERVAL,
            _ => IDLE_INTERVAL,
        };
        candidate.next_probe = Some(now + interval);
        self.consider(src, busy, now);
        true
    }

    /// The peer has just proven `src`, and says which network it is in. If it has moved, nothing else that it proved
    /// holds any longer.
    pub(crate) fn on_network(&mut self, src: SocketAddr, network: u8) {
        if self.network.replace(network).is_some_and(|old| old != network) {
            self.candidates.iter_mut().filter(|c| c.addr != src).for_each(Candidate::disprove);
            self.active = Some(src);
        }
    }

    /// This machine has moved: every address has to prove itself again, at once.
    pub(crate) fn moved(&mut self, now: Duration) {
        self.active = None;
        self.observed = None;
        for candidate in &mut self.candidates {
            candidate.disprove();
            candidate.backoff = RETRY;
            candidate.next_probe = Some(now);
        }
    }

    /// The peer sends inside the carrier, so it has no direct path, and perhaps never again this one: it has moved, mostly.
    /// The carrier evidently works; the direct path may prove itself again. True if it has been left.
    pub(crate) fn doubt(&mut self, now: Duration) -> bool {
        let Some(active) = self.active_candidate() else { return false };
        if active.answered.is_some_and(|at| now < at + STRAGGLING) {
            return false;
        }
        self.active = None;
        self.candidates.iter_mut().for_each(|candidate| candidate.hurry(now));
        true
    }

    /// Whether the candidate at `src`, just answered, should be used from now on.
    fn consider(&mut self, src: SocketAddr, busy: bool, now: Duration) {
        let Some(active) = self.active_candidate() else {
            self.active = Some(src);
            return;
        };
        if active.addr == src {
            return;
        }
        let (active_addr, active_rtt) = (active.addr, active.rtt);
        let Some(other) = self.candidates.iter_mut().find(|c| c.addr == src) else { return };
        // Hysteresis: clearly better, and twice in a row.
        if other.rtt + WORTHWHILE <= active_rtt && other.rtt * 4 <= active_rtt * 3 {
            if other.answers >= 2 {
                self.active = Some(src);
                other.next_probe = Some(now + if busy { BUSY_INTERVAL } else { IDLE_INTERVAL });
                if let Some(previous) = self.candidates.iter_mut().find(|c| c.addr == active_addr) {
                    previous.next_probe = Some(now + COMPARE_INTERVAL);
                }
            } else {
                other.next_probe = Some(now + RETRY);
            }
        }
    }

    /// The address in use, whether or not its time has run out.
    pub(crate) fn used(&self) -> Option<SocketAddr> {
        self.active
    }

    pub(crate) fn next_timeout(&self) -> Option<Duration> {
        let deadline = self.active_candidate().and_then(|c| self.deadline(c));
        self.candidates.iter().filter_map(|c| c.next_probe).chain(deadline).min()
    }

    /// Gives up what is lost, and returns the requests that are due.
    pub(crate) fn handle_timeout(&mut self, rng: &mut Rng, now: Duration) -> Vec<(SocketAddr, Nonce)> {
        if let Some(active) = self.active_candidate()
            && self.deadline(active).is_some_and(|lost| lost <= now)
        {
            self.lose_active(now);
        }
        let (busy, active) = (self.is_busy(now), self.active);
        for candidate in self.candidates.iter_mut().filter(|c| Some(c.addr) != active) {
            if candidate.unanswered_since.is_some_and(|at| at + LOST_AFTER <= now) {
                candidate.disprove();
            }
        }
        self.candidates
            .retain(|c| c.configured || c.answers > 0 || Some(c.addr) == active || now < c.heard + FORGET_AFTER);
        let mut due = Vec::new();
        for candidate in &mut self.candidates {
            if candidate.next_probe.is_none_or(|at| at > now) {
                continue;
            }
            let nonce = candidate.challenge(rng, now);
            candidate.last_sent = Some(now);
            let in_use = active == Some(candidate.addr);
            if in_use || candidate.answers > 0 {
                candidate.unanswered_since.get_or_insert(now);
            }
            let pause = if in_use {
                RETRY
            } else if active.is_some() {
                COMPARE_INTERVAL
            } else {
                candidate.backoff = (candidate.backoff * 2).min(if busy { BUSY_BACKOFF } else { IDLE_BACKOFF });
                candidate.backoff
            };
            candidate.next_probe = Some(now + pause);
            due.push((candidate.addr, nonce));
        }
        due
    }

    fn lose_active(&mut self, now: Duration) {
        let Some(lost) = self.active.take() else { return };
        for candidate in &mut self.candidates {
            candidate.hurry(now);
            if candidate.addr == lost {
                candidate.disprove();
            }
        }
        let fresh = |c: &&Candidate| c.answered.is_some_and(|at| now < at + LOST_AFTER) && c.unanswered_since.is_none();
        self.active = self.candidates.iter().filter(fresh).min_by_key(|c| c.rtt).map(|c| c.addr);
    }

    /// Whether `addr` has answered and has not been given up since.
    pub(crate) fn is_proven(&self, addr: SocketAddr) -> bool {
        self.candidates.iter().any(|c| c.addr == addr && c.answers > 0)
    }
}

/// One form for each address: IPv4 is never written as IPv6, and nothing hides in scope or flow label.
pub(crate) fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

fn is_usable(addr: &SocketAddr) -> bool {
    let ip = addr.ip();
    addr.port() != 0 && !ip.is_unspecified() && !ip.is_multicast()
}
