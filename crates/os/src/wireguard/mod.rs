//! WireGuard to every machine of the clan, over whichever path works.
//!
//! The [`engine`] seals and opens packets, and sends each straight over UDP where `clan_tunnel` says that this works;
//! otherwise it hands it to the [`Carrier`], which takes it inside a QUIC connection. Standard WireGuard peers, which know
//! neither probes nor the carrier, are sent to where they were heard last, as the protocol has it.

mod engine;
mod inbound;
mod outbound;
mod peers;
mod socket;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    thread,
    time::Duration,
};

use bytes::Bytes;
pub use clan_tunnel::filter::{Access, Policy, Transport};
pub use clan_tunnel::{PathChange, PathChoice};
use clan_tunnel::{Paths, ProbeKey};
use clan_types::{MachineId, WgPublicKey};
use gotatun::x25519::{PublicKey, StaticSecret};
use tokio::{
    sync::{broadcast, mpsc},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, debug_span, trace};

use self::{
    engine::Engine,
    peers::{Directory, Table},
    socket::Socket,
};
use crate::tun::Tun;

/// How many path changes a slow listener may be behind.
const CHANGES: usize = 256;
/// How long [`Wireguard::stop`] waits for tasks that were told to end.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// What WireGuard needs to start.
pub struct WireguardConfig {
    /// This machine.
    pub local: MachineId,
    /// Its WireGuard private key (X25519).
    pub private_key: [u8; 32],
    /// The device that applications send through.
    pub tun: Tun,
    /// UDP port on all addresses; 0 lets the system choose.
    pub udp_port: u16,
    /// The way inside QUIC connections.
    pub carrier: Carrier,
    /// When sessions are renewed.
    pub timing: Timing,
}

/// When sessions are renewed. The default is what the protocol says, and what to use outside of tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timing {
    /// The age at which a session is replaced while packets are sent, instead of two minutes.
    pub rekey_after: Option<Duration>,
}

/// The way inside QUIC connections: always works, may be slow. Both queues are bounded; packets that do not fit are dropped, as on any network.
pub struct Carrier {
    /// Packets for a peer, to be sent as one datagram each.
    pub outgoing: mpsc::Sender<(MachineId, Bytes)>,
    /// Datagrams that came from a peer on a connection which authenticated that peer.
    pub incoming: mpsc::Receiver<(MachineId, Bytes)>,
}

/// The other ends of a [`Carrier`]'s queues, for whoever owns the QUIC connections.
pub struct CarrierEnds {
    /// Packets to send.
    pub outgoing: mpsc::Receiver<(MachineId, Bytes)>,
    /// Where to put received packets.
    pub incoming: mpsc::Sender<(MachineId, Bytes)>,
}

impl Carrier {
    /// A carrier and the ends to connect it by; each direction queues up to `capacity` packets.
    pub fn channel(capacity: usize) -> (Self, CarrierEnds) {
        let (outgoing, out_rx) = mpsc::channel(capacity);
        let (in_tx, incoming) = mpsc::channel(capacity);
        (Self { outgoing, incoming }, CarrierEnds { outgoing: out_rx, incoming: in_tx })
    }
}

/// A machine to exchange packets with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WgPeer {
    /// The machine.
    pub id: MachineId,
    /// Its WireGuard key.
    pub public_key: WgPublicKey,
    /// Its addresses inside: the only sources it may send from.
    pub addresses: Vec<IpAddr>,
    /// Whether it speaks WireGuard and nothing else of ours: a phone, or somebody else's program. What is between it and
    /// other peers passes through here.
    pub standard: bool,
    /// UDP addresses at which it may be reachable directly; of a standard peer the first one is tried until it is heard.
    pub candidates: Vec<SocketAddr>,
    /// Sends an empty packet when idle this long; whole seconds.
    pub keepalive: Option<Duration>,
}

/// How a peer is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WgPeerStatus {
    /// The machine.
    pub id: MachineId,
    /// How packets to it travel now.
    pub path: PathChoice,
    /// How long ago the last handshake was completed.
    pub last_handshake: Option<Duration>,
    /// Bytes received from it, as WireGuard counts them.
    pub rx_bytes: u64,
    /// Bytes sent to it.
    pub tx_bytes: u64,
}

