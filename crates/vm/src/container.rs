//! A clan's machine as a container: the same image and the same controller as in a virtual machine, on the base OS's own
//! kernel. An ordinary user runs it.
//!
//! ```text
//! unshare ─▶ begin ═▶ pasta ─▶ enter ═▶ bwrap ─▶ bwrap, process 1 of the container ─▶ clan controller
//! user and   stacks   network  user and process, mount    reaps
//! mount      the root          network  and other
//! namespaces                   namespace, again
//! ```
//!
//! `begin` and `enter` are this executable ([`Stage`]). `═▶` is the same process. Each `─▶` dies with what is left of it: so
//! whichever of them is killed, nothing stays. `unshare` holds the lock of the directory, and stands for the container.
//!
//! The network is two namespaces ([`wire`]): pasta's, and the container's own behind it. Root in the container can send any
//! packet, and pasta would take some to the base OS's loopback; what comes to it here has been routed by a kernel that drops
//! those. The container's user namespace is below pasta's, so that its root has no say there.
//!
//! Root in the container is the base OS's user, with capabilities over its namespaces only; other users in it are from the
//! range of subordinate ids that the base OS's user has (subuid(5)). All of it is in a control group of its own, as a virtual
//! machine is ([`crate::limits`]).

mod missing;
mod seccomp;
mod shell;
mod stage;
mod tree;
mod wire;

use std::{
    fs::File,
    io,
    net::UdpSocket,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            fs::{FileTypeExt, OpenOptionsExt},
            process::{CommandExt, ExitStatusExt},
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use clan_types::ByteSize;
use rustix::{
    fs::{Mode, OFlags},
    io::FdFlags,
    process::Signal,
};
use tokio::{io::unix::AsyncFd, net::UnixStream, sync::watch, time};

use crate::{
    UdpForward, VmError, args, console, file, host,
    limits::{self, Bounds, Group, Most, Unlimited},
    process::{self, Dir, Identity, Lock},
};

pub use missing::{Missing, check};
pub use shell::Shell;
pub use stage::Stage;
pub use tree::{remove, unpack};

/// Where the controller listens, in [`RUN`] and in the container's `/run/clan`.
const SOCKET: &str = "control.sock";
/// Inside the container's directory: what it and the base OS share.
const RUN: &str = "run";
/// Inside the container's directory: where its root is put together, in its own mount namespace.
const ROOT: &str = "root";
const TRIM_EVERY: Duration = Duration::from_secs(10);
/// A container that was killed takes a moment to let go of its ports.
const PORTS_FREE: Duration = Duration::from_secs(3);
const LOG_LINES: usize = 8;

/// A container to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerSpec {
    /// Its own directory: socket, log, process id. Made if missing, mode 0700.
    pub dir: PathBuf,
    /// This executable, which runs the stages.
    pub program: PathBuf,
    /// What its root is made of, from [`unpack`]; the topmost first.
    pub layers: Vec<PathBuf>,
    /// Everything that it writes; made if missing.
    pub data: PathBuf,
    /// Files that it sees in `/run/image`, by their names there.
    pub shown: Vec<(String, PathBuf)>,
    /// UDP ports to forward into it.
    pub forwards: Vec<UdpForward>,
    /// The most that what is in it takes, where that can be bounded.
    pub memory: ByteSize,
    /// As many processors as it takes at most, likewise.
    pub cpus: u8,
}

/// How a container ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerExit {
    /// Its controller ended, with this status.
    Ended(i32),
    /// A signal killed it.
    Signalled(i32),
    /// It ended while nobody watched.
    Unknown,
}

/// A running container, or one that has ended. Clones are the same one. Dropping them all does not end it:
/// [`Container::adopt`] finds it again.
#[derive(Debug, Clone)]
pub struct Container(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: Dir,
    identity: Identity,
    handle: OwnedFd,
    unlimited: Option<Unlimited>,
    exit: watch::Receiver<Option<ContainerExit>>,
}

