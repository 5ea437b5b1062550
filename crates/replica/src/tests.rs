//! One replica at a time; many of them are the simulator's business.

use std::time::Duration;

use clan_ledger::{AuthorId, Body, Entry, Ledger};
use clan_types::{ClanId, InviteId, MachineId, PeerAddr, PersonId, Role, Timestamp, WgPublicKey};
use clan_wire::{
    beacon::SignedBeacon,
    peer::{EncodedEntry, JoinRefusal, PeerMessage},
};
use ed25519_dalek::SigningKey;

use crate::{Action, Answer, Close, Config, LinkId, Now, Own, Rejected, Replica, Ticket};

mod doubt;
mod rounds;

const EPOCH: u64 = 1_800_000_000_000;

fn now(seconds: u64) -> Now {
    Now { at: Duration::from_secs(seconds), wall: Timestamp::from_millis(EPOCH + seconds * 1000) }
}

fn key(n: u8) -> SigningKey {
    SigningKey::from_bytes(&[n; 32])
}

fn machine(n: u8) -> MachineId {
    MachineId::from_bytes(key(n).verifying_key().to_bytes())
}

/// Machine `n`, added by a person.
fn enrol(clan: &ClanId, by: u8, n: u8) -> Body {
    let wg = WgPublicKey::from_bytes(*machine(n).as_bytes());
    Body::enrol(&key(n), clan, &AuthorId::of(&key(by)), format!("m{n}").parse().unwrap(), wg)
}

/// Person 1 with machines 101 and 102, and an invite with the secret 50.
fn clan() -> Ledger {
    let at = now(0).wall;
    let (mut ledger, _) =
        Ledger::found(&key(1), "family".parse().unwrap(), "ada".parse().unwrap(), [7; 32], at).unwrap();
    let invite = InviteId::from_bytes(key(50).verifying_key().to_bytes());
    let expires = at.plus(Duration::from_secs(86_400));
    let clan = ledger.clan();
    for body in [
        enrol(&clan, 1, 101),
        enrol(&clan, 1, 102),
        Body::Invite { invite, role: Role::Member, uses: 1, expires, approval: false },
    ] {
        say(&mut ledger, 1, body);
    }
    ledger
}

fn say(ledger: &mut Ledger, author: u8, body: Body) -> Entry {
    let entry = ledger.author(&key(author), body, now(0).wall).unwrap();
    ledger.insert(entry.clone()).unwrap();
    entry
}

fn newcomer(clan: &ClanId, n: u8) -> Vec<EncodedEntry> {
    let mut ledger = Ledger::open(*clan);
    let person = PersonId::from_bytes(key(n).verifying_key().to_bytes());
    say(&mut ledger, n, Body::admission(&key(50), clan, &person, format!("p{n}").parse().unwrap()));
    say(&mut ledger, n, enrol(clan, n, 100 + n));
    ledger.entries().map(Entry::encode).collect()
}

fn replica(ledger: Ledger) -> Replica {
    let own = Own { quic: vec!["192.0.2.1:1".parse().unwrap()], ..Own::default() };
    let config = Config { key: key(101), version: "1".into(), own, bootstrap: vec![], seed: [0; 32], doubt: None };
    let mut replica = Replica::new(config, ledger, now(0));
    replica.handle_timeout(now(0));
    actions(&mut replica);
    replica
}

fn actions(replica: &mut Replica) -> Vec<Action> {
    std::iter::from_fn(|| replica.poll_action()).collect()
}

/// Lets the disk take everything.
fn settle(replica: &mut Replica) -> Vec<Action> {
    let mut done = Vec::new();
    while let Some(action) = replica.poll_action() {
        if let Action::Persist { write, .. } = action {
            replica.handle_persisted(write, now(1));
        }
        done.push(action);
    }
    done
}

fn answers(actions: &[Action]) -> Vec<&Answer> {
    actions.iter().filter_map(|a| if let Action::Answer { answer, .. } = a { Some(answer) } else { None }).collect()
}

fn linked(ledger: Ledger) -> Replica {
    let vector = ledger.vector();
    let mut replica = replica(ledger);
    replica.handle_linked(machine(102), LinkId(1), vector, now(1));
    actions(&mut replica);
    replica
}

