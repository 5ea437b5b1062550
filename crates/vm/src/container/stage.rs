//! What this executable does on the way into a container, before what is in it runs.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::Command,
};

use rustix::{
    fs::{Mode, OFlags},
    mount::MountFlags,
    process::Resource,
};
use serde::{Deserialize, Serialize};

use super::{ContainerSpec, ROOT, RUN, missing::Tools, seccomp, shell, wire};
use crate::{UdpForward, VmError, file, network};

/// The executable's hidden verb, and its stages.
const VERB: &str = "contain";
pub(super) const BEGIN: &str = "begin";
const ENTER: &str = "enter";
pub(super) const SHELL: &str = "shell";

/// What comes before a stage's own words, which may look like options.
pub(super) fn words(stage: &str) -> [&str; 3] {
    [VERB, "--", stage]
}

/// What the container's root may do, over its own namespaces. Not: mount, trace, load, or make namespaces.
pub(super) const CAPABILITIES: [(&str, u32); 11] = [
    ("CAP_CHOWN", 0),
    ("CAP_DAC_OVERRIDE", 1),
    ("CAP_FOWNER", 3),
    ("CAP_FSETID", 4),
    ("CAP_KILL", 5),
    ("CAP_SETGID", 6),
    ("CAP_SETUID", 7),
    ("CAP_SETPCAP", 8),
    ("CAP_NET_BIND_SERVICE", 10),
    ("CAP_NET_ADMIN", 12),
    ("CAP_NET_RAW", 13),
];

/// A stage, as named by the arguments behind the hidden verb.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage(Vec<OsString>);

/// What [`BEGIN`] is told.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    program: PathBuf,
    bwrap: PathBuf,
    pasta: PathBuf,
    layers: Vec<PathBuf>,
    data: PathBuf,
    shown: Vec<(String, PathBuf)>,
    /// Ports on the base OS, and in the container.
    ports: Vec<(u16, u16)>,
}

impl Stage {
    /// From the arguments behind the verb.
    pub fn new(arguments: Vec<OsString>) -> Self {
        Self(arguments)
    }

    /// Becomes the next program. Returns only if that fails.
    pub fn run(self) -> io::Error {
        let mut words = self.0.into_iter();
        let stage = words.next().unwrap_or_default();
        let outcome = match stage.to_str() {
            Some(BEGIN) => begin(words.next().unwrap_or_default()),
            Some(ENTER) => enter(words),
            Some(SHELL) => shell::enter(words.next().unwrap_or_default()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "no such stage")),
        };
        match outcome {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }
}

impl Plan {
    pub(super) fn new(spec: &ContainerSpec, tools: &Tools) -> Result<Self, VmError> {
        let absolute = |path: &Path| std::path::absolute(path).map_err(VmError::io("resolve", path));
        Ok(Self {
            program: absolute(&spec.program)?,
            bwrap: tools.bwrap.clone(),
            pasta: tools.pasta.clone(),
            layers: spec.layers.iter().map(|layer| absolute(layer)).collect::<Result<_, _>>()?,
            data: absolute(&spec.data)?,
            shown: spec
                .shown
                .iter()
                .map(|(name, path)| Ok((name.clone(), absolute(path)?)))
                .collect::<Result<_, VmError>>()?,
            ports: spec.forwards.iter().map(|UdpForward { host, guest_port }| (host.port(), *guest_port)).collect(),
        })
    }

    pub(super) fn encode(&self) -> Result<String, VmError> {
        serde_json::to_string(self).map_err(|_| VmError::BadSpec("the path of a file is not UTF-8"))
    }

