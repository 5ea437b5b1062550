//! Two namespaces and the cable between them.

use std::{
    ffi::OsStr,
    fs, io,
    net::{IpAddr, Ipv4Addr},
    os::{
        fd::AsRawFd,
        unix::{fs::DirBuilderExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::{LabError, net::Namespace};

/// The addresses of the cable's ends (TEST-NET-1, RFC 5737).
pub(super) const CABLE: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];
const DEVICE: &str = "wire0";
/// How long a process may take to end when asked.
const GRACE: Duration = Duration::from_secs(3);

/// Two computers, 0 and 1. Dropping it removes them.
pub(super) struct Site {
    computers: [Namespace; 2],
    /// Scratch files of the networks that are laid over it.
    pub(super) folder: PathBuf,
}

impl Site {
    pub(super) fn lay(prefix: &str, plain: bool) -> Result<Self, LabError> {
        if !rustix::process::geteuid().is_root() {
            return Err(LabError::NeedsRoot);
        }
        let computers = ["a", "b"].map(|end| Namespace::named(format!("{prefix}-bench-{end}")));
        let folder = std::env::temp_dir().join(format!("{prefix}-bench-{}", std::process::id()));
        let site = Self { computers, folder };
        for computer in &site.computers {
            // Left by a run that was killed.
            computer.remove()?;
            computer.create()?;
        }
        // Keys of the networks under measurement go here.
        let mut private = fs::DirBuilder::new();
        private.recursive(true).mode(0o700);
        private.create(&site.folder).map_err(LabError::io(format!("make {}", site.folder.display())))?;
        let [a, b] = &site.computers;
        a.ip(&["link", "add", DEVICE, "type", "veth", "peer", "name", DEVICE, "netns", b.name()])?;
        for (computer, address) in site.computers.iter().zip(CABLE) {
            computer.ip(&["address", "add", &format!("{address}/24"), "dev", DEVICE])?;
            computer.ip(&["link", "set", DEVICE, "up"])?;
            if plain {
                let mut command = in_namespace(computer, OsStr::new("ethtool"))?;
                let off = ["tso", "gso", "gro", "tx-udp-segmentation", "tx", "rx"].map(|feature| [feature, "off"]);
                finished(command.args(["-K", DEVICE]).args(off.as_flattened()))?;
            }
        }
        Ok(site)
    }

    pub(super) fn computer(&self, end: usize) -> &Namespace {
        &self.computers[end % 2]
    }

    /// A command on a computer.
    pub(super) fn command(&self, end: usize, program: impl AsRef<OsStr>) -> Result<Command, LabError> {
        in_namespace(self.computer(end), program.as_ref())
    }

    /// A folder for an end's files.
    pub(super) fn scratch(&self, end: usize) -> Result<PathBuf, LabError> {
        let folder = self.folder.join(end.to_string());
        fs::create_dir_all(&folder).map_err(LabError::io(format!("make {}", folder.display())))?;
        Ok(folder)
    }

    pub(super) fn ping(&self, target: IpAddr) -> bool {
        self.command(0, "ping")
            .and_then(|mut command| finished(command.args(["-n", "-c", "1", "-W", "1"]).arg(target.to_string())))
            .is_ok()
    }

    /// Waits for a network device that a daemon makes, then gives it an address and raises it.
    pub(super) fn address(&self, end: usize, device: &str, address: &str, mtu: u16) -> Result<(), LabError> {
        let computer = self.computer(end);
        let within = Duration::from_secs(10);
        let began = Instant::now();
        while computer.ip(&["link", "show", device]).is_err() {
            if began.elapsed() > within {
                return Err(LabError::InVain { what: format!("the device {device}"), limit: within });
            }
            thread::sleep(Duration::from_millis(20));
        }
        computer.ip(&["address", "add", address, "dev", device])?;
        computer.ip(&["link", "set", device, "mtu", &mtu.to_string(), "up"])
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for computer in &self.computers {
            // What cannot be removed now is removed by the next run.
            let _ = computer.remove();
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// A running program that ends when this is dropped.
pub(super) struct Daemon(Child);

impl Daemon {
    /// Starts it, with its talk in `log`.
    pub(super) fn start(mut command: Command, log: &Path) -> Result<Self, LabError> {
        let file = fs::File::create(log).map_err(LabError::io(format!("write {}", log.display())))?;
        let talk = file.try_clone().map_err(LabError::io(format!("write {}", log.display())))?;
        let shown = format!("{:?}", command.get_program());
        command.stdin(Stdio::null()).stdout(file).stderr(talk);
        Ok(Self(command.spawn().map_err(LabError::io(format!("start {shown}")))?))
    }

    pub(super) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Not yet waited for, so the number is still this child's.
        if let Some(pid) = i32::try_from(self.0.id()).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, Signal::TERM);
        }
        let began = Instant::now();
        while matches!(self.0.try_wait(), Ok(None)) && began.elapsed() < GRACE {
            thread::sleep(Duration::from_millis(10));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A command inside a namespace that does not outlive this process.
fn in_namespace(namespace: &Namespace, program: &OsStr) -> Result<Command, LabError> {
    let entrance = namespace.open()?;
    let mut command = Command::new(program);
    // SAFETY: between fork and exec only two system calls are made, on a descriptor that was opened before.
    unsafe {
        command.pre_exec(move || {
            if libc::setns(entrance.as_raw_fd(), libc::CLONE_NEWNET) == -1
                || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == -1
            {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    Ok(command)
}

/// Runs a command to its end; what it wrote to stdout, if it succeeded.
pub(super) fn finished(command: &mut Command) -> Result<String, LabError> {
    let shown = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().map_err(LabError::io(format!("run {shown}")))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(stdout);
    }
    let output = stdout + &String::from_utf8_lossy(&output.stderr);
    Err(LabError::Command { command: shown, status: "an error".into(), output })
}
