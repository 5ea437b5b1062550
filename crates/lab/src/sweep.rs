//! Leaving nothing behind, whatever state a lab is in.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::{
    LabError, Record,
    process::{MARK, ProcessId, matching},
};

/// How long managers may take to end in good order.
const GRACE: Duration = Duration::from_secs(15);
/// How long everything else may take after a polite request, and again after a kill.
const SHORT: Duration = Duration::from_secs(4);
/// In a data folder, what outlives the lab: it is expensive to make and belongs to no clan.
const KEPT: [&str; 2] = ["images", "cache"];

/// What is left of a lab; empty after [`sweep`].
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Leftovers {
    /// Processes.
    pub processes: Vec<u32>,
    /// Mount points: namespaces and anything below the state folder.
    pub mounts: Vec<PathBuf>,
    /// Sockets, clans and other state that should not outlive the lab.
    pub files: Vec<PathBuf>,
}

impl Leftovers {
    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What is left of the lab that `record` describes.
pub fn leftovers(record: &Record) -> Leftovers {
    let namespaces = record.namespaces();
    let mut mounts = mounts_below(&record.state_root);
    let mut files = Vec::new();
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for path in namespaces.iter().map(crate::net::Namespace::path) {
        if table.lines().any(|line| line.split(' ').nth(4) == path.to_str()) {
            mounts.push(path);
        } else if path.exists() {
            files.push(path);
        }
    }
    for person in &record.people {
        files.extend(transient(&record.data(person)));
    }
    Leftovers { processes: processes(record).into_iter().map(|process| process.pid).collect(), mounts, files }
}

/// Ends every process of the lab, removes its namespaces, mounts, sockets and clans, and keeps images, caches and logs.
/// Does nothing where nothing is left.
///
/// # Errors
/// When something resists; the record stays, so that it can be tried again.
pub fn sweep(record: &Record) -> Result<(), LabError> {
    end_processes(record)?;
    for mount in mounts_below(&record.state_root) {
        rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH)
            .map_err(|error| LabError::io(format!("unmount {}", mount.display()))(error.into()))?;
    }
    for namespace in record.namespaces() {
        namespace.remove()?;
    }
    for path in record.people.iter().flat_map(|person| transient(&record.data(person))) {
        remove(&path)?;
    }
    record.remove()
}

/// Removes whatever a path names, without following links.
pub(crate) fn remove(path: &Path) -> Result<(), LabError> {
    let is_dir = fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    let removed = if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(LabError::io(format!("remove {}", path.display()))(error))
        }
        _ => Ok(()),
    }
}

fn end_processes(record: &Record) -> Result<(), LabError> {
    // Managers first: they stop their virtual machines in good order, and would restart one that dies before them.
    let manager = record.programs().join("clan");
    let managers = || processes(record).into_iter().filter(|p| program(p.pid).as_ref() == Some(&manager)).collect();
    ask(managers, Signal::TERM, GRACE);
    if ask(|| processes(record), Signal::TERM, SHORT) || ask(|| processes(record), Signal::KILL, SHORT) {
        return Ok(());
    }
    let left: Vec<u32> = processes(record).iter().map(|process| process.pid).collect();
    Err(LabError::Promise(format!("these processes of the lab survive a kill: {left:?}")))
}

/// Sends a signal to each process that `find` finds, once (a kill: until it is gone), and waits until there is none.
fn ask(find: impl Fn() -> Vec<ProcessId>, signal: Signal, limit: Duration) -> bool {
    let began = Instant::now();
    let mut asked = Vec::new();
    loop {
        let found = find();
        if found.is_empty() {
            return true;
        }
        for process in found {
            if signal == Signal::KILL || !asked.contains(&process) {
                process.signal(signal);
                asked.push(process);
            }
        }
        if began.elapsed() > limit {
            return false;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// INVARIANT: a process belongs to the lab if it is in one of its networks, carries its mark, runs a program from its state
/// folder, or is a virtual machine that lives in one of its data folders; nothing else is ever signalled.
fn processes(record: &Record) -> Vec<ProcessId> {
    let networks: Vec<(u64, u64)> = record.namespaces().iter().filter_map(|ns| identity(&ns.path())).collect();
    // An unmounted pin is a plain file: comparing device and inode with a namespace then never matches.
    let mark = format!("{MARK}={}", record.prefix);
    let belongs = |proc: &PathBuf| {
        identity(&proc.join("ns/net")).is_some_and(|network| networks.contains(&network))
            || fs::read(proc.join("environ"))
                .is_ok_and(|environ| environ.split(|byte| *byte == 0).any(|v| v == mark.as_bytes()))
            || fs::read_link(proc.join("exe")).is_ok_and(|exe| exe.starts_with(record.programs()))
            // In a network of its own, which ends with it.
            || (fs::read_link(proc.join("exe")).is_ok_and(|exe| is_emulator(&exe))
                && fs::read_link(proc.join("cwd"))
                    .is_ok_and(|cwd| record.people.iter().any(|person| cwd.starts_with(record.data(person)))))
    };
    let found = matching(belongs);
    found.into_iter().filter_map(ProcessId::of).filter(|process| *process != record.owner).collect()
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

fn is_emulator(program: &Path) -> bool {
    program.file_name().is_some_and(|name| name.to_string_lossy().contains("qemu"))
}

fn program(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}

fn mounts_below(root: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut mounts: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .filter(|path| path.starts_with(root))
        .collect();
    // Inner ones first.
    mounts.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    mounts
}

fn transient(data: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(data) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| !entry.file_name().to_str().is_some_and(|name| KEPT.contains(&name)))
        .map(|entry| entry.path())
        .collect()
}
