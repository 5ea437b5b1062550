//! The data plane's glue: who the WireGuard peers are, what carries their packets inside QUIC, and the clan's names.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use clan_ledger::{Machine, Peer};
use clan_os::{
    dns::{DnsServer, Zone},
    resolv::{self, ResolvConf, Undo},
    resolved,
    tun::Tun,
    wireguard::{Carrier, CarrierEnds, Timing, WgPeer, WgPeerStatus, Wireguard, WireguardConfig},
};
use clan_types::{ClanId, MachineId, WgPublicKey, mesh_address, peer_address};
use iroh::endpoint::{Connection, SendDatagramError};
use tokio::{
    sync::{
        mpsc::{self, error::TrySendError},
        watch,
    },
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{
    NodeError, access,
    core::{CoreHandle, View},
    halves::{Joiner, Splitter},
    host::{self, DNS_PORT, NamesPlan, Pointer},
    identity::Identity,
    pulse,
    report::chain,
};

/// The least that IPv6 allows; with WireGuard's and QUIC's own bytes it fits every path.
const MTU: u16 = 1280;
/// Packets that wait for the QUIC carrier, each way.
const CARRIER_QUEUE: usize = 1024;
/// Keeps the path's address mappings open, and its state known, while nobody talks.
const KEEPALIVE: Duration = Duration::from_secs(25);

/// Makes the interface that applications reach the clan through.
///
/// Before the QUIC endpoint is opened: the endpoint binds its socket anew when interfaces come and go, and does not
/// survive if the port is not free at that moment.
pub(crate) async fn interface(name: &str, clan: &ClanId, machine: &MachineId) -> Result<Tun, NodeError> {
    let address = mesh_address(clan, machine);
    Tun::create(name, MTU, address).await.map_err(|e| NodeError::network("the mesh interface", e))
}

/// The running data plane.
pub(crate) struct Mesh {
    wireguard: Arc<Wireguard>,
    names: Option<NameService>,
    tasks: JoinSet<()>,
}

/// The clan's names on this machine.
struct NameService {
    server: DnsServer,
    file: Option<Undo>,
}

impl NameService {
    /// Serves names, and points programs to them. With it comes why the latter did not work, if it did not.
    async fn start(
        plan: &NamesPlan,
        view: &View,
        names: watch::Receiver<Arc<Zone>>,
    ) -> Result<(Self, Option<NodeError>), NodeError> {
        let server = DnsServer::start(plan.bind, names, plan.upstream)
            .await
            .map_err(|e| NodeError::network("the name server", e))?;
        let zone = format!("{}.clan", view.clan_name);
        let (file, problem) = match &plan.pointer {
            Pointer::None => (None, None),
            Pointer::File { path, short } => {
                let more =
                    if *short { vec!["clan".to_owned()] } else { resolv::previous_search(path).unwrap_or_default() };
                let search: Vec<String> = std::iter::once(zone).chain(more).collect();
                match ResolvConf::install(path, plan.bind.ip(), &search) {
                    Ok(undo) => (Some(undo), None),
                    Err(error) => (None, Some(NodeError::network("name resolution", error))),
                }
            }
            Pointer::Resolved { interface } => match resolved::direct(interface, plan.bind.ip(), &zone).await {
                Ok(()) => (None, None),
                Err(error) => (None, Some(NodeError::network("name resolution", error))),
            },
        };
        Ok((Self { server, file }, problem))
    }

    async fn stop(self) {
        self.server.stop().await;
        if let Some(Err(error)) = self.file.map(Undo::undo) {
            tracing::warn!(%error, "name resolution could not be put back");
        }
    }
}

/// What the data plane is to be.
pub(crate) struct MeshPlan {
    /// UDP port of WireGuard.
    pub(crate) port: u16,
    pub(crate) names: NamesPlan,
    /// Whether packets are worth having where names are not to be had.
    pub(crate) names_may_fail: bool,
    /// Whether multicast DNS is carried.
    pub(crate) multicast: bool,
}

impl Mesh {
    pub(crate) async fn start(
        identity: &Identity,
        tun: Tun,
        plan: &MeshPlan,
        core: &CoreHandle,
        cancel: &CancellationToken,
    ) -> Result<Self, NodeError> {
        let view = core.view();
        let (carrier, ends) = Carrier::channel(CARRIER_QUEUE);
        let wireguard = Wireguard::start(WireguardConfig {
            local: view.machine,
            private_key: identity.wireguard_secret(),
            tun,
            udp_port: plan.port,
            carrier,
            timing: Timing::default(),
        })
        .await
        .map_err(|e| NodeError::network("WireGuard", e))?;
        let wireguard = Arc::new(wireguard);

        let (zone, names) = watch::channel(Arc::new(zone_of(&view)));
        let names = match NameService::start(&plan.names, &view, names).await {
            Ok((names, None)) => {
                core.problem("names", None).await;
                Some(names)
            }
            Ok((names, Some(error))) if plan.names_may_fail => {
                let server = plan.names.bind;
                let problem = format!(
                    "Programs on this computer do not find the clan's names: {}. The name server at {server} has them.",
                    chain(&error)
                );
                core.problem("names", Some(problem)).await;
                Some(names)
            }
            Ok((names, Some(error))) => {
                names.stop().await;
                wireguard.stop().await;
                return Err(error);
            }
            Err(error) if plan.names_may_fail => {
                core.problem("names", Some(format!("The clan's names are not to be had here: {}.", chain(&error))))
                    .await;
                None
            }
            Err(error) => {
                wireguard.stop().await;
                return Err(error);
            }
        };

        let mut tasks = JoinSet::new();
        let upstream = plan.names.upstream;
        tasks.spawn(follow(core.clone(), wireguard.clone(), zone, upstream, plan.multicast, cancel.clone()));
        tasks.spawn(carry(core.clone(), wireguard.clone(), ends, cancel.clone()));
        Ok(Self { wireguard, names, tasks })
    }

    pub(crate) fn wireguard(&self) -> Arc<Wireguard> {
        self.wireguard.clone()
    }

    pub(crate) async fn stop(mut self) {
        while self.tasks.join_next().await.is_some() {}
        if let Some(names) = self.names {
            names.stop().await;
        }
        self.wireguard.stop().await;
    }
}

/// Keeps the peers and the names as the ledger and the beacons say.
async fn follow(
    core: CoreHandle,
    wireguard: Arc<Wireguard>,
    zone: watch::Sender<Arc<Zone>>,
    upstream: Option<SocketAddr>,
    multicast: bool,
    cancel: CancellationToken,
) {
    let mut views = core.watch();
    let mut current: Vec<WgPeer> = Vec::new();
    let mut policies = None;
    let mut labels = None;
    // Answers the standard machines behind this one, which do not know our loopback address.
    let mut behind: Option<DnsServer> = None;
    let mut ipv4 = None;
    loop {
        let view = views.borrow_and_update().clone();
        // INVARIANT: who may reach what is known before anybody can send.
        let wanted = access::policies(&view);
        if policies.as_ref() != Some(&wanted) {
            let (own, behind) = wanted.clone();
            wireguard.set_policy(own, behind);
            policies = Some(wanted);
        }
        let held = multicast.then(|| labels_of(&view));
        if labels != held {
            wireguard.set_multicast(held.clone());
            labels = held;
        }
        let own = view.state.machine_in_good_standing(&view.machine).and_then(|machine| second(machine.ipv4));
        if own != ipv4 {
            match wireguard.set_ipv4(own).await {
                Ok(()) => tracing::debug!(address = ?own, "second address"),
                Err(error) => tracing::warn!(error = %chain(&error), "this machine has no IPv4 address in the clan"),
            }
            ipv4 = own;
        }
        let peers = peers_of(&view);
        if peers != current {
            match wireguard.set_peers(peers.clone()).await {
                Ok(()) => current = peers,
                Err(error) => tracing::error!(%error, "the mesh's peers could not be changed"),
            }
        }
        let names = Arc::new(zone_of(&view));
        zone.send_if_modified(|old| {
            let changed = *old != names;
            *old = names;
            changed
        });
        if current.iter().any(|peer| peer.standard) && behind.is_none() {
            let bind = SocketAddr::new(mesh_address(&view.clan, &view.machine).into(), DNS_PORT);
            // A phone asks here for all names there are.
            let upstream = upstream.or_else(|| host::upstream(bind.ip()));
            match DnsServer::start(bind, zone.subscribe(), upstream).await {
                Ok(server) => behind = Some(server),
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "the machines behind this one get no names");
                }
            }
        }
        tokio::select! {
            () = cancel.cancelled() => break,
            changed = views.changed() => if changed.is_err() { break },
        }
    }
    if let Some(server) = behind {
        server.stop().await;
    }
}

