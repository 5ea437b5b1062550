//! What a machine reports to its manager about the clan.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use clan_ledger::{Peer, Standing};
use clan_os::wireguard::{PathChoice, WgPeerStatus, Wireguard};
use clan_types::{ControlMode, MachineId, PeerAddr, Timestamp, WgPublicKey, mesh_address, peer_address};
use clan_wire::control::{MachineStatus, NodeStatus, PathKind, PathStatus, PersonStatus, ServiceStatus};
use iroh::{TransportAddr, endpoint::Connection};

use crate::{
    core::{View, now},
    mesh, relay,
};

/// A session of WireGuard lives no longer than this (`Reject-After-Time`): whoever has not renewed it is gone.
const STANDARD_THERE: Duration = Duration::from_secs(180);

/// The machines, and how they are reached.
pub(crate) async fn machines(view: &View, wireguard: Option<&Wireguard>) -> Vec<MachineStatus> {
    let paths = match wireguard {
        Some(wireguard) => mesh::paths(wireguard).await,
        None => Default::default(),
    };
    let relays = relay::known(view);
    view.state
        .good_machines()
        .map(|(id, machine)| {
            let beacon = view.beacons.get(id);
            let this = *id == view.machine;
            MachineStatus {
                id: *id,
                name: machine.name.clone(),
                owner: machine.owner,
                address: mesh_address(&view.clan, id),
                this,
                path: if this { Some(local()) } else { path(view, paths.get(id), view.links.get(id)) },
                last_seen: beacon.map(|b| b.made),
                version: beacon.map(|b| b.version.clone()),
                certificate: beacon.and_then(|b| b.certificate),
                relay: relays.iter().find(|(relay, _)| relay == id).map(|(_, relay)| relay.clone()),
                wireguard: beacon.map(|b| b.wireguard.clone()).unwrap_or_default(),
                behind: None,
                control: beacon.map(|b| b.control),
                image: beacon.and_then(|b| b.image),
            }
        })
        .chain(view.state.good_peers().map(|(wg, peer)| standard(view, wg, peer, &paths)))
        .collect()
}

/// Assembles the report.
pub(crate) async fn report(view: &View, control: ControlMode, wireguard: Option<&Wireguard>) -> NodeStatus {
    let mut machines = machines(view, wireguard).await;
    // Its beacon tells others of a change a moment later.
    machines.iter_mut().filter(|machine| machine.this).for_each(|machine| machine.control = Some(control));
    let relays = relay::known(view);
    NodeStatus {
        clan: view.clan,
        clan_name: view.clan_name.clone(),
        machine: view.machine,
        control,
        quic: view.addresses_of(&view.machine).addrs,
        relays: relays.iter().map(|(_, relay)| relay.clone()).collect(),
        people: view
            .state
            .people
            .iter()
            .filter(|(_, person)| person.standing == Standing::Good)
            .map(|(id, person)| PersonStatus { id: *id, name: person.name.clone(), role: person.role })
            .collect(),
        pending: view
            .state
            .pending
            .iter()
            .map(|(id, newcomer)| PersonStatus { id: *id, name: newcomer.name.clone(), role: newcomer.role })
            .collect(),
        services: services(view, &machines),
        machines,
        entries: view.entries,
        problems: view.problems.clone(),
    }
}

/// Machines that are told of at most.
pub(crate) const MAX_OTHERS: usize = 16;

/// Other machines that were heard of lately, those with an address that the whole internet may reach first. One that has
/// what newcomers run is among the first two, if there is any: a link names few, and a newcomer gets the image from those.
pub(crate) fn others(view: &View) -> Vec<PeerAddr> {
    let at = now();
    let published = view.state.published.as_ref().map(|published| published.description.image);
    let mut others: Vec<Other> = view
        .beacons
        .iter()
        .filter(|(id, beacon)| **id != view.machine && View::is_fresh(beacon, at) && !beacon.quic.is_empty())
        .filter(|(id, _)| view.state.machine_in_good_standing(id).is_some())
        .map(|(id, beacon)| {
            let mut addrs = beacon.quic.clone();
            addrs.sort_by_key(|addr| !is_public(addr.ip()));
            Other {
                hidden: !addrs.iter().any(|addr| is_public(addr.ip())),
                gives: beacon.image.is_some() && beacon.image == published,
                peer: PeerAddr { machine: *id, addrs },
            }
        })
        .collect();
    rank(&mut others);
    others.truncate(MAX_OTHERS);
    others.into_iter().map(|other| other.peer).collect()
}

/// Another machine, and what makes it worth naming.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Other {
    /// Whether nobody outside its own network may reach it.
    hidden: bool,
    /// Whether it has the image that newcomers run.
    gives: bool,
    peer: PeerAddr,
}

fn rank(others: &mut [Other]) {
    others.sort_by_key(|other| (other.hidden, !other.gives));
    let first = others.iter().position(|other| other.gives);
    if let Some(behind) = first.filter(|first| *first > 1).and_then(|first| others.get_mut(1..=first)) {
        behind.rotate_right(1);
    }
}

/// Whether an address is nobody's private one (RFC 1918, 6598, 4193).
fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let carrier = ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64;
            !(ip.is_private() || ip.is_link_local() || ip.is_loopback() || carrier)
        }
        IpAddr::V6(ip) => !(ip.is_unique_local() || ip.is_unicast_link_local() || ip.is_loopback()),
    }
}

