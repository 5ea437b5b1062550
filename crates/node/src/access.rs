//! Who may reach what here, as the ledger's rules say: worked out once for each change of what this machine knows.

use std::{collections::BTreeMap, net::IpAddr};

use clan_ledger::{AccessRule, Node, Party, PortRange, Protocol, Target};
use clan_os::wireguard::{Access, Policy, Transport};
use clan_types::{MachineId, PersonId};

use crate::{
    core::View,
    host::DNS_PORT,
    mesh::{machine_addresses, peer_addresses, standard_id},
};

/// Who may reach what on this machine, and on each standard WireGuard machine behind it.
pub(crate) fn policies(view: &View) -> (Policy, BTreeMap<MachineId, Policy>) {
    let senders = senders(view);
    let here = Node::Machine(view.machine);
    let mut own = Policy::default();
    for sender in &senders {
        let mut access = access(view, sender, &here);
        // Machines behind this one have no name server of their own.
        if sender.behind == Some(view.machine)
            && let Access::Ports { ports, .. } = &mut access
        {
            ports.extend([Transport::Tcp, Transport::Udp].map(|transport| (transport, DNS_PORT..=DNS_PORT)));
        }
        sender.addresses.iter().for_each(|address| own.allow(*address, access.clone()));
    }
    let mut behind = BTreeMap::new();
    for (wg, _) in view.state.good_peers().filter(|(_, peer)| peer.via == view.machine) {
        let there = Node::Peer(*wg);
        let mut policy = Policy::default();
        for sender in senders.iter().filter(|sender| sender.node != there) {
            let access = access(view, sender, &there);
            sender.addresses.iter().for_each(|address| policy.allow(*address, access.clone()));
        }
        behind.insert(standard_id(wg), policy);
    }
    (own, behind)
}

/// Somebody whose packets may come.
struct Sender {
    node: Node,
    owner: PersonId,
    addresses: Vec<IpAddr>,
    /// The machine that speaks the mesh for it.
    behind: Option<MachineId>,
}

fn senders(view: &View) -> Vec<Sender> {
    let machines = view.state.good_machines().map(|(id, machine)| Sender {
        node: Node::Machine(*id),
        owner: machine.owner,
        addresses: machine_addresses(view, id, machine),
        behind: None,
    });
    let peers = view.state.good_peers().map(|(wg, peer)| Sender {
        node: Node::Peer(*wg),
        owner: peer.owner,
        addresses: peer_addresses(view, wg, peer),
        behind: Some(peer.via),
    });
    machines.chain(peers).collect()
}

/// What all rules together let a sender reach on a machine.
fn access(view: &View, sender: &Sender, target: &Node) -> Access {
    let (mut ports, mut ping) = (Vec::new(), false);
    for rule in view.state.rules.values().filter(|rule| view.state.is_meant(&sender.node, &rule.from)) {
        match reaches(view, rule, sender, target) {
            Reach::Nothing => {}
            Reach::Everything if rule.ports.is_empty() => return Access::Everything,
            Reach::Everything => {
                for range in &rule.ports {
                    match transport(range) {
                        Some(transport) => ports.push((transport, range.first..=range.last)),
                        None => ping = true,
                    }
                }
            }
            Reach::Ports(offered) => {
                let open = offered.into_iter().filter(|port| {
                    let covered = |range: &PortRange| range.protocol == Protocol::Tcp && range.contains(*port);
                    rule.ports.is_empty() || rule.ports.iter().any(covered)
                });
                ports.extend(open.map(|port| (Transport::Tcp, port..=port)));
            }
        }
    }
    ports.sort_by_key(|(transport, range)| (*transport, *range.start(), *range.end()));
    ports.dedup();
    Access::Ports { ports, ping }
}

enum Reach {
    Nothing,
    Everything,
    /// TCP ports of services that are offered there.
    Ports(Vec<u16>),
}

fn reaches(view: &View, rule: &AccessRule, sender: &Sender, target: &Node) -> Reach {
    let everything = |meant: bool| if meant { Reach::Everything } else { Reach::Nothing };
    let offered = || {
        let Node::Machine(machine) = target else { return Vec::new() };
        view.beacons.get(machine).map(|beacon| beacon.services.clone()).unwrap_or_default()
    };
    match &rule.to {
        Target::Machines(party) => everything(is_meant(view, target, party)),
        Target::Own => everything(owner(view, target) == Some(sender.owner)),
        Target::Services => Reach::Ports(offered().into_iter().map(|service| service.port).collect()),
        Target::Service(name) => {
            Reach::Ports(offered().into_iter().filter(|s| s.name == *name).map(|service| service.port).collect())
        }
    }
}

fn is_meant(view: &View, node: &Node, party: &Party) -> bool {
    view.state.is_meant(node, party)
}

fn owner(view: &View, node: &Node) -> Option<PersonId> {
    match node {
        Node::Machine(id) => view.state.machine_in_good_standing(id).map(|machine| machine.owner),
        Node::Peer(wg) => view.state.good_peers().find(|(id, _)| *id == wg).map(|(_, peer)| peer.owner),
    }
}

fn transport(range: &PortRange) -> Option<Transport> {
    match range.protocol {
        Protocol::Tcp => Some(Transport::Tcp),
        Protocol::Udp => Some(Transport::Udp),
        Protocol::Ping => None,
    }
}
