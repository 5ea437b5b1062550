//! The owner of one clan's VM: starts it, finds it again, watches it, starts it anew when it dies, stops it.
//!
//! ```text
//!            want                channel of the controller
//!  Stopped ───────▶ Starting ───────────────────────────────▶ Running
//!     ▲               │  ▲ died: backoff, at most [`MAX_RESTARTS`] times      │
//!     │               ▼  └────────────────────────────────────────┤ died
//!     │             Failed(why) ◀── too many, or nothing to be gained          │ want not
//!     └──────────────────────────────── Stopping ◀────────────────┘
//! ```
//!
//! INVARIANT: only this loop starts QEMU for its clan, and it looks for a running one first.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use clan_api::{ApiProblem, ErrorCode, VmState};
use clan_build::ImageStore;
use clan_os::channel::Channel;
use clan_types::Timestamp;
use clan_vm::{
    AccelKind, Exit, ExitReason, ImageFiles, Network, Qemu, UdpForward, Vm, VmError, VmSpec, network::Exposure, probe,
};
use clan_wire::{agent::AgentRequest, image::FileRole};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::{sleep_until, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    clan::RecordCell,
    guest,
    integrated::Integrated,
    link::{self, Outlets, Stats, Told},
    problem,
    record::{Flavour, Ports},
    tasks::now,
};

/// Restarts of a VM that dies again and again, before it is given up.
const MAX_RESTARTS: u32 = 5;
/// A VM that ran for so long is stable: its earlier deaths are forgotten.
const STABLE: Duration = Duration::from_secs(300);
/// How long services get to stop.
const POWER_OFF: Duration = Duration::from_secs(90);
/// The same, while the manager itself stops.
const POWER_OFF_QUICKLY: Duration = Duration::from_secs(30);
const QUIT: Duration = Duration::from_secs(10);
/// Under KVM an agent answers within two seconds; one that is silent for so long will never.
const KVM_PATIENCE: Duration = Duration::from_secs(30);
const PORT_ATTEMPTS: u32 = 8;
/// UDP ports in the guest.
const GUEST_QUIC: u16 = 41640;
const GUEST_WIREGUARD: u16 = 41641;
const CONSOLE_LINES: usize = 12;

/// What a VM does now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VmView {
    pub(crate) state: VmState,
    /// Why, where that is not plain; in state failed always.
    pub(crate) problem: Option<ApiProblem>,
    pub(crate) since: Timestamp,
    pub(crate) restarts: u32,
    pub(crate) pid: Option<u32>,
    pub(crate) accelerator: Option<AccelKind>,
    /// Why its guest reaches this computer's loopback, if it does.
    pub(crate) exposure: Option<Exposure>,
}

impl VmView {
    /// Where no QEMU runs.
    pub(crate) fn without_vm(state: VmState) -> Self {
        Self { state, problem: None, since: now(), restarts: 0, pid: None, accelerator: None, exposure: None }
    }
}

/// What keepers share.
#[derive(Debug, Clone)]
pub(crate) struct KeeperConfig {
    pub(crate) images: ImageStore,
    pub(crate) cache: PathBuf,
    pub(crate) qemu: Qemu,
    /// Whether VMs go on when the manager stops.
    pub(crate) keep_vms: bool,
}

pub(crate) enum Command {
    /// The VM shall run, or not; on disk once answered.
    Want { run: bool, reply: oneshot::Sender<Result<(), ApiProblem>> },
    /// Ends the VM without asking it, and the keeper; answered when both are over.
    Destroy { reply: oneshot::Sender<()> },
}