/// A standard WireGuard machine. Only the machine in front of it knows whether it is there.
fn standard(view: &View, wg: &WgPublicKey, peer: &Peer, paths: &BTreeMap<MachineId, WgPeerStatus>) -> MachineStatus {
    let id = mesh::standard_id(wg);
    let known = paths.get(&id).filter(|status| status.last_handshake.is_some_and(|ago| ago < STANDARD_THERE));
    let path = known.and_then(|status| match status.path {
        PathChoice::Direct { addr, .. } => Some(PathStatus {
            kind: PathKind::Direct,
            remote: Some(addr),
            rtt_us: None,
            why: "it has shaken hands from this address".to_owned(),
        }),
        PathChoice::Carrier => None,
    });
    MachineStatus {
        id,
        name: peer.name.clone(),
        owner: peer.owner,
        address: peer_address(&view.clan, wg),
        this: false,
        path,
        last_seen: known.and_then(|status| status.last_handshake).map(|ago| before(now(), ago)),
        version: None,
        certificate: None,
        relay: None,
        wireguard: Vec::new(),
        behind: Some(peer.via),
        control: None,
        image: None,
    }
}

fn before(now: Timestamp, ago: Duration) -> Timestamp {
    Timestamp::from_millis(now.as_millis().saturating_sub(u64::try_from(ago.as_millis()).unwrap_or(u64::MAX)))
}

fn services(view: &View, machines: &[MachineStatus]) -> Vec<ServiceStatus> {
    let mut services: Vec<ServiceStatus> = Vec::new();
    for machine in machines {
        let Some(beacon) = view.beacons.get(&machine.id) else { continue };
        let reachable = machine.this || (machine.path.is_some() && View::is_fresh(beacon, now()));
        services.extend(beacon.services.iter().map(|offer| ServiceStatus {
            name: offer.name.clone(),
            title: offer.title.clone(),
            kind: offer.kind,
            machine: machine.name.clone(),
            port: offer.port,
            healthy: offer.healthy && reachable,
        }));
    }
    services.sort_by(|a, b| (&a.name, &a.machine).cmp(&(&b.name, &b.machine)));
    services
}

fn local() -> PathStatus {
    PathStatus { kind: PathKind::Local, remote: None, rtt_us: None, why: "this machine".to_owned() }
}

fn path(view: &View, status: Option<&WgPeerStatus>, link: Option<&Connection>) -> Option<PathStatus> {
    if let Some(WgPeerStatus { path: PathChoice::Direct { addr, rtt }, .. }) = status {
        return Some(PathStatus {
            kind: PathKind::Direct,
            remote: Some(*addr),
            rtt_us: Some(u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
            why: "a probe of this address was answered".to_owned(),
        });
    }
    let link = link?;
    let paths = link.paths();
    // Right after a connection was made anew none may be marked as the one in use.
    let selected = paths.iter().find(|p| p.is_selected()).or_else(|| paths.iter().next())?;
    let rtt_us = Some(u64::try_from(selected.rtt().as_micros()).unwrap_or(u64::MAX));
    Some(match selected.remote_addr() {
        TransportAddr::Ip(addr) => PathStatus {
            kind: PathKind::QuicDirect,
            remote: Some(*addr),
            rtt_us,
            why: "no WireGuard address of the machine answers; its QUIC address does".to_owned(),
        },
        TransportAddr::Relay(url) => {
            let via = relay::machine_at(view, url).map_or_else(|| "a relay".to_owned(), |name| name.to_string());
            PathStatus {
                kind: PathKind::Relayed,
                remote: None,
                rtt_us,
                why: format!("relayed via {via}, because no address of the machine answers directly"),
            }
        }
        _ => PathStatus {
            kind: PathKind::Relayed,
            remote: None,
            rtt_us,
            why: "no address of the machine answers".to_owned(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By their numbers.
    fn ranked(others: &[(u8, bool, bool)]) -> Vec<u8> {
        let other = |&(n, hidden, gives): &(u8, bool, bool)| {
            let peer = PeerAddr { machine: MachineId::from_bytes([n; 32]), addrs: Vec::new() };
            Other { hidden, gives, peer }
        };
        let mut others: Vec<Other> = others.iter().map(other).collect();
        rank(&mut others);
        others.iter().map(|other| other.peer.machine.as_bytes()[0]).collect()
    }

    #[test]
    fn a_link_names_public_machines_and_one_that_gives_the_image() {
        assert!(ranked(&[]).is_empty());
        assert_eq!(ranked(&[(1, true, true)]), [1]);
        assert_eq!(ranked(&[(1, true, true), (2, false, false), (3, true, false)]), [2, 1, 3]);
        assert_eq!(ranked(&[(1, false, false), (2, false, true), (3, true, true)]), [2, 1, 3]);
        let integrated = [(1, false, false), (2, false, false), (3, false, false), (4, true, true), (5, true, true)];
        assert_eq!(ranked(&integrated), [1, 4, 2, 3, 5], "not crowded out");
        assert_eq!(ranked(&[(1, true, false), (2, false, false)]), [2, 1], "nobody has it");
    }
}
