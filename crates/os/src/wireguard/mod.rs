//! WireGuard to every machine of the clan, over whichever path works.
//!
//! The protocol engine (`gotatun`) knows each peer by one virtual address that never changes. [`transport`] beneath it
//! sends each packet straight over UDP where `clan_tunnel` says that this works, and otherwise hands it to the
//! [`Carrier`], which takes it inside a QUIC connection.

mod peers;
mod socket;
mod transport;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
pub use clan_tunnel::{PathChange, PathChoice};
use clan_tunnel::{Paths, ProbeKey};
use clan_types::{MachineId, WgPublicKey};
use gotatun::{
    device::{Device, DeviceBuilder, Peer},
    x25519::{PublicKey, StaticSecret},
};
use ipnetwork::IpNetwork;
use tokio::{
    sync::{Mutex, Notify, broadcast, mpsc},
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, debug_span, trace};

use self::{
    peers::Directory,
    socket::Socket,
    transport::{Factory, Shared},
};
use crate::tun::{Tun, TunReader, TunWriter};

/// How many path changes a slow listener may be behind.
const CHANGES: usize = 256;
/// How often the engine's idea of peers' addresses is checked.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);
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
    /// Its mesh address: the only source it may send from.
    pub address: Ipv6Addr,
    /// UDP addresses at which it may be reachable directly.
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
    /// The WireGuard engine refused a change.
    #[error("the WireGuard engine failed")]
    Engine(#[source] gotatun::device::Error),
    /// It was stopped before.
    #[error("WireGuard is stopped")]
    Stopped,
}

/// A running WireGuard device. Call [`Wireguard::stop`] before dropping it, so that the network device is gone when
/// it returns.
pub struct Wireguard {
    shared: Arc<Shared>,
    engine: Arc<Mutex<Option<Engine>>>,
    private_key: StaticSecret,
    own_prefix: [u8; 6],
    changes: broadcast::Sender<PathChange>,
    stop: CancellationToken,
    udp_port: u16,
}

struct Engine {
    device: Device<(Factory, TunWriter, TunReader)>,
    peers: BTreeMap<MachineId, WgPeer>,
    prober: JoinHandle<()>,
    tun_writer: JoinHandle<()>,
}

