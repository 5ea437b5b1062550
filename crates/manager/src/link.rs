//! Keeps the channels to a running guest's agent and controller connected, and takes in what the controller tells.

use std::{
    collections::VecDeque,
    future::Future,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use clan_build::ImageStore;
use clan_os::channel::{Channel, Driver, recv_message};
use clan_types::Timestamp;
use clan_vm::{Vm, VmError};
use clan_wire::{
    agent::{AgentRequest, AgentResponse},
    control::{self, ControlRequest, ControlResponse, Environment, GuestStats, NodeStatus},
};
use futures_util::FutureExt;
use tokio::{
    net::UnixStream,
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    clan::RecordCell,
    fetch::blocking,
    guest::{self, GuestError},
    memory,
    record::ClanRecord,
    tasks::now,
    template::{self, Staging},
};

const VERSION: &str = env!("CARGO_PKG_VERSION");
const RECONNECT: Duration = Duration::from_millis(500);
const RETRY_WATCH: Duration = Duration::from_secs(1);
/// Statistics come every second; a controller that is silent for so long hangs.
const SILENCE: Duration = Duration::from_secs(45);
/// How often the base OS's addresses are looked at.
const ADDRESSES: Duration = Duration::from_secs(20);
/// Points of the statistics that are kept: one a second.
const HISTORY: usize = 600;

/// The state of a clan, and when the controller told it.
#[derive(Debug, Clone)]
pub(crate) struct Told {
    pub(crate) at: Timestamp,
    pub(crate) status: Arc<NodeStatus>,
}

/// The latest statistics.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) points: VecDeque<(Timestamp, GuestStats)>,
}

/// What a link feeds.
#[derive(Clone)]
pub(crate) struct Outlets {
    pub(crate) agent: watch::Sender<Option<Channel>>,
    pub(crate) control: watch::Sender<Option<Channel>>,
    pub(crate) told: watch::Sender<Option<Told>>,
    pub(crate) stats: Arc<Mutex<Stats>>,
}

impl Outlets {
    pub(crate) fn new() -> Self {
        Self {
            agent: watch::Sender::new(None),
            control: watch::Sender::new(None),
            told: watch::Sender::new(None),
            stats: Arc::default(),
        }
    }

    fn add_stats(&self, mut stats: GuestStats) {
        stats.units.truncate(64);
        let points = &mut self.stats.lock().unwrap_or_else(PoisonError::into_inner).points;
        if points.len() >= HISTORY {
            points.pop_front();
        }
        points.push_back((now(), stats));
    }
}

/// Keeps the channel to the agent, until cancelled. `first` is the guest's to leave a template behind; it has the place of
/// its data disk.
pub(crate) async fn keep_agent(vm: Vm, out: Outlets, first: Option<(Staging, PathBuf)>, cancel: CancellationToken) {
    let first = Arc::new(Mutex::new(first));
    let serve = |channel: Channel| {
        let (vm, out, first) = (vm.clone(), out.clone(), first.clone());
        async move {
            while channel.started().await.is_ok() {
                let first = first.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some((staging, data_disk)) = first {
                    // Whoever waits for the agent only shall not wait for this.
                    out.agent.send_replace(Some(channel.clone()));
                    template::leave(&vm, &channel, staging, &data_disk).await;
                }
                // Also the clock of a guest that was paused or saved is wrong.
                template::renew(&channel).await;
                match guest::ask_agent(&channel, &AgentRequest::Ping, guest::PATIENCE).await {
                    Ok(AgentResponse::Pong { problems, .. }) => {
                        for problem in problems.iter().take(20) {
                            tracing::info!(problem = guest::short(problem), "the guest's agent reports a problem");
                        }
                        out.agent.send_replace(Some(channel.clone()));
                        // The agent's program never restarts within a boot.
                        std::future::pending::<()>().await;
                    }
                    Ok(_) | Err(_) => sleep(RECONNECT).await,
                }
            }
        }
    };
    keep("agent", || vm.connect_agent(), serve, &out.agent, &cancel).await;
}

/// Keeps the channel to the controller, and watches it, until cancelled.
pub(crate) async fn keep_control<C>(
    connect: impl Fn() -> C,
    record: Arc<RecordCell>,
    images: ImageStore,
    out: Outlets,
    cancel: CancellationToken,
) where
    C: Future<Output = Result<UnixStream, VmError>>,
{
    let serve = |channel| serve_control(channel, record.clone(), images.clone(), out.clone());
    keep("controller", connect, serve, &out.control, &cancel).await;
}

