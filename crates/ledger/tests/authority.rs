//! Roles, devices, approval, names, and what else people decide: who may do what.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::collections::BTreeSet;

use clan_ledger::{
    AuthorId, Body, DeviceKind, Entry, EntryError, MAX_AHEAD, Node, Party, PortRange, Protocol, Standing, Target,
    VoidReason,
};
use clan_types::{CertificateHash, DEVICE_LINK_LIFETIME, EntryId, Hlc, Role, WgPublicKey};
use common::*;

/// Person 1 is the founder, 2 an owner, 3 an admin, 4 a member, 5 a guest.
fn family() -> Clan {
    let mut clan = Clan::new();
    for (n, role) in [(2, Role::Owner), (3, Role::Admin), (4, Role::Member), (5, Role::Guest)] {
        clan.join(n, 1, role);
    }
    clan
}

#[test]
fn owners_give_any_role_and_admins_move_people_between_guest_and_member() {
    use Role::{Admin, Guest, Member, Owner};
    for by in 1..=5 {
        for subject in 1..=5 {
            for role in [Guest, Member, Admin, Owner] {
                let mut clan = family();
                let before = clan.role(subject).unwrap();
                let entry = clan.set_role(&key(by), subject, role);
                let may = match by {
                    1 | 2 => true,
                    3 => before < Admin && role < Admin,
                    _ => false,
                };
                let (expected, after) = if may { (None, role) } else { (Some(VoidReason::NotAllowed), before) };
                assert_eq!(clan.reason(&entry), expected, "{by} makes {subject} {role}");
                assert_eq!(clan.role(subject), Some(after), "{by} makes {subject} {role}");
            }
        }
    }
}

#[test]
fn a_promotion_counts_from_there_on() {
    let mut clan = family();
    let early = clan.invite(4, 50, Role::Member, 1);
    clan.set_role(&key(1), 4, Role::Admin);
    let late = clan.invite(4, 51, Role::Member, 1);
    assert_eq!((clan.reason(&early), clan.reason(&late)), (Some(VoidReason::NotAllowed), None));
}

#[test]
fn a_demotion_leaves_what_was_known_and_voids_what_is_back_dated() {
    let mut clan = family();
    let kept = clan.invite(3, 50, Role::Member, 1);
    let mut behind = clan.clone();
    let demotion = clan.set_role(&key(1), 3, Role::Member);
    let back_dated = behind.invite(3, 52, Role::Member, 1);
    assert!(back_dated.time() <= demotion.time(), "in its log it stands where the demotion says that nothing is");
    assert_eq!(behind.reason(&back_dated), None);
    clan.merge(&behind);
    assert_eq!(clan.role(3), Some(Role::Member));
    assert_eq!((clan.reason(&kept), clan.reason(&back_dated)), (None, Some(VoidReason::AuthorDemoted)));
    let late = clan.invite(3, 51, Role::Member, 1);
    assert_eq!(clan.reason(&late), Some(VoidReason::AuthorDemoted));
}

#[test]
fn what_a_demoted_admin_back_dated_stays_void_after_they_rise_again() {
    let mut clan = family();
    let mut behind = clan.clone();
    clan.set_role(&key(1), 3, Role::Member);
    let back_dated = behind.invite(3, 50, Role::Member, 1);
    clan.merge(&behind);
    clan.set_role(&key(1), 3, Role::Admin);
    let after = clan.invite(3, 51, Role::Member, 1);
    assert_eq!(clan.reason(&back_dated), Some(VoidReason::AuthorDemoted));
    assert_eq!(clan.reason(&after), None);
    assert_eq!(clan.role(3), Some(Role::Admin));
}

#[test]
fn a_demoted_person_keeps_what_their_new_role_allows() {
    let mut clan = family();
    clan.set_role(&key(1), 3, Role::Guest);
    assert!(clan.has_machine(3), "machines stay");
    let enrol = clan.say(&key(3), enrol(&clan.ledger.clan(), &key(3), 113, "x", 113));
    assert_eq!(clan.reason(&enrol), Some(VoidReason::AuthorDemoted));
    let rename = clan.say(&key(3), Body::RenamePerson { person: person(&key(3)), name: name("carla") });
    assert_eq!(clan.reason(&rename), None);
}