impl Container {
    /// Starts a container, detached: it survives this program. Its controller listens a moment later.
    ///
    /// # Errors
    /// [`VmError::AlreadyRunning`] if one runs in this directory; [`VmError::PortBusy`] and [`VmError::Missing`] for what
    /// the user can remedy. Nothing runs after an error.
    pub async fn start(spec: ContainerSpec) -> Result<Self, VmError> {
        let tools = missing::tools().map_err(VmError::Missing)?;
        let dir = Dir::make(&spec.dir)?;
        let Some(lock) = dir.lock().await? else {
            return Err(VmError::AlreadyRunning { pid: dir.holder().await.map(|identity| identity.pid) });
        };
        ports_free(&spec.forwards).await?;
        for folder in [dir.join(RUN), dir.join(ROOT), spec.data.clone()] {
            file::create_private_dir(&folder).map_err(VmError::io("create", folder))?;
        }
        let plan = stage::Plan::new(&spec, &tools)?;
        let log = dir.join(args::CONSOLE_LOG);
        console::rotate(&log).map_err(VmError::io("rename", &log))?;
        let output = File::options().append(true).create(true).mode(0o600).open(&log);
        let output = output.map_err(VmError::io("create", &log))?;
        let again = output.try_clone().map_err(VmError::io("create", &log))?;

        let mut command = Command::new(&tools.unshare);
        command.args(tree::USER_NAMESPACE).args(["--mount", "--propagation", "private", "--fork", "--kill-child"]);
        command.arg("--").arg(&spec.program).args(stage::words(stage::BEGIN)).arg(plan.encode()?);
        command.current_dir(dir.join(".")).stdin(Stdio::null()).stdout(output).stderr(again);
        command.env_clear().envs(tree::environment());
        let group = Group::make(&dir.join("."), Most::of_container(spec.memory, spec.cpus));
        match launch(command, group.as_ref().ok(), &lock, &dir) {
            Ok((child, handle, identity)) => {
                drop(lock);
                let group = Group::taken(group, identity.pid).await;
                Self::watch(dir, identity, handle, Some(child), group)
            }
            Err(error) => {
                if let Ok(group) = group {
                    group.remove().await;
                }
                Err(error)
            }
        }
    }

    /// Finds the container that already runs in a directory, if one does; also one that another program started.
    pub async fn adopt(dir: &Path) -> Result<Option<Self>, VmError> {
        if !dir.is_dir() {
            return Ok(None);
        }
        let dir = Dir::open(dir)?;
        if dir.lock().await?.is_some() {
            // It may have been killed while nobody watched.
            limits::tidy(&dir.join(".")).await;
            return Ok(None);
        }
        let Some(identity) = dir.holder().await else { return Ok(None) };
        let Some(handle) = identity.handle()? else { return Ok(None) };
        let group = Group::found(&dir.join("."), identity.pid);
        Self::watch(dir, identity, handle, None, group).map(Some)
    }

    fn watch(
        dir: Dir,
        identity: Identity,
        handle: OwnedFd,
        child: Option<Child>,
        group: Result<Group, Unlimited>,
    ) -> Result<Self, VmError> {
        let failed = |source| VmError::Process { doing: "watch", source };
        let owned = handle.try_clone().map_err(failed)?;
        // SAFETY: an `OwnedFd` keeps its descriptor, and keeps it open, for as long as the registration owns it.
        let watched = unsafe { AsyncFd::register(owned) }.map_err(|error| failed(error.into()))?;
        let (sender, exit) = watch::channel(None);
        let (group, unlimited) = match group {
            Ok(group) => (Some(group), None),
            Err(why) => (None, Some(why)),
        };
        tokio::spawn(supervise(watched, (child, group), dir.join(args::CONSOLE_LOG), sender));
        Ok(Self(Arc::new(Inner { dir, identity, handle, unlimited, exit })))
    }

    /// The process that stands for it.
    pub fn pid(&self) -> u32 {
        self.0.identity.pid
    }

    /// Why nothing but a lower priority bounds what it takes of the base OS, if so.
    pub fn unlimited(&self) -> Option<&Unlimited> {
        self.0.unlimited.as_ref()
    }

    /// Waits until it has ended. Any number of tasks may wait.
    pub async fn wait_exit(&self) -> ContainerExit {
        match self.0.exit.clone().wait_for(Option::is_some).await.map(|exit| *exit) {
            Ok(Some(exit)) => exit,
            // The runtime is shutting down and has taken the supervisor away.
            Ok(None) | Err(_) => ContainerExit::Unknown,
        }
    }

    /// Connects to its controller.
    pub async fn connect_control(&self) -> Result<UnixStream, VmError> {
        connect(&self.0.dir.join(RUN).join(SOCKET)).await
    }

    /// Kills it, and waits until everything in it has ended; false if something has not within `limit`.
    pub async fn kill(&self, limit: Duration) -> Result<bool, VmError> {
        let failed = |source| VmError::Process { doing: "kill", source };
        // Each dies with what started it, a moment later.
        let parts: Vec<OwnedFd> =
            host::descendants(self.pid()).into_iter().filter_map(|pid| process::open_pidfd(pid).ok()).collect();
        match rustix::process::pidfd_send_signal(&self.0.handle, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(failed(error.into())),
        }
        let over = async {
            self.wait_exit().await;
            for part in parts {
                // SAFETY: an `OwnedFd` keeps its descriptor, and keeps it open, while the registration owns it.
                let part = unsafe { AsyncFd::register(part) }?;
                part.readable().await?.retain_ready();
            }
            Ok::<(), io::Error>(())
        };
        match time::timeout(limit, over).await {
            Ok(done) => done.map(|()| true).map_err(failed),
            Err(_) => Ok(false),
        }
    }