async fn keep<C, S>(
    who: &'static str,
    connect: impl Fn() -> C,
    serve: impl Fn(Channel) -> S,
    out: &watch::Sender<Option<Channel>>,
    cancel: &CancellationToken,
) where
    C: Future<Output = Result<UnixStream, VmError>>,
    S: Future<Output = ()>,
{
    let work = async {
        loop {
            match connect().await {
                Ok(io) => {
                    let (channel, driver): (Channel, Driver) = Channel::host(io, VERSION, cancel.child_token());
                    tokio::select! {
                        end = driver => tracing::debug!(who, ?end, "channel ended"),
                        () = serve(channel) => {}
                    }
                    out.send_replace(None);
                }
                Err(error) => tracing::debug!(who, %error, "no connection to the guest's port"),
            }
            sleep(RECONNECT).await;
        }
    };
    tokio::select! {
        biased;
        () = cancel.cancelled() => {}
        () = work => {}
    }
    out.send_replace(None);
}

/// Takes in what a controller tells until it is silent for too long. Where it has nothing to report, as it has no place in
/// the clan yet, it is asked again.
pub(crate) async fn watch_until_silent(channel: &Channel, out: &Outlets) {
    loop {
        match watch_control(channel, out).await {
            Err(GuestError::TimedOut { .. }) => return,
            ended => tracing::debug!(?ended, "the controller does not report now"),
        }
        sleep(RETRY_WATCH).await;
    }
}

async fn serve_control(channel: Channel, record: Arc<RecordCell>, images: ImageStore, out: Outlets) {
    while channel.started().await.is_ok() {
        out.control.send_replace(Some(channel.clone()));
        let ended = tokio::select! {
            ended = watch_control(&channel, &out) => ended,
            () = tell_environment(&channel, &record, &images) => Ok(()),
            () = memory::keep(&channel, &record, &out) => Ok(()),
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "the controller stopped reporting");
            if matches!(error, GuestError::TimedOut { .. }) {
                // A new session, from the beginning.
                return;
            }
        }
        // Either the controller restarted, or it has nothing to report before it has a place in the clan.
        if !matches!(channel.started().now_or_never(), Some(Ok(_))) {
            out.control.send_replace(None);
        }
        sleep(RETRY_WATCH).await;
    }
}

async fn watch_control(channel: &Channel, out: &Outlets) -> Result<(), GuestError> {
    let (mut stream, first) = guest::open(channel, &ControlRequest::Watch, guest::PATIENCE).await?;
    let mut next = first;
    loop {
        match next {
            ControlResponse::Status(status) => {
                out.told.send_replace(Some(Told { at: now(), status: Arc::new(*status) }));
            }
            ControlResponse::Stats(stats) => out.add_stats(*stats),
            _ => return Err(GuestError::Unexpected { what: "report its state" }),
        }
        let what = "report its state";
        let received = timeout(SILENCE, recv_message(&mut stream, control::MAX_MESSAGE)).await;
        next = received
            .map_err(|_| GuestError::TimedOut { what, limit: SILENCE })?
            .map_err(|source| GuestError::Message { what, source })?;
    }
}

/// Tells the controller what it cannot see from inside, now and when that changes.
async fn tell_environment(channel: &Channel, record: &RecordCell, images: &ImageStore) {
    let mut told = None;
    loop {
        let environment = environment(&record.get(), images).await;
        if told.as_ref() != Some(&environment) {
            match guest::tell(channel, &ControlRequest::SetEnvironment(environment.clone())).await {
                Ok(()) => told = Some(environment),
                Err(error) => tracing::debug!(%error, "the controller does not know its environment yet"),
            }
        }
        sleep(if told.is_some() { ADDRESSES } else { RETRY_WATCH }).await;
    }
}

/// What a clan's machine cannot see from inside: its ports are forwarded for IPv4.
pub(crate) async fn environment(record: &ClanRecord, images: &ImageStore) -> Environment {
    if record.is_integrated() {
        // It sees everything for itself.
        return Environment::default();
    }
    let addresses = match clan_os::addresses::local().await {
        Ok(addresses) => addresses,
        Err(error) => {
            tracing::warn!(%error, "other machines may not find this one");
            Vec::new()
        }
    };
    let with = |port: u16| addresses.iter().filter(|a| a.is_ipv4()).map(|a| (*a, port).into()).collect();
    let (manifest, pieces) = served(record, images).await.unwrap_or_default();
    Environment { quic: with(record.ports.quic), wireguard: with(record.ports.wireguard), manifest, pieces }
}

/// The image that the machine can give to others: its manifest, and the hashes of its pieces. `None` if it cannot.
async fn served(record: &ClanRecord, images: &ImageStore) -> Option<(Vec<u8>, Vec<u8>)> {
    let (id, images) = (record.image?, images.clone());
    let read = blocking(move || {
        let stored = images.get(&id)?;
        let pieces = stored.pieces();
        let pieces = pieces
            .inspect_err(|error| tracing::warn!(image = %id.short(), %error, "newcomers do not get the image here"));
        Some((stored.manifest.encode().ok()?, pieces.ok()?))
    });
    read.await.ok().flatten()
}