#[test]
fn of_two_owners_who_demote_each_other_the_earlier_admitted_stays() {
    for senior_first in [true, false] {
        let mut left = family();
        let mut right = left.clone();
        *(if senior_first { &mut right.now } else { &mut left.now }) += 100;
        let by_senior = left.set_role(&key(1), 2, Role::Member);
        let by_junior = right.set_role(&key(2), 1, Role::Member);
        let (mut a, mut b) = (left.clone(), right.clone());
        a.merge(&right);
        b.merge(&left);
        assert_eq!(a.ledger.state(), b.ledger.state());
        assert_eq!((a.role(1), a.role(2)), (Some(Role::Owner), Some(Role::Member)), "senior first: {senior_first}");
        assert_eq!(a.reason(&by_senior), None);
        assert_eq!(a.reason(&by_junior), Some(VoidReason::AuthorDemoted));
    }
    // The senior pins the junior's demotion as one that counts, and it does not all the same.
    let mut clan = family();
    let by_junior = clan.set_role(&key(2), 1, Role::Member);
    assert_eq!(clan.role(1), Some(Role::Member));
    let by_senior = clan.set_role(&key(1), 2, Role::Member);
    assert_eq!((clan.role(1), clan.role(2)), (Some(Role::Owner), Some(Role::Member)));
    assert_eq!((clan.reason(&by_senior), clan.reason(&by_junior)), (None, Some(VoidReason::Outranked)));
}

#[test]
fn a_clan_keeps_its_last_owner() {
    let mut clan = Clan::new();
    let alone = clan.set_role(&key(1), 1, Role::Admin);
    assert_eq!((clan.role(1), clan.reason(&alone)), (Some(Role::Owner), Some(VoidReason::LastOwner)));
    clan.join(2, 1, Role::Owner);
    // The other one, then oneself, before anybody sees it.
    let first = clan.set_role(&key(1), 2, Role::Member);
    let second = clan.set_role(&key(1), 1, Role::Member);
    assert_eq!((clan.role(1), clan.role(2)), (Some(Role::Owner), Some(Role::Member)));
    assert_eq!((clan.reason(&first), clan.reason(&second)), (None, Some(VoidReason::LastOwner)));
}

#[test]
fn an_owner_who_steps_down_cannot_raise_another_one_afterwards_to_be_allowed_to() {
    let mut clan = Clan::new();
    clan.join(2, 1, Role::Member);
    let down = clan.set_role(&key(1), 1, Role::Member);
    let up = clan.set_role(&key(1), 2, Role::Owner);
    assert_eq!(clan.reason(&down), Some(VoidReason::LastOwner));
    assert_eq!((clan.reason(&up), clan.role(1), clan.role(2)), (None, Some(Role::Owner), Some(Role::Owner)));
}

#[test]
fn two_who_step_down_at_once_leave_one_of_them() {
    let mut left = Clan::new();
    left.join(2, 1, Role::Owner);
    let mut right = left.clone();
    left.set_role(&key(1), 1, Role::Guest);
    right.set_role(&key(2), 2, Role::Guest);
    left.merge(&right);
    assert_eq!((left.role(1), left.role(2)), (Some(Role::Guest), Some(Role::Owner)));
}

#[test]
fn a_revocation_is_judged_by_the_roles_that_were() {
    let mut clan = family();
    // The admin puts the member out; meanwhile an owner who has not heard of it makes them owner.
    let mut apart = clan.clone();
    let revocation = clan.say(&key(3), clan.ledger.revocation_of_person(&person(&key(4))).pop().unwrap());
    apart.now += 50;
    let promotion = apart.set_role(&key(1), 4, Role::Owner);
    clan.merge(&apart);
    assert_eq!(clan.role(4), None, "a revocation wins over a concurrent grant");
    assert_eq!((clan.reason(&revocation), clan.reason(&promotion)), (None, Some(VoidReason::NoSubject)));
}

