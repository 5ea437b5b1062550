use std::net::SocketAddr;

use proptest::prelude::*;

use super::{
    message::{AAAA, PTR, TXT, tests::Writer},
    *,
};

fn id(n: usize) -> MachineId {
    let mut bytes = [7; 32];
    bytes[..8].copy_from_slice(&(n as u64).to_be_bytes());
    MachineId::from_bytes(bytes)
}

fn v6(n: usize) -> Ipv6Addr {
    Ipv6Addr::from((0xfd00 << 112) | (n as u128 + 1))
}

fn v4(n: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x6440_0000 + n as u32 + 1)
}

fn name(n: usize) -> String {
    format!("machine-{n}")
}

/// One machine of so many.
fn machine(n: usize, count: usize) -> Multicast {
    let mut machine = Multicast::new(id(n), v6(n));
    machine.set_names(Some((0..count).map(|n| (name(n), id(n))).collect()));
    machine.set_ipv4(Some(v4(n)));
    let others = (0..count).filter(|other| *other != n);
    machine.set_others(others.flat_map(|n| [(v6(n).into(), id(n)), (v4(n).into(), id(n))]).collect());
    machine
}

fn packet(from: impl Into<SocketAddr>, to: impl Into<SocketAddr>, message: Writer) -> BytesMut {
    let (from, to) = (from.into(), to.into());
    datagram::write(&Datagram {
        source: from.ip(),
        destination: to.ip(),
        source_port: from.port(),
        destination_port: to.port(),
        payload: &message.bytes(),
    })
    .unwrap()
}

/// What machine `n` says to the IPv6 group.
fn said(n: usize, message: Writer) -> BytesMut {
    packet((v6(n), PORT), (GROUP_V6, PORT), message)
}

fn announcement(n: usize, text: &str) -> Writer {
    Writer::response()
        .pointer("_http._tcp.local", &format!("{text}._http._tcp.local"))
        .service(&format!("{text}._http._tcp.local"), 80, &format!("{}.local", name(n)))
        .answer(&format!("{}.local", name(n)), AAAA, &v6(n).octets())
}

fn query(text: &str) -> Writer {
    Writer::query().ask(text, PTR, false)
}

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Says a packet to these, at once.
fn say(machine: &mut Multicast, packet: &[u8], to: &[usize], now: Duration) -> Vec<(MachineId, Bytes)> {
    let Some(admitted) = machine.outbound(packet, now) else { return Vec::new() };
    machine.say(admitted, to.iter().map(|n| id(*n)).collect());
    std::iter::from_fn(|| machine.poll(now)).collect()
}

#[test]
fn what_one_machine_says_the_others_hear_over_both_versions_of_ip() {
    let (mut ann, mut bob) = (machine(0, 3), machine(1, 3));
    let four = packet((v4(0), PORT), (GROUP_V4, PORT), announcement(0, "page"));
    for whole in [said(0, announcement(0, "page")), four] {
        let copies = say(&mut ann, &whole, &[1, 2], ms(0));
        assert_eq!(copies.iter().map(|(to, _)| *to).collect::<BTreeSet<_>>(), [id(1), id(2)].into());
        assert_eq!(bob.inbound(&id(0), &copies[0].1, ms(5)).unwrap(), whole);
    }
    assert_eq!(ann.poll_timeout(), None);
}

#[test]
fn a_link_local_source_becomes_the_address_that_others_can_answer() {
    let (mut ann, mut bob) = (machine(0, 2), machine(1, 2));
    let link_local: Ipv6Addr = "fe80::1".parse().unwrap();
    let copies = say(&mut ann, &packet((link_local, PORT), (GROUP_V6, PORT), query("_http._tcp.local")), &[1], ms(0));
    let heard = bob.inbound(&id(0), &copies[0].1, ms(0)).unwrap();
    assert_eq!(heard, said(0, query("_http._tcp.local")));
    let other = packet((v6(1), PORT), (GROUP_V6, PORT), query("_ipp._tcp.local"));
    assert!(say(&mut ann, &other, &[1], ms(0)).is_empty(), "somebody else's address");
}