#[test]
fn nothing_is_said_of_an_entry_before_it_is_on_disk() {
    let ledger = clan();
    let mut replica = linked(ledger.clone());
    let (vector, state) = (replica.vector().clone(), replica.state().clone());
    let entry = say(&mut ledger.clone(), 1, enrol(&ledger.clan(), 1, 103));
    replica.handle_entries(Some(Ticket(1)), None, vec![entry.encode()], now(2));
    let first = actions(&mut replica);
    let [Action::Persist { write, entries }] = &first[..] else { panic!("{first:?}") };
    assert_eq!(*entries, std::slice::from_ref(&entry));
    replica.handle_message(LinkId(1), machine(102), PeerMessage::Vector(vec![]), now(2));
    replica.handle_timeout(now(100));
    replica.handle_entries(Some(Ticket(2)), None, vec![entry.encode()], now(2));
    assert_eq!(actions(&mut replica), [], "everything waits");
    assert!(replica.entries().is_empty());
    assert_eq!((replica.vector(), replica.state()), (&vector, &state));

    replica.handle_persisted(*write, now(3));
    let after = actions(&mut replica);
    let push = PeerMessage::Entries(vec![entry.encode()]);
    assert!(after.contains(&Action::Send { link: LinkId(1), message: push }));
    assert_eq!(answers(&after), [&Answer::Inserted(Ok(())), &Answer::Inserted(Ok(()))], "known, and on disk");
    assert!(replica.state().machine_in_good_standing(&machine(103)).is_some());
}

#[test]
fn an_entry_that_the_disk_refused_is_not_known_and_may_come_again() {
    let ledger = clan();
    let mut replica = linked(ledger.clone());
    let before = (replica.vector().clone(), replica.state().clone(), replica.entries());
    let entry = say(&mut ledger.clone(), 1, enrol(&ledger.clan(), 1, 103));
    for attempt in 0..2 {
        replica.handle_entries(Some(Ticket(1)), None, vec![entry.encode()], now(2));
        let Some(Action::Persist { write, .. }) = replica.poll_action() else { panic!("attempt {attempt}") };
        replica.handle_not_persisted(write, now(2));
        assert_eq!(answers(&actions(&mut replica)), [&Answer::Inserted(Err(Rejected::NotPersisted))]);
        assert_eq!((replica.vector().clone(), replica.state().clone(), replica.entries()), before);
    }
    replica.handle_entries(Some(Ticket(1)), None, vec![entry.encode()], now(2));
    assert_eq!(answers(&settle(&mut replica)), [&Answer::Inserted(Ok(()))]);
}

#[test]
fn a_newcomer_and_the_countersignature_are_written_at_once_or_not_at_all() {
    let ledger = clan();
    let mut replica = replica(ledger.clone());
    let entries = newcomer(&ledger.clan(), 4);
    replica.handle_redemption(Ticket(1), entries.clone(), now(2));
    let Some(Action::Persist { write, entries: written }) = replica.poll_action() else { panic!() };
    assert_eq!(written.len(), 3);
    replica.handle_not_persisted(write, now(2));
    assert_eq!(answers(&actions(&mut replica)), [&Answer::Redeemed(Err(JoinRefusal::NotReady))]);
    assert_eq!(replica.entries().len(), ledger.len());

    replica.handle_redemption(Ticket(2), entries.clone(), now(2));
    let done = settle(&mut replica);
    assert_eq!(answers(&done), [&Answer::Redeemed(Ok(()))]);
    replica.handle_redemption(Ticket(3), entries, now(2));
    assert_eq!(answers(&settle(&mut replica)), [&Answer::Redeemed(Ok(()))], "asked again");
    replica.handle_redemption(Ticket(4), newcomer(&ledger.clan(), 5), now(2));
    assert_eq!(answers(&settle(&mut replica)), [&Answer::Redeemed(Err(JoinRefusal::Used))]);
}

#[test]
fn whoever_is_let_in_or_comes_back_is_not_dialled_while_the_connection_that_they_came_by_is_there() {
    let ledger = clan();
    // Of two machines this one dials at once if its key is the lesser.
    let greater = (110..150).find(|n| machine(101) < machine(*n)).unwrap();
    let back = {
        let mut person = ledger.clone();
        vec![say(&mut person, 1, enrol(&ledger.clan(), 1, greater)).encode()]
    };
    let admitted = newcomer(&ledger.clan(), greater - 100);
    for (entries, how) in [(admitted, "let in"), (back, "back")] {
        let mut replica = replica(ledger.clone());
        replica.handle_redemption(Ticket(1), entries, now(2));
        let mut done = settle(&mut replica);
        assert_eq!(answers(&done), [&Answer::Redeemed(Ok(()))], "{how}");
        let dials = |a: &Action| matches!(a, Action::Dial(peer) if peer.machine == machine(greater));
        for second in 2..8 {
            replica.handle_timeout(now(second));
            done.extend(settle(&mut replica));
        }
        assert!(!done.iter().any(dials), "whoever is {how} is connected");
        // That did not last, and nobody comes again.
        replica.handle_timeout(now(9));
        assert!(settle(&mut replica).iter().any(dials), "whoever is {how} is looked for");
    }
}