    fn inside(&self) -> Vec<OsString> {
        let mut args = Vec::new();
        let mut add = |words: &[&str]| args.extend(words.iter().map(OsString::from));
        add(&["--die-with-parent", "--new-session", "--unshare-pid", "--unshare-ipc", "--unshare-uts"]);
        add(&["--unshare-cgroup-try", "--hostname", "clan", "--bind", ROOT, "/", "--proc", "/proc", "--dev", "/dev"]);
        add(&["--dev-bind", "/dev/net/tun", "/dev/net/tun", "--tmpfs", "/tmp", "--chmod", "1777", "/tmp"]);
        add(&["--tmpfs", "/run", "--dir", "/run/lock", "--bind", RUN, "/run/clan"]);
        add(&["--cap-drop", "ALL"]);
        for (name, _) in CAPABILITIES {
            add(&["--cap-add", name]);
        }
        add(&["--clearenv", "--setenv", "PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]);
        add(&["--setenv", "LANG", "C.UTF-8", "--setenv", "HOME", "/root", "--chdir", "/"]);
        for (name, path) in &self.shown {
            args.extend(["--ro-bind".into(), path.into(), format!("/run/image/{name}").into()]);
        }
        args.extend(["--bind".into(), self.data.join("state").into(), "/data".into()]);
        args.extend(["--", "/usr/bin/clan", "controller", "--container", "--state", "/data/clan"].map(OsString::from));
        args
    }
}

/// There is none.
pub(super) enum Never {}

/// In a user and a mount namespace of its own, in the container's directory: puts the root together and becomes pasta.
fn begin(plan: OsString) -> io::Result<Never> {
    close_inherited()?;
    let plan: Plan = serde_json::from_slice(plan.as_encoded_bytes())?;
    let (upper, work) = (plan.data.join("upper"), plan.data.join("work"));
    for folder in [&upper, &work, &plan.data.join("state")] {
        file::create_private_dir(folder)?;
    }
    // By their descriptors: a path could hold what separates options, and what is mounted shows in the container.
    let open = |path: &Path| rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let named = |fd: &OwnedFd| format!("/proc/self/fd/{}", fd.as_raw_fd());
    let layers = plan.layers.iter().map(|layer| open(layer)).collect::<Result<Vec<_>, _>>()?;
    // The root of the root is the upper folder's.
    rustix::fs::chmod(&upper, Mode::from_raw_mode(0o755))?;
    let (upper, work) = (open(&upper)?, open(&work)?);
    let lower: Vec<String> = layers.iter().map(named).collect();
    let options =
        format!("lowerdir={},upperdir={},workdir={},userxattr,index=off", lower.join(":"), named(&upper), named(&work));
    let options = std::ffi::CString::new(options)?;
    rustix::mount::mount("overlay", ROOT, "overlay", MountFlags::NOSUID | MountFlags::NODEV, options.as_c_str())
        .map_err(|error| io::Error::other(format!("the root is not put together: {}", io::Error::from(error))))?;
    let mut command = Command::new(&plan.pasta);
    command.args(network::container_arguments(&plan.ports)).arg("--").arg(&plan.program).args(words(ENTER));
    Err(command.arg(&plan.bwrap).args(plan.inside()).exec())
}

/// In pasta's namespaces: makes those of the container, and becomes the program that the words name.
fn enter(mut words: impl Iterator<Item = OsString>) -> io::Result<Never> {
    // Sockets of the base OS's network, among others.
    close_inherited()?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let mut files = rustix::process::getrlimit(Resource::Nofile);
    files.current = files.maximum;
    rustix::process::setrlimit(Resource::Nofile, files)?;
    wire::connect()?;
    // INVARIANT: nobody in the container gets a namespace of their own, with capabilities that they do not have in this one.
    std::fs::write("/proc/sys/user/max_user_namespaces", "0")?;
    let program = words.next().unwrap_or_default();
    let filter = seccomp::inherited()?;
    Err(Command::new(program).arg("--seccomp").arg(filter.to_string()).args(words).exec())
}

/// Everything but the three usual ones.
fn close_inherited() -> io::Result<()> {
    // SAFETY: takes numbers only; nothing of this program's uses a descriptor yet.
    match unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A file of `/proc` about a process.
pub(super) fn namespace(pid: u32, kind: &str) -> io::Result<File> {
    File::open(format!("/proc/{pid}/ns/{kind}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_sees_nothing_of_the_base_os_but_what_it_is_given() {
        let plan = Plan {
            program: "/clan".into(),
            bwrap: "/bwrap".into(),
            pasta: "/pasta".into(),
            layers: vec!["/layer".into()],
            data: "/d:a,t a".into(),
            shown: vec![("root".into(), "/images/root.erofs".into())],
            ports: vec![(45001, 41640)],
        };
        let args: Vec<String> = plan.inside().into_iter().map(|a| a.into_string().unwrap()).collect();
        let bound: Vec<_> =
            args.windows(3).filter(|w| w[0].contains("bind")).map(|w| (&*w[0], &*w[1], &*w[2])).collect();
        let expected = [
            ("--bind", "root", "/"),
            ("--dev-bind", "/dev/net/tun", "/dev/net/tun"),
            ("--bind", "run", "/run/clan"),
            ("--ro-bind", "/images/root.erofs", "/run/image/root"),
            ("--bind", "/d:a,t a/state", "/data"),
        ];
        assert_eq!(bound, expected);
        let drop = args.iter().position(|a| a == "--cap-drop").unwrap();
        assert_eq!(args[drop + 1], "ALL");
        assert!(!args.iter().any(|a| a == "CAP_SYS_ADMIN" || a == "CAP_SYS_PTRACE"));
    }
}
