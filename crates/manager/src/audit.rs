//! The clan's ledger in plain sentences: who decided what, when, and whether it counts.

use std::collections::HashMap;

use clan_api::{ApiProblem, AuthorKind, ClanLog, ClanLogEntry};
use clan_ledger::{AuthorId, Body, Device, DeviceKind, Entry, Ledger, Party, PortRange, Protocol, State, Target};
use clan_types::{DeviceId, EntryId, InviteId, MachineId, PersonId, PersonName, Role};

use crate::{clan::Clan, problem, sign};

/// More entries are not asked for at once.
const MAX_LIMIT: u32 = 10_000;

/// The newest entries of a clan's ledger, newest last.
pub(crate) async fn log(clan: &Clan, limit: u32) -> Result<ClanLog, ApiProblem> {
    Ok(tell(&sign::ledger(clan).await?, limit.min(MAX_LIMIT)))
}

fn tell(ledger: &Ledger, limit: u32) -> ClanLog {
    let names = Names::new(ledger);
    let void: HashMap<EntryId, String> =
        names.state.void.iter().map(|v| (v.entry, problem::with_sources(&v.reason))).collect();
    let mut entries: Vec<&Entry> = ledger.entries().collect();
    entries.sort_by_key(|e| (e.time(), e.id()));
    let shown = entries.len().saturating_sub(usize::try_from(limit).unwrap_or(usize::MAX));
    let told = entries[shown..].iter().map(|entry| {
        let author = entry.author();
        let machine = matches!(entry.body(), Body::Countersign { .. });
        let (by, author_name) = if machine {
            (AuthorKind::Machine, names.machine(&author.machine()))
        } else {
            let person = names.state.person_of(&author).unwrap_or_else(|| author.person());
            (AuthorKind::Person, names.person(&person))
        };
        ClanLogEntry {
            id: entry.id(),
            at: entry.time().wall,
            by,
            author: author.to_string(),
            author_name,
            what: names.sentence(entry),
            void: void.get(&entry.id()).cloned(),
        }
    });
    ClanLog { total: entries.len() as u64, entries: told.collect() }
}

/// Who is called what.
struct Names<'a> {
    state: &'a State,
    /// Who wrote an admission, by its entry, those who never came in included.
    newcomers: HashMap<EntryId, (PersonId, &'a PersonName)>,
    /// What people call themselves in their admission.
    asked_as: HashMap<PersonId, &'a PersonName>,
    /// Which invite they redeem.
    redeemed: HashMap<PersonId, &'a InviteId>,
    /// By the entry that gave a new name: the old one.
    old_names: HashMap<EntryId, String>,
}

impl<'a> Names<'a> {
    fn new(ledger: &'a Ledger) -> Self {
        let (mut newcomers, mut asked_as) = (HashMap::new(), HashMap::new());
        let (mut redeemed, mut named) = (HashMap::new(), Vec::new());
        for entry in ledger.entries() {
            let person = entry.author().person();
            match entry.body() {
                Body::Found { founder, .. } => named.push((entry, AuthorId::from(person), founder.to_string())),
                Body::Admission { name, invite, .. } => {
                    newcomers.insert(entry.id(), (person, name));
                    asked_as.insert(person, name);
                    redeemed.insert(person, invite);
                    named.push((entry, person.into(), name.to_string()));
                }
                Body::Enrol { machine, name, .. } => named.push((entry, (*machine).into(), name.to_string())),
                Body::RenamePerson { person, name } => named.push((entry, (*person).into(), name.to_string())),
                Body::RenameMachine { machine, name } => named.push((entry, (*machine).into(), name.to_string())),
                _ => {}
            }
        }
        named.sort_by_key(|(entry, ..)| (entry.time(), entry.id()));
        let (mut names, mut old_names) = (HashMap::<AuthorId, String>::new(), HashMap::new());
        for (entry, subject, name) in named {
            if let Some(old) = names.insert(subject, name) {
                old_names.insert(entry.id(), old);
            }
        }
        Self { state: ledger.state(), newcomers, asked_as, redeemed, old_names }
    }

