//! The rules of the fold, one by one.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use clan_ledger::{
    Applications, Body, Entry, InviteProblem, MAX_AHEAD, RedeemProblem, Standing, VmDescription, VmSetup, VoidReason,
};
use clan_types::{ByteSize, ControlMode, Hlc, ImageId, Role};
use common::*;

fn reason(clan: &Clan, entry: &Entry) -> Option<VoidReason> {
    clan.reason(entry)
}

fn publication(image: u8) -> Body {
    Body::Publish {
        description: VmDescription {
            image: ImageId::from_bytes([image; 32]),
            title: "Debian".parse().unwrap(),
            memory: ByteSize::from_mib(512),
            cpus: 1,
            disk: ByteSize::from_mib(4096),
        },
    }
}

fn with_setup(image: u8, control: ControlMode) -> Body {
    let Body::Publish { description } = publication(image) else { unreachable!() };
    let applications = Applications::new(["web".parse().unwrap()]).unwrap();
    Body::PublishVm { description, setup: VmSetup { network: "yggdrasil".parse().unwrap(), control, applications } }
}

#[test]
fn a_description_is_in_force_with_all_that_belongs_to_it_until_the_next() {
    let mut clan = Clan::new();
    clan.join(2, 1, Role::Admin);
    clan.join(3, 1, Role::Member);
    let refused = clan.say(&key(3), with_setup(9, ControlMode::Remote));
    assert_eq!(reason(&clan, &refused), Some(VoidReason::NotAllowed));
    assert_eq!((&clan.ledger.state().published, clan.ledger.state().suggested_control), (&None, ControlMode::Local));

    clan.say(&key(2), with_setup(2, ControlMode::Shared));
    let state = clan.ledger.state();
    let published = state.published.as_ref().unwrap();
    assert_eq!((published.by, published.network.as_str()), (person(&key(2)), "yggdrasil"), "whoever runs it judges");
    assert_eq!(published.applications.iter().map(|app| app.as_str()).collect::<Vec<_>>(), ["web"]);
    assert_eq!(state.suggested_control, ControlMode::Shared);

    // Who steers can be suggested by itself, and the rest stays.
    clan.say(&key(1), Body::SuggestControl { control: ControlMode::Local });
    let state = clan.ledger.state();
    assert_eq!(state.suggested_control, ControlMode::Local);
    assert_eq!(state.published.as_ref().unwrap().description.image, ImageId::from_bytes([2; 32]));

    // An entry of an earlier version says less: what it does not say is as it was then.
    clan.say(&key(1), publication(3));
    let state = clan.ledger.state();
    let published = state.published.as_ref().unwrap();
    assert!(published.network.is_known() && published.applications.iter().next().is_none());
    assert_eq!(state.suggested_control, ControlMode::Local);
}

#[test]
fn a_founder_is_the_owner_and_has_a_machine() {
    let clan = Clan::new();
    let state = clan.ledger.state();
    assert_eq!(state.clan_name.as_ref().map(|name| name.as_str()), Some("family"));
    assert_eq!(clan.role(1), Some(Role::Owner));
    assert!(state.machine_named(&machine_name("m1")).is_some());
    assert_eq!(state.void, []);
}

#[test]
fn a_newcomer_is_in_once_a_machine_has_countersigned_and_not_before() {
    let mut clan = Clan::new();
    clan.invite(1, 50, Role::Member, 1);
    let admission = clan.ask(2, 50);
    let enrol = clan.enrol(2);
    assert_eq!((clan.role(2), clan.has_machine(2)), (None, false));
    assert_eq!(reason(&clan, &admission), Some(VoidReason::NotCountersigned));
    assert_eq!(reason(&clan, &enrol), Some(VoidReason::NotCountersigned));
    clan.countersign(1, &admission);
    assert_eq!((clan.role(2), clan.has_machine(2)), (Some(Role::Member), true));
    assert_eq!(clan.ledger.state().void, []);
    assert_eq!(clan.ledger.state().people[&person(&key(2))].invited_by, Some(person(&key(1))));
}

#[test]
fn a_newcomers_own_machine_cannot_countersign_them() {
    let mut clan = Clan::new();
    clan.invite(1, 50, Role::Member, 1);
    let admission = clan.ask(2, 50);
    clan.enrol(2);
    let countersign = clan.countersign(2, &admission);
    assert_eq!(clan.role(2), None);
    assert_eq!(reason(&clan, &countersign), Some(VoidReason::Outsider));
}

