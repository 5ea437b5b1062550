//! What the lab's routers do, seen with real sockets. Needs root, for network namespaces.

#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    path::Path,
    time::Duration,
};

use clan_lab::{
    INTERNET_ADDRESS,
    nat::{Nat, Site, SiteSpec, World},
};

/// Longest that a packet which does come may take.
const COMES: Duration = Duration::from_secs(5);
/// How long a packet that must not come is waited for after one sent later has come.
const LINGERS: Duration = Duration::from_millis(50);
/// The computers' port.
const PORT: u16 = 41640;

/// What a router is seen to do.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    /// The outside port for one destination is that for another.
    one_mapping: bool,
    /// It is the computer's own.
    port_stays: bool,
    /// A packet comes in from a port that was not sent to, of an address that was.
    from_other_port: bool,
    /// A packet comes in from an address that was not sent to.
    from_other_address: bool,
}

fn expected(nat: Nat) -> Option<Seen> {
    let seen = |one_mapping, port_stays, from_other_port, from_other_address| Seen {
        one_mapping,
        port_stays,
        from_other_port,
        from_other_address,
    };
    match nat {
        Nat::Open => Some(seen(true, true, true, true)),
        Nat::FullCone => Some(seen(true, false, true, true)),
        Nat::AddressRestricted => Some(seen(true, false, true, false)),
        Nat::PortRestricted | Nat::Carrier => Some(seen(true, false, false, false)),
        Nat::Symmetric => Some(seen(false, false, false, false)),
        Nat::UdpBlocked => None,
    }
}

fn world(prefix: &str, specs: &[SiteSpec]) -> World {
    assert!(
        rustix::process::geteuid().is_root(),
        "these tests lay network namespaces: run them as root, as `make test` does"
    );
    World::lay(prefix, Path::new("/nonexistent"), specs).unwrap_or_else(|error| panic!("{}", error.chain()))
}

fn udp(site: &Site, port: u16) -> UdpSocket {
    let socket = site.enter(move || UdpSocket::bind(("0.0.0.0", port))).unwrap();
    socket.set_read_timeout(Some(COMES)).unwrap();
    socket
}

/// The sender of the next packet, which must say `text`.
fn sender(socket: &UdpSocket, text: &str) -> SocketAddr {
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer).unwrap_or_else(|error| panic!("waiting for `{text}`: {error}"));
    assert_eq!(std::str::from_utf8(&buffer[..length]), Ok(text));
    from
}

/// Everything that comes until `last` has come, and a little longer.
fn until(socket: &UdpSocket, last: &str) -> Vec<String> {
    let (mut texts, mut buffer) = (Vec::<String>::new(), [0; 64]);
    loop {
        let came = texts.iter().any(|text| text == last);
        socket.set_read_timeout(Some(if came { LINGERS } else { COMES })).unwrap();
        match socket.recv(&mut buffer) {
            Ok(length) => texts.push(String::from_utf8_lossy(&buffer[..length]).into_owned()),
            Err(error) if came && matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return texts,
            Err(error) => panic!("waiting for `{last}` after {texts:?}: {error}"),
        }
    }
}