/// Why WireGuard could not start or be changed.
#[derive(Debug, thiserror::Error)]
pub enum WireguardError {
    /// The UDP port could not be bound.
    #[error("cannot bind UDP port {port} for WireGuard")]
    Bind {
        /// The port.
        port: u16,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Randomness was not available.
    #[error("the system gave no randomness")]
    Random(#[source] std::io::Error),
    /// The threads that move packets could not be started.
    #[error("cannot start the threads that move packets")]
    Threads(#[source] std::io::Error),
    /// The device took no second address.
    #[error("the network device takes no IPv4 address")]
    Address(#[source] std::io::Error),
    /// It was stopped before.
    #[error("WireGuard is stopped")]
    Stopped,
}

/// What one of the threads that move packets does.
type PacketThread = fn(&Engine);

/// A running WireGuard device. Call [`Wireguard::stop`] before dropping it, so that the network device is gone when
/// it returns.
pub struct Wireguard {
    /// `None` once stopped, so that port and device are gone.
    running: Mutex<Option<Running>>,
    private_key: StaticSecret,
    own_prefix: [u8; 6],
    changes: broadcast::Sender<PathChange>,
    stop: CancellationToken,
    udp_port: u16,
}

struct Running {
    engine: Arc<Engine>,
    peers: BTreeMap<MachineId, WgPeer>,
    /// The second address.
    ipv4: Option<Ipv4Addr>,
    tasks: Vec<(&'static str, JoinHandle<()>)>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Wireguard {
    /// Starts without peers.
    pub async fn start(config: WireguardConfig) -> Result<Self, WireguardError> {
        let WireguardConfig { local, private_key, tun, udp_port, carrier, timing } = config;
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|e| WireguardError::Random(io::Error::other(e)))?;
        let bind_failed = |source| WireguardError::Bind { port: udp_port, source };
        let socket = Socket::bind(udp_port).map_err(bind_failed)?;
        let udp_port = socket.local_addr().map_err(bind_failed)?.port();
        let mut own_prefix = [0; 6];
        own_prefix.copy_from_slice(&tun.address().octets()[..6]);
        let private_key = StaticSecret::from(private_key);
        let directory = Directory::new(Paths::new(local, seed));
        let engine = Engine::new(local, private_key.clone(), tun, socket, directory, carrier.outgoing, timing);
        let engine = Arc::new(engine.map_err(WireguardError::Threads)?);
        let changes = broadcast::Sender::new(CHANGES);
        let stop = CancellationToken::new();
        let mut running = Running {
            engine: engine.clone(),
            peers: BTreeMap::new(),
            ipv4: None,
            tasks: Vec::new(),
            threads: Vec::new(),
        };
        let moves: [(&str, PacketThread); 2] = [("clan-outbound", outbound::run), ("clan-inbound", inbound::run)];
        for (name, work) in moves {
            let moved = engine.clone();
            let thread = thread::Builder::new().name(name.into()).spawn(move || work(&moved));
            match thread {
                Ok(thread) => running.threads.push(thread),
                Err(error) => {
                    engine.stop();
                    return Err(WireguardError::Threads(error));
                }
            }
        }
        let prober = probe(engine.clone(), changes.clone(), stop.clone()).instrument(debug_span!("path_prober"));
        running.tasks.push(("prober", tokio::spawn(prober)));
        let (timed, cancel) = (engine.clone(), stop.clone());
        running.tasks.push(("timers", tokio::spawn(async move { timed.keep_time(cancel).await })));
        let (copied, cancel) = (engine.clone(), stop.clone());
        running.tasks.push(("copies", tokio::spawn(async move { copied.copy(cancel).await })));
        let carried = inbound::run_carrier(engine, carrier.incoming, stop.clone());
        running.tasks.push(("carrier", tokio::spawn(carried)));
        Ok(Self { running: Mutex::new(Some(running)), private_key, own_prefix, changes, stop, udp_port })
    }

    /// Makes `peers` the whole set: adds, updates and removes as needed; sessions of unchanged peers go on. A peer
    /// whose key is unusable, or that shares id, key or an address with an earlier one, is left out.
    pub async fn set_peers(&self, peers: Vec<WgPeer>) -> Result<(), WireguardError> {
        self.exchange_with(peers)?;
        if let Err(error) = self.lead_here().await {
            debug!(%error, "without IPv4");
        }
        Ok(())
    }

    fn exchange_with(&self, peers: Vec<WgPeer>) -> Result<(), WireguardError> {
        let mut running = self.running();
        let running = running.as_mut().ok_or(WireguardError::Stopped)?;
        let engine = &running.engine;
        let wanted = distinct(peers, &self.private_key);
        let old = engine.table();
        let mut table = Table::default();
        for (id, peer) in &wanted {
            let key = *peer.public_key.as_bytes();
            let keepalive = peer.keepalive.map(|every| u16::try_from(every.as_secs().max(1)).unwrap_or(u16::MAX));
            let known = running
                .peers
                .get(id)
                .filter(|known| known.public_key == peer.public_key && known.standard == peer.standard);
            let member = match (known, old.by_id.get(id)) {
                (Some(known), Some(member)) => {
                    if known.keepalive != peer.keepalive {
                        member.tunnel().set_persistent_keepalive(keepalive);
                    }
                    member.clone()
                }
                _ => {
                    debug!(peer = %id, "peer set");
                    Arc::new(engine.member(*id, key, peer.standard, keepalive))
                }
            };
            let candidates = self.outside(&peer.candidates);
            if peer.standard {
                table.has_standard = true;
                if let (None, Some(first)) = (member.endpoint(), candidates.first()) {
                    member.moved_to(*first);
                }
            } else {
                let shared = self.private_key.diffie_hellman(&PublicKey::from(key));
                let now = engine.directory.now();
                engine.directory.lock().add_peer(*id, ProbeKey::derive(shared.as_bytes()), &candidates, now);
            }
            for address in &peer.addresses {
                table.by_address.insert(*address, member.clone());
            }
            table.by_key.insert(key, member.clone());
            table.by_id.insert(*id, member);
        }
        for (id, _) in running.peers.iter().filter(|(id, _)| wanted.get(*id).is_none_or(|peer| peer.standard)) {
            engine.directory.lock().remove_peer(*id);
        }
        let others = table.by_address.iter().map(|(address, member)| (*address, member.id)).collect();
        engine.multicast().set_others(others);
        engine.set_table(table);
        running.peers = wanted;
        engine.wake.notify_one();
        Ok(())
    }

    /// From now on this is who may reach what here, and on the standard peers behind this machine; whoever is not named
    /// reaches nothing. Before the first call everything passes that comes from a peer.
    pub fn set_policy(&self, own: Policy, behind: BTreeMap<MachineId, Policy>) {
        if let Some(running) = self.running().as_ref() {
            running.engine.filters().set(own, behind);
        }
    }

    /// Carries multicast DNS from now on, among machines with these names, lower case, this one's included; `None` ends it. See
    /// [`clan_tunnel::multicast`].
    pub fn set_multicast(&self, names: Option<BTreeMap<String, MachineId>>) {
        if let Some(running) = self.running().as_ref() {
            running.engine.multicast().set_names(names);
        }
    }

    /// Gives the device a second address, or takes it away. Packets to it are for this machine; without it none go to the
    /// second addresses of others.
    pub async fn set_ipv4(&self, ipv4: Option<Ipv4Addr>) -> Result<(), WireguardError> {
        {
            let mut running = self.running();
            let running = running.as_mut().ok_or(WireguardError::Stopped)?;
            running.ipv4 = ipv4;
            running.engine.multicast().set_ipv4(ipv4);
        }
        self.lead_here().await
    }

    /// Lets the system know that second addresses are reached through the device.
    async fn lead_here(&self) -> Result<(), WireguardError> {
        let (engine, own, others) = {
            let running = self.running();
            let running = running.as_ref().ok_or(WireguardError::Stopped)?;
            let addresses = running.peers.values().flat_map(|peer| &peer.addresses);
            let others = addresses.filter_map(|address| match address {
                IpAddr::V4(address) => Some(*address),
                IpAddr::V6(_) => None,
            });
            (running.engine.clone(), running.ipv4, others.collect())
        };
        engine.tun.set_ipv4(own, &others).await.map_err(WireguardError::Address)
    }

    /// Replaces the addresses at which `peer` may be reachable. Unknown peers are ignored.
    pub fn set_candidates(&self, peer: MachineId, candidates: Vec<SocketAddr>) {
        if let Some(running) = self.running().as_ref() {
            let engine = &running.engine;
            let now = engine.directory.now();
            engine.directory.lock().set_candidates(peer, &self.outside(&candidates), now);
            engine.wake.notify_one();
        }
    }

    /// All peers, in order of their ids.
    pub async fn peers(&self) -> Vec<WgPeerStatus> {
        let running = self.running();
        let Some(running) = running.as_ref() else { return Vec::new() };
        let engine = &running.engine;
        let status = |member: &Arc<peers::Member>| {
            let (last_handshake, tx_bytes, rx_bytes, _, _) = member.tunnel().stats();
            let path = match member.endpoint() {
                Some(addr) if member.standard => PathChoice::Direct { addr, rtt: Duration::ZERO },
                _ => engine.directory.lock().path(member.id, engine.directory.now()),
            };
            WgPeerStatus { id: member.id, path, last_handshake, rx_bytes: rx_bytes as u64, tx_bytes: tx_bytes as u64 }
        };
        engine.table().by_id.values().map(status).collect()
    }

    /// How packets to `peer` travel now.
    pub fn path(&self, peer: MachineId) -> PathChoice {
        let running = self.running();
        let Some(running) = running.as_ref() else { return PathChoice::Carrier };
        let now = running.engine.directory.now();
        running.engine.directory.lock().path(peer, now)
    }

    /// The carrier leads to `peer` from now on.
    pub fn carried(&self, peer: MachineId) {
        let engine = self.running().as_ref().map(|running| running.engine.clone());
        if let Some(engine) = engine {
            engine.way_opened(peer);
        }
    }

    /// Changes of paths from now on.
    pub fn changes(&self) -> broadcast::Receiver<PathChange> {
        self.changes.subscribe()
    }

    /// The bound UDP port.
    pub fn udp_port(&self) -> u16 {
        self.udp_port
    }

    /// Says that the machine's addresses on the base network have changed: every path is proven anew, at once.
    pub fn moved(&self) {
        if let Some(running) = self.running().as_ref() {
            let engine = &running.engine;
            let now = engine.directory.now();
            engine.directory.lock().moved(now);
            engine.wake.notify_one();
        }
    }

    /// Keeps what is sent from this UDP port out of the tunnel: a connection that carries the tunnel's packets must not
    /// choose the tunnel for itself.
    pub fn keep_outside(&self, port: u16) {
        if let Some(running) = self.running().as_ref() {
            running.engine.outside_port.store(port, Ordering::Relaxed);
        }
    }

    /// Own UDP addresses as peers see them: candidates to publish, beside the local ones.
    pub fn observed(&self) -> Vec<SocketAddr> {
        let observed = self.running().as_ref().map(|running| running.engine.directory.lock().observed());
        self.outside(&observed.unwrap_or_default())
    }

    /// Stops all its threads and tasks, closes the port and removes the device. Later calls do nothing.
    pub async fn stop(&self) {
        self.stop.cancel();
        let Some(Running { engine, tasks, threads, .. }) = self.running().take() else { return };
        engine.stop();
        for (name, task) in tasks {
            if timeout(STOP_WITHIN, task).await.is_err() {
                debug!(task = name, "a task did not end in time");
            }
        }
        let joined = tokio::task::spawn_blocking(move || threads.into_iter().for_each(|thread| drop(thread.join())));
        if timeout(STOP_WITHIN, joined).await.is_err() {
            debug!("a packet thread did not end in time");
        }
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Without addresses inside the clan's own network: a path through the tunnel would lead into itself.
    fn outside(&self, addrs: &[SocketAddr]) -> Vec<SocketAddr> {
        let inside = |addr: &SocketAddr| matches!(addr.ip(), IpAddr::V6(ip) if ip.octets()[..6] == self.own_prefix);
        addrs.iter().filter(|a| !inside(a)).copied().collect()
    }
}

impl Drop for Wireguard {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(running) = self.running().as_ref() {
            running.engine.stop();
        }
    }
}

fn distinct(peers: Vec<WgPeer>, private_key: &StaticSecret) -> BTreeMap<MachineId, WgPeer> {
    let mut keys = BTreeSet::from([*PublicKey::from(private_key).as_bytes()]);
    let mut addresses = BTreeSet::new();
    let mut wanted = BTreeMap::new();
    for peer in peers {
        let usable = private_key.diffie_hellman(&PublicKey::from(*peer.public_key.as_bytes())).was_contributory();
        let fresh = !wanted.contains_key(&peer.id)
            && !keys.contains(peer.public_key.as_bytes())
            && !peer.addresses.iter().any(|address| addresses.contains(address));
        if usable && fresh {
            keys.insert(*peer.public_key.as_bytes());
            addresses.extend(peer.addresses.iter().copied());
            wanted.insert(peer.id, peer);
        } else {
            debug!(peer = %peer.id, usable, "peer left out");
        }
    }
    wanted
}

/// Sends probes when they are due and tells of changes.
async fn probe(engine: Arc<Engine>, changes: broadcast::Sender<PathChange>, stop: CancellationToken) {
    let directory = &engine.directory;
    loop {
        let (transmits, changed, next) = {
            let now = directory.now();
            let mut paths = directory.lock();
            paths.handle_timeout(now);
            let transmits: Vec<_> = std::iter::from_fn(|| paths.poll_transmit()).collect();
            let changed: Vec<_> = std::iter::from_fn(|| paths.poll_change()).collect();
            (transmits, changed, paths.next_timeout())
        };
        for transmit in transmits {
            if let Err(error) = engine.socket.send(&transmit.bytes, transmit.to) {
                trace!(%error, to = %transmit.to, "a probe was not sent");
            }
        }
        for change in changed {
            debug!(peer = %change.peer, path = ?change.path, "path changed");
            if matches!(change.path, PathChoice::Direct { .. }) {
                engine.way_opened(change.peer);
            }
            // Nobody needs to listen.
            let _ = changes.send(change);
        }
        let due = async {
            match next {
                Some(next) => sleep_until(Instant::from_std(directory.epoch() + next)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = engine.wake.notified() => {}
            () = due => {}
        }
    }
}
