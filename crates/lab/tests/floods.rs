//! Garbage and floods on every port that a computer of a clan has open, while two machines go on talking. Needs root, for network
//! namespaces.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

mod common;

use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    path::Path,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use clan_lab::{
    LabError,
    five::{CLAN, ping_once},
    fleet::{Computer, Fleet},
    nat::{Nat, SiteSpec},
    story::until,
};
use common::{flow::Flow, with_fleet};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const LIMIT: Duration = Duration::from_secs(30);
const PORT: u16 = 7000;
const RELAY_PORT: u16 = 443;
/// How many datagrams all UDP ports together get.
const DATAGRAMS: usize = 200_000;
/// How many connections that say nothing all TCP ports together get, and how many that say nonsense each one gets.
const SILENT: usize = 2000;
const TALKING: usize = 150;
/// What the daemons may hold open: what systemd gives a service.
const DESCRIPTORS: u64 = 1024;
/// How much larger a daemon may be at its peak, and afterwards, than before.
const PEAK: u64 = 96 << 20;
const GROWTH: u64 = 48 << 20;
/// How much more may be in a log afterwards: strangers do not fill a disk.
const TALK: u64 = 256 << 10;
/// The longest pause of the stream: a flood on the same two processors costs it packets, and TCP doubles its timer.
const PAUSE: Duration = Duration::from_secs(15);

#[test]
fn garbage_and_floods_on_every_port_leave_the_clan_as_it_was() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(DESCRIPTORS), ..limit }).unwrap();
    let specs: Vec<SiteSpec> = ["target", "member", "stranger"].map(|name| SiteSpec::new(name, Nat::Open)).into();
    with_fleet("clanflood", &specs, &["controller", "manager"], |fleet| {
        // This process holds all the strangers' ends.
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
        tell(fleet)
    });
}

