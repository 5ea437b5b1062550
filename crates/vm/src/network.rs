//! The guest's network: QEMU's own, inside a network namespace that pasta connects with the base OS.
//!
//! QEMU's user-mode network leads every guest to the base OS's loopback, and has no switch against it. In a namespace of
//! its own, what a guest sends to 10.0.2.2, 127.0.0.0/8 or 0.0.0.0 ends in that namespace's loopback, where nothing
//! listens. A guest's packets become QEMU's sockets, so it is the kernel that sees to that, whatever a guest sends; pasta
//! only gets what the kernel routes outwards.
//!
//! ```text
//!  guest ── QEMU ── sockets ║ the namespace: lo, eth0 ║── pasta ── sockets of the base OS
//!            └─ lifeline, a pipe ─▶ cat, pasta's child
//! ```
//!
//! Nobody has to watch for pasta to end with QEMU: when the last holder of the lifeline ends, `cat` does, and pasta ends
//! with its child. The other way round, [`crate::Vm`] ends a QEMU whose pasta has ended.

use std::{
    ffi::{CString, OsString},
    fs::{self, File},
    io,
    net::Ipv4Addr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{MetadataExt, OpenOptionsExt},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::{
    io::FdFlags,
    pipe::PipeFlags,
    process::{Pid, Signal},
    thread::{LinkNameSpaceType, UnshareFlags},
};
use tokio::{
    io::{AsyncReadExt, unix::AsyncFd},
    net::unix::pipe,
    time,
};

use crate::{
    UdpForward, console, file,
    host::{Stat, processes},
    limits::{Bounds, Group},
    process::{self, Dir},
    tool,
};

const PROGRAM: &str = "pasta";
const PACKAGE: &str = "passt";
const TUN: &str = "/dev/net/tun";
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Inside the virtual machine's directory.
const LOG: &str = "network.log";
pub(crate) const RESOLVER: &str = "dns";

/// The namespace has the addresses of the network that QEMU shows to its guest: these the guest cannot use for anything
/// else anyway. They are given rather than taken from the base OS, so that pasta needs no network there to start with.
pub(crate) const ADDRESS: &str = "10.0.2.15";
pub(crate) const GATEWAY: &str = "10.0.2.2";
pub(crate) const GATEWAY_MAC: &str = "52:55:0a:00:02:02";
/// Where QEMU finds the base OS's name server if that one listens on the base OS's loopback.
const NAME_SERVER: &str = "10.0.2.3";

/// From pasta's start to a namespace that is ready: takes 0.03 s on an idle computer.
const START_LIMIT: Duration = Duration::from_secs(10);
/// From QEMU's end to pasta's.
const END_LIMIT: Duration = Duration::from_secs(1);
/// More than any kernel has capabilities.
const CAPABILITIES: libc::c_ulong = 64;

/// Where the guest's network leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// To the base OS's network, but not to its loopback.
    Apart,
    /// To wherever QEMU's user may connect, also to what listens on the base OS's loopback.
    Exposed(Exposure),
}

/// Why guests can reach the base OS's loopback.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exposure {
    /// A sentence.
    pub why: String,
    /// What the user can do about it: a sentence.
    pub remedy: String,
}

impl Exposure {
    fn new(because: &str, remedy: impl Into<String>) -> Self {
        Self {
            why: format!("Guests can reach what listens on this computer's loopback, because {because}."),
            remedy: remedy.into(),
        }
    }
}

/// Whether guests that are started from now on will reach the base OS's loopback, as far as can be told without trying.
pub fn exposure() -> Option<Exposure> {
    programs().err()
}

/// A namespace that is connected; the network for one QEMU.
pub(crate) struct Namespace {
    user: OwnedFd,
    net: OwnedFd,
    lifeline: OwnedFd,
    resolver: Option<Resolver>,
    feeder: Feeder,
}

