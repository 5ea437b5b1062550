//! Who may reach what: groups and rules. Data only; whoever receives packets goes by it.

use std::collections::{BTreeMap, BTreeSet};

use clan_types::{GroupName, MachineId, PersonId, Role, RuleName, ServiceName, WgPublicKey};
use serde::{Deserialize, Serialize};

/// People and machines, in words that a rule uses. A person stands for their machines.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Party {
    /// Everybody of the clan.
    Everybody,
    /// People of at least this role.
    Role(Role),
    /// A group; none of that name: nobody.
    Group(GroupName),
    /// One person.
    Person(PersonId),
    /// One machine.
    Machine(MachineId),
    /// One standard WireGuard machine.
    Peer(WgPublicKey),
}

/// What a rule lets reach.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Target {
    /// Machines.
    Machines(Party),
    /// The machines of the same person.
    Own,
    /// Every service that machines offer to the clan, on its own ports.
    Services,
    /// One service, on its own ports, wherever it runs.
    Service(ServiceName),
}

/// A protocol over IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Echo requests; ports mean nothing.
    Ping,
}

/// Ports of a protocol, `first` to `last`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortRange {
    /// The protocol.
    pub protocol: Protocol,
    /// The first port.
    pub first: u16,
    /// The last, included. Before `first`: none.
    pub last: u16,
}

impl PortRange {
    /// One port.
    pub const fn one(protocol: Protocol, port: u16) -> Self {
        Self { protocol, first: port, last: port }
    }

    /// Whether it covers a port.
    pub const fn contains(&self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

/// An access rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessRule {
    /// Who may reach
    pub from: Party,
    /// what,
    pub to: Target,
    /// and there which ports; none given: all (of a service: its own).
    pub ports: Vec<PortRange>,
    /// Who made it; `None`: the clan began with it.
    pub by: Option<PersonId>,
}

/// A group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Who is in it.
    pub members: BTreeSet<Party>,
    /// Who said so last.
    pub by: PersonId,
}

/// What a clan begins with: everybody reaches what is offered to the clan and may see whether a machine is there,
/// people reach their own machines, and admins the SSH of all.
pub(crate) fn first_rules() -> BTreeMap<RuleName, AccessRule> {
    let everybody = || Party::Everybody;
    let all = || Target::Machines(Party::Everybody);
    let rules = [
        ("own", everybody(), Target::Own, Vec::new()),
        ("ping", everybody(), all(), vec![PortRange { protocol: Protocol::Ping, first: 0, last: u16::MAX }]),
        ("services", everybody(), Target::Services, Vec::new()),
        ("ssh", Party::Role(Role::Admin), all(), vec![PortRange::one(Protocol::Tcp, 22)]),
    ];
    let named = rules.into_iter().filter_map(|(name, from, to, ports)| {
        let name = name.parse().ok()?;
        Some((name, AccessRule { from, to, ports, by: None }))
    });
    named.collect()
}
