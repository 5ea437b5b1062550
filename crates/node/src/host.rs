//! What the controller runs on: a clan's own VM or container, or a computer that has other business too.

use std::{
    fs::File,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use clan_os::resolv;
use clan_types::{ClanId, MachineId, mesh_address};
use rustix::{fs::FlockOperation, io::Errno};
use serde::{Deserialize, Serialize};

use crate::{NodeError, image::Disks, report::chain, state::StateError, stats::Measured};

/// UDP port of the QUIC endpoint, unless another was chosen. WireGuard has the next one.
pub const DEFAULT_PORT: u16 = 41640;
/// Where a computer that was told no port looks for a free pair, from [`DEFAULT_PORT`] on.
const PORTS_TO_TRY: u16 = 128;
/// The name server of QEMU's user-mode network, and of a container's.
const GUEST_UPSTREAM: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 2, 3)), 53);
pub(crate) const DNS_PORT: u16 = 53;
pub(crate) const RESOLV_CONF: &str = "/etc/resolv.conf";

/// What the controller runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// A clan's own VM: everything in it is the clan's.
    Guest,
    /// A clan's own container, which differs from a VM as there are neither disks nor systemd in it; its manager finds the
    /// controller at this socket.
    Container(PathBuf),
    /// A computer of its own standing, on which the controller takes no more room than it needs.
    Computer(Computer),
}

/// Who starts services.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Starter {
    Systemd,
    /// The controller, as its children.
    Controller,
}

/// How a controller lives on a computer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Computer {
    /// Where the manager finds it.
    pub socket: PathBuf,
    /// Who may steer it, beside root: a user id.
    pub user: u32,
    /// UDP port for QUIC; the next one is WireGuard's. A free pair is chosen, and kept, if none is given.
    pub port: Option<u16>,
    /// Name of the network device; one that differs from clan to clan if none is given.
    pub interface: Option<String>,
    /// How programs on the computer learn the clan's names.
    pub names: Names,
    /// Whether multicast DNS is carried between programs on the computer and the clan.
    pub multicast: bool,
}

/// How programs on a computer learn a clan's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Names {
    /// They do not, unless they are pointed to the clan's name server by whoever looks after the computer.
    #[default]
    Aside,
    /// `/etc/resolv.conf` is replaced while the controller runs.
    ResolvConf,
    /// systemd-resolved is told, for the clan's zone and nothing else.
    Resolved,
}

/// UDP ports on the base network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ports {
    pub(crate) quic: u16,
    pub(crate) wireguard: u16,
}

/// How names are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NamesPlan {
    pub(crate) bind: SocketAddr,
    /// Who is asked for other names.
    pub(crate) upstream: Option<SocketAddr>,
    pub(crate) pointer: Pointer,
}

/// How programs are pointed to the name server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Pointer {
    /// They are not.
    None,
    /// By the resolver configuration file. `short`: names without a clan are looked for in it, where there is no other.
    File { path: PathBuf, short: bool },
    /// By systemd-resolved, for the clan's zone only.
    Resolved { interface: String },
}

impl Host {
    /// Whether it is the clan's own: a VM or a container.
    pub(crate) fn is_guest(&self) -> bool {
        !matches!(self, Self::Computer(_))
    }

    /// Where the manager finds the controller, and who may steer it; it is by a port of the VM else.
    pub(crate) fn socket(&self) -> Option<(&Path, u32)> {
        match self {
            Self::Guest => None,
            // The user of the base OS is root in the container.
            Self::Container(socket) => Some((socket, 0)),
            Self::Computer(computer) => Some((&computer.socket, computer.user)),
        }
    }

    /// Who starts services.
    pub(crate) fn starter(&self) -> Starter {
        match self {
            Self::Container(_) => Starter::Controller,
            Self::Guest | Self::Computer(_) => Starter::Systemd,
        }
    }

    /// The name of the network device.
    pub(crate) fn interface(&self, clan: &ClanId) -> String {
        match self {
            Self::Guest | Self::Container(_) => "clan0".to_owned(),
            // Linux takes 15 bytes.
            Self::Computer(computer) => computer.interface.clone().unwrap_or_else(|| format!("clan-{}", clan.short())),
        }
    }