/// An IPv4 address, if the ledger had one left.
fn second(address: Ipv4Addr) -> Option<Ipv4Addr> {
    (!address.is_unspecified()).then_some(address)
}

/// How the mesh calls a standard WireGuard machine, which has no key of ours.
pub(crate) fn standard_id(wg: &WgPublicKey) -> MachineId {
    MachineId::from_bytes(*wg.as_bytes())
}

/// What a standard WireGuard machine sends from.
pub(crate) fn peer_addresses(view: &View, wg: &WgPublicKey, peer: &Peer) -> Vec<IpAddr> {
    let first = IpAddr::from(peer_address(&view.clan, wg));
    [Some(first), second(peer.ipv4).map(IpAddr::from)].into_iter().flatten().collect()
}

/// What a machine sends from itself.
pub(crate) fn machine_addresses(view: &View, id: &MachineId, machine: &Machine) -> Vec<IpAddr> {
    let first = IpAddr::from(mesh_address(&view.clan, id));
    [Some(first), second(machine.ipv4).map(IpAddr::from)].into_iter().flatten().collect()
}

/// The machines that packets are exchanged with. Behind some of them are standard ones, which this machine speaks to
/// itself if they are its own.
pub(crate) fn peers_of(view: &View) -> Vec<WgPeer> {
    let mut behind: BTreeMap<MachineId, Vec<IpAddr>> = BTreeMap::new();
    let mut standard = Vec::new();
    for (wg, peer) in view.state.good_peers() {
        let addresses = peer_addresses(view, wg, peer);
        if peer.via == view.machine {
            standard.push(WgPeer {
                id: standard_id(wg),
                public_key: *wg,
                addresses,
                standard: true,
                candidates: Vec::new(),
                keepalive: None,
            });
        } else {
            behind.entry(peer.via).or_default().extend(addresses);
        }
    }
    let machines = view.state.good_machines().filter(|(id, _)| **id != view.machine).map(|(id, machine)| WgPeer {
        id: *id,
        public_key: machine.wg,
        addresses: [machine_addresses(view, id, machine), behind.get(id).cloned().unwrap_or_default()].concat(),
        standard: false,
        candidates: view.beacons.get(id).map(|b| b.wireguard.clone()).unwrap_or_default(),
        keepalive: Some(KEEPALIVE),
    });
    machines.chain(standard).collect()
}