#[test]
fn the_hosts_other_addresses_become_the_clans_and_another_hosts_stay_out() {
    let (mut ann, mut bob) = (machine(0, 2), machine(1, 2));
    let lan: Ipv6Addr = "2001:db8::9".parse().unwrap();
    let host = || Writer::response().answer("laptop.local", AAAA, &v6(0).octets());
    let all = host().answer("laptop.local", AAAA, &lan.octets()).answer("Laptop.local", A, &[192, 168, 1, 9]);
    let copies = say(&mut ann, &said(0, all), &[1], ms(0));
    let heard = bob.inbound(&id(0), &copies[0].1, ms(0)).unwrap();
    let addresses = host().answer("laptop.local", AAAA, &v6(0).octets()).answer("Laptop.local", A, &v4(0).octets());
    assert_eq!(heard, said(0, addresses));
    let printer = host().answer("printer.local", A, &[192, 168, 1, 20]);
    assert!(say(&mut ann, &said(0, printer), &[1], ms(0)).is_empty());
}

#[test]
fn only_port_5353_and_the_groups_are_carried_and_nothing_before_names_are_known() {
    let mut ann = machine(0, 2);
    let other_port = packet((v6(0), PORT), (GROUP_V6, 5354), query("_http._tcp.local"));
    let other_group: Ipv6Addr = "ff02::1".parse().unwrap();
    let other_group = packet((v6(0), PORT), (other_group, PORT), query("_http._tcp.local"));
    let answer = packet((v6(0), 4000), (GROUP_V6, PORT), announcement(0, "page"));
    let sized = |data: usize| said(0, query("_http._tcp.local").answer("a.local", TXT, &vec![0; data]));
    let room = MAX_PACKET - sized(0).len();
    assert_eq!(say(&mut ann, &sized(room), &[1], ms(0)).len(), 1);
    let longer = sized(room + 1);
    for refused in [other_port, other_group, answer, longer] {
        assert!(ann.outbound(&refused, ms(0)).is_none());
        assert!(ann.inbound(&id(1), &refused, ms(0)).is_none());
    }
    ann.set_names(None);
    assert!(!ann.is_on() && ann.outbound(&said(0, announcement(0, "page")), ms(0)).is_none());
    assert!(ann.inbound(&id(1), &said(1, announcement(1, "page")), ms(0)).is_none());
}

#[test]
fn the_same_is_not_said_twice_and_what_was_heard_is_not_said_back() {
    let (mut ann, mut bob) = (machine(0, 2), machine(1, 2));
    let page = said(0, announcement(0, "page"));
    assert_eq!(say(&mut ann, &page, &[1], ms(0)).len(), 1);
    assert!(say(&mut ann, &page, &[1], ms(100)).is_empty());
    // Probes are 250 ms apart.
    assert_eq!(say(&mut ann, &page, &[1], ms(250)).len(), 1);
    assert!(bob.inbound(&id(0), &said(0, query("_ipp._tcp.local")), ms(0)).is_some());
    assert!(say(&mut bob, &said(1, query("_ipp._tcp.local")), &[0], ms(900)).is_empty());
    assert_eq!(say(&mut bob, &said(1, query("_ipp._tcp.local")), &[0], ms(1000)).len(), 1);
}