fn tell(fleet: &mut Fleet) -> Result<(), LabError> {
    let screen = fleet.screen().clone();
    let folder = tempfile::tempdir().unwrap();
    fleet.computer("target").found(CLAN)?;
    let recording = Recording::start(fleet, folder.path());
    let ports = format!("tcp/{PORT}");
    let rule = ["rule", "add", "stream", "--from", "everybody", "--to", "everybody", "--ports", ports.as_str()];
    fleet.computer("target").clan(&rule)?.success()?;
    fleet.computer("target").clan(&["relay", "on", "--port", &RELAY_PORT.to_string()])?.success()?;
    let link = fleet.computer("target").invite("member")?;
    let late = fleet.computer("target").invite("member")?;
    fleet.computer("member").join(&link)?.success()?;
    until(LIMIT, "the machines meeting", || ping_once(fleet.computer("member"), "target"))?;
    let stream = Flow::start(fleet, "member", "target", PORT)?;
    let relays = |socket: &Socket| socket.address.port() == RELAY_PORT && !socket.udp;
    until(LIMIT, "the relay listening", || Ok(sockets(fleet.computer("target"))?.iter().any(relays).then_some(())))?;

    let public = fleet.world().site("target").uplinks()[0].public;
    let recorded = recording.finish(public);
    let sockets = sockets(fleet.computer("target"))?;
    for socket in &sockets {
        screen.said(&format!("{} {}", if socket.udp { "UDP" } else { "TCP" }, socket.address));
    }
    let has = |udp, test: &dyn Fn(&Socket) -> bool| sockets.iter().any(|socket| socket.udp == udp && test(socket));
    let mesh_ports = recorded.iter().map(|datagram| datagram.to).collect::<BTreeSet<_>>();
    demand(mesh_ports.len() >= 2, "neither QUIC nor WireGuard was recorded")?;
    demand(
        mesh_ports.iter().all(|port| has(true, &|s| s.address.port() == *port)),
        "ss shows fewer ports than are used",
    )?;
    demand(
        has(false, &|s| s.address.port() == 53) && has(true, &|s| s.address.port() == 53),
        "no name server listens",
    )?;
    demand(has(false, &|s| s.address.ip().is_loopback() && s.address.port() != 53), "no manager listens")?;

    let daemons: BTreeSet<u32> = sockets.iter().map(|socket| socket.pid).collect();
    let before: Vec<(u32, u64)> = daemons.iter().map(|pid| (*pid, memory(*pid, "VmRSS:"))).collect();
    let logs = ["controller", "manager"].map(|kind| fleet.computer("target").log(kind));
    let talk = logs.clone().map(|log| fs::metadata(log).map_or(0, |log| log.len()));
    stream.since();

    let began = Instant::now();
    let udp: Vec<&Socket> = sockets.iter().filter(|socket| socket.udp).collect();
    for socket in &udp {
        let own: Vec<Datagram> = recorded.iter().filter(|d| d.to == socket.address.port()).cloned().collect();
        let (to, from) = socket.reached(public);
        let packets = DATAGRAMS / udp.len();
        let sent = fleet.world().site(from).enter(move || flood(to, packets, &own, Ipv4Addr::UNSPECIFIED, 0))?;
        demand(sent as usize > packets / 2, "the flood was none")?;
    }
    screen.seen(
        &format!("{DATAGRAMS} datagrams of strangers, {} kinds of them recorded", recorded.len()),
        began.elapsed(),
    );

    // Now in the name of a machine of the clan: what is looked at, and must be proved false by its seal.
    let began = Instant::now();
    let member = fleet.world().site("member").uplinks()[0].public;
    let theirs: Vec<Datagram> = recorded.iter().filter(|d| d.from.0 == member).cloned().collect();
    demand(!theirs.is_empty(), "nothing of the member was recorded")?;
    let mask = format!("{member}/32");
    fleet.computer("stranger").run_as_root("ip", &["address", "add", &mask, "dev", "lo"], LIMIT)?.success()?;
    for (address, port) in theirs.iter().map(|d| d.from).collect::<BTreeSet<_>>() {
        let own: Vec<Datagram> = theirs.iter().filter(|d| d.from == (address, port)).cloned().collect();
        for to in own.iter().map(|d| d.to).collect::<BTreeSet<_>>() {
            let own: Vec<Datagram> = own.iter().filter(|d| d.to == to).cloned().collect();
            let to = SocketAddr::from((public, to));
            fleet.world().site("stranger").enter(move || flood(to, DATAGRAMS / 10, &own, address, port))?;
        }
    }
    fleet.computer("stranger").run_as_root("ip", &["address", "del", &mask, "dev", "lo"], LIMIT)?.success()?;
    screen.seen("the same in the name of a member", began.elapsed());

    let began = Instant::now();
    let tcp: Vec<&Socket> = sockets.iter().filter(|socket| !socket.udp).collect();
    let mut silent = Vec::new();
    for socket in &tcp {
        let (to, from) = socket.reached(public);
        silent.extend(fleet.world().site(from).enter(move || Ok(connections(to, SILENT / 4)))?);
    }
    // The port of the manager has the most to offer to the users of the same computer.
    let to = tcp.iter().find(|s| s.address.ip().is_loopback() && s.address.port() != 53).unwrap().address;
    silent.extend(fleet.world().site("target").enter(move || Ok(connections(to, SILENT - SILENT / 4)))?);
    screen.seen(&format!("{} connections that say nothing", silent.len()), began.elapsed());
    demand(silent.len() > SILENT / 2, "the connections were none")?;
    let asked = Instant::now();
    fleet.computer("target").clan(&["status"])?.success()?;
    screen.seen("the owner is answered", asked.elapsed());
    demand(asked.elapsed() < Duration::from_secs(10), "the owner has to wait for strangers")?;
    until(LIMIT, "the member being answered", || ping_once(fleet.computer("member"), "target"))?;
    drop(silent);

    let began = Instant::now();
    for socket in &tcp {
        let (to, from) = socket.reached(public);
        fleet.world().site(from).enter(move || {
            (0..TALKING).for_each(|n| babble(to, n as u64));
            Ok(())
        })?;
    }
    screen.seen("nonsense on every TCP port", began.elapsed());

    let (bytes, pause) = stream.since();
    stream.flows()?;
    screen.said(&format!("the stream carried {} KiB meanwhile; its longest pause was {pause:.1?}", bytes >> 10));
    demand(bytes > 1 << 20 && pause < PAUSE, "the stream between the members did not go on")?;
    for (pid, memory_before) in before {
        let name = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let (now, peak) = (memory(pid, "VmRSS:"), memory(pid, "VmHWM:"));
        let what = name.split('\0').nth(1).unwrap_or("gone").to_owned();
        let mib = |bytes: u64| bytes >> 20;
        screen.said(&format!("{what}: {} MiB before, {} at the peak, {} now", mib(memory_before), mib(peak), mib(now)));
        demand(now > 0, "a daemon is gone")?;
        demand(peak < memory_before + PEAK && now < memory_before + GROWTH, "a daemon has grown too much")?;
    }
    for (log, before) in logs.iter().zip(talk) {
        let text = fs::read_to_string(log).unwrap();
        demand(!text.contains("panicked"), "a daemon panicked")?;
        let grown = (text.len() as u64).saturating_sub(before);
        screen.said(&format!("{} grew by {grown} bytes", log.display()));
        demand(grown < TALK, "strangers fill the log")?;
    }

    screen.heading("Everything serves as before");
    until(LIMIT, "the target finding its own name", || ping_once(fleet.computer("target"), "target"))?;
    let relay = SocketAddr::from((public, RELAY_PORT));
    let waits = || fleet_waits(fleet, relay);
    until(LIMIT, "room at the relay", waits)?;
    fleet.computer("stranger").join(&late)?.success()?;
    for other in ["target", "member"] {
        until(LIMIT, "the stranger, who is none now, reaching the others", || {
            ping_once(fleet.computer("stranger"), other)
        })?;
    }
    stream.flows()
}

