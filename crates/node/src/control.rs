//! The manager's side of the controller: the channel to it, and the life of the node behind it.

mod outcome;

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{Arc, Mutex as SyncMutex, PoisonError},
    time::Duration,
};

use clan_ledger::{Intake, KeyProof, Ledger};
use clan_os::{
    addresses,
    channel::{Channel, ChannelError, LocalListener, Stream, open_virtio_port, recv_message, send_message},
    tun::Tun,
    wireguard::Wireguard,
};
use clan_relay::Names;
use clan_store::{LedgerStore, SealKey, StoreError};
use clan_types::{ClanId, DeviceId};
use clan_wire::control::{ControlRequest, ControlResponse, Environment, MAX_MESSAGE, NodeStatus, PORT, Provision};
use iroh::{Endpoint, RelayUrl, endpoint::Connection};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Mutex, Notify, Semaphore},
    task::JoinSet,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::outcome::{ProvisionError, ProvisionOrNodeError};
use crate::{
    Host, NodeError, Options,
    core::{Core, CoreHandle, Own, View},
    helm::{self, Helm, Possible},
    host::{self, Ports},
    identity::Identity,
    image::ImageServer,
    join, memory,
    mesh::{self, Mesh, MeshPlan},
    net::{self, Desks},
    own, peer, ping, pulse, recall,
    relay::{self, Certificate},
    report::{Scope, chain},
    services,
    sockets::{self, Alarm},
    state::{self, Place},
    stats::Sampler,
    status, streams,
    words::{self, WordsDesk},
};

const PORT_PATIENCE: Duration = Duration::from_secs(60);
/// Managers, old and new, that may be connected to a socket at once.
const MAX_MANAGERS: usize = 8;
/// So long a machine that starts countersigns nothing, unless it hears before from its manager or from other machines that
/// its disk has all that it signed.
const DOUBT: Duration = Duration::from_secs(60);
/// How long the manager may take for a page of entries.
pub(crate) const REQUEST_LIMIT: Duration = Duration::from_secs(20);
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// How long a machine that goes waits for one that knows: all others learn from that. There may be none that is on.
const FAREWELL: Duration = Duration::from_secs(15);
/// How long closing all connections may take.
const GOODBYES: Duration = Duration::from_secs(5);

/// Serves the manager until cancelled, and runs the node once there is a place for it.
pub(crate) async fn serve(options: Options, cancel: CancellationToken) -> Result<(), NodeError> {
    clan_store::create_private_dir(&options.state_dir)?;
    let _lock = host::lock(&options.state_dir)?;
    // Before anything takes its time: a manager that connects meanwhile waits, instead of finding nobody.
    let door = match options.host.socket() {
        None => None,
        Some((path, user)) => Some(LocalListener::bind(path, user).map_err(NodeError::Socket)?),
    };
    let identity = Identity::load_or_create(&options.state_dir)?;
    tracing::info!(machine = %identity.machine(), "controller starts");
    let controller = Arc::new(Controller {
        dir: options.state_dir,
        images: Arc::new(ImageServer::new(options.host.disks())),
        host: options.host,
        identity: SyncMutex::new(Arc::new(identity)),
        environment: Mutex::new(Environment::default()),
        node: Mutex::new(None),
        alarm: Alarm::new(cancel.clone()),
        cancel: cancel.clone(),
    });
    controller.resume().await?;
    let outcome = match door {
        Some(door) => {
            controller.serve_socket(&door).await;
            Ok(())
        }
        None => {
            let port = open_virtio_port(PORT, PORT_PATIENCE).await.map_err(NodeError::Port)?;
            controller.clone().serve_channel(port).await
        }
    };
    cancel.cancel();
    controller.stop().await;
    if controller.alarm.is_raised() {
        return Err(NodeError::Deaf);
    }
    match outcome {
        Err(error) if !matches!(error, ChannelError::Closed) => {
            Err(NodeError::network("the channel to the manager", error))
        }
        _ => Ok(()),
    }
}