#[test]
fn a_devices_entries_are_its_persons() {
    let mut clan = family();
    clan.add_device(&key(3), 30, DeviceKind::Device);
    let invite = clan.say(
        &key(30),
        Body::Invite { invite: invite(&key(50)), role: Role::Member, uses: 1, expires: at(9000), approval: false },
    );
    assert_eq!(clan.reason(&invite), None);
    clan.redeem(6, 50);
    let state = clan.ledger.state();
    assert_eq!(state.people[&person(&key(6))].invited_by, Some(person(&key(3))));
    assert_eq!(state.person_of(&AuthorId::of(&key(30))), Some(person(&key(3))));
    assert_eq!(state.person_of(&AuthorId::of(&key(3))), Some(person(&key(3))));
    assert_eq!(state.person_of(&AuthorId::of(&key(103))), None);
    let names: Vec<_> =
        state.devices_of(&person(&key(3))).map(|(_, d)| d.name.as_ref().map(|n| n.to_string())).collect();
    assert_eq!(names.len(), 2);
    assert!(names.contains(&None) && names.contains(&Some("d30".to_owned())));
    // A device adds a further one.
    let third = clan.add_device(&key(30), 31, DeviceKind::Device);
    assert_eq!(clan.reason(&third), None);
    let machine = clan.say(&key(31), enrol(&clan.ledger.clan(), &key(31), 133, "new", 133));
    assert_eq!(clan.reason(&machine), None);
    assert_eq!(clan.ledger.state().machine_named(&machine_name("new")).unwrap().1.owner, person(&key(3)));
}

#[test]
fn a_key_is_one_persons_device_or_none() {
    let mut clan = family();
    clan.add_device(&key(3), 30, DeviceKind::Device);
    for taken in [30, 3, 4, 103] {
        let entry = clan.add_device(&key(4), taken, DeviceKind::Device);
        assert_eq!(clan.reason(&entry), Some(VoidReason::KeyTaken), "{taken}");
    }
    for taken in [30, 3] {
        let entry = clan.say(&key(4), enrol(&clan.ledger.clan(), &key(4), taken, "x", 99));
        assert_eq!(clan.reason(&entry), Some(VoidReason::KeyTaken), "{taken}");
    }
    // Nor does it come in as a person.
    clan.invite(1, 50, Role::Member, 1);
    let admission = clan.redeem(30, 50);
    assert_eq!(clan.reason(&admission), Some(VoidReason::KeyTaken));
    // A name is a device's alone among its person's.
    let body = Body::add_device(
        &key(31),
        &clan.ledger.clan(),
        &AuthorId::of(&key(3)),
        "d30".parse().unwrap(),
        DeviceKind::Device,
    );
    let entry = clan.say(&key(3), body);
    assert_eq!(clan.reason(&entry), Some(VoidReason::NameTaken));
}

#[test]
fn nobody_adds_a_device_without_its_consent() {
    let clan = family();
    let (id, head) = (clan.ledger.clan(), clan.ledger.head(person(&key(4)).into()).unwrap());
    // Consent to somebody else, in the same clan.
    let body = Body::add_device(&key(30), &id, &AuthorId::of(&key(3)), "x".parse().unwrap(), DeviceKind::Device);
    let time = Hlc { wall: at(9000), counter: 0 };
    let entry = Entry::sign(&key(4), Some(&id), head.seq + 1, Some(head.id), time, body);
    assert_eq!(entry, Err(EntryError::BadProof));
}

#[test]
fn a_lost_first_device_is_put_out_by_another_one_and_its_person_stays() {
    let mut clan = family();
    clan.add_device(&key(3), 30, DeviceKind::Device);
    let kept = clan.invite(3, 50, Role::Member, 1);
    let mut thief = clan.clone();
    let revocation = clan.say(&key(30), clan.ledger.revocation_of_device(&device(&key(3))));
    let stolen = thief.invite(3, 51, Role::Member, 9);
    clan.merge(&thief);
    assert_eq!((clan.reason(&revocation), clan.reason(&kept)), (None, None));
    assert_eq!(clan.reason(&stolen), Some(VoidReason::AuthorRevoked));
    assert_eq!((clan.role(3), clan.has_machine(3)), (Some(Role::Admin), true));
    let state = clan.ledger.state();
    assert!(state.device_in_good_standing(&device(&key(3))).is_none());
    assert!(state.device_in_good_standing(&device(&key(30))).is_some());
    let goes_on = clan.say(
        &key(30),
        Body::Invite { invite: invite(&key(52)), role: Role::Member, uses: 1, expires: at(9000), approval: false },
    );
    assert_eq!(clan.reason(&goes_on), None);
    // Even with nothing of it left, the person came in.
    let mut clan = family();
    clan.add_device(&key(3), 30, DeviceKind::Device);
    clan.say(&key(1), Body::RevokeDevice { device: device(&key(3)), last: None });
    assert_eq!(clan.role(3), Some(Role::Admin));
    assert!(!clan.has_machine(3), "what that device enrolled does not count any more");
}

