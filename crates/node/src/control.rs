//! The manager's side of the controller: the channel over virtio-serial, and the life of the node behind it.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use clan_ledger::Ledger;
use clan_os::{
    addresses,
    channel::{Channel, Stream, open_virtio_port, recv_message, send_message},
    tun::Tun,
    wireguard::Wireguard,
};
use clan_store::LedgerStore;
use clan_types::{ClanId, MachineName, ServiceName, mesh_address};
use clan_wire::control::{ControlRequest, ControlResponse, Environment, MAX_MESSAGE, PORT, Provision};
use iroh::Endpoint;
use tokio::{io::copy_bidirectional, net::TcpStream, process::Command, sync::Mutex, task::JoinSet, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    NodeError, Options, QUIC_PORT,
    core::{Core, CoreHandle, Own},
    identity::Identity,
    image::{Disks, ImageServer},
    join::{self, RedeemError},
    mesh::{self, Mesh},
    net, peer, services,
    state::Place,
    stats::Sampler,
    status,
};

const PORT_PATIENCE: Duration = Duration::from_secs(60);
const NETWORK_PATIENCE: Duration = Duration::from_secs(30);
const CONNECT_LIMIT: Duration = Duration::from_secs(15);
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// Time for the peers to take a farewell; a peer that misses it learns from another one.
const FAREWELL: Duration = Duration::from_millis(500);

/// Serves the manager until cancelled, and runs the node once there is a place for it.
pub(crate) async fn serve(options: Options, cancel: CancellationToken) -> Result<(), NodeError> {
    clan_store::create_private_dir(&options.state_dir)?;
    let identity = Identity::load_or_create(&options.state_dir)?;
    tracing::info!(machine = %identity.machine(), "controller starts");
    let controller = Arc::new(Controller {
        dir: options.state_dir,
        identity,
        images: Arc::new(ImageServer::new(Disks::of_this_machine())),
        environment: Mutex::new(Environment::default()),
        node: Mutex::new(None),
        cancel: cancel.clone(),
    });
    controller.resume().await?;

    let port = open_virtio_port(PORT, PORT_PATIENCE).await.map_err(NodeError::Port)?;
    let (_channel, mut incoming, driver) = Channel::guest(port, env!("CARGO_PKG_VERSION"), cancel.clone());
    let streams = TaskTracker::new();
    let driver = tokio::spawn(driver);
    loop {
        let stream = tokio::select! {
            () = cancel.cancelled() => break,
            stream = incoming.accept() => stream,
        };
        let Some(stream) = stream else { break };
        let controller = controller.clone();
        streams.spawn(async move { controller.converse(stream).await });
    }
    cancel.cancel();
    streams.close();
    streams.wait().await;
    controller.stop().await;
    match driver.await {
        Ok(Err(error)) if !matches!(error, clan_os::channel::ChannelError::Closed) => {
            Err(NodeError::network("the channel to the manager", error))
        }
        _ => Ok(()),
    }
}

struct Controller {
    dir: PathBuf,
    identity: Identity,
    images: Arc<ImageServer>,
    environment: Mutex<Environment>,
    /// Locked while a node starts, so that it starts once.
    node: Mutex<Option<Node>>,
    cancel: CancellationToken,
}

/// A machine with a place in a clan.
struct Node {
    place: Place,
    core: CoreHandle,
    endpoint: Endpoint,
    wireguard: Arc<Wireguard>,
    mesh: Mesh,
    tasks: JoinSet<()>,
    cancel: CancellationToken,
}

/// A machine's two ways out: the interface of the mesh, and the endpoint on the base network.
struct Ways {
    tun: Tun,
    endpoint: Endpoint,
}

/// What most requests need of a node, without holding its lock.
struct Access {
    core: CoreHandle,
    wireguard: Arc<Wireguard>,
}

impl Controller {
    /// Takes up the place that the machine had before a restart.
    async fn resume(&self) -> Result<(), NodeError> {
        if let Some(place) = Place::load(&self.dir)? {
            let ways = self.ways(&place.clan).await?;
            let node = self.start_node(place, ways, |_| Ok(())).await?;
            *self.node.lock().await = Some(node);
        }
        Ok(())
    }

    async fn stop(&self) {
        if let Some(node) = self.node.lock().await.take() {
            node.stop().await;
        }
    }

    async fn access(&self) -> Option<Access> {
        let node = self.node.lock().await;
        node.as_ref().map(|n| Access { core: n.core.clone(), wireguard: n.wireguard.clone() })
    }

