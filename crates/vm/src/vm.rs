//! A virtual machine: start, adopt, watch, end.

use std::{
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    path::Path,
    process::{Child, ExitStatus},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use clan_types::ByteSize;
use rustix::process::Signal;
use tokio::{io::unix::AsyncFd, net::UnixStream, sync::watch, task::JoinHandle, time};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::Instrument;

use crate::{
    Begin, Console, HostStats, Network, Qmp, VmError, VmSpec,
    args::{self, Inherited},
    console, disk,
    fence::Fence,
    host,
    kernel::Lent,
    limits::{self, Bounds, Group, Most, Unlimited},
    network::{Feeder, Found, Namespace},
    preflight::{self, Emulator},
    process::{self, Confined, Dir, Identity, QEMU_LOG},
    qmp, saved, sealed,
};

/// From the start of QEMU to its monitor's greeting: takes 0.1 s on an idle computer.
const START_LIMIT: Duration = Duration::from_secs(20);
/// For the monitor of a machine that already runs.
const ADOPT_LIMIT: Duration = Duration::from_secs(1);
const TRIM_EVERY: Duration = Duration::from_secs(10);
/// After the process has ended, for reading what it said last.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);
/// pasta ends with its QEMU, and may be seen to end first.
const SAME_END: Duration = Duration::from_millis(200);
/// For a QEMU without a network to write out what it has.
const CUT_GRACE: Duration = Duration::from_secs(2);
const LOG_LINES: usize = 6;

/// Why a virtual machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest powered itself off.
    PoweredOff,
    /// The guest reset itself, which a kernel panic does, too.
    Reset,
    /// The guest reported a panic.
    Panicked,
    /// QEMU was told to quit: through its monitor, or by a signal that asks.
    Quit,
    /// A signal killed QEMU.
    Signalled(i32),
    /// QEMU failed, with this exit status.
    Failed(i32),
    /// pasta, which connects its network, ended; so QEMU was ended.
    NetworkLost,
    /// It ended while nobody watched.
    Unknown,
}

/// How a virtual machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Why.
    pub reason: ExitReason,
}

/// A running virtual machine, or one that has ended. Clones are the same one. Dropping them all closes the monitor, but
/// does not end the machine: [`Vm::adopt`] finds it again.
#[derive(Debug, Clone)]
pub struct Vm(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: Dir,
    identity: Identity,
    handle: OwnedFd,
    network: Network,
    unlimited: Option<Unlimited>,
    qmp: Qmp,
    exit: watch::Receiver<Option<Exit>>,
    killed: Arc<AtomicBool>,
    _released: DropGuard,
}