/// What is laid over what, for QEMU to find a name server that it can reach.
#[derive(Clone)]
struct Resolver {
    source: CString,
    target: CString,
}

/// pasta, as it runs.
#[derive(Debug)]
pub(crate) struct Feeder {
    handle: AsyncFd<OwnedFd>,
    /// Unless another program started it.
    child: Option<Child>,
}

/// What a running QEMU's network is found to be.
#[derive(Debug)]
pub(crate) enum Found {
    /// The base OS's.
    Exposed(Exposure),
    /// A namespace with its pasta.
    Fed(Feeder),
    /// A namespace that leads nowhere any more.
    Cut,
}

/// The way into a namespace for a process between fork and exec.
pub(crate) struct Entrance {
    user: OwnedFd,
    net: OwnedFd,
    lifeline: OwnedFd,
    resolver: Option<Resolver>,
}

impl Namespace {
    /// Makes a namespace into which the UDP ports of `forwards` lead, by their numbers on the base OS. What connects it is in
    /// the machine's group: a guest that floods its network spins there, too.
    pub(crate) async fn make(dir: &Dir, forwards: &[UdpForward], group: Option<&Group>) -> Result<Self, Exposure> {
        let (pasta, cat) = programs()?;
        let made = Self::start((&pasta, &cat), dir, forwards, group).await;
        made.map_err(|error| {
            let said = console::tail(&dir.join(LOG), 3).unwrap_or_default().replace('\n', "; ");
            let because = if said.is_empty() { error.to_string() } else { said };
            tracing::warn!(%error, because, "pasta does not work: the guest gets QEMU's own network");
            Exposure::new(
                &format!("pasta does not work here ({because})"),
                format!("See that `{PROGRAM} --config-net -4 -- true` succeeds, then stop and start the VM."),
            )
        })
    }

    async fn start(
        (pasta, cat): (&Path, &Path),
        dir: &Dir,
        forwards: &[UdpForward],
        group: Option<&Group>,
    ) -> io::Result<Self> {
        let log = File::options().write(true).create(true).truncate(true).mode(0o600).open(dir.join(LOG))?;
        let resolver = Resolver::prepare(dir)?;
        let (until_cut, lifeline) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let (answer, answers) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let mut answer = pipe::Receiver::from_owned_fd(answer)?;
        // What `cat` says as soon as pasta lets it run, which is when the namespace is connected.
        rustix::io::write(&lifeline, b"\n")?;

        let mut command = Command::new(pasta);
        command.args(arguments(forwards, resolver.is_some())).arg("--").arg(cat).current_dir(dir.join("."));
        command.stdin(until_cut).stdout(answers).stderr(log);
        command.env_clear().env("LC_ALL", "C").envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        let bounds = group.map(|group| Bounds::within(Some(group))).transpose()?;
        // SAFETY: the closure only makes system calls, which are safe between fork and exec.
        unsafe {
            command.pre_exec(move || {
                rustix::process::setsid()?;
                bounds.as_ref().map_or(Ok(()), Bounds::enter)
            });
        }
        let mut child = command.spawn()?;
        // With its ends of the pipes: else `answer` would never come to its end.
        drop(command);
        let handle = process::open_pidfd(child.id()).and_then(register);
        let handle = match handle {
            Ok(handle) => handle,
            Err(error) => {
                end_session(&mut child);
                return Err(error);
            }
        };
        let pid = child.id();
        let feeder = Feeder { handle, child: Some(child) };
        let opened = async {
            match time::timeout(START_LIMIT, answer.read_u8()).await {
                Ok(Ok(_)) => {}
                Ok(Err(_)) => return Err(io::Error::other("pasta ended at once")),
                Err(_) => return Err(io::ErrorKind::TimedOut.into()),
            }
            let first = processes().find(|&p| Stat::of(p).is_ok_and(|s| s.parent == pid));
            let first = first.ok_or_else(|| io::Error::other("pasta's child is not found"))?;
            let open = |kind: &str| File::open(format!("/proc/{first}/ns/{kind}")).map(OwnedFd::from);
            Ok((open("user")?, open("net")?))
        };
        let namespace = match opened.await {
            Ok((user, net)) => Self { user, net, lifeline, resolver, feeder },
            Err(error) => {
                drop(lifeline);
                feeder.kill().await;
                return Err(error);
            }
        };
        match namespace.try_entrance(cat).await {
            Ok(()) => Ok(namespace),
            Err(error) => {
                namespace.end().await;
                Err(io::Error::new(error.kind(), format!("its namespace cannot be entered: {error}")))
            }
        }
    }