#[test]
fn who_is_put_out_loses_the_link_and_is_not_dialled() {
    let ledger = clan();
    let mut replica = linked(ledger.clone());
    let revoke = ledger.revocation_of_machine(&machine(102));
    let entry = say(&mut ledger.clone(), 1, revoke);
    replica.handle_entries(None, None, vec![entry.encode()], now(2));
    let done = settle(&mut replica);
    let why = PeerMessage::Entries(vec![entry.encode()]);
    let told = done.iter().position(|a| *a == Action::Send { link: LinkId(1), message: why.clone() });
    let close = Action::Close { link: LinkId(1), why: Close::NotInGoodStanding };
    assert!(told < done.iter().position(|a| *a == close) && told.is_some(), "{done:?}");
    // What comes later is not for it any more.
    let mut known = ledger.clone();
    known.insert(entry.clone()).unwrap();
    let later = say(&mut known, 1, enrol(&ledger.clan(), 1, 103));
    replica.handle_entries(None, None, vec![later.encode()], now(2));
    settle(&mut replica);
    replica.handle_message(LinkId(1), machine(102), PeerMessage::Entries(vec![vec![1, 2]]), now(2));
    assert_eq!(actions(&mut replica), [], "what was still on its way does not count");
    replica.handle_linked(machine(102), LinkId(2), ledger.vector(), now(3));
    let close = Action::Close { link: LinkId(2), why: Close::NotInGoodStanding };
    assert_eq!(actions(&mut replica), [Action::Send { link: LinkId(2), message: why }, close], "it is told again");
    replica.handle_linked(machine(110), LinkId(3), vec![], now(3));
    assert_eq!(actions(&mut replica), [Action::Close { link: LinkId(3), why: Close::Unknown }], "a stranger is not");
    replica.handle_timeout(now(1000));
    assert!(!actions(&mut replica).iter().any(|a| matches!(a, Action::Dial(peer) if peer.machine == machine(102))));
}

#[test]
fn a_machine_that_is_out_can_say_by_whom() {
    let mut ledger = clan();
    let mut replica = linked(ledger.clone());
    assert_eq!(replica.problems(), Vec::<String>::new());
    let revoke = ledger.revocation_of_machine(&machine(101));
    let entry = say(&mut ledger, 1, revoke);
    replica.handle_message(LinkId(1), machine(102), PeerMessage::Entries(vec![entry.encode()]), now(2));
    settle(&mut replica);
    let problem = replica.problems().pop().unwrap();
    assert!(problem.starts_with("ada put this machine out of the clan: "), "{problem}");
}

#[test]
fn the_newest_of_two_connections_stays() {
    let ledger = clan();
    let mut replica = linked(ledger.clone());
    replica.handle_linked(machine(102), LinkId(2), ledger.vector(), now(2));
    assert!(actions(&mut replica).contains(&Action::Close { link: LinkId(1), why: Close::Replaced }));
    replica.handle_unlinked(LinkId(1), now(2));
    assert_eq!(replica.links()[&machine(102)], LinkId(2));
}

fn beacon(n: u8, made: Timestamp, clan: ClanId) -> SignedBeacon {
    let beacon = clan_wire::beacon::Beacon {
        clan,
        machine: machine(n),
        made,
        version: "1".into(),
        quic: vec!["192.0.2.9:9".parse().unwrap()],
        wireguard: vec![],
        services: vec![],
        image: None,
        certificate: None,
        control: clan_types::ControlMode::Local,
    };
    SignedBeacon::sign(&beacon, &key(n)).unwrap()
}

#[test]
fn a_beacon_from_the_future_does_not_keep_out_the_true_ones_once_the_clock_is_right() {
    let ledger = clan();
    let clan = ledger.clan();
    let mut replica = linked(ledger);
    let days = Duration::from_secs(3 * 86_400);
    let ahead = Now { at: Duration::from_secs(2), wall: now(2).wall.plus(days) };
    replica.handle_message(LinkId(1), machine(102), PeerMessage::Beacon(beacon(102, ahead.wall, clan)), ahead);
    assert_eq!(replica.beacons()[&machine(102)].made, ahead.wall);
    let true_one = beacon(102, now(3).wall, clan);
    replica.handle_message(LinkId(1), machine(102), PeerMessage::Beacon(true_one), now(3));
    assert_eq!(replica.beacons()[&machine(102)].made, now(3).wall);
}

#[test]
fn a_clock_that_is_days_off_is_said_so() {
    let ledger = clan();
    let clan = ledger.clan();
    let mut replica = linked(ledger);
    replica.handle_message(LinkId(1), machine(102), PeerMessage::Beacon(beacon(102, now(1).wall, clan)), now(2));
    assert_eq!(replica.problems(), Vec::<String>::new());
    let theirs = now(3).wall.plus(Duration::from_secs(3 * 86_400));
    replica.handle_message(LinkId(1), machine(102), PeerMessage::Beacon(beacon(102, theirs, clan)), now(3));
    assert_eq!(replica.problems(), ["this machine's clock is 3 days behind the other machines' clocks; set it right"]);
    assert_eq!(replica.beacons()[&machine(102)].made, now(1).wall, "and it is not believed");
}