impl Wireguard {
    /// Starts without peers.
    pub async fn start(config: WireguardConfig) -> Result<Self, WireguardError> {
        let WireguardConfig { local, private_key, tun, udp_port, carrier } = config;
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|e| WireguardError::Random(io::Error::other(e)))?;
        let bind_failed = |source| WireguardError::Bind { port: udp_port, source };
        let socket = Socket::bind(udp_port).map_err(bind_failed)?;
        let udp_port = socket.local_addr().map_err(bind_failed)?.port();
        let shared = Arc::new(Shared {
            directory: Directory::new(Paths::new(local, seed)),
            socket,
            outgoing: carrier.outgoing,
            incoming: Mutex::new(carrier.incoming),
            wake: Notify::new(),
        });
        let mut own_prefix = [0; 6];
        own_prefix.copy_from_slice(&tun.address().octets()[..6]);
        let private_key = StaticSecret::from(private_key);
        let (reader, writer, tun_writer) = tun.into_halves();
        let device = DeviceBuilder::new()
            .with_udp(Factory(shared.clone()))
            .with_ip_pair(writer, reader)
            .with_private_key(private_key.clone())
            .with_listen_port(udp_port)
            .build()
            .await
            .map_err(WireguardError::Engine)?;
        // An engine that was built without peers starts its tasks only when its peers are cleared.
        device.clear_peers().await.map_err(WireguardError::Engine)?;
        let changes = broadcast::Sender::new(CHANGES);
        let stop = CancellationToken::new();
        let engine = Arc::new(Mutex::new(None));
        let prober = tokio::spawn(
            probe(shared.clone(), engine.clone(), changes.clone(), stop.clone()).instrument(debug_span!("path_prober")),
        );
        *engine.lock().await = Some(Engine { device, peers: BTreeMap::new(), prober, tun_writer });
        Ok(Self { shared, engine, private_key, own_prefix, changes, stop, udp_port })
    }

    /// Makes `peers` the whole set: adds, updates and removes as needed; sessions of unchanged peers go on. A peer
    /// whose key is unusable, or that shares id, key or address with an earlier one, is left out.
    pub async fn set_peers(&self, peers: Vec<WgPeer>) -> Result<(), WireguardError> {
        let mut engine = self.engine.lock().await;
        let engine = engine.as_mut().ok_or(WireguardError::Stopped)?;
        let wanted = distinct(peers, &self.private_key);
        let gone: Vec<MachineId> = engine
            .peers
            .iter()
            .filter(|(id, old)| wanted.get(*id).is_none_or(|new| new.public_key != old.public_key))
            .map(|(id, _)| *id)
            .collect();
        for id in gone {
            if let Some(old) = engine.peers.remove(&id) {
                engine
                    .device
                    .remove_peer(&PublicKey::from(*old.public_key.as_bytes()))
                    .await
                    .map_err(WireguardError::Engine)?;
                self.shared.directory.lock().remove(id);
                debug!(peer = %id, "peer removed");
            }
        }
        for (id, peer) in wanted {
            let public_key = PublicKey::from(*peer.public_key.as_bytes());
            let key = ProbeKey::derive(self.private_key.diffie_hellman(&public_key).as_bytes());
            let candidates = self.outside(&peer.candidates);
            let now = self.shared.directory.now();
            let virtual_addr = {
                let mut state = self.shared.directory.lock();
                state.paths.add_peer(id, key, &candidates, now);
                state.allot(id)
            };
            let engine_differs =
                engine.peers.get(&id).is_none_or(|old| (old.address, old.keepalive) != (peer.address, peer.keepalive));
            if engine_differs {
                debug!(peer = %id, "peer set");
                engine
                    .device
                    .add_or_update_peer(engine_peer(&peer, virtual_addr))
                    .await
                    .map_err(WireguardError::Engine)?;
            }
            engine.peers.insert(id, peer);
        }
        self.shared.wake.notify_one();
        Ok(())
    }

    /// Replaces the addresses at which `peer` may be reachable. Unknown peers are ignored.
    pub fn set_candidates(&self, peer: MachineId, candidates: Vec<SocketAddr>) {
        let now = self.shared.directory.now();
        self.shared.directory.lock().paths.set_candidates(peer, &self.outside(&candidates), now);
        self.shared.wake.notify_one();
    }

    /// All peers, in order of their ids.
    pub async fn peers(&self) -> Vec<WgPeerStatus> {
        let engine = self.engine.lock().await;
        let Some(engine) = engine.as_ref() else { return Vec::new() };
        let stats: BTreeMap<[u8; 32], _> =
            engine.device.peers().await.into_iter().map(|p| (*p.peer.public_key.as_bytes(), p.stats)).collect();
        let now = self.shared.directory.now();
        let state = self.shared.directory.lock();
        let status = |(id, peer): (&MachineId, &WgPeer)| {
            let stats = stats.get(peer.public_key.as_bytes());
            WgPeerStatus {
                id: *id,
                path: state.paths.path(*id, now),
                last_handshake: stats.and_then(|s| s.last_handshake),
                rx_bytes: stats.map_or(0, |s| s.rx_bytes as u64),
                tx_bytes: stats.map_or(0, |s| s.tx_bytes as u64),
            }
        };
        engine.peers.iter().map(status).collect()
    }

    /// How packets to `peer` travel now.
    pub fn path(&self, peer: MachineId) -> PathChoice {
        let now = self.shared.directory.now();
        self.shared.directory.lock().paths.path(peer, now)
    }

    /// Changes of paths from now on.
    pub fn changes(&self) -> broadcast::Receiver<PathChange> {
        self.changes.subscribe()
    }

    /// The bound UDP port.
    pub fn udp_port(&self) -> u16 {
        self.udp_port
    }

    /// Own UDP addresses as peers see them: candidates to publish, beside the local ones.
    pub fn observed(&self) -> Vec<SocketAddr> {
        self.outside(&self.shared.directory.lock().paths.observed())
    }

    /// Stops all its tasks, closes the port and removes the device. Later calls do nothing.
    pub async fn stop(&self) {
        self.stop.cancel();
        let Some(Engine { device, prober, tun_writer, .. }) = self.engine.lock().await.take() else { return };
        device.stop().await;
        for (task, name) in [(prober, "prober"), (tun_writer, "device writer")] {
            if timeout(STOP_WITHIN, task).await.is_err() {
                debug!(task = name, "a task did not end in time");
            }
        }
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
    }
}

