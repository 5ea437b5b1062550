//! Bytes of strangers, hostile members and hostile guests, thrown at whatever reads them.
//!
//! Each function is one fuzz target: `fuzz/` runs them with libFuzzer (`make fuzz`), and a test runs them over the
//! corpora in `fuzz/corpus` with the ordinary compiler. A finding is a panic, a failed assertion, or memory or time out
//! of proportion.
//!
//! Signatures, MACs and checksums would stop nearly everything that a fuzzer invents. Hostile members can sign, and hostile
//! guests can compute checksums: so the first byte often says whether the rest is put into a rightly signed frame.

#![allow(clippy::expect_used, reason = "a finding is a panic")]

mod clan;
mod multicast;
mod mux;
mod packet;
mod qmp;
mod seeds;
mod words;

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use clan_ledger::{Entry, Intake, Ledger};
use clan_os::dns::{Zone, answer};
use clan_replica::{LinkId, Ticket};
use clan_tunnel::{Paths, ProbeKey};
use clan_types::{ClanName, InviteLink, MachineId, MachineName, PersonName, ServiceName};
use clan_wire::{
    agent::{AgentRequest, AgentResponse},
    codec,
    control::{ControlRequest, ControlResponse},
    helm::{Answer, Call, Ends, Greeting, Input, Output},
    image::Manifest,
    order::{Asks, Says},
    peer::{EntryPage, ImageRequest, ImageResponse, JoinRequest, JoinResponse, PeerMessage},
};
use data_encoding::BASE64URL_NOPAD;
use serde::{Serialize, de::DeserializeOwned};

pub use multicast::multicast;
pub use mux::mux;
pub use packet::packet;
pub use qmp::qmp;
pub use seeds::seeds;
pub use words::words;

/// A fuzz target.
pub type Target = fn(&[u8]);

/// All targets, by the names of their corpora.
pub const TARGETS: &[(&str, Target)] = &[
    ("entry", entry),
    ("peer", peer),
    ("join", join),
    ("control", control),
    ("mux", mux),
    ("link", link),
    ("manifest", manifest),
    ("dns", dns),
    ("probe", probe),
    ("packet", packet),
    ("multicast", multicast),
    ("words", words),
    ("helm", helm),
    ("qmp", qmp),
];

/// A ledger entry: as it comes, or rightly signed by an owner, a member or nobody.
pub fn entry(data: &[u8]) {
    let Some((who, rest)) = data.split_first() else { return };
    if *who == 0xff {
        if let Ok(entry) = Entry::decode(rest) {
            assert_eq!(entry.encode(), rest, "an entry has one encoding");
        }
        return;
    }
    let mut ledger = clan::ledger().clone();
    let mut other = Ledger::open(ledger.clan());
    let mut taken = Vec::new();
    for part in clan::parts(rest) {
        let Some((author, content)) = part.split_first() else { continue };
        if let Ok(entry) = Entry::decode(&clan::signed_entry(*who ^ *author, content)) {
            let _ = ledger.insert(entry.clone());
            taken.push(entry);
        }
    }
    if taken.is_empty() {
        return;
    }
    // The order in which entries arrive makes no difference.
    other.insert_all(taken.into_iter().rev());
    other.insert_all(clan::ledger().entries().cloned());
    assert_eq!(ledger.state(), other.state());
    assert!(ledger.entries().all(|entry| Entry::decode(entry.as_bytes()).is_ok_and(|again| again == *entry)));
}

/// Messages of a machine of the clan, and beacons that it signs.
pub fn peer(data: &[u8]) {
    let mut replica = clan::replica();
    let member = clan::machine(clan::MEMBER);
    replica.handle_linked(member, LinkId(1), vec![], clan::now(1));
    clan::settle(&mut replica);
    for part in clan::parts(data) {
        let Some((kind, rest)) = part.split_first() else { continue };
        let message = match *kind {
            0 => clan::signed_beacon(rest),
            1 => Some(PeerMessage::Entries(vec![clan::signed_entry(clan::MEMBER, rest)])),
            _ => round_trip::<PeerMessage>(rest),
        };
        if let Some(message) = message {
            replica.handle_message(LinkId(1), member, message, clan::now(2));
            clan::settle(&mut replica);
        }
    }
    replica.handle_timeout(clan::now(100));
    clan::settle(&mut replica);
}

/// What newcomers ask, and what they are answered.
pub fn join(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    let mut replica = clan::replica();
    let stranger = clan::machine(clan::STRANGER);
    let request = match *kind {
        0 => {
            let entries = clan::parts(rest).map(|part| clan::signed_entry(clan::STRANGER, part)).collect();
            Some(JoinRequest::Redeem { entries, have: Vec::new() })
        }
        1 => return read::<JoinResponse>(rest),
        2 => {
            if let Some(ImageRequest { proof: Some(proof), .. }) = round_trip(rest) {
                let _ = proof.is_valid(&replica.clan(), &stranger);
            }
            return;
        }
        3 => return read::<ImageResponse>(rest),
        4 => {
            if let Some(EntryPage { entries, more }) = round_trip(rest) {
                let _ = Intake::new(clan::ledger().clone()).take(entries.iter().map(Vec::as_slice), !more);
            }
            return;
        }
        _ => round_trip(rest),
    };
    match request {
        Some(JoinRequest::Preview { proof, have }) => {
            let _ = replica.preview(&proof, &stranger, clan::now(1));
            assert!(replica.page(&have, None).is_some());
        }
        Some(JoinRequest::Redeem { entries, .. }) => {
            replica.handle_redemption(Ticket(1), entries, clan::now(1));
            assert_eq!(clan::settle(&mut replica), 1, "a newcomer is answered once");
        }
        Some(JoinRequest::Locate { proof, .. }) => {
            let _ = replica.locate(&proof, &stranger, clan::now(1));
        }
        Some(JoinRequest::Stay) | None => {}
    }
}

