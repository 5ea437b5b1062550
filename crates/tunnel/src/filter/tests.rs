use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::*;

const ME: u8 = 1;
const ADMIN: u8 = 2;
const MEMBER: u8 = 3;
const STRANGER: u8 = 4;

fn v6(n: u8) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, u16::from(n)))
}

fn v4(n: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(100, 64, 0, n))
}

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// A packet with `body` behind the IP header.
fn ip(from: IpAddr, to: IpAddr, protocol: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            packet.extend([0x45, 0]);
            packet.extend((20 + body.len() as u16).to_be_bytes());
            packet.extend([0, 7, 0, 0, 64, protocol, 0, 0]);
            packet.extend(from.octets());
            packet.extend(to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend((body.len() as u16).to_be_bytes());
            packet.extend([protocol, 64]);
            packet.extend(from.octets());
            packet.extend(to.octets());
        }
        _ => unreachable!("one version"),
    }
    packet.extend(body);
    packet
}

fn ports(from: u16, to: u16) -> Vec<u8> {
    // Of TCP, what opens a connection.
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0, 0, 0, 0, 0, 0, 0, 0, 0x50, 2, 0, 0, 0, 0, 0, 0]].concat()
}

fn echo(kind: u8, identifier: u16) -> Vec<u8> {
    [&[kind, 0, 0, 0][..], &identifier.to_be_bytes(), &[0, 1]].concat()
}

fn filter() -> Filter {
    let mut policy = Policy::default();
    for address in [v6, v4] {
        policy.allow(address(ADMIN), Access::Everything);
        policy.allow(
            address(MEMBER),
            Access::Ports { ports: vec![(Transport::Tcp, 80..=80), (Transport::Udp, 5000..=5010)], ping: true },
        );
    }
    let mut filter = Filter::default();
    filter.set_policy(policy);
    filter
}

#[test]
fn everybody_reaches_what_is_theirs_to_reach_and_nothing_else() {
    for address in [v6, v4] {
        let mut filter = filter();
        let mut passes =
            |from, protocol, port| filter.inbound(&ip(address(from), address(ME), protocol, &ports(9, port)), secs(0));
        assert!(passes(ADMIN, TCP, 22) && passes(ADMIN, UDP, 53) && passes(ADMIN, 132, 0));
        assert!(passes(MEMBER, TCP, 80) && passes(MEMBER, UDP, 5000) && passes(MEMBER, UDP, 5010));
        assert!(!passes(MEMBER, TCP, 22) && !passes(MEMBER, UDP, 80) && !passes(MEMBER, TCP, 5000));
        assert!(!passes(MEMBER, UDP, 4999) && !passes(MEMBER, UDP, 5011) && !passes(MEMBER, 132, 0));
        assert!(!passes(STRANGER, TCP, 80));
    }
}

#[test]
fn answers_come_in_and_only_they() {
    let mut filter = filter();
    let answer = ip(v6(MEMBER), v6(ME), TCP, &ports(22, 40_000));
    assert!(!filter.inbound(&answer, secs(0)));
    filter.outbound(&ip(v6(ME), v6(MEMBER), TCP, &ports(40_000, 22)), secs(0));
    assert!(filter.inbound(&answer, secs(1)));
    // Another port, another sender, another protocol.
    assert!(!filter.inbound(&ip(v6(MEMBER), v6(ME), TCP, &ports(22, 40_001)), secs(1)));
    assert!(!filter.inbound(&ip(v6(MEMBER), v6(ME), TCP, &ports(23, 40_000)), secs(1)));
    assert!(!filter.inbound(&ip(v6(STRANGER), v6(ME), TCP, &ports(22, 40_000)), secs(1)));
    assert!(!filter.inbound(&ip(v6(MEMBER), v6(ME), UDP, &ports(22, 40_000)), secs(1)));
}

#[test]
fn conversations_are_forgotten_when_they_rest_and_not_while_they_go_on() {
    let mut filter = filter();
    filter.outbound(&ip(v6(ME), v6(MEMBER), UDP, &ports(40_000, 53)), secs(0));
    let answer = ip(v6(MEMBER), v6(ME), UDP, &ports(53, 40_000));
    assert!(filter.inbound(&answer, secs(299)));
    assert!(filter.inbound(&answer, secs(598)));
    assert!(!filter.inbound(&answer, secs(898)));
    filter.outbound(&ip(v6(ME), v6(MEMBER), TCP, &ports(40_000, 22)), secs(1000));
    assert!(filter.inbound(&ip(v6(MEMBER), v6(ME), TCP, &ports(22, 40_000)), secs(1000 + 7200)));
}