#[test]
fn any_members_machine_can_admit_while_the_founder_is_away() {
    let mut clan = Clan::new();
    clan.join(2, 1, Role::Member);
    clan.invite(1, 50, Role::Member, 1);
    let admission = clan.ask(3, 50);
    clan.countersign(2, &admission);
    assert_eq!(clan.role(3), Some(Role::Member));
}

#[test]
fn an_expired_invite_admits_nobody_whatever_the_newcomers_clock_says() {
    let mut clan = Clan::new();
    clan.invite(1, 50, Role::Member, 1);
    let admission = clan.ask(2, 50);
    clan.now += 2000;
    let countersign = clan.countersign(1, &admission);
    assert_eq!(clan.role(2), None);
    assert_eq!(reason(&clan, &countersign), Some(VoidReason::Invite(InviteProblem::Expired)));
    assert_eq!(reason(&clan, &admission), Some(VoidReason::Invite(InviteProblem::Expired)));
}

#[test]
fn concurrent_redemptions_of_one_use_admit_the_one_that_was_countersigned_first() {
    let mut left = Clan::new();
    left.join(2, 1, Role::Member);
    left.invite(1, 50, Role::Member, 1);
    let mut right = left.clone();
    right.now += 50;
    let first = left.ask(3, 50);
    left.countersign(1, &first);
    let second = right.ask(4, 50);
    let late = right.countersign(2, &second);
    assert_eq!(right.role(4), Some(Role::Member), "alone it counts");
    let (mut a, mut b) = (left.clone(), right.clone());
    a.merge(&right);
    b.merge(&left);
    assert_eq!(a.ledger.state(), b.ledger.state());
    assert_eq!((a.role(3), a.role(4)), (Some(Role::Member), None));
    assert_eq!(reason(&a, &late), Some(VoidReason::Invite(InviteProblem::Used)));
}

#[test]
fn nobody_gives_a_role_above_what_they_may() {
    let mut clan = Clan::new();
    clan.join(2, 1, Role::Admin);
    clan.join(3, 2, Role::Member);
    clan.join(4, 2, Role::Guest);
    let greedy = [(2, Role::Admin), (2, Role::Owner), (3, Role::Guest), (4, Role::Guest)];
    for ((by, role), n) in greedy.into_iter().zip(0..) {
        let invite = clan.invite(by, 60 + n, role, 9);
        assert_eq!(reason(&clan, &invite), Some(VoidReason::NotAllowed), "{by} gives {role}");
        let asked = clan.ask(90 + n, 60 + n);
        clan.countersign(1, &asked);
        assert_eq!(clan.role(90 + n), None);
    }
    let enrol = clan.enrol(4);
    assert_eq!(reason(&clan, &enrol), Some(VoidReason::NotAllowed), "guests have no machines");
    let published = clan.say(&key(3), publication(1));
    assert_eq!(reason(&clan, &published), Some(VoidReason::NotAllowed));
    clan.say(&key(2), publication(2));
    assert_eq!(clan.ledger.state().published.as_ref().unwrap().description.image, ImageId::from_bytes([2; 32]));
}

#[test]
fn names_and_keys_are_given_once_and_names_are_freed() {
    let mut clan = Clan::new();
    clan.join(2, 1, Role::Member);
    let id = clan.ledger.clan();
    let enrol = |by: u8, n: u8, label: &str, wg: u8| enrol(&id, &key(by), n, label, wg);
    let taken = clan.say(&key(2), enrol(2, 110, "m1", 110));
    assert_eq!(reason(&clan, &taken), None, "a taken name keeps no machine out");
    assert_eq!(clan.ledger.state().machines[&machine(&key(110))].name, machine_name("m1-2"));
    let stolen_key = clan.say(&key(2), enrol(2, 101, "other", 111));
    assert_eq!(reason(&clan, &stolen_key), Some(VoidReason::KeyTaken));
    let stolen_wg = clan.say(&key(2), enrol(2, 112, "other", 1));
    assert_eq!(reason(&clan, &stolen_wg), Some(VoidReason::KeyTaken));
    clan.say(&key(2), Body::Remove { machine: machine(&key(102)) });
    let again = clan.say(&key(2), enrol(2, 113, "m2", 113));
    assert_eq!(reason(&clan, &again), None, "a removed machine's name is free");
    clan.say(&key(2), Body::Leave);
    assert_eq!(clan.role(2), None);
    let founders = clan.say(&key(1), enrol(1, 114, "m2", 114));
    assert_eq!(reason(&clan, &founders), None, "so are the names of those who left");
    let late = clan.say(&key(2), enrol(2, 115, "late", 115));
    assert_eq!(reason(&clan, &late), Some(VoidReason::AuthorLeft));
}

