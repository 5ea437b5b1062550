//! Whatever is written, and however it travels: the same entries amount to the same state, and nobody gains a right
//! that nobody gave them.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use clan_ledger::{AuthorId, Body, DeviceKind, Entry, Intake, Ledger, Party, Standing, Target};
use clan_types::{CertificateHash, EntryId, Hlc, InviteId, MachineId, PersonId, Role, WgPublicKey};
use common::*;
use proptest::prelude::*;

/// Keys 1 to 5 are people who may get real invites (secrets 50 to 53), 11 to 15 further devices of theirs, 21 to 25 their
/// recovery keys, 101 to 105 their machines; 6 and 7, with 16, 17, 26, 27, 106 and 107, are outsiders who know no secret
/// but their own (60, 61). Anyone may sign anything.
#[derive(Debug, Clone)]
struct Move {
    author: u8,
    kind: u8,
    subject: u8,
    number: u8,
    /// Into the past or the future, seconds.
    shift: i64,
    /// So many places back in the author's own log: a fork.
    back: u8,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let author = prop_oneof![
        3 => Just(1u8), 4 => 2u8..=5, 1 => 6u8..=7, 2 => 11u8..=15, 1 => 21u8..=25, 1 => 16u8..=17,
        3 => 101u8..=105, 1 => 106u8..=107
    ];
    let shift = prop_oneof![6 => Just(0i64), 2 => -200i64..200, 1 => Just(2_000_000)];
    let back = prop_oneof![7 => Just(0u8), 1 => 1u8..4];
    let one = (author, 0u8..34, 1u8..=7, 0u8..4, shift, back)
        .prop_map(|(author, kind, subject, number, shift, back)| Move { author, kind, subject, number, shift, back });
    prop::collection::vec(one, 20..90)
}