struct Controller {
    dir: PathBuf,
    host: Host,
    /// Made anew when the machine forgets its clan.
    identity: SyncMutex<Arc<Identity>>,
    images: Arc<ImageServer>,
    environment: Mutex<Environment>,
    /// Locked while a node starts, so that it starts once.
    node: Mutex<Option<Node>>,
    /// Without its endpoint the machine hears nobody: the whole controller ends, and systemd starts it afresh.
    alarm: Alarm,
    cancel: CancellationToken,
}

/// A machine with a place in a clan.
struct Node {
    place: Place,
    core: CoreHandle,
    endpoint: Endpoint,
    words: Arc<WordsDesk>,
    helm: Arc<Helm>,
    /// Absent where the computer does not let the controller carry packets.
    mesh: Option<Mesh>,
    tasks: JoinSet<()>,
    cancel: CancellationToken,
}

/// A machine's two ways out: the interface of the mesh, and the endpoint on the base network.
struct Ways {
    /// Or why there is none.
    tun: Result<Tun, NodeError>,
    endpoint: Endpoint,
    ports: Ports,
    names: Names,
    /// Relays that the endpoint was introduced to.
    introduced: Vec<RelayUrl>,
    /// The connection on which the machine was admitted a moment ago.
    admitted_by: Option<Connection>,
}

/// What most requests need of a node, without holding its lock.
pub(crate) struct Access {
    pub(crate) core: CoreHandle,
    words: Arc<WordsDesk>,
    wireguard: Option<Arc<Wireguard>>,
    pub(crate) helm: Arc<Helm>,
    pub(crate) endpoint: Endpoint,
    /// The node ends.
    pub(crate) over: CancellationToken,
}

impl Controller {
    /// Serves whoever connects, until cancelled.
    async fn serve_socket(self: &Arc<Self>, door: &LocalListener) {
        let managers = TaskTracker::new();
        let room = Arc::new(Semaphore::new(MAX_MANAGERS));
        loop {
            let entered = async {
                let permit = room.clone().acquire_owned().await;
                (permit, door.accept().await)
            };
            let (permit, stream) = tokio::select! {
                () = self.cancel.cancelled() => break,
                entered = entered => entered,
            };
            let serving = self.clone().serve_channel(stream);
            managers.spawn(async move {
                let ended = serving.await;
                tracing::debug!(?ended, "a manager is gone");
                drop(permit);
            });
        }
        managers.close();
        managers.wait().await;
    }