    /// Somebody who never came in is never shown by a bare name, which could be a member's.
    fn person(&self, id: &PersonId) -> String {
        match (self.state.people.get(id), self.asked_as.get(id)) {
            (Some(person), _) => person.name.to_string(),
            (None, Some(name)) => format!("{} (wants to be {name})", id.short()),
            (None, None) => id.short(),
        }
    }

    fn machine(&self, id: &MachineId) -> String {
        self.state.machines.get(id).map_or_else(|| id.short(), |machine| machine.name.to_string())
    }

    fn machine_of(&self, id: &MachineId) -> String {
        match self.state.machines.get(id) {
            Some(machine) => format!("the machine {} of {}", machine.name, self.person(&machine.owner)),
            None => format!("the machine {}", id.short()),
        }
    }

    fn sentence(&self, entry: &Entry) -> String {
        let old = |now: String| self.old_names.get(&entry.id()).cloned().unwrap_or(now);
        match entry.body() {
            Body::Found { clan, founder, .. } => format!("founded the clan {clan} as {founder}"),
            Body::Enrol { name, .. } => format!("added the machine {name}"),
            Body::Remove { machine } => format!("took {} out", self.machine_of(machine)),
            Body::Invite { invite, role, uses, approval, .. } => {
                let who = if *uses == 1 { "one person".to_owned() } else { format!("up to {uses} people") };
                let then = if *approval { ", each to be approved" } else { "" };
                format!("invited {who} as {role}{then} ({})", invite.short())
            }
            Body::Admission { invite, name, .. } => {
                let by = self.state.invites.get(invite).map_or_else(|| "nobody".to_owned(), |i| self.person(&i.by));
                format!("asked to come in as {name}, invited by {by} ({})", invite.short())
            }
            Body::Countersign { admission } => match self.newcomers.get(admission) {
                Some((person, _)) if self.awaits_approval(person) => {
                    format!("passed on the request of {}", self.person(person))
                }
                Some((person, name)) if self.state.people.contains_key(person) => format!("let {name} in"),
                Some((person, _)) => format!("let {} in", self.person(person)),
                None => "let somebody in whose request is not known here".to_owned(),
            },
            Body::Publish { description } => format!(
                "put the virtual machine \"{}\" in force (image {})",
                description.title,
                description.image.short()
            ),
            Body::PublishVm { description, setup } => {
                let applications: Vec<String> = setup.applications.iter().map(ToString::to_string).collect();
                let with = match applications.as_slice() {
                    [] => String::new(),
                    names => format!(" with {}", names.join(", ")),
                };
                format!(
                    "put the virtual machine \"{}\"{with} in force (image {}, network {}, steered by: {})",
                    description.title,
                    description.image.short(),
                    setup.network,
                    setup.control
                )
            }
            Body::SuggestControl { control } => {
                format!("suggested to newcomers that their machines are steered by: {control}")
            }
            Body::RevokePerson { person, .. } => format!("put {} out of the clan", self.person(person)),
            Body::RevokeMachine { machine, .. } => format!("put {} out of the clan", self.machine_of(machine)),
            Body::RevokeInvite { invite } => match self.state.invites.get(invite) {
                Some(known) => format!("withdrew the invite {} of {}", invite.short(), self.person(&known.by)),
                None => format!("withdrew the invite {}", invite.short()),
            },
            Body::Leave => "left the clan".to_owned(),
            Body::SetRole { person, role, .. } => format!("made {} {role}", self.person(person)),
            Body::RenamePerson { person, name } => format!("renamed {} to {name}", old(self.person(person))),
            Body::RenameMachine { machine, name } => {
                format!("renamed the machine {} to {name}", old(self.machine(machine)))
            }
            Body::Approve { admission } => format!("approved {}", self.newcomer(admission)),
            Body::Deny { admission } => format!("denied {}", self.newcomer(admission)),
            Body::AddDevice { name, kind: DeviceKind::Device, .. } => format!("added the device {name}"),
            Body::AddDevice { name, kind: DeviceKind::Recovery, .. } => format!("made a recovery phrase ({name})"),
            Body::RevokeDevice { device, .. } => format!("put {} out", self.device(device)),
            Body::Relay { machine, host, port, .. } => {
                format!("made {} a relay at {host} port {port}", self.machine_of(machine))
            }
            Body::RelayOff { machine } => format!("made {} a relay no more", self.machine_of(machine)),
            Body::AddPeer { name, via, .. } => {
                format!("added the WireGuard machine {name} behind {}", self.machine_of(via))
            }
            Body::RemovePeer { wg } => match self.state.peers.get(wg) {
                Some(peer) => format!("took the WireGuard machine {} of {} out", peer.name, self.person(&peer.owner)),
                None => format!("took the WireGuard machine {} out", wg.short()),
            },
            Body::Group { name, members } => {
                let members: Vec<String> = members.iter().map(|party| self.party(party)).collect();
                format!("made the group {name}: {}", list(&members, "nobody"))
            }
            Body::DropGroup { name } => format!("dropped the group {name}"),
            Body::Rule { name, from, to, ports } => {
                let to = match to {
                    Target::Machines(party @ (Party::Machine(_) | Party::Peer(_))) => self.party(party),
                    Target::Machines(party) => format!("the machines of {}", self.party(party)),
                    Target::Own => "their own machines".to_owned(),
                    Target::Services => "all services".to_owned(),
                    Target::Service(service) => format!("the service {service}"),
                };
                let ports: Vec<String> = ports.iter().map(port).collect();
                let on = if ports.is_empty() { String::new() } else { format!(" on {}", ports.join(", ")) };
                format!("made the rule {name}: {} may reach {to}{on}", self.party(from))
            }
            Body::DropRule { name } => format!("dropped the rule {name}"),
        }
    }