#[test]
fn devices_are_put_out_by_their_person_and_by_admins_up_to_their_role() {
    let mut clan = family();
    clan.add_device(&key(3), 30, DeviceKind::Device);
    clan.add_device(&key(4), 40, DeviceKind::Device);
    let across = clan.say(&key(4), Body::RevokeDevice { device: device(&key(30)), last: None });
    assert_eq!(clan.reason(&across), Some(VoidReason::NotAllowed));
    clan.add_device(&key(1), 10, DeviceKind::Device);
    let up = clan.say(&key(3), Body::RevokeDevice { device: device(&key(10)), last: None });
    assert_eq!(clan.reason(&up), Some(VoidReason::NotAllowed));
    let down = clan.say(&key(3), Body::RevokeDevice { device: device(&key(40)), last: None });
    assert_eq!(clan.reason(&down), None);
    assert_eq!(clan.role(4), Some(Role::Member));
    let nobody = clan.say(&key(3), Body::RevokeDevice { device: device(&key(77)), last: None });
    assert_eq!(clan.reason(&nobody), Some(VoidReason::NoSubject));
}

#[test]
fn what_the_key_in_a_device_link_signs_after_its_time_is_void() {
    let mut clan = family();
    for (n, name) in [(30, "link-30"), (40, "phrase")] {
        let (id, by) = (clan.ledger.clan(), AuthorId::of(&key(3)));
        clan.say(&key(3), Body::add_device(&key(n), &id, &by, name.parse().unwrap(), DeviceKind::Recovery));
    }
    let in_time = clan.add_device(&key(30), 31, DeviceKind::Device);
    clan.now += (DEVICE_LINK_LIFETIME + MAX_AHEAD).as_secs() + 1;
    let late = clan.add_device(&key(30), 32, DeviceKind::Device);
    let revocation = clan.say(&key(30), clan.ledger.revocation_of_device(&device(&key(3))));
    let by_phrase = clan.add_device(&key(40), 41, DeviceKind::Device);
    assert_eq!((clan.reason(&in_time), clan.reason(&by_phrase)), (None, None));
    for entry in [&late, &revocation] {
        assert_eq!(clan.reason(entry), Some(VoidReason::LinkExpired));
    }
    let good = |n| clan.ledger.state().device_in_good_standing(&device(&key(n))).is_some();
    assert!(good(3) && good(31) && !good(32) && good(41));
}

#[test]
fn a_recovery_key_is_for_devices_only_and_goes_before_the_others() {
    let mut clan = family();
    clan.add_device(&key(3), 30, DeviceKind::Recovery);
    for body in [
        Body::Invite { invite: invite(&key(50)), role: Role::Guest, uses: 1, expires: at(9000), approval: false },
        Body::Leave,
        enrolment(&clan.ledger.clan(), &key(30), 33),
        Body::RevokePerson { person: person(&key(4)), last: None },
        Body::RenamePerson { person: person(&key(3)), name: name("thief") },
        clan.ledger.role_change(&person(&key(4)), Role::Guest),
    ] {
        let entry = clan.say(&key(30), body);
        assert_eq!(clan.reason(&entry), Some(VoidReason::RecoveryKey));
    }
    // Not even as an admin's does it touch other people's devices.
    let others = clan.say(&key(30), Body::RevokeDevice { device: device(&key(4)), last: None });
    assert_eq!(clan.reason(&others), Some(VoidReason::RecoveryKey));
    // A thief has the laptop, and puts the recovery key out before its owner comes to use it.
    let theft = clan.say(&key(3), clan.ledger.revocation_of_device(&device(&key(30))));
    let added = clan.add_device(&key(30), 31, DeviceKind::Device);
    assert_eq!(clan.reason(&added), Some(VoidReason::AuthorRevoked));
    clan.say(&key(30), clan.ledger.revocation_of_device(&device(&key(3))));
    assert_eq!(clan.reason(&theft), Some(VoidReason::Outranked));
    assert_eq!(clan.reason(&added), None);
    let back = clan.say(
        &key(31),
        Body::Invite { invite: invite(&key(51)), role: Role::Guest, uses: 1, expires: at(9000), approval: false },
    );
    assert_eq!(clan.reason(&back), None, "the owner is back on a new device");
    assert!(clan.ledger.state().device_in_good_standing(&device(&key(3))).is_none());
}

