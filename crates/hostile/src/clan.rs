//! A small clan for hostile bytes to arrive at: fixed keys, everything on disk at once.

use std::{sync::OnceLock, time::Duration};

use clan_ledger::{AuthorId, Body, Entry, Ledger};
use clan_replica::{Action, Config, Now, Own, Replica};
use clan_types::{ClanId, InviteId, MachineId, PersonId, Role, Timestamp, WgPublicKey};
use clan_wire::{
    beacon::{Beacon, SignedBeacon},
    codec,
    peer::{EncodedEntry, PeerMessage},
};
use ed25519_dalek::{Signer, SigningKey};

/// Key 1 founds the clan and has machine 101; key 2 is a member with machine 102.
pub(crate) const MEMBER: u8 = 102;
/// Nobody of the clan.
pub(crate) const STRANGER: u8 = 9;
/// The secret of an open invite.
const INVITE: u8 = 50;
const EPOCH: u64 = 1_800_000_000_000;
/// Of these keys, entries are signed by that which a byte of the input names.
const AUTHORS: [u8; 8] = [1, 2, 101, 102, 9, 109, 3, 103];

pub(crate) fn key(n: u8) -> SigningKey {
    SigningKey::from_bytes(&[n; 32])
}

pub(crate) fn machine(n: u8) -> MachineId {
    MachineId::from_bytes(key(n).verifying_key().to_bytes())
}

fn person(n: u8) -> PersonId {
    PersonId::from_bytes(key(n).verifying_key().to_bytes())
}

pub(crate) fn now(seconds: u64) -> Now {
    Now { at: Duration::from_secs(seconds), wall: Timestamp::from_millis(EPOCH + seconds * 1000) }
}

/// The input in parts: each begins with its length, two bytes. What is left over is the last part.
pub(crate) fn parts(mut data: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut count = 0;
    std::iter::from_fn(move || {
        count += 1;
        if count > 16 {
            return None;
        }
        let (length, rest) = data.split_first_chunk::<2>()?;
        let (part, rest) = rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()));
        data = rest;
        Some(part)
    })
}

/// The clan's ledger.
pub(crate) fn ledger() -> &'static Ledger {
    static LEDGER: OnceLock<Ledger> = OnceLock::new();
    LEDGER.get_or_init(|| {
        let at = now(0).wall;
        let names = ("family".parse().expect("a name"), "ada".parse().expect("a name"));
        let (mut ledger, _) = Ledger::found(&key(1), names.0, names.1, [7; 32], at).expect("a clan");
        let invite = InviteId::from_bytes(key(INVITE).verifying_key().to_bytes());
        let expires = at.plus(Duration::from_secs(86_400));
        let clan = ledger.clan();
        say(&mut ledger, 1, enrol(&clan, 1, 101));
        say(&mut ledger, 1, Body::Invite { invite, role: Role::Member, uses: 2, expires, approval: false });
        let admission = Body::admission(&key(INVITE), &clan, &person(2), "bob".parse().expect("a name"));
        let admission = say(&mut ledger, 2, admission);
        say(&mut ledger, 2, enrol(&clan, 2, 102));
        say(&mut ledger, 101, Body::Countersign { admission: admission.id() });
        ledger
    })
}

fn enrol(clan: &ClanId, by: u8, n: u8) -> Body {
    let wg = WgPublicKey::from_bytes(*machine(n).as_bytes());
    Body::enrol(&key(n), clan, &AuthorId::of(&key(by)), format!("m{n}").parse().expect("a name"), wg)
}

fn say(ledger: &mut Ledger, author: u8, body: Body) -> Entry {
    let entry = ledger.author(&key(author), body, now(0).wall).expect("an entry");
    let _ = ledger.insert(entry.clone());
    entry
}

/// The founder's machine.
pub(crate) fn replica() -> Replica {
    let config = Config {
        key: key(101),
        version: "1".into(),
        own: Own::default(),
        bootstrap: vec![],
        seed: [0; 32],
        doubt: None,
    };
    let mut replica = Replica::new(config, ledger().clone(), now(0));
    replica.handle_timeout(now(0));
    settle(&mut replica);
    replica
}

/// Lets the disk take everything; says how many questions were answered.
pub(crate) fn settle(replica: &mut Replica) -> usize {
    let mut answers = 0;
    while let Some(action) = replica.poll_action() {
        match action {
            Action::Persist { write, .. } => replica.handle_persisted(write, now(1)),
            Action::Answer { .. } => answers += 1,
            _ => {}
        }
    }
    answers
}

/// An entry of this clan whose content after the author is `rest`, rightly signed.
///
/// Keeps to the format of entries as it is documented there: version, clan, author, then sequence number, predecessor, time and
/// body.
pub(crate) fn signed_entry(author: u8, rest: &[u8]) -> EncodedEntry {
    let number = if AUTHORS.contains(&author) { author } else { AUTHORS[usize::from(author) % AUTHORS.len()] };
    let key = key(number);
    let mut bytes = vec![1, 1];
    bytes.extend_from_slice(ledger().clan().as_bytes());
    bytes.extend_from_slice(key.verifying_key().as_bytes());
    bytes.extend_from_slice(rest);
    let signature = key.sign(&[b"clan 2026-11 ledger entry v1", &bytes[..]].concat());
    bytes.extend_from_slice(&signature.to_bytes());
    bytes
}

/// A beacon of the member's machine whose content after clan and machine is `rest`, rightly signed.
pub(crate) fn signed_beacon(rest: &[u8]) -> Option<PeerMessage> {
    let body = [ledger().clan().as_bytes(), machine(MEMBER).as_bytes(), rest].concat();
    if let Ok(beacon) = codec::decode::<Beacon>(&body) {
        return SignedBeacon::sign(&beacon, &key(MEMBER)).ok().map(PeerMessage::Beacon);
    }
    // Not a beacon: let the receiver find that out.
    let signature = key(MEMBER).sign(&[b"clan beacon v1", &body[..]].concat()).to_bytes().to_vec();
    let signed = postcard::to_allocvec(&(body, signature)).ok()?;
    codec::decode::<SignedBeacon>(&signed).ok().map(PeerMessage::Beacon)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_together_here_is_what_the_ledger_reads() {
        // Sequence number 0, no predecessor, time 5.0, and a `Leave`: the format as it stood when this was written.
        let entry = Entry::decode(&signed_entry(9, &[3, 1]));
        assert!(entry.is_err());
        let real = ledger().entries().find(|entry| entry.author() == person(2).into() && entry.seq() == 1).unwrap();
        let bytes = real.encode();
        let content = &bytes[2 + 32 + 32..bytes.len() - 64];
        assert_eq!(signed_entry(2, content), bytes, "signed in the same way");
    }

    #[test]
    fn a_beacon_that_is_put_together_here_is_believed() {
        let mut replica = replica();
        replica.handle_linked(machine(MEMBER), clan_replica::LinkId(1), vec![], now(1));
        settle(&mut replica);
        let beacon = Beacon {
            clan: ledger().clan(),
            machine: machine(MEMBER),
            made: now(1).wall,
            version: "1".into(),
            quic: vec![],
            wireguard: vec![],
            services: vec![],
            image: None,
            certificate: None,
            control: clan_types::ControlMode::Local,
        };
        let body = postcard::to_allocvec(&beacon).unwrap();
        let message = signed_beacon(&body[64..]).unwrap();
        replica.handle_message(clan_replica::LinkId(1), machine(MEMBER), message, now(2));
        assert!(replica.beacons().contains_key(&machine(MEMBER)));
    }
}