    /// The ports, the same after every restart: invitation links name them.
    pub(crate) fn ports(&self, dir: &Path) -> Result<Ports, NodeError> {
        let pair = |quic: u16| Ports { quic, wireguard: quic + 1 };
        let computer = match self {
            Self::Guest | Self::Container(_) => return Ok(pair(DEFAULT_PORT)),
            Self::Computer(computer) => computer,
        };
        let busy = |port, source| NodeError::Udp { port, source };
        if let Some(port) = computer.port {
            let ports = pair(port.clamp(1, u16::MAX - 1));
            ports.check().map_err(|e| busy(port, e))?;
            return Ok(ports);
        }
        let file = dir.join("ports.json");
        if let Some(kept) = clan_store::read_versioned_json::<Ports>(&file).map_err(StateError::from)? {
            kept.check().map_err(|e| busy(kept.quic, e))?;
            return Ok(kept);
        }
        let candidates = (DEFAULT_PORT..).step_by(2).take(usize::from(PORTS_TO_TRY) / 2).map(pair);
        let mut last = None;
        for ports in candidates {
            match ports.check() {
                Ok(()) => {
                    clan_store::write_versioned_json(&file, &ports).map_err(StateError::from)?;
                    return Ok(ports);
                }
                Err(error) => last = Some(error),
            }
        }
        Err(busy(DEFAULT_PORT, last.unwrap_or_else(|| std::io::ErrorKind::AddrInUse.into())))
    }

    /// How names are served for a clan.
    pub(crate) fn names(&self, clan: &ClanId, machine: &MachineId) -> NamesPlan {
        let at = |ip: IpAddr| SocketAddr::new(ip, DNS_PORT);
        let computer = match self {
            Self::Guest | Self::Container(_) => {
                let pointer = Pointer::File { path: RESOLV_CONF.into(), short: true };
                return NamesPlan { bind: at(Ipv4Addr::LOCALHOST.into()), upstream: Some(GUEST_UPSTREAM), pointer };
            }
            Self::Computer(computer) => computer,
        };
        let bind = at(loopback(clan).into());
        match computer.names {
            Names::Aside => NamesPlan { bind, upstream: None, pointer: Pointer::None },
            Names::ResolvConf => {
                let pointer = Pointer::File { path: RESOLV_CONF.into(), short: false };
                NamesPlan { bind, upstream: upstream(bind.ip()), pointer }
            }
            // It asks through the device it was told about, on which there is no loopback address. Members can ask there
            // too, for names that they know anyway: nothing is passed on.
            Names::Resolved => {
                let bind = at(mesh_address(clan, machine).into());
                NamesPlan { bind, upstream: None, pointer: Pointer::Resolved { interface: self.interface(clan) } }
            }
        }
    }

    /// Whether multicast DNS is carried.
    pub(crate) fn multicast(&self) -> bool {
        match self {
            Self::Guest | Self::Container(_) => true,
            Self::Computer(computer) => computer.multicast,
        }
    }

    /// The disks that hold the image the machine booted from.
    ///
    /// INVARIANT: only a clan's own VM or container has any: what is on a computer's disks is nobody else's business.
    pub(crate) fn disks(&self) -> Option<Disks> {
        match self {
            Self::Guest => Some(Disks::of_this_machine()),
            Self::Container(_) => Some(Disks::of_this_container()),
            Self::Computer(_) => None,
        }
    }

    /// What statistics are taken of.
    pub(crate) fn measured(&self, dir: &Path) -> Measured {
        match self {
            Self::Guest => {
                Measured { disk: "/data".into(), units: &["clan-controller.service", "nginx.service"], shared: false }
            }
            Self::Container(_) => Measured { disk: dir.to_owned(), units: &[], shared: true },
            Self::Computer(_) => Measured { disk: dir.to_owned(), units: &[], shared: false },
        }
    }

    /// How long to wait for a network at the start.
    pub(crate) fn network_patience(&self) -> Duration {
        Duration::from_secs(if self.is_guest() { 30 } else { 5 })
    }
}

impl Ports {
    /// Whether both are free.
    fn check(self) -> std::io::Result<()> {
        for port in [self.quic, self.wireguard] {
            let any = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port));
            match any {
                // No IPv6 on this computer.
                Err(error)
                    if matches!(Errno::from_io_error(&error), Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL)) =>
                {
                    UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).map(drop)?;
                }
                other => other.map(drop)?,
            }
        }
        Ok(())
    }
}

/// An address of the loopback network that is the clan's own: two clans' name servers do not meet, and nothing that comes
/// out of a tunnel can reach it.
fn loopback(clan: &ClanId) -> Ipv4Addr {
    let [a, b, c, ..] = *clan.as_bytes();
    // 127.0.0.0/10 is where others put theirs.
    Ipv4Addr::new(127, 64 | (a & 0x3f), b, 1 | (c & 0xfe))
}