    fn awaits_approval(&self, newcomer: &PersonId) -> bool {
        let invite = self.redeemed.get(newcomer).and_then(|invite| self.state.invites.get(invite));
        invite.is_some_and(|invite| invite.approval)
    }

    fn newcomer(&self, admission: &EntryId) -> String {
        match self.newcomers.get(admission) {
            Some((person, name)) if self.state.people.contains_key(person) => name.to_string(),
            Some((person, _)) => self.person(person),
            None => "somebody whose request is not known here".to_owned(),
        }
    }

    fn device(&self, id: &DeviceId) -> String {
        match self.state.devices.get(id) {
            Some(Device { name: Some(name), owner, .. }) => format!("the device {name} of {}", self.person(owner)),
            Some(Device { name: None, owner, .. }) => format!("the first device of {}", self.person(owner)),
            None => format!("the device {}", id.short()),
        }
    }

    fn party(&self, party: &Party) -> String {
        match party {
            Party::Everybody => "everybody".to_owned(),
            Party::Role(Role::Owner) => "every owner".to_owned(),
            Party::Role(role) => format!("everybody from {role} up"),
            Party::Group(name) => format!("the group {name}"),
            Party::Person(person) => self.person(person),
            Party::Machine(machine) => self.machine_of(machine),
            Party::Peer(wg) => match self.state.peers.get(wg) {
                Some(peer) => format!("the WireGuard machine {}", peer.name),
                None => format!("the WireGuard machine {}", wg.short()),
            },
        }
    }
}

fn list(items: &[String], none: &str) -> String {
    if items.is_empty() { none.to_owned() } else { items.join(", ") }
}

fn port(range: &PortRange) -> String {
    let protocol = match range.protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
        Protocol::Ping => return "ping".to_owned(),
    };
    if range.first == range.last {
        format!("{protocol} port {}", range.first)
    } else {
        format!("{protocol} ports {} to {}", range.first, range.last)
    }
}

#[cfg(test)]
mod tests {
    use clan_types::{CertificateHash, WgPublicKey};

    use super::*;
    use crate::authority::tests::{at, clan, key, machine, person, say};

