//! Computers behind every kind of router, and an internet that routes between them.
//!
//! ```text
//!   PREFIX-ann           PREFIX-ann-home0          PREFIX-internet          PREFIX-bob
//!   eth0 192.168.1.11 ── lan      wan 203.0.113.11 ── w1   w2 ───────────── eth0 203.0.113.12   (no router)
//!                        nft: what kind of NAT     203.0.113.1
//! ```
//!
//! Nothing is bridged: discovery messages reach nobody, as between homes. All homes number their network alike, as
//! homes do, so a private address means another machine, or none, elsewhere. A router with a dependable mapping gives a
//! computer's UDP port another number outside (`port ^ 0x4000`), so whoever guesses that ports stay is found out.

use std::{
    fmt, io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    str::FromStr,
    time::Duration,
};

use crate::{
    LabError, Record,
    delay::Delay,
    net::{INTERNET_ADDRESS, Namespace},
    process::{MARK, ProcessId},
    sweep,
};

/// What stands between a computer and the internet (RFC 4787 sections 4 and 5 name mappings and filters).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Nat {
    /// Nothing: a public address.
    Open,
    /// One outside port for all destinations; whoever knows it gets in.
    FullCone,
    /// The same, for senders whose address was sent to before.
    AddressRestricted,
    /// The same, for senders whose address and port were sent to before.
    PortRestricted,
    /// Another outside port for every destination; only that destination gets in.
    Symmetric,
    /// A port-restricted router at home, and another one of the carrier.
    Carrier,
    /// No UDP passes; TCP may be opened from inside.
    UdpBlocked,
}

impl Nat {
    /// Every kind, from the easiest to the hardest.
    pub const ALL: [Self; 7] = [
        Self::Open,
        Self::FullCone,
        Self::AddressRestricted,
        Self::PortRestricted,
        Self::Carrier,
        Self::Symmetric,
        Self::UdpBlocked,
    ];

    /// Its name, as it is parsed.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::FullCone => "full-cone",
            Self::AddressRestricted => "address-restricted",
            Self::PortRestricted => "port-restricted",
            Self::Symmetric => "symmetric",
            Self::Carrier => "carrier",
            Self::UdpBlocked => "udp-blocked",
        }
    }

    /// Whether two computers behind such routers can exchange UDP once a third told each how it sees the other, without
    /// guessing ports: at least one of the mappings must be foreseeable, and a filter by port must foresee it.
    pub const fn meets(self, other: Self) -> bool {
        const fn filters_by_port(nat: Nat) -> bool {
            matches!(nat, Nat::PortRestricted | Nat::Carrier | Nat::Symmetric)
        }
        match (self, other) {
            (Self::UdpBlocked, _) | (_, Self::UdpBlocked) => false,
            (Self::Symmetric, other) | (other, Self::Symmetric) => !filters_by_port(other),
            _ => true,
        }
    }

    /// The routers from the computer outwards: the suffix of the name, and what it does with ports.
    const fn routers(self) -> &'static [(&'static str, Router)] {
        match self {
            Self::Open => &[],
            Self::FullCone => &[("home", Router::Cone { shift: 0x4000, filter: Filter::None })],
            Self::AddressRestricted => &[("home", Router::Cone { shift: 0x4000, filter: Filter::Address })],
            Self::PortRestricted => &[("home", Router::Cone { shift: 0x4000, filter: Filter::Port })],
            Self::Symmetric => &[("home", Router::Symmetric)],
            Self::Carrier => &[
                ("home", Router::Cone { shift: 0x4000, filter: Filter::Port }),
                ("carrier", Router::Cone { shift: 0x2000, filter: Filter::Port }),
            ],
            Self::UdpBlocked => &[("home", Router::NoUdp)],
        }
    }
}

impl fmt::Display for Nat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Nat {
    type Err = LabError;
    fn from_str(text: &str) -> Result<Self, LabError> {
        let names = || Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|nat| nat.name() == text);
        found.ok_or_else(|| LabError::Promise(format!("there is no NAT `{text}`; there are: {}", names())))
    }
}

#[derive(Clone, Copy)]
enum Filter {
    None,
    Address,
    Port,
}

