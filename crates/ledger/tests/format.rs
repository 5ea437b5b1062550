//! The encoding of entries.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use clan_ledger::{
    Applications, AuthorId, Body, DeviceKind, Entry, EntryError, LastEntry, MAX_APPLICATIONS, MAX_ENTRY, Party,
    PortRange, Protocol, Target, VmDescription, VmSetup,
};
use clan_types::{ByteSize, CertificateHash, ClanId, EntryId, Hlc, ImageId, Role, Timestamp, WgPublicKey};
use common::*;
use ed25519_dalek::Signer;
use proptest::prelude::*;

fn samples() -> Vec<Entry> {
    let mut clan = Clan::new();
    clan.join(2, 1, Role::Admin);
    for body in clan.ledger.revocation_of_person(&person(&key(2))) {
        clan.say(&key(1), body);
    }
    for body in bodies() {
        if !matches!(body, Body::Found { .. } | Body::Admission { .. }) {
            clan.say(&key(1), body);
        }
    }
    clan.ledger.entries().cloned().collect()
}

/// One of each, in the order of their numbers.
fn bodies() -> Vec<Body> {
    let clan = ClanId::from_bytes([1; 32]);
    let (machine, person, invite) = (machine(&key(4)), person(&key(3)), invite(&key(5)));
    let (wg, admission) = (WgPublicKey::from_bytes([6; 32]), EntryId::from_bytes([7; 32]));
    let last = LastEntry { seq: 3, id: admission };
    let (label, by) = ("x".parse().unwrap(), AuthorId::of(&key(1)));
    let founding = Clan::new().ledger.clan();
    let description = VmDescription {
        image: ImageId::from_bytes([8; 32]),
        title: "Debian".parse().unwrap(),
        memory: ByteSize::from_mib(512),
        cpus: 1,
        disk: ByteSize::from_mib(4096),
    };
    vec![
        Body::Found { clan: "family".parse().unwrap(), founder: name("p1"), nonce: [7; 32] },
        Body::enrol(&key(4), &founding, &by, machine_name("nas"), wg),
        Body::Remove { machine },
        Body::Invite { invite, role: Role::Guest, uses: 1, expires: at(1), approval: true },
        Body::admission(&key(5), &clan, &person, name("p3")),
        Body::Countersign { admission },
        Body::Publish { description: description.clone() },
        Body::RevokePerson { person, last: None },
        Body::RevokeMachine { machine, last: Some(last) },
        Body::RevokeInvite { invite },
        Body::Leave,
        Body::SetRole { person, role: Role::Admin, last: vec![(device(&key(3)), last)] },
        Body::RenamePerson { person, name: name("carla") },
        Body::RenameMachine { machine, name: machine_name("attic") },
        Body::Approve { admission },
        Body::Deny { admission },
        Body::add_device(&key(9), &founding, &by, "phone".parse().unwrap(), DeviceKind::Recovery),
        Body::RevokeDevice { device: device(&key(9)), last: None },
        Body::Relay {
            machine,
            host: "relay.example.org".parse().unwrap(),
            port: 443,
            certificate: CertificateHash::from_bytes([9; 32]),
        },
        Body::RelayOff { machine },
        Body::AddPeer { wg, name: machine_name("phone"), via: machine },
        Body::RemovePeer { wg },
        Body::Group { name: "kids".parse().unwrap(), members: vec![Party::Person(person), Party::Peer(wg)] },
        Body::Rule {
            name: label,
            from: Party::Everybody,
            to: Target::Service("films".parse().unwrap()),
            ports: vec![PortRange::one(Protocol::Tcp, 443)],
        },
        Body::DropRule { name: "x".parse().unwrap() },
        Body::DropGroup { name: "kids".parse().unwrap() },
        Body::SuggestControl { control: clan_types::ControlMode::Shared },
        Body::PublishVm { description, setup: setup("mesh", &["web", "wiki"]) },
    ]
}

fn setup(network: &str, applications: &[&str]) -> VmSetup {
    VmSetup {
        network: network.parse().unwrap(),
        control: clan_types::ControlMode::Shared,
        applications: Applications::new(applications.iter().map(|name| name.parse().unwrap())).unwrap(),
    }
}