/// What managers, controllers and agents say to each other: the guest may be hostile to the manager.
pub fn control(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    match *kind {
        0 => read::<ControlRequest>(rest),
        1 => read::<AgentRequest>(rest),
        2 => read::<AgentResponse>(rest),
        _ => read::<ControlResponse>(rest),
    }
}

/// What those who steer machines say, and what the machines say to them: neither trusts the other.
///
/// INVARIANT looked for: no call is taken for somebody's who did not sign it.
pub fn helm(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    match *kind {
        0 => {
            if let Some(call) = round_trip::<Call>(rest) {
                let ends = Ends {
                    clan: clan::ledger().clan(),
                    from: clan::machine(clan::STRANGER),
                    to: clan::machine(clan::MEMBER),
                    challenge: [7; 32],
                };
                let _ = call.request.is_bounded();
                assert!(call.proof.is_none_or(|proof| !proof.is_valid(&ends, &call.request)), "a forged call");
            }
        }
        1 => read::<Greeting>(rest),
        2 => read::<Answer>(rest),
        3 => read::<Input>(rest),
        // Between a guest's controller and its manager.
        5 => read::<Asks>(rest),
        6 => read::<Says>(rest),
        _ => read::<Output>(rest),
    }
}

/// Invitation links and names: text that people paste.
pub fn link(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    let text = if *kind == 0 {
        // A rightful checksum.
        let checksum = blake3::hash(rest);
        let bytes = [rest, &checksum.as_bytes()[..4]].concat();
        format!("clan://join/{}", BASE64URL_NOPAD.encode(&bytes))
    } else {
        String::from_utf8_lossy(rest).into_owned()
    };
    // Whatever a person pastes around it.
    let _ = InviteLink::in_text(&text);
    if let Ok(link) = text.parse::<InviteLink>() {
        let again: InviteLink = link.to_string().parse().expect("what was printed can be read");
        assert_eq!(again, link);
    }
    let _ = (text.parse::<ClanName>(), text.parse::<PersonName>());
    let _ = (text.parse::<MachineName>(), text.parse::<ServiceName>(), text.parse::<MachineId>());
}

/// An image's manifest.
pub fn manifest(data: &[u8]) {
    if let Ok(manifest) = Manifest::decode(data, None) {
        let again = manifest.encode().expect("a manifest that was decoded can be encoded");
        assert_eq!(Manifest::decode(&again, None).as_ref(), Ok(&manifest));
        let _ = manifest.total_size();
    }
}

/// A question to the name server.
pub fn dns(data: &[u8]) {
    let hosts = [("alice", "fd01:203:405::1"), ("bob", "fd01:203:405::2")];
    let zone = Zone {
        clan: "family".parse().expect("a name"),
        ipv4: BTreeMap::from([(Ipv6Addr::LOCALHOST, Ipv4Addr::LOCALHOST)]),
        hosts: hosts.into_iter().filter_map(|(label, a)| Some((label.to_owned(), a.parse().ok()?))).collect(),
    };
    let _ = answer(data, &zone);
}

/// Probes from anywhere: as they come, or with the right tag and MAC.
pub fn probe(data: &[u8]) {
    const SECRET: [u8; 32] = [7; 32];
    let (local, remote) = (MachineId::from_bytes([1; 32]), MachineId::from_bytes([2; 32]));
    let mut paths = Paths::new(local, [3; 32]);
    paths.add_peer(remote, ProbeKey::derive(&SECRET), &[SocketAddr::from(([192, 0, 2, 1], 1))], Duration::ZERO);
    let key = blake3::derive_key("clan 2026-11 path probe v1", &SECRET);
    let tag = blake3::derive_key("clan 2026-11 path probe tag v1", &key);
    let mut now = Duration::ZERO;
    for part in clan::parts(data) {
        let Some((kind, rest)) = part.split_first() else { continue };
        let source = SocketAddr::from(([192, 0, 2, *kind], 1 + u16::from(*kind % 3)));
        let datagram = if *kind < 0x80 {
            let mut bytes = [0; 64];
            let length = rest.len().min(60);
            bytes[4..4 + length].copy_from_slice(&rest[..length]);
            bytes[..3].copy_from_slice(&[0xc1, 1, 1 + *kind % 4]);
            bytes[4..12].copy_from_slice(&tag[..8]);
            let mut mac = blake3::Hasher::new_keyed(&key);
            mac.update(&bytes).update(remote.as_bytes()).update(local.as_bytes());
            [&bytes[..], &mac.finalize().as_bytes()[..16]].concat()
        } else {
            rest.to_vec()
        };
        if let Some(reply) = paths.handle_probe(source, &datagram, now) {
            assert!(reply.bytes.len() <= datagram.len(), "nobody is used to amplify traffic");
        }
        now += Duration::from_millis(300);
        paths.handle_timeout(now);
        while paths.poll_transmit().is_some() {}
        while paths.poll_change().is_some() {}
    }
}

fn read<T: Serialize + DeserializeOwned + PartialEq>(bytes: &[u8]) {
    let _ = round_trip::<T>(bytes);
}

/// Decodes a message, as its receiver does, and sees that what was understood can be said again.
fn round_trip<T: Serialize + DeserializeOwned + PartialEq>(bytes: &[u8]) -> Option<T> {
    let message: T = codec::decode(bytes).ok()?;
    let again = codec::encode(&message, usize::MAX).expect("what was decoded can be encoded");
    assert!(codec::decode::<T>(&again[codec::PREFIX..]).is_ok_and(|decoded| decoded == message));
    Some(message)
}