impl Vm {
    /// Starts a virtual machine, detached: it survives this program. Returns once QEMU's monitor answers; the guest has
    /// then just begun to boot.
    ///
    /// # Errors
    /// [`VmError::AlreadyRunning`] if one runs in this directory; [`VmError::PortBusy`], [`VmError::TooLarge`],
    /// [`VmError::Locked`], [`VmError::MissingQemu`] and [`VmError::MissingFile`] for what the user can remedy.
    /// Nothing runs after an error.
    pub async fn start(spec: VmSpec) -> Result<Self, VmError> {
        let dir = Dir::make(&spec.dir)?;
        let Some(lock) = dir.lock().await? else {
            return Err(VmError::AlreadyRunning { pid: dir.holder().await.map(|identity| identity.pid) });
        };
        preflight::check(&spec)?;
        let qemu = preflight::executable(&spec.qemu)?;
        let group = Group::make(&dir.join("."), Most::of_vm(spec.memory));
        let (emulator, namespace, kernel) = tokio::join!(
            preflight::emulator(&qemu),
            Namespace::make(&dir, &spec.forwards, group.as_ref().ok()),
            Lent::to(&spec, &dir)
        );
        let (namespace, network) = match namespace {
            Ok(namespace) => (Some(namespace), Network::Apart),
            Err(exposure) => {
                // Which may be why.
                if let Err(error) = preflight::ports(&spec) {
                    if let Ok(group) = group {
                        group.remove().await;
                    }
                    return Err(error);
                }
                (None, Network::Exposed(exposure))
            }
        };
        let state = saved::open(&spec.begin);
        let key = spec.passphrase.as_ref().map(sealed::hand_over).transpose();
        let key = key.map_err(|source| VmError::Process { doing: "hand the passphrase to", source });
        let started = emulator.and_then(|emulator| Ok((emulator, state?, key?))).and_then(|(emulator, state, key)| {
            let (namespace, group) = (namespace.as_ref(), group.as_ref().ok());
            let (state, key) = (state.as_ref().map(AsFd::as_fd), key.as_ref().map(AsFd::as_fd));
            launch(
                &spec,
                (&qemu, emulator),
                &dir,
                &lock,
                &Around { namespace, group, kernel: kernel.path(), state, key },
            )
        });
        let (child, handle, identity) = match started {
            Ok(started) => started,
            Err(error) => {
                if let Some(namespace) = namespace {
                    namespace.end().await;
                }
                if let Ok(group) = group {
                    group.remove().await;
                }
                return Err(error);
            }
        };
        drop(lock);
        let pid = identity.pid;
        let feed = match namespace {
            Some(namespace) => Feed::By(namespace.into_feeder()),
            None => Feed::Itself,
        };
        let apart = network == Network::Apart;
        let group = Group::taken(group, pid).await;
        let vm = Self::watch(dir, identity, handle, Some(child), (network, feed), group)?;
        tracing::debug!(name = spec.name, pid, accelerator = ?spec.accelerator, apart, "started QEMU");

        tokio::select! {
            biased;
            _ = vm.wait_exit() => Err(preflight::diagnose(&spec, apart, vm.qemu_log())),
            begun = async {
                vm.0.qmp.ready().await;
                match spec.begin {
                    Begin::Boot | Begin::BootToSave => {
                        // Answered by the main loop.
                        vm.0.qmp.execute("query-status", serde_json::Value::Null).await?;
                        kernel.take_back();
                        Ok(())
                    }
                    Begin::Saved(_) => saved::go_on(&vm.0.qmp).await,
                }
            } => match begun {
                Ok(()) => Ok(vm),
                Err(error) => {
                    vm.kill()?;
                    vm.wait_exit().await;
                    Err(error)
                }
            },
            () = time::sleep(START_LIMIT) => {
                vm.kill()?;
                vm.wait_exit().await;
                Err(VmError::SilentAtStart { limit: START_LIMIT, log: vm.qemu_log() })
            }
        }
    }

    /// Finds the virtual machine that already runs in a directory, if one does; also one that another program started.
    /// Waits a second for its monitor; one that hangs is adopted, too.
    pub async fn adopt(dir: &Path) -> Result<Option<Self>, VmError> {
        if !dir.is_dir() {
            return Ok(None);
        }
        let dir = Dir::open(dir)?;
        if let Some(lock) = dir.lock().await? {
            // It may have been killed while nobody watched.
            dir.tidy(&lock);
            limits::tidy(&dir.join(".")).await;
            return Ok(None);
        }
        let Some(identity) = dir.holder().await else {
            return Ok(None);
        };
        let Some(handle) = identity.handle()? else {
            return Ok(None);
        };
        dir.record(&identity)?;
        tracing::debug!(pid = identity.pid, "adopted QEMU");
        let (network, feed) = match Feeder::of(identity.pid) {
            Found::Exposed(exposure) => (Network::Exposed(exposure), Feed::Itself),
            Found::Fed(feeder) => (Network::Apart, Feed::By(feeder)),
            Found::Cut => (Network::Apart, Feed::Cut),
        };
        let group = Group::found(&dir.join("."), identity.pid);
        let vm = Self::watch(dir, identity, handle, None, (network, feed), group)?;
        // From then on it will tell why it ends.
        tokio::select! {
            biased;
            _ = vm.wait_exit() => {}
            () = vm.0.qmp.ready() => {}
            () = time::sleep(ADOPT_LIMIT) => tracing::debug!("QEMU's monitor does not answer yet"),
        }
        Ok(Some(vm))
    }

