//! The process: its directory, its lock, its identity.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            fs::{FileTypeExt, OpenOptionsExt},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags},
    io::FdFlags,
    process::{Pid, PidfdFlags},
};
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};

use crate::{VmError, args, console, fence::Fence, file, host::Stat, limits::Bounds, network::Entrance};

const LOCK: &str = "lock";
const PID: &str = "pid.json";
/// By which `file::replace` calls what it writes before it counts.
const PID_DRAFT: &str = "pid.tmp";
const PID_VERSION: u32 = 1;
/// What runs a virtual machine, and what stands for a container.
const PROGRAMS: [&str; 2] = ["qemu", "unshare"];
pub(crate) const QEMU_LOG: &str = "qemu.log";

/// A virtual machine's directory, held open: the paths of its sockets may be longer than a socket address can be.
#[derive(Debug)]
pub(crate) struct Dir {
    path: PathBuf,
    fd: OwnedFd,
}

/// A process, such that no other one can be taken for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    version: u32,
    pub(crate) pid: u32,
    /// Clock ticks after the boot.
    start_time: u64,
    boot_id: String,
}

/// The right to run QEMU in a directory. QEMU inherits it, and so holds it for as long as it lives.
pub(crate) struct Lock(File);

impl Dir {
    /// Opens the directory, made if missing.
    pub(crate) fn make(path: &Path) -> Result<Self, VmError> {
        file::create_private_dir(path).map_err(VmError::io("create", path))?;
        Self::open(path)
    }

    pub(crate) fn open(path: &Path) -> Result<Self, VmError> {
        let fd = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| VmError::io("open", path)(error.into()))?;
        let path = std::path::absolute(path).map_err(VmError::io("resolve", path))?;
        Ok(Self { path, fd })
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Connects to one of QEMU's sockets.
    pub(crate) fn connect(&self, socket: &str) -> impl Future<Output = io::Result<UnixStream>> + use<> {
        let path = format!("/proc/self/fd/{}/{socket}", self.fd.as_raw_fd());
        // The descriptor must stay open until the connection stands.
        let fd = self.fd.try_clone();
        async move {
            let _open = fd?;
            UnixStream::connect(path).await
        }
    }

    /// Listens where QEMU, whose working directory this is, can connect to.
    pub(crate) fn listen(&self, socket: &str) -> io::Result<UnixListener> {
        file::remove(&self.join(socket))?;
        UnixListener::bind(format!("/proc/self/fd/{}/{socket}", self.fd.as_raw_fd()))
    }