fn behaviour(world: &World, nat: Nat) -> Seen {
    let inside = world.site(nat.name());
    let (near, far) = (world.site("near"), world.site("far"));
    let own = udp(inside, PORT);
    let asked = udp(near, 0);
    let (other_port, other_address) = (udp(near, 0), udp(far, 0));
    let at = |socket: &UdpSocket, site: &Site| (site.uplinks()[0].public, socket.local_addr().unwrap().port());

    // Somebody knocks where the mapping is going to be, as a peer does that was told of it too early.
    let public = inside.uplinks()[0].public;
    for guess in [PORT, PORT ^ 0x4000, PORT ^ 0x6000] {
        asked.send_to(b"early", (public, guess)).unwrap();
    }
    own.send_to(b"one", at(&asked, near)).unwrap();
    let outside = sender(&asked, "one");
    assert_eq!(outside.ip(), IpAddr::V4(public), "{nat}: packets come from the outermost router");

    // Unasked ones first: when the asked one has come, they would have.
    other_address.send_to(b"other address", outside).unwrap();
    other_port.send_to(b"other port", outside).unwrap();
    asked.send_to(b"asked", outside).unwrap();
    let came = until(&own, "asked");

    own.send_to(b"two", at(&other_address, far)).unwrap();
    let again = sender(&other_address, "two");
    own.send_to(b"three", at(&other_port, near)).unwrap();
    let third = sender(&other_port, "three");
    // Whoever was sent to may answer, whatever the router is.
    own.set_read_timeout(Some(COMES)).unwrap();
    other_address.send_to(b"answer", again).unwrap();
    assert_eq!(sender(&own, "answer").ip(), IpAddr::V4(far.uplinks()[0].public));
    Seen {
        one_mapping: outside == again && again == third,
        port_stays: outside.port() == PORT,
        from_other_port: came.iter().any(|text| text == "other port"),
        from_other_address: came.iter().any(|text| text == "other address"),
    }
}

#[test]
fn each_router_maps_and_filters_as_its_name_says() {
    let observers = ["near", "far"].map(|name| SiteSpec::new(name, Nat::Open));
    let specs: Vec<SiteSpec> =
        Nat::ALL.into_iter().map(|nat| SiteSpec::new(nat.name(), nat)).chain(observers).collect();
    let world = world("natlab-a", &specs);
    let far = world.site("far");
    let web = far.enter(|| TcpListener::bind("0.0.0.0:443")).unwrap();
    for nat in Nat::ALL {
        let inside = world.site(nat.name());
        match expected(nat) {
            Some(seen) => assert_eq!(behaviour(&world, nat), seen, "{nat}"),
            None => {
                let (own, other) = (udp(inside, PORT), udp(far, 0));
                own.send_to(b"lost", (far.uplinks()[0].public, other.local_addr().unwrap().port())).unwrap();
                // TCP below takes the same way later.
                other.set_read_timeout(Some(LINGERS)).unwrap();
                assert!(other.recv(&mut [0; 64]).is_err(), "UDP passes a router that blocks it");
            }
        }
        // TCP goes out everywhere,
        let public = far.uplinks()[0].public;
        let mut out = inside
            .enter(move || TcpStream::connect_timeout(&(public, 443).into(), COMES))
            .unwrap_or_else(|error| panic!("{nat}: {}", error.chain()));
        let (mut accepted, from) = web.accept().unwrap();
        assert_eq!(from.ip(), IpAddr::V4(inside.uplinks()[0].public));
        out.write_all(b"hello").unwrap();
        accepted.read_exact(&mut [0; 5]).unwrap();
        // and comes in nowhere but where there is no router.
        let listener = inside.enter(|| TcpListener::bind("0.0.0.0:8443")).unwrap();
        let target = SocketAddr::from((inside.uplinks()[0].public, 8443));
        let came = far.enter(move || TcpStream::connect_timeout(&target, Duration::from_millis(200)));
        assert_eq!(came.is_ok(), nat == Nat::Open, "{nat}");
        drop(listener);
    }
    let networks: Vec<String> = world.sites().iter().map(|site| site.netns().to_owned()).collect();
    assert!(networks.iter().all(|name| Path::new("/run/netns").join(name).exists()));
    world.down().unwrap_or_else(|error| panic!("{}", error.chain()));
    let left: Vec<_> = std::fs::read_dir("/run/netns").into_iter().flatten().flatten().map(|e| e.file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with("natlab-a-")), "{left:?}");
}