#[test]
fn after_a_restart_with_an_earlier_clock_the_own_beacon_is_later_than_the_one_that_others_have() {
    let ledger = clan();
    let clan = ledger.clan();
    let mut replica = linked(ledger);
    let earlier_run = now(300).wall;
    replica.handle_message(LinkId(1), machine(102), PeerMessage::Beacon(beacon(101, earlier_run, clan)), now(2));
    assert!(replica.beacons()[&machine(101)].made > earlier_run);
}

#[test]
fn who_has_lost_the_ledger_learns_it_from_anybody_and_signs_nothing_until_it_is_whole() {
    let whole = clan();
    let bootstrap = vec![PeerAddr { machine: machine(102), addrs: vec![] }];
    let config =
        Config { key: key(101), version: "1".into(), own: Own::default(), bootstrap, seed: [0; 32], doubt: None };
    let mut replica = Replica::new(config, Ledger::open(whole.clan()), now(0));
    replica.handle_timeout(now(0));
    replica.handle_timeout(now(6));
    let dialled = |a: &Action| matches!(a, Action::Dial(peer) if peer.machine == machine(102));
    assert!(actions(&mut replica).iter().any(dialled));
    replica.handle_linked(machine(102), LinkId(1), whole.vector(), now(7));
    let all: Vec<_> = whole.entries().map(Entry::encode).collect();
    replica.handle_message(LinkId(1), machine(102), PeerMessage::Entries(all[..2].to_vec()), now(7));
    settle(&mut replica);
    replica.handle_redemption(Ticket(1), newcomer(&whole.clan(), 4), now(8));
    assert_eq!(answers(&settle(&mut replica)), [&Answer::Redeemed(Err(JoinRefusal::NotReady))]);
    assert!(replica.links().contains_key(&machine(102)), "who feeds us is not cut off, known or not");
    replica.handle_message(LinkId(1), machine(102), PeerMessage::Entries(all), now(8));
    replica.handle_message(LinkId(1), machine(102), PeerMessage::Vector(whole.vector()), now(9));
    settle(&mut replica);
    assert_eq!(**replica.state(), *whole.state());
    replica.handle_redemption(Ticket(2), newcomer(&whole.clan(), 4), now(9));
    assert!(matches!(answers(&settle(&mut replica))[..], [Answer::Redeemed(Ok(_))]));
}

#[test]
fn a_machine_that_leaves_hears_that_another_one_knows() {
    let ledger = clan();
    let mut replica = linked(ledger.clone());
    let mut later = ledger.clone();
    let gone = say(&mut later, 1, Body::Remove { machine: machine(101) }).encode();
    let unrelated = say(&mut later, 1, enrol(&ledger.clan(), 1, 103)).encode();
    replica.handle_entries(Some(Ticket(1)), None, vec![gone.clone()], now(2));
    let done = settle(&mut replica);
    assert!(done.contains(&Action::Send { link: LinkId(1), message: PeerMessage::Entries(vec![gone.clone()]) }));
    assert!(!replica.is_let_go(), "it was sent, and may have got lost");

    // The other machine takes it, and says why it lets go.
    let config = Config {
        key: key(102),
        version: "1".into(),
        own: Own::default(),
        bootstrap: vec![],
        seed: [1; 32],
        doubt: None,
    };
    let mut other = Replica::new(config, ledger.clone(), now(0));
    other.handle_linked(machine(101), LinkId(5), ledger.vector(), now(1));
    other.handle_message(LinkId(5), machine(101), PeerMessage::Entries(vec![gone.clone()]), now(2));
    let farewell = settle(&mut other).into_iter().find_map(|action| match action {
        Action::Send { link: LinkId(5), message: message @ PeerMessage::Entries(_) } => Some(message),
        _ => None,
    });
    replica.handle_message(LinkId(1), machine(102), PeerMessage::Entries(vec![unrelated]), now(3));
    settle(&mut replica);
    assert!(!replica.is_let_go());
    replica.handle_message(LinkId(1), machine(102), farewell.unwrap(), now(3));
    assert!(settle(&mut replica).contains(&Action::Changed));
    assert!(replica.is_let_go());
    // A machine that has nothing else to say to whoever is out says that it knows.
    other.handle_linked(machine(101), LinkId(6), replica.vector().to_vec(), now(4));
    let again = settle(&mut other);
    assert!(again.iter().any(|action| matches!(
        action,
        Action::Send { link: LinkId(6), message: PeerMessage::Entries(entries) } if entries.contains(&gone)
    )));
}