/// Whose name it is, of all machines. For one behind another, that one speaks.
fn labels_of(view: &View) -> BTreeMap<String, MachineId> {
    let behind = view.state.good_peers().map(|(_, peer)| (peer.name.to_string(), peer.via));
    let machines = view.state.good_machines().map(|(id, machine)| (machine.name.to_string(), *id));
    behind.chain(machines).collect()
}

/// Machines by their names, services by theirs; a machine's name wins over a service's.
fn zone_of(view: &View) -> Zone {
    let mut hosts = BTreeMap::new();
    for (id, beacon) in view.beacons.iter().filter(|(id, _)| view.state.machine_in_good_standing(id).is_some()) {
        for service in &beacon.services {
            let address = mesh_address(&view.clan, id);
            let held = hosts.entry(service.name.to_string()).or_insert(address);
            if service.healthy {
                *held = address;
            }
        }
    }
    let mut ipv4 = BTreeMap::new();
    for (wg, peer) in view.state.good_peers() {
        let address = peer_address(&view.clan, wg);
        hosts.insert(peer.name.to_string(), address);
        ipv4.extend(second(peer.ipv4).map(|second| (address, second)));
    }
    for (id, machine) in view.state.good_machines() {
        let address = mesh_address(&view.clan, id);
        hosts.insert(machine.name.to_string(), address);
        ipv4.extend(second(machine.ipv4).map(|second| (address, second)));
    }
    Zone { clan: view.clan_name.clone(), hosts, ipv4 }
}

/// Moves WireGuard packets in and out of QUIC datagrams.
async fn carry(core: CoreHandle, wireguard: Arc<Wireguard>, mut ends: CarrierEnds, cancel: CancellationToken) {
    let mut views = core.watch();
    let mut readers: JoinSet<usize> = JoinSet::new();
    let mut reading: BTreeSet<usize> = BTreeSet::new();
    let mut splitter = Splitter::default();
    loop {
        let links = views.borrow_and_update().links.clone();
        for (machine, connection) in links.iter() {
            if reading.insert(connection.stable_id()) {
                wireguard.carried(*machine);
                readers.spawn(receive(*machine, connection.clone(), ends.incoming.clone()));
            }
        }
        loop {
            tokio::select! {
                () = cancel.cancelled() => {
                    readers.shutdown().await;
                    return;
                }
                changed = views.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    break;
                }
                Some(done) = readers.join_next() => {
                    if let Ok(id) = done {
                        reading.remove(&id);
                    }
                }
                packet = ends.outgoing.recv() => match packet {
                    // Without a connection, or with a full one, the packet is lost, as on any network.
                    Some((machine, packet)) => {
                        if let Some(connection) = links.get(&machine) {
                            send(connection, packet, &mut splitter);
                        }
                    }
                    None => return,
                },
            }
        }
    }
}

fn send(connection: &Connection, packet: Bytes, splitter: &mut Splitter) {
    let Err(SendDatagramError::TooLarge) = connection.send_datagram(packet.clone()) else { return };
    let halves = connection.max_datagram_size().and_then(|max| splitter.split(&packet, max));
    for half in halves.into_iter().flatten() {
        let _ = connection.send_datagram(half);
    }
}

async fn receive(machine: MachineId, connection: Connection, incoming: mpsc::Sender<(MachineId, Bytes)>) -> usize {
    let mut joiner = Joiner::default();
    while let Ok(datagram) = connection.read_datagram().await {
        if pulse::is_question(&datagram) {
            continue;
        }
        let Some(packet) = joiner.join(datagram) else { continue };
        if let Err(TrySendError::Closed(_)) = incoming.try_send((machine, packet)) {
            break;
        }
    }
    connection.stable_id()
}

/// What status reports need of the data plane.
pub(crate) async fn paths(wireguard: &Wireguard) -> BTreeMap<MachineId, WgPeerStatus> {
    wireguard.peers().await.into_iter().map(|p| (p.id, p)).collect()
}