/// Signs what the moves say, honest or not, starting from a clan with an admin and an invite for everybody.
fn play(moves: &[Move]) -> (Ledger, Vec<Entry>) {
    let mut clan = Clan::new();
    clan.join(2, 1, Role::Admin);
    for number in 0..4 {
        clan.invite(1, 50 + number, [Role::Member, Role::Admin, Role::Owner, Role::Guest][usize::from(number)], 2);
    }
    for newcomer in 3..=5 {
        let admission = clan.ask(newcomer, 47 + newcomer);
        clan.enrol(newcomer);
        if newcomer != 5 {
            clan.countersign(1, &admission);
        }
    }
    let mut all: Vec<Entry> = clan.ledger.entries().cloned().collect();
    let mut logs: BTreeMap<u8, Vec<Entry>> = BTreeMap::new();
    for n in (1..=7).chain(11..=17).chain(21..=27).chain(101..=107) {
        let log = all.iter().filter(|entry| entry.author() == person(&key(n)).into()).cloned().collect();
        logs.insert(n, log);
    }
    let id = clan.ledger.clan();
    for step in moves {
        clan.now += 1;
        let log = &logs[&step.author];
        let outsider = step.author % 10 > 5;
        let secret = if outsider { 60 + step.number % 2 } else { 50 + step.number };
        let admissions: Vec<_> =
            all.iter().filter(|entry| matches!(entry.body(), Body::Admission { .. })).map(Entry::id).collect();
        let subject = person(&key(step.subject));
        let roles = [Role::Guest, Role::Member, Role::Admin, Role::Owner];
        let body = match step.kind {
            0 | 1 => Body::admission(&key(secret), &id, &person(&key(step.author)), name(&format!("p{}", step.number))),
            2..=4 => Body::Countersign { admission: admissions[usize::from(step.number) % admissions.len()] },
            5 | 6 => {
                let role = [Role::Guest, Role::Member, Role::Admin, Role::Owner][usize::from(step.subject) % 4];
                let expires = at(clan.now + 40 * u64::from(step.number));
                Body::Invite {
                    invite: invite(&key(secret)),
                    role,
                    uses: u32::from(step.number),
                    expires,
                    approval: step.number == 3,
                }
            }
            7 => enrolment(&id, &key(step.author), step.subject),
            8 => Body::Remove { machine: machine(&key(100 + step.subject)) },
            9 => Body::RevokePerson { person: subject, last: clan.ledger.head(subject.into()) },
            10 => Body::RevokePerson { person: subject, last: None },
            11 => clan.ledger.revocation_of_machine(&machine(&key(100 + step.subject))),
            12 => Body::RevokeInvite { invite: invite(&key(secret)) },
            13 => Body::Leave,
            14 | 15 => clan.ledger.role_change(&subject, roles[usize::from(step.number) % 4]),
            16 => Body::SetRole { person: subject, role: roles[usize::from(step.number) % 4], last: vec![] },
            17 | 18 => {
                let (device, kind) = match step.number {
                    3 => (20 + step.subject, DeviceKind::Recovery),
                    _ => (10 + step.subject, DeviceKind::Device),
                };
                let name = format!("d{device}").parse().unwrap();
                Body::add_device(&key(device), &id, &AuthorId::of(&key(step.author)), name, kind)
            }
            19 => clan.ledger.revocation_of_device(&device(&key(step.subject + 10 * (step.number % 3)))),
            20 => Body::RevokeDevice { device: device(&key(step.subject + 10 * (step.number % 3))), last: None },
            21 | 22 => Body::Approve { admission: admissions[usize::from(step.number) % admissions.len()] },
            23 => Body::Deny { admission: admissions[usize::from(step.number) % admissions.len()] },
            24 => Body::RenamePerson { person: subject, name: name(&format!("p{}", step.number)) },
            25 => Body::RenameMachine {
                machine: machine(&key(100 + step.subject)),
                name: machine_name(&format!("m{}", step.number)),
            },
            26 => Body::Relay {
                machine: machine(&key(100 + step.subject)),
                host: "relay.example.org".parse().unwrap(),
                port: 443,
                certificate: CertificateHash::from_bytes([step.number; 32]),
            },
            27 => Body::RelayOff { machine: machine(&key(100 + step.subject)) },
            28 | 29 => Body::AddPeer {
                wg: WgPublicKey::from_bytes([200 + step.number; 32]),
                name: machine_name(&format!("m{}", step.number)),
                via: machine(&key(100 + step.subject)),
            },
            30 => Body::RemovePeer { wg: WgPublicKey::from_bytes([200 + step.number; 32]) },
            31 => Body::Group { name: "g".parse().unwrap(), members: vec![Party::Person(subject)] },
            32 => Body::Rule {
                name: format!("r{}", step.number).parse().unwrap(),
                from: Party::Person(subject),
                to: Target::Own,
                ports: vec![],
            },
            _ => Body::DropRule { name: "ssh".parse().unwrap() },
        };
        let keep = log.len().saturating_sub(usize::from(step.back)).max(usize::from(!log.is_empty()));
        let before = log[..keep].last();
        let wanted = Hlc { wall: at(clan.now.saturating_add_signed(step.shift)), counter: 0 };
        let time = before.map_or(wanted, |before| wanted.max(before.time().next(at(0))));
        let (seq, prev) = before.map_or((0, None), |before| (before.seq() + 1, Some(before.id())));
        let Ok(entry) = Entry::sign(&key(step.author), Some(&id), seq, prev, time, body) else { continue };
        let mut log = log[..keep].to_vec();
        log.push(entry.clone());
        logs.insert(step.author, log);
        clan.ledger.insert(entry.clone()).unwrap();
        all.push(entry);
    }
    (clan.ledger, all)
}

/// The most that anybody could have been given by what was signed, whenever and by whomever revoked: what the fold
/// allows must lie within.
#[derive(Default, PartialEq, Clone)]
struct Granted {
    people: BTreeMap<PersonId, Role>,
    devices: BTreeMap<AuthorId, BTreeSet<PersonId>>,
    machines: BTreeMap<MachineId, BTreeSet<PersonId>>,
    invites: BTreeMap<InviteId, Role>,
}

impl Granted {
    fn by(all: &[Entry]) -> Self {
        let mut granted = Self::default();
        loop {
            let before = granted.clone();
            for entry in all {
                granted.take(entry, all);
            }
            if granted == before {
                return granted;
            }
        }
    }

    fn people_of(&self, author: AuthorId) -> Vec<(PersonId, Role)> {
        let owners = self.devices.get(&author).into_iter().flatten();
        owners.filter_map(|person| Some((*person, *self.people.get(person)?))).collect()
    }

    fn give(&mut self, person: PersonId, role: Role) {
        let known = self.people.entry(person).or_insert(role);
        *known = role.max(*known);
        self.devices.entry(person.into()).or_default().insert(person);
    }