    /// Serves one byte stream until it ends or until cancelled.
    async fn serve_channel<I>(self: Arc<Self>, io: I) -> Result<(), ChannelError>
    where
        I: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (_channel, mut incoming, driver) = Channel::guest(io, env!("CARGO_PKG_VERSION"), self.cancel.clone());
        let streams = TaskTracker::new();
        let driver = tokio::spawn(driver);
        loop {
            let stream = tokio::select! {
                () = self.cancel.cancelled() => break,
                stream = incoming.accept() => stream,
            };
            let Some(stream) = stream else { break };
            let controller = self.clone();
            streams.spawn(async move { controller.converse(stream).await });
        }
        streams.close();
        streams.wait().await;
        driver.await.unwrap_or(Err(ChannelError::Closed))
    }

    fn identity(&self) -> Arc<Identity> {
        self.identity.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes up the place that the machine had before a restart.
    async fn resume(&self) -> Result<(), NodeError> {
        if let Some(place) = Place::load(&self.dir)? {
            let ways = self.ways(&place.clan).await?;
            let node = self.start_node(place, ways, Some(DOUBT), |_| Ok(())).await?;
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
        node.as_ref().map(|n| Access {
            core: n.core.clone(),
            words: n.words.clone(),
            helm: n.helm.clone(),
            endpoint: n.endpoint.clone(),
            wireguard: n.mesh.as_ref().map(Mesh::wireguard),
            over: n.cancel.clone(),
        })
    }

    async fn converse(&self, mut stream: Stream) {
        let Ok(request) = recv_message::<ControlRequest, _>(&mut stream, MAX_MESSAGE).await else { return };
        let response = match request {
            ControlRequest::Identify => self.identify().await,
            ControlRequest::Consent { clan, device } => self.consent(&clan, device).await,
            ControlRequest::Provision(provision) => match self.provide(*provision, &mut stream).await {
                Some(response) => response,
                None => return,
            },
            ControlRequest::SetEnvironment(environment) => {
                self.set_environment(environment).await;
                ControlResponse::Done
            }
            ControlRequest::Forget => self.forget().await,
            ControlRequest::Stop => self.end(),
            other => match self.access().await {
                Some(access) => return self.converse_as_member(stream, other, access).await,
                None => ControlResponse::Failed("this machine has no place in a clan yet".to_owned()),
            },
        };
        if send_message(&mut stream, &response, MAX_MESSAGE).await.is_ok() {
            streams::finish(stream).await;
        }
    }

    /// Requests that need the clan.
    async fn converse_as_member(&self, mut stream: Stream, request: ControlRequest, access: Access) {
        let response = match request {
            ControlRequest::Append(entry) => match access.core.insert(vec![entry]).await {
                Ok(()) => ControlResponse::Done,
                Err(error) => ControlResponse::Failed(chain(&error)),
            },
            ControlRequest::Entries(have) => return memory::give(stream, &access.core, have).await,
            ControlRequest::Remember { restored } => memory::take(&mut stream, &access.core, restored).await,
            ControlRequest::Status => ControlResponse::Status(Box::new(access.status(&access.core.view()).await)),
            ControlRequest::SetControlMode(mode) => match access.helm.set_mode(mode, &access.core) {
                Ok(()) => ControlResponse::Done,
                Err(why) => ControlResponse::Failed(why),
            },
            ControlRequest::Steer { machine } => return helm::steer(stream, &access, machine).await,
            ControlRequest::Orders => {
                if send_message(&mut stream, &ControlResponse::Connected, MAX_MESSAGE).await.is_ok() {
                    access.helm.wait(stream);
                }
                return;
            }
            ControlRequest::NoteImage { before, after } => match access.helm.note_image(before, after, &access.core) {
                Ok(()) => ControlResponse::Done,
                Err(why) => ControlResponse::Failed(why),
            },
            ControlRequest::OpenWords { words, link } => match access.words.open(&words, link.expose()) {
                Ok(()) => ControlResponse::Done,
                Err(error) => ControlResponse::Failed(chain(&error)),
            },
            ControlRequest::Peers => ControlResponse::Peers(status::others(&access.core.view())),
            ControlRequest::Ping { machine } => ping::ping(machine, &access.core, access.wireguard()).await,
            ControlRequest::Farewell { entry } => self.farewell(&access, entry).await,
            ControlRequest::Watch => return self.report(stream, &access).await,
            ControlRequest::Connect { service, machine } => {
                return streams::connect(stream, &access, &service, machine.as_ref()).await;
            }
            ControlRequest::Journal { lines, follow } => {
                let scope = if self.host.is_guest() { Scope::Everything } else { Scope::Own };
                return streams::journal(stream, &scope, lines, follow).await;
            }
            ControlRequest::Identify
            | ControlRequest::Consent { .. }
            | ControlRequest::Provision(_)
            | ControlRequest::SetEnvironment(_)
            | ControlRequest::Forget
            | ControlRequest::Stop => ControlResponse::Failed("handled elsewhere".to_owned()),
        };
        if send_message(&mut stream, &response, MAX_MESSAGE).await.is_ok() {
            streams::finish(stream).await;
        }
    }

    /// Ends the controller in good order, and with it its container.
    fn end(&self) -> ControlResponse {
        if !matches!(self.host, Host::Container(_)) {
            return ControlResponse::Failed("it is not for its manager to stop this controller".to_owned());
        }
        tracing::info!("the manager stops this container");
        self.cancel.cancel();
        ControlResponse::Done
    }

    async fn identify(&self) -> ControlResponse {
        let identity = self.identity();
        ControlResponse::Identity {
            machine: identity.machine(),
            wireguard: identity.wireguard_public(),
            clan: self.node.lock().await.as_ref().map(|n| n.place.clan),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// A machine is in one clan: it agrees to no other while it is.
    async fn consent(&self, clan: &ClanId, device: DeviceId) -> ControlResponse {
        if self.node.lock().await.as_ref().is_some_and(|node| node.place.clan != *clan) {
            return ControlResponse::Failed("this machine belongs to another clan".to_owned());
        }
        let identity = self.identity();
        let proof = KeyProof::of_machine(identity.signing(), clan, &device.into(), &identity.wireguard_public());
        ControlResponse::Consent(proof.halves())
    }

    async fn set_environment(&self, mut environment: Environment) {
        if !self.host.is_guest() {
            // The machine sees for itself where it may be reached: see `own`.
            environment = Environment { quic: Vec::new(), wireguard: Vec::new(), ..environment };
        }
        self.images.set_manifest(&environment.manifest, &environment.pieces);
        *self.environment.lock().await = environment.clone();
        if let Some(node) = self.node.lock().await.as_ref()
            && self.host.is_guest()
        {
            node.take_environment(environment).await;
        }
    }

    /// Ends the node, and makes the machine one that never was in a clan.
    async fn forget(&self) -> ControlResponse {
        let mut slot = self.node.lock().await;
        if let Some(node) = slot.take() {
            node.stop().await;
        }
        let fresh =
            state::forget(&self.dir).map_err(NodeError::from).and_then(|()| Ok(Identity::load_or_create(&self.dir)?));
        match fresh {
            Ok(fresh) => {
                tracing::info!(machine = %fresh.machine(), "the clan is forgotten; a machine with new keys waits for another");
                *self.identity.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(fresh);
                ControlResponse::Done
            }
            Err(error) => ControlResponse::Failed(chain(&error)),
        }
    }

    /// Takes the ledger that follows, then the place. `None` if the manager broke off.
    async fn provide(&self, provision: Provision, stream: &mut Stream) -> Option<ControlResponse> {
        let mut intake = Intake::new(Ledger::open(provision.clan));
        match join::take(stream, &mut intake).await {
            Ok(()) => Some(self.provision(provision, intake.into_ledger()).await),
            Err(why) => {
                tracing::warn!(why, "the manager did not hand over the ledger");
                None
            }
        }
    }

    /// Safe to repeat: the manager asks again after a restart of either side.
    async fn provision(&self, provision: Provision, ledger: Ledger) -> ControlResponse {
        let mut slot = self.node.lock().await;
        if let Some(node) = slot.as_ref() {
            return if node.place.clan == provision.clan {
                ControlResponse::Provisioned
            } else {
                ControlResponse::Failed("this machine belongs to another clan".to_owned())
            };
        }
        self.images.set_manifest(&provision.environment.manifest, &provision.environment.pieces);
        if self.host.is_guest() {
            *self.environment.lock().await = provision.environment.clone();
        }
        match self.take_place(provision, ledger).await {
            Ok(node) => {
                *slot = Some(node);
                ControlResponse::Provisioned
            }
            Err(ProvisionError::Refused(refusal)) => ControlResponse::Refused(refusal),
            Err(ProvisionError::Failed(reason)) => ControlResponse::Failed(reason),
        }
    }

    async fn take_place(&self, provision: Provision, mut known: Ledger) -> Result<Node, ProvisionError> {
        let mut ways = self.ways(&provision.clan).await?;
        let mut peers = Vec::new();
        if let Some(redeem) = provision.redeem {
            ways.introduced =
                clan_relay::introduce(&ways.endpoint, &ways.names, &redeem.relays, redeem.proof.as_ref()).await;
            let admitted = join::redeem(&ways.endpoint, &redeem, &ways.introduced, known).await?;
            known = admitted.ledger;
            ways.admitted_by = Some(admitted.connection);
            peers = redeem.peers;
            // Those of the link may all be put out before this machine has heard of others.
            let others =
                admitted.peers.into_iter().filter(|other| peers.iter().all(|peer| peer.machine != other.machine));
            let others: Vec<_> = others.collect();
            peers.extend(others);
        }
        // The services are those of the image; a computer's own are not for the clan to start.
        let offers = if self.host.is_guest() { provision.offers } else { Vec::new() };
        let clan_name = known.state().clan_name.clone();
        let place = Place { clan: provision.clan, clan_name, name: provision.name, offers, peers };
        let machine = self.identity().machine();
        helm::begin(&self.dir, provision.control).map_err(|e| ProvisionError::Failed(chain(&e)))?;
        let node = self
            .start_node(place.clone(), ways, None, |ledger| {
                ledger.insert_all(known.entries().cloned());
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
        let identity = self.identity();
        let ports = self.host.ports(&self.dir)?;
        let tun = mesh::interface(&self.host.interface(clan), clan, &identity.machine()).await;
        // A computer changes its network; what the endpoint sends into the tunnel does not get through it.
        let found = timeout(self.host.network_patience(), base_address()).await.ok();
        let address = found.filter(|_| self.host.is_guest()).unwrap_or_else(|| own::everywhere(found));
        let external = self.environment.lock().await.quic.clone();
        let bind = SocketAddr::new(address, ports.quic);
        let names = Names::default();
        let endpoint = net::endpoint(identity.endpoint_key(), bind, &external, &names).await?;
        match tun {
            Err(error) if self.host.is_guest() => Err(error),
            tun => Ok(Ways { tun, endpoint, ports, names, introduced: Vec::new(), admitted_by: None }),
        }
    }

    /// Starts everything that a machine in a clan runs. `prepare` may add to the ledger before anybody sees it.
    async fn start_node(
        &self,
        place: Place,
        Ways { tun, endpoint, ports, names, introduced, admitted_by }: Ways,
        doubt: Option<Duration>,
        prepare: impl FnOnce(&mut Ledger) -> Result<(), String>,
    ) -> Result<Node, ProvisionOrNodeError> {
        // What this machine has verified before it wrote it down need not be verified again at every start.
        let seal = SealKey::derive(&self.identity().signing().to_bytes());
        let path = self.dir.join("ledger.redb");
        let open = || LedgerStore::open_sealed(&path, &place.clan, seal.clone());
        let store = match open() {
            // It was put aside; the replica learns from the other machines what it held.
            Err(error @ StoreError::Corrupt { .. }) => {
                tracing::error!(why = chain(&error), "the ledger's file is damaged: it is learnt anew");
                open()
            }
            opened => opened,
        };
        let store = store.map_err(NodeError::from)?;
        let mut ledger = store.load().map_err(NodeError::from)?;
        let known = ledger.len();
        prepare(&mut ledger).map_err(ProvisionOrNodeError::Reason)?;
        if ledger.len() > known {
            store.append_all(ledger.entries()).map_err(NodeError::from)?;
        }
        let environment = self.environment.lock().await.clone();
        let seen = if self.host.is_guest() { None } else { own::look(&endpoint, ports).await };
        let (quic, wireguard) = seen.unwrap_or((environment.quic, environment.wireguard));
        let certificate = Arc::new(Certificate::load_or_create(&self.dir)?);
        let own = Own {
            quic,
            wireguard,
            manifest: environment.manifest,
            // From outside, no TCP port leads into a VM.
            certificate: (!self.host.is_guest()).then(|| certificate.hash()),
            ..Own::default()
        };
        let cancel = self.cancel.child_token();
        let identity = self.identity();
        let services = self.host.is_guest().then(services::known);
        let possible = Possible { services, offers: place.offers.clone() };
        let helm = Arc::new(Helm::load(&self.dir, &self.host, possible, identity.machine()).map_err(NodeError::from)?);
        let remembered = recall::load(&self.dir);
        let bootstrap = place.peers.iter().chain(&remembered).cloned().collect();
        let clan_name = place.clan_name.clone().or_else(|| "clan".parse().ok());
        let clan_name = clan_name.ok_or_else(|| ProvisionOrNodeError::Reason("the clan has no name".to_owned()))?;
        let (core, handle, dials) =
            Core::new(identity.signing().clone(), ledger, store, own, bootstrap, clan_name, doubt);
        let mut tasks = JoinSet::new();
        tasks.spawn(core.run(cancel.clone()));
        let plan = MeshPlan {
            port: ports.wireguard,
            names: self.host.names(&place.clan, &identity.machine()),
            names_may_fail: !self.host.is_guest(),
            multicast: self.host.multicast(),
        };
        let mesh = match tun {
            Ok(tun) => Mesh::start(&identity, tun, &plan, &handle, &cancel).await,
            Err(error) => Err(error),
        };
        let mesh = match mesh {
            Ok(mesh) => Some(mesh),
            // The ledger can be kept, and the clan be managed, on a computer that carries no packets.
            Err(error) if !self.host.is_guest() => {
                tracing::warn!(why = chain(&error), "no packets flow between this computer and the clan");
                handle.problem("data plane", Some(host::no_packets(&error))).await;
                None
            }
            Err(error) => {
                cancel.cancel();
                while tasks.join_next().await.is_some() {}
                return Err(error.into());
            }
        };
        let moved = Arc::new(Notify::new());
        tasks.spawn(pulse::watch(endpoint.clone(), names.clone(), handle.clone(), moved.clone(), cancel.clone()));
        if !self.host.is_guest() {
            let news = own::News { wireguard: mesh.as_ref().map(Mesh::wireguard), moved };
            tasks.spawn(own::follow(endpoint.clone(), ports, news, handle.clone(), cancel.clone()));
        }
        let words = Arc::new(WordsDesk::new(identity.machine()));
        tasks.spawn(sockets::watch(endpoint.bound_sockets(), self.alarm.clone(), cancel.clone()));
        tasks.spawn(net::accept(
            endpoint.clone(),
            Desks { core: handle.clone(), images: self.images.clone(), words: words.clone(), helm: helm.clone() },
            cancel.clone(),
            self.alarm.clone(),
        ));
        tasks.spawn(helm::keep_telling(helm.clone(), handle.clone(), cancel.clone()));
        tasks.spawn(helm::keep_announcing(helm.clone(), endpoint.clone(), cancel.clone()));
        tasks.spawn(words::announce(words.clone(), endpoint.clone(), handle.clone(), cancel.clone()));
        tasks.spawn(words::tell_relays(words.clone(), endpoint.clone(), handle.clone(), cancel.clone()));
        tasks.spawn(relay::follow(endpoint.clone(), names, introduced, handle.clone(), cancel.clone()));
        tasks.spawn(relay::serve(certificate, words.lobby(), handle.clone(), cancel.clone()));
        tasks.spawn(peer::dial(endpoint.clone(), handle.clone(), dials, admitted_by, cancel.clone()));
        tasks.spawn(recall::keep(self.dir.clone(), remembered, handle.clone(), cancel.clone()));
        tasks.spawn(services::run(helm.clone(), handle.clone(), self.host.starter(), cancel.clone()));
        Ok(Node { place, core: handle, endpoint, words, helm, mesh, tasks, cancel })
    }

    async fn farewell(&self, access: &Access, entry: Vec<u8>) -> ControlResponse {
        if let Err(error) = access.core.insert(vec![entry]).await {
            return ControlResponse::Failed(chain(&error));
        }
        let mut views = access.core.watch();
        let alone = |view: &View| view.state.good_machines().all(|(machine, _)| *machine == view.machine);
        if timeout(FAREWELL, views.wait_for(|view| view.let_go || alone(view))).await.is_err() {
            return ControlResponse::Unheard;
        }
        ControlResponse::Done
    }

    /// Status when it changes, statistics always, once a second, until the manager has enough.
    async fn report(&self, mut stream: Stream, access: &Access) {
        let mut sampler = Sampler::new(self.host.measured(&self.dir));
        let mut tick = tokio::time::interval(REPORT_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut last = None;
        loop {
            tokio::select! {
                () = access.over.cancelled() => return,
                _ = tick.tick() => {}
            }
            let status = access.status(&access.core.view()).await;
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

impl Access {
    pub(crate) fn wireguard(&self) -> Option<&Wireguard> {
        self.wireguard.as_deref()
    }

    /// What the machine reports of the clan, and of itself.
    pub(crate) async fn status(&self, view: &View) -> NodeStatus {
        status::report(view, self.helm.mode(), self.wireguard()).await
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
        if let Some(mesh) = self.mesh {
            mesh.stop().await;
        }
        // It says goodbye to every peer; one that does not answer must not keep this computer from going down.
        if tokio::time::timeout(GOODBYES, self.endpoint.close()).await.is_err() {
            tracing::debug!("the endpoint was not closed in time");
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