    fn watch(
        dir: Dir,
        identity: Identity,
        handle: OwnedFd,
        child: Option<Child>,
        (network, feed): (Network, Feed),
        group: Result<Group, Unlimited>,
    ) -> Result<Self, VmError> {
        let failed = |source| VmError::Process { doing: "watch", source };
        let owned = handle.try_clone().map_err(failed)?;
        // SAFETY: an `OwnedFd` keeps its descriptor, and keeps it open, for as long as the registration owns it.
        let watched = unsafe { AsyncFd::register(owned) }.map_err(|error| failed(error.into()))?;
        let released = CancellationToken::new();
        let ended = CancellationToken::new();
        let killed = Arc::new(AtomicBool::new(false));
        let span = tracing::debug_span!("vm", pid = identity.pid);

        let sockets = Dir::open(&dir.join("."))?;
        let (qmp, client) = qmp::client(move || sockets.connect(args::QMP), ended.clone());
        let until_released = released.clone();
        let monitor = tokio::spawn(
            async move {
                tokio::select! {
                    biased;
                    () = until_released.cancelled() => {}
                    () = client => {}
                }
            }
            .instrument(span.clone()),
        );
        let (exit_sender, exit) = watch::channel(None);
        let (group, unlimited) = match group {
            Ok(group) => (Some(group), None),
            Err(why) => (None, Some(why)),
        };
        let supervisor = Supervisor {
            group,
            dir: Dir::open(&dir.join("."))?,
            process: watched,
            child,
            feed,
            ended,
            monitor,
            qmp: qmp.clone(),
            console: dir.join(args::CONSOLE_LOG),
            killed: Arc::clone(&killed),
            exit: exit_sender,
        };
        tokio::spawn(supervisor.run().instrument(span));
        Ok(Self(Arc::new(Inner {
            dir,
            identity,
            handle,
            network,
            unlimited,
            qmp,
            exit,
            killed,
            _released: released.drop_guard(),
        })))
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.0.identity.pid
    }

    /// Where its network leads.
    pub fn network(&self) -> &Network {
        &self.0.network
    }

    /// Why nothing but a lower priority bounds what it takes of the base OS, if so.
    pub fn unlimited(&self) -> Option<&Unlimited> {
        self.0.unlimited.as_ref()
    }

    /// QEMU's monitor; clone it freely. If the base OS's disk is full, QEMU halts the guest and says so in the event
    /// `BLOCK_IO_ERROR`; the command `cont` lets it try again.
    pub fn qmp(&self) -> &Qmp {
        &self.0.qmp
    }

    /// Waits until the process has ended. Any number of tasks may wait.
    pub async fn wait_exit(&self) -> Exit {
        match self.0.exit.clone().wait_for(Option::is_some).await.map(|exit| *exit) {
            Ok(Some(exit)) => exit,
            // The runtime is shutting down and has taken the supervisor away.
            Ok(None) | Err(_) => Exit { reason: ExitReason::Unknown },
        }
    }

    /// How it ended, if it has.
    pub fn exited(&self) -> Option<Exit> {
        *self.0.exit.borrow()
    }

    /// Connects to the port of the agent. QEMU serves one connection at a time: a second one stands, silent, until the
    /// first is closed. Bytes of the last connection may come first.
    pub async fn connect_agent(&self) -> Result<UnixStream, VmError> {
        self.connect(args::AGENT).await
    }

    /// Connects to the port of the controller; as [`Vm::connect_agent`].
    pub async fn connect_control(&self) -> Result<UnixStream, VmError> {
        self.connect(args::CONTROL).await
    }

    /// Connects to the serial console; as [`Vm::connect_agent`].
    pub async fn connect_console(&self) -> Result<Console, VmError> {
        Ok(Console::new(self.connect(args::CONSOLE).await?))
    }

    async fn connect(&self, socket: &str) -> Result<UnixStream, VmError> {
        self.0.dir.connect(socket).await.map_err(VmError::io("connect to", self.0.dir.join(socket)))
    }

    /// Halts the guest's processors.
    pub async fn pause(&self) -> Result<(), VmError> {
        Ok(self.0.qmp.execute("stop", serde_json::Value::Null).await.map(drop)?)
    }

    /// Lets a guest go on that was paused, or saved.
    pub async fn resume(&self) -> Result<(), VmError> {
        Ok(self.0.qmp.execute("cont", serde_json::Value::Null).await.map(drop)?)
    }

    /// Whether its processors are halted by [`Vm::pause`] or [`Vm::save`].
    pub async fn is_paused(&self) -> Result<bool, VmError> {
        saved::is_paused(&self.0.qmp).await
    }