    /// Base OSes forbid namespaces in many ways: sees that QEMU will get in.
    async fn try_entrance(&self, cat: &Path) -> io::Result<()> {
        let entrance = self.entrance()?;
        let mut command = tokio::process::Command::new(cat);
        command.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        // SAFETY: `enter` is made for this.
        unsafe { command.pre_exec(move || entrance.enter()) };
        let status = time::timeout(START_LIMIT, command.status()).await.map_err(|_| io::ErrorKind::TimedOut)??;
        if status.success() { Ok(()) } else { Err(io::Error::other(status.to_string())) }
    }

    pub(crate) fn entrance(&self) -> io::Result<Entrance> {
        let Self { user, net, lifeline, resolver, .. } = self;
        let (user, net, lifeline) = (user.try_clone()?, net.try_clone()?, lifeline.try_clone()?);
        Ok(Entrance { user, net, lifeline, resolver: resolver.clone() })
    }

    /// Once QEMU runs, it alone holds the lifeline.
    pub(crate) fn into_feeder(self) -> Feeder {
        self.feeder
    }

    /// Without a QEMU.
    pub(crate) async fn end(self) {
        drop(self.lifeline);
        self.feeder.finish().await;
    }
}

impl Entrance {
    /// Moves this process into the namespace, gives it the lifeline, and takes every capability away. For a process that
    /// has just been forked: makes system calls only, on memory that was there before.
    pub(crate) fn enter(&self) -> io::Result<()> {
        let Self { user, net, lifeline, resolver } = self;
        rustix::thread::move_into_link_name_space(user.as_fd(), Some(LinkNameSpaceType::User))?;
        rustix::thread::move_into_link_name_space(net.as_fd(), Some(LinkNameSpaceType::Network))?;
        if let Some(resolver) = resolver {
            // SAFETY: the descriptor table is not touched.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS)? };
            use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};
            mount_change(c"/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
            mount_bind(resolver.source.as_c_str(), resolver.target.as_c_str())?;
        }
        // INVARIANT: QEMU has no capability, not even over its namespace: with one it could send pasta packets that no
        // socket sends. It joined with all of them; without a bounding set none is left after exec.
        for capability in 0..CAPABILITIES {
            // SAFETY: takes numbers only.
            let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } == 0;
            // The kernel knows fewer.
            if !dropped && io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL) {
                return Err(io::Error::last_os_error());
            }
        }
        rustix::io::fcntl_setfd(lifeline, FdFlags::empty())?;
        Ok(())
    }
}

impl Feeder {
    /// The network of a QEMU that runs already.
    pub(crate) fn of(qemu: u32) -> Found {
        let network = |pid: u32| fs::metadata(format!("/proc/{pid}/ns/net")).map(|meta| (meta.dev(), meta.ino()));
        let Ok(its) = network(qemu) else { return Found::Cut };
        if network(std::process::id()).is_ok_and(|own| own == its) {
            return Found::Exposed(
                exposure()
                    .unwrap_or_else(|| Exposure::new("the VM was started without pasta", "Stop and start the VM.")),
            );
        }
        let first = processes().find(|&pid| pid != qemu && network(pid).is_ok_and(|other| other == its));
        let pasta = first.and_then(|first| {
            let pid = Stat::of(first).ok()?.parent;
            let handle = process::open_pidfd(pid).ok()?;
            // Only now is it certain that the handle is not of a process that took over the number.
            let stat = Stat::of(pid).ok()?;
            (stat.name.contains(PROGRAM) || stat.name.contains(PACKAGE)).then_some(handle)
        });
        match pasta.map(register) {
            Some(Ok(handle)) => Found::Fed(Self { handle, child: None }),
            _ => Found::Cut,
        }
    }

