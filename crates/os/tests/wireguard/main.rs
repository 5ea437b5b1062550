//! Two machines in namespaces of their own, with real TUN devices, sockets and packets.

#![allow(clippy::unwrap_used)] // Helpers of tests.

mod interop;
#[path = "../netns/mod.rs"]
mod netns;

use std::{
    net::{Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use clan_os::{
    addresses,
    tun::Tun,
    wireguard::{Carrier, CarrierEnds, PathChoice, Timing, WgPeer, Wireguard, WireguardConfig},
};
use clan_types::{ClanId, MachineId, WgPublicKey, mesh_address};
use gotatun::x25519::{PublicKey, StaticSecret};
use netns::Namespace;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
};

const PORT: u16 = 41641;
const CHUNK: usize = 64 << 10;

struct Machine {
    id: MachineId,
    secret: [u8; 32],
    address: Ipv6Addr,
    namespace: Namespace,
    wireguard: Arc<Wireguard>,
}

fn identity(n: u8) -> (MachineId, [u8; 32], Ipv6Addr) {
    let id = MachineId::from_bytes([n; 32]);
    (id, [n + 50; 32], mesh_address(&ClanId::from_bytes([42; 32]), &id))
}

fn start(n: u8) -> (Machine, CarrierEnds) {
    start_with(n, None)
}

fn start_with(n: u8, rekey_after: Option<Duration>) -> (Machine, CarrierEnds) {
    let (id, secret, address) = identity(n);
    let namespace = Namespace::new(&format!("machine-{n}"));
    let (carrier, ends) = Carrier::channel(1024);
    let wireguard = namespace.run(async move {
        let tun = Tun::create("clan0", 1280, address)
            .await
            .unwrap_or_else(|e| panic!("{e}: {:?}", std::error::Error::source(&e).map(ToString::to_string)));
        assert_eq!(tun.name(), "clan0");
        let timing = Timing { rekey_after };
        Wireguard::start(WireguardConfig { local: id, private_key: secret, tun, udp_port: PORT, carrier, timing })
            .await
            .unwrap()
    });
    (Machine { id, secret, address, namespace, wireguard: Arc::new(wireguard) }, ends)
}

impl Machine {
    fn peer(&self, candidates: &[&str]) -> WgPeer {
        WgPeer {
            id: self.id,
            public_key: WgPublicKey::from_bytes(*PublicKey::from(&StaticSecret::from(self.secret)).as_bytes()),
            addresses: vec![self.address.into()],
            standard: false,
            candidates: candidates.iter().map(|c| c.parse().unwrap()).collect(),
            keepalive: None,
        }
    }

    fn set_peers(&self, peers: Vec<WgPeer>) {
        let wireguard = self.wireguard.clone();
        self.namespace.run(async move { wireguard.set_peers(peers).await.unwrap() });
    }

    fn direct(&self, peer: &Machine) -> Option<SocketAddr> {
        match self.wireguard.path(peer.id) {
            PathChoice::Direct { addr, .. } => Some(addr),
            PathChoice::Carrier => None,
        }
    }

    fn stop(&self) {
        let wireguard = self.wireguard.clone();
        self.namespace.run(async move { wireguard.stop().await });
    }
}

/// What went over the carrier, in packets.
#[derive(Default)]
struct Carried(AtomicU64);

/// A perfect carrier: what one machine sends comes in at the other.
fn pipe(
    from: &Machine,
    to: MachineId,
    mut outgoing: tokio::sync::mpsc::Receiver<(MachineId, bytes::Bytes)>,
    incoming: tokio::sync::mpsc::Sender<(MachineId, bytes::Bytes)>,
    carried: &Arc<Carried>,
) {
    let (sender, carried) = (from.id, carried.clone());
    from.namespace.spawn(async move {
        while let Some((peer, packet)) = outgoing.recv().await {
            assert_eq!(peer, to);
            carried.0.fetch_add(1, Ordering::Relaxed);
            if incoming.send((sender, packet)).await.is_err() {
                return;
            }
        }
    });
}

fn two_machines() -> (Machine, Machine, Arc<Carried>) {
    let ((a, a_ends), (b, b_ends)) = (start(1), start(2));
    netns::join(&a.namespace, &b.namespace, [&["192.0.2.1/24", "2001:db8::1/64"], &["192.0.2.2/24", "2001:db8::2/64"]]);
    let carried = Arc::new(Carried::default());
    pipe(&a, b.id, a_ends.outgoing, b_ends.incoming, &carried);
    pipe(&b, a.id, b_ends.outgoing, a_ends.incoming, &carried);
    (a, b, carried)
}

/// Waits until a condition holds and returns how long that took.
#[track_caller]
fn eventually(what: &str, within: Duration, mut condition: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < within, "within {within:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
    start.elapsed()
}

/// One TCP connection through the tunnel that never stops: counts chunks that came back unchanged.
fn endless_stream(client: &Machine, server: &Machine) -> Arc<AtomicU64> {
    stream_between(&client.namespace, &server.namespace, server.address)
}

fn stream_between(client: &Namespace, server: &Namespace, address: Ipv6Addr) -> Arc<AtomicU64> {
    let address = SocketAddr::from((address, 7));
    let listener = server.run(async move { TcpListener::bind(address).await.unwrap() });
    server.spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let (mut reader, mut writer) = stream.split();
        let _ = tokio::io::copy(&mut reader, &mut writer).await;
    });
    let count = Arc::new(AtomicU64::new(0));
    let counted = count.clone();
    client.spawn(async move {
        let mut stream = TcpStream::connect(address).await.expect("the stream opens");
        let mut back = vec![0; CHUNK];
        for round in 0u64.. {
            let chunk: Vec<u8> = (0..CHUNK as u64).map(|i| (i * 31 + round) as u8).collect();
            stream.write_all(&chunk).await.expect("the stream stays open");
            stream.read_exact(&mut back).await.expect("the stream stays open");
            assert!(back == chunk, "the stream is unchanged");
            counted.fetch_add(1, Ordering::Relaxed);
            // Leaves room for everything else on a small machine; the stream stays busy.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    count
}

/// An outage of three seconds costs TCP three to five doublings of its timer; on a busy machine the timer starts high,
/// and the next attempt may come ten seconds after the path is back.
const AFTER_OUTAGE: Duration = Duration::from_secs(25);

#[track_caller]
fn progress(stream: &AtomicU64, within: Duration) {
    let target = stream.load(Ordering::Relaxed) + 10;
    eventually("the stream makes progress", within, || stream.load(Ordering::Relaxed) >= target);
}

#[test]
fn a_stream_survives_every_change_of_path() {
    if !netns::enter("a_stream_survives_every_change_of_path") {
        return;
    }
    let (a, b, carried) = two_machines();
    a.set_peers(vec![b.peer(&[])]);
    b.set_peers(vec![a.peer(&[])]);
    let stream = endless_stream(&a, &b);
    progress(&stream, Duration::from_secs(10));
    assert_eq!((a.direct(&b), b.direct(&a)), (None, None), "nobody knows an address yet");
    assert!(carried.0.load(Ordering::Relaxed) > 100);

    let mut changes = a.wireguard.changes();
    a.wireguard.set_candidates(b.id, vec!["192.0.2.2:41641".parse().unwrap()]);
    let took = eventually("the direct path is found from both sides", Duration::from_secs(5), || {
        a.direct(&b).is_some() && b.direct(&a).is_some()
    });
    println!("direct after {took:?}");
    assert_eq!(b.direct(&a), Some("192.0.2.1:41641".parse().unwrap()), "learnt from the probe");
    let mut change = None;
    eventually("the change is told", Duration::from_secs(1), || {
        change = changes.try_recv().ok();
        change.is_some()
    });
    assert!(change.is_some_and(|c| c.peer == b.id && matches!(c.path, PathChoice::Direct { .. })));
    assert_eq!(a.wireguard.observed(), ["192.0.2.1:41641".parse().unwrap()]);
    progress(&stream, Duration::from_secs(5));
    let before = carried.0.load(Ordering::Relaxed);
    progress(&stream, Duration::from_secs(5));
    assert_eq!(carried.0.load(Ordering::Relaxed), before, "the carrier rests");

    // Silence, as a firewall makes it.
    b.namespace.command("nft add table inet cut");
    b.namespace.command("nft add chain inet cut in { type filter hook input priority 0 ; }");
    b.namespace.command("nft add rule inet cut in udp dport 41641 drop");
    let took = eventually("both return to the carrier", Duration::from_millis(3300), || {
        a.direct(&b).is_none() && b.direct(&a).is_none()
    });
    println!("back on the carrier after {took:?}");
    progress(&stream, AFTER_OUTAGE);

    b.namespace.command("nft delete table inet cut");
    let took = eventually("the direct path is found again", Duration::from_secs(8), || {
        a.direct(&b).is_some() && b.direct(&a).is_some()
    });
    println!("direct again after {took:?}");
    progress(&stream, AFTER_OUTAGE);

    // The cable is pulled: the system itself refuses to send.
    a.namespace.command("ip link set wire0 down");
    progress(&stream, AFTER_OUTAGE);
    eventually("both return to the carrier", Duration::from_millis(3300), || {
        a.direct(&b).is_none() && b.direct(&a).is_none()
    });
    progress(&stream, Duration::from_secs(10));

    a.stop();
    b.stop();
    a.stop();
}

#[test]
fn a_handshake_that_got_lost_begins_anew_once_there_is_a_way() {
    if !netns::enter("a_handshake_that_got_lost_begins_anew_once_there_is_a_way") {
        return;
    }
    let ((a, a_ends), (b, b_ends)) = (start(1), start(2));
    let met = |other: &Machine| WgPeer { keepalive: Some(Duration::from_secs(25)), ..other.peer(&[]) };
    let begun =
        |this: &Machine, other: &Machine, mut outgoing: tokio::sync::mpsc::Receiver<(MachineId, bytes::Bytes)>| {
            this.set_peers(vec![met(other)]);
            let (first, outgoing) = this.namespace.run(async move { (outgoing.recv().await, outgoing) });
            let (to, first) = first.expect("a handshake begins as soon as the peer is known");
            assert_eq!((to, first[0]), (other.id, 1), "an initiation");
            (first, outgoing)
        };
    let (first, mut from_a) = begun(&a, &b, a_ends.outgoing);
    let (_, mut from_b) = begun(&b, &a, b_ends.outgoing);

    // Nobody waits here: it is sent by the call.
    a.wireguard.carried(b.id);
    let (_, second) = from_a.try_recv().expect("another initiation");
    assert_eq!(second[0], 1);
    assert_ne!(first, second);
    a.wireguard.carried(MachineId::from_bytes([9; 32]));
    assert!(from_a.try_recv().is_err(), "nothing for strangers");
    b.wireguard.carried(a.id);
    assert!(from_b.try_recv().is_err(), "one of the two is enough, and two are too many");
    a.stop();
    b.stop();
}

/// `CLAN_ROUNDS=200 cargo nextest run -p clan-os --test wireguard --run-ignored only -E 'test(meet_at_once)' --no-capture`
#[test]
#[ignore = "looks for what is seldom; prints how long machines took"]
fn machines_that_are_told_of_each_other_at_the_same_time_meet_at_once() {
    let rounds = std::env::var("CLAN_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(50);
    let mut took = Vec::new();
    for _ in 0..rounds {
        let (a, b, _carried) = two_machines();
        let met = |other: &Machine, at: &[&str]| WgPeer { keepalive: Some(Duration::from_secs(25)), ..other.peer(at) };
        let (for_a, for_b) = (met(&b, &["192.0.2.2:41641"]), met(&a, &["192.0.2.1:41641"]));
        let address = b.address;
        b.namespace.spawn(async move {
            let socket = UdpSocket::bind("[::]:7").await.unwrap();
            let mut bytes = [0; 8];
            while let Ok((length, from)) = socket.recv_from(&mut bytes).await {
                let _ = socket.send_to(&bytes[..length], from).await;
            }
        });
        std::thread::scope(|scope| {
            scope.spawn(|| {
                a.set_peers(vec![for_a]);
                a.wireguard.carried(b.id);
            });
            scope.spawn(|| {
                b.set_peers(vec![for_b]);
                b.wireguard.carried(a.id);
            });
        });
        let began = Instant::now();
        a.namespace.run(async move {
            let socket = UdpSocket::bind("[::]:0").await.unwrap();
            let mut bytes = [0; 8];
            loop {
                let _ = socket.send_to(b"hello", (address, 7)).await;
                if let Ok(Ok(_)) = tokio::time::timeout(Duration::from_millis(50), socket.recv(&mut bytes)).await {
                    return;
                }
            }
        });
        took.push(began.elapsed());
        a.stop();
        b.stop();
    }
    took.sort();
    println!("median {:?}, longest {:?}", took[took.len() / 2], &took[took.len().saturating_sub(5)..]);
    assert!(took.last().is_some_and(|longest| *longest < Duration::from_secs(3)), "nobody waits for a second attempt");
}

#[test]
fn machines_meet_over_ipv6_and_peers_come_and_go() {
    if !netns::enter("machines_meet_over_ipv6_and_peers_come_and_go") {
        return;
    }
    let (a, b, _carried) = two_machines();
    a.set_peers(vec![b.peer(&["[2001:db8::2]:41641"])]);
    b.set_peers(vec![a.peer(&[])]);
    let stream = endless_stream(&a, &b);
    eventually("the direct path is found", Duration::from_secs(10), || {
        a.direct(&b).is_some() && b.direct(&a).is_some()
    });
    assert_eq!(a.direct(&b), Some("[2001:db8::2]:41641".parse().unwrap()));
    progress(&stream, Duration::from_secs(10));
    let wireguard = a.wireguard.clone();
    let status = a.namespace.run(async move { wireguard.peers().await });
    assert_eq!(status.len(), 1);
    assert!(
        status[0].last_handshake.is_some() && status[0].rx_bytes > CHUNK as u64 && status[0].tx_bytes > CHUNK as u64
    );

    // The same set again disturbs nothing.
    a.set_peers(vec![b.peer(&["[2001:db8::2]:41641"])]);
    assert!(a.direct(&b).is_some());
    progress(&stream, Duration::from_secs(2));

    b.set_peers(vec![]);
    assert_eq!(b.direct(&a), None);
    let stuck = stream.load(Ordering::Relaxed) + 1;
    std::thread::sleep(Duration::from_millis(300));
    let rest = stream.load(Ordering::Relaxed);
    assert!(rest <= stuck, "a removed peer gets nothing through");
    b.set_peers(vec![a.peer(&["[2001:db8::1]:41641"])]);
    // If it is the other side that has something to say, it shakes hands after fifteen seconds of silence; TCP's timer
    // has doubled to more than ten until then.
    progress(&stream, Duration::from_secs(45));
    a.stop();
    b.stop();
}

#[test]
fn second_addresses_lead_to_the_device_one_by_one() {
    if !netns::enter("second_addresses_lead_to_the_device_one_by_one") {
        return;
    }
    let (a, b, _carried) = two_machines();
    let second = |machine: &Machine, address: &str| {
        let (wireguard, address) = (machine.wireguard.clone(), address.parse().unwrap());
        machine.namespace.run(async move { wireguard.set_ipv4(Some(address)).await.unwrap() });
    };
    let with = |machine: &Machine, address: &str| {
        let mut peer = machine.peer(&["192.0.2.1:41641", "192.0.2.2:41641"]);
        peer.addresses.push(address.parse().unwrap());
        peer
    };
    let routes = || {
        let output = a.namespace.run(async { std::process::Command::new("ip").args(["-4", "route"]).output() });
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    // As another clan on this computer has it.
    a.namespace.command("ip route add 100.64.0.9/32 dev wire0");
    second(&a, "100.64.0.1");
    second(&b, "100.64.0.2");
    a.set_peers(vec![with(&b, "100.64.0.2")]);
    b.set_peers(vec![with(&a, "100.64.0.1")]);
    // A command in a namespace holds up the carrier.
    eventually("the direct path is found", Duration::from_secs(5), || a.direct(&b).is_some() && b.direct(&a).is_some());
    a.namespace.command("ping -c 1 -W 5 100.64.0.2");
    assert!(!routes().contains("100.64.0.0/10"), "{}", routes());
    assert!(routes().contains("100.64.0.9 dev wire0"), "{}", routes());

    second(&a, "100.64.0.7");
    b.set_peers(vec![with(&a, "100.64.0.7")]);
    a.namespace.command("ping -c 1 -W 5 100.64.0.2");
    let mut both = with(&b, "100.64.0.2");
    both.addresses.push("100.64.0.9".parse().unwrap());
    a.set_peers(vec![both]);
    assert!(routes().contains("100.64.0.9 dev wire0"), "the first keeps it: {}", routes());
    a.set_peers(vec![]);
    assert!(!routes().contains("100.64.0.2"), "{}", routes());
    assert!(routes().contains("100.64.0.9 dev wire0"), "{}", routes());
    a.stop();
    b.stop();
}

#[test]
fn only_what_members_send_from_their_own_address_comes_out() {
    if !netns::enter("only_what_members_send_from_their_own_address_comes_out") {
        return;
    }
    let (a, b, _carried) = two_machines();
    // B believes A to have another address than A uses.
    let mut wrong = a.peer(&[]);
    wrong.addresses = vec![identity(9).2.into()];
    a.set_peers(vec![b.peer(&[])]);
    b.set_peers(vec![wrong]);
    let to = SocketAddr::from((b.address, 9));
    let listener = b.namespace.run(async move { Arc::new(UdpSocket::bind(to).await.unwrap()) });
    let sender = a.namespace.run(async move { Arc::new(UdpSocket::bind("[::]:0").await.unwrap()) });
    let knock = |sender: Arc<UdpSocket>| {
        a.namespace.run(async move {
            sender.send_to(b"knock", to).await.unwrap();
        });
    };
    let heard = |within| {
        let listener = listener.clone();
        b.namespace.run(async move { tokio::time::timeout(within, listener.recv_from(&mut [0; 16])).await.is_ok() })
    };
    for _ in 0..5 {
        knock(sender.clone());
        assert!(!heard(Duration::from_millis(200)), "a foreign source address does not come out");
    }
    b.set_peers(vec![a.peer(&[])]);
    let mut arrived = false;
    for _ in 0..20 {
        knock(sender.clone());
        arrived = arrived || heard(Duration::from_millis(500));
    }
    assert!(arrived, "the right one does");
    a.stop();
    b.stop();
}

#[test]
fn the_device_goes_and_base_addresses_are_told_apart_from_the_tunnels() {
    if !netns::enter("the_device_goes_and_base_addresses_are_told_apart_from_the_tunnels") {
        return;
    }
    let (a, b, _carried) = two_machines();
    eventually("the addresses are usable", Duration::from_secs(5), || {
        a.namespace.run(async { addresses::local().await.unwrap().len() == 2 })
    });
    let expected = ["192.0.2.1".parse::<std::net::IpAddr>().unwrap(), "2001:db8::1".parse().unwrap()];
    assert_eq!(a.namespace.run(async { addresses::local().await.unwrap() }), expected);
    assert_eq!(a.namespace.run(async { addresses::physical().await.unwrap() }), expected);
    let own = SocketAddr::from((a.address, 0));
    assert!(a.namespace.run(async move { UdpSocket::bind(own).await.is_ok() }));
    a.stop();
    eventually("the device is gone", Duration::from_secs(2), || {
        a.namespace.run(async move { UdpSocket::bind(own).await.is_err() })
    });
    b.stop();
}

/// Not an assertion but a number for people: `cargo nextest run -p clan-os --run-ignored all speed`.
#[test]
#[ignore = "measures, and judges nothing"]
fn speed() {
    if !netns::enter("speed") {
        return;
    }
    const TOTAL: u64 = 512 << 20;
    let (a, b, _carried) = two_machines();
    a.set_peers(vec![b.peer(&["192.0.2.2:41641"])]);
    b.set_peers(vec![a.peer(&[])]);
    eventually("the direct path is found", Duration::from_secs(5), || a.direct(&b).is_some() && b.direct(&a).is_some());
    let address = SocketAddr::from((b.address, 7));
    let listener = b.namespace.run(async move { TcpListener::bind(address).await.unwrap() });
    let (done, received) = std::sync::mpsc::channel();
    b.namespace.spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let copied = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.unwrap();
        done.send(copied).unwrap();
    });
    let start = Instant::now();
    a.namespace.run(async move {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let chunk = vec![0; 256 << 10];
        for _ in 0..TOTAL / chunk.len() as u64 {
            stream.write_all(&chunk).await.unwrap();
        }
    });
    assert_eq!(received.recv().unwrap(), TOTAL);
    println!("{:.2} Gbit/s over the direct path", TOTAL as f64 * 8.0 / 1e9 / start.elapsed().as_secs_f64());
    a.stop();
    b.stop();
}
