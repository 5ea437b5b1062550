//! What a virtual machine or a container may take of the base OS, whatever a guest does that spins, or that has taken QEMU over: a
//! control group of its own where this user has one to divide (<https://docs.kernel.org/admin-guide/cgroup-v2.html>), and a
//! lower priority where not.

use std::{
    collections::BTreeSet,
    fmt, fs,
    fs::File,
    io, iter,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use clan_types::ByteSize;
use rustix::{
    fs::{Access, CWD},
    process::{Resource, Rlimit},
};
use serde::{Deserialize, Serialize};

use crate::file;

/// In the order of their weight here.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// In front of the names of groups.
const PREFIX: &str = "clan-vm-";
/// Half of what everybody else has: one that spins leaves two thirds of a busy processor to whoever wants it.
const WEIGHT: u32 = 50;
/// Beside the machine's memory: the code cache of the emulation, what connects the machine, and what is cached of files.
const MEMORY_BESIDE: ByteSize = ByteSize::from_mib(512);
/// QEMU's threads, with those that it does input and output by.
const THREADS: u32 = 256;
/// Threads of everything in a container.
const THREADS_CONTAINED: u32 = 2048;
/// In which a container gets its time on processors, in microseconds: the kernel's own choice.
const PERIOD_US: u64 = 100_000;
/// As `nice` counts.
const NICE: i32 = 5;
/// Addresses beside the guest's memory, of which little is used: stacks, heaps, libraries.
const ADDRESSES_BESIDE: ByteSize = ByteSize::from_mib(8 << 10);
/// In a machine's directory: how it is bounded.
const KEPT: &str = "limits.json";
const KEPT_VERSION: u32 = 1;
const HIERARCHY: &str = "cgroup2";
/// A group is busy until the kernel has forgotten its last process.
const REMOVE_AGAIN: Duration = Duration::from_millis(20);
const REMOVE_ATTEMPTS: u32 = 25;

/// Whether what is started now would be bounded; else why not.
pub fn check() -> Result<(), Unlimited> {
    plan(&levels()).map(drop)
}

/// The most that a machine may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Most {
    /// Of the machine; what runs it has some beside.
    memory: ByteSize,
    /// Whole ones; QEMU has a thread for each of its guest's, and so no need of this.
    processors: Option<u8>,
    threads: u32,
}

impl Most {
    /// Of a virtual machine that has so much memory.
    pub(crate) fn of_vm(memory: ByteSize) -> Self {
        Self { memory, processors: None, threads: THREADS }
    }

    /// Of a container that has so much memory, and so many processors.
    pub(crate) fn of_container(memory: ByteSize, processors: u8) -> Self {
        Self { memory, processors: Some(processors.max(1)), threads: THREADS_CONTAINED }
    }

    /// What is written to which file of a group, for one of its controllers.
    fn settings(&self, controller: &str) -> Vec<(&'static str, String)> {
        match controller {
            "cpu" => {
                let most = self.processors.map(|n| format!("{} {PERIOD_US}", u64::from(n) * PERIOD_US));
                iter::once(("cpu.weight", WEIGHT.to_string())).chain(most.map(|most| ("cpu.max", most))).collect()
            }
            "memory" => {
                let most = self.memory.as_bytes().saturating_add(MEMORY_BESIDE.as_bytes());
                vec![("memory.max", most.to_string())]
            }
            _ => vec![("pids.max", self.threads.to_string())],
        }
    }
}

/// Why a virtual machine or a container has no group of its own: only its priority is lower.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unlimited(String);

impl Unlimited {
    /// Of one that was found running.
    pub(crate) fn from_before() -> Self {
        Self("it was started without a control group of its own".into())
    }
}

impl fmt::Display for Unlimited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A group that this process is in or below.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Level {
    dir: PathBuf,
    /// The uppermost of all: groups below it are bounded though processes are in it.
    top: bool,
    /// Processes are in it; those of groups below do not count.
    populated: bool,
    /// This user may make groups in it, and move processes between those.
    writable: bool,
    /// What groups in it can be bounded by.
    available: BTreeSet<String>,
    /// What they are.
    enabled: BTreeSet<String>,
}