    /// Whether QEMU holds the guest, as the base OS's disk is full. [`Vm::resume`] lets it try again.
    pub async fn lacks_room(&self) -> Result<bool, VmError> {
        saved::lacks_room(&self.0.qmp).await
    }

    /// Grows the data disk; the guest sees it at once, and its file system does not by itself.
    pub async fn grow_data_disk(&self, size: ByteSize) -> Result<(), VmError> {
        // A whole number of sectors, of any size.
        let size = size.as_bytes() & !0xfff;
        let arguments = serde_json::json!({ "node-name": args::DATA_NODE, "size": size });
        Ok(self.0.qmp.execute("block_resize", arguments).await.map(drop)?)
    }

    /// Pauses the guest, and saves its state to a new file. Its data disk can be copied then, until it goes on by
    /// [`Vm::resume`], which it also has to if this failed.
    pub async fn save(&self, to: &Path) -> Result<(), VmError> {
        self.pause().await?;
        saved::save(&self.0.qmp, &self.0.dir, to).await
    }

    /// Ends QEMU without asking the guest: through the monitor, and by SIGKILL after `grace`. To the guest it is a power
    /// cut; have it power itself off where possible.
    pub async fn quit(&self, grace: Duration) -> Exit {
        let asked = async {
            // Whether or not QEMU answers, what counts is whether it ends.
            let _ = self.0.qmp.execute_within("quit", serde_json::Value::Null, grace).await;
            self.wait_exit().await
        };
        if let Ok(exit) = time::timeout(grace, asked).await {
            return exit;
        }
        if let Err(error) = self.kill() {
            tracing::warn!(pid = self.pid(), %error, "cannot kill QEMU");
        }
        self.wait_exit().await
    }

    /// Kills QEMU (SIGKILL); no error if it has ended already. Follow with [`Vm::wait_exit`].
    pub fn kill(&self) -> Result<(), VmError> {
        self.0.killed.store(true, Ordering::Relaxed);
        match rustix::process::pidfd_send_signal(&self.0.handle, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(VmError::Process { doing: "kill", source: error.into() }),
        }
    }

    /// What it costs the base OS. An error once it has ended.
    pub fn host_stats(&self) -> Result<HostStats, VmError> {
        let failed = |source| VmError::Process { doing: "measure", source };
        if self.exited().is_some() {
            return Err(failed(std::io::ErrorKind::NotFound.into()));
        }
        host::stats(self.pid()).map_err(failed)
    }

    /// The last lines of the serial console since the start, without control characters.
    pub fn console_tail(&self, lines: usize) -> Result<String, VmError> {
        let log = self.0.dir.join(args::CONSOLE_LOG);
        console::tail(&log, lines).map_err(VmError::io("read", log))
    }

    fn qemu_log(&self) -> String {
        console::tail(&self.0.dir.join(QEMU_LOG), LOG_LINES).unwrap_or_default()
    }
}

/// What QEMU is put into, and given.
struct Around<'a> {
    namespace: Option<&'a Namespace>,
    group: Option<&'a Group>,
    kernel: &'a Path,
    state: Option<BorrowedFd<'a>>,
    key: Option<BorrowedFd<'a>>,
}

/// Starts the process, and writes down which one it is. Nothing runs after an error.
fn launch(
    spec: &VmSpec,
    (qemu, emulator): (&Path, Emulator),
    dir: &Dir,
    lock: &process::Lock,
    around: &Around<'_>,
) -> Result<(Child, OwnedFd, Identity), VmError> {
    let Around { namespace, group, kernel, state, key } = *around;
    let failed = |source| VmError::Process { doing: "watch", source };
    let direct = disk::supports_direct(&spec.data_disk);
    let apart = namespace.is_some();
    let [state_fd, key_fd] = [state, key].map(|fd| fd.map(|fd| fd.as_raw_fd()));
    let inherited = Inherited { state: state_fd, key: key_fd };
    let arguments = args::arguments(spec, emulator, kernel, direct, apart, inherited)?;
    let entrance = namespace.map(Namespace::entrance).transpose().map_err(failed)?;
    let fence = Fence::around(&dir.join("."), spec, qemu).map_err(VmError::io("confine", qemu))?;
    let bounds = Bounds::of_vm(group, spec.memory).map_err(VmError::io("confine", qemu))?;
    let child = process::spawn(qemu, arguments, dir, lock, Confined { entrance, bounds, fence }, [state, key])?;
    dir.take_in(child)
}