#[test]
fn what_a_service_answers_does_not_keep_it_open() {
    let mut filter = filter();
    // Long after the start.
    filter.outbound(&ip(v6(ME), v6(ADMIN), UDP, &ports(1, 1)), secs(0));
    let mut segment = ports(80, 40_000);
    segment[13] = 0x18;
    for (protocol, port, answer) in [(TCP, 80, segment), (UDP, 5000, ports(5000, 40_000))] {
        let question = ip(v6(MEMBER), v6(ME), protocol, &ports(40_000, port));
        assert!(filter.inbound(&question, secs(500)));
        filter.outbound(&ip(v6(ME), v6(MEMBER), protocol, &answer), secs(500));
    }
    let mut policy = Policy::default();
    policy.allow(v6(MEMBER), Access::Ports { ports: vec![], ping: true });
    filter.set_policy(policy);
    for (protocol, port) in [(TCP, 80), (UDP, 5000)] {
        assert!(!filter.inbound(&ip(v6(MEMBER), v6(ME), protocol, &ports(40_000, port)), secs(501)));
        let mut again = ports(port, 40_000);
        again[13] = 0x18;
        filter.outbound(&ip(v6(ME), v6(MEMBER), protocol, &again), secs(502));
        assert!(!filter.inbound(&ip(v6(MEMBER), v6(ME), protocol, &ports(40_000, port)), secs(503)));
    }
}

#[test]
fn who_only_listens_keeps_a_stream_that_is_older_than_the_memory() {
    let segment = |from, to, flags| {
        let mut segment = ports(from, to);
        segment[13] = flags;
        segment
    };
    let said = ip(v6(MEMBER), v6(ME), TCP, &segment(22, 40_000, 0x18));
    let mut filter = filter();
    assert!(filter.inbound(&said, secs(100)));
    // What opens a connection, a port of a service, and somebody who may reach nothing: that is not such a stream.
    assert!(!filter.inbound(&ip(v6(MEMBER), v6(ME), TCP, &segment(22, 40_000, 0x02)), secs(100)));
    assert!(!filter.inbound(&ip(v6(MEMBER), v6(ME), TCP, &segment(40_000, 22, 0x18)), secs(100)));
    assert!(!filter.inbound(&ip(v6(STRANGER), v6(ME), TCP, &segment(22, 40_000, 0x18)), secs(100)));
    // Acknowledged, it goes on after the while; otherwise it was none.
    let other = ip(v6(MEMBER), v6(ME), TCP, &segment(22, 40_001, 0x18));
    assert!(filter.inbound(&other, secs(101)));
    filter.outbound(&ip(v6(ME), v6(MEMBER), TCP, &segment(40_000, 22, 0x10)), secs(101));
    assert!(filter.inbound(&said, secs(1000)));
    assert!(!filter.inbound(&other, secs(1000)));
}

#[test]
fn streams_that_are_older_than_the_memory_are_picked_up_for_a_while() {
    let mut filter = filter();
    let mut segment = ports(40_000, 22);
    segment[13] = 0x18;
    let answer = ip(v6(MEMBER), v6(ME), TCP, &ports(22, 40_000));
    filter.outbound(&ip(v6(ME), v6(MEMBER), TCP, &segment), secs(100));
    assert!(filter.inbound(&answer, secs(101)));
    let mut later = ports(40_001, 22);
    later[13] = 0x18;
    filter.outbound(&ip(v6(ME), v6(MEMBER), TCP, &later), secs(221));
    assert!(!filter.inbound(&ip(v6(MEMBER), v6(ME), TCP, &ports(22, 40_001)), secs(222)));
}

#[test]
fn whoever_is_put_out_gets_nothing_through_at_once() {
    let mut filter = filter();
    filter.outbound(&ip(v6(ME), v6(MEMBER), TCP, &ports(40_000, 22)), secs(0));
    let mut policy = Policy::default();
    policy.allow(v6(ADMIN), Access::Everything);
    filter.set_policy(policy);
    assert!(!filter.inbound(&ip(v6(MEMBER), v6(ME), TCP, &ports(22, 40_000)), secs(1)));
    assert!(!filter.inbound(&ip(v6(MEMBER), v6(ME), TCP, &ports(9, 80)), secs(1)));
    assert_eq!(filter.remembered(), 0);
}

