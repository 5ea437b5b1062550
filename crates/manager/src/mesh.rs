//! Standard WireGuard machines, access rules and groups: what the person wants, checked and signed.

mod words;

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
};

use clan_api::{
    AddWireguard, ApiProblem, ErrorCode, GroupInfo, RemoveNamed, RuleInfo, SetGroup, SetRule, WireguardMachine,
};
use clan_ledger::{Body, Ledger, Party, State};
use clan_types::{
    IPV4_PREFIX, MachineId, PersonId, PersonName, Role, WgPublicKey, clan_prefix, ipv4_candidates, mesh_address,
    peer_address,
};
use clan_wire::control::NodeStatus;
use data_encoding::BASE64;

use crate::{authority::not_allowed, clan::Clan, sign};

/// Signs what `decision` comes to, unless that was only to be found out.
async fn settle<T>(
    clan: &Clan,
    dry_run: bool,
    decision: impl FnOnce(&Ledger) -> Result<(T, Vec<Body>), ApiProblem>,
) -> Result<T, ApiProblem> {
    if dry_run {
        return decision(&sign::ledger(clan).await?).map(|(outcome, _)| outcome);
    }
    sign::decide_all(clan, decision).await.map(|(outcome, _)| outcome)
}

/// Admits a standard WireGuard machine, and says what it has to be told.
pub(crate) async fn add_wireguard(clan: &Clan, request: &AddWireguard) -> Result<WireguardMachine, ApiProblem> {
    let status = clan.state().await?;
    let (author, here) = (clan.person(), status.machine);
    let wg = public_key(&request.public_key)?;
    let mut machine = settle(clan, request.dry_run, |ledger| add(ledger, &author, here, request, wg)).await?;
    machine.0.endpoints = endpoints(&status, &machine.1);
    if !request.dry_run {
        tracing::info!(clan = %clan.name(), machine = %request.name, "standard WireGuard machine added");
    }
    Ok(machine.0)
}

fn add(
    ledger: &Ledger,
    author: &PersonId,
    here: MachineId,
    request: &AddWireguard,
    wg: WgPublicKey,
) -> Result<((WireguardMachine, MachineId), Vec<Body>), ApiProblem> {
    let (state, clan) = (ledger.state(), ledger.clan());
    let found = match &request.via {
        Some(name) => state.machine_named(name),
        None => state.good_machines().find(|(id, _)| **id == here),
    };
    let Some((via, front)) = found else {
        let name = request.via.as_ref().map_or_else(|| "of this computer".to_owned(), |name| format!("called {name}"));
        return Err(ApiProblem::new(ErrorCode::NotFound, format!("there is no machine {name} in the clan"))
            .hint("see the machines: `clan machines`; name one: `--via MACHINE`"));
    };
    let role = role(state, author)?;
    if role < Role::Member {
        return Err(not_allowed(state, role, Role::Member, "add machines", None));
    }
    if front.owner != *author && role < Role::Admin {
        let act = format!("put a machine behind {}", front.name);
        let reason = state.people.get(&front.owner).map(|owner| format!("it is a machine of {}", owner.name));
        return Err(not_allowed(state, role, Role::Admin, &act, reason));
    }
    if state.is_node_name(&request.name) {
        return Err(ApiProblem::new(
            ErrorCode::BadRequest,
            format!("there is a machine called {} already", request.name),
        )
        .hint("choose another name"));
    }
    let body = Body::AddPeer { wg, name: request.name.clone(), via: *via };
    let mut addresses = vec![IpAddr::from(peer_address(&clan, &wg))];
    // As the fold will choose, if nobody else is added at the same moment.
    let taken: HashSet<_> =
        state.machines.values().map(|m| m.ipv4).chain(state.peers.values().map(|p| p.ipv4)).collect();
    let mut candidates = ipv4_candidates(&clan, wg.as_bytes()).take(64);
    addresses.extend(candidates.find(|address| !taken.contains(address)).map(IpAddr::from));
    let (prefix, bits) = clan_prefix(&clan);
    let machine = WireguardMachine {
        name: request.name.clone(),
        clan_name: state
            .clan_name
            .clone()
            .ok_or_else(|| ApiProblem::new(ErrorCode::Internal, "a clan without name"))?,
        addresses,
        dns: mesh_address(&clan, via).into(),
        networks: vec![format!("{prefix}/{bits}"), format!("{}/{}", IPV4_PREFIX.0, IPV4_PREFIX.1)],
        via: front.name.clone(),
        via_key: BASE64.encode(front.wg.as_bytes()),
        endpoints: Vec::new(),
    };
    Ok(((machine, *via), vec![body]))
}

