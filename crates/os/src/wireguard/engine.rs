//! The engine: handshakes and sessions come from gotatun's `noise`, packets move in two threads of our own.
//!
//! ```text
//! application → TUN ─ outbound thread: split, seal, send in one call per run ─▶ UDP, or the carrier's queue
//! application ← TUN ◀─ inbound thread: receive many, open, check, join ─ UDP
//!                   ◀─ carrier task: the same ─ the carrier's queue
//! timers task: handshakes again, keepalives, sessions that end
//! copies task: what applications say to the group of multicast DNS, to everybody bit by bit
//! ```
//!
//! No task of the runtime is woken for a packet. Each peer's sessions are behind a lock of their own.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use clan_tunnel::{
    filter::{Filter, Policy},
    multicast::Multicast,
};
use clan_types::MachineId;
use gotatun::{
    noise::{
        TimerParams, Tunn, TunnResult, handshake::parse_handshake_anon, index_table::IndexTable,
        rate_limiter::RateLimiter,
    },
    packet::{Packet, WgKind},
    tun::MtuWatcher,
    x25519::{PublicKey, StaticSecret},
};
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;
use tracing::{debug, trace};

use super::{
    Timing,
    peers::{Directory, Member, Route, Table},
    socket::Socket,
};
use crate::tun::Tun;

/// How often sessions are looked after; their times are in seconds.
const TIMER_INTERVAL: Duration = Duration::from_millis(250);
/// Handshakes from one address in a second before it must prove that it is there.
const HANDSHAKES: u64 = 100;
/// How old a session may be (section 6.1 of the paper): whoever was not met for longer is not there.
const SESSION: Duration = Duration::from_secs(180);
/// How long to wait for room to send before a packet is given up.
const SEND_WITHIN: rustix::event::Timespec = rustix::event::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Where a packet came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Udp(SocketAddr),
    Carrier(MachineId),
}

impl Source {
    /// An address to count handshakes by.
    fn address(self) -> SocketAddr {
        match self {
            Self::Udp(addr) => addr,
            Self::Carrier(peer) => {
                let mut octets = [0; 16];
                octets.copy_from_slice(&peer.as_bytes()[..16]);
                (Ipv6Addr::from(octets), 0).into()
            }
        }
    }
}

/// Who may reach what on this machine, and on each standard peer behind it, which has no filter of its own. `None`
/// until it is known.
#[derive(Default)]
pub(crate) struct Filters {
    own: Option<Filter>,
    behind: HashMap<MachineId, Filter>,
}

impl Filters {
    /// What is sent from here, or from a standard peer behind this machine.
    pub(crate) fn outbound(&mut self, from: Option<MachineId>, packet: &[u8], now: Duration) {
        let filter = match from {
            None => self.own.as_mut(),
            Some(peer) => self.behind.get_mut(&peer),
        };
        if let Some(filter) = filter {
            filter.outbound(packet, now);
        }
    }

    /// Whether a packet may go to this machine, or to a standard peer behind it.
    pub(crate) fn inbound(&mut self, to: Option<MachineId>, packet: &[u8], now: Duration) -> bool {
        match (&mut self.own, to) {
            (None, _) => true,
            (Some(own), None) => own.inbound(packet, now),
            (Some(_), Some(peer)) => self.behind.get_mut(&peer).is_some_and(|filter| filter.inbound(packet, now)),
        }
    }

    pub(crate) fn set(&mut self, own: Policy, mut behind: BTreeMap<MachineId, Policy>) {
        self.own.get_or_insert_default().set_policy(own);
        self.behind.retain(|peer, _| behind.contains_key(peer));
        for (peer, policy) in std::mem::take(&mut behind) {
            self.behind.entry(peer).or_default().set_policy(policy);
        }
    }
}

pub(crate) struct Engine {
    local: MachineId,
    private_key: StaticSecret,
    public_key: PublicKey,
    limiter: Arc<RateLimiter>,
    indices: IndexTable,
    /// Whose session or handshake an index belongs to.
    by_index: Mutex<HashMap<u32, Arc<Member>>>,
    table: RwLock<Arc<Table>>,
    mtu: MtuWatcher,
    pub(crate) tun: Tun,
    pub(crate) socket: Socket,
    pub(crate) directory: Directory,
    outgoing: mpsc::Sender<(MachineId, Bytes)>,
    timing: Timing,
    filters: Mutex<Filters>,
    multicast: Mutex<Multicast>,
    /// Tells whoever sends copies of what is said to the group that there are more.
    pub(crate) said: Notify,
    /// Tells the prober that its next moment may have come nearer.
    pub(crate) wake: Notify,
    /// UDP port whose packets have no business in the tunnel, beside the socket's own; 0: none.
    pub(crate) outside_port: AtomicU16,
    /// Readable once the threads shall end.
    stop: OwnedFd,
}