#[test]
fn whoever_asked_alone_is_answered_alone_and_nobody_else() {
    let (mut ann, mut bob) = (machine(0, 3), machine(1, 3));
    let answer = |port| packet((v6(0), PORT), (v6(1), port), announcement(0, "page"));
    assert!(bob.inbound_alone(&answer(4000), ms(0)).is_none());
    let one_shot = packet((v6(1), 4000), (GROUP_V6, PORT), query("_http._tcp.local"));
    let copies = say(&mut bob, &one_shot, &[0], ms(0));
    assert_eq!(ann.inbound(&id(1), &copies[0].1, ms(0)).unwrap(), one_shot, "the port stays, to be answered");
    assert_eq!(bob.inbound_alone(&answer(4000), ms(50)).unwrap(), answer(4000));
    assert!(bob.inbound_alone(&answer(4001), ms(50)).is_none());
    let wrong_port = packet((v6(0), 999), (v6(1), 4000), announcement(0, "page"));
    let a_question = packet((v6(0), PORT), (v6(1), 4000), query("_http._tcp.local"));
    let a_lie = packet((v6(0), PORT), (v6(1), 4000), announcement(2, "page"));
    let a_stranger = packet((v6(77), PORT), (v6(1), 4000), announcement(77, "page"));
    for refused in [wrong_port, a_question, a_lie, a_stranger] {
        assert!(bob.inbound_alone(&refused, ms(50)).is_none());
    }
    assert!(bob.inbound_alone(&answer(4000), ANSWERED).is_none(), "it is too late");
    let wants_alone = said(1, Writer::query().ask("_http._tcp.local", PTR, true));
    assert_eq!(say(&mut bob, &wants_alone, &[0], ms(0)).len(), 1);
    assert!(bob.inbound_alone(&answer(PORT), ms(50)).is_some());
    bob.outbound_alone(&packet((v6(1), 5000), (v6(0), PORT), query("_http._tcp.local")), ms(0));
    assert!(bob.inbound_alone(&answer(5000), ms(50)).is_some());
}

#[test]
fn who_is_put_out_gets_nothing_that_waits() {
    let mut ann = machine(0, 3);
    for n in 0..10 {
        let admitted = ann.outbound(&said(0, query(&format!("_{n}._tcp.local"))), ms(0)).unwrap();
        ann.say(admitted, vec![id(1), id(2)]);
    }
    ann.set_others([(v6(2).into(), id(2))].into());
    let left: Vec<_> = std::iter::from_fn(|| ann.poll(ms(0))).map(|(to, _)| to).collect();
    assert_eq!(left, [id(2); 10]);
    assert_eq!(ann.poll_timeout(), None);
}

#[test]
fn what_goes_to_many_goes_bit_by_bit_and_reaches_them_all() {
    const COUNT: usize = 1000;
    let mut ann = machine(0, COUNT);
    let everybody: Vec<usize> = (1..COUNT).collect();
    let mut reached: BTreeMap<MachineId, usize> = BTreeMap::new();
    let mut count = |copies: Vec<(MachineId, Bytes)>| {
        copies.into_iter().for_each(|(to, _)| *reached.entry(to).or_default() += 1);
    };
    let mut now = ms(0);
    let mut admitted = 0;
    for n in 0..32 {
        let Some(message) = ann.outbound(&said(0, query(&format!("_{n}._tcp.local"))), now) else { continue };
        ann.say(message, everybody.iter().map(|n| id(*n)).collect());
        admitted += 1;
    }
    assert_eq!(admitted, 2, "no more is said than can be copied soon");
    count(std::iter::from_fn(|| ann.poll(now)).collect());
    while let Some(next) = ann.poll_timeout() {
        assert!(next > now, "time goes on");
        now = next;
        count(std::iter::from_fn(|| ann.poll(now)).collect());
    }
    assert!(now < ms(8000), "{now:?}");
    assert!(reached.len() == COUNT - 1 && reached.values().all(|times| *times == admitted));
}