    fn lines(log: &ClanLog) -> String {
        let line = |e: &ClanLogEntry| {
            let void = e.void.as_ref().map(|why| format!(" [no effect: {why}]")).unwrap_or_default();
            format!("{:?} {} {}{void}", e.by, e.author_name, e.what)
        };
        log.entries.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn every_entry_is_a_sentence_and_a_void_one_says_why() {
        let mut ledger = clan();
        for body in ledger.revocation_of_person(&person(4)) {
            say(&mut ledger, &key(2), body);
        }
        // A member may not invite, a member may not put an owner out, and somebody out says nothing any more.
        let invite = InviteId::from_bytes(key(60).verifying_key().to_bytes());
        say(
            &mut ledger,
            &key(5),
            Body::Invite { invite, role: Role::Owner, uses: 3, expires: at(9000), approval: false },
        );
        let revoke = ledger.revocation_of_machine(&machine(1));
        say(&mut ledger, &key(5), revoke);
        say(&mut ledger, &key(4), Body::Leave);
        let stranger = Body::admission(&key(60), &ledger.clan(), &person(9), "anna".parse().unwrap());
        say(&mut ledger, &key(9), stranger);
        say(&mut ledger, &key(3), Body::RevokeInvite { invite });
        insta::assert_snapshot!(lines(&tell(&ledger, 1000)), @r"
        Person anna founded the clan family as anna
        Person anna added the machine annas-laptop
        Person anna invited one person as admin (iztcpvjhop)
        Person ben asked to come in as ben, invited by anna (iztcpvjhop)
        Person ben added the machine bens-laptop
        Machine annas-laptop let ben in
        Person anna invited one person as admin (ykdfkswhsw)
        Person carl asked to come in as carl, invited by anna (ykdfkswhsw)
        Person carl added the machine carls-laptop
        Machine annas-laptop let carl in
        Person anna invited one person as member (zjl65uyojj)
        Person dora asked to come in as dora, invited by anna (zjl65uyojj)
        Person dora added the machine doras-laptop
        Machine annas-laptop let dora in
        Person anna invited one person as member (7skhomhut2)
        Person emil asked to come in as emil, invited by anna (7skhomhut2)
        Person emil added the machine emils-laptop
        Machine annas-laptop let emil in
        Person ben put the machine doras-laptop of dora out of the clan
        Person ben put dora out of the clan
        Person emil invited up to 3 people as owner (kutpoquuc4) [no effect: its author's role does not allow it]
        Person emil put the machine annas-laptop of anna out of the clan [no effect: its author's role does not allow it]
        Person dora left the clan [no effect: its author was revoked]
        Person 7ulsioc2ud (wants to be anna) asked to come in as anna, invited by nobody (kutpoquuc4) [no effect: no machine of the clan has countersigned the admission]
        Person carl withdrew the invite kutpoquuc4
        ");
    }

    #[test]
    fn roles_names_devices_relays_and_rules_are_told_as_well() {
        let mut ledger = clan();
        let before = ledger.len();
        let promotion = ledger.role_change(&person(4), Role::Admin);
        say(&mut ledger, &key(1), promotion);
        let (id, name) = (ledger.clan(), "phone".parse().unwrap());
        say(&mut ledger, &key(4), Body::add_device(&key(40), &id, &AuthorId::of(&key(4)), name, DeviceKind::Device));
        let name = "paper".parse().unwrap();
        say(&mut ledger, &key(4), Body::add_device(&key(41), &id, &AuthorId::of(&key(4)), name, DeviceKind::Recovery));
        say(&mut ledger, &key(40), Body::RenamePerson { person: person(4), name: "theodora".parse().unwrap() });
        say(&mut ledger, &key(40), Body::RenameMachine { machine: machine(4), name: "nas".parse().unwrap() });
        let revocation = ledger.revocation_of_device(&AuthorId::of(&key(4)).device());
        say(&mut ledger, &key(41), revocation);
        let invite = InviteId::from_bytes(key(60).verifying_key().to_bytes());
        let invite = Body::Invite { invite, role: Role::Guest, uses: 2, expires: at(9000), approval: true };
        say(&mut ledger, &key(2), invite);
        let admissions: Vec<_> = [(8, "finn"), (9, "gina")]
            .into_iter()
            .map(|(n, name)| {
                let body = Body::admission(&key(60), &id, &person(n), name.parse().unwrap());
                let admission = say(&mut ledger, &key(n), body).id();
                say(&mut ledger, &key(101), Body::Countersign { admission });
                admission
            })
            .collect();
        say(&mut ledger, &key(2), Body::Approve { admission: admissions[0] });
        say(&mut ledger, &key(2), Body::Deny { admission: admissions[1] });
        let (host, certificate) = ("relay.example.org".parse().unwrap(), CertificateHash::from_bytes([1; 32]));
        say(&mut ledger, &key(2), Body::Relay { machine: machine(2), host, port: 443, certificate });
        say(&mut ledger, &key(2), Body::RelayOff { machine: machine(2) });
        let wg = WgPublicKey::from_bytes([70; 32]);
        say(&mut ledger, &key(2), Body::AddPeer { wg, name: "bens-phone".parse().unwrap(), via: machine(2) });
        let members = vec![Party::Person(person(8)), Party::Peer(wg), Party::Role(Role::Owner)];
        say(&mut ledger, &key(2), Body::Group { name: "kids".parse().unwrap(), members });
        let ports = vec![
            PortRange::one(Protocol::Tcp, 80),
            PortRange { protocol: Protocol::Udp, first: 5000, last: 5010 },
            PortRange::one(Protocol::Ping, 0),
        ];
        let (from, to) = (Party::Group("kids".parse().unwrap()), Target::Machines(Party::Machine(machine(1))));
        say(&mut ledger, &key(2), Body::Rule { name: "films".parse().unwrap(), from, to, ports });
        say(&mut ledger, &key(2), Body::DropRule { name: "ssh".parse().unwrap() });
        say(&mut ledger, &key(2), Body::DropGroup { name: "kids".parse().unwrap() });
        say(&mut ledger, &key(2), Body::RemovePeer { wg });
        let told = tell(&ledger, 1000);
        let new = ClanLog { total: told.total, entries: told.entries[before..].to_vec() };
        insta::assert_snapshot!(lines(&new), @r"
        Person anna made theodora admin
        Person theodora added the device phone
        Person theodora made a recovery phrase (paper)
        Person theodora renamed dora to theodora
        Person theodora renamed the machine doras-laptop to nas
        Person theodora put the first device of theodora out
        Person ben invited up to 2 people as guest, each to be approved (kutpoquuc4)
        Person finn asked to come in as finn, invited by ben (kutpoquuc4)
        Machine annas-laptop passed on the request of finn
        Person 7ulsioc2ud (wants to be gina) asked to come in as gina, invited by ben (kutpoquuc4) [no effect: the admission was denied]
        Machine annas-laptop passed on the request of 7ulsioc2ud (wants to be gina)
        Person ben approved finn
        Person ben denied 7ulsioc2ud (wants to be gina)
        Person ben made the machine bens-laptop of ben a relay at relay.example.org port 443
        Person ben made the machine bens-laptop of ben a relay no more
        Person ben added the WireGuard machine bens-phone behind the machine bens-laptop of ben
        Person ben made the group kids: finn, the WireGuard machine bens-phone, every owner
        Person ben made the rule films: the group kids may reach the machine annas-laptop of anna on TCP port 80, UDP ports 5000 to 5010, ping
        Person ben dropped the rule ssh
        Person ben dropped the group kids
        Person ben took the WireGuard machine bens-phone of ben out
        ");
    }

    #[test]
    fn the_newest_come_last_and_no_more_than_asked_for() {
        let ledger = clan();
        let all = tell(&ledger, 1000);
        assert_eq!(all.total, ledger.len() as u64);
        assert_eq!(all.entries.len(), ledger.len());
        assert!(all.entries.windows(2).all(|w| w[0].at <= w[1].at));
        let some = tell(&ledger, 3);
        assert_eq!(some.entries, all.entries[all.entries.len() - 3..]);
        assert_eq!(some.total, all.total);
        assert!(tell(&ledger, 0).entries.is_empty());
    }
}