#[test]
fn what_an_entry_says_keeps_its_number() {
    for (number, body) in bodies().iter().enumerate() {
        let encoded = postcard::to_allocvec(body).unwrap();
        assert_eq!(usize::from(encoded[0]), number, "{body:?}");
        assert_eq!(&postcard::from_bytes::<Body>(&encoded).unwrap(), body);
    }
}

#[test]
fn entries_round_trip() {
    for entry in samples() {
        let again = Entry::decode(&entry.encode()).unwrap();
        assert_eq!((again.id(), again.body(), again.clan()), (entry.id(), entry.body(), entry.clan()));
        assert_eq!(again.encode(), entry.encode());
    }
}

#[test]
fn every_flipped_bit_and_every_cut_is_refused() {
    for entry in samples() {
        let bytes = entry.encode();
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(Entry::decode(&changed).is_err(), "bit {bit} of {entry:?}");
        }
        for end in 0..bytes.len() {
            assert!(Entry::decode(&bytes[..end]).is_err(), "cut at {end}");
        }
        assert!(Entry::decode(&[bytes.as_slice(), &[0]].concat()).is_err(), "longer by a byte");
    }
}

#[test]
fn a_newer_version_and_a_giant_are_told_apart() {
    let mut bytes = samples()[0].encode();
    bytes[0] = 9;
    assert_eq!(Entry::decode(&bytes), Err(EntryError::NewerVersion(9)));
    assert_eq!(Entry::decode(&vec![1; MAX_ENTRY + 1]), Err(EntryError::TooLong));
}

#[test]
fn an_entry_of_before_descriptions_said_all_is_read_as_it_was_written() {
    // As the first version wrote it, byte by byte.
    let body = &bodies()[6];
    let written = [
        vec![6],
        vec![8; 32],
        vec![6],
        b"Debian".to_vec(),
        postcard::to_allocvec(&(512u64 << 20)).unwrap(),
        vec![1],
        postcard::to_allocvec(&(4096u64 << 20)).unwrap(),
    ]
    .concat();
    assert_eq!(postcard::to_allocvec(body).unwrap(), written);
    assert_eq!(&postcard::from_bytes::<Body>(&written).unwrap(), body);
}

