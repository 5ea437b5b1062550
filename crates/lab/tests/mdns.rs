//! What a program announces by multicast DNS on one machine of a clan is found on the others: a real avahi-daemon, real queries,
//! and machines that flood. Needs root, for network namespaces.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

mod common;

use std::{
    collections::BTreeSet,
    env, fs,
    io::{Read, Write},
    iter,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket},
    path::Path,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use clan_lab::{
    LabError,
    five::{CLAN, ping_once},
    fleet::Fleet,
    nat::{Nat, SiteSpec},
    story::until,
};
use common::{running::Running, with_fleet};
use hickory_proto::{
    op::{Message, MessageType, Query},
    rr::{Name, RData, Record, RecordType},
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, netdevice::name_to_index, socket_with, sockopt};

const LIMIT: Duration = Duration::from_secs(30);
const MDNS: u16 = 5353;
const GROUP_V4: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 251);
const GROUP_V6: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0xfb);
const PORT: u16 = 7000;
const KIND: &str = "_http._tcp.local.";
/// What is let through of one machine: at once, and per second.
const SHARE: (u32, u32) = (40, 8);
const FLOOD: Duration = Duration::from_secs(8);

#[test]
fn what_avahi_announces_on_one_machine_is_found_and_reached_from_the_others() {
    let specs: Vec<SiteSpec> = ["ann", "bob", "mal"].map(|name| SiteSpec::new(name, Nat::Open)).into();
    with_fleet("clanmdns", &specs, &["controller", "avahi"], tell);
}

fn tell(fleet: &mut Fleet) -> Result<(), LabError> {
    let screen = fleet.screen().clone();
    fleet.computer("ann").found(CLAN)?;
    let ports = format!("tcp/{PORT}");
    let rule = ["rule", "add", "page", "--from", "everybody", "--to", "everybody", "--ports", ports.as_str()];
    fleet.computer("ann").clan(&rule)?.success()?;
    for name in ["bob", "mal"] {
        let link = fleet.computer("ann").invite("member")?;
        fleet.computer(name).join(&link)?.success()?;
        until(LIMIT, "the machines meeting", || ping_once(fleet.computer(name), "ann"))?;
    }
    until(LIMIT, "the others meeting", || ping_once(fleet.computer("bob"), "mal"))?;
    let [ann, bob, mal] = ["ann", "bob", "mal"].map(|name| Device::of(fleet, name));
    let (ann, bob, mal) = (ann?, bob?, mal?);
    let inside: BTreeSet<IpAddr> = [&ann, &bob, &mal].into_iter().flat_map(Device::addresses).collect();

    screen.heading("A service of avahi's is found over both versions of IP, resolved, and reached");
    let _avahi = avahi(fleet, &ann, "page")?;
    let listener = fleet.world().site("ann").enter(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT)))?;
    for four in [true, false] {
        let began = Instant::now();
        let ear = bob.listen(fleet, four)?;
        let found = until(LIMIT, "the service being found", || Ok(ear.look_up("page")))?;
        screen.seen(&format!("found at {}", found.address), began.elapsed());
        assert_eq!((found.port, found.address), (PORT, if four { ann.four.into() } else { ann.six.into() }));
        let stream = fleet.world().site("bob").enter(move || TcpStream::connect((found.address, found.port)))?;
        let (mut served, from) = listener.accept().unwrap();
        served.write_all(b"hello").unwrap();
        drop(served);
        let mut heard = String::new();
        (&stream).read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "hello");
        assert_eq!(from.ip().to_canonical(), if four { bob.four.into() } else { IpAddr::from(bob.six) });
    }

    screen.heading("Whoever asks once from a port of their own is answered; nobody reaches avahi itself");
    let asked = fleet.world().site("bob").enter({
        let (to, device) = (ann.six, bob.index);
        move || {
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
            socket.send_to(&query(KIND, RecordType::PTR, 1), (to, MDNS))?;
            socket.send_to(&query(KIND, RecordType::PTR, 2), SocketAddrV6::new(GROUP_V6, MDNS, 0, device))?;
            socket.set_read_timeout(Some(Duration::from_millis(1500)))?;
            let mut buffer = [0; 1500];
            let mut answered = BTreeSet::new();
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let answer = Message::from_vec(&buffer[..length]).map_err(std::io::Error::other)?;
                answered.insert((from, answer.metadata.id));
            }
            Ok(answered)
        }
    })?;
    assert_eq!(asked, [(SocketAddr::from((ann.six, MDNS)), 2)].into(), "answers, by the questions' numbers");

    screen
        .heading("How QUIC endpoints find each other on a LAN stays there, and tells nothing of the clan's addresses");
    let lan = Device::lan(fleet, "ann");
    let ear = lan.listen(fleet, true)?;
    let told = until(LIMIT, "the endpoint telling its LAN where it is", || {
        let Some((_, message)) = ear.next() else { return Ok(None) };
        let discovery = names(&message).any(|name| name.contains("_irohv1"));
        let addresses: Vec<IpAddr> = records(&message).iter().filter_map(address).collect();
        Ok((discovery && !addresses.is_empty()).then_some(addresses))
    })?;
    screen.said(&format!("the LAN is told {told:?}"));
    assert!(told.contains(&lan.four.into()) && told.iter().all(|address| !inside.contains(address)), "{told:?}");

    screen.heading("A machine that floods stops nobody, and is cut to its share");
    let (ear, counting) = (bob.listen(fleet, true)?, bob.listen(fleet, false)?);
    let flood = Flood::start(fleet, &mal)?;
    let began = Instant::now();
    let mut floods = 0;
    publish(fleet, "second")?;
    let found = until(LIMIT, "a service being found in a flood", || Ok(ear.look_up("second")))?;
    assert_eq!((found.port, found.address), (PORT, ann.four.into()));
    screen.seen("found in the flood", began.elapsed());
    while began.elapsed() < FLOOD {
        if let Some((from, message)) = counting.next() {
            floods += u32::from(from == mal.six);
            assert!(!names(&message).any(|name| name.contains("irohv1")), "{message:?}");
        }
    }
    let (sent, lasted) = (flood.finish(), began.elapsed());
    screen.said(&format!("of {sent} questions in {lasted:.1?} bob's programs heard {floods}"));
    // About half of it comes over the other version of IP.
    assert!(sent > 10_000 && floods > SHARE.0 / 4, "the flood was none");
    assert!(floods <= SHARE.0 + SHARE.1 * (lasted.as_secs() as u32 + 1), "{floods}");

    screen.heading("Who wants none of it hears none of it");
    fleet.computer("bob").stop_controller()?;
    fleet.computer("bob").start_controller(&["--no-mdns"])?;
    until(LIMIT, "bob being back", || ping_once(fleet.computer("bob"), "ann"))?;
    let bob = Device::of(fleet, "bob")?;
    let (deaf, ear) = (bob.listen(fleet, false)?, mal.listen(fleet, false)?);
    publish(fleet, "third")?;
    until(LIMIT, "the others finding what is new", || {
        deaf.ask(KIND, RecordType::PTR);
        Ok(ear.look_up("third"))
    })?;
    while let Some((from, message)) = deaf.next() {
        assert!(from == bob.six || !inside.contains(&from), "{from}: {message:?}");
    }
    Ok(())
}

