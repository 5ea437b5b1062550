//! Whoever goes takes nobody with them, whatever time they say it is.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod common;

use std::collections::BTreeMap;

use clan_ledger::{Body, Entry, Standing};
use clan_types::{Hlc, PersonId, Role, Timestamp};
use common::{Clan, at, key, machine, person};
use proptest::prelude::*;

/// Signs what follows in somebody's log at a time of their choice, which is later than their last entry's.
fn back_dated(clan: &mut Clan, n: u8, wall: Timestamp, body: Body) -> Entry {
    let head = clan.ledger.head(person(&key(n)).into()).unwrap();
    let before = clan.ledger.get(&head.id).unwrap().time();
    let time = (Hlc { wall, counter: 0 }).max(before.next(at(0)));
    let entry = Entry::sign(&key(n), Some(&clan.ledger.clan()), head.seq + 1, Some(head.id), time, body).unwrap();
    clan.ledger.insert(entry.clone()).unwrap();
    entry
}

fn standing(clan: &Clan) -> BTreeMap<PersonId, (Role, Standing)> {
    clan.ledger.state().people.iter().map(|(id, known)| (*id, (known.role, known.standing))).collect()
}

#[test]
fn a_back_dated_farewell_voids_nobodys_coming() {
    for last in 0..3 {
        let mut clan = Clan::new();
        clan.join(2, 1, Role::Member);
        let start = clan.now;
        // An admin, let in by the founder, whom only the member's machine has seen coming.
        clan.invite(1, 50, Role::Admin, 1);
        let admission = clan.ask(3, 50);
        clan.enrol(3);
        clan.countersign(2, &admission);
        assert_eq!(clan.role(3), Some(Role::Admin));
        let id = person(&key(2));
        let body = match last {
            0 => Body::Leave,
            1 => Body::Remove { machine: machine(&key(102)) },
            _ => Body::RevokePerson { person: id, last: clan.ledger.head(id.into()) },
        };
        let entry = back_dated(&mut clan, 2, at(start), body);
        assert!(entry.time().wall < at(clan.now - 1), "before the coming");
        assert_eq!((clan.reason(&entry), clan.reason(&admission)), (None, None));
        assert_eq!((clan.role(3), clan.has_machine(3)), (Some(Role::Admin), true));
        assert!(!clan.has_machine(2));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Members 2 to 9 come, each by an invite of somebody who may and by any machine that is in. Then some go.
    #[test]
    fn whoever_stays_is_what_they_were(
        comings in prop::collection::vec((any::<u8>(), any::<u8>(), 0u8..3), 8),
        goings in prop::collection::vec((2u8..=9, 0u8..3, 0u64..400), 1..12),
    ) {
        let mut clan = Clan::new();
        let mut admins = vec![1u8];
        for (number, (inviter, witness, role)) in comings.iter().enumerate() {
            let newcomer = 2 + u8::try_from(number).unwrap();
            let by = admins[usize::from(*inviter) % admins.len()];
            // Owners alone make admins.
            let role = if by == 1 && *role == 2 { Role::Admin } else { Role::Member };
            clan.invite(by, 50 + newcomer, role, 1);
            let admission = clan.ask(newcomer, 50 + newcomer);
            clan.enrol(newcomer);
            clan.countersign(1 + witness % (newcomer - 1), &admission);
            if role == Role::Admin {
                admins.push(newcomer);
            }
            prop_assert!(clan.has_machine(newcomer));
        }
        let before = standing(&clan);
        let (start, end) = (at(0), clan.now);
        let mut gone = Vec::new();
        for (who, how, when) in &goings {
            let id = person(&key(*who));
            let body = match how {
                0 => Body::Leave,
                1 => Body::Remove { machine: machine(&key(100 + who)) },
                _ => Body::RevokePerson { person: id, last: clan.ledger.head(id.into()) },
            };
            let wall = Timestamp::from_millis(start.as_millis() + when * (at(end).as_millis() - start.as_millis()) / 400);
            back_dated(&mut clan, *who, wall, body);
            gone.push(id);
        }
        let after = standing(&clan);
        for (id, known) in before.iter().filter(|(id, _)| !gone.contains(id)) {
            prop_assert_eq!(after.get(id), Some(known), "of those who stay");
        }
        for n in (1u8..=9).filter(|n| !gone.contains(&person(&key(*n)))) {
            prop_assert!(clan.has_machine(n), "machine {}", n);
        }
    }
}