    async fn converse(&self, mut stream: Stream) {
        let Ok(request) = recv_message::<ControlRequest, _>(&mut stream, MAX_MESSAGE).await else { return };
        let response = match request {
            ControlRequest::Identify => self.identify().await,
            ControlRequest::Provision(provision) => self.provision(*provision).await,
            ControlRequest::SetEnvironment(environment) => {
                self.set_environment(environment).await;
                ControlResponse::Done
            }
            other => match self.access().await {
                Some(access) => return self.converse_as_member(stream, other, access).await,
                None => ControlResponse::Failed("this machine has no place in a clan yet".to_owned()),
            },
        };
        if send_message(&mut stream, &response, MAX_MESSAGE).await.is_ok() {
            finish(stream).await;
        }
    }

    /// Requests that need the clan.
    async fn converse_as_member(&self, mut stream: Stream, request: ControlRequest, access: Access) {
        let response = match request {
            ControlRequest::Append(entry) => match access.core.insert(vec![entry]).await {
                Ok(()) => ControlResponse::Done,
                Err(error) => ControlResponse::Failed(chain(&error)),
            },
            ControlRequest::Entries => ControlResponse::Entries(access.core.entries().await),
            ControlRequest::Status => {
                ControlResponse::Status(Box::new(status::report(&access.core.view(), Some(&access.wireguard)).await))
            }
            ControlRequest::Farewell { entry } => self.farewell(&access, entry).await,
            ControlRequest::Watch => return self.report(stream, &access).await,
            ControlRequest::Connect { service, machine } => {
                return connect(stream, &access, &service, machine.as_ref()).await;
            }
            ControlRequest::Journal { lines, follow } => return journal(stream, lines, follow).await,
            ControlRequest::Identify | ControlRequest::Provision(_) | ControlRequest::SetEnvironment(_) => {
                ControlResponse::Failed("handled elsewhere".to_owned())
            }
        };
        if send_message(&mut stream, &response, MAX_MESSAGE).await.is_ok() {
            finish(stream).await;
        }
    }