/// A network device with an address of either version.
struct Device {
    site: String,
    name: String,
    index: u32,
    four: Ipv4Addr,
    six: Ipv6Addr,
}

impl Device {
    /// The clan's.
    fn of(fleet: &mut Fleet, site: &str) -> Result<Self, LabError> {
        let list = || -> Result<Option<Self>, LabError> {
            let listed = fleet.computer(site).run_as_root("ip", &["-j", "address"], LIMIT)?.success()?.json()?;
            let device = listed
                .as_array()
                .into_iter()
                .flatten()
                .find(|device| device["ifname"].as_str().is_some_and(|name| name.starts_with("clan-")));
            let device = device.ok_or_else(|| LabError::Promise(format!("{site} has no device of the clan")))?;
            let addresses = device["addr_info"].as_array().into_iter().flatten();
            let addresses: Vec<IpAddr> = addresses.filter_map(|a| a["local"].as_str()?.parse().ok()).collect();
            let six = addresses.iter().find_map(|a| match a {
                IpAddr::V6(a) if a.is_unique_local() => Some(*a),
                _ => None,
            });
            let four = addresses.iter().find_map(|a| if let IpAddr::V4(a) = a { Some(*a) } else { None });
            let (Some(four), Some(six)) = (four, six) else { return Ok(None) };
            let name = device["ifname"].as_str().unwrap_or_default().to_owned();
            let index = device["ifindex"].as_u64().unwrap_or_default() as u32;
            Ok(Some(Self { site: site.into(), name, index, four, six }))
        };
        until(LIMIT, "both addresses", list)
    }