#[test]
fn what_a_stolen_device_says_about_others_is_weighed_after_it_was_put_out() {
    let mut clan = family();
    clan.add_device(&key(3), 30, DeviceKind::Device);
    let mut thief = clan.clone();
    clan.say(&key(30), clan.ledger.revocation_of_device(&device(&key(3))));
    let malice = thief.say(&key(3), thief.ledger.revocation_of_person(&person(&key(4))).pop().unwrap());
    clan.merge(&thief);
    assert_eq!(clan.role(4), Some(Role::Member));
    assert_eq!(clan.reason(&malice), Some(VoidReason::AuthorRevoked));
}

#[test]
fn who_puts_a_person_out_cuts_all_their_devices_off() {
    let mut clan = family();
    clan.add_device(&key(3), 30, DeviceKind::Device);
    let mut behind = clan.clone();
    for body in clan.ledger.revocation_of_person(&person(&key(3))) {
        let entry = clan.say(&key(1), body);
        assert_eq!(clan.reason(&entry), None);
    }
    // Back-dated by the other device, and by one that it adds behind our back.
    behind.add_device(&key(30), 31, DeviceKind::Device);
    let invites: Vec<_> = [(30, 50), (31, 51)]
        .into_iter()
        .map(|(by, secret)| {
            let (invite, expires) = (invite(&key(secret)), at(9000));
            behind.say(&key(by), Body::Invite { invite, role: Role::Member, uses: 1, expires, approval: false })
        })
        .collect();
    assert!(invites.iter().all(|entry| behind.reason(entry).is_none()));
    clan.merge(&behind);
    assert_eq!(clan.reason(&invites[0]), Some(VoidReason::AuthorRevoked));
    assert_eq!(clan.reason(&invites[1]), Some(VoidReason::Outsider));
    assert_eq!((clan.role(3), clan.has_machine(3)), (None, false));
}

#[test]
fn nobody_has_more_devices_than_a_demotion_can_name() {
    let mut clan = family();
    let mut last = None;
    for n in 0..60u8 {
        last = Some(clan.add_device(&key(3), 120 + n, DeviceKind::Device));
    }
    assert_eq!(clan.reason(&last.unwrap()), Some(VoidReason::TooManyDevices));
    for n in 0..60u8 {
        clan.say(&key(120 + n), Body::RenamePerson { person: person(&key(3)), name: name(&format!("n{n}")) });
    }
    let demotion = clan.set_role(&key(1), 3, Role::Guest);
    assert_eq!((clan.reason(&demotion), clan.role(3)), (None, Some(Role::Guest)));
}

fn with_approval(clan: &mut Clan, by: u8, secret: u8, role: Role, uses: u32) -> Entry {
    let (invite, expires) = (invite(&key(secret)), at(clan.now + 1000));
    clan.say(&key(by), Body::Invite { invite, role, uses, expires, approval: true })
}

#[test]
fn an_invite_with_approval_admits_once_an_admin_has_approved() {
    let mut clan = family();
    with_approval(&mut clan, 3, 50, Role::Member, 1);
    let admission = clan.ask(6, 50);
    let enrol = clan.enrol(6);
    clan.countersign(1, &admission);
    assert_eq!((clan.role(6), clan.has_machine(6)), (None, false));
    assert_eq!(clan.reason(&admission), Some(VoidReason::NotApproved));
    assert_eq!(clan.reason(&enrol), Some(VoidReason::NotApproved));
    let pending = clan.ledger.state().pending[&person(&key(6))].clone();
    assert_eq!((pending.admission, pending.role, pending.name), (admission.id(), Role::Member, name("p6")));
    assert!(clan.ledger.state().is_person_name(&name("p6")), "the name is kept for them");
    for by in [4, 5, 6] {
        let refused = clan.say(&key(by), Body::Approve { admission: admission.id() });
        assert!(clan.reason(&refused).is_some(), "{by}");
    }
    clan.countersign(3, &admission);
    let approval = clan.say(&key(3), Body::Approve { admission: admission.id() });
    assert_eq!(clan.reason(&approval), None);
    assert_eq!((clan.role(6), clan.has_machine(6)), (Some(Role::Member), true));
    let state = clan.ledger.state();
    assert!(state.pending.is_empty());
    assert_eq!(state.people[&person(&key(6))].approved_by, Some(person(&key(3))));
    assert_eq!((clan.reason(&admission), clan.reason(&enrol)), (None, None));
    let late = clan.say(&key(1), Body::Deny { admission: admission.id() });
    assert_eq!((clan.reason(&late), clan.role(6)), (Some(VoidReason::Decided), Some(Role::Member)));
}