    /// Takes the lock; `None` if a QEMU holds it.
    pub(crate) async fn lock(&self) -> Result<Option<Lock>, VmError> {
        let path = self.join(LOCK);
        let file = File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = file.map_err(VmError::io("open", &path))?;
        // A process that this program happens to start elsewhere holds the lock, too, until it executes its program.
        for _ in 0..5 {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Some(Lock(file))),
                Err(rustix::io::Errno::WOULDBLOCK) => tokio::time::sleep(Duration::from_millis(5)).await,
                Err(error) => return Err(VmError::io("lock", path)(error.into())),
            }
        }
        Ok(None)
    }

    /// Removes what is left here of a QEMU, or of whoever started it, that was killed: its sockets, the draft of its id, and the
    /// kernel that was lent to it. `_lock` says that none runs.
    pub(crate) fn tidy(&self, _lock: &Lock) {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        for entry in entries {
            let is_socket = entry.file_type().is_ok_and(|kind| kind.is_socket());
            let name = entry.file_name();
            if is_socket || name == args::KERNEL || name.to_string_lossy().starts_with(PID_DRAFT) {
                // It may go by itself, and the next one is in nobody's way.
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// The QEMU that holds the lock, if it can be told.
    pub(crate) async fn holder(&self) -> Option<Identity> {
        match self.recorded() {
            Some(identity) => Some(identity),
            // Whoever started it was interrupted before it could record it.
            None => self.listening().await,
        }
    }

    fn recorded(&self) -> Option<Identity> {
        let bytes = file::read_bounded(&self.join(PID), 4096).ok()?;
        let identity: Identity = serde_json::from_slice(&bytes).ok()?;
        (identity.version == PID_VERSION && identity.lives()).then_some(identity)
    }

    /// The process that listens on the monitor's socket.
    async fn listening(&self) -> Option<Identity> {
        let peer = self.connect(args::QMP).await.ok()?.peer_cred().ok()?;
        let identity = Identity::of(u32::try_from(peer.pid()?).ok()?).ok()?;
        identity.lives().then_some(identity)
    }

    /// Writes down that a process which was just started is the one of this directory. It does not run after an error.
    pub(crate) fn take_in(&self, mut child: Child) -> Result<(Child, OwnedFd, Identity), VmError> {
        let pid = child.id();
        let failed = |source| VmError::Process { doing: "watch", source };
        let watched = open_pidfd(pid).and_then(|handle| Ok((handle, Identity::of(pid)?))).map_err(failed);
        match watched.and_then(|(handle, identity)| self.record(&identity).map(|()| (handle, identity))) {
            Ok((handle, identity)) => Ok((child, handle, identity)),
            Err(error) => {
                // It may have ended by itself.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    pub(crate) fn record(&self, identity: &Identity) -> Result<(), VmError> {
        let path = self.join(PID);
        let bytes = serde_json::to_vec(identity).map_err(|error| VmError::io("write", &path)(error.into()))?;
        file::replace(&path, &bytes).map_err(VmError::io("write", path))
    }
}

impl Lock {
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Identity {
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        Ok(Self { version: PID_VERSION, pid, start_time: Stat::of(pid)?.start_time, boot_id: file::boot_id()? })
    }

    /// Whether it still is that process, and is what runs a machine.
    fn lives(&self) -> bool {
        let same = Stat::of(self.pid).is_ok_and(|s| s.start_time == self.start_time && !s.zombie);
        let program = fs::read_link(format!("/proc/{}/exe", self.pid));
        same && file::boot_id().is_ok_and(|id| id == self.boot_id)
            && program.is_ok_and(|p| {
                p.file_name().is_some_and(|name| PROGRAMS.iter().any(|known| name.to_string_lossy().contains(known)))
            })
    }

    /// A handle to the process; `None` if it has ended.
    pub(crate) fn handle(&self) -> Result<Option<OwnedFd>, VmError> {
        let handle = match open_pidfd(self.pid) {
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => return Ok(None),
            other => other.map_err(|source| VmError::Process { doing: "watch", source })?,
        };
        // Only now is it certain that the handle is not of a process that took over the number.
        Ok(self.lives().then_some(handle))
    }
}

pub(crate) fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK)?)
}

/// What a QEMU is put into and behind before it runs.
pub(crate) struct Confined {
    pub(crate) entrance: Option<Entrance>,
    pub(crate) bounds: Bounds,
    pub(crate) fence: Fence,
}

/// Starts QEMU, detached from this program: a session of its own, no way to more privileges, nothing inherited but the
/// lock, its network's lifeline, and what is in `handed`, and behind a fence. It ends only by itself or by a
/// signal.
pub(crate) fn spawn(
    qemu: &Path,
    args: Vec<std::ffi::OsString>,
    dir: &Dir,
    lock: &Lock,
    confined: Confined,
    handed: [Option<BorrowedFd<'_>>; 2],
) -> Result<Child, VmError> {
    for log in [QEMU_LOG, args::CONSOLE_LOG] {
        console::rotate(&dir.join(log)).map_err(VmError::io("rename", dir.join(log)))?;
    }
    let log_path = dir.join(QEMU_LOG);
    let log = File::options().append(true).create(true).mode(0o600).open(&log_path);
    let log = log.map_err(VmError::io("create", &log_path))?;
    let log_again = log.try_clone().map_err(VmError::io("create", &log_path))?;

    let Confined { entrance, bounds, mut fence } = confined;
    let [first, second] = handed.map(|fd| fd.map(|fd| fd.as_raw_fd()));
    let inherited = [Some(lock.0.as_fd().as_raw_fd()), first, second];
    let mut command = Command::new(qemu);
    command.args(args).current_dir(&dir.path).stdin(Stdio::null()).stdout(log).stderr(log_again);
    // The environment may hold secrets. Wrapper scripts need a path.
    command.env_clear().env("LC_ALL", "C").envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
    // SAFETY: the closure only makes system calls, which are safe between fork and exec: no allocation, no locks. What is
    // inherited stays open in the parent until `spawn` has returned.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            rustix::process::umask(Mode::from_raw_mode(0o077));
            rustix::thread::set_no_new_privs(true)?;
            for fd in inherited.into_iter().flatten() {
                rustix::io::fcntl_setfd(rustix::fd::BorrowedFd::borrow_raw(fd), FdFlags::empty())?;
            }
            bounds.enter()?;
            entrance.as_ref().map_or(Ok(()), Entrance::enter)?;
            // Last: behind it, nothing is mounted.
            fence.raise()
        });
    }
    command.spawn().map_err(VmError::io("run", qemu))
}
