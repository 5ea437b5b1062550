//! The keeper of a clan whose machine is a container: starts it, finds it again, starts it anew when it ends, stops it. Its
//! states are those of a VM; there is no agent in it, and nothing to wait for but its controller.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use clan_api::{ApiProblem, ErrorCode, VmState};
use clan_os::channel::Channel;
use clan_vm::{
    UdpForward, VmError,
    container::{self, Container, ContainerExit, ContainerSpec},
};
use clan_wire::{control::ControlRequest, image::FileRole};
use tokio::{
    net::UnixStream,
    sync::{mpsc, watch},
    time::{sleep, sleep_until, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    clan::RecordCell,
    guest,
    keeper::{self, Command, GUEST_QUIC, GUEST_WIREGUARD, KeeperConfig, Restarts, VmView, free_ports},
    link::{self, Outlets},
    problem,
    tasks::now,
};

const PORT_ATTEMPTS: u32 = 8;
/// For the controller to take leave of the clan's machines.
const STOP: Duration = Duration::from_secs(15);
const KILL: Duration = Duration::from_secs(5);
/// Its controller listens within a second of its start.
const LISTENS: Duration = Duration::from_secs(10);
const LISTENS_EVERY: Duration = Duration::from_millis(20);

/// The loop of such a keeper.
pub(crate) struct Contained {
    pub(crate) record: Arc<RecordCell>,
    pub(crate) config: KeeperConfig,
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) publish: watch::Sender<VmView>,
    pub(crate) container: watch::Sender<Option<Container>>,
    pub(crate) out: Outlets,
    pub(crate) cancel: CancellationToken,
}

struct Running {
    container: Container,
    since: Instant,
    links: CancellationToken,
    tracker: TaskTracker,
    stopping: bool,
}

struct Loop {
    with: Contained,
    running: Option<Running>,
    restarts: Restarts,
    retry_at: Option<Instant>,
}

enum Event {
    Over,
    Command(Command),
    Exit(ContainerExit),
    Control,
    Retry,
}

impl Contained {
    pub(crate) async fn run(self) {
        Loop { with: self, running: None, restarts: Restarts::default(), retry_at: None }.run().await;
    }
}

impl Loop {
    async fn run(mut self) {
        match Container::adopt(&self.with.record.paths().vm()).await {
            Ok(Some(container)) => {
                tracing::info!(pid = container.pid(), "found the container running");
                self.attach(container);
                if !self.with.record.get().wanted {
                    self.begin_stop();
                }
            }
            Ok(None) => {}
            // Starting it is refused too while somebody holds its lock, so nothing is doubled.
            Err(error) => tracing::warn!(%error, "cannot tell whether the container runs"),
        }
        keeper::go_on(&self.with.record);
        if self.running.is_none() && self.with.record.get().wanted {
            self.retry_at = Some(Instant::now());
        }
        let mut control = self.with.out.control.subscribe();
        loop {
            match self.next(&mut control).await {
                Event::Over => break,
                Event::Command(Command::Want { run, reply }) => {
                    let outcome = self.with.record.update(|r| r.wanted = run).map_err(|e| problem::disk(&e));
                    if outcome.is_ok() {
                        self.wish(run);
                    }
                    let _ = reply.send(outcome);
                }
                Event::Command(Command::Pause { reply, .. }) => {
                    let _ = reply.send(Err(no_vm()));
                }
                Event::Command(Command::Restart { reply }) => {
                    let outcome = self.with.record.update(|r| r.wanted = true).map_err(|e| problem::disk(&e));
                    if outcome.is_ok() {
                        self.begin_stop();
                        self.wish(true);
                    }
                    let _ = reply.send(outcome);
                }
                Event::Command(Command::Destroy { reply }) => {
                    self.destroy().await;
                    let _ = reply.send(());
                    return;
                }
                Event::Exit(exit) => self.ended(exit).await,
                Event::Control => self.control_changed(control.borrow_and_update().is_some()),
                Event::Retry => {
                    self.retry_at = None;
                    if self.running.is_none() && self.with.record.get().wanted {
                        self.start().await;
                    }
                }
            }
        }
        self.shut_down().await;
    }

    async fn next(&mut self, control: &mut watch::Receiver<Option<Channel>>) -> Event {
        let container = self.running.as_ref().map(|r| r.container.clone());
        let at = self.retry_at;
        tokio::select! {
            biased;
            () = self.with.cancel.cancelled() => Event::Over,
            exit = async { match &container { Some(c) => c.wait_exit().await, None => std::future::pending().await } } => Event::Exit(exit),
            command = self.with.commands.recv() => command.map_or(Event::Over, Event::Command),
            Ok(()) = control.changed() => Event::Control,
            () = async { match at { Some(at) => sleep_until(at.into()).await, None => std::future::pending().await } } => Event::Retry,
        }
    }