#[test]
fn members_remove_their_own_machines_and_admins_those_up_to_their_role() {
    let mut clan = Clan::new();
    clan.join(2, 1, Role::Admin);
    clan.join(3, 1, Role::Member);
    let refused = clan.say(&key(3), Body::Remove { machine: machine(&key(102)) });
    assert_eq!(reason(&clan, &refused), Some(VoidReason::NotAllowed));
    let refused = clan.say(&key(2), Body::Remove { machine: machine(&key(101)) });
    assert_eq!(reason(&clan, &refused), Some(VoidReason::NotAllowed));
    clan.say(&key(2), Body::Remove { machine: machine(&key(103)) });
    assert!(!clan.has_machine(3) && clan.has_machine(1));
}

#[test]
fn a_revoked_admin_cannot_add_history_behind_our_back() {
    let mut clan = Clan::new();
    clan.join(2, 1, Role::Admin);
    let mut behind = clan.clone();
    for body in clan.ledger.revocation_of_person(&person(&key(2))) {
        clan.say(&key(1), body);
    }
    // The revoked admin sets the clock back to before the revocation.
    let back_dated = behind.invite(2, 50, Role::Member, 9);
    let admission = behind.ask(3, 50);
    let countersign = behind.countersign(2, &admission);
    assert_eq!(behind.role(3), Some(Role::Member));
    clan.merge(&behind);
    assert_eq!(reason(&clan, &back_dated), Some(VoidReason::AuthorRevoked));
    assert_eq!(reason(&clan, &countersign), Some(VoidReason::AuthorRevoked));
    assert_eq!((clan.role(2), clan.role(3), clan.has_machine(2)), (None, None, false));
    assert_eq!(clan.ledger.state().people[&person(&key(2))].standing, Standing::Revoked);
}

#[test]
fn what_a_revocation_leaves_standing_keeps_counting() {
    let mut clan = Clan::new();
    clan.join(2, 1, Role::Admin);
    clan.join(3, 2, Role::Member);
    for body in clan.ledger.revocation_of_person(&person(&key(2))) {
        clan.say(&key(1), body);
    }
    assert_eq!((clan.role(2), clan.role(3)), (None, Some(Role::Member)));
    assert!(clan.has_machine(3));
}

#[test]
fn of_two_admins_who_revoke_each_other_the_earlier_admitted_stays() {
    for senior_first in [true, false] {
        let mut left = Clan::new();
        left.join(2, 1, Role::Admin);
        left.join(3, 1, Role::Admin);
        let mut right = left.clone();
        // Who was quicker does not matter.
        *(if senior_first { &mut right.now } else { &mut left.now }) += 100;
        let by_senior = left.say(&key(2), left.ledger.revocation_of_person(&person(&key(3))).pop().unwrap());
        let by_junior = right.say(&key(3), right.ledger.revocation_of_person(&person(&key(2))).pop().unwrap());
        let (mut a, mut b) = (left.clone(), right.clone());
        a.merge(&right);
        b.merge(&left);
        assert_eq!(a.ledger.state(), b.ledger.state());
        assert_eq!((a.role(2), a.role(3)), (Some(Role::Admin), None), "senior first: {senior_first}");
        assert_eq!(reason(&a, &by_senior), None);
        assert_eq!(reason(&a, &by_junior), Some(VoidReason::AuthorRevoked));
    }
}

#[test]
fn the_senior_stays_even_where_the_juniors_revocation_was_left_standing() {
    let mut clan = Clan::new();
    clan.join(2, 1, Role::Owner);
    let by_junior = clan.say(&key(2), clan.ledger.revocation_of_person(&person(&key(1))).pop().unwrap());
    assert_eq!(clan.role(1), None, "owners can revoke one another");
    let by_senior = clan.say(&key(1), clan.ledger.revocation_of_person(&person(&key(2))).pop().unwrap());
    assert_eq!((clan.role(1), clan.role(2)), (Some(Role::Owner), None));
    assert_eq!(reason(&clan, &by_senior), None);
    assert_eq!(reason(&clan, &by_junior), Some(VoidReason::Outranked));
}