/// A port that somebody listens on.
#[derive(Debug, Clone)]
struct Socket {
    udp: bool,
    address: SocketAddr,
    pid: u32,
}

impl Socket {
    /// How strangers reach it, and from which computer: what is bound to loopback, users of the same computer do.
    fn reached(&self, public: Ipv4Addr) -> (SocketAddr, &'static str) {
        if self.address.ip().is_unspecified() || self.address.ip() == IpAddr::V4(public) {
            ((public, self.address.port()).into(), "stranger")
        } else {
            (self.address, "target")
        }
    }
}

/// All ports of Clan's daemons on a computer.
fn sockets(computer: &Computer) -> Result<Vec<Socket>, LabError> {
    let listed = computer.run_as_root("ss", &["-Hlntup"], LIMIT)?.success()?.stdout;
    // udp UNCONN 0 0 127.0.0.1:53 0.0.0.0:* users:(("clan",pid=7,fd=9))
    let read = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (host, port) = fields.get(4)?.rsplit_once(':')?;
        let host = host.split('%').next()?.trim_matches(['[', ']']);
        let ip: IpAddr = if host == "*" { Ipv4Addr::UNSPECIFIED.into() } else { host.parse().ok()? };
        let users = fields.iter().find(|field| field.starts_with("users:((\"clan\""))?;
        let pid = users.split("pid=").nth(1)?.split(',').next()?.parse().ok()?;
        Some(Socket { udp: *fields.first()? == "udp", address: SocketAddr::new(ip, port.parse().ok()?), pid })
    };
    Ok(listed.lines().filter_map(read).collect())
}

/// A UDP datagram as it crossed the wire.
#[derive(Debug, Clone)]
struct Datagram {
    from: (Ipv4Addr, u16),
    to: u16,
    payload: Vec<u8>,
}

/// Listens to what the target hears and says.
struct Recording {
    tcpdump: Child,
    file: std::path::PathBuf,
}

impl Recording {
    fn start(fleet: &Fleet, folder: &Path) -> Self {
        let site = fleet.world().site("target");
        let file = folder.join("heard.pcap");
        let mut command = site.command("tcpdump").unwrap();
        // -Z root: it would otherwise hand its file to an account of its own that may not write here.
        command.args(["-Z", "root", "-U", "-n", "-s", "0", "-c", "3000", "-i", &site.uplinks()[0].device, "-w"]);
        command.arg(&file).arg("udp").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let recording = Self { tcpdump: command.spawn().expect("tcpdump runs: install it with `make deps`"), file };
        // The header is written once it listens.
        until(LIMIT, "tcpdump", || Ok(fs::metadata(&recording.file).is_ok_and(|f| f.len() >= 24).then_some(())))
            .unwrap();
        recording
    }

    /// What was sent to `to`, as far as it was heard.
    fn finish(mut self, to: Ipv4Addr) -> Vec<Datagram> {
        let _ = self.tcpdump.kill();
        let _ = self.tcpdump.wait();
        let file = fs::read(&self.file).unwrap();
        let (mut rest, mut heard) = (file.get(24..).unwrap_or_default(), Vec::new());
        while let Some((header, after)) = rest.split_at_checked(16) {
            let length = u32::from_le_bytes(header[8..12].try_into().unwrap()) as usize;
            let Some((frame, after)) = after.split_at_checked(length) else { break };
            rest = after;
            // Ethernet, IPv4 without options, UDP.
            if frame.len() > 42 && frame[12..15] == [8, 0, 0x45] && frame[30..34] == to.octets() {
                let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
                let from = <[u8; 4]>::try_from(&frame[26..30]).unwrap();
                let payload = frame[42..].to_vec();
                heard.push(Datagram { from: (from.into(), port(34)), to: port(36), payload });
            }
        }
        heard
    }
}