#[test]
fn pings_are_answered_and_come_back() {
    for (address, protocol, request, reply) in [(v6 as fn(u8) -> IpAddr, ICMP_V6, 128, 129), (v4, ICMP_V4, 8, 0)] {
        let mut filter = filter();
        assert!(filter.inbound(&ip(address(MEMBER), address(ME), protocol, &echo(request, 7)), secs(0)));
        assert!(!filter.inbound(&ip(address(STRANGER), address(ME), protocol, &echo(request, 7)), secs(0)));
        let back = ip(address(MEMBER), address(ME), protocol, &echo(reply, 9));
        assert!(!filter.inbound(&back, secs(0)), "nobody asked");
        filter.outbound(&ip(address(ME), address(MEMBER), protocol, &echo(request, 9)), secs(0));
        assert!(filter.inbound(&back, secs(1)));
    }
    // Nor does anybody advertise routes in here.
    assert!(!filter().inbound(&ip(v6(ADMIN), v6(ME), ICMP_V6, &echo(134, 0)), secs(0)));
}

#[test]
fn both_may_ask_for_an_echo_with_the_same_identifier() {
    let mut filter = filter();
    assert!(filter.inbound(&ip(v6(MEMBER), v6(ME), ICMP_V6, &echo(128, 7)), secs(0)));
    filter.outbound(&ip(v6(ME), v6(MEMBER), ICMP_V6, &echo(129, 7)), secs(0));
    filter.outbound(&ip(v6(ME), v6(MEMBER), ICMP_V6, &echo(128, 7)), secs(1));
    assert!(filter.inbound(&ip(v6(MEMBER), v6(ME), ICMP_V6, &echo(129, 7)), secs(1)));
    assert!(filter.inbound(&ip(v6(MEMBER), v6(ME), ICMP_V6, &echo(128, 7)), secs(2)));
}

#[test]
fn asking_for_an_echo_does_not_let_others_ask() {
    let mut policy = Policy::default();
    policy.allow(v6(MEMBER), Access::Ports { ports: vec![], ping: false });
    let mut filter = Filter::default();
    filter.set_policy(policy);
    filter.outbound(&ip(v6(ME), v6(MEMBER), ICMP_V6, &echo(128, 7)), secs(0));
    assert!(filter.inbound(&ip(v6(MEMBER), v6(ME), ICMP_V6, &echo(129, 7)), secs(0)));
    assert!(!filter.inbound(&ip(v6(MEMBER), v6(ME), ICMP_V6, &echo(128, 7)), secs(0)));
}

#[test]
fn errors_pass_only_about_what_was_sent() {
    let mut filter = filter();
    let sent = ip(v6(ME), v6(MEMBER), UDP, &ports(40_000, 53));
    let error = ip(v6(MEMBER), v6(ME), ICMP_V6, &[&[1, 4, 0, 0, 0, 0, 0, 0][..], &sent[..48]].concat());
    assert!(!filter.inbound(&error, secs(0)));
    filter.outbound(&sent, secs(0));
    assert!(filter.inbound(&error, secs(1)));
    let cut = ip(v6(MEMBER), v6(ME), ICMP_V6, &[&[1, 4, 0, 0, 0, 0, 0, 0][..], &sent[..41]].concat());
    assert!(!filter.inbound(&cut, secs(1)));
    let stranger = ip(v6(STRANGER), v6(ME), ICMP_V6, &[&[1, 4, 0, 0, 0, 0, 0, 0][..], &sent[..48]].concat());
    assert!(!filter.inbound(&stranger, secs(1)));
}

#[test]
fn later_pieces_follow_the_first() {
    let piece = |offset: u16, more: bool, body: &[u8]| {
        let position = offset << 3 | u16::from(more);
        let header = [&[UDP, 0][..], &position.to_be_bytes(), &[0, 0, 0, 5]].concat();
        ip(v6(MEMBER), v6(ME), 44, &[&header[..], body].concat())
    };
    let mut filter = filter();
    assert!(!filter.inbound(&piece(100, false, &[0; 64]), secs(0)));
    assert!(!filter.inbound(&piece(0, true, &ports(9, 22)), secs(0)));
    assert!(!filter.inbound(&piece(100, false, &[0; 64]), secs(0)), "its first piece was refused");
    assert!(filter.inbound(&piece(0, true, &ports(9, 5001)), secs(0)));
    assert!(filter.inbound(&piece(100, false, &[0; 64]), secs(1)));
    assert!(!filter.inbound(&piece(100, false, &[0; 64]), secs(31)));
}