/// The way to a keeper.
pub(crate) struct Keeper {
    commands: mpsc::Sender<Command>,
    view: watch::Receiver<VmView>,
    vm: watch::Receiver<Option<Vm>>,
    out: Outlets,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Keeper {
    /// Starts the keeper of a clan. It finds a running VM, or starts one if one is wanted.
    pub(crate) fn spawn(record: Arc<RecordCell>, config: KeeperConfig, cancel: CancellationToken) -> Self {
        let (sender, commands) = mpsc::channel(16);
        let view = VmView::without_vm(VmState::Stopped);
        let (publish, view) = watch::channel(view);
        let (vm_publish, vm) = watch::channel(None);
        let out = Outlets::new();
        if let Flavour::Integrated { socket } = record.get().flavour {
            let owner = Integrated { record, socket, commands, publish, out: out.clone(), cancel };
            let task = tokio::spawn(owner.run());
            return Self { commands: sender, view, vm, out, task: Mutex::new(Some(task)) };
        }
        let owner = Loop {
            record,
            config,
            commands,
            publish,
            vm_publish,
            out: out.clone(),
            running: None,
            restarts: Restarts::default(),
            retry_at: None,
            cancel,
        };
        let task = tokio::spawn(owner.run());
        Self { commands: sender, view, vm, out, task: Mutex::new(Some(task)) }
    }

    /// What the VM does now.
    pub(crate) fn view(&self) -> VmView {
        self.view.borrow().clone()
    }

    /// Wakes when what the VM does changes.
    pub(crate) fn watch(&self) -> watch::Receiver<VmView> {
        self.view.clone()
    }

    /// The VM, while one runs.
    pub(crate) fn vm(&self) -> Option<Vm> {
        self.vm.borrow().clone()
    }

    /// The channel to the agent; wakes when it comes or goes.
    pub(crate) fn watch_agent(&self) -> watch::Receiver<Option<Channel>> {
        self.out.agent.subscribe()
    }

    /// The channel to the controller, if it answers now.
    pub(crate) fn control(&self) -> Option<Channel> {
        self.out.control.borrow().clone()
    }

    /// The channel to the controller; wakes when it comes or goes.
    pub(crate) fn watch_control(&self) -> watch::Receiver<Option<Channel>> {
        self.out.control.subscribe()
    }

    /// What the controller told last.
    pub(crate) fn told(&self) -> Option<Told> {
        self.out.told.borrow().clone()
    }

    /// The latest statistics.
    pub(crate) fn with_stats<T>(&self, read: impl FnOnce(&Stats) -> T) -> T {
        read(&self.out.stats.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The VM shall run, or not. Returns once that is on disk, not once it is so.
    pub(crate) async fn want(&self, run: bool) -> Result<(), ApiProblem> {
        let (reply, answer) = oneshot::channel();
        let stopping = || ApiProblem::new(ErrorCode::Stopping, "the manager is stopping");
        self.commands.send(Command::Want { run, reply }).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    }

    /// Ends the VM without asking it, and the keeper. Returns when both are over.
    pub(crate) async fn destroy(&self) {
        let (reply, answer) = oneshot::channel();
        if self.commands.send(Command::Destroy { reply }).await.is_ok() {
            let _ = answer.await;
        }
        self.join().await;
    }

    /// Waits for the keeper's end, after its token was cancelled.
    pub(crate) async fn join(&self) {
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task
            && let Err(error) = task.await
        {
            tracing::error!(%error, "a VM's keeper broke off");
        }
    }
}

/// How often a VM died of late.
#[derive(Debug, Default)]
struct Restarts {
    count: u32,
}

impl Restarts {
    /// A VM died after `uptime`: when to start it again, unless it is to be given up.
    fn after(&mut self, uptime: Duration) -> Option<Duration> {
        if uptime >= STABLE {
            self.count = 0;
        }
        self.count += 1;
        (self.count <= MAX_RESTARTS).then(|| Duration::from_secs(1 << (self.count - 1)))
    }
}

struct Running {
    vm: Vm,
    since: Instant,
    accelerator: Option<AccelKind>,
    links: CancellationToken,
    tracker: TaskTracker,
    stopping: bool,
}

struct Loop {
    record: Arc<RecordCell>,
    config: KeeperConfig,
    commands: mpsc::Receiver<Command>,
    publish: watch::Sender<VmView>,
    vm_publish: watch::Sender<Option<Vm>>,
    out: Outlets,
    running: Option<Running>,
    restarts: Restarts,
    retry_at: Option<Instant>,
    cancel: CancellationToken,
}

enum Event {
    Cancelled,
    Command(Option<Command>),
    Exit(Exit),
    Control,
    Tick,
}

impl Loop {
    async fn run(mut self) {
        match Vm::adopt(&self.record.paths().vm()).await {
            Ok(Some(vm)) => {
                tracing::info!(pid = vm.pid(), "found the VM running");
                self.attach(vm, None);
                if !self.record.get().wanted {
                    self.begin_stop(POWER_OFF);
                }
            }
            Ok(None) => {}
            // Starting it is refused too while somebody holds its lock, so nothing is doubled.
            Err(error) => tracing::warn!(%error, "cannot tell whether the VM runs"),
        }
        if self.running.is_none() && self.record.get().wanted {
            self.retry_at = Some(Instant::now());
        }
        let mut control = self.out.control.subscribe();
        loop {
            match self.next(&mut control).await {
                Event::Cancelled => break,
                Event::Command(None) => break,
                Event::Command(Some(Command::Want { run, reply })) => {
                    let outcome = self.record.update(|r| r.wanted = run).map_err(|e| problem::disk(&e));
                    if outcome.is_ok() {
                        self.wish(run);
                    }
                    let _ = reply.send(outcome);
                }
                Event::Command(Some(Command::Destroy { reply })) => {
                    if let Some(running) = self.running.take() {
                        running.vm.quit(Duration::from_secs(2)).await;
                        self.unlink(running).await;
                    }
                    self.show(VmState::Stopped, None);
                    let _ = reply.send(());
                    return;
                }
                Event::Exit(exit) => self.ended(exit).await,
                Event::Control => self.control_changed(control.borrow_and_update().is_some()),
                Event::Tick => self.tick().await,
            }
        }
        self.shut_down().await;
    }

    async fn next(&mut self, control: &mut watch::Receiver<Option<Channel>>) -> Event {
        let vm = self.running.as_ref().map(|r| r.vm.clone());
        let at = self.deadline();
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Event::Cancelled,
            exit = async { match &vm { Some(vm) => vm.wait_exit().await, None => std::future::pending().await } } => Event::Exit(exit),
            command = self.commands.recv() => Event::Command(command),
            Ok(()) = control.changed() => Event::Control,
            () = async { match at { Some(at) => sleep_until(at.into()).await, None => std::future::pending().await } } => Event::Tick,
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let doubt = self.running.as_ref().filter(|r| self.doubtful(r)).map(|r| r.since + KVM_PATIENCE);
        [self.retry_at, doubt].into_iter().flatten().min()
    }

    fn doubtful(&self, running: &Running) -> bool {
        running.accelerator == Some(AccelKind::Kvm)
            && !running.stopping
            && self.out.agent.borrow().is_none()
            && self.publish.borrow().state == VmState::Starting
    }

    async fn tick(&mut self) {
        if let Some(running) = self.running.as_ref().filter(|r| self.doubtful(r) && r.since.elapsed() >= KVM_PATIENCE) {
            let vm = running.vm.clone();
            probe::distrust(
                &self.config.cache,
                "A guest did not come up with hardware acceleration, so it is emulated.",
            )
            .await;
            tracing::warn!("the VM did not come up under KVM: it will be emulated until the next boot");
            vm.quit(QUIT).await;
        }
        if self.retry_at.is_some_and(|at| at <= Instant::now()) {
            self.retry_at = None;
            if self.running.is_none() && self.record.get().wanted {
                self.start().await;
            }
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
                self.begin_stop(POWER_OFF);
            } else {
                self.show(VmState::Stopped, None);
            }
        }
    }

    async fn start(&mut self) {
        self.show(VmState::Starting, None);
        for _ in 0..PORT_ATTEMPTS {
            match self.try_start().await {
                Ok(()) => return,
                Err(StartError::Vm(VmError::PortBusy { addr })) => {
                    tracing::info!(port = addr.port(), "another program uses the VM's port: choosing others");
                    match free_ports() {
                        Ok(ports) => {
                            if let Err(error) = self.record.update(|r| r.ports = ports) {
                                return self.fail(problem::disk(&error));
                            }
                        }
                        Err(error) => {
                            return self.fail(
                                ApiProblem::new(ErrorCode::PortBusy, "no free UDP port was found")
                                    .why(error.to_string()),
                            );
                        }
                    }
                }
                Err(StartError::Vm(VmError::AlreadyRunning { .. })) => {
                    return match Vm::adopt(&self.record.paths().vm()).await {
                        Ok(Some(vm)) => self.attach(vm, None),
                        Ok(None) => self.died(
                            ApiProblem::new(ErrorCode::VmFailed, "the VM's directory is in use, but no VM answers"),
                            Duration::ZERO,
                        ),
                        Err(error) => self.died(problem::vm(&error), Duration::ZERO),
                    };
                }
                Err(StartError::Vm(error @ (VmError::DiedAtStart { .. } | VmError::SilentAtStart { .. }))) => {
                    return self.died(problem::vm(&error), Duration::ZERO);
                }
                // Nothing would be gained by trying again.
                Err(error) => return self.fail(error.problem()),
            }
        }
        self.fail(ApiProblem::new(ErrorCode::PortBusy, "no free UDP port was found for the VM"));
    }

    async fn try_start(&mut self) -> Result<(), StartError> {
        let record = self.record.get();
        let image = record.image.ok_or(StartError::NoImage)?;
        let stored = self.config.images.get(&image).ok_or(StartError::ImageGone)?;
        let accelerator = probe::accelerator(&self.config.cache).await;
        let any = |port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        let spec = VmSpec {
            dir: self.record.paths().vm(),
            name: record.name.to_string(),
            image: ImageFiles {
                kernel: stored.path(FileRole::Kernel),
                initramfs: stored.path(FileRole::Initramfs),
                root: stored.path(FileRole::Root),
                layer: stored.path(FileRole::Layer),
                boot: stored.boot_disk(),
            },
            data_disk: self.record.paths().data_disk(),
            memory: record.memory,
            cpus: record.cpus,
            accelerator: accelerator.kind,
            forwards: vec![
                UdpForward { host: any(record.ports.quic), guest_port: GUEST_QUIC },
                UdpForward { host: any(record.ports.wireguard), guest_port: GUEST_WIREGUARD },
            ],
            qemu: self.config.qemu.clone(),
        };
        let vm = Vm::start(spec).await.map_err(StartError::Vm)?;
        tracing::info!(clan = %record.name, pid = vm.pid(), accelerator = ?accelerator.kind, "started the VM");
        self.attach(vm, Some(accelerator.kind));
        Ok(())
    }

    fn attach(&mut self, vm: Vm, accelerator: Option<AccelKind>) {
        let (links, tracker) = (CancellationToken::new(), TaskTracker::new());
        tracker.spawn(link::keep_agent(vm.clone(), self.out.clone(), links.clone()));
        tracker.spawn(link::keep_control(
            vm.clone(),
            self.record.clone(),
            self.config.images.clone(),
            self.out.clone(),
            links.clone(),
        ));
        self.vm_publish.send_replace(Some(vm.clone()));
        self.running = Some(Running { vm, since: Instant::now(), accelerator, links, tracker, stopping: false });
        self.show(VmState::Starting, None);
    }

    async fn unlink(&mut self, running: Running) {
        running.links.cancel();
        running.tracker.close();
        running.tracker.wait().await;
        self.vm_publish.send_replace(None);
    }

    fn control_changed(&mut self, up: bool) {
        if self.running.as_ref().is_none_or(|r| r.stopping) {
            return;
        }
        if up {
            self.show(VmState::Running, None);
        } else if self.publish.borrow().state == VmState::Running {
            self.show(
                VmState::Running,
                Some(ApiProblem::new(ErrorCode::VmNotReady, "its controller does not answer just now")),
            );
        }
    }

    fn begin_stop(&mut self, grace: Duration) {
        let Some(running) = &mut self.running else { return };
        if running.stopping {
            return;
        }
        running.stopping = true;
        // Its end is seen by the loop.
        running.tracker.spawn(power_off(running.vm.clone(), self.out.agent.subscribe(), grace));
        self.show(VmState::Stopping, None);
    }

    async fn ended(&mut self, exit: Exit) {
        let Some(running) = self.running.take() else { return };
        let (stopping, uptime) = (running.stopping, running.since.elapsed());
        let console = if stopping { None } else { running.vm.console_tail(CONSOLE_LINES).ok() };
        self.unlink(running).await;
        let wanted = self.record.get().wanted;
        if stopping || !wanted {
            self.show(VmState::Stopped, None);
            if wanted {
                self.retry_at = Some(Instant::now());
            }
            return;
        }
        let mut problem = ApiProblem::new(ErrorCode::VmFailed, format!("the VM ended: {}", describe(exit)));
        if let Some(console) = console.filter(|c| !c.trim().is_empty()) {
            problem =
                problem.why(format!("the last lines of its console: {}", guest::short(&console.replace('\n', " / "))));
        }
        self.died(problem.hint("look at its console: `clan vm logs --console`"), uptime);
    }

    /// Starts it again later, or gives it up.
    fn died(&mut self, problem: ApiProblem, uptime: Duration) {
        match self.restarts.after(uptime) {
            Some(delay) => {
                tracing::warn!(
                    problem = problem.message,
                    why = problem.why,
                    delay_s = delay.as_secs(),
                    "starting the VM again"
                );
                self.retry_at = Some(Instant::now() + delay);
                self.show(VmState::Starting, Some(problem));
            }
            None => self.fail(problem.hint("start it again: `clan vm start`")),
        }
    }

    fn fail(&mut self, problem: ApiProblem) {
        tracing::warn!(problem = problem.message, why = problem.why, "the VM is given up");
        self.show(VmState::Failed, Some(problem));
    }

    fn show(&self, state: VmState, problem: Option<ApiProblem>) {
        let (pid, accelerator) = self.running.as_ref().map_or((None, None), |r| (Some(r.vm.pid()), r.accelerator));
        let exposure = self.running.as_ref().and_then(|r| match r.vm.network() {
            Network::Apart => None,
            Network::Exposed(exposure) => Some(exposure.clone()),
        });
        let restarts = self.restarts.count;
        self.publish.send_if_modified(|view| {
            let since = if view.state == state { view.since } else { now() };
            let next = VmView { state, problem, since, restarts, pid, accelerator, exposure };
            let changed = *view != next;
            *view = next;
            changed
        });
    }

    async fn shut_down(mut self) {
        let Some(running) = self.running.take() else { return };
        if !self.config.keep_vms {
            // The wish stays on disk: the next manager starts it again.
            self.show(VmState::Stopping, None);
            power_off(running.vm.clone(), self.out.agent.subscribe(), POWER_OFF_QUICKLY).await;
        }
        self.unlink(running).await;
    }
}

enum StartError {
    Vm(VmError),
    NoImage,
    ImageGone,
}

impl StartError {
    fn problem(&self) -> ApiProblem {
        match self {
            Self::Vm(error) => problem::vm(error),
            Self::NoImage => ApiProblem::new(ErrorCode::Conflict, "the VM has no image yet"),
            Self::ImageGone => {
                ApiProblem::new(ErrorCode::DamagedFile, "the VM's image is not on this computer any more")
            }
        }
    }
}

/// Stops a VM: the guest's services first, then the guest, then QEMU.
async fn power_off(vm: Vm, mut agent: watch::Receiver<Option<Channel>>, grace: Duration) {
    // One that has just started is given the time to listen.
    let connected = timeout(Duration::from_secs(10), agent.wait_for(Option::is_some))
        .await
        .ok()
        .and_then(Result::ok)
        .and_then(|c| c.clone());
    if let Some(channel) = connected {
        for (request, patience) in [(AgentRequest::PowerOff, grace), (AgentRequest::PowerOffNow, QUIT)] {
            if let Err(error) = guest::ask_agent(&channel, &request, Duration::from_secs(5)).await {
                tracing::debug!(%error, "the agent did not confirm the power-off");
            }
            if timeout(patience, vm.wait_exit()).await.is_ok() {
                return;
            }
        }
    }
    tracing::warn!(pid = vm.pid(), "the guest does not power off: QEMU is told to quit");
    vm.quit(QUIT).await;
}

fn describe(exit: Exit) -> String {
    match exit.reason {
        ExitReason::PoweredOff => "the guest powered itself off".into(),
        ExitReason::Reset => "the guest reset itself".into(),
        ExitReason::Panicked => "the guest's kernel panicked".into(),
        ExitReason::Quit => "QEMU was told to quit".into(),
        ExitReason::Signalled(signal) => format!("signal {signal} killed QEMU"),
        ExitReason::Failed(status) => format!("QEMU failed with status {status}"),
        ExitReason::NetworkLost => "its network ended, as pasta, which connects it, was killed or failed".into(),
        ExitReason::Unknown => "it ended while nobody watched".into(),
    }
}

/// Two UDP ports that nobody uses now.
pub(crate) fn free_ports() -> std::io::Result<Ports> {
    let (quic, wireguard) =
        (UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?, UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?);
    Ok(Ports { quic: quic.local_addr()?.port(), wireguard: wireguard.local_addr()?.port() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_that_keeps_dying_is_given_up_after_growing_delays() {
        let mut restarts = Restarts::default();
        let delays: Vec<_> =
            (0..MAX_RESTARTS).map(|_| restarts.after(Duration::from_secs(3)).unwrap().as_secs()).collect();
        assert_eq!(delays, [1, 2, 4, 8, 16]);
        assert_eq!(restarts.after(Duration::from_secs(3)), None);
    }

    #[test]
    fn a_vm_that_ran_well_starts_with_a_clean_slate() {
        let mut restarts = Restarts::default();
        for _ in 0..20 {
            assert_eq!(restarts.after(STABLE), Some(Duration::from_secs(1)));
        }
    }

    #[test]
    fn chosen_ports_differ() {
        let ports = free_ports().unwrap();
        assert_ne!(ports.quic, ports.wireguard);
        assert!(ports.quic > 0 && ports.wireguard > 0);
    }
}
