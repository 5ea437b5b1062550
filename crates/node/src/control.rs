//! The manager's side of the controller: the channel to it, and what it asks for.

mod node;
mod outcome;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex as SyncMutex, PoisonError},
    time::Duration,
};

use clan_ledger::{Intake, KeyProof, Ledger};
use clan_os::channel::{
    Channel, ChannelError, Incoming, LocalListener, Stream, open_virtio_port, recv_message, send_message,
};
use clan_types::{ClanId, DeviceId};
use clan_wire::control::{ControlRequest, ControlResponse, Environment, MAX_MESSAGE, PORT, Provision};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Mutex, Semaphore},
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub(crate) use self::node::Access;
use self::{
    node::{Early, Node},
    outcome::ProvisionError,
};
use crate::{
    Host, NodeError, Options,
    core::View,
    helm, host,
    identity::Identity,
    image::ImageServer,
    join, memory,
    mesh::Mesh,
    ping,
    report::{Scope, chain},
    sockets::Alarm,
    state::{self, Place},
    stats::Sampler,
    status, streams,
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

/// Serves the manager until cancelled, and runs the node once there is a place for it.
pub(crate) async fn serve(options: Options, cancel: CancellationToken) -> Result<(), NodeError> {
    clan_store::create_private_dir(&options.state_dir)?;
    let _lock = host::lock(&options.state_dir)?;
    // Before anything takes its time: a manager that connects meanwhile waits, instead of finding nobody.
    let door = match options.host.socket() {
        None => None,
        Some((path, user)) => Some(LocalListener::bind(path, user).map_err(NodeError::Socket)?),
    };
    let dir = options.state_dir.clone();
    let identity = spawn_blocking(move || Identity::load_or_create(&dir));
    // The manager's greeting takes its time, too.
    let line = match door {
        Some(_) => None,
        None => {
            let port = open_virtio_port(PORT, PORT_PATIENCE).await.map_err(NodeError::Port)?;
            Some(Line::begin(port, cancel.clone()))
        }
    };
    let identity = identity.await.map_err(|e| NodeError::network("the machine's keys", e))??;
    tracing::info!(machine = %identity.machine(), "controller starts");
    let controller = Arc::new(Controller {
        dir: options.state_dir,
        images: Arc::new(ImageServer::new(options.host.disks())),
        host: options.host,
        identity: SyncMutex::new(Arc::new(identity)),
        environment: Mutex::new(Environment::default()),
        early: SyncMutex::new(None),
        node: Mutex::new(None),
        alarm: Alarm::new(cancel.clone()),
        cancel: cancel.clone(),
    });
    controller.resume().await?;
    if let Some(door) = &door {
        controller.serve_socket(door).await;
    }
    let outcome = match line {
        Some(line) => controller.clone().serve(line).await,
        None => Ok(()),
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

/// A byte stream to a manager, which is greeted while whoever answers it is made ready.
struct Line {
    _channel: Channel,
    incoming: Incoming,
    driver: JoinHandle<Result<(), ChannelError>>,
}

impl Line {
    fn begin<I>(io: I, cancel: CancellationToken) -> Self
    where
        I: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (channel, incoming, driver) = Channel::guest(io, env!("CARGO_PKG_VERSION"), cancel);
        Self { _channel: channel, incoming, driver: tokio::spawn(driver) }
    }
}

struct Controller {
    dir: PathBuf,
    host: Host,
    /// Made anew when the machine forgets its clan.
    identity: SyncMutex<Arc<Identity>>,
    images: Arc<ImageServer>,
    environment: Mutex<Environment>,
    /// A guest's ways out that are being opened before it has its place in this clan.
    early: SyncMutex<Option<Early>>,
    /// Locked while a node starts, so that it starts once.
    node: Mutex<Option<Node>>,
    /// Without its endpoint the machine hears nobody: the whole controller ends, and systemd starts it afresh.
    alarm: Alarm,
    cancel: CancellationToken,
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
            let serving = self.clone().serve(Line::begin(stream, self.cancel.clone()));
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
    async fn serve(self: Arc<Self>, Line { _channel, mut incoming, driver }: Line) -> Result<(), ChannelError> {
        let streams = TaskTracker::new();
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
            let files = self.files(&place.clan);
            let ways = self.ways(&place.clan).await?;
            self.tell_addresses(&ways.endpoint).await;
            let node = self.start_node(place, files.await?, ways, Some(DOUBT), |_| Ok(())).await?;
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
        self.begin_early(clan);
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
        self.early.lock().unwrap_or_else(PoisonError::into_inner).take();
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
        let mut sampler = Sampler::new(self.host.measured(&self.dir)).units_later();
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