#[test]
fn extension_headers_hide_nothing() {
    let mut filter = filter();
    let options = |next: u8| vec![next, 0, 0, 0, 0, 0, 0, 0];
    let hidden = ip(v6(MEMBER), v6(ME), 60, &[options(TCP), ports(9, 22)].concat());
    assert!(!filter.inbound(&hidden, secs(0)));
    let open = ip(v6(MEMBER), v6(ME), 60, &[options(TCP), ports(9, 80)].concat());
    assert!(filter.inbound(&open, secs(0)));
    let endless: Vec<u8> = (0..40).flat_map(|_| options(60)).collect();
    assert!(!filter.inbound(&ip(v6(ADMIN), v6(ME), 60, &endless), secs(0)));
}

#[test]
fn memory_is_bounded_and_what_is_in_use_stays() {
    let mut filter = filter();
    filter.outbound(&ip(v6(ME), v6(ADMIN), TCP, &ports(1, 1)), secs(0));
    for n in 0..(MAX_FLOWS * 2) {
        let packet = ip(v6(ME), v6(MEMBER), UDP, &ports(n as u16, 53 + (n >> 16) as u16));
        filter.outbound(&packet, Duration::from_micros(n as u64));
        assert!(filter.remembered() <= MAX_FLOWS);
    }
    let own = Conversation { remote: v6(ADMIN), local: v6(ME), protocol: TCP, local_port: 1, remote_port: 1 };
    assert!(filter.own.contains_key(&own), "what would end first goes first");
}

proptest! {
    #[test]
    fn nothing_of_a_stranger_ever_passes(
        sent in prop::collection::vec((1u8..8, any::<u16>(), any::<u16>()), 0..20),
        mut bytes in prop::collection::vec(any::<u8>(), 40..200),
        version in any::<bool>(),
    ) {
        let mut filter = filter();
        for (to, from_port, to_port) in sent {
            // This machine talks to everybody but the stranger.
            if to != STRANGER {
                filter.outbound(&ip(v6(ME), v6(to), TCP, &ports(from_port, to_port)), secs(0));
            }
        }
        if version {
            bytes[0] = 0x60;
            bytes[8..24].copy_from_slice(&match v6(STRANGER) { IpAddr::V6(ip) => ip.octets(), IpAddr::V4(_) => [0; 16] });
        } else {
            bytes[0] = 0x45;
            bytes[12..16].copy_from_slice(&[100, 64, 0, STRANGER]);
        }
        prop_assert!(!filter.inbound(&bytes, secs(1)));
    }

    #[test]
    fn anything_is_read_within_bounds(bytes in prop::collection::vec(any::<u8>(), 0..200), first: u8) {
        let mut bytes = bytes;
        if let Some(byte) = bytes.first_mut() {
            *byte = first;
        }
        let mut filter = filter();
        filter.outbound(&bytes, secs(0));
        let _ = filter.inbound(&bytes, secs(0));
        prop_assert!(filter.remembered() <= 1);
    }

    #[test]
    fn a_member_gets_in_where_a_port_is_open_or_an_answer_due(
        asked in prop::collection::btree_set((any::<bool>(), 1u16..20, 1u16..20), 0..30),
        from_port in 1u16..20, to_port in 1u16..100, tcp in any::<bool>(),
    ) {
        let protocol = |tcp| if tcp { TCP } else { UDP };
        let mut filter = filter();
        for (tcp, own, theirs) in &asked {
            filter.outbound(&ip(v6(ME), v6(MEMBER), protocol(*tcp), &ports(*own, *theirs)), secs(0));
        }
        let passes = filter.inbound(&ip(v6(MEMBER), v6(ME), protocol(tcp), &ports(from_port, to_port)), secs(1));
        prop_assert_eq!(passes, (tcp && to_port == 80) || asked.contains(&(tcp, to_port, from_port)));
    }
}