/// Takes a standard WireGuard machine out.
pub(crate) async fn remove_wireguard(clan: &Clan, request: &RemoveNamed) -> Result<(), ApiProblem> {
    let author = clan.person();
    settle(clan, request.dry_run, |ledger| {
        let state = ledger.state();
        let Some((wg, peer)) = state.good_peers().find(|(_, peer)| peer.name.as_str() == request.name.trim()) else {
            let problem = ApiProblem::new(
                ErrorCode::NotFound,
                format!("there is no standard WireGuard machine called `{}` in the clan", request.name),
            );
            return Err(problem.hint("a machine of another kind is put out by `clan revoke machine`"));
        };
        let role = role(state, &author)?;
        let front = state.machines.get(&peer.via).map(|machine| machine.owner);
        let theirs = state.people.get(&peer.owner).map_or(Role::Guest, |person| person.role);
        let needed = theirs.max(Role::Admin);
        if peer.owner != author && front != Some(author) && role < needed {
            return Err(not_allowed(state, role, needed, &format!("take {} out", peer.name), None));
        }
        Ok(((), vec![Body::RemovePeer { wg: *wg }]))
    })
    .await
}

/// The rules in force.
pub(crate) async fn rules(clan: &Clan) -> Result<Vec<RuleInfo>, ApiProblem> {
    let ledger = sign::ledger(clan).await?;
    let state = ledger.state();
    let info = |(name, rule): (&clan_types::RuleName, &clan_ledger::AccessRule)| RuleInfo {
        name: name.clone(),
        from: words::party(state, &rule.from),
        to: words::target(state, &rule.to),
        ports: rule.ports.iter().map(words::ports).collect(),
        by: rule.by.and_then(|by| person_name(state, &by)),
    };
    Ok(state.rules.iter().map(info).collect())
}

/// Makes or replaces a rule.
pub(crate) async fn set_rule(clan: &Clan, request: &SetRule) -> Result<RuleInfo, ApiProblem> {
    let author = clan.person();
    settle(clan, request.dry_run, |ledger| {
        let state = ledger.state();
        admin(state, &author, "make rules")?;
        let from = words::read_party(state, &request.from)?;
        let to = words::read_target(state, &request.to)?;
        let ports = request.ports.iter().map(|text| words::read_ports(text)).collect::<Result<Vec<_>, _>>()?;
        let info = RuleInfo {
            name: request.name.clone(),
            from: words::party(state, &from),
            to: words::target(state, &to),
            ports: ports.iter().map(words::ports).collect(),
            by: person_name(state, &author),
        };
        let same = state.rules.get(&request.name).is_some_and(|r| r.from == from && r.to == to && r.ports == ports);
        let body = Body::Rule { name: request.name.clone(), from, to, ports };
        Ok((info, if same { Vec::new() } else { vec![body] }))
    })
    .await
}

/// Takes a rule away.
pub(crate) async fn drop_rule(clan: &Clan, request: &RemoveNamed) -> Result<(), ApiProblem> {
    let author = clan.person();
    settle(clan, request.dry_run, |ledger| {
        let state = ledger.state();
        admin(state, &author, "take rules away")?;
        let named = state.rules.keys().find(|name| name.as_str() == request.name.trim());
        let name = named.ok_or_else(|| nothing("rule", &request.name, "clan rule list"))?;
        Ok(((), vec![Body::DropRule { name: name.clone() }]))
    })
    .await
}