/// Where to make a group.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Plan {
    parent: PathBuf,
    controllers: Vec<&'static str>,
    /// Those that are not enabled yet.
    enable: Vec<&'static str>,
}

/// Chooses the nearest group that can be divided. `levels` begins with that of this process, and goes up.
fn plan(levels: &[Level]) -> Result<Plan, Unlimited> {
    if levels.is_empty() {
        return Err(Unlimited("this computer has no control groups of version 2".into()));
    }
    // INVARIANT of the kernel: a group that is divided has no processes of its own, but for the uppermost.
    let fit = levels.iter().filter(|level| level.writable && (level.top || !level.populated));
    let mut any = false;
    for level in fit {
        any = true;
        if let Some(plan) = divided(level) {
            return Ok(plan);
        }
    }
    Err(Unlimited(if any {
        "the control groups that are yours cannot bound processors".into()
    } else {
        "no control group is yours to divide; a manager that is a service of yours has one (`clan manager --install`)"
            .into()
    }))
}

/// How a group is divided, if those in it can be bounded.
fn divided(level: &Level) -> Option<Plan> {
    let among = |set: &BTreeSet<String>, name: &str| set.contains(name);
    let controllers: Vec<_> = CONTROLLERS.into_iter().filter(|name| among(&level.available, name)).collect();
    let enable = controllers.iter().copied().filter(|name| !among(&level.enabled, name)).collect();
    controllers.contains(&"cpu").then(|| Plan { parent: level.dir.clone(), controllers, enable })
}

/// The groups that this process is in, the nearest first.
fn levels() -> Vec<Level> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let Some((mount, own)) = place(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup")) else {
        return Vec::new();
    };
    own.ancestors().take_while(|dir| dir.starts_with(&mount)).map(|dir| level(dir, *dir == *mount)).collect()
}

/// Where the hierarchy of version 2 is mounted, and the folder of this process's group in it.
fn place(mountinfo: &str, cgroup: &str) -> Option<(PathBuf, PathBuf)> {
    // proc_pid_mountinfo(5): … ROOT MOUNT-POINT OPTIONS … - TYPE …
    let (root, mount) = mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(3);
        (after.split(' ').next() == Some(HIERARCHY)).then_some((fields.next()?, fields.next()?))
    })?;
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::"))?;
    let below = Path::new(path).strip_prefix(root).ok()?;
    let mount = PathBuf::from(mount);
    let own = if below.as_os_str().is_empty() { mount.clone() } else { mount.join(below) };
    // A group outside of this process's view is told with these.
    (!path.contains("..")).then_some((mount, own))
}

fn level(dir: &Path, top: bool) -> Level {
    let words = |file: &str| -> BTreeSet<String> {
        let text = fs::read_to_string(dir.join(file)).unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect()
    };
    let may = |path: &Path, access| rustix::fs::accessat(CWD, path, access, rustix::fs::AtFlags::EACCESS).is_ok();
    Level {
        // Only the real uppermost group, and not that of a container, has no type.
        top: top && !dir.join("cgroup.type").exists(),
        populated: !words("cgroup.procs").is_empty(),
        writable: may(dir, Access::WRITE_OK) && may(&dir.join("cgroup.procs"), Access::WRITE_OK),
        available: words("cgroup.controllers"),
        enabled: words("cgroup.subtree_control"),
        dir: dir.to_owned(),
    }
}

/// A machine's control group. Its undo is [`Group::remove`].
#[derive(Debug)]
pub(crate) struct Group(PathBuf);

impl Group {
    /// Makes a group for the machine in `dir`.
    pub(crate) fn make(dir: &Path, most: Most) -> Result<Self, Unlimited> {
        let plan = plan(&levels())?;
        let made = keep(dir, most).and_then(|()| Self::by(&plan, dir, most));
        made.map_err(|error| Unlimited(format!("{} cannot be divided: {error}", plan.parent.display())))
    }