#[test]
fn a_description_may_name_what_only_a_newer_version_knows_and_no_more_than_fits_an_entry() {
    let founding = Clan::new().ledger.clan();
    let names: Vec<String> = (0..MAX_APPLICATIONS).map(|n| format!("{n:a<63}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let Body::PublishVm { description, .. } = bodies().pop().unwrap() else { unreachable!() };
    let description = VmDescription { title: "ü".repeat(200).parse().unwrap(), ..description };
    let largest = Body::PublishVm { description, setup: setup(&"x".repeat(63), &names) };
    let time = Hlc { wall: at(0), counter: 0 };
    let entry = Entry::sign(&key(1), Some(&founding), 0, None, time, largest.clone()).unwrap();
    let again = Entry::decode(&entry.encode()).unwrap();
    assert_eq!(again.body(), &largest);
    let Body::PublishVm { setup: VmSetup { network, .. }, .. } = again.body() else { unreachable!() };
    assert!(!network.is_known());
    assert!(Applications::new((0..=MAX_APPLICATIONS).map(|n| format!("a{n}").parse().unwrap())).is_err());
}

#[test]
fn applications_have_one_encoding() {
    let encode = |names: &[&str]| postcard::to_allocvec(&names).unwrap();
    let decode = |names: &[&str]| postcard::from_bytes::<Applications>(&encode(names));
    let both = Applications::new(["web", "wiki"].map(|n| n.parse().unwrap())).unwrap();
    assert_eq!(postcard::to_allocvec(&both).unwrap(), encode(&["web", "wiki"]));
    // In another order, or twice, it is the same value: whose encoding is another, so that no entry has it.
    assert_eq!(decode(&["wiki", "web", "web"]), Ok(both));
    assert!(decode(&["Bad name"]).is_err());
    let many: Vec<String> = (0..=MAX_APPLICATIONS).map(|n| format!("a{n}")).collect();
    assert!(decode(&many.iter().map(String::as_str).collect::<Vec<_>>()).is_err());
}

#[test]
fn an_admission_needs_the_invites_secret_for_this_person_and_this_clan() {
    let (clan, other) = (ClanId::from_bytes([1; 32]), ClanId::from_bytes([2; 32]));
    let time = Hlc { wall: at(0), counter: 0 };
    let good = Body::admission(&key(50), &clan, &person(&key(2)), name("eve"));
    assert!(Entry::sign(&key(2), Some(&clan), 0, None, time, good.clone()).is_ok());
    assert_eq!(Entry::sign(&key(3), Some(&clan), 0, None, time, good.clone()), Err(EntryError::BadProof));
    assert_eq!(Entry::sign(&key(2), Some(&other), 0, None, time, good), Err(EntryError::BadProof));
}

#[test]
fn a_machine_is_added_by_whom_it_has_agreed_to_with_the_keys_that_it_has() {
    let (clan, other) = (ClanId::from_bytes([1; 32]), ClanId::from_bytes([2; 32]));
    let (time, wg) = (Hlc { wall: at(0), counter: 0 }, WgPublicKey::from_bytes([6; 32]));
    let good = Body::enrol(&key(50), &clan, &AuthorId::of(&key(2)), machine_name("nas"), wg);
    let sign = |by: u8, clan: &ClanId, body: &Body| Entry::sign(&key(by), Some(clan), 0, None, time, body.clone());
    assert!(sign(2, &clan, &good).is_ok());
    assert_eq!(sign(3, &clan, &good), Err(EntryError::BadProof), "somebody else");
    assert_eq!(sign(2, &other, &good), Err(EntryError::BadProof), "another clan");
    let Body::Enrol { machine, name, proof, .. } = good.clone() else { unreachable!() };
    let swapped = Body::Enrol { machine, name: name.clone(), wg: WgPublicKey::from_bytes([7; 32]), proof };
    assert_eq!(sign(2, &clan, &swapped), Err(EntryError::BadProof), "another WireGuard key");
    let stolen = Body::Enrol { machine: AuthorId::of(&key(51)).machine(), name, wg, proof };
    assert_eq!(sign(2, &clan, &stolen), Err(EntryError::BadProof), "a machine that did not agree");
    // Nor is one taken from others that was signed all the same.
    let bytes = sign(2, &clan, &good).unwrap().encode();
    let place = bytes.windows(32).position(|window| window == wg.as_bytes()).unwrap();
    let mut forged = bytes[..bytes.len() - 64].to_vec();
    forged[place] ^= 1;
    let statement = [b"clan 2026-11 ledger entry v1".as_slice(), &forged].concat();
    forged.extend_from_slice(&key(2).sign(&statement).to_bytes());
    assert_eq!(Entry::decode(&forged), Err(EntryError::BadProof));
}

#[test]
fn entries_out_of_place_or_time_cannot_be_made() {
    let clan = ClanId::from_bytes([1; 32]);
    let time = Hlc { wall: at(0), counter: 0 };
    let id = samples()[0].id();
    assert_eq!(Entry::sign(&key(1), Some(&clan), 1, None, time, Body::Leave), Err(EntryError::Misplaced));
    assert_eq!(Entry::sign(&key(1), Some(&clan), 0, Some(id), time, Body::Leave), Err(EntryError::Misplaced));
    assert_eq!(Entry::sign(&key(1), None, 0, None, time, Body::Leave), Err(EntryError::Misplaced));
    let late = Hlc { wall: Timestamp::from_millis(u64::MAX), counter: 0 };
    assert_eq!(Entry::sign(&key(1), Some(&clan), 0, None, late, Body::Leave), Err(EntryError::TimeOutOfRange));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn decoding_any_bytes_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(Entry::decode(&bytes).is_err());
        prop_assert!(Entry::decode(&[&[1], bytes.as_slice()].concat()).is_err());
    }
}