#[derive(Clone, Copy)]
enum Router {
    Cone { shift: u16, filter: Filter },
    Symmetric,
    NoUdp,
}

impl Router {
    /// The rules of a router whose outer address is `outside`.
    fn rules(self, outside: Ipv4Addr) -> String {
        let (mapping, way_in, memory, udp) = match self {
            Self::Cone { shift, filter } => {
                let mapping = format!(r#"oifname "wan" ip protocol udp snat ip to {outside} : udp sport ^ {shift}"#);
                let way_in = format!("dnat ip to udp dport ^ {shift} map @inside : udp dport ^ {shift}");
                let (way_in, memory) = match filter {
                    // Without a way in only answers pass, and the kernel tells an answer by address and port.
                    Filter::Port => (String::new(), ""),
                    Filter::None => (format!(r#"iifname "wan" {way_in}"#), "update @inside { udp sport : ip saddr }"),
                    Filter::Address => (
                        format!(r#"iifname "wan" ip saddr . udp dport ^ {shift} @asked {way_in}"#),
                        "update @inside { udp sport : ip saddr } update @asked { ip daddr . udp sport }",
                    ),
                };
                let memory = if memory.is_empty() { String::new() } else { format!(r#"oifname "wan" {memory}"#) };
                (mapping, way_in, memory, "")
            }
            Self::Symmetric => (
                r#"oifname "wan" ip protocol udp masquerade fully-random"#.to_owned(),
                String::new(),
                String::new(),
                "",
            ),
            Self::NoUdp => (String::new(), String::new(), String::new(), "ip protocol udp drop"),
        };
        // Packets to the router itself are dropped, and so leave no trace in its connection table: a probe that came too
        // early would otherwise take the place of the mapping that the computer's own packet is about to get.
        format!(
            r#"table ip lab {{
    map inside {{ type inet_service : ipv4_addr; size 65535; flags dynamic,timeout; timeout 2m; }}
    set asked {{ type ipv4_addr . inet_service; size 65535; flags dynamic,timeout; timeout 2m; }}
    chain prerouting {{ type nat hook prerouting priority dstnat; policy accept;
        {way_in}
    }}
    chain input {{ type filter hook input priority filter; policy accept;
        iifname "wan" ip protocol != icmp ct state new drop
    }}
    chain forward {{ type filter hook forward priority filter; policy accept;
        {udp}
        iifname "wan" ct status dnat accept
        iifname "wan" ct state new drop
        {memory}
    }}
    chain postrouting {{ type nat hook postrouting priority srcnat; policy accept;
        {mapping}
        oifname "wan" masquerade
    }}
}}
"#
        )
    }
}

/// A computer to be laid.
#[derive(Debug, Clone)]
pub struct SiteSpec {
    /// Its name: a short DNS label.
    pub name: String,
    /// Its ways to the internet; the first is in use, the others wait for [`Site::switch_to`].
    pub uplinks: Vec<Nat>,
}

impl SiteSpec {
    /// A computer with one way to the internet.
    pub fn new(name: impl Into<String>, nat: Nat) -> Self {
        Self { name: name.into(), uplinks: vec![nat] }
    }

    fn namespaces(&self, prefix: &str) -> Vec<String> {
        let routers = self.uplinks.iter().enumerate().flat_map(|(at, nat)| {
            nat.routers().iter().map(move |(kind, _)| format!("{prefix}-{}-{kind}{at}", self.name))
        });
        std::iter::once(format!("{prefix}-{}", self.name)).chain(routers).collect()
    }
}

/// The names of all namespaces of the sites, the internet's excepted.
pub(crate) fn namespaces(prefix: &str, specs: &[SiteSpec]) -> Vec<String> {
    specs.iter().flat_map(|spec| spec.namespaces(prefix)).collect()
}

/// An internet and the computers on it.
#[derive(Debug)]
pub struct World {
    record: Record,
    internet: Internet,
    sites: Vec<Site>,
}

impl World {
    /// Lays it. What an earlier one of this prefix left is swept first; `state` is a folder of its
    /// own, where its owner keeps files.
    ///
    /// # Errors
    /// When this is not root, or such a lab is up. Nothing stays behind.
    pub fn lay(prefix: &str, state: &Path, specs: &[SiteSpec]) -> Result<Self, LabError> {
        if !rustix::process::geteuid().is_root() {
            return Err(LabError::NeedsRoot);
        }
        if let Some(old) = Record::load(prefix)? {
            if old.is_running() {
                return Err(LabError::AlreadyUp { prefix: old.prefix.clone(), pid: old.pid() });
            }
            sweep(&old)?;
        }
        let owner =
            ProcessId::of(std::process::id()).ok_or_else(|| LabError::Promise("/proc is not mounted".into()))?;
        let record = Record::new(prefix, owner, state, &[]).with_networks(namespaces(prefix, specs));
        record.save()?;
        let laid = || {
            for namespace in record.namespaces() {
                namespace.remove()?;
            }
            let mut internet = Internet::lay(record.internet())?;
            let sites = specs.iter().map(|spec| Site::lay(prefix, spec, &mut internet)).collect::<Result<_, _>>()?;
            Ok((internet, sites))
        };
        match laid() {
            Ok((internet, sites)) => Ok(Self { record, internet, sites }),
            Err(error) => {
                // The first error is the one to tell; what cannot be swept now is in the record.
                let _ = sweep(&record);
                Err(error)
            }
        }
    }

    /// A computer.
    ///
    /// # Panics
    /// When there is none of that name.
    pub fn site(&self, name: &str) -> &Site {
        match self.sites.iter().find(|site| site.name == name) {
            Some(site) => site,
            None => panic!("the lab has no computer `{name}`"),
        }
    }

    /// All computers.
    pub fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// The network between them.
    pub fn internet(&self) -> &Internet {
        &self.internet
    }

    /// What was made, for whoever looks for leftovers.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Where its owner keeps files.
    pub fn state(&self) -> &Path {
        &self.record.state_root
    }

    /// Ends all processes in it and removes it.
    ///
    /// # Errors
    /// When something resists.
    pub fn down(self) -> Result<(), LabError> {
        sweep(&self.record)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // After `down` there is nothing left to do; after a panic this is the only chance.
        let _ = sweep(&self.record);
    }
}

/// The network between the sites: it routes, and bridges nothing.
#[derive(Debug)]
pub struct Internet {
    namespace: Namespace,
    attached: u8,
}

impl Internet {
    pub(crate) fn lay(namespace: Namespace) -> Result<Self, LabError> {
        namespace.create()?;
        namespace.ip(&["address", "add", &format!("{INTERNET_ADDRESS}/32"), "dev", "lo"])?;
        namespace.sysctl("ipv4/ip_forward", "1")?;
        Ok(Self { namespace, attached: 0 })
    }

    /// Runs `work` on a machine of the internet itself, whose address is [`INTERNET_ADDRESS`].
    ///
    /// # Errors
    /// Those of `work`, and when the network is gone.
    pub fn enter<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, LabError> {
        self.namespace.enter(work)
    }

    /// Loses this share of the packets between sites, each way, in thousandths.
    ///
    /// # Errors
    /// When the kernel refuses the rule.
    pub fn lose(&self, per_thousand: u16) -> Result<(), LabError> {
        self.namespace.nft(&format!(
            "table ip loss {{\n}}\nflush table ip loss\ntable ip loss {{\n chain forward {{\n  type filter hook forward priority filter\n\
             numgen random mod 1000 < {per_thousand} drop\n }}\n}}\n"
        ))
    }

    /// Delays everything between a site and the internet, each way, until what is returned is dropped. Sizes of packets are
    /// limited no more by [`Site::set_mtu`] meanwhile.
    ///
    /// # Errors
    /// When the kernel refuses.
    ///
    /// # Panics
    /// When there is no such uplink.
    pub fn delay(&self, site: &Site, uplink: usize, delay: Duration) -> Result<Delay, LabError> {
        let Some(uplink) = site.uplinks.get(uplink) else { panic!("{} has no uplink {uplink}", site.name) };
        let [(outer, device), (_, port)] = &uplink.wire;
        Delay::lay(&self.namespace, port, (outer, device), &format!("{}/32", uplink.public), delay)
    }

    /// Plugs `device` of `outer` into the internet; the number of the connection gives the address.
    fn attach(&mut self, outer: &Namespace, device: &str) -> Result<(u8, Ipv4Addr), LabError> {
        self.attached += 1;
        let number = self.attached;
        let (port, address) = (format!("w{number}"), Ipv4Addr::new(203, 0, 113, 10 + number));
        self.namespace.ip(&["link", "add", &port, "type", "veth", "peer", "name", device, "netns", outer.name()])?;
        self.namespace.ip(&["link", "set", &port, "up"])?;
        self.namespace.ip(&["route", "add", &format!("{address}/32"), "dev", &port])?;
        outer.ip(&["address", "add", &format!("{address}/32"), "dev", device])?;
        Ok((number, address))
    }
}

/// A computer and the routers before it.
#[derive(Debug, Clone)]
pub struct Site {
    name: String,
    prefix: String,
    computer: Namespace,
    uplinks: Vec<Uplink>,
}

/// One way of a computer to the internet.
#[derive(Debug, Clone)]
pub struct Uplink {
    /// What stands in the way.
    pub nat: Nat,
    /// The computer's address on it.
    pub address: Ipv4Addr,
    /// The address that the internet sees.
    pub public: Ipv4Addr,
    /// The computer's interface.
    pub device: String,
    gateway: Ipv4Addr,
    /// Both ends of the wire to the internet.
    wire: [(Namespace, String); 2],
}

impl Site {
    pub(crate) fn lay(prefix: &str, spec: &SiteSpec, internet: &mut Internet) -> Result<Self, LabError> {
        let computer = Namespace::named(format!("{prefix}-{}", spec.name));
        computer.create()?;
        let mut uplinks = Vec::new();
        for (at, nat) in spec.uplinks.iter().enumerate() {
            uplinks.push(Uplink::lay(prefix, &spec.name, &computer, at, *nat, internet)?);
        }
        let site = Self { name: spec.name.clone(), prefix: prefix.to_owned(), computer, uplinks };
        site.switch_to(0)?;
        Ok(site)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name of its namespace, as `ip netns` knows it.
    pub fn netns(&self) -> &str {
        self.computer.name()
    }

    /// Its ways to the internet.
    pub fn uplinks(&self) -> &[Uplink] {
        &self.uplinks
    }

    /// Takes the plug of every other uplink out and this one in, as when somebody leaves the house with a telephone.
    ///
    /// # Errors
    /// When the network is gone.
    ///
    /// # Panics
    /// When there is no such uplink.
    pub fn switch_to(&self, at: usize) -> Result<(), LabError> {
        for (_, other) in self.uplinks.iter().enumerate().filter(|(other, _)| *other != at) {
            self.computer.ip(&["link", "set", &other.device, "down"])?;
        }
        let Some(uplink) = self.uplinks.get(at) else { panic!("{} has no uplink {at}", self.name) };
        let (device, gateway) = (uplink.device.as_str(), uplink.gateway.to_string());
        self.computer.ip(&["link", "set", device, "up"])?;
        self.computer.ip(&["route", "replace", &format!("{gateway}/32"), "dev", device])?;
        self.computer.ip(&["route", "replace", "default", "via", &gateway, "dev", device])
    }

    /// Takes every plug out; [`Site::switch_to`] puts one in again.
    ///
    /// # Errors
    /// When the network is gone.
    pub fn unplug(&self) -> Result<(), LabError> {
        self.uplinks.iter().try_for_each(|uplink| self.computer.ip(&["link", "set", &uplink.device, "down"]))
    }

    /// Limits the size of packets on the wire between the outermost router and the internet.
    ///
    /// # Errors
    /// When the network is gone.
    pub fn set_mtu(&self, uplink: usize, bytes: u16) -> Result<(), LabError> {
        for (namespace, device) in self.uplinks.get(uplink).into_iter().flat_map(|uplink| &uplink.wire) {
            namespace.ip(&["link", "set", device, "mtu", &bytes.to_string()])?;
        }
        Ok(())
    }

    /// A program to be run on the computer, as root and with nothing of the lab's environment but where programs are.
    ///
    /// # Errors
    /// When the computer is gone.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command, LabError> {
        let mut command = Command::new(program);
        command.env_clear().env("LANG", "C.UTF-8").env("PATH", crate::lab::PATH).env(MARK, &self.prefix);
        self.computer.inside(&mut command)?;
        Ok(command)
    }

    /// Runs `work` in a thread on the computer: sockets that it makes stay there.
    ///
    /// # Errors
    /// Those of `work`, and when the computer is gone.
    pub fn enter<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, LabError> {
        self.computer.enter(work)
    }

    /// Its place below `/run/netns`.
    pub fn path(&self) -> PathBuf {
        self.computer.path()
    }
}

impl Uplink {
    fn lay(
        prefix: &str,
        site: &str,
        computer: &Namespace,
        at: usize,
        nat: Nat,
        internet: &mut Internet,
    ) -> Result<Self, LabError> {
        let device = format!("eth{at}");
        let routers: Vec<(Namespace, Router)> = nat
            .routers()
            .iter()
            .map(|(kind, router)| (Namespace::named(format!("{prefix}-{site}-{kind}{at}")), *router))
            .collect();
        let Some((outermost, _)) = routers.last() else {
            let (number, address) = internet.attach(computer, &device)?;
            let wire = [(computer.clone(), device.clone()), (internet.namespace.clone(), format!("w{number}"))];
            return Ok(Self { nat, address, public: address, device, gateway: INTERNET_ADDRESS, wire });
        };
        for (router, _) in &routers {
            router.create()?;
            router.sysctl("ipv4/ip_forward", "1")?;
        }
        let (number, public) = internet.attach(outermost, "wan")?;
        outermost.ip(&["link", "set", "wan", "up"])?;
        outermost.ip(&["route", "add", &INTERNET_ADDRESS.to_string(), "dev", "wan"])?;
        outermost.ip(&["route", "add", "default", "via", &INTERNET_ADDRESS.to_string()])?;
        // From the internet inwards; `outside` is the address of the router at hand.
        let mut outside = public;
        for (depth, (router, kind)) in routers.iter().enumerate().rev() {
            router.nft(&kind.rules(outside))?;
            // The innermost network is a home; what lies between two routers is the carrier's (RFC 6598).
            let (inner, name, gateway, below) = match depth.checked_sub(1).and_then(|inner| routers.get(inner)) {
                None => {
                    (computer, device.as_str(), Ipv4Addr::new(192, 168, 1, 1), Ipv4Addr::new(192, 168, 1, 10 + number))
                }
                Some((inner, _)) => {
                    (inner, "wan", Ipv4Addr::new(100, 64, number, 1), Ipv4Addr::new(100, 64, number, 2))
                }
            };
            router.ip(&["link", "add", "lan", "type", "veth", "peer", "name", name, "netns", inner.name()])?;
            router.ip(&["address", "add", &format!("{gateway}/24"), "dev", "lan"])?;
            router.ip(&["link", "set", "lan", "up"])?;
            inner.ip(&["address", "add", &format!("{below}/24"), "dev", name])?;
            if depth > 0 {
                inner.ip(&["link", "set", "wan", "up"])?;
                inner.ip(&["route", "add", "default", "via", &gateway.to_string()])?;
            }
            outside = below;
        }
        let wire = [(outermost.clone(), "wan".to_owned()), (internet.namespace.clone(), format!("w{number}"))];
        Ok(Self { nat, address: outside, public, device, gateway: Ipv4Addr::new(192, 168, 1, 1), wire })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_as_they_are_written() {
        for nat in Nat::ALL {
            assert_eq!(nat.to_string().parse::<Nat>().unwrap(), nat);
        }
        assert!("hard".parse::<Nat>().unwrap_err().to_string().contains("full-cone"));
    }

    #[test]
    fn who_meets_whom_does_not_depend_on_the_order() {
        for a in Nat::ALL {
            for b in Nat::ALL {
                assert_eq!(a.meets(b), b.meets(a), "{a} and {b}");
            }
        }
        assert!(Nat::PortRestricted.meets(Nat::Carrier));
        assert!(Nat::Symmetric.meets(Nat::AddressRestricted));
        assert!(!Nat::Symmetric.meets(Nat::PortRestricted));
    }
}
