//! A shell in a container, on a terminal of its own.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    path::Path,
    pin::Pin,
    process::{Command, Stdio},
    task::{Context, Poll, ready},
};

use rustix::{
    fs::{Mode, OFlags},
    pty::OpenptFlags,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, unix::AsyncFd},
    process::Child,
};

use super::{
    seccomp,
    stage::{self, CAPABILITIES},
};
use crate::{VmError, host};

/// More than any kernel has capabilities.
const ALL_CAPABILITIES: u32 = 64;
/// From `unshare` to the container's first process: pasta, bwrap, bwrap.
const DEPTH: usize = 3;

/// A shell: what is typed goes in, what it shows comes out. It ends when this is dropped.
#[derive(Debug)]
pub struct Shell {
    terminal: AsyncFd<OwnedFd>,
    _program: Child,
}

impl Shell {
    /// In the container of which `unshare` is this process; `program` is this executable.
    pub(super) fn open(unshare: u32, program: &Path) -> Result<Self, VmError> {
        let failed = |source| VmError::Process { doing: "open a shell in", source };
        let open = || -> io::Result<Self> {
            let first = (0..DEPTH).try_fold(unshare, |pid, _| host::child_of(pid))?;
            let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
            let terminal = rustix::pty::openpt(flags)?;
            rustix::pty::grantpt(&terminal)?;
            rustix::pty::unlockpt(&terminal)?;
            let name = rustix::pty::ptsname(&terminal, Vec::new())?;
            // It is the shell's: this program may lead a session without a terminal, whose it would become.
            let theirs = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
            let theirs = File::from(theirs);
            rustix::io::ioctl_fionbio(&terminal, true)?;
            let mut command = tokio::process::Command::new(program);
            command.args(stage::words(stage::SHELL)).arg(first.to_string());
            command.stdin(theirs.try_clone()?).stdout(theirs.try_clone()?).stderr(theirs).kill_on_drop(true);
            command.env_clear();
            // SAFETY: the closure only makes system calls, which are safe between fork and exec.
            unsafe {
                command.pre_exec(|| {
                    rustix::process::setsid()?;
                    Ok(())
                });
            }
            let child = command.spawn()?;
            // SAFETY: an `OwnedFd` keeps its descriptor, and keeps it open, for as long as the registration owns it.
            let terminal = unsafe { AsyncFd::register(terminal) }?;
            Ok(Self { terminal, _program: child })
        };
        open().map_err(failed)
    }
}

/// Joins the namespaces of the container's first process, with its capabilities and no more, and runs a shell there.
pub(super) fn enter(pid: OsString) -> io::Result<super::stage::Never> {
    let pid: u32 = pid.to_str().and_then(|pid| pid.parse().ok()).ok_or(io::ErrorKind::InvalidInput)?;
    let kinds = [
        ("user", LinkNameSpaceType::User),
        ("pid", LinkNameSpaceType::ProcessID),
        ("net", LinkNameSpaceType::Network),
        ("ipc", LinkNameSpaceType::InterProcessCommunication),
        ("uts", LinkNameSpaceType::HostNameAndNISDomainName),
        ("mnt", LinkNameSpaceType::Mount),
    ];
    let opened =
        kinds.iter().map(|(kind, link)| Ok((stage::namespace(pid, kind)?, *link))).collect::<io::Result<Vec<_>>>()?;
    for (file, link) in &opened {
        move_into_link_name_space(file.as_fd(), Some(*link))?;
    }
    for capability in (0..ALL_CAPABILITIES).filter(|n| CAPABILITIES.iter().all(|(_, kept)| kept != n)) {
        // SAFETY: takes numbers only.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) } == 0;
        // The kernel knows fewer.
        if !dropped && io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL) {
            return Err(io::Error::last_os_error());
        }
    }
    rustix::thread::set_no_new_privs(true)?;
    // SAFETY: takes a number only; this process has one thread.
    let group = unsafe { libc::setgid(0) };
    // SAFETY: as above.
    let user = unsafe { libc::setuid(0) };
    if group != 0 || user != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut shell = Command::new("/bin/bash");
    shell.arg("-l").env_clear().env("TERM", "vt220").env("HOME", "/root").env("LANG", "C.UTF-8").current_dir("/root");
    shell.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").stdin(Stdio::inherit());
    let mut filter = seccomp::program();
    // SAFETY: the closure only makes system calls, which are safe between fork and exec.
    unsafe {
        shell.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            // A session that is known in there, for job control.
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            seccomp::apply(&mut filter)
        });
    }
    // A child: only what is forked from here on is in the container's process namespace.
    let status = shell.status()?;
    std::process::exit(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

impl AsyncRead for Shell {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.terminal.poll_read_ready(cx))?;
            let read = guard.try_io(|terminal| Ok(rustix::io::read(terminal.get_ref(), buf.initialize_unfilled())?));
            match read {
                Ok(Ok(count)) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                // Nobody has the terminal open any more.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Poll::Ready(Ok(())),
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Shell {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.terminal.poll_write_ready(cx))?;
            if let Ok(written) = guard.try_io(|terminal| Ok(rustix::io::write(terminal.get_ref(), bytes)?)) {
                return Poll::Ready(written);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
