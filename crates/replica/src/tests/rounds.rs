//! How many messages it takes.

use super::*;

const MEMBERS: u64 = 1000;

fn numbered(kind: u8, n: u64) -> SigningKey {
    let mut seed = [kind; 32];
    seed[..8].copy_from_slice(&n.to_le_bytes());
    SigningKey::from_bytes(&seed)
}

/// Person 1 with machines 101 and 102, and a thousand others.
fn large() -> Ledger {
    let mut ledger = clan();
    let invite = InviteId::from_bytes(key(51).verifying_key().to_bytes());
    let (uses, expires) = (u32::try_from(MEMBERS).unwrap(), now(86_400).wall);
    say(&mut ledger, 1, Body::Invite { invite, role: Role::Guest, uses, expires, approval: false });
    for n in 0..MEMBERS {
        let newcomer = numbered(1, n);
        let person = PersonId::from_bytes(newcomer.verifying_key().to_bytes());
        let body = Body::admission(&key(51), &ledger.clan(), &person, format!("person{n}").parse().unwrap());
        let admission = ledger.author(&newcomer, body, now(0).wall).unwrap();
        ledger.insert(admission.clone()).unwrap();
        say(&mut ledger, 101, Body::Countersign { admission: admission.id() });
    }
    assert!(ledger.state().people.len() > 1000);
    ledger
}

fn as_machine(n: u8, ledger: Ledger) -> Replica {
    let config =
        Config { key: key(n), version: "1".into(), own: Own::default(), bootstrap: vec![], seed: [0; 32], doubt: None };
    let mut replica = Replica::new(config, ledger, now(0));
    replica.handle_timeout(now(0));
    actions(&mut replica);
    replica
}

/// What a replica has to say now, beacons apart.
fn said(replica: &mut Replica) -> Vec<PeerMessage> {
    let said = settle(replica).into_iter().filter_map(|action| match action {
        Action::Send { message: PeerMessage::Beacon(_), .. } => None,
        Action::Send { message, .. } => Some(message),
        _ => None,
    });
    said.collect()
}

/// Lets two talk over their link until both are silent: who said what, in order.
fn talk(one: &mut Replica, other: &mut Replica, at: Now) -> Vec<(u8, PeerMessage)> {
    let mut all = Vec::new();
    loop {
        let (from_one, from_other) = (said(one), said(other));
        if from_one.is_empty() && from_other.is_empty() {
            return all;
        }
        for message in from_one {
            other.handle_message(LinkId(1), machine(101), message.clone(), at);
            all.push((1, message));
        }
        for message in from_other {
            one.handle_message(LinkId(1), machine(102), message.clone(), at);
            all.push((2, message));
        }
    }
}

#[test]
fn one_missing_entry_of_a_large_clan_comes_in_one_round_trip() {
    let behind = large();
    let mut ahead = behind.clone();
    let news = say(&mut ahead, 1, enrol(&behind.clan(), 1, 103));
    let (mut one, mut other) = (as_machine(101, ahead), as_machine(102, behind));
    // Both greet at once: that is the way there, and the entry is the way back.
    let (ours, theirs) = (one.vector().to_vec(), other.vector().to_vec());
    one.handle_linked(machine(102), LinkId(1), theirs, now(1));
    other.handle_linked(machine(101), LinkId(1), ours, now(1));
    assert_eq!(talk(&mut one, &mut other, now(1)), [(1, PeerMessage::Entries(vec![news.encode()]))]);
    assert_eq!(one.vector(), other.vector());
}

#[test]
fn who_has_the_same_says_so_in_a_few_bytes() {
    let behind = large();
    let mut ahead = behind.clone();
    let (mut one, mut other) = (as_machine(101, ahead.clone()), as_machine(102, behind.clone()));
    for (replica, peer) in [(&mut one, 102), (&mut other, 101)] {
        replica.handle_linked(machine(peer), LinkId(1), behind.vector(), now(1));
    }
    assert_eq!(talk(&mut one, &mut other, now(1)), []);
    other.handle_timeout(now(20));
    let compared = talk(&mut one, &mut other, now(20));
    assert!(matches!(compared[..], [(2, PeerMessage::Digest(_))]), "{compared:?}");

    // A push that was lost is made up for.
    let news = say(&mut ahead, 1, enrol(&behind.clan(), 1, 103));
    one.handle_entries(None, None, vec![news.encode()], now(21));
    assert_eq!(said(&mut one), [PeerMessage::Entries(vec![news.encode()])]);
    other.handle_timeout(now(40));
    let compared = talk(&mut one, &mut other, now(40));
    let entries = PeerMessage::Entries(vec![news.encode()]);
    let [(2, PeerMessage::Digest(_)), (1, PeerMessage::Differs), (2, PeerMessage::Vector(_)), (1, last)] =
        &compared[..]
    else {
        panic!("{} messages", compared.len())
    };
    assert_eq!((last, one.vector()), (&entries, other.vector()));
}