    /// Returns when pasta has ended.
    pub(crate) async fn ended(&self) {
        if self.handle.readable().await.is_err() {
            // The runtime is shutting down.
            std::future::pending::<()>().await;
        }
    }

    /// Waits until pasta has ended, and its ports are free, after whoever held the lifeline has ended.
    pub(crate) async fn finish(mut self) {
        if time::timeout(END_LIMIT, self.ended()).await.is_ok() {
            if let Some(child) = &mut self.child {
                // It is over, so this does not wait.
                let _ = child.wait();
            }
            return;
        }
        tracing::warn!("pasta does not end with its QEMU: killing it");
        self.kill().await;
    }

    async fn kill(mut self) {
        match &mut self.child {
            Some(child) => end_session(child),
            None => {
                // It may have ended by now.
                let _ = rustix::process::pidfd_send_signal(self.handle.get_ref(), Signal::KILL);
                let _ = time::timeout(END_LIMIT, self.ended()).await;
            }
        }
    }
}

impl Resolver {
    /// For a base OS whose name server listens on its loopback, such as systemd-resolved: `None` elsewhere. QEMU reads
    /// the name server's address from a file, and must find one there that leads out of the namespace.
    fn prepare(dir: &Dir) -> io::Result<Option<Self>> {
        let Ok(text) = fs::read_to_string(RESOLV_CONF) else { return Ok(None) };
        if !name_server(&text).is_some_and(|address| address.is_loopback()) {
            return Ok(None);
        }
        let target = fs::canonicalize(RESOLV_CONF)?;
        let (Some(place), Some(name)) = (target.parent(), target.file_name()) else { return Ok(None) };
        let ours = dir.join(RESOLVER);
        file::create_private_dir(&ours)?;
        file::replace(&ours.join(name), format!("nameserver {NAME_SERVER}\n").as_bytes())?;
        // The file may be replaced at any time, which would uncover it: its folder is not.
        let (source, target) =
            if place == Path::new("/etc") { (ours.join(name), target.as_path()) } else { (ours, place) };
        let c = |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from);
        Ok(Some(Self { source: c(&source)?, target: c(target)? }))
    }
}

/// The name server that QEMU uses: the first IPv4 one.
fn name_server(resolv_conf: &str) -> Option<Ipv4Addr> {
    let servers = resolv_conf.lines().filter_map(|line| line.strip_prefix("nameserver")?.split_whitespace().next());
    servers.filter_map(|address| address.parse().ok()).next()
}

/// pasta and `cat`.
fn programs() -> Result<(PathBuf, PathBuf), Exposure> {
    let pasta = pasta()?;
    let Some(cat) = tool::find(&["cat"]) else {
        return Err(Exposure::new("there is no `cat`", "Install the package `coreutils`, then stop and start the VM."));
    };
    Ok((pasta, cat))
}

/// pasta, where it can make its device.
pub(crate) fn pasta() -> Result<PathBuf, Exposure> {
    let Some(pasta) = tool::find(&[PROGRAM]) else {
        return Err(Exposure::new(
            "pasta is not installed",
            format!("Install the package `{PACKAGE}` (`sudo apt install {PACKAGE}`), then stop and start the VM."),
        ));
    };
    if let Err(error) = File::options().read(true).write(true).open(TUN) {
        return Err(Exposure::new(
            &format!("{TUN} cannot be opened ({error})"),
            format!(
                "Let everybody open it, as is usual (`sudo modprobe tun; sudo chmod 0666 {TUN}`), then stop and start \
                 the VM."
            ),
        ));
    }
    Ok(pasta)
}