/// The groups.
pub(crate) async fn groups(clan: &Clan) -> Result<Vec<GroupInfo>, ApiProblem> {
    let ledger = sign::ledger(clan).await?;
    let state = ledger.state();
    let info = |(name, group): (&clan_types::GroupName, &clan_ledger::Group)| GroupInfo {
        name: name.clone(),
        members: group.members.iter().map(|party| words::party(state, party)).collect(),
        by: person_name(state, &group.by),
    };
    Ok(state.groups.iter().map(info).collect())
}

/// Makes a group, or replaces its members.
pub(crate) async fn set_group(clan: &Clan, request: &SetGroup) -> Result<GroupInfo, ApiProblem> {
    let author = clan.person();
    settle(clan, request.dry_run, |ledger| {
        let state = ledger.state();
        admin(state, &author, "make groups")?;
        let read = |text: &String| words::read_party(state, text);
        let members = request.members.iter().map(read).collect::<Result<Vec<Party>, _>>()?;
        let info = GroupInfo {
            name: request.name.clone(),
            members: members.iter().map(|party| words::party(state, party)).collect(),
            by: person_name(state, &author),
        };
        Ok((info, vec![Body::Group { name: request.name.clone(), members }]))
    })
    .await
}

/// Takes a group away.
pub(crate) async fn drop_group(clan: &Clan, request: &RemoveNamed) -> Result<(), ApiProblem> {
    let author = clan.person();
    settle(clan, request.dry_run, |ledger| {
        let state = ledger.state();
        admin(state, &author, "take groups away")?;
        let named = state.groups.keys().find(|name| name.as_str() == request.name.trim());
        let name = named.ok_or_else(|| nothing("group", &request.name, "clan group list"))?;
        Ok(((), vec![Body::DropGroup { name: name.clone() }]))
    })
    .await
}

fn role(state: &State, person: &PersonId) -> Result<Role, ApiProblem> {
    state.role_of(person).ok_or_else(|| {
        ApiProblem::new(ErrorCode::NotAllowed, "you are not in the clan any more")
            .why("somebody has put you out, or you have left")
    })
}

fn admin(state: &State, person: &PersonId, act: &str) -> Result<(), ApiProblem> {
    let role = role(state, person)?;
    if role >= Role::Admin { Ok(()) } else { Err(not_allowed(state, role, Role::Admin, act, None)) }
}

fn person_name(state: &State, person: &PersonId) -> Option<PersonName> {
    state.people.get(person).map(|person| person.name.clone())
}

pub(super) fn nothing(kind: &str, name: &str, command: &str) -> ApiProblem {
    ApiProblem::new(ErrorCode::NotFound, format!("there is no {kind} called `{name}` in the clan"))
        .hint(format!("see what there is: `{command}`"))
}

fn public_key(text: &str) -> Result<WgPublicKey, ApiProblem> {
    let bytes = BASE64.decode(text.trim().as_bytes()).ok().and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
    bytes.filter(|bytes| *bytes != [0; 32]).map(WgPublicKey::from_bytes).ok_or_else(|| {
        ApiProblem::new(ErrorCode::BadRequest, "this is no WireGuard public key")
            .why("it has 44 characters, the last of which is `=`")
            .hint("print it: `wg pubkey < privatekey`")
    })
}

/// Where a machine may be reached from outside: public addresses before private ones.
fn endpoints(status: &NodeStatus, via: &MachineId) -> Vec<SocketAddr> {
    let there = status.machines.iter().filter(|machine| machine.id == *via);
    let mut endpoints: Vec<SocketAddr> = there.flat_map(|machine| machine.wireguard.clone()).collect();
    endpoints.sort_by_key(|addr| match addr {
        SocketAddr::V4(addr) => (addr.ip().is_private() || addr.ip().is_link_local(), false),
        SocketAddr::V6(addr) => (addr.ip().is_unique_local(), true),
    });
    endpoints
}
