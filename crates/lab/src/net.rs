//! The namespaces: two computers and the internet between them.
//!
//! ```text
//!   clan-founder            clan-internet                clan-second
//!   eth0 203.0.113.11 ──── bridge br0 203.0.113.1 ──── eth0 203.0.113.12
//!                          (HTTP proxy on port 3128)
//! ```
//!
//! A namespace is pinned by a bind mount under `/run/netns`, where `ip -n` finds it too.

use std::{
    fs::{self, File},
    io::{self, Write},
    net::Ipv4Addr,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::LabError;

/// The founder's computer, on the lab's internet (TEST-NET-3, RFC 5737).
pub const FOUNDER_ADDRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 11);
/// The second person's computer.
pub const SECOND_ADDRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 12);
/// A third computer, where there is one.
pub const STRANGER_ADDRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 13);
/// The bridge.
pub const INTERNET_ADDRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// Where the HTTP proxy listens on [`INTERNET_ADDRESS`].
pub const PROXY_PORT: u16 = 3128;
pub(crate) const BRIDGE: &str = "br0";

const NETNS_DIR: &str = "/run/netns";

/// A named network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Namespace {
    name: String,
}

impl Namespace {
    /// The namespace of that name, whether it exists or not.
    pub(crate) fn named(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn path(&self) -> PathBuf {
        Path::new(NETNS_DIR).join(&self.name)
    }

    /// Makes it, with the loopback interface up.
    pub(crate) fn create(&self) -> Result<(), LabError> {
        let path = self.path();
        fs::create_dir_all(NETNS_DIR).map_err(LabError::io("make /run/netns"))?;
        File::create_new(&path).map_err(LabError::io(format!("make {}", path.display())))?;
        in_thread(move || {
            // SAFETY: this thread was started for this call and ends after it; CLONE_NEWNET touches no file
            // descriptor and no memory, only which network this one thread sees.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
            Ok(rustix::mount::mount_bind("/proc/thread-self/ns/net", &path)?)
        })
        .map_err(LabError::io(format!("make the network namespace {}", self.name)))?;
        self.ip(&["link", "set", "lo", "up"])
    }

    /// Removes it; nothing happens if it does not exist. Its network ends with the last process and socket in it.
    pub(crate) fn remove(&self) -> Result<(), LabError> {
        let path = self.path();
        match rustix::mount::unmount(&path, rustix::mount::UnmountFlags::DETACH) {
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(LabError::io(format!("unmount {}", path.display()))(error.into())),
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(LabError::io(format!("remove {}", path.display()))(error))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn open(&self) -> Result<File, LabError> {
        File::open(self.path()).map_err(LabError::io(format!("open the network namespace {}", self.name)))
    }

    /// Runs `work` in a thread of its own that is inside the namespace: sockets that it makes stay there.
    pub(crate) fn enter<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, LabError> {
        let namespace = self.open()?;
        in_thread(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            work()
        })
        .map_err(LabError::io(format!("work inside the network namespace {}", self.name)))
    }

    /// Runs `ip` on it.
    pub(crate) fn ip(&self, arguments: &[&str]) -> Result<(), LabError> {
        let output = Command::new("ip")
            .args(["-n", &self.name])
            .args(arguments)
            .output()
            .map_err(LabError::io("run ip (package iproute2)"))?;
        self.done("ip", &arguments.join(" "), &output)
    }

    /// Lets a device send so many Mbit/s and no more.
    pub(crate) fn slow(&self, device: &str, mbit: u32) -> Result<(), LabError> {
        let rate = format!("{mbit}mbit");
        let arguments =
            ["qdisc", "replace", "dev", device, "root", "tbf", "rate", &rate, "burst", "64kb", "latency", "50ms"];
        let output = Command::new("tc")
            .args(["-n", &self.name])
            .args(arguments)
            .output()
            .map_err(LabError::io("run tc (package iproute2)"))?;
        self.done("tc", &arguments.join(" "), &output)
    }

    /// Loads rules into its packet filter; a table that they name twice is theirs to flush.
    pub(crate) fn nft(&self, rules: &str) -> Result<(), LabError> {
        let mut command = Command::new("nft");
        command.args(["-f", "-"]).stdin(typed(rules)?);
        let output = self.inside(&mut command)?.output().map_err(LabError::io("run nft (package nftables)"))?;
        self.done("nft", rules, &output)
    }

    /// Sets a kernel variable of its network, named as below `/proc/sys/net`.
    pub(crate) fn sysctl(&self, variable: &str, value: &str) -> Result<(), LabError> {
        let (path, value) = (Path::new("/proc/sys/net").join(variable), value.to_owned());
        self.enter(move || fs::write(path, value))
    }

    /// Makes `command` run inside the namespace, with the caller's rights.
    pub(crate) fn inside<'a>(&self, command: &'a mut Command) -> Result<&'a mut Command, LabError> {
        use std::os::{fd::AsRawFd, unix::process::CommandExt};
        let entrance = self.open()?;
        // SAFETY: between fork and exec there is one system call, on a descriptor that was opened before.
        unsafe {
            command.pre_exec(move || match libc::setns(entrance.as_raw_fd(), libc::CLONE_NEWNET) {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            });
        }
        Ok(command)
    }

    fn done(&self, program: &str, arguments: &str, output: &std::process::Output) -> Result<(), LabError> {
        if output.status.success() {
            return Ok(());
        }
        Err(LabError::Command {
            command: format!("{program}, in {}: {arguments}", self.name),
            status: output.status.to_string(),
            output: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }
}

/// Makes the bridge in `internet` and gives it its address.
pub(crate) fn lay_internet(internet: &Namespace) -> Result<(), LabError> {
    internet.create()?;
    // No multicast snooping: without a querier it would swallow the discovery messages after some minutes.
    internet.ip(&["link", "add", BRIDGE, "type", "bridge", "mcast_snooping", "0"])?;
    internet.ip(&["address", "add", &format!("{INTERNET_ADDRESS}/24"), "dev", BRIDGE])?;
    internet.ip(&["link", "set", BRIDGE, "up"])
}

/// Makes the computer `namespace` and plugs it into the bridge of `internet`.
pub(crate) fn lay_computer(
    namespace: &Namespace,
    port: &str,
    address: Ipv4Addr,
    internet: &Namespace,
) -> Result<(), LabError> {
    namespace.create()?;
    internet.ip(&["link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace.name()])?;
    internet.ip(&["link", "set", port, "master", BRIDGE, "up"])?;
    namespace.ip(&["address", "add", &format!("{address}/24"), "dev", "eth0"])?;
    namespace.ip(&["link", "set", "eth0", "up"])?;
    namespace.ip(&["route", "add", "default", "via", &INTERNET_ADDRESS.to_string()])
}

/// A stream that somebody has typed `input` into already; it must fit a pipe's buffer.
pub(crate) fn typed(input: &str) -> Result<Stdio, LabError> {
    let (reader, mut writer) = io::pipe().map_err(LabError::io("make a pipe"))?;
    writer.write_all(input.as_bytes()).map_err(LabError::io("write into a pipe"))?;
    Ok(reader.into())
}

fn in_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    thread::Builder::new()
        .name("lab-namespace".into())
        .spawn(work)?
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
}