/// What pasta is told for a container, in whose user namespace it is root. A port is named as it is on the base OS, then as
/// it is in the container.
pub(crate) fn container_arguments(ports: &[(u16, u16)]) -> Vec<OsString> {
    let mut arguments = common_arguments(true);
    arguments.extend(["--netns-only", "--runas", "0:0"].map(str::to_owned));
    arguments.extend(ports.iter().flat_map(|(host, inside)| ["-u".to_owned(), format!("{host}:{inside}")]));
    arguments.into_iter().map(OsString::from).collect()
}

/// IPv4 only, as the guest's network. Nothing of the base OS's loopback is offered in the namespace, except the name
/// server's UDP port where `name_server` asks for it.
fn arguments(forwards: &[UdpForward], name_server: bool) -> Vec<OsString> {
    let mut arguments = common_arguments(name_server);
    if rustix::process::geteuid().is_root() {
        // Else it becomes another user, whose namespaces it may not set up.
        let ids = format!("{}:{}", rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        arguments.extend(["--runas".to_owned(), ids]);
    }
    if forwards.is_empty() {
        arguments.extend(["-u".to_owned(), "none".to_owned()]);
    }
    for UdpForward { host, .. } in forwards {
        let port = host.port();
        let spec = if host.ip().is_unspecified() { port.to_string() } else { format!("{}/{port}", host.ip()) };
        arguments.extend(["-u".to_owned(), spec]);
    }
    arguments.into_iter().map(OsString::from).collect()
}

fn common_arguments(name_server: bool) -> Vec<String> {
    let mut arguments: Vec<String> = ["-f", "-4", "--config-net", "--no-map-gw"].map(str::to_owned).into();
    // Of the interface pasta takes nothing, as all that it would take is given. There always is a loopback.
    for (option, value) in [
        ("-i", "lo"),
        ("-I", "eth0"),
        ("-M", GATEWAY_MAC),
        ("-a", ADDRESS),
        ("-n", "24"),
        ("-g", GATEWAY),
        ("-t", "none"),
        ("-T", "none"),
        ("-U", "none"),
    ] {
        arguments.extend([option.to_owned(), value.to_owned()]);
    }
    if name_server {
        arguments.extend(["--dns-forward".to_owned(), NAME_SERVER.to_owned()]);
    }
    arguments
}

fn register(handle: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` keeps its descriptor, and keeps it open, for as long as the registration owns it.
    Ok(unsafe { AsyncFd::register(handle) }?)
}

/// Kills pasta and what it started, and reaps it.
fn end_session(child: &mut Child) {
    if let Some(session) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // All may have ended. The number cannot be another's, as the child is not reaped.
        let _ = rustix::process::kill_process_group(session, Signal::KILL);
    }
    let _ = child.wait();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_server_is_the_one_that_qemu_takes() {
        let text = "# nameserver 1.1.1.1\nsearch x\nnameserver ::1\nnameserver\t127.0.0.53\nnameserver 9.9.9.9\n";
        assert_eq!(name_server(text), Some(Ipv4Addr::new(127, 0, 0, 53)));
        assert_eq!(name_server("search nameserver\n"), None);
    }

    #[test]
    fn a_forward_keeps_its_port_and_its_address() {
        let forward = |host: &str| UdpForward { host: host.parse().unwrap(), guest_port: 1 };
        let line = arguments(&[forward("0.0.0.0:4001"), forward("127.0.0.1:4002")], false);
        let ports: Vec<_> = line.windows(2).filter(|w| w[0] == "-u").map(|w| w[1].clone()).collect();
        assert_eq!(ports, ["4001", "127.0.0.1/4002"]);
        assert!(arguments(&[], false).windows(2).any(|w| w[0] == "-u" && w[1] == "none"));
    }
}