    /// The one that leads to the base network.
    fn lan(fleet: &Fleet, site: &str) -> Self {
        let uplink = &fleet.world().site(site).uplinks()[0];
        let (name, four) = (uplink.device.clone(), uplink.address);
        let found = fleet.world().site(site).enter({
            let name = name.clone();
            move || Ok(name_to_index(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?, &name)?)
        });
        Self { site: site.into(), name, index: found.unwrap(), four, six: Ipv6Addr::UNSPECIFIED }
    }

    fn addresses(&self) -> [IpAddr; 2] {
        [self.four.into(), self.six.into()]
    }

    /// Joins the group on it, as a program does.
    fn listen(&self, fleet: &Fleet, four: bool) -> Result<Ear, LabError> {
        let (index, address) = (self.index, self.four);
        let socket = fleet.world().site(&self.site).enter(move || {
            let family = if four { AddressFamily::INET } else { AddressFamily::INET6 };
            let socket = socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
            sockopt::set_socket_reuseaddr(&socket, true)?;
            if four {
                bind(&socket, &SocketAddr::from((GROUP_V4, MDNS)))?;
                sockopt::set_ip_add_membership_with_ifindex(&socket, &GROUP_V4, &address, index)?;
                sockopt::set_ip_multicast_if(&socket, &address)?;
            } else {
                sockopt::set_ipv6_v6only(&socket, true)?;
                bind(&socket, &SocketAddr::from((Ipv6Addr::UNSPECIFIED, MDNS)))?;
                sockopt::set_ipv6_add_membership(&socket, &GROUP_V6, index)?;
                sockopt::set_ipv6_multicast_if(&socket, index)?;
            }
            let socket = UdpSocket::from(socket);
            socket.set_read_timeout(Some(Duration::from_millis(300)))?;
            Ok(socket)
        })?;
        Ok(Ear { socket, four })
    }
}

/// Somebody who listens to the group on one device.
struct Ear {
    socket: UdpSocket,
    four: bool,
}

/// A service that was found.
#[derive(Debug, Clone, Copy)]
struct Found {
    port: u16,
    address: IpAddr,
}

impl Ear {
    fn ask(&self, name: &str, kind: RecordType) {
        let group: SocketAddr = if self.four { (GROUP_V4, MDNS).into() } else { (GROUP_V6, MDNS).into() };
        self.socket.send_to(&query(name, kind, 0), group).unwrap();
    }

    /// The next message, unless there is none for a while.
    fn next(&self) -> Option<(IpAddr, Message)> {
        let mut buffer = [0; 1500];
        let (length, from) = self.socket.recv_from(&mut buffer).ok()?;
        Some((from.ip(), Message::from_vec(&buffer[..length]).unwrap()))
    }

    /// One round of browsing and resolving, as programs repeat it until they have found what they look for.
    fn look_up(&self, service: &str) -> Option<Found> {
        let instance = format!("{service}.{KIND}");
        let mut heard: Vec<Record> = Vec::new();
        let mut listen = |what: &dyn Fn(&[Record]) -> bool| {
            let began = Instant::now();
            while !what(&heard) && began.elapsed() < Duration::from_secs(1) {
                let answers = self.next().filter(|(_, message)| message.metadata.message_type == MessageType::Response);
                heard.extend(answers.into_iter().flat_map(|(_, message)| records(&message)));
            }
            what(&heard).then(|| heard.clone())
        };
        self.ask(KIND, RecordType::PTR);
        let listed = |all: &[Record]| all.iter().any(|r| r.name.to_string() == KIND && r.data.to_string() == instance);
        listen(&listed)?;
        self.ask(&instance, RecordType::SRV);
        let server = |all: &[Record]| {
            all.iter().find_map(|record| match &record.data {
                RData::SRV(srv) if record.name.to_string() == instance => Some((srv.port, srv.target.to_string())),
                _ => None,
            })
        };
        let (port, host) = server(&listen(&|all| server(all).is_some())?)?;
        self.ask(&host, if self.four { RecordType::A } else { RecordType::AAAA });
        let of_host = |all: &[Record]| {
            let mine = all.iter().filter(|record| record.name.to_string() == host).filter_map(address);
            mine.into_iter().find(|address| address.is_ipv4() == self.four)
        };
        let address = of_host(&listen(&|all| of_host(all).is_some())?)?;
        Some(Found { port, address })
    }
}

fn query(name: &str, kind: RecordType, id: u16) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.id = id;
    message.metadata.recursion_desired = false;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message.to_vec().unwrap()
}

fn records(message: &Message) -> Vec<Record> {
    message.answers.iter().chain(&message.additionals).cloned().collect()
}