    /// The last lines of its log since the start, without control characters.
    pub fn console_tail(&self) -> String {
        console::tail(&self.0.dir.join(args::CONSOLE_LOG), LOG_LINES).unwrap_or_default()
    }

    /// Opens a shell in it.
    pub fn shell(&self, program: &Path) -> Result<Shell, VmError> {
        Shell::open(self.pid(), program)
    }
}

/// Starts the process that stands for a container, and writes down which one it is. Nothing runs after an error.
fn launch(
    mut command: Command,
    group: Option<&Group>,
    lock: &Lock,
    dir: &Dir,
) -> Result<(Child, OwnedFd, Identity), VmError> {
    let bounds = Bounds::within(group).map_err(VmError::io("confine", command.get_program()))?;
    let lock_fd = lock.as_fd().as_raw_fd();
    // SAFETY: the closure only makes system calls, which are safe between fork and exec. The lock stays open in the
    // parent until `spawn` has returned. Privileges can be gained up to here: newuidmap(1) needs to.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            rustix::io::fcntl_setfd(BorrowedFd::borrow_raw(lock_fd), FdFlags::empty())?;
            bounds.enter()
        });
    }
    let child = command.spawn().map_err(VmError::io("run", command.get_program()))?;
    dir.take_in(child)
}

/// Connects to a socket in a folder that a container shares.
///
/// INVARIANT: whatever the container puts in its place, no other file is opened: the last step of the way is not followed if
/// it is a link, and the folder has nothing else of the base OS in it.
async fn connect(path: &Path) -> Result<UnixStream, VmError> {
    let failed = || VmError::io("connect to", path);
    let socket = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
    let socket = File::from(socket.map_err(|error| failed()(error.into()))?);
    let kind = socket.metadata().map_err(failed())?.file_type();
    if !kind.is_socket() {
        return Err(failed()(io::Error::other("it is no socket")));
    }
    // The path may be longer than a socket address can be.
    UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await.map_err(failed())
}

async fn supervise(
    process: AsyncFd<OwnedFd>,
    (mut child, group): (Option<Child>, Option<Group>),
    log: PathBuf,
    exit: watch::Sender<Option<ContainerExit>>,
) {
    let mut trim = time::interval(TRIM_EVERY);
    loop {
        tokio::select! {
            biased;
            ended = process.readable() => match ended {
                Ok(_) => break,
                Err(error) => {
                    tracing::error!(%error, "the container's process cannot be watched");
                    return;
                }
            },
            _ = trim.tick() => {
                if let Err(error) = console::trim(&log) {
                    tracing::trace!(%error, "the container's log is not trimmed");
                }
            }
        }
    }
    let status = child.as_mut().and_then(|child| child.wait().ok());
    let how = match status.map(|status| (status.signal(), status.code())) {
        Some((Some(signal), _)) => ContainerExit::Signalled(signal),
        Some((None, Some(code))) => ContainerExit::Ended(code),
        _ => ContainerExit::Unknown,
    };
    if let Some(group) = group {
        group.remove().await;
    }
    exit.send_replace(Some(how));
}

/// Waits until the ports of the base OS are free: pasta does not say so if they are not.
async fn ports_free(forwards: &[UdpForward]) -> Result<(), VmError> {
    let deadline = time::Instant::now() + PORTS_FREE;
    for forward in forwards {
        while let Err(error) = UdpSocket::bind(forward.host) {
            if error.kind() != io::ErrorKind::AddrInUse || time::Instant::now() >= deadline {
                tracing::debug!(%error, addr = %forward.host, "a port of the container is not free");
                return Err(VmError::PortBusy { addr: forward.host });
            }
            time::sleep(Duration::from_millis(50)).await;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_link_in_the_place_of_the_socket_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(120));
        std::fs::create_dir(&long).unwrap();
        let listen = |name: &str| {
            let fd = File::open(&long).unwrap();
            let socket = tokio::net::UnixListener::bind(format!("/proc/self/fd/{}/{name}", fd.as_raw_fd())).unwrap();
            (socket, long.join(name))
        };
        let (_own, path) = listen(SOCKET);
        connect(&path).await.unwrap();
        let (_secret, elsewhere) = listen("secret.sock");
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        assert!(connect(&path).await.is_err());
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "no socket").unwrap();
        assert!(connect(&path).await.is_err());
    }
}