fn engine_peer(peer: &WgPeer, virtual_addr: SocketAddr) -> Peer {
    let mut new = Peer::new(PublicKey::from(*peer.public_key.as_bytes()))
        .with_endpoint(virtual_addr)
        .with_allowed_ip(IpNetwork::from(IpAddr::V6(peer.address)));
    new.keepalive = peer.keepalive.map(|every| u16::try_from(every.as_secs().max(1)).unwrap_or(u16::MAX));
    new
}

fn distinct(peers: Vec<WgPeer>, private_key: &StaticSecret) -> BTreeMap<MachineId, WgPeer> {
    let mut keys = BTreeSet::from([*PublicKey::from(private_key).as_bytes()]);
    let mut addresses = BTreeSet::new();
    let mut wanted = BTreeMap::new();
    for peer in peers {
        let usable = private_key.diffie_hellman(&PublicKey::from(*peer.public_key.as_bytes())).was_contributory();
        let fresh = !wanted.contains_key(&peer.id)
            && !keys.contains(peer.public_key.as_bytes())
            && !addresses.contains(&peer.address);
        if usable && fresh {
            keys.insert(*peer.public_key.as_bytes());
            addresses.insert(peer.address);
            wanted.insert(peer.id, peer);
        } else {
            debug!(peer = %peer.id, usable, "peer left out");
        }
    }
    wanted
}

/// Sends probes when they are due and tells of changes.
async fn probe(
    shared: Arc<Shared>,
    engine: Arc<Mutex<Option<Engine>>>,
    changes: broadcast::Sender<PathChange>,
    stop: CancellationToken,
) {
    let mut check = interval(CHECK_INTERVAL);
    check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let (transmits, changed, next) = {
            let now = shared.directory.now();
            let mut state = shared.directory.lock();
            state.paths.handle_timeout(now);
            let transmits: Vec<_> = std::iter::from_fn(|| state.paths.poll_transmit()).collect();
            let changed: Vec<_> = std::iter::from_fn(|| state.paths.poll_change()).collect();
            (transmits, changed, state.paths.next_timeout())
        };
        for transmit in transmits {
            if let Err(error) = shared.socket.try_send(&transmit.bytes, transmit.to) {
                trace!(%error, to = %transmit.to, "a probe was not sent");
            }
        }
        for change in changed {
            debug!(peer = %change.peer, path = ?change.path, "path changed");
            // Nobody needs to listen.
            let _ = changes.send(change);
        }
        let due = async {
            match next {
                Some(next) => sleep_until(Instant::from_std(shared.directory.epoch() + next)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = shared.wake.notified() => {}
            () = due => {}
            _ = check.tick() => tokio::select! {
                () = stop.cancelled() => return,
                () = restore_virtual_addresses(&shared, &engine) => {}
            },
        }
    }
}

/// INVARIANT: the engine knows each peer by its own virtual address. A recorded handshake, played back from another
/// peer's address, makes the engine think that its sender moved there; this puts it right.
async fn restore_virtual_addresses(shared: &Shared, engine: &Mutex<Option<Engine>>) {
    let engine = engine.lock().await;
    let Some(engine) = engine.as_ref() else { return };
    let endpoints: BTreeMap<[u8; 32], _> =
        engine.device.peers().await.into_iter().map(|p| (*p.peer.public_key.as_bytes(), p.peer.endpoint)).collect();
    for (id, peer) in &engine.peers {
        let Some(virtual_addr) = shared.directory.lock().virtual_of(*id) else { continue };
        if endpoints.get(peer.public_key.as_bytes()) != Some(&Some(virtual_addr)) {
            debug!(peer = %id, "the engine followed a peer to a wrong address");
            if let Err(error) = engine.device.add_or_update_peer(engine_peer(peer, virtual_addr)).await {
                debug!(%error, peer = %id, "peer could not be put right");
            }
        }
    }
}