    fn take(&mut self, entry: &Entry, all: &[Entry]) {
        let role = self.people_of(entry.author()).into_iter().map(|(_, role)| role).max();
        match entry.body() {
            Body::Found { .. } => self.give(entry.author().person(), Role::Owner),
            Body::Invite { invite, role: given, .. }
                if role >= Some(if *given >= Role::Admin { Role::Owner } else { Role::Admin }) =>
            {
                let known = self.invites.entry(*invite).or_insert(*given);
                *known = (*known).max(*given);
            }
            Body::Countersign { admission } if self.machines.contains_key(&entry.author().machine()) => {
                let asked = all.iter().find(|entry| entry.id() == *admission);
                if let Some(Body::Admission { invite, .. }) = asked.map(Entry::body)
                    && let Some(role) = self.invites.get(invite)
                {
                    self.give(asked.unwrap().author().person(), *role);
                }
            }
            Body::SetRole { person, role: given, .. }
                if self.people.contains_key(person)
                    && (role == Some(Role::Owner) || (role == Some(Role::Admin) && *given < Role::Admin)) =>
            {
                self.give(*person, *given);
            }
            Body::AddDevice { device, .. } => {
                let owners: Vec<_> = self.people_of(entry.author()).into_iter().map(|(person, _)| person).collect();
                self.devices.entry((*device).into()).or_default().extend(owners);
            }
            Body::Enrol { machine, .. } => {
                let owners = self.people_of(entry.author()).into_iter().filter(|(_, role)| *role >= Role::Member);
                let owners: Vec<_> = owners.map(|(person, _)| person).collect();
                if !owners.is_empty() {
                    self.machines.entry(*machine).or_default().extend(owners);
                }
            }
            _ => {}
        }
    }
}

fn sorted(ledger: &Ledger) -> BTreeSet<Vec<u8>> {
    ledger.entries().map(Entry::encode).collect()
}

/// Exchanges vectors and entries until neither side has anything for the other.
fn synchronise(a: &mut Ledger, b: &mut Ledger, limit: usize) {
    for _ in 0..400 {
        let to_b: Vec<_> = a.missing(&b.vector(), limit).into_iter().cloned().collect();
        let to_a: Vec<_> = b.missing(&a.vector(), limit).into_iter().cloned().collect();
        if to_a.is_empty() && to_b.is_empty() {
            return;
        }
        assert!(to_a.len() <= limit && to_b.len() <= limit);
        a.insert_all(to_a);
        b.insert_all(to_b);
    }
    panic!("the two never come to rest");
}

/// Takes pages until there are no more, as a newcomer does who has `known`.
fn leaf_through(whole: &Ledger, known: &Ledger, bytes: usize) -> Ledger {
    let (mut intake, vector, mut from) = (Intake::new(known.clone()), known.vector(), None);
    loop {
        let page = whole.page(&vector, from, bytes);
        let last = page.next.is_none();
        intake.take(page.entries.iter().map(|entry| entry.as_bytes()), last).expect("every page is news");
        if last {
            return intake.into_ledger();
        }
        from = page.next;
    }
}

/// Folds as entries come, and from the beginning after some of them.
fn goes_on(moves: &[Move], asked: usize) {
    let (whole, _) = play(moves);
    let mut entries: Vec<_> = whole.entries().cloned().collect();
    entries.sort_by_key(|entry| (entry.time(), entry.id()));
    let mut on = Ledger::open(whole.clan());
    for (place, entry) in entries.iter().enumerate() {
        let _ = on.insert(entry.clone());
        let went_on = on.state().clone();
        if place % asked == 0 {
            assert_eq!(&went_on, on.clone().state(), "after {entry:?}");
        }
    }
    assert_eq!(on.state(), whole.state());
}