    /// The group of the machine in `dir` that was found running, bounded anew: a service manager that enables fewer controllers for
    /// a while, as systemd does when its last unit with a share of processors ends, takes the bounds away.
    pub(crate) fn found(dir: &Path, pid: u32) -> Result<Self, Unlimited> {
        let group = Self::of(pid).ok_or_else(Unlimited::from_before)?;
        let (Some(most), Some(parent)) = (kept(dir), group.0.parent()) else { return Ok(group) };
        let again =
            divided(&level(parent, false)).ok_or_else(|| io::Error::other("it cannot bound processors any more"));
        again
            .and_then(|plan| Self::by(&plan, dir, most))
            .map_err(|error| Unlimited(format!("its control group does not bound it any more: {error}")))
    }

    fn by(plan: &Plan, dir: &Path, most: Most) -> io::Result<Self> {
        for controller in &plan.enable {
            fs::write(plan.parent.join("cgroup.subtree_control"), format!("+{controller}"))?;
        }
        let group = Self(plan.parent.join(name(dir)?));
        match fs::create_dir(&group.0) {
            // One that was killed has left it.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made?,
        }
        let mut settings = plan.controllers.iter().flat_map(|controller| most.settings(controller));
        let bounded = settings.try_for_each(|(file, value)| fs::write(group.0.join(file), value));
        bounded.inspect_err(|_| {
            let _ = fs::remove_dir(&group.0);
        })?;
        Ok(group)
    }

    /// The group of a machine that runs, by the process that stands for it.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let read = |path: String| fs::read_to_string(path).unwrap_or_default();
        let (_, own) = place(&read("/proc/self/mountinfo".into()), &read(format!("/proc/{pid}/cgroup")))?;
        let is_ours = own.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX));
        is_ours.then_some(Self(own))
    }

    /// The group after the process was started in it, which the kernel may have refused.
    pub(crate) async fn taken(made: Result<Self, Unlimited>, pid: u32) -> Result<Self, Unlimited> {
        match made {
            Ok(group) if Self::of(pid).is_none() => {
                group.remove().await;
                Err(Unlimited("the kernel lets nothing into its control group".into()))
            }
            made => made,
        }
    }

    /// The way in, for [`Bounds::enter`].
    fn entrance(&self) -> io::Result<OwnedFd> {
        Ok(File::options().write(true).open(self.0.join("cgroup.procs"))?.into())
    }

    /// Removes it, and kills what is left in it: what stood for the machine has ended.
    pub(crate) async fn remove(self) {
        // Not there in older kernels, before 5.14; and a container's processes end with what started them in any case.
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        for _ in 0..REMOVE_ATTEMPTS {
            match fs::remove_dir(&self.0) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => tokio::time::sleep(REMOVE_AGAIN).await,
                _ => return,
            }
        }
        tracing::warn!(group = %self.0.display(), "a machine's control group is not removed");
    }
}

/// Removes the group of a machine in `dir` that was killed while nobody watched. Nothing of it may run.
pub(crate) async fn tidy(dir: &Path) {
    let Ok(name) = name(dir) else { return };
    // Which group is divided may have been another one then: that depends on what else this user runs.
    for group in levels().iter().map(|level| Group(level.dir.join(&name))).filter(|group| group.0.is_dir()) {
        group.remove().await;
    }
}

/// Writes down how the machine in `dir` is bounded, for whoever finds it running.
fn keep(dir: &Path, most: Most) -> io::Result<()> {
    file::replace(&dir.join(KEPT), &serde_json::to_vec(&(KEPT_VERSION, most))?)
}

fn kept(dir: &Path) -> Option<Most> {
    let bytes = file::read_bounded(&dir.join(KEPT), 4096).ok()?;
    let (version, most): (u32, Most) = serde_json::from_slice(&bytes).ok()?;
    (version == KEPT_VERSION).then_some(most)
}