/// What no network device means for the person, and what it needs.
pub(crate) fn no_packets(error: &NodeError) -> String {
    let remedy = if !Path::new("/dev/net/tun").exists() {
        "The kernel gives no TUN device here (/dev/net/tun): `sudo modprobe tun`, then start the controller again."
    } else if !may_administer_network() {
        "It takes root, or the capability CAP_NET_ADMIN: start the controller with sudo, or as the service that `sudo \
         clan controller --install` makes."
    } else {
        "The controller's log may say more."
    };
    let why = chain(error);
    format!(
        "No packets flow between this computer and the clan, which can be managed from here all the same: {why}. {remedy}"
    )
}

/// Whether this process has CAP_NET_ADMIN (capabilities(7)).
fn may_administer_network() -> bool {
    const CAP_NET_ADMIN: u32 = 12;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0);
    bits >> CAP_NET_ADMIN & 1 == 1
}

/// The first name server that the computer used without us.
pub(crate) fn upstream(own: IpAddr) -> Option<SocketAddr> {
    match resolv::previous_nameservers(Path::new(RESOLV_CONF)) {
        Ok(servers) => servers.into_iter().find(|s| *s != own).map(|s| SocketAddr::new(s, DNS_PORT)),
        Err(error) => {
            tracing::warn!(%error, "names outside the clan cannot be asked for");
            None
        }
    }
}

/// Removes everything that a controller which does not run knows of its clan, with the machine's keys; true if there was
/// anything. The clan is told nothing.
pub fn forget(dir: &Path) -> Result<bool, NodeError> {
    if !dir.exists() {
        return Ok(false);
    }
    let _lock = lock(dir)?;
    let known = crate::state::Place::load(dir)?.is_some();
    crate::state::forget(dir)?;
    Ok(known)
}

/// One controller for a state folder. Held while it lives.
pub(crate) fn lock(dir: &Path) -> Result<File, NodeError> {
    let path = dir.join("lock");
    let io = |source| NodeError::State(StateError::Lock { path: path.clone(), source });
    let file = File::options().write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(io)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(NodeError::State(StateError::InUse { path: dir.to_owned() })),
        Err(errno) => Err(io(errno.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn computer() -> Computer {
        Computer {
            socket: "/run/clan/test.sock".into(),
            user: 1000,
            port: None,
            interface: None,
            names: Names::Aside,
            multicast: true,
        }
    }

    #[test]
    fn two_clans_on_a_computer_share_neither_device_nor_name_server_nor_ports() {
        let host = Host::Computer(computer());
        let (a, b) = (ClanId::from_bytes([1; 32]), ClanId::from_bytes([2; 32]));
        assert_ne!(host.interface(&a), host.interface(&b));
        assert!(host.interface(&a).len() <= 15);
        let machine = MachineId::from_bytes([3; 32]);
        assert_ne!(host.names(&a, &machine).bind, host.names(&b, &machine).bind);
        assert!(host.names(&a, &machine).bind.ip().is_loopback());
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let first = host.ports(one.path()).unwrap();
        let held = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, first.quic)).unwrap();
        let second = host.ports(two.path()).unwrap();
        assert_ne!(first.quic, second.quic);
        assert!(
            matches!(host.ports(one.path()), Err(NodeError::Udp { port, .. }) if port == first.quic),
            "kept, not moved"
        );
        drop(held);
        assert_eq!(host.ports(one.path()).unwrap(), first);
    }

    #[test]
    fn a_computer_serves_none_of_its_disks() {
        assert!(Host::Computer(computer()).disks().is_none());
        assert!(Host::Guest.disks().is_some() && Host::Container("/run/clan/control.sock".into()).disks().is_some());
    }

    #[test]
    fn a_forgotten_clan_leaves_no_key() {
        let dir = tempfile::tempdir().unwrap();
        crate::identity::Identity::load_or_create(dir.path()).unwrap();
        assert!(!forget(dir.path()).unwrap(), "it had no place");
        assert!(!dir.path().join("machine.key").exists() && !dir.path().join("wireguard.key").exists());
        let _running = lock(dir.path()).unwrap();
        assert!(forget(dir.path()).is_err(), "not under a controller that runs");
    }

    #[test]
    fn a_state_folder_has_one_controller() {
        let dir = tempfile::tempdir().unwrap();
        let _first = lock(dir.path()).unwrap();
        assert!(matches!(lock(dir.path()), Err(NodeError::State(StateError::InUse { .. }))));
    }
}