    fn wish(&mut self, run: bool) {
        if run {
            self.restarts = Restarts::default();
            // One that is on its way down is started anew when it is.
            if self.running.is_none() {
                self.show(VmState::Starting, None);
                self.retry_at = Some(Instant::now());
            }
        } else {
            self.retry_at = None;
            if self.running.is_some() {
                self.begin_stop();
            } else {
                self.show(VmState::Stopped, None);
            }
        }
    }

    async fn start(&mut self) {
        self.show(VmState::Starting, None);
        for _ in 0..PORT_ATTEMPTS {
            let spec = match self.spec().await {
                Ok(spec) => spec,
                Err(problem) => return self.fail(problem),
            };
            match Container::start(spec).await {
                Ok(container) => {
                    tracing::info!(clan = %self.with.record.get().name, pid = container.pid(), "started the container");
                    return self.attach(container);
                }
                Err(VmError::PortBusy { addr }) => {
                    tracing::info!(port = addr.port(), "another program uses the container's port: choosing others");
                    let chosen = free_ports().map_err(|e| no_port().why(e.to_string()));
                    let kept = chosen
                        .and_then(|ports| self.with.record.update(|r| r.ports = ports).map_err(|e| problem::disk(&e)));
                    if let Err(problem) = kept {
                        return self.fail(problem);
                    }
                }
                // An earlier manager was killed as it started it.
                Err(VmError::AlreadyRunning { .. }) => match Container::adopt(&self.with.record.paths().vm()).await {
                    Ok(Some(container)) => return self.attach(container),
                    _ => return self.died(problem::vm(&VmError::AlreadyRunning { pid: None }), Duration::ZERO),
                },
                Err(error) => return self.fail(problem::vm(&error)),
            }
        }
        self.fail(no_port());
    }

    async fn spec(&self) -> Result<ContainerSpec, ApiProblem> {
        let (record, paths, config) = (self.with.record.get(), self.with.record.paths(), &self.with.config);
        let image =
            record.image.ok_or_else(|| ApiProblem::new(ErrorCode::Conflict, "the container has no image yet"))?;
        let stored = config.images.get(&image).ok_or_else(|| {
            ApiProblem::new(ErrorCode::DamagedFile, "the container's image is not on this computer any more")
        })?;
        let any = |port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        Ok(ContainerSpec {
            dir: paths.vm(),
            program: config.program.clone(),
            layers: config.trees.layers(&stored).await?,
            data: paths.data(),
            shown: vec![
                ("root".into(), stored.path(FileRole::Root)),
                ("layer".into(), stored.path(FileRole::Layer)),
                ("boot".into(), stored.boot_disk()),
            ],
            forwards: vec![
                UdpForward { host: any(record.ports.quic), guest_port: GUEST_QUIC },
                UdpForward { host: any(record.ports.wireguard), guest_port: GUEST_WIREGUARD },
            ],
            memory: record.memory,
            cpus: record.cpus,
        })
    }

    fn attach(&mut self, container: Container) {
        let (links, tracker) = (CancellationToken::new(), TaskTracker::new());
        let connect = {
            let container = container.clone();
            move || connect(container.clone())
        };
        let (record, images) = (self.with.record.clone(), self.with.config.images.clone());
        tracker.spawn(link::keep_control(connect, record, images, self.with.out.clone(), links.clone()));
        self.with.container.send_replace(Some(container.clone()));
        self.running = Some(Running { container, since: Instant::now(), links, tracker, stopping: false });
        self.show(VmState::Starting, None);
    }

    fn begin_stop(&mut self) {
        let Some(running) = &mut self.running else { return };
        if running.stopping {
            return;
        }
        running.stopping = true;
        // Its end is seen by the loop.
        running.tracker.spawn(stop(running.container.clone(), self.with.out.control.borrow().clone(), STOP));
        self.show(VmState::Stopping, None);
    }

    async fn unlink(&mut self, running: Running) {
        running.links.cancel();
        running.tracker.close();
        running.tracker.wait().await;
        self.with.container.send_replace(None);
    }

    async fn ended(&mut self, exit: ContainerExit) {
        let Some(running) = self.running.take() else { return };
        let (stopping, uptime) = (running.stopping, running.since.elapsed());
        let said = running.container.console_tail();
        self.unlink(running).await;
        let wanted = self.with.record.get().wanted;
        if !wanted {
            return self.show(VmState::Stopped, None);
        }
        if stopping {
            self.show(VmState::Starting, None);
            self.retry_at = Some(Instant::now());
            return;
        }
        let mut problem = ApiProblem::new(ErrorCode::VmFailed, format!("the container ended: {}", describe(exit)));
        if !said.trim().is_empty() {
            problem = problem.why(format!("the last lines of its log: {}", guest::short(&said.replace('\n', " / "))));
        }
        self.died(problem.hint("look at its log: `clan vm logs`"), uptime);
    }

