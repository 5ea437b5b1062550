//! Machines that may have signed what they do not know of.

use super::*;

/// Machine 101 as it starts again.
fn again(ledger: Ledger) -> Replica {
    let doubt = Some(Duration::from_secs(60));
    let config =
        Config { key: key(101), version: "1".into(), own: Own::default(), bootstrap: vec![], seed: [0; 32], doubt };
    let mut replica = Replica::new(config, ledger, now(0));
    replica.handle_timeout(now(0));
    actions(&mut replica);
    replica
}

fn asked(replica: &mut Replica, clan: &ClanId, seconds: u64) {
    replica.handle_redemption(Ticket(1), newcomer(clan, 4), now(seconds));
}

fn admitted(done: &[Action]) -> bool {
    matches!(answers(done)[..], [Answer::Redeemed(Ok(()))])
}

#[test]
fn who_starts_signs_once_another_machine_or_the_manager_has_spoken_or_after_a_while() {
    let ledger = clan();
    let ways: [fn(&mut Replica, &Ledger); 3] = [
        |replica, ledger| replica.handle_linked(machine(102), LinkId(1), ledger.vector(), now(2)),
        |replica, _| replica.handle_remembered(false, now(2)),
        |replica, _| replica.handle_timeout(now(60)),
    ];
    for way in ways {
        let mut replica = again(ledger.clone());
        asked(&mut replica, &ledger.clan(), 1);
        replica.handle_timeout(now(20));
        assert!(answers(&settle(&mut replica)).is_empty(), "the newcomer waits");
        assert!(replica.poll_timeout() <= Duration::from_secs(60));
        way(&mut replica, &ledger);
        assert!(admitted(&settle(&mut replica)));
    }
}

#[test]
fn who_starts_with_a_ledger_of_the_past_signs_what_follows_on_what_others_know() {
    let old = clan();
    let mut host = replica(old.clone());
    asked(&mut host, &old.clan(), 1);
    settle(&mut host);
    let whole = host.ledger().clone();
    assert_eq!(whole.head(machine(101).into()).map(|head| head.seq), Some(0));

    let mut replica = again(old.clone());
    replica.handle_redemption(Ticket(1), newcomer(&old.clan(), 5), now(1));
    replica.handle_linked(machine(102), LinkId(1), whole.vector(), now(2));
    assert!(replica.is_in_doubt(), "the other one knows more of our log than we do");
    let all: Vec<_> = whole.entries().map(Entry::encode).collect();
    replica.handle_message(LinkId(1), machine(102), PeerMessage::Entries(all), now(3));
    let done = settle(&mut replica);
    assert_eq!(answers(&done), [&Answer::Redeemed(Err(JoinRefusal::Used))], "it was somebody else's");
    assert!(!replica.is_in_doubt() && replica.state().equivocations.is_empty());
}

#[test]
fn a_disk_that_was_put_back_is_not_believed_before_a_member_says_the_same() {
    let ledger = clan();
    let mut replica = again(ledger.clone());
    replica.handle_remembered(true, now(1));
    asked(&mut replica, &ledger.clan(), 1);
    assert_eq!(answers(&settle(&mut replica)), [&Answer::Redeemed(Err(JoinRefusal::NotReady))]);
    assert!(replica.problems()[0].contains("disk was put back"), "{:?}", replica.problems());
    // A stranger says what it was told, and is told nothing for it.
    replica.handle_linked(machine(103), LinkId(1), ledger.vector(), now(2));
    replica.handle_message(LinkId(1), machine(103), PeerMessage::Vector(vec![]), now(2));
    let told = settle(&mut replica);
    let leaks = |a: &Action| matches!(a, Action::Send { message: PeerMessage::Entries(_), .. });
    assert!(replica.is_in_doubt() && !told.iter().any(leaks), "{told:?}");
    replica.handle_linked(machine(102), LinkId(2), ledger.vector(), now(3));
    assert!(!replica.is_in_doubt());
    asked(&mut replica, &ledger.clan(), 3);
    assert!(admitted(&settle(&mut replica)));
    assert!(!replica.links().contains_key(&machine(103)), "whom it listened to then it does not know");
    replica.handle_remembered(true, now(4));
    assert!(!replica.is_in_doubt(), "said again");
}

#[test]
fn a_stranger_who_is_listened_to_is_not_told_where_the_others_are() {
    let mut ledger = clan();
    let clan = ledger.clan();
    say(&mut ledger, 1, enrol(&clan, 1, 104));
    let mut replica = again(ledger);
    replica.handle_remembered(true, now(1));
    // None of them has what this machine has, so that it still learns.
    for (link, n) in [(1, 103), (2, 102), (3, 104)] {
        replica.handle_linked(machine(n), LinkId(link), vec![], now(2));
    }
    settle(&mut replica);
    assert!(replica.is_in_doubt() && replica.links().contains_key(&machine(103)));
    let beacon = PeerMessage::Beacon(beacon(102, now(3).wall, clan));
    replica.handle_message(LinkId(2), machine(102), beacon.clone(), now(3));
    let told: Vec<Action> = settle(&mut replica).into_iter().filter(|a| matches!(a, Action::Send { .. })).collect();
    assert_eq!(told, [Action::Send { link: LinkId(3), message: beacon }]);
}

#[test]
fn where_nobody_else_is_the_managers_memory_is_enough() {
    let mut ledger = clan();
    let revoke = ledger.revocation_of_machine(&machine(102));
    say(&mut ledger, 1, revoke);
    let mut replica = again(ledger.clone());
    replica.handle_remembered(true, now(1));
    assert!(!replica.is_in_doubt());
    // And a ledger that was lost is whole again.
    let mut replica = again(Ledger::open(ledger.clan()));
    replica.handle_remembered(false, now(1));
    assert!(replica.is_learning(), "nothing was remembered");
    replica.handle_entries(None, None, ledger.entries().map(Entry::encode).collect(), now(2));
    replica.handle_remembered(false, now(2));
    settle(&mut replica);
    assert!(!replica.is_in_doubt());
}

#[test]
fn where_the_others_stay_away_it_is_believed_after_ten_minutes() {
    let ledger = clan();
    let mut replica = again(ledger.clone());
    replica.handle_remembered(true, now(1));
    replica.handle_timeout(now(590));
    assert!(replica.is_in_doubt());
    replica.handle_timeout(now(601));
    assert!(!replica.is_in_doubt());
}