/// What a group is called: by its machine's folder, which no two share.
fn name(dir: &Path) -> io::Result<String> {
    let meta = fs::metadata(dir)?;
    Ok(format!("{PREFIX}{}-{}", meta.dev(), meta.ino()))
}

/// What bounds a process, prepared before it is forked.
pub(crate) struct Bounds {
    group: Option<OwnedFd>,
    addresses: Option<u64>,
}

impl Bounds {
    /// Of a QEMU whose guest has so much memory.
    pub(crate) fn of_vm(group: Option<&Group>, memory: ByteSize) -> io::Result<Self> {
        let addresses = memory.as_bytes().saturating_add(ADDRESSES_BESIDE.as_bytes());
        Ok(Self { addresses: Some(addresses), ..Self::within(group)? })
    }

    /// Of what else runs a machine: programs in a container may need many addresses, however little they use of them.
    pub(crate) fn within(group: Option<&Group>) -> io::Result<Self> {
        Ok(Self { group: group.map(Group::entrance).transpose()?, addresses: None })
    }

    /// Bounds this process, which has just been forked: makes system calls only.
    pub(crate) fn enter(&self) -> io::Result<()> {
        let bound = |resource, most: u64| {
            let most = rustix::process::getrlimit(resource).maximum.map_or(most, |now| most.min(now));
            rustix::process::setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })
        };
        self.addresses.map_or(Ok(()), |most| bound(Resource::As, most))?;
        // A machine's memory is nobody's to find on the disk.
        bound(Resource::Core, 0)?;
        // Zero stands for whoever writes it.
        if self.group.as_ref().is_none_or(|group| rustix::io::write(group.as_fd(), b"0").is_err()) {
            let nice = rustix::process::getpriority_process(None)?.max(NICE);
            rustix::process::setpriority_process(None, nice)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn set(names: &str) -> BTreeSet<String> {
        names.split_whitespace().map(str::to_owned).collect()
    }

    fn level(dir: &str, writable: bool, populated: bool, available: &str, enabled: &str) -> Level {
        let (available, enabled) = (set(available), set(enabled));
        Level { dir: dir.into(), top: false, populated, writable, available, enabled }
    }

    #[test]
    fn the_nearest_group_that_is_ours_and_has_no_processes_is_divided() {
        let service = level("/u/app/manager", true, true, "cpu memory pids", "");
        let app = level("/u/app", true, false, "cpu memory pids io", "memory pids");
        let user = level("/u", true, false, "cpu memory pids", "cpu memory pids");
        let system = level("/", false, false, "cpu memory pids", "cpu memory pids");
        let levels = [service, app, user, system];
        let expected = Plan { parent: "/u/app".into(), controllers: CONTROLLERS.to_vec(), enable: vec!["cpu"] };
        assert_eq!(plan(&levels), Ok(expected));
        assert_eq!(plan(&levels[2..]).unwrap().enable, Vec::<&str>::new());
    }

    #[test]
    fn the_uppermost_group_may_have_processes() {
        let root = Level { top: true, ..level("/sys/fs/cgroup", true, true, "cpu pids", "") };
        let expected =
            Plan { parent: "/sys/fs/cgroup".into(), controllers: vec!["cpu", "pids"], enable: vec!["cpu", "pids"] };
        assert_eq!(plan(&[root]), Ok(expected));
    }

    #[test]
    fn why_there_is_none_is_told() {
        let said = |levels: &[Level]| plan(levels).unwrap_err().to_string();
        assert!(said(&[]).contains("no control groups of version 2"));
        assert!(said(&[level("/a", false, false, "cpu", "cpu")]).contains("--install"));
        assert!(said(&[level("/a", true, true, "cpu", "cpu")]).contains("--install"));
        assert!(said(&[level("/a", true, false, "hugetlb memory", "")]).contains("cannot bound processors"));
    }

    #[test]
    fn a_process_is_found_in_the_hierarchy() {
        let hybrid = "31 1 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw";
        let found = place(hybrid, "1:cpu:/\n0::/user.slice/a.scope\n").unwrap();
        let unified = Path::new("/sys/fs/cgroup/unified");
        assert_eq!(found, (unified.into(), unified.join("user.slice/a.scope")));
        assert_eq!(place(hybrid, "0::/\n").unwrap(), (unified.into(), unified.into()));
        // In a container that sees a part of it.
        let part = "41 31 0:38 /docker/x /sys/fs/cgroup ro - cgroup2 cgroup rw";
        assert_eq!(place(part, "0::/docker/x/y\n").unwrap().1, Path::new("/sys/fs/cgroup/y"));
        for (mounts, groups) in [(hybrid, "1:cpu:/\n"), ("", "0::/\n"), (part, "0::/other\n"), (hybrid, "0::/../b\n")] {
            assert_eq!(place(mounts, groups), None, "{groups}");
        }
    }

    /// In a group of this computer's own hierarchy, if this user may make one; without controllers where it has none.
    #[tokio::test]
    async fn a_process_is_put_into_a_group_that_is_removed_after_it() {
        let Some(top) = levels().into_iter().find(|level| level.writable && (level.top || !level.populated)) else {
            eprintln!("no control group is ours here: not tested");
            return;
        };
        let folder = tempfile::tempdir().unwrap();
        let controllers: Vec<_> = CONTROLLERS.into_iter().filter(|name| top.enabled.contains(*name)).collect();
        let plan = Plan { parent: top.dir, controllers: controllers.clone(), enable: Vec::new() };
        let group = Group::by(&plan, folder.path(), Most::of_container(ByteSize::from_mib(64), 2)).unwrap();
        if controllers.contains(&"cpu") {
            assert_eq!(fs::read_to_string(group.0.join("cpu.weight")).unwrap().trim(), "50");
            assert_eq!(fs::read_to_string(group.0.join("cpu.max")).unwrap().trim(), "200000 100000");
        }
        let bounds = Bounds::of_vm(Some(&group), ByteSize::from_mib(64)).unwrap();
        let mut command = Command::new("sleep");
        command.arg("60");
        // SAFETY: makes system calls only.
        unsafe { std::os::unix::process::CommandExt::pre_exec(&mut command, move || bounds.enter()) };
        let mut child = command.spawn().unwrap();
        assert_eq!(Group::of(child.id()).unwrap().0, group.0);
        let limits = fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap();
        assert!(limits.lines().any(|line| line.starts_with("Max core file size") && line.contains(" 0 ")), "{limits}");
        child.kill().unwrap();
        child.wait().unwrap();
        let place = group.0.clone();
        group.remove().await;
        assert!(!place.exists());
    }

    #[tokio::test]
    async fn what_is_left_in_a_group_ends_with_it() {
        let Some(top) = levels().into_iter().find(|level| level.writable && (level.top || !level.populated)) else {
            eprintln!("no control group is ours here: not tested");
            return;
        };
        let folder = tempfile::tempdir().unwrap();
        let plan = Plan { parent: top.dir, controllers: Vec::new(), enable: Vec::new() };
        let group = Group::by(&plan, folder.path(), Most::of_container(ByteSize::from_mib(64), 1)).unwrap();
        if !group.0.join("cgroup.kill").exists() {
            eprintln!("this kernel does not kill groups: not tested");
            return group.remove().await;
        }
        let bounds = Bounds::within(Some(&group)).unwrap();
        let mut command = Command::new("sh");
        // A child that outlives what started it.
        command.args(["-c", "sleep 1000 & echo $!"]).stdout(std::process::Stdio::piped());
        // SAFETY: makes system calls only.
        unsafe { std::os::unix::process::CommandExt::pre_exec(&mut command, move || bounds.enter()) };
        let mut child = command.spawn().unwrap();
        let mut said = [0; 16];
        let len = io::Read::read(child.stdout.as_mut().unwrap(), &mut said).unwrap();
        let left: u32 = std::str::from_utf8(&said[..len]).unwrap().trim().parse().unwrap();
        child.wait().unwrap();
        assert_eq!(Group::of(left).unwrap().0, group.0);
        let place = group.0.clone();
        group.remove().await;
        assert!(!place.exists());
        // Whoever takes over what is orphaned may not have reaped it yet.
        assert!(
            crate::host::Stat::of(left).is_ok_and(|stat| stat.zombie) || !Path::new(&format!("/proc/{left}")).exists()
        );
    }

    /// Where this user has controllers to enable: in a group of its own, whose owner takes them away.
    #[tokio::test]
    async fn a_machine_that_is_found_running_is_bounded_anew() {
        let Ok(plan) = plan(&levels()) else {
            eprintln!("no control group is ours to divide here: only what is written down is tested");
            let folder = tempfile::tempdir().unwrap();
            assert_eq!(kept(folder.path()), None);
            let most = Most::of_container(ByteSize::from_mib(64), 1);
            keep(folder.path(), most).unwrap();
            assert_eq!(kept(folder.path()), Some(most));
            fs::write(folder.path().join(KEPT), "[2, {}]").unwrap();
            assert_eq!(kept(folder.path()), None);
            return;
        };
        let folder = tempfile::tempdir().unwrap();
        let group = Group::make(folder.path(), Most::of_container(ByteSize::from_mib(64), 1)).unwrap();
        let bounds = Bounds::within(Some(&group)).unwrap();
        let mut command = Command::new("sleep");
        command.arg("60");
        // SAFETY: makes system calls only.
        unsafe { std::os::unix::process::CommandExt::pre_exec(&mut command, move || bounds.enter()) };
        let mut child = command.spawn().unwrap();
        // As it is after its controller was disabled and enabled again.
        fs::write(group.0.join("cpu.weight"), "100").unwrap();
        fs::write(group.0.join("cpu.max"), "max").unwrap();
        let found = Group::found(folder.path(), child.id()).unwrap();
        assert_eq!(found.0, group.0);
        assert_eq!(fs::read_to_string(group.0.join("cpu.weight")).unwrap().trim(), "50");
        assert_eq!(fs::read_to_string(group.0.join("cpu.max")).unwrap().trim(), "100000 100000");
        assert!(plan.controllers.contains(&"cpu"));
        child.kill().unwrap();
        child.wait().unwrap();
        group.remove().await;
    }

    #[test]
    fn a_vm_and_a_container_are_bounded_by_what_they_were_given() {
        let settings = |most: Most| CONTROLLERS.map(|controller| most.settings(controller)).concat();
        let (memory, beside) = (ByteSize::from_mib(512), (1024_u64 << 20).to_string());
        let weight = ("cpu.weight", "50".to_owned());
        assert_eq!(
            settings(Most::of_vm(memory)),
            [weight.clone(), ("memory.max", beside.clone()), ("pids.max", "256".into())]
        );
        assert_eq!(
            settings(Most::of_container(memory, 2)),
            [weight.clone(), ("cpu.max", "200000 100000".into()), ("memory.max", beside), ("pids.max", "2048".into())]
        );
        // No processor at all would be nothing that runs.
        assert_eq!(settings(Most::of_container(memory, 0))[1].1, "100000 100000");
    }

    #[test]
    fn without_a_group_a_process_has_a_lower_priority() {
        let bounds = Bounds::of_vm(None, ByteSize::from_mib(64)).unwrap();
        let mut command = Command::new("sleep");
        command.arg("60");
        // SAFETY: makes system calls only.
        unsafe { std::os::unix::process::CommandExt::pre_exec(&mut command, move || bounds.enter()) };
        let own = rustix::process::getpriority_process(None).unwrap();
        let mut child = command.spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        let its = rustix::process::getpriority_process(Some(pid)).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(its, own.max(NICE));
    }
}