    /// Starts it again later, or gives it up.
    fn died(&mut self, problem: ApiProblem, uptime: Duration) {
        match self.restarts.after(uptime, self.with.record.get().trial.is_some()) {
            Some(delay) => {
                tracing::warn!(problem = problem.message, why = problem.why, "starting the container again");
                self.retry_at = Some(Instant::now() + delay);
                self.show(VmState::Starting, Some(problem));
            }
            None => self.fail(problem.hint("start it again: `clan vm start`")),
        }
    }

    fn fail(&mut self, problem: ApiProblem) {
        tracing::warn!(problem = problem.message, why = problem.why, "the container is given up");
        self.show(VmState::Failed, Some(problem));
    }

    fn control_changed(&mut self, up: bool) {
        if self.running.as_ref().is_none_or(|r| r.stopping) {
            return;
        }
        if up {
            self.show(VmState::Running, None);
        } else if self.with.publish.borrow().state == VmState::Running {
            let why = "its controller does not answer just now";
            self.show(VmState::Running, Some(ApiProblem::new(ErrorCode::VmNotReady, why)));
        }
    }

    fn show(&self, state: VmState, problem: Option<ApiProblem>) {
        let (pid, restarts) = (self.running.as_ref().map(|r| r.container.pid()), self.restarts.count());
        let unlimited = self.running.as_ref().and_then(|r| r.container.unlimited()).map(ToString::to_string);
        self.with.publish.send_if_modified(|view| {
            let since = if view.state == state { view.since } else { now() };
            let next = VmView { problem, since, restarts, pid, unlimited, ..VmView::without_vm(state) };
            let changed = *view != next;
            *view = next;
            changed
        });
    }

    /// Ends it, and removes what only a container's users may.
    async fn destroy(&mut self) {
        if let Some(running) = self.running.take() {
            end(&running.container).await;
            self.unlink(running).await;
        }
        let paths = self.with.record.paths();
        for folder in [paths.data(), paths.vm()] {
            if let Err(error) = container::remove(&folder).await {
                tracing::warn!(folder = %folder.display(), %error, "what a container left is not removed");
            }
        }
        self.show(VmState::Stopped, None);
    }

    async fn shut_down(mut self) {
        let Some(running) = self.running.take() else { return };
        if !self.with.config.keep_vms.get() {
            // The wish stays on disk: the next manager starts it again.
            self.show(VmState::Stopping, None);
            let control = self.with.out.control.borrow().clone();
            stop(running.container.clone(), control, STOP).await;
        }
        self.unlink(running).await;
    }
}

/// The controller of a container that has just started listens soon.
async fn connect(container: Container) -> Result<UnixStream, VmError> {
    let deadline = Instant::now() + LISTENS;
    loop {
        match container.connect_control().await {
            Err(_) if Instant::now() < deadline => sleep(LISTENS_EVERY).await,
            outcome => return outcome,
        }
    }
}

/// In good order if it answers.
async fn stop(container: Container, control: Option<Channel>, grace: Duration) {
    let Some(control) = control else {
        tracing::info!(pid = container.pid(), "the container's controller cannot be asked to stop: it is killed");
        return end(&container).await;
    };
    match timeout(grace, guest::tell(&control, &ControlRequest::Stop)).await {
        Ok(Ok(())) => {}
        failed => tracing::debug!(?failed, "the controller did not confirm that it stops"),
    }
    if timeout(grace, container.wait_exit()).await.is_ok() {
        return;
    }
    tracing::warn!(pid = container.pid(), "the container does not stop: it is killed");
    end(&container).await;
}

async fn end(container: &Container) {
    match container.kill(KILL).await {
        Ok(true) => {}
        Ok(false) => tracing::warn!(pid = container.pid(), "something of the killed container still runs"),
        Err(error) => tracing::warn!(pid = container.pid(), %error, "cannot kill the container"),
    }
}

fn describe(exit: ContainerExit) -> String {
    match exit {
        ContainerExit::Ended(0) => "its controller ended".into(),
        ContainerExit::Ended(status) => format!("its controller failed, with status {status}"),
        ContainerExit::Signalled(signal) => format!("signal {signal} killed it"),
        ContainerExit::Unknown => "it ended while nobody watched".into(),
    }
}

/// What only a VM can do.
pub(crate) fn no_vm() -> ApiProblem {
    ApiProblem::new(ErrorCode::Conflict, "a container cannot do this")
        .why("it is a group of this computer's processes: it can be started, stopped and restarted, not paused, resized or copied")
        .hint("a virtual machine can: leave the clan and join it again without `--container`")
}

fn no_port() -> ApiProblem {
    ApiProblem::new(ErrorCode::PortBusy, "no free UDP port was found for the container")
}