#[test]
fn who_is_denied_stays_out_and_the_use_stays_used() {
    let mut clan = family();
    with_approval(&mut clan, 1, 50, Role::Member, 1);
    let admission = clan.redeem(6, 50);
    let deny = clan.say(&key(3), Body::Deny { admission: admission.id() });
    assert_eq!((clan.reason(&deny), clan.reason(&admission)), (None, Some(VoidReason::Denied)));
    let again = clan.say(&key(1), Body::Approve { admission: admission.id() });
    assert_eq!((clan.reason(&again), clan.role(6)), (Some(VoidReason::Decided), None));
    assert!(!clan.ledger.state().is_person_name(&name("p6")));
    let second = clan.redeem(7, 50);
    assert_eq!(clan.role(7), None);
    assert!(matches!(clan.reason(&second), Some(VoidReason::Invite(_))));
}

#[test]
fn only_owners_approve_an_admin() {
    let mut clan = family();
    with_approval(&mut clan, 1, 50, Role::Admin, 1);
    let admission = clan.redeem(6, 50);
    let admins = clan.say(&key(3), Body::Approve { admission: admission.id() });
    assert_eq!((clan.reason(&admins), clan.role(6)), (Some(VoidReason::NotAllowed), None));
    clan.say(&key(2), Body::Approve { admission: admission.id() });
    assert_eq!(clan.role(6), Some(Role::Admin));
    let nothing = clan.say(&key(2), Body::Approve { admission: EntryId::from_bytes([9; 32]) });
    assert_eq!(clan.reason(&nothing), Some(VoidReason::NoSubject));
}

#[test]
fn people_and_machines_are_renamed_by_themselves_and_by_admins_up_to_their_role() {
    for (by, subject, may) in [
        (4, 4, true),
        (5, 5, true),
        (3, 4, true),
        (3, 3, true),
        (4, 5, false),
        (3, 1, false),
        (1, 2, true),
        (2, 1, true),
    ] {
        let mut clan = family();
        let new = name("renamed");
        let entry = clan.say(&key(by), Body::RenamePerson { person: person(&key(subject)), name: new.clone() });
        assert_eq!(clan.reason(&entry), (!may).then_some(VoidReason::NotAllowed), "{by} renames {subject}");
        assert_eq!(clan.ledger.state().person_named(&new).is_some(), may);
        assert_eq!(clan.ledger.state().is_person_name(&name(&format!("p{subject}"))), !may, "the old name is free");
        if subject != 5 {
            let new = machine_name("nas");
            let entry =
                clan.say(&key(by), Body::RenameMachine { machine: machine(&key(100 + subject)), name: new.clone() });
            assert_eq!(
                clan.reason(&entry),
                (!may).then_some(VoidReason::NotAllowed),
                "{by} renames a machine of {subject}"
            );
            assert_eq!(clan.ledger.state().machine_named(&new).is_some(), may);
        }
    }
    let mut clan = family();
    let taken = clan.say(&key(4), Body::RenamePerson { person: person(&key(4)), name: name("p3") });
    assert_eq!(clan.reason(&taken), Some(VoidReason::NameTaken));
    let taken = clan.say(&key(4), Body::RenameMachine { machine: machine(&key(104)), name: machine_name("m3") });
    assert_eq!(clan.reason(&taken), Some(VoidReason::NameTaken));
    let same = clan.say(&key(4), Body::RenamePerson { person: person(&key(4)), name: name("p4") });
    assert_eq!(clan.reason(&same), None);
    let nobody = clan.say(&key(1), Body::RenameMachine { machine: machine(&key(77)), name: machine_name("x") });
    assert_eq!(clan.reason(&nobody), Some(VoidReason::NoSubject));
}