#[test]
fn an_owner_outranks_an_admin_and_a_member_revokes_nobody() {
    let mut clan = Clan::new();
    clan.join(2, 1, Role::Admin);
    clan.join(3, 1, Role::Member);
    let up = clan.say(&key(2), Body::RevokePerson { person: person(&key(1)), last: None });
    let across = clan.say(&key(3), Body::RevokeMachine { machine: machine(&key(102)), last: None });
    assert_eq!(reason(&clan, &up), Some(VoidReason::NotAllowed));
    assert_eq!(reason(&clan, &across), Some(VoidReason::NotAllowed));
    assert_eq!((clan.role(1), clan.has_machine(2)), (Some(Role::Owner), true));
}

#[test]
fn revoking_a_machine_that_bears_somebody_elses_key_does_not_silence_that_person() {
    let mut clan = Clan::new();
    clan.join(2, 1, Role::Admin);
    // The admin enrols the founder's own key as a machine, and revokes it.
    clan.say(&key(2), enrol(&clan.ledger.clan(), &key(2), 1, "trap", 99));
    clan.say(&key(2), Body::RevokeMachine { machine: machine(&key(1)), last: None });
    clan.join(3, 1, Role::Member);
    assert_eq!((clan.role(1), clan.has_machine(1)), (Some(Role::Owner), true));
}

#[test]
fn an_invite_dies_with_its_withdrawal_and_with_its_maker() {
    let mut clan = Clan::new();
    clan.join(2, 1, Role::Admin);
    clan.invite(2, 50, Role::Member, 5);
    clan.invite(1, 51, Role::Member, 5);
    let (by_maker, by_admin) = (invite(&key(50)), invite(&key(51)));
    assert!(clan.ledger.state().check_invite(&by_maker, at(clan.now)).is_ok());
    clan.say(&key(2), Body::RevokeInvite { invite: by_admin });
    assert_eq!(clan.ledger.state().check_invite(&by_admin, at(clan.now)), Err(InviteProblem::Revoked));
    let body = clan.ledger.revocation_of_person(&person(&key(2))).pop().unwrap();
    clan.say(&key(1), body);
    assert_eq!(clan.ledger.state().check_invite(&by_maker, at(clan.now)), Err(InviteProblem::Revoked));
    let admission = clan.ask(3, 50);
    clan.countersign(1, &admission);
    assert_eq!(reason(&clan, &admission), Some(VoidReason::Invite(InviteProblem::Revoked)));
}

#[test]
fn a_time_far_ahead_does_not_move_other_clocks_and_can_be_revoked() {
    let mut clan = Clan::new();
    clan.join(2, 1, Role::Admin);
    let now = clan.now;
    clan.now += 1_000_000_000;
    clan.invite(2, 50, Role::Member, 5);
    clan.say(&key(2), publication(9));
    let ahead = clan.say(&key(2), enrolment(&clan.ledger.clan(), &key(2), 9));
    assert_eq!(reason(&clan, &ahead), None);
    clan.now = now;
    let next = clan.say(&key(1), publication(1));
    assert_eq!(next.time().wall, at(now + 1), "the founder's clock does not follow");
    clan.say(&key(1), Body::RevokeInvite { invite: invite(&key(50)) });
    let body = clan.ledger.revocation_of_machine(&machine(&key(109)));
    clan.say(&key(1), body);
    assert!(clan.ledger.state().invites[&invite(&key(50))].revoked);
    assert!(!clan.has_machine(9));
    let last = clan.ledger.head(person(&key(1)).into());
    clan.say(&key(1), Body::RevokePerson { person: person(&key(2)), last: None });
    assert!(last.is_some());
    assert_eq!(clan.ledger.state().published.as_ref().unwrap().by, person(&key(1)));
}

#[test]
fn a_clock_slightly_ahead_moves_others_so_that_effects_follow_causes() {
    let mut clan = Clan::new();
    clan.join(2, 1, Role::Admin);
    let now = clan.now;
    clan.now += 300;
    let ahead = clan.say(&key(2), publication(2));
    clan.now = now;
    let after = clan.say(&key(1), publication(1));
    assert!(after.time() > ahead.time());
    assert_eq!(clan.ledger.state().published.as_ref().unwrap().by, person(&key(1)));
}