#[test]
fn nobody_is_on_anybodys_lan() {
    let world = world("natlab-b", &[SiteSpec::new("ann", Nat::Open), SiteSpec::new("bob", Nat::Open)]);
    let group = "224.0.0.251".parse().unwrap();
    let [ann, bob] = ["ann", "bob"].map(|name| {
        let socket = udp(world.site(name), 5353);
        socket.join_multicast_v4(&group, &world.site(name).uplinks()[0].address).unwrap();
        socket
    });
    ann.send_to(b"is anybody there", (group, 5353)).unwrap();
    ann.send_to(b"directly", (world.site("bob").uplinks()[0].public, 5353)).unwrap();
    assert_eq!(until(&bob, "directly"), ["directly"]);
}

#[test]
fn a_computer_changes_its_uplink() {
    let mut moving = SiteSpec::new("ann", Nat::PortRestricted);
    moving.uplinks.push(Nat::Symmetric);
    let world = world("natlab-c", &[moving, SiteSpec::new("bob", Nat::Open)]);
    let (ann, bob) = (world.site("ann"), world.site("bob"));
    let (own, other) = (udp(ann, PORT), udp(bob, PORT));
    for at in [0, 1, 0] {
        ann.switch_to(at).unwrap();
        own.send_to(b"here", (bob.uplinks()[0].public, PORT)).unwrap();
        assert_eq!(sender(&other, "here").ip(), IpAddr::V4(ann.uplinks()[at].public));
    }
}

#[test]
fn packets_are_lost_by_chance_and_no_longer_when_told_so() {
    let world = world("natlab-d", &[SiteSpec::new("ann", Nat::Open), SiteSpec::new("bob", Nat::FullCone)]);
    let (ann, bob) = (udp(world.site("ann"), PORT), udp(world.site("bob"), PORT));
    let target = (world.site("ann").uplinks()[0].public, PORT);
    // The socket's buffer must not do the losing.
    rustix::net::sockopt::set_socket_recv_buffer_size(&ann, 1 << 20).unwrap();
    let arrive = || {
        for _ in 0..200 {
            bob.send_to(b"x", target).unwrap();
        }
        world.internet().lose(0).unwrap();
        bob.send_to(b"last", target).unwrap();
        until(&ann, "last").len() - 1
    };
    world.internet().lose(500).unwrap();
    let half = arrive();
    // Seven standard deviations on either side.
    assert!((50..=150).contains(&half), "{half} of 200");
    assert_eq!(arrive(), 200);
}

#[test]
fn a_narrow_link_says_how_narrow_it_is() {
    let world = world("natlab-e", &[SiteSpec::new("ann", Nat::PortRestricted), SiteSpec::new("bob", Nat::Open)]);
    world.site("ann").set_mtu(0, 1280).unwrap();
    let own = udp(world.site("ann"), PORT);
    own.connect((world.site("bob").uplinks()[0].public, PORT)).unwrap();
    set_option(&own, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO);
    own.send(&[0; 1400]).unwrap();
    // The router's answer is reported by the next call on the socket.
    let refused = own.recv(&mut [0; 1]).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EMSGSIZE), "{refused}");
    own.send(&[0; 1280 - 28]).unwrap();
    assert_eq!(own.send(&[0; 1281 - 28]).unwrap_err().raw_os_error(), Some(libc::EMSGSIZE));
}

fn set_option(socket: &UdpSocket, option: libc::c_int, value: libc::c_int) {
    // SAFETY: the kernel reads four bytes from a live `c_int`.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            option,
            (&raw const value).cast(),
            u32::try_from(size_of_val(&value)).unwrap(),
        )
    };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn the_internet_has_an_address_of_its_own() {
    let world = world("natlab-f", &[SiteSpec::new("ann", Nat::Carrier)]);
    let server = world.internet().enter(|| UdpSocket::bind((INTERNET_ADDRESS, 3478))).unwrap();
    server.set_read_timeout(Some(COMES)).unwrap();
    udp(world.site("ann"), PORT).send_to(b"where am I", (INTERNET_ADDRESS, 3478)).unwrap();
    assert_eq!(sender(&server, "where am I"), (world.site("ann").uplinks()[0].public, PORT ^ 0x6000).into());
}