#[test]
fn a_name_taken_behind_our_back_keeps_nobody_out() {
    let mut clan = family();
    let mut behind = clan.clone();
    clan.now += 100;
    clan.join(6, 1, Role::Owner);
    // A member takes the newcomer's name and their machine's, back-dated.
    behind.say(&key(4), Body::RenamePerson { person: person(&key(4)), name: name("p6") });
    behind.say(&key(4), Body::RenameMachine { machine: machine(&key(104)), name: machine_name("m6") });
    clan.merge(&behind);
    assert_eq!((clan.role(6), clan.has_machine(6)), (Some(Role::Owner), true));
    let state = clan.ledger.state();
    assert_eq!(state.people[&person(&key(6))].name, name("p6-2"));
    assert_eq!(state.machines[&machine(&key(106))].name, machine_name("m6-2"));
}

#[test]
fn a_machines_owner_and_admins_offer_it_as_a_relay() {
    let relay = |n: u8, host: &str| Body::Relay {
        machine: machine(&key(n)),
        host: host.parse().unwrap(),
        port: 443,
        certificate: CertificateHash::from_bytes([1; 32]),
    };
    let mut clan = family();
    for (by, owner, may) in [(4, 4, true), (3, 4, true), (4, 3, false), (3, 1, false), (1, 3, true)] {
        let entry = clan.say(&key(by), relay(100 + owner, "relay.example.org"));
        assert_eq!(clan.reason(&entry), (!may).then_some(VoidReason::NotAllowed), "{by} offers a machine of {owner}");
    }
    let nobody = clan.say(&key(1), relay(77, "relay.example.org"));
    assert_eq!(clan.reason(&nobody), Some(VoidReason::NoSubject));
    clan.say(&key(4), relay(104, "203.0.113.7"));
    let hosts = |clan: &Clan| -> Vec<_> {
        clan.ledger.state().good_relays().map(|(machine, relay)| (*machine, relay.host.to_string())).collect()
    };
    let mut expected =
        vec![(machine(&key(103)), "relay.example.org".to_owned()), (machine(&key(104)), "203.0.113.7".to_owned())];
    expected.sort();
    assert_eq!(hosts(&clan), expected);
    clan.say(&key(1), clan.ledger.revocation_of_machine(&machine(&key(103))));
    assert_eq!(hosts(&clan).len(), 1);
    let off = clan.say(&key(5), Body::RelayOff { machine: machine(&key(104)) });
    assert_eq!(clan.reason(&off), Some(VoidReason::NotAllowed));
    clan.say(&key(4), Body::RelayOff { machine: machine(&key(104)) });
    assert_eq!(hosts(&clan), []);
}

#[test]
fn a_standard_wireguard_machine_lives_behind_a_machine_of_its_owner() {
    let add = |wg: u8, label: &str, via: u8| Body::AddPeer {
        wg: WgPublicKey::from_bytes([wg; 32]),
        name: machine_name(label),
        via: machine(&key(via)),
    };
    let mut clan = family();
    let phone = clan.say(&key(4), add(200, "phone", 104));
    assert_eq!(clan.reason(&phone), None);
    let state = clan.ledger.state();
    let (wg, peer) = state.good_peers().next().unwrap();
    assert_eq!((peer.owner, peer.via), (person(&key(4)), machine(&key(104))));
    assert!(state.is_node_name(&machine_name("phone")));
    assert!(state.is_meant(&Node::Peer(*wg), &Party::Person(person(&key(4)))));
    for (by, body, why) in [
        (4, add(201, "m3", 104), VoidReason::NameTaken),
        (4, add(201, "phone", 104), VoidReason::NameTaken),
        (4, add(201, "tablet", 103), VoidReason::NotAllowed),
        (5, add(201, "tablet", 104), VoidReason::NotAllowed),
        (4, add(3, "tablet", 104), VoidReason::KeyTaken),
        (4, add(201, "tablet", 77), VoidReason::NoSubject),
        (5, Body::RemovePeer { wg: *wg }, VoidReason::NotAllowed),
    ] {
        let entry = clan.say(&key(by), body);
        assert_eq!(clan.reason(&entry), Some(why), "{by}: {:?}", entry.body());
    }
    let enrol = clan.say(&key(4), enrol(&clan.ledger.clan(), &key(4), 105, "x", 200));
    assert_eq!(clan.reason(&enrol), Some(VoidReason::KeyTaken));
    // Its owner moves it, an admin takes it out, and its name is free.
    let moved = clan.say(&key(4), add(200, "mobile", 104));
    assert_eq!(clan.reason(&moved), None);
    assert!(!clan.ledger.state().is_node_name(&machine_name("phone")));
    clan.say(&key(3), Body::RemovePeer { wg: WgPublicKey::from_bytes([200; 32]) });
    assert_eq!(clan.ledger.state().good_peers().count(), 0);
    assert!(!clan.ledger.state().is_node_name(&machine_name("mobile")));
    clan.say(&key(4), add(200, "mobile", 104));
    clan.say(&key(1), clan.ledger.revocation_of_machine(&machine(&key(104))));
    assert_eq!(clan.ledger.state().good_peers().count(), 0, "nobody speaks the mesh for it");
}