/// The bound that `docs/architecture.md` states: a thousand machines whose programs all flood, and one that says something.
#[test]
fn a_clan_of_a_thousand_that_shouts_does_not_melt_and_hears_who_speaks() {
    const COUNT: usize = 1000;
    const SECONDS: u64 = 20;
    let listeners = [1, 2];
    let mut clan: Vec<Multicast> = (0..COUNT).map(|n| machine(n, 1)).collect();
    let (names, addresses): (BTreeMap<_, _>, HashMap<_, _>) =
        (0..COUNT).map(|n| ((name(n), id(n)), (IpAddr::from(v6(n)), id(n)))).unzip();
    for n in listeners {
        clan[n].set_names(Some(names.clone()));
        clan[n].set_others(addresses.clone());
    }
    let mut sent = vec![0u64; COUNT];
    let mut handed = [0u64; 2];
    let mut found = BTreeSet::new();
    // The quiet one's program repeats itself as section 8.3 says; it says other things in between.
    let quiet_says = [0u64, 1000, 3000, 7000, 15_000];
    for step in 0..SECONDS * 20 {
        let now = ms(step * 50);
        for n in 0..COUNT {
            let text = format!("{n}-{step}");
            if n == 0 && !quiet_says.contains(&(step * 50)) {
                // It has nothing to say.
            } else if let Some(message) = clan[n].outbound(&said(n, announcement(n, &text)), now) {
                clan[n].say(message, (0..COUNT).filter(|other| *other != n).map(id).collect());
            }
            while let Some((to, copy)) = clan[n].poll(now) {
                sent[n] += 1;
                for (handed, listener) in handed.iter_mut().zip(listeners) {
                    if to == id(listener) && clan[listener].inbound(&id(n), &copy, now).is_some() {
                        *handed += 1;
                        if n == 0 {
                            found.insert((listener, copy.clone()));
                        }
                    }
                }
            }
        }
    }
    assert!(sent.iter().all(|sent| *sent <= 512 + 256 * SECONDS), "{:?}", sent.iter().max());
    assert!(handed.iter().all(|handed| *handed <= 512 + 128 * SECONDS), "{handed:?}");
    assert!(sent[0] == 999 * quiet_says.len() as u64, "it is not held up by what others do: {}", sent[0]);
    assert_eq!(found.len(), listeners.len() * quiet_says.len(), "all that it said is heard");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn a_liar_who_floods_takes_nothing_from_others(liars in 1usize..60, text in "[a-z]{1,20}") {
        let mut ann = machine(0, 64);
        let mut passed = 0;
        for step in 0..500u64 {
            let now = ms(step * 20);
            for liar in 1..=liars {
                // Half of it is refused, and counts all the same.
                let what = if step % 2 == 0 { announcement(liar, &format!("{step}")) } else { announcement(0, "lie") };
                passed += u32::from(ann.inbound(&id(liar), &said(liar, what), now).is_some());
            }
            if step % 100 == 0 {
                prop_assert!(ann.inbound(&id(63), &said(63, announcement(63, &text)), now).is_some());
            }
        }
        prop_assert!(passed <= 512 + 128 * 10);
        prop_assert!(passed <= liars as u32 * (40 + 8 * 10));
        prop_assert!(ann.heard.len() <= 64 && ann.recent.len() <= MAX_RECENT);
    }

}

proptest! {
    #[test]
    fn anything_is_judged_within_bounds(bytes in prop::collection::vec(any::<u8>(), 0..400), at in 0usize..60, byte: u8) {
        let mut ann = machine(0, 3);
        let mut damaged = announcement(2, "page").bytes();
        damaged[at] = byte;
        for (n, payload) in [(1, &bytes), (2, &damaged)] {
            let packet = datagram::write(&Datagram {
                source: v6(n).into(),
                destination: GROUP_V6.into(),
                source_port: PORT,
                destination_port: PORT,
                payload,
            }).unwrap();
            if let Some(heard) = ann.inbound(&id(n), &packet, ms(0)) {
                prop_assert_eq!(&heard, &packet);
            }
            let _ = ann.outbound(&packet, ms(0));
        }
        let _ = ann.inbound(&id(1), &bytes, ms(0));
        let _ = ann.inbound_alone(&bytes, ms(0));
        let _ = ann.outbound(&bytes, ms(0));
    }
}

#[test]
fn what_is_remembered_is_bounded() {
    let mut ann = machine(0, 3);
    for n in 0..3 * MAX_SENDERS {
        let _ = ann.inbound(&id(n), b"nonsense", ms(0));
    }
    assert_eq!(ann.heard.len(), MAX_SENDERS);
    assert!(ann.inbound(&id(1), &said(1, announcement(1, "page")), ms(10)).is_some(), "who is known is heard");
    for n in 0..3 * MAX_SENDERS {
        let _ = ann.inbound(&id(9999 + n), b"nonsense", ms(500));
    }
    assert_eq!(ann.heard.len(), MAX_SENDERS, "who was silent for a while makes room");
    for port in 0..1000 {
        ann.note_asked(port, ms(0));
    }
    assert_eq!(ann.asked.len(), MAX_ASKED);
}