#[test]
fn the_earlier_of_two_entries_for_one_place_counts_and_the_author_is_named() {
    let mut clan = Clan::new();
    clan.join(2, 1, Role::Admin);
    let mut other_device = clan.clone();
    other_device.now += 10;
    let first = clan.invite(2, 50, Role::Member, 1);
    clan.say(&key(2), publication(1));
    let second = other_device.invite(2, 51, Role::Member, 1);
    other_device.say(&key(2), publication(2));
    other_device.say(&key(2), publication(3));
    let (mut a, mut b) = (clan.clone(), other_device.clone());
    a.merge(&other_device);
    b.merge(&clan);
    assert_eq!(a.ledger.state(), b.ledger.state());
    assert_eq!((reason(&a, &first), reason(&a, &second)), (None, Some(VoidReason::Equivocated)));
    assert_eq!(a.ledger.state().equivocations.get(&person(&key(2)).into()), Some(&first.seq()));
    assert_eq!(a.ledger.state().published.as_ref().unwrap().description.image, ImageId::from_bytes([1; 32]));
    let next = a.invite(2, 52, Role::Member, 1);
    assert_eq!(reason(&a, &next), None, "the author can go on");
}

#[test]
fn a_revocation_that_pins_the_losing_branch_leaves_what_both_share() {
    let mut clan = Clan::new();
    clan.join(2, 1, Role::Admin);
    let mut behind = clan.clone();
    clan.now += 100;
    clan.invite(2, 50, Role::Member, 1);
    let body = clan.ledger.revocation_of_person(&person(&key(2))).pop().unwrap();
    clan.say(&key(1), body);
    // The revoked admin writes another, earlier history for the same places.
    let forged = behind.invite(2, 51, Role::Member, 9);
    clan.merge(&behind);
    assert_eq!(reason(&clan, &forged), Some(VoidReason::AuthorRevoked));
    assert!(!clan.ledger.state().invites.contains_key(&invite(&key(51))));
}

#[test]
fn a_redemption_is_checked_before_it_is_countersigned() {
    let mut clan = Clan::new();
    clan.now += 10_000;
    clan.invite(1, 50, Role::Member, 1);
    let mut theirs = clan.clone();
    let entries = [theirs.ask(2, 50), theirs.enrol(2)];
    let ok = clan.ledger.check_redemption(&entries, at(clan.now)).map(Entry::id);
    assert_eq!(ok, Ok(entries[0].id()));
    let late = clan.ledger.check_redemption(&entries, at(clan.now + 5000));
    assert_eq!(late, Err(RedeemProblem::Invite(InviteProblem::Expired)));
    assert_eq!(clan.ledger.check_redemption(&entries[1..], at(clan.now)), Err(RedeemProblem::Malformed));
    assert_eq!(clan.ledger.check_redemption(&[], at(clan.now)), Err(RedeemProblem::Malformed));
    let early = clan.ledger.check_redemption(&entries, at(clan.now - MAX_AHEAD.as_secs() - 9));
    assert_eq!(early, Err(RedeemProblem::ClockAhead));
    // Somebody else got the name and the use meanwhile.
    let mut named = clan.clone();
    named.invite(1, 51, Role::Member, 1);
    let id = named.ledger.clan();
    let asked = named.say(&key(3), Body::admission(&key(51), &id, &person(&key(3)), name("p2")));
    named.countersign(1, &asked);
    assert_eq!(named.ledger.check_redemption(&entries, at(named.now)), Err(RedeemProblem::PersonNameTaken(name("p2"))));
    clan.ledger.insert_all(entries.clone());
    let mut second = theirs.clone();
    second.ledger = clan_ledger::Ledger::open(clan.ledger.clan());
    assert_eq!(clan.ledger.check_redemption(&[second.ask(2, 50)], at(clan.now)), Err(RedeemProblem::Malformed));
    clan.countersign(1, &entries[0]);
    assert_eq!((clan.role(2), clan.has_machine(2)), (Some(Role::Member), true));
    assert_eq!(clan.ledger.check_redemption(&entries, at(clan.now)), Err(RedeemProblem::Malformed));
}

#[test]
fn entries_of_another_clan_stay_out() {
    let (mut clan, mut other) = (Clan::new(), Clan::new());
    let (ledger, _) =
        clan_ledger::Ledger::found(&key(1), "family".parse().unwrap(), name("p1"), [8; 32], at(0)).unwrap();
    other.ledger = ledger;
    let entry = other.enrol(1);
    assert_eq!(clan.ledger.insert(entry), Err(clan_ledger::InsertError::ForeignClan));
}

#[test]
fn an_entry_earlier_than_its_predecessor_is_refused() {
    let mut clan = Clan::new();
    let head = clan.ledger.head(person(&key(1)).into()).unwrap();
    let id = clan.ledger.clan();
    let early = Hlc { wall: at(0), counter: 5 };
    let entry = Entry::sign(&key(1), Some(&id), head.seq + 1, Some(head.id), early, Body::Leave).unwrap();
    assert_eq!(clan.ledger.insert(entry), Err(clan_ledger::InsertError::TimeRunsBack));
}