#[test]
fn whoever_would_come_in_but_for_a_revocation_is_weighed_as_from_the_beginning() {
    let step = |author, kind, subject| Move { author, kind, subject, number: 0, shift: 0, back: 0 };
    // Not in yet, 5 puts out 1, who invited them; 2 puts out 3, whose machine lets 5 in.
    goes_on(&[step(1, 0, 1), step(5, 9, 1), step(2, 9, 3), step(103, 2, 1)], 1);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_order_with_duplicates_amounts_to_the_same(
        (moves, order) in moves().prop_flat_map(|moves| {
            let indices: Vec<usize> = (0..moves.len() + 30).chain(0..20).collect();
            (Just(moves), Just(indices).prop_shuffle())
        }),
    ) {
        let (first, all) = play(&moves);
        let mut second = Ledger::open(first.clan());
        for index in order.iter().copied().chain(0..all.len()) {
            if let Some(entry) = all.get(index) {
                let _ = second.insert(entry.clone());
                if index % 7 == 0 {
                    let _ = second.state();
                }
            }
        }
        let mut third = Ledger::open(first.clan());
        third.insert_all(all.iter().rev().cloned());
        prop_assert_eq!(first.state(), second.state());
        prop_assert_eq!(first.state(), third.state());
        prop_assert_eq!(sorted(&first), sorted(&second));
        prop_assert_eq!(sorted(&first), sorted(&third));
    }

    #[test]
    fn two_parts_of_a_clan_that_meet_again_agree(
        moves in moves(),
        sides in prop::collection::vec(0u8..4, 150),
        limit in prop_oneof![Just(6usize), Just(9), Just(1000)],
    ) {
        let (whole, all) = play(&moves);
        let (mut a, mut b) = (Ledger::open(whole.clan()), Ledger::open(whole.clan()));
        for (entry, side) in all.iter().zip(sides.iter().cycle()) {
            if *side != 1 {
                let _ = a.insert(entry.clone());
            }
            if *side != 2 {
                let _ = b.insert(entry.clone());
            }
        }
        synchronise(&mut a, &mut b, limit);
        prop_assert_eq!(a.state(), b.state());
        prop_assert_eq!(sorted(&a), sorted(&b));
        prop_assert_eq!(a.state(), whole.state());
    }

    #[test]
    fn who_leafs_through_a_ledger_has_it_all(moves in moves(), known in 0usize..60, bytes in 1usize..4000) {
        let (whole, _) = play(&moves);
        let nothing = Ledger::open(whole.clan());
        let all = leaf_through(&whole, &nothing, bytes);
        prop_assert_eq!(sorted(&all), sorted(&whole));
        prop_assert_eq!(all.state(), whole.state());
        // Going on from a part: each author's log up to somewhere.
        let mut part = nothing;
        part.insert_all(whole.entries().take(known).cloned());
        let again = leaf_through(&whole, &part, bytes);
        prop_assert_eq!(sorted(&again), sorted(&whole));
    }

    #[test]
    fn nobody_gains_a_right_that_was_not_given(moves in moves()) {
        let (ledger, all) = play(&moves);
        let state = ledger.state();
        let granted = Granted::by(&all);
        for (id, known) in &state.people {
            prop_assert!(!(6..=7).any(|n| person(&key(n)) == *id), "an outsider is in");
            prop_assert!(Some(known.role) <= granted.people.get(id).copied(), "{known:?} was never given this role");
        }
        for (id, known) in &state.devices {
            let theirs = granted.devices.get(&AuthorId::from(*id));
            prop_assert!(theirs.is_some_and(|owners| owners.contains(&known.owner)), "{known:?} is nobody's");
        }
        for (id, known) in &state.machines {
            prop_assert!(granted.machines.get(id).is_some_and(|owners| owners.contains(&known.owner)), "{known:?}");
        }
        for known in state.peers.values() {
            prop_assert!(granted.people[&known.owner] >= Role::Member);
        }
        let admins = |by: &PersonId| granted.people[by] >= Role::Admin;
        prop_assert!(state.relays.values().all(|relay| granted.people[&relay.by] >= Role::Member));
        prop_assert!(state.groups.values().all(|group| admins(&group.by)));
        prop_assert!(state.rules.values().filter_map(|rule| rule.by.as_ref()).all(admins));
        for made in state.invites.values() {
            prop_assert!(made.used <= made.uses);
            let needed = if made.role >= Role::Admin { Role::Owner } else { Role::Admin };
            prop_assert!(granted.people[&made.by] >= needed);
        }
        let good: Vec<_> = state.people.values().filter(|known| known.standing == Standing::Good).collect();
        let names: BTreeSet<_> =
            good.iter().map(|known| &known.name).chain(state.pending.values().map(|known| &known.name)).collect();
        prop_assert_eq!(names.len(), good.len() + state.pending.len(), "two people bear one name");
        let names: BTreeSet<_> = state.good_machines().map(|(_, known)| &known.name)
            .chain(state.good_peers().map(|(_, known)| &known.name)).collect();
        prop_assert_eq!(names.len(), state.good_machines().count() + state.good_peers().count(), "one name twice");
        let addresses: BTreeSet<_> = state.machines.values().map(|known| known.ipv4)
            .chain(state.peers.values().map(|known| known.ipv4)).collect();
        prop_assert_eq!(addresses.len(), state.machines.len() + state.peers.len());
    }

    #[test]
    fn what_lies_beyond_a_revocation_has_no_effect_whatever_its_time(moves in moves()) {
        let (ledger, _) = play(&moves);
        let state = ledger.state();
        let void: BTreeSet<EntryId> = state.void.iter().map(|void| void.entry).collect();
        let claims = |body: &Body| matches!(
            body,
            Body::RevokePerson { .. } | Body::RevokeMachine { .. } | Body::RevokeDevice { .. } | Body::SetRole { .. }
        );
        let mut owner_went = false;
        for entry in ledger.entries().filter(|entry| !void.contains(&entry.id())) {
            owner_went |= matches!(
                entry.body(),
                Body::Leave | Body::Remove { .. } | Body::RevokePerson { .. } | Body::RevokeMachine { .. } | Body::RevokeDevice { .. }
            );
            let (author, last, machine) = match entry.body() {
                Body::RevokePerson { person, last } => (AuthorId::from(*person), last, false),
                Body::RevokeDevice { device, last } => ((*device).into(), last, false),
                Body::RevokeMachine { machine, last } => ((*machine).into(), last, true),
                _ => continue,
            };
            // A pin on a branch that lost leaves only what both branches share: that is another test.
            if last.is_some_and(|last| ledger.get(&last.id).is_none()) || state.equivocations.contains_key(&author) {
                continue;
            }
            let first_void = last.map_or(1, |last| last.seq + 1);
            let late = ledger.entries().filter(|late| late.author() == author && late.seq() >= first_void);
            for late in late.filter(|late| matches!(late.body(), Body::Countersign { .. }) == machine) {
                // A claim of somebody more senior counts before it is asked who put its author out.
                prop_assert!(void.contains(&late.id()) || claims(late.body()), "{late:?} counts after {entry:?}");
            }
        }
        let owned = state.people.values().any(|known| known.role == Role::Owner && known.standing == Standing::Good);
        prop_assert!(owned || owner_went, "the clan has no owner, and nobody left or was put out");
        // Nobody has more than the last change of their role that counts gave or left them.
        let mut roles: Vec<_> = ledger.entries().filter(|entry| !void.contains(&entry.id())).filter_map(|entry| {
            let Body::SetRole { person, role, .. } = entry.body() else { return None };
            Some((entry.time(), entry.id(), *person, *role))
        }).collect();
        roles.sort();
        let last: BTreeMap<PersonId, (Hlc, Role)> =
            roles.into_iter().map(|(time, _, person, role)| (person, (time, role))).collect();
        for (person, (time, role)) in last {
            // Who raised or lowered them may have undone their coming since.
            let Some(known) = state.people.get(&person) else { continue };
            prop_assert!(known.since > time.wall || known.role <= role, "{known:?} was made {role} at last");
        }
    }

    #[test]
    fn going_on_from_what_was_folded_comes_to_the_same(moves in moves(), asked in 1usize..5) {
        goes_on(&moves, asked);
    }

    #[test]
    fn an_invite_admits_no_more_than_its_uses_however_many_machines_countersign(
        uses in 0u32..4,
        witnessed in prop::collection::vec((1u8..4, 10u8..20, 0u64..30), 1..25),
    ) {
        let mut start = Clan::new();
        start.join(2, 1, Role::Member);
        start.join(3, 1, Role::Member);
        start.invite(1, 50, Role::Member, uses);
        let mut parts = [start.clone(), start.clone(), start.clone()];
        for (witness, newcomer, wait) in &witnessed {
            let part = &mut parts[usize::from(*witness) - 1];
            part.now += wait;
            if part.ledger.head(person(&key(*newcomer)).into()).is_none() {
                let admission = part.ask(*newcomer, 50);
                part.countersign(*witness, &admission);
            }
        }
        let mut merged = parts[0].clone();
        merged.merge(&parts[1]);
        merged.merge(&parts[2]);
        let mut backwards = parts[2].clone();
        backwards.merge(&parts[1]);
        backwards.merge(&parts[0]);
        prop_assert_eq!(merged.ledger.state(), backwards.ledger.state());
        let distinct: BTreeSet<_> = witnessed.iter().map(|(_, newcomer, _)| newcomer).collect();
        let came = u32::try_from(merged.ledger.state().people.len() - 3).unwrap();
        prop_assert!(came <= uses);
        prop_assert_eq!(came, uses.min(u32::try_from(distinct.len()).unwrap()));
    }
}
