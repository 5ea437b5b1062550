//! Whatever is written, and however it travels: the same entries amount to the same state, and nobody gains a right
//! that nobody gave them.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use clan_ledger::{Body, Entry, Ledger, Standing};
use clan_types::{Hlc, Role};
use common::*;
use proptest::prelude::*;

/// Keys 1 to 5 are people who may get real invites (secrets 50 to 53), 101 to 105 their machines; 6 and 7 are outsiders
/// who know no secret but their own (60, 61). Anyone may sign anything.
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
    let author = prop_oneof![3 => Just(1u8), 4 => 2u8..=5, 1 => 6u8..=7, 3 => 101u8..=105, 1 => 106u8..=107];
    let shift = prop_oneof![6 => Just(0i64), 2 => -200i64..200, 1 => Just(2_000_000)];
    let back = prop_oneof![7 => Just(0u8), 1 => 1u8..4];
    let one = (author, 0u8..14, 1u8..=7, 0u8..4, shift, back)
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
    for n in (1..=7).chain(101..=107) {
        let log = all.iter().filter(|entry| entry.author() == person(&key(n)).into()).cloned().collect();
        logs.insert(n, log);
    }
    let id = clan.ledger.clan();
    for step in moves {
        clan.now += 1;
        let log = &logs[&step.author];
        let outsider = matches!(step.author, 6 | 7 | 106 | 107);
        let secret = if outsider { 60 + step.number % 2 } else { 50 + step.number };
        let admissions: Vec<_> =
            all.iter().filter(|entry| matches!(entry.body(), Body::Admission { .. })).map(Entry::id).collect();
        let subject = person(&key(step.subject));
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
                    approval: false,
                }
            }
            7 => enrolment(step.subject),
            8 => Body::Remove { machine: machine(&key(100 + step.subject)) },
            9 => Body::RevokePerson { person: subject, last: clan.ledger.head(subject.into()) },
            10 => Body::RevokePerson { person: subject, last: None },
            11 => clan.ledger.revocation_of_machine(&machine(&key(100 + step.subject))),
            12 => Body::RevokeInvite { invite: invite(&key(secret)) },
            _ => Body::Leave,
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
    fn nobody_gains_a_right_that_was_not_given(moves in moves()) {
        let (ledger, all) = play(&moves);
        let state = ledger.state();
        let by_author = |id: clan_ledger::AuthorId| all.iter().filter(move |entry| entry.author() == id);
        let mut redeemed = BTreeMap::<_, u32>::new();
        for (id, known) in &state.people {
            prop_assert!(!(6..=7).any(|n| person(&key(n)) == *id), "an outsider is in");
            let Some(inviter) = known.invited_by else {
                prop_assert_eq!(*id, person(&key(1)), "only the founder comes uninvited");
                continue;
            };
            let used: Vec<_> = by_author((*id).into())
                .filter_map(|entry| match entry.body() {
                    Body::Admission { invite, .. } => state.invites.get(invite).map(|made| (*invite, made)),
                    _ => None,
                })
                .filter(|(_, made)| made.by == inviter && made.role == known.role)
                .collect();
            prop_assert!(!used.is_empty(), "{known:?} shows no invite for this role");
            let inviters_role = state.people[&inviter].role;
            prop_assert!(inviters_role >= Role::Admin && (known.role < Role::Admin || inviters_role == Role::Owner));
            if let [(invite, _)] = used.as_slice() {
                *redeemed.entry(*invite).or_default() += 1;
            }
        }
        for (id, made) in &state.invites {
            prop_assert!(made.used <= made.uses);
            prop_assert!(redeemed.get(id).copied().unwrap_or(0) <= made.used, "more came in than the invite counts");
            let made = by_author(made.by.into())
                .any(|entry| matches!(entry.body(), Body::Invite { invite, .. } if invite == id));
            prop_assert!(made, "nobody signed this invite");
        }
        for (id, known) in &state.machines {
            let enrolled = by_author(known.owner.into())
                .any(|entry| matches!(entry.body(), Body::Enrol { machine, .. } if machine == id));
            prop_assert!(enrolled && state.people[&known.owner].role >= Role::Member);
        }
        let good: Vec<_> = state.people.values().filter(|known| known.standing == Standing::Good).collect();
        let names: BTreeSet<_> = good.iter().map(|known| &known.name).collect();
        prop_assert_eq!(names.len(), good.len(), "two people bear one name");
        let names: BTreeSet<_> = state.good_machines().map(|(_, known)| &known.name).collect();
        prop_assert_eq!(names.len(), state.good_machines().count(), "two machines bear one name");
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
