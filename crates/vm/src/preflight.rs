//! What can be known to fail before QEMU is started, and what its last words mean.

use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    net::UdpSocket,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::{process::Command, time::timeout};

use crate::{Qemu, VmError, VmSpec, args, host, tool};

const HELP_LIMIT: Duration = Duration::from_secs(10);
/// What distributions call the emulator of x86-64.
const NAMES: [&str; 2] = ["qemu-system-x86_64", "qemu-kvm"];

/// Refuses what cannot work.
pub(crate) fn check(spec: &VmSpec) -> Result<(), VmError> {
    if spec.name.is_empty() || !spec.name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
        return Err(VmError::BadSpec("its name has other characters than letters, digits and hyphens"));
    }
    if spec.cpus == 0 {
        return Err(VmError::BadSpec("it needs at least one processor"));
    }
    if spec.memory.as_mib() == 0 {
        return Err(VmError::BadSpec("it needs at least 1 MiB of memory"));
    }
    if spec.forwards.iter().any(|f| !f.host.is_ipv4()) {
        return Err(VmError::BadSpec("ports can be forwarded from IPv4 addresses only"));
    }
    let image = &spec.image;
    for path in [&image.kernel, &image.initramfs, &image.root, &image.layer, &image.boot] {
        File::open(path).map_err(|source| VmError::MissingFile { path: path.clone(), source })?;
    }
    let data = File::options().read(true).write(true).open(&spec.data_disk);
    data.map_err(|source| VmError::MissingFile { path: spec.data_disk.clone(), source })?;
    if let Some(available) = host::memory_available()
        && spec.memory > available
    {
        return Err(VmError::TooLarge { asked: spec.memory, available });
    }
    ports(spec)
}

/// Refuses ports that somebody uses.
pub(crate) fn ports(spec: &VmSpec) -> Result<(), VmError> {
    for (index, forward) in spec.forwards.iter().enumerate() {
        if spec.forwards[..index].iter().any(|earlier| earlier.host.port() == forward.host.port()) {
            return Err(VmError::PortBusy { addr: forward.host });
        }
        match UdpSocket::bind(forward.host) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                return Err(VmError::PortBusy { addr: forward.host });
            }
            Err(error) => return Err(VmError::io("bind", forward.host.to_string())(error)),
        }
    }
    Ok(())
}

/// Where QEMU is.
pub(crate) fn executable(qemu: &Qemu) -> Result<PathBuf, VmError> {
    let found = match qemu {
        Qemu::Search => tool::find(&NAMES),
        Qemu::At(path) => tool::is_executable(path).then(|| path.clone()),
    };
    found.ok_or_else(|| VmError::MissingQemu { package: tool::qemu_package() })
}

/// What to use of a QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Emulator {
    /// The machine type.
    pub(crate) machine: &'static str,
    /// Whether it has [`args::QUICK_FIRMWARE`].
    pub(crate) quick_firmware: bool,
}

/// What the QEMU that was asked last answered, by its fingerprint: asking takes as long as restoring a guest.
static ASKED: Mutex<Option<(String, Emulator)>> = Mutex::new(None);

/// What to use of this QEMU.
pub(crate) async fn emulator(qemu: &Path) -> Result<Emulator, VmError> {
    let fingerprint = fingerprint(qemu)?;
    let asked = ASKED.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some((_, emulator)) = asked.filter(|(of, _)| *of == fingerprint) {
        return Ok(emulator);
    }
    let (machines, folders) = tokio::join!(ask(qemu, &["-machine", "help"]), ask(qemu, &["-L", "help"]));
    let emulator = Emulator { machine: machine(&machines?)?, quick_firmware: has_quick_firmware(&folders?) };
    *ASKED.lock().unwrap_or_else(PoisonError::into_inner) = Some((fingerprint, emulator));
    Ok(emulator)
}

/// Differs when another program is there: its path, its size, and when it was installed.
pub(crate) fn fingerprint(program: &Path) -> Result<String, VmError> {
    let meta = fs::metadata(program).map_err(VmError::io("read", program))?;
    Ok(format!("{} {} {}.{}", program.display(), meta.size(), meta.mtime(), meta.mtime_nsec()))
}

async fn ask(qemu: &Path, question: &[&str]) -> Result<String, VmError> {
    let mut command = Command::new(qemu);
    command.args(question).env("LC_ALL", "C").stdin(Stdio::null()).kill_on_drop(true);
    match timeout(HELP_LIMIT, command.output()).await {
        Ok(Ok(output)) => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(Err(error)) => Err(VmError::io("run", qemu)(error)),
        Err(_) => Err(VmError::io("run", qemu)(io::ErrorKind::TimedOut.into())),
    }
}

fn machine(known: &str) -> Result<&'static str, VmError> {
    let knows = |name: &&str| known.lines().any(|line| line.split_whitespace().next() == Some(name));
    [args::PINNED_MACHINE, args::ANY_MACHINE]
        .into_iter()
        .find(knows)
        .ok_or_else(|| VmError::DiedAtStart { log: format!("it does not emulate the machine {}", args::ANY_MACHINE) })
}

/// `folders`: where it looks for firmware, one a line.
fn has_quick_firmware(folders: &str) -> bool {
    folders.lines().map(str::trim).any(|folder| Path::new(folder).join(args::QUICK_FIRMWARE).is_file())
}

/// What the end of QEMU's log means.
pub(crate) fn diagnose(spec: &VmSpec, apart: bool, log: String) -> VmError {
    if log.contains("Could not set up host forwarding rule") {
        // With quotes, so that one port is not taken for the beginning of another.
        let named = |f: &&crate::UdpForward| log.contains(&format!("'{}'", args::forward_rule(f, apart)));
        if let Some(forward) = spec.forwards.iter().find(named) {
            return VmError::PortBusy { addr: forward.host };
        }
    }
    if log.contains("Failed to get") && log.contains("lock") {
        return VmError::Locked { path: spec.data_disk.clone() };
    }
    if log.contains("Invalid password") {
        return VmError::WrongPassphrase { path: spec.data_disk.clone() };
    }
    if log.contains("cannot set up guest memory") {
        let available = host::memory_available().unwrap_or_default();
        return VmError::TooLarge { asked: spec.memory, available };
    }
    let log = if log.is_empty() { "it said nothing".into() } else { log };
    VmError::DiedAtStart { log }
}
