//! Packets that a member sends through the tunnel, as they come or with rightful lengths and checksums.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use bytes::BytesMut;
use clan_tunnel::{
    filter::{Access, Filter, MAX_FLOWS, Policy, Transport},
    ip,
    offload::{self, Joiner, Offload, split},
};

use crate::clan;

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: [u8; 2] = [1, 58];
const MTU: usize = 65_535;

/// What the filter lets in is joined into super-packets and taken apart again; what goes out is split.
pub fn packet(data: &[u8]) {
    let policy = policy();
    let mut filter = Filter::default();
    filter.set_policy(policy.clone());
    let mut joiner = Joiner::default();
    let mut pushed = Vec::new();
    let mut now = Duration::ZERO;
    for part in clan::parts(data) {
        let Some((kind, rest)) = part.split_first() else { continue };
        match kind >> 5 {
            0 => filter.outbound(&well_formed(*kind, rest, true), now),
            1 => now += Duration::from_secs(rest.len() as u64),
            2 => offload_of_an_application(rest),
            top => {
                let mut packet = if top == 3 { rest.to_vec() } else { well_formed(*kind, rest, false) };
                let passes = filter.inbound(&packet, now);
                let Some(said) = ip::addresses(&packet) else {
                    assert!(!passes, "what says not who it is from does not come in");
                    continue;
                };
                assert!(!passes || policy.access(said.source).is_some(), "somebody unknown came in");
                // As the engine does before anything else.
                if packet.len() < said.length || !passes {
                    continue;
                }
                packet.truncate(said.length);
                let mut forwarded = packet.clone();
                if ip::hop(&mut forwarded) {
                    assert_eq!(ip::addresses(&forwarded), Some(said));
                }
                pushed.push(without_what_may_change(&packet));
                joiner.push(BytesMut::from(&packet[..]));
            }
        }
        assert!(filter.remembered() <= MAX_FLOWS);
    }
    taken_apart_it_is_the_same(&mut joiner, pushed);
}

fn policy() -> Policy {
    let mut policy = Policy::default();
    for (last, access) in [
        (1, Access::Everything),
        (2, Access::Ports { ports: vec![(Transport::Tcp, 80..=443), (Transport::Udp, 0..=53)], ping: true }),
    ] {
        policy.allow(address(true, last), access.clone());
        policy.allow(address(false, last), access);
    }
    policy
}

fn address(v4: bool, last: u8) -> IpAddr {
    if v4 {
        IpAddr::from([100, 64, 0, last])
    } else {
        IpAddr::from([0xfd, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, last])
    }
}

/// The input as the payload of IP, its fields put right where a member could. `kind` says what it is and whose.
fn well_formed(kind: u8, payload: &[u8], from_here: bool) -> Vec<u8> {
    let v4 = kind & 1 == 0;
    let (other, here) = (1 + (kind >> 1 & 3) % 3, 9);
    let (source, destination) = if from_here { (here, other) } else { (other, here) };
    let protocol = match kind >> 3 & 3 {
        0 => TCP,
        1 => UDP,
        2 => ICMP[usize::from(!v4)],
        _ => payload.first().copied().unwrap_or_default(),
    };
    let mut body = payload.to_vec();
    if protocol == TCP {
        body.resize(body.len().max(21), 0);
        // Rightful: at least the header itself, and no more than there is.
        let most = (body.len() - 1).min(60) / 4;
        body[12] = (usize::from(body[12] >> 4).clamp(5, most) as u8) << 4 | body[12] & 0x0f;
    }
    let (source, destination) = (address(v4, source), address(v4, destination));
    let mut packet = Vec::new();
    match (source, destination) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let length = ((20 + body.len()) as u16).to_be_bytes();
            packet.extend([0x45, 0, length[0], length[1], 0, 0, 0x40, 0, 64, protocol, 0, 0]);
            packet.extend(from.octets().into_iter().chain(to.octets()));
            let sum = !ones(&packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let length = (body.len() as u16).to_be_bytes();
            packet.extend([0x60, 0, 0, 0, length[0], length[1], protocol, 64]);
            packet.extend(from.octets().into_iter().chain(to.octets()));
        }
        _ => {}
    }
    if protocol == TCP {
        body[16..18].fill(0);
        let addresses = if v4 { &packet[12..20] } else { &packet[8..40] };
        let pseudo = [addresses, &(body.len() as u32).to_be_bytes(), &[0, 0, 0, TCP], &body].concat();
        body[16..18].copy_from_slice(&(!ones(&pseudo)).to_be_bytes());
    }
    packet.extend(body);
    packet
}

/// RFC 1071, without the complement.
fn ones(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0)));
    let mut sum: u64 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// An application on a guest may hand the kernel's device anything.
fn offload_of_an_application(data: &[u8]) {
    let Some((header, packet)) = data.split_first_chunk::<{ offload::HEADER_LEN }>() else { return };
    let (mut out, mut lengths) = (BytesMut::new(), Vec::new());
    let mut packet = packet.to_vec();
    if split(&mut packet, &Offload::decode(header), MTU, &mut out, &mut lengths).is_ok() {
        assert_eq!(lengths.iter().sum::<usize>(), out.len());
    }
}

fn taken_apart_it_is_the_same(joiner: &mut Joiner, mut pushed: Vec<Vec<u8>>) {
    let mut again = Vec::new();
    joiner.drain(|group| {
        let (offload, parts) = group.finish();
        if let [single] = parts {
            again.push(without_what_may_change(single));
            return;
        }
        let mut whole = parts.concat();
        let count = parts.len();
        let (mut out, mut lengths) = (BytesMut::new(), Vec::new());
        split(&mut whole, &offload, MTU, &mut out, &mut lengths).expect("a super-packet of ours is well-formed");
        assert_eq!(lengths.len(), count, "as many packets as were joined");
        for length in lengths {
            let padded = out.split_to(length);
            let said = ip::addresses(&padded).expect("a packet of ours has addresses");
            again.push(without_what_may_change(&padded[..said.length]));
        }
    });
    // The order within a stream is looked at by the tunnel's own tests.
    pushed.sort_unstable();
    again.sort_unstable();
    assert_eq!(pushed.len(), again.len());
    let lost: BTreeSet<_> = pushed.iter().zip(&again).filter(|(before, after)| before != after).collect();
    assert!(lost.is_empty(), "packets were changed: {lost:x?}");
}

/// The kernel gives IPv4 packets of a stream new identifications, and with them new checksums.
fn without_what_may_change(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let ip = if packet[0] >> 4 == 4 { 20 } else { 40 };
    if ip == 20 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    if packet.get(if ip == 20 { 9 } else { 6 }) == Some(&TCP) && packet.len() >= ip + 18 {
        packet[ip + 16..ip + 18].fill(0);
    }
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is put together here gets as far as a member's packets do.
    #[test]
    fn packets_of_a_stream_come_in_and_are_joined() {
        for kind in [0, 1] {
            let mut filter = Filter::default();
            filter.set_policy(policy());
            let mut joiner = Joiner::default();
            for sequence in [0, 100] {
                let body = [&[0, 80, 0, 80, 0, 0, 0, sequence][..], &[0; 5], &[0x10], &[0; 6], &[7; 100]].concat();
                let packet = well_formed(kind, &body, false);
                assert!(filter.inbound(&packet, Duration::ZERO));
                joiner.push(BytesMut::from(&packet[..]));
            }
            let mut groups = Vec::new();
            joiner.drain(|group| groups.push(group.finish().1.len()));
            assert_eq!(groups, [2]);
        }
    }
}