    async fn identify(&self) -> ControlResponse {
        ControlResponse::Identity {
            machine: self.identity.machine(),
            wireguard: self.identity.wireguard_public(),
            clan: self.node.lock().await.as_ref().map(|n| n.place.clan),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    async fn set_environment(&self, environment: Environment) {
        self.images.set_manifest(&environment.manifest);
        *self.environment.lock().await = environment.clone();
        if let Some(node) = self.node.lock().await.as_ref() {
            node.take_environment(environment).await;
        }
    }

    /// Safe to repeat: the manager asks again after a restart of either side.
    async fn provision(&self, provision: Provision) -> ControlResponse {
        let mut slot = self.node.lock().await;
        if let Some(node) = slot.as_ref() {
            return if node.place.clan == provision.clan {
                ControlResponse::Provisioned { entries: node.core.entries().await }
            } else {
                ControlResponse::Failed("this machine belongs to another clan".to_owned())
            };
        }
        self.images.set_manifest(&provision.environment.manifest);
        *self.environment.lock().await = provision.environment.clone();
        match self.take_place(provision).await {
            Ok(node) => {
                let entries = node.core.entries().await;
                *slot = Some(node);
                ControlResponse::Provisioned { entries }
            }
            Err(ProvisionError::Refused(refusal)) => ControlResponse::Refused(refusal),
            Err(ProvisionError::Failed(reason)) => ControlResponse::Failed(reason),
        }
    }

    async fn take_place(&self, provision: Provision) -> Result<Node, ProvisionError> {
        let ways = self.ways(&provision.clan).await?;
        let mut entries = provision.entries;
        let mut peers = Vec::new();
        if let Some(redeem) = provision.redeem {
            entries.extend(join::redeem(&ways.endpoint, &redeem).await?);
            peers = redeem.peers;
        }
        let place = Place { clan: provision.clan, name: provision.name, offers: provision.offers, peers };
        let machine = self.identity.machine();
        let node = self
            .start_node(place.clone(), ways, |ledger| {
                for entry in &entries {
                    let entry = clan_ledger::Entry::decode(entry).map_err(|e| chain(&e))?;
                    ledger.insert(entry).map_err(|e| chain(&e))?;
                }
                match ledger.state().machine_in_good_standing(&machine) {
                    Some(_) => Ok(()),
                    None => Err("the clan's ledger does not name this machine".to_owned()),
                }
            })
            .await?;
        // INVARIANT: the place is written last; a machine that stopped before is provisioned again, from the start.
        place.save(&self.dir).map_err(|e| ProvisionError::Failed(chain(&e)))?;
        Ok(node)
    }

    async fn ways(&self, clan: &ClanId) -> Result<Ways, NodeError> {
        let tun = mesh::interface(clan, &self.identity.machine()).await?;
        let address = timeout(NETWORK_PATIENCE, base_address()).await.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let external = self.environment.lock().await.quic.clone();
        let bind = SocketAddr::new(address, QUIC_PORT);
        let endpoint = net::endpoint(self.identity.endpoint_key(), bind, &external).await?;
        Ok(Ways { tun, endpoint })
    }

    /// Starts everything that a machine in a clan runs. `prepare` may add to the ledger before anybody sees it.
    async fn start_node(
        &self,
        place: Place,
        Ways { tun, endpoint }: Ways,
        prepare: impl FnOnce(&mut Ledger) -> Result<(), String>,
    ) -> Result<Node, ProvisionOrNodeError> {
        let store = LedgerStore::open(self.dir.join("ledger.redb"), &place.clan).map_err(NodeError::from)?;
        let mut ledger = store.load().map_err(NodeError::from)?;
        let known = ledger.len();
        prepare(&mut ledger).map_err(ProvisionOrNodeError::Reason)?;
        if ledger.len() > known {
            store.append_all(ledger.entries()).map_err(NodeError::from)?;
        }
        let environment = self.environment.lock().await.clone();
        let own = Own {
            quic: environment.quic,
            wireguard: environment.wireguard,
            manifest: environment.manifest,
            ..Own::default()
        };
        let cancel = self.cancel.child_token();
        let (core, handle, dials) = Core::new(self.identity.signing().clone(), ledger, store, own, place.peers.clone())
            .ok_or_else(|| ProvisionOrNodeError::Reason("the ledger lacks its founding entry".to_owned()))?;
        let mut tasks = JoinSet::new();
        tasks.spawn(core.run(cancel.clone()));
        let mesh = match Mesh::start(&self.identity, tun, &handle, &cancel).await {
            Ok(mesh) => mesh,
            Err(error) => {
                cancel.cancel();
                while tasks.join_next().await.is_some() {}
                return Err(error.into());
            }
        };
        // Without its endpoint the machine is deaf: the whole controller ends, and systemd starts it afresh.
        tasks.spawn(net::accept(
            endpoint.clone(),
            handle.clone(),
            self.images.clone(),
            cancel.clone(),
            self.cancel.clone(),
        ));
        tasks.spawn(peer::dial(endpoint.clone(), handle.clone(), dials, cancel.clone()));
        tasks.spawn(services::run(place.offers.clone(), handle.clone(), cancel.clone()));
        Ok(Node { place, core: handle, endpoint, wireguard: mesh.wireguard(), mesh, tasks, cancel })
    }

    async fn farewell(&self, access: &Access, entry: Vec<u8>) -> ControlResponse {
        if let Err(error) = access.core.insert(vec![entry]).await {
            return ControlResponse::Failed(chain(&error));
        }
        tokio::time::sleep(FAREWELL).await;
        ControlResponse::Done
    }

    /// Status when it changes, statistics always, once a second, until the manager has enough.
    async fn report(&self, mut stream: Stream, access: &Access) {
        let mut sampler = Sampler::default();
        let mut tick = tokio::time::interval(REPORT_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut last = None;
        loop {
            tokio::select! {
                () = self.cancel.cancelled() => return,
                _ = tick.tick() => {}
            }
            let status = status::report(&access.core.view(), Some(&access.wireguard)).await;
            if last.as_ref() != Some(&status) {
                let response = ControlResponse::Status(Box::new(status.clone()));
                if send_message(&mut stream, &response, MAX_MESSAGE).await.is_err() {
                    return;
                }
                last = Some(status);
            }
            let stats = ControlResponse::Stats(Box::new(sampler.sample().await));
            if send_message(&mut stream, &stats, MAX_MESSAGE).await.is_err() {
                return;
            }
        }
    }
}

impl Node {
    async fn take_environment(&self, environment: Environment) {
        for addr in &environment.quic {
            self.endpoint.add_external_addr(*addr).await;
        }
        self.core
            .change_own(move |own| {
                own.quic = environment.quic;
                own.wireguard = environment.wireguard;
                own.manifest = environment.manifest;
            })
            .await;
    }

    async fn stop(mut self) {
        self.cancel.cancel();
        while self.tasks.join_next().await.is_some() {}
        self.mesh.stop().await;
        self.endpoint.close().await;
    }
}

enum ProvisionError {
    Refused(clan_wire::peer::JoinRefusal),
    Failed(String),
}

enum ProvisionOrNodeError {
    Reason(String),
    Node(NodeError),
}

impl From<NodeError> for ProvisionOrNodeError {
    fn from(error: NodeError) -> Self {
        Self::Node(error)
    }
}

impl From<ProvisionOrNodeError> for NodeError {
    fn from(error: ProvisionOrNodeError) -> Self {
        match error {
            ProvisionOrNodeError::Node(error) => error,
            ProvisionOrNodeError::Reason(reason) => NodeError::network("the machine's place in its clan", reason),
        }
    }
}

impl From<ProvisionOrNodeError> for ProvisionError {
    fn from(error: ProvisionOrNodeError) -> Self {
        match error {
            ProvisionOrNodeError::Node(error) => error.into(),
            ProvisionOrNodeError::Reason(reason) => Self::Failed(reason),
        }
    }
}

impl From<NodeError> for ProvisionError {
    fn from(error: NodeError) -> Self {
        Self::Failed(chain(&error))
    }
}

impl From<RedeemError> for ProvisionError {
    fn from(error: RedeemError) -> Self {
        match error {
            RedeemError::Refused(refusal) => Self::Refused(refusal),
            RedeemError::Unreachable { .. } => Self::Failed(error.to_string()),
        }
    }
}

/// The address of the base network, once there is one.
async fn base_address() -> IpAddr {
    loop {
        match addresses::physical().await {
            Ok(all) => {
                if let Some(address) = all.iter().find(|a| a.is_ipv4()).or(all.first()) {
                    return *address;
                }
            }
            Err(error) => tracing::warn!(%error, "cannot list network addresses"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Joins the stream to a service in the clan.
async fn connect(mut stream: Stream, access: &Access, service: &ServiceName, machine: Option<&MachineName>) {
    let view = access.core.view();
    let status = status::report(&view, Some(&access.wireguard)).await;
    let mut offers: Vec<_> =
        status.services.iter().filter(|s| s.name == *service && machine.is_none_or(|m| *m == s.machine)).collect();
    offers.sort_by_key(|s| !s.healthy);
    let target = offers.first().and_then(|s| {
        let owner = status.machines.iter().find(|m| m.name == s.machine)?;
        Some(SocketAddr::new(IpAddr::V6(mesh_address(&view.clan, &owner.id)), s.port))
    });
    let Some(target) = target else {
        let failed = ControlResponse::Failed(format!("nobody in the clan offers `{service}`"));
        let _ = send_message(&mut stream, &failed, MAX_MESSAGE).await;
        return finish(stream).await;
    };
    let mut tcp = match timeout(CONNECT_LIMIT, TcpStream::connect(target)).await {
        Ok(Ok(tcp)) => tcp,
        Ok(Err(error)) => {
            let failed = ControlResponse::Failed(format!("`{service}` does not answer: {error}"));
            let _ = send_message(&mut stream, &failed, MAX_MESSAGE).await;
            return finish(stream).await;
        }
        Err(_) => {
            let failed = ControlResponse::Failed(format!("`{service}` does not answer"));
            let _ = send_message(&mut stream, &failed, MAX_MESSAGE).await;
            return finish(stream).await;
        }
    };
    let _ = tcp.set_nodelay(true);
    if send_message(&mut stream, &ControlResponse::Connected, MAX_MESSAGE).await.is_ok() {
        let _ = copy_bidirectional(&mut stream, &mut tcp).await;
    }
}

async fn journal(mut stream: Stream, lines: u32, follow: bool) {
    let mut command = Command::new("journalctl");
    command.args(["--no-pager", "--output=short-iso", "--lines", &lines.min(100_000).to_string()]);
    if follow {
        command.arg("--follow");
    }
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true).spawn();
    let Some(mut text) = child.ok().and_then(|mut c| c.stdout.take().map(|out| (c, out))) else {
        let failed = ControlResponse::Failed("the journal cannot be read".to_owned());
        let _ = send_message(&mut stream, &failed, MAX_MESSAGE).await;
        return finish(stream).await;
    };
    if send_message(&mut stream, &ControlResponse::Raw, MAX_MESSAGE).await.is_ok() {
        let (mut from_manager, mut to_manager) = tokio::io::split(stream);
        // The manager's side ending means that nobody follows any more.
        let mut nothing = tokio::io::sink();
        tokio::select! {
            _ = tokio::io::copy(&mut text.1, &mut to_manager) => {}
            _ = tokio::io::copy(&mut from_manager, &mut nothing), if follow => {}
        }
        let _ = tokio::io::AsyncWriteExt::shutdown(&mut to_manager).await;
    }
}

/// Ends our direction and waits until the manager ended its own: what was written has then arrived.
async fn finish(mut stream: Stream) {
    let _ = tokio::io::AsyncWriteExt::shutdown(&mut stream).await;
    let _ = timeout(CONNECT_LIMIT, tokio::io::copy(&mut stream, &mut tokio::io::sink())).await;
}

/// An error and its causes, in one sentence for the manager.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
