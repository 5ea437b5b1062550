//! People, machines, targets and ports as they are typed and shown.

use clan_api::{ApiProblem, ErrorCode};
use clan_ledger::{Party, PortRange, Protocol, State, Target};
use clan_types::Role;

use super::nothing;

/// As [`read_party`] reads it; of somebody who is gone, the id.
pub(super) fn party(state: &State, party: &Party) -> String {
    match party {
        Party::Everybody => "everybody".to_owned(),
        Party::Role(Role::Guest) => "guests".to_owned(),
        Party::Role(Role::Member) => "members".to_owned(),
        Party::Role(Role::Admin) => "admins".to_owned(),
        Party::Role(Role::Owner) => "owners".to_owned(),
        Party::Group(name) => format!("group:{name}"),
        Party::Person(id) => match state.people.get(id) {
            Some(person) => format!("person:{}", person.name),
            None => format!("person:{id}"),
        },
        Party::Machine(id) => match state.machines.get(id) {
            Some(machine) => format!("machine:{}", machine.name),
            None => format!("machine:{id}"),
        },
        Party::Peer(wg) => match state.peers.get(wg) {
            Some(peer) => format!("machine:{}", peer.name),
            None => format!("machine:{wg}"),
        },
    }
}

/// Reads who is meant; names are looked up among those in good standing.
pub(super) fn read_party(state: &State, text: &str) -> Result<Party, ApiProblem> {
    let text = text.trim();
    let role = match text {
        "everybody" => return Ok(Party::Everybody),
        "guests" => Some(Role::Guest),
        "members" => Some(Role::Member),
        "admins" => Some(Role::Admin),
        "owners" => Some(Role::Owner),
        _ => None,
    };
    if let Some(role) = role {
        return Ok(Party::Role(role));
    }
    match text.split_once(':') {
        Some(("group", name)) => {
            let name = name.parse().map_err(|e| unclear(text, e))?;
            if !state.groups.contains_key(&name) {
                return Err(nothing("group", name.as_str(), "clan group list"));
            }
            Ok(Party::Group(name))
        }
        Some(("person", name)) => {
            let name = name.parse().map_err(|e| unclear(text, e))?;
            let found = state.person_named(&name).map(|(id, _)| Party::Person(*id));
            found.ok_or_else(|| nothing("person", name.as_str(), "clan members"))
        }
        Some(("machine", name)) => {
            let name: clan_types::MachineName = name.parse().map_err(|e| unclear(text, e))?;
            let machine = state.machine_named(&name).map(|(id, _)| Party::Machine(*id));
            let peer = || state.good_peers().find(|(_, peer)| peer.name == name).map(|(wg, _)| Party::Peer(*wg));
            machine.or_else(peer).ok_or_else(|| nothing("machine", name.as_str(), "clan machines"))
        }
        _ => Err(unclear(text, "it begins with none of these words")),
    }
}

/// As [`read_target`] reads it.
pub(super) fn target(state: &State, target: &Target) -> String {
    match target {
        Target::Machines(who) => party(state, who),
        Target::Own => "own".to_owned(),
        Target::Services => "services".to_owned(),
        Target::Service(name) => format!("service:{name}"),
    }
}

/// Reads what is reached.
pub(super) fn read_target(state: &State, text: &str) -> Result<Target, ApiProblem> {
    match text.trim() {
        "own" => Ok(Target::Own),
        "services" => Ok(Target::Services),
        text => match text.split_once(':') {
            Some(("service", name)) => Ok(Target::Service(name.parse().map_err(|e| unclear(text, e))?)),
            _ => read_party(state, text).map(Target::Machines),
        },
    }
}

fn unclear(text: &str, why: impl std::fmt::Display) -> ApiProblem {
    ApiProblem::new(ErrorCode::BadRequest, format!("`{text}` is nobody and nothing that a rule can name"))
        .why(why.to_string())
        .hint("write everybody, members, admins, owners, person:NAME, machine:NAME or group:NAME")
        .hint("what a rule lets reach may also be own, services or service:NAME")
}

/// As [`read_ports`] reads it.
pub(super) fn ports(range: &PortRange) -> String {
    let protocol = match range.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Ping => return "ping".to_owned(),
    };
    if range.first == range.last {
        format!("{protocol}/{}", range.first)
    } else {
        format!("{protocol}/{}-{}", range.first, range.last)
    }
}

/// Reads ports.
pub(super) fn read_ports(text: &str) -> Result<PortRange, ApiProblem> {
    let lower = text.trim().to_ascii_lowercase();
    if lower == "ping" {
        return Ok(PortRange { protocol: Protocol::Ping, first: 0, last: u16::MAX });
    }
    let read = || {
        let (protocol, numbers) = lower.split_once('/')?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return None,
        };
        let (first, last) = numbers.split_once('-').unwrap_or((numbers, numbers));
        let (first, last) = (first.parse().ok()?, last.parse().ok()?);
        (0 < first && first <= last).then_some(PortRange { protocol, first, last })
    };
    read().ok_or_else(|| {
        ApiProblem::new(ErrorCode::BadRequest, format!("`{text}` names no ports"))
            .hint("write tcp/22, udp/5000-5010 or ping")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_shown_as_they_are_typed() {
        for text in ["tcp/22", "udp/5000-5010", "ping", "tcp/1-65535"] {
            assert_eq!(ports(&read_ports(text).unwrap()), text);
        }
        for text in ["", "22", "tcp/", "tcp/0", "tcp/9-8", "tcp/70000", "icmp/1", "tcp/1-2-3", "udp/-1"] {
            assert!(read_ports(text).is_err(), "{text}");
        }
    }

    #[test]
    fn words_are_shown_as_they_are_typed() {
        let state = State::default();
        for text in ["everybody", "guests", "members", "admins", "owners"] {
            assert_eq!(party(&state, &read_party(&state, text).unwrap()), text);
        }
        for text in ["own", "services", "service:web", "admins"] {
            assert_eq!(target(&state, &read_target(&state, text).unwrap()), text);
        }
        for text in ["", "anna", "person:anna", "group:kids", "machine:nas", "service:", "role:admin"] {
            assert!(read_target(&state, text).is_err(), "{text}");
        }
    }
}