/// Numbers that look like chance and are the same in every run (xorshift64*).
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, most: usize) -> usize {
        (self.next() % most.max(1) as u64) as usize
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(length).collect()
    }
}

/// Sends nonsense, what looks like WireGuard and QUIC, and what was heard before, with and without a flipped bit. Returns how
/// many datagrams the system took.
fn flood(to: SocketAddr, packets: usize, heard: &[Datagram], ip: Ipv4Addr, port: u16) -> std::io::Result<u64> {
    let socket = if to.is_ipv4() { UdpSocket::bind((ip, port))? } else { UdpSocket::bind("[::]:0")? };
    let mut chance = Chance(u64::from(to.port()) << 16 | 0x5eed);
    let mut sent = 0;
    // Making them one by one would cost more than sending them.
    let mut pool: Vec<Vec<u8>> = Vec::new();
    for n in 0..2048 {
        pool.push(match n % 4 {
            0 => {
                let length = chance.below(1400);
                chance.bytes(length)
            }
            1 => {
                // The lengths of its messages: first, second, cookie, data (sections 5.4.2 to 5.4.6 of its paper).
                let kind = chance.below(4);
                let mut message = chance.bytes([148, 92, 64, 32 + 16 * (n % 80)][kind]);
                message[..4].copy_from_slice(&[kind as u8 + 1, 0, 0, 0]);
                message
            }
            kind => match heard.get(chance.below(heard.len())) {
                Some(datagram) => {
                    let mut payload = datagram.payload.clone();
                    let at = chance.below(payload.len());
                    if let (2, Some(byte)) = (kind, payload.get_mut(at)) {
                        *byte ^= 1 << chance.below(8);
                    }
                    payload
                }
                // A long header of QUIC version 1 (RFC 9000 section 17.2).
                None => [&[0xc0 | chance.next() as u8 & 0x3f, 0, 0, 0, 1, 8][..], &chance.bytes(1200)].concat(),
            },
        });
    }
    for n in 0..packets {
        // A refusal of the packet before, or no room: neither is the flood's concern.
        sent += u64::from(socket.send_to(&pool[(n + chance.below(64)) % pool.len()], to).is_ok());
    }
    Ok(sent)
}

/// Connections that say nothing, as far as they come about.
fn connections(to: SocketAddr, count: usize) -> Vec<TcpStream> {
    let mut open = Vec::new();
    let began = Instant::now();
    // Where the queue is full the system tries again after a second.
    while open.len() < count && began.elapsed() < Duration::from_secs(8) {
        open.extend(TcpStream::connect_timeout(&to, Duration::from_millis(1500)));
    }
    open
}

/// One connection that talks nonsense, and listens a little.
fn babble(to: SocketAddr, seed: u64) {
    let mut chance = Chance(seed + 1);
    let length = chance.below(1 << 16);
    let noise = chance.bytes(length);
    let beginning: &[u8] = match seed % 6 {
        0 => b"",
        // A TLS record as long as can be, DNS, and HTTP in several stages of undress.
        1 => &[22, 3, 1, 255, 255],
        2 => &[255, 255],
        3 => b"GET /api/v1/status HTTP/1.1\r\nHost: localhost\r\nX: ",
        4 => b"POST /api/v1/clans HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 18446744073709551615\r\n\r\n",
        _ => b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    };
    let Ok(mut stream) = TcpStream::connect_timeout(&to, Duration::from_secs(1)) else { return };
    let short = Some(Duration::from_millis(20));
    let _ = stream.set_write_timeout(short).and_then(|()| stream.set_read_timeout(short));
    let _ = stream.write_all(beginning).and_then(|()| stream.write_all(&noise));
    let _ = stream.read(&mut [0; 4096]);
}

/// Whether a newcomer at the relay is waited for, not turned away.
fn fleet_waits(fleet: &Fleet, relay: SocketAddr) -> Result<Option<()>, LabError> {
    fleet.world().site("member").enter(move || {
        let mut stream = TcpStream::connect_timeout(&relay, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_millis(500)))?;
        let turned_away = matches!(stream.read(&mut [0; 1]), Ok(0));
        Ok((!turned_away).then_some(()))
    })
}

/// Of a process, in bytes: a line of its status; 0 if it is gone.
fn memory(pid: u32, line: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = status.lines().find_map(|l| l.strip_prefix(line)?.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

fn demand(kept: bool, otherwise: &str) -> Result<(), LabError> {
    if kept { Ok(()) } else { Err(LabError::Promise(otherwise.into())) }
}