fn names(message: &Message) -> impl Iterator<Item = String> {
    let asked = message.queries.iter().map(|query| query.name().to_string());
    asked.chain(message.answers.iter().map(|record| record.name.to_string()))
}

fn address(record: &Record) -> Option<IpAddr> {
    match &record.data {
        RData::A(a) => Some(a.0.into()),
        RData::AAAA(a) => Some(a.0.into()),
        _ => None,
    }
}

/// Says what to announce on `ann`.
fn publish(fleet: &mut Fleet, service: &str) -> Result<(), LabError> {
    let services = fleet.computer("ann").place().etc().join("avahi/services");
    let text = format!(
        "<?xml version=\"1.0\" standalone='no'?><!DOCTYPE service-group SYSTEM \"avahi-service.dtd\">\n\
         <service-group><name>{service}</name><service><type>_http._tcp</type><port>{PORT}</port></service></service-group>\n"
    );
    // avahi watches the folder.
    let draft = services.with_file_name("draft");
    fs::create_dir_all(&services).and_then(|()| fs::write(&draft, text)).unwrap();
    fs::rename(draft, services.join(format!("{service}.service"))).unwrap();
    Ok(())
}

/// A package that is installed makes the user that its program looks for.
fn know_user(etc: &Path, name: &str) {
    let entries = [("passwd", "x:64900:64900::/nonexistent:/usr/sbin/nologin"), ("group", "x:64900:")];
    for (file, entry) in entries.map(|(file, entry)| (etc.join(file), entry)) {
        let mut known = fs::read_to_string(&file).unwrap();
        if !known.lines().any(|line| line.split(':').next() == Some(name)) {
            known.push_str(&format!("{name}:{entry}\n"));
            fs::write(file, known).unwrap();
        }
    }
}

/// Starts avahi-daemon on `ann`, on this device only, with what to announce in a file.
fn avahi(fleet: &mut Fleet, device: &Device, service: &str) -> Result<Running, LabError> {
    publish(fleet, service)?;
    let place = fleet.computer("ann").place().clone();
    let settings = format!(
        "[server]\nhost-name=anns-laptop\nuse-ipv4=yes\nuse-ipv6=yes\nallow-interfaces={}\nallow-point-to-point=yes\n\
             enable-dbus=no\n[wide-area]\nenable-wide-area=no\n",
        device.name
    );
    let file = place.etc().join("avahi/avahi-daemon.conf");
    fs::write(&file, settings).unwrap();
    let log = fs::File::create(fleet.computer("ann").log("avahi")).unwrap();
    know_user(&place.etc(), "avahi");
    // Its folder for the running daemon is this one's alone, as its /etc is.
    let script = "mount -t tmpfs none /run && exec avahi-daemon --no-chroot --no-drop-root --no-rlimits --debug \
                      --file /etc/avahi/avahi-daemon.conf";
    let mut command = place.root_command("sh")?;
    // As `scripts/deps` unpacked it, so that none runs for the whole computer; else as it is installed.
    let unpacked = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/avahi/usr"));
    let libraries = fs::read_dir(unpacked.join("lib")).into_iter().flatten().flatten().map(|entry| entry.path());
    let path = command.get_envs().find_map(|(name, value)| value.filter(|_| name == "PATH")).unwrap_or_default();
    let path = iter::once(unpacked.join("sbin")).chain(env::split_paths(path));
    let path = env::join_paths(path).unwrap();
    command.env("PATH", path).env("LD_LIBRARY_PATH", env::join_paths(libraries).unwrap());
    let also = log.try_clone().unwrap();
    command.args(["-c", script]).stdin(Stdio::null()).stdout(log).stderr(also);
    Ok(Running(command.spawn().expect("sh runs")))
}

/// A program that asks without end, and never the same.
struct Flood {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<u64>,
}

impl Flood {
    fn start(fleet: &Fleet, device: &Device) -> Result<Self, LabError> {
        let ears = [device.listen(fleet, true)?, device.listen(fleet, false)?];
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = thread::spawn(move || {
            let mut sent = 0u64;
            while !told.load(Ordering::Relaxed) {
                for ear in &ears {
                    ear.ask(&format!("flood-{sent}.local."), RecordType::A);
                    sent += 1;
                }
                if sent.is_multiple_of(512) {
                    // Two processors for everybody.
                    thread::sleep(Duration::from_millis(20));
                }
            }
            sent
        });
        Ok(Self { stop, thread })
    }

    fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}