#[test]
fn every_machine_has_an_ipv4_address_of_its_own() {
    let mut clan = family();
    for n in 0..40u8 {
        clan.say(&key(1), enrol(&clan.ledger.clan(), &key(1), n + 150, "many", n + 100));
    }
    let machines = &clan.ledger.state().machines;
    let addresses: BTreeSet<_> = machines.values().map(|machine| machine.ipv4).collect();
    assert_eq!(addresses.len(), machines.len());
    assert!(addresses.iter().all(|a| a.octets()[0] == 100 && (64..128).contains(&a.octets()[1])));
    assert!(machines.values().all(|machine| machine.standing == Standing::Good));
}

#[test]
fn admins_make_groups_and_rules_and_a_clan_begins_with_some() {
    let mut clan = family();
    let names = |clan: &Clan| -> Vec<_> { clan.ledger.state().rules.keys().map(|name| name.to_string()).collect() };
    assert_eq!(names(&clan), ["own", "ping", "services", "ssh"]);
    let rule = |label: &str| Body::Rule {
        name: label.parse().unwrap(),
        from: Party::Group("kids".parse().unwrap()),
        to: Target::Service("films".parse().unwrap()),
        ports: vec![PortRange::one(Protocol::Tcp, 80)],
    };
    let kids = Body::Group {
        name: "kids".parse().unwrap(),
        members: vec![Party::Person(person(&key(5))), Party::Machine(machine(&key(104)))],
    };
    for by in [4, 5] {
        for body in [rule("films"), kids.clone(), Body::DropRule { name: "ssh".parse().unwrap() }] {
            let entry = clan.say(&key(by), body);
            assert_eq!(clan.reason(&entry), Some(VoidReason::NotAllowed));
        }
    }
    clan.say(&key(3), kids);
    clan.say(&key(3), rule("films"));
    clan.say(&key(3), Body::DropRule { name: "ssh".parse().unwrap() });
    assert_eq!(names(&clan), ["films", "own", "ping", "services"]);
    let state = clan.ledger.state();
    let group = Party::Group("kids".parse().unwrap());
    assert!(state.is_meant(&Node::Machine(machine(&key(104))), &group));
    assert!(!state.is_meant(&Node::Machine(machine(&key(103))), &group));
    assert!(state.is_meant(&Node::Machine(machine(&key(103))), &Party::Role(Role::Admin)));
    assert!(!state.is_meant(&Node::Machine(machine(&key(104))), &Party::Role(Role::Admin)));
    assert_eq!(state.rules[&"films".parse().unwrap()].by, Some(person(&key(3))));
    // Groups that contain one another end somewhere.
    clan.say(&key(3), Body::Group { name: "a".parse().unwrap(), members: vec![Party::Group("b".parse().unwrap())] });
    clan.say(&key(3), Body::Group { name: "b".parse().unwrap(), members: vec![Party::Group("a".parse().unwrap())] });
    assert!(!clan.ledger.state().is_meant(&Node::Machine(machine(&key(104))), &Party::Group("a".parse().unwrap())));
    clan.say(&key(3), Body::DropGroup { name: "kids".parse().unwrap() });
    assert!(!clan.ledger.state().is_meant(&Node::Machine(machine(&key(104))), &group));
    let none = clan.say(&key(3), Body::DropRule { name: "kids".parse().unwrap() });
    assert_eq!(clan.reason(&none), Some(VoidReason::NoSubject));
}