impl Engine {
    pub(crate) fn new(
        local: MachineId,
        private_key: StaticSecret,
        tun: Tun,
        socket: Socket,
        directory: Directory,
        outgoing: mpsc::Sender<(MachineId, Bytes)>,
        timing: Timing,
    ) -> io::Result<Self> {
        let public_key = PublicKey::from(&private_key);
        Ok(Self {
            limiter: Arc::new(RateLimiter::new(&public_key, HANDSHAKES)),
            local,
            private_key,
            public_key,
            indices: IndexTable::from_os_rng(),
            by_index: Mutex::default(),
            table: RwLock::default(),
            multicast: Mutex::new(Multicast::new(local, tun.address())),
            said: Notify::new(),
            mtu: MtuWatcher::new(u16::try_from(tun.mtu()).unwrap_or(u16::MAX)),
            tun,
            socket,
            directory,
            outgoing,
            timing,
            filters: Mutex::default(),
            wake: Notify::new(),
            outside_port: AtomicU16::new(0),
            stop: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Whether a packet that an application sent from this UDP port, as it seems, is really one that carries the tunnel.
    pub(crate) fn is_carrier(&self, source_port: Option<u16>) -> bool {
        let outside = self.outside_port.load(Ordering::Relaxed);
        source_port.is_some_and(|port| port == outside)
    }

    /// A peer without sessions.
    pub(crate) fn member(&self, id: MachineId, key: [u8; 32], standard: bool, keepalive: Option<u16>) -> Member {
        let mut tunnel = Tunn::new(
            self.private_key.clone(),
            PublicKey::from(key),
            None,
            keepalive,
            self.indices.clone(),
            self.limiter.clone(),
        );
        if let Some(age) = self.timing.rekey_after {
            tunnel.dangerously_set_timer_params(TimerParams { rekey_after_time: age..=age, ..TimerParams::default() });
        }
        Member::new(id, standard, tunnel)
    }

    pub(crate) fn table(&self) -> Arc<Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on these are the peers; sessions with anybody else are over.
    pub(crate) fn set_table(&self, table: Table) {
        self.by_index().retain(|_, member| table.by_id.get(&member.id).is_some_and(|kept| Arc::ptr_eq(kept, member)));
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
    }

    /// INVARIANT: nothing else is locked while this is held.
    pub(crate) fn filters(&self) -> MutexGuard<'_, Filters> {
        self.filters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// INVARIANT: nothing else is locked while this is held.
    pub(crate) fn multicast(&self) -> MutexGuard<'_, Multicast> {
        self.multicast.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn by_index(&self) -> MutexGuard<'_, HashMap<u32, Arc<Member>>> {
        self.by_index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn member_of_index(&self, index: u32) -> Option<Arc<Member>> {
        self.by_index().get(&index).cloned()
    }

    /// Whether a packet may be a peer's at all: strangers' are not even looked at, unless standard peers may roam.
    pub(crate) fn may_come_from(&self, source: Source, table: &Table) -> bool {
        match source {
            Source::Carrier(peer) => table.by_id.get(&peer).is_some_and(|member| !member.standard),
            Source::Udp(addr) => table.has_standard || self.directory.lock().peer_at(addr).is_some(),
        }
    }

    /// Everything but data.
    pub(crate) fn handle_handshake(&self, packet: Packet, source: Source, table: &Table) {
        let packet = match self.limiter.verify_packet(source.address(), packet) {
            Ok(packet) => packet,
            Err(TunnResult::WriteToNetwork(cookie)) => {
                match source {
                    Source::Udp(addr) => drop(self.socket.send(&Packet::from(cookie), addr)),
                    Source::Carrier(peer) => self.carry(peer, &Packet::from(cookie)),
                }
                return;
            }
            Err(_) => return,
        };
        let member = match &packet {
            WgKind::HandshakeInit(init) => parse_handshake_anon(&self.private_key, &self.public_key, init)
                .ok()
                .and_then(|half| table.by_key.get(&half.peer_static_public).cloned()),
            WgKind::HandshakeResp(response) => self.member_of_index(response.receiver_idx.get()),
            WgKind::CookieReply(cookie) => self.member_of_index(cookie.receiver_idx.get()),
            WgKind::Data(_) => None,
        };
        let Some(member) = member else { return };
        // Whoever is answered may use the session at once. Whoever answers waits for its first packet (section 5.4.6 of
        // the paper): what is sent right behind an answer overtakes it in `wireguard-go`, which then cannot open it.
        let answered = matches!(packet, WgKind::HandshakeResp(_));
        let answers = {
            let mut tunnel = member.tunnel();
            match tunnel.handle_incoming_packet(packet) {
                TunnResult::WriteToNetwork(answer) if answered => self.with_queued(&mut tunnel, Some(answer)),
                TunnResult::WriteToNetwork(answer) => vec![answer],
                TunnResult::Err(error) => {
                    trace!(peer = %member.id, ?error, "a handshake was refused");
                    return;
                }
                TunnResult::Done | TunnResult::WriteToTunnel(_) => Vec::new(),
            }
        };
        if let (true, Source::Udp(addr)) = (member.standard, source) {
            member.moved_to(addr);
        }
        answers.into_iter().for_each(|answer| self.send(&member, answer));
    }

    /// A way to the peer has just opened. A handshake that was begun before got lost on the way there, and the next one
    /// would come after seconds (`REKEY_TIMEOUT`, section 6.1 of the paper).
    ///
    /// INVARIANT: one of the two begins anew, as both see the way open. An end that is sent two initiations forgets its
    /// own; if both did, each would be left with a session that the other does not have.
    pub(crate) fn way_opened(&self, peer: MachineId) {
        if self.local > peer {
            return;
        }
        let table = self.table();
        let Some(member) = table.by_id.get(&peer).filter(|member| !member.standard) else { return };
        let again = {
            let mut tunnel = member.tunnel();
            if tunnel.has_active_session() { None } else { tunnel.format_handshake_initiation(true) }
        };
        if let Some(initiation) = again {
            self.send(member, initiation.into());
        }
    }

    /// What waited for a session, behind `first`.
    pub(crate) fn with_queued(&self, tunnel: &mut Tunn, first: Option<WgKind>) -> Vec<WgKind> {
        let mut mtu = self.mtu.clone();
        let mut all: Vec<WgKind> = first.into_iter().collect();
        all.extend(tunnel.get_queued_packets(&mut mtu));
        all
    }

    /// Sends a single packet to a peer, by whichever way there is.
    pub(crate) fn send(&self, member: &Arc<Member>, packet: WgKind) {
        self.note_index(member, &packet);
        self.send_all(member, &[Packet::from(packet)]);
    }

    /// Whom the answer to a handshake concerns.
    pub(crate) fn note_index(&self, member: &Arc<Member>, packet: &WgKind) {
        let index = match packet {
            WgKind::HandshakeInit(init) => init.sender_idx.get(),
            WgKind::HandshakeResp(response) => response.sender_idx.get(),
            WgKind::CookieReply(_) | WgKind::Data(_) => return,
        };
        self.by_index().insert(index, member.clone());
    }

    /// Sends sealed packets to a peer, as few calls as possible.
    pub(crate) fn send_all(&self, member: &Member, packets: &[Packet]) {
        let route = if member.standard {
            match member.endpoint() {
                Some(addr) => Route::Direct(addr),
                // It was never heard of: nobody knows where it is.
                None => return,
            }
        } else {
            let (route, wake) = self.directory.route(member.id);
            if wake {
                self.wake.notify_one();
            }
            route
        };
        let Route::Direct(addr) = route else {
            packets.iter().for_each(|packet| self.carry(member.id, packet));
            return;
        };
        let mut rest = packets;
        while !rest.is_empty() {
            match self.socket.send_run(rest, addr) {
                Ok(sent) => rest = rest.get(sent.max(1)..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.room_to_send() => {}
                Err(error) => {
                    // The system may know sooner than the prober that an address is out of reach.
                    trace!(%error, %addr, "direct sending failed; using the carrier");
                    if !member.standard {
                        rest.iter().for_each(|packet| self.carry(member.id, packet));
                    }
                    return;
                }
            }
        }
    }

    /// Takes a packet that an application sends to the group of multicast DNS to everybody whom a session leads to.
    pub(crate) fn say(&self, packet: &[u8]) {
        let now = self.directory.now();
        let Some(admitted) = self.multicast().outbound(packet, now) else {
            trace!("what a program says to the group is not carried");
            return;
        };
        // Standard peers have nobody who would judge what they hear.
        let alive = |member: &Member| !member.standard && member.tunnel().stats().0.is_some_and(|age| age < SESSION);
        let to = self.table().by_id.values().filter(|member| alive(member)).map(|member| member.id).collect();
        self.multicast().say(admitted, to);
        self.said.notify_one();
    }

    /// Notes a packet from the port of multicast DNS to one machine alone; false where none is carried.
    ///
    /// INVARIANT: an answer to somebody who was heard in the group begins no conversation in which they would reach anything here.
    pub(crate) fn is_answer_to_group(&self, packet: &[u8], now: Duration) -> bool {
        let mut multicast = self.multicast();
        multicast.outbound_alone(packet, now);
        multicast.is_on()
    }

    /// Sends the copies of what is said to the group, as fast as they may, until cancelled.
    pub(crate) async fn copy(&self, cancel: CancellationToken) {
        loop {
            let next = loop {
                let copy = self.multicast().poll(self.directory.now());
                let Some((peer, packet)) = copy else { break self.multicast().poll_timeout() };
                let Some(member) = self.table().by_id.get(&peer).cloned() else { continue };
                let packet = Packet::from_bytes(BytesMut::from(&packet[..]));
                let sealed = member.tunnel().handle_outgoing_packet(packet, None);
                if let Some(sealed) = sealed {
                    self.send(&member, sealed);
                }
            };
            let due = async {
                match next {
                    Some(next) => tokio::time::sleep_until((self.directory.epoch() + next).into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                () = self.said.notified() => {}
                () = due => {}
            }
        }
    }

    fn carry(&self, peer: MachineId, packet: &[u8]) {
        if self.outgoing.try_send((peer, Bytes::copy_from_slice(packet))).is_err() {
            trace!(%peer, "the carrier is full; a packet is dropped");
        }
    }

    /// Waits a moment for room in the socket's buffer.
    fn room_to_send(&self) -> bool {
        let mut waiting = [PollFd::new(&self.socket, PollFlags::OUT), PollFd::new(&self.stop, PollFlags::IN)];
        let ready = rustix::event::poll(&mut waiting, Some(&SEND_WITHIN)).is_ok_and(|count| count > 0);
        ready && waiting[1].revents().is_empty()
    }

    /// Waits until there is something to read; false if it is time to end.
    pub(crate) fn wait(&self, readable: BorrowedFd<'_>) -> bool {
        let mut waiting = [PollFd::new(&readable, PollFlags::IN), PollFd::new(&self.stop, PollFlags::IN)];
        match rustix::event::poll(&mut waiting, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => waiting[1].revents().is_empty(),
            Err(error) => {
                debug!(%error, "waiting for packets failed");
                false
            }
        }
    }

    /// Makes the threads end.
    pub(crate) fn stop(&self) {
        if let Err(error) = rustix::io::write(self.stop.as_fd(), &1u64.to_ne_bytes()) {
            debug!(%error, "the packet threads were not told to end");
        }
    }

    /// Looks after all sessions until cancelled.
    pub(crate) async fn keep_time(&self, cancel: CancellationToken) {
        let mut interval = tokio::time::interval(TIMER_INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                _ = interval.tick() => {}
            }
            // Without this the counts of a machine without peers would grow for ever.
            self.limiter.try_reset_count();
            self.by_index().retain(|index, _| self.indices.in_use(*index));
            for member in self.table().by_id.values() {
                // An error says that the session is over; the next packet makes a new one.
                let due = member.tunnel().update_timers().ok().flatten();
                if let Some(packet) = due {
                    self.send(member, packet);
                }
            }
        }
    }

    /// INVARIANT: what comes out of the tunnel has a source that is its sender's own.
    pub(crate) fn is_from(&self, table: &Table, member: &Arc<Member>, source: IpAddr) -> bool {
        table.by_address.get(&source).is_some_and(|owner| Arc::ptr_eq(owner, member))
    }
}