/// What connects QEMU's network.
#[derive(Debug)]
enum Feed {
    /// Nothing: it is the base OS's.
    Itself,
    /// pasta.
    By(Feeder),
    /// pasta, which has ended.
    Cut,
}

impl Feed {
    /// Returns when the network is lost.
    async fn cut(&self) {
        match self {
            Self::Itself => std::future::pending().await,
            Self::By(feeder) => feeder.ended().await,
            Self::Cut => {}
        }
    }
}

/// Waits for the end of the process, reaps it, and tells.
struct Supervisor {
    group: Option<Group>,
    dir: Dir,
    process: AsyncFd<OwnedFd>,
    /// Unless adopted.
    child: Option<Child>,
    feed: Feed,
    ended: CancellationToken,
    monitor: JoinHandle<()>,
    qmp: Qmp,
    console: std::path::PathBuf,
    killed: Arc<AtomicBool>,
    exit: watch::Sender<Option<Exit>>,
}

impl Supervisor {
    async fn run(mut self) {
        let mut trim = time::interval(TRIM_EVERY);
        let mut cut = false;
        loop {
            tokio::select! {
                biased;
                ended = self.process.readable() => match ended {
                    Ok(_) => break,
                    Err(error) => {
                        tracing::error!(%error, "QEMU's process cannot be watched");
                        return;
                    }
                },
                () = self.feed.cut(), if !cut => cut = self.end_cut().await,
                _ = trim.tick() => {
                    // Not there before the guest speaks.
                    if let Err(error) = console::trim(&self.console) {
                        tracing::trace!(%error, "the console's log is not trimmed");
                    }
                }
            }
        }
        self.ended.cancel();
        if time::timeout(DRAIN_LIMIT, &mut self.monitor).await.is_err() {
            self.monitor.abort();
        }
        let status = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
        if let Feed::By(feeder) = self.feed {
            feeder.finish().await;
        }
        let reason = reason(self.qmp.shutdown_reason(), status, self.killed.load(Ordering::Relaxed), cut);
        if let Some(group) = self.group {
            group.remove().await;
        }
        if let Ok(Some(lock)) = self.dir.lock().await {
            self.dir.tidy(&lock);
        }
        tracing::debug!(?reason, "QEMU ended");
        self.exit.send_replace(Some(Exit { reason }));
    }

    /// Ends QEMU after pasta has ended, unless QEMU's end is why: says which. A guest without a network is of no use, and
    /// one that is started anew has one.
    async fn end_cut(&self) -> bool {
        if time::timeout(SAME_END, self.process.readable()).await.is_ok() {
            return false;
        }
        tracing::warn!("the VM's network is lost, as pasta has ended: ending QEMU");
        for signal in [Signal::TERM, Signal::KILL] {
            if let Err(error) = rustix::process::pidfd_send_signal(self.process.get_ref(), signal)
                && error != rustix::io::Errno::SRCH
            {
                tracing::error!(%error, "cannot end QEMU");
            }
            if time::timeout(CUT_GRACE, self.process.readable()).await.is_ok() {
                break;
            }
        }
        true
    }
}

/// QEMU's own word comes first: its exit status is 0 for most reasons, and unknown of an adopted process.
fn reason(said: Option<String>, status: Option<ExitStatus>, killed: bool, cut: bool) -> ExitReason {
    match said.as_deref() {
        Some("guest-shutdown") => return ExitReason::PoweredOff,
        Some("guest-reset" | "subsystem-reset") => return ExitReason::Reset,
        Some("guest-panic") => return ExitReason::Panicked,
        _ if cut => return ExitReason::NetworkLost,
        Some("host-qmp-quit" | "host-signal" | "host-ui") => return ExitReason::Quit,
        _ => {}
    }
    match status.map(|status| (status.signal(), status.code())) {
        Some((Some(signal), _)) => ExitReason::Signalled(signal),
        Some((None, Some(code))) if code != 0 => ExitReason::Failed(code),
        _ if killed => ExitReason::Signalled(Signal::KILL.as_raw()),
        _ => ExitReason::Unknown,
    }
}
