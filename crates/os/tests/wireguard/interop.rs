//! Our machine and a stock `wireguard-go`: handshakes, new keys, a move, and real traffic.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use clan_types::{ClanId, MachineId, WgPublicKey, clan_prefix, mesh_address};
use gotatun::x25519::{PublicKey, StaticSecret};

use super::{
    AFTER_OUTAGE, CHUNK, Carried, Machine, PORT, eventually,
    netns::{self, Namespace},
    pipe, progress, start_with, stream_between,
};
use clan_os::wireguard::{Access, Policy, Transport, WgPeer};
use tokio::net::UdpSocket;

const THEIR_PORT: u16 = 51820;

/// A computer that runs a standard WireGuard program. The program ends with this.
struct Standard {
    namespace: Namespace,
    program: Child,
    device: String,
    secret: StaticSecret,
    address: Ipv6Addr,
}

/// The present version where `scripts/rivals` has put it, else the system's.
fn wireguard_go() -> PathBuf {
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/rivals/unstable/usr/bin/wireguard-go");
    if unpacked.exists() { unpacked } else { "wireguard-go".into() }
}

impl Standard {
    fn start(n: u8) -> Self {
        let secret = StaticSecret::from([n + 50; 32]);
        let id = MachineId::from_bytes(*PublicKey::from(&secret).as_bytes());
        let address = mesh_address(&ClanId::from_bytes([42; 32]), &id);
        // The control socket is named after the device, for all namespaces in one folder.
        let device = format!("wgt{}x{n}", std::process::id() % 1_000_000);
        let namespace = Namespace::new("standard");
        let program = Self::spawn(&namespace, &device);
        let standard = Self { namespace, program, device, secret, address };
        standard.configure();
        standard
    }

    fn spawn(namespace: &Namespace, device: &str) -> Child {
        let mut command = Command::new(wireguard_go());
        command.args(["-f", device]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        namespace.run(async move { command.spawn() }).expect("wireguard-go runs: install it with `make deps`")
    }

    fn configure(&self) {
        eventually("wireguard-go listens", Duration::from_secs(10), || self.connect().is_ok());
        let private: String = self.secret.to_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        self.set(&format!("private_key={private}\nlisten_port={THEIR_PORT}\n"));
        let Self { device, address, .. } = self;
        self.ip(&format!("address add {address}/48 dev {device} nodad"));
        self.ip(&format!("link set {device} mtu 1280 up"));
    }

    /// Kills the program, and starts it again: it remembers nothing, and its device is a new one.
    fn restart(&mut self) {
        self.end();
        self.program = Self::spawn(&self.namespace, &self.device);
        self.configure();
    }

    fn end(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
        let _ = std::fs::remove_file(format!("/var/run/wireguard/{}.sock", self.device));
    }

    fn connect(&self) -> std::io::Result<UnixStream> {
        UnixStream::connect(format!("/var/run/wireguard/{}.sock", self.device))
    }

    fn set(&self, settings: &str) {
        let mut stream = self.connect().unwrap();
        stream.write_all(format!("set=1\n{settings}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        assert_eq!(answer.trim(), "errno=0", "for {settings}");
    }

    /// What it says about its only peer.
    fn get(&self, key: &str) -> Option<String> {
        let mut stream = self.connect().unwrap();
        stream.write_all(b"get=1\n\n").unwrap();
        let lines = BufReader::new(stream).lines().map(Result::unwrap);
        let values = lines.take_while(|line| !line.is_empty());
        values.filter_map(|line| Some(line.strip_prefix(&format!("{key}="))?.to_owned())).last()
    }

    /// When it last shook hands.
    fn handshake(&self) -> (u64, u64) {
        let number = |key| self.get(key).and_then(|value| value.parse().ok()).unwrap_or(0);
        (number("last_handshake_time_sec"), number("last_handshake_time_nsec"))
    }

    fn ip(&self, arguments: &str) {
        let arguments: Vec<String> = arguments.split_whitespace().map(str::to_owned).collect();
        let status = self.namespace.run(async move { Command::new("ip").args(&arguments).status() });
        assert!(status.unwrap().success());
    }

    fn knows(&self, ours: &Machine, endpoint: Option<&str>) {
        let key: String = ours.peer(&[]).public_key.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let (prefix, bits) = clan_prefix(&ClanId::from_bytes([42; 32]));
        let endpoint = endpoint.map(|addr| format!("endpoint={addr}\n")).unwrap_or_default();
        self.set(&format!("replace_peers=true\npublic_key={key}\n{endpoint}allowed_ip={prefix}/{bits}\n"));
    }

    fn peer(&self, candidates: &[&str]) -> WgPeer {
        let key = *PublicKey::from(&self.secret).as_bytes();
        WgPeer {
            id: MachineId::from_bytes(key),
            public_key: WgPublicKey::from_bytes(key),
            addresses: vec![self.address.into()],
            standard: true,
            candidates: candidates.iter().map(|candidate| candidate.parse().unwrap()).collect(),
            keepalive: None,
        }
    }
}

impl Drop for Standard {
    fn drop(&mut self) {
        self.end();
    }
}

/// wireguard-go keeps its control socket below /run, where only root may write.
fn enter(name: &str) -> bool {
    if !netns::enter(name) {
        return false;
    }
    netns::own_run();
    true
}

fn meet(n: u8, rekey_after: Option<Duration>) -> (Machine, Standard) {
    // The other ends of the carrier are dropped: a standard peer has none.
    let (ours, _ends) = start_with(n, rekey_after);
    let theirs = Standard::start(n + 1);
    netns::join(
        &ours.namespace,
        &theirs.namespace,
        [&["192.0.2.1/24", "2001:db8::1/64"], &["192.0.2.2/24", "2001:db8::2/64"]],
    );
    (ours, theirs)
}

fn endpoint(ours: &Machine, theirs: &Standard) -> String {
    let (wireguard, id) = (ours.wireguard.clone(), theirs.peer(&[]).id);
    let status = ours.namespace.run(async move { wireguard.peers().await });
    format!("{:?}", status.into_iter().find(|peer| peer.id == id).map(|peer| peer.path))
}

#[test]
fn we_begin_with_a_standard_peer_and_renew_keys_while_a_stream_runs() {
    if !enter("interop::we_begin_with_a_standard_peer_and_renew_keys_while_a_stream_runs") {
        return;
    }
    let (ours, theirs) = meet(1, Some(Duration::from_secs(1)));
    theirs.knows(&ours, None);
    ours.set_peers(vec![theirs.peer(&["192.0.2.2:51820"])]);
    let stream = stream_between(&ours.namespace, &theirs.namespace, theirs.address);
    progress(&stream, Duration::from_secs(10));
    assert_eq!(theirs.get("endpoint").as_deref(), Some("192.0.2.1:41641"), "it learnt where we are");
    let mut last = theirs.handshake();
    for round in 0..3 {
        // A round of the stream takes some milliseconds: it went on if it never paused for longer than a renewal takes.
        let before = stream.load(Ordering::Relaxed);
        eventually(&format!("new keys, time {round}"), Duration::from_secs(10), || theirs.handshake() != last);
        assert!(stream.load(Ordering::Relaxed) > before, "the stream stood still until new keys were there");
        last = theirs.handshake();
        progress(&stream, Duration::from_secs(5));
    }
    ours.stop();
}

#[test]
fn a_standard_peer_begins_starts_anew_and_roams_while_a_stream_runs() {
    if !enter("interop::a_standard_peer_begins_starts_anew_and_roams_while_a_stream_runs") {
        return;
    }
    let (ours, mut theirs) = meet(3, None);
    // We do not know where it is.
    ours.set_peers(vec![theirs.peer(&[])]);
    theirs.knows(&ours, Some(&format!("[2001:db8::1]:{PORT}")));
    let stream = stream_between(&theirs.namespace, &ours.namespace, ours.address);
    progress(&stream, Duration::from_secs(10));
    assert!(endpoint(&ours, &theirs).contains("[2001:db8::2]:51820"), "{}", endpoint(&ours, &theirs));

    // Its sessions go with it: it shakes hands again.
    let before = theirs.handshake();
    theirs.restart();
    assert_eq!(theirs.handshake(), (0, 0));
    theirs.knows(&ours, Some(&format!("192.0.2.1:{PORT}")));
    // We would notice only by its silence, after fifteen seconds (section 6.5 of the paper): it speaks first.
    let address = ours.address;
    theirs.namespace.run(async move {
        UdpSocket::bind("[::]:0").await.unwrap().send_to(b"back again", SocketAddr::from((address, 9))).await.unwrap();
    });
    progress(&stream, AFTER_OUTAGE);
    assert_ne!(theirs.handshake(), before);
    assert!(endpoint(&ours, &theirs).contains("192.0.2.2:51820"), "from IPv6 to IPv4");

    // Another network, and with it another address.
    theirs.ip("address del 192.0.2.2/24 dev wire0");
    theirs.ip("address add 192.0.2.77/24 dev wire0");
    progress(&stream, AFTER_OUTAGE);
    assert!(endpoint(&ours, &theirs).contains("192.0.2.77:51820"), "{}", endpoint(&ours, &theirs));
    theirs.set("listen_port=51999\n");
    progress(&stream, AFTER_OUTAGE);
    assert!(endpoint(&ours, &theirs).contains("192.0.2.77:51999"), "{}", endpoint(&ours, &theirs));

    // We move, and it follows.
    ours.namespace.command("ip address del 192.0.2.1/24 dev wire0");
    ours.namespace.command("ip address add 192.0.2.88/24 dev wire0");
    progress(&stream, AFTER_OUTAGE);
    assert_eq!(theirs.get("endpoint").as_deref(), Some("192.0.2.88:41641"));

    // Put out, it gets nothing through.
    ours.set_peers(vec![]);
    let rest = stream.load(Ordering::Relaxed) + 1;
    std::thread::sleep(Duration::from_millis(500));
    assert!(stream.load(Ordering::Relaxed) <= rest, "a removed peer gets nothing through");
    ours.stop();
}

#[test]
fn a_phone_and_the_members_reach_one_another_through_its_machine_as_far_as_they_may() {
    if !enter("interop::a_phone_and_the_members_reach_one_another_through_its_machine_as_far_as_they_may") {
        return;
    }
    let ((via, via_ends), (member, member_ends)) = (start_with(7, None), start_with(9, None));
    let phone = Standard::start(8);
    netns::join(&via.namespace, &phone.namespace, [&["192.0.2.1/24"], &["192.0.2.2/24"]]);
    let carried = Arc::new(Carried::default());
    pipe(&via, member.id, via_ends.outgoing, member_ends.incoming, &carried);
    pipe(&member, via.id, member_ends.outgoing, via_ends.incoming, &carried);
    phone.knows(&via, Some(&format!("192.0.2.1:{PORT}")));
    via.set_peers(vec![member.peer(&[]), phone.peer(&[])]);
    let mut front = via.peer(&[]);
    front.addresses.push(phone.address.into());
    member.set_peers(vec![front.clone()]);

    let there = stream_between(&phone.namespace, &member.namespace, member.address);
    let back = stream_between(&member.namespace, &phone.namespace, phone.address);
    progress(&there, Duration::from_secs(10));
    progress(&back, Duration::from_secs(10));

    // From now on it takes permission, on the member and on the phone alike.
    let seven = || Access::Ports { ports: vec![(Transport::Tcp, 7..=7)], ping: false };
    let policy = |who, access| {
        let mut policy = Policy::default();
        policy.allow(IpAddr::V6(who), access);
        policy
    };
    member.wireguard.set_policy(policy(phone.address, seven()), BTreeMap::new());
    let behind = |access| BTreeMap::from([(phone.peer(&[]).id, policy(member.address, access))]);
    via.wireguard.set_policy(Policy::default(), behind(seven()));
    progress(&there, Duration::from_secs(10));
    progress(&back, Duration::from_secs(10));
    let knock = |from: &Namespace, to: &Namespace, address: Ipv6Addr| {
        let to_address = SocketAddr::from((address, 9));
        let listener = to.run(async move { UdpSocket::bind(to_address).await.unwrap() });
        from.run(async move {
            let sender = UdpSocket::bind("[::]:0").await.unwrap();
            for _ in 0..3 {
                sender.send_to(b"knock", to_address).await.unwrap();
            }
        });
        to.run(async move {
            tokio::time::timeout(Duration::from_millis(500), listener.recv_from(&mut [0; 16])).await.is_ok()
        })
    };
    assert!(!knock(&phone.namespace, &member.namespace, member.address), "only port 7 is open on the member");
    assert!(!knock(&member.namespace, &phone.namespace, phone.address), "and on the phone");
    via.wireguard.set_policy(Policy::default(), behind(Access::Everything));
    assert!(knock(&member.namespace, &phone.namespace, phone.address), "now everything");

    // Nobody may reach the member any more: neither new streams nor running ones go on.
    member.wireguard.set_policy(Policy::default(), BTreeMap::new());
    let rest = (there.load(Ordering::Relaxed) + 1, back.load(Ordering::Relaxed) + 1);
    std::thread::sleep(Duration::from_millis(500));
    assert!(there.load(Ordering::Relaxed) <= rest.0, "a stream that is not allowed any more gets nothing through");
    assert!(back.load(Ordering::Relaxed) <= rest.1, "nor does an answer");
    via.stop();
    member.stop();
}

#[test]
fn iperf3_runs_both_ways_with_a_standard_peer() {
    if !enter("interop::iperf3_runs_both_ways_with_a_standard_peer") {
        return;
    }
    let (ours, theirs) = meet(5, None);
    theirs.knows(&ours, None);
    ours.set_peers(vec![theirs.peer(&["192.0.2.2:51820"])]);
    let address = theirs.address.to_string();
    let mut server = Command::new("iperf3");
    server.arg("--server").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut server =
        theirs.namespace.run(async move { server.spawn() }).expect("iperf3 runs: install it with `make deps`");
    for arguments in [&["-P", "2"][..], &["-R"], &["-u", "-b", "5M"]] {
        let mut report = String::new();
        // The server may not listen yet.
        eventually("iperf3 finishes", Duration::from_secs(40), || {
            let mut client = Command::new("iperf3");
            client.args(["-J", "-t", "1", "-c", &address]).args(arguments);
            let output = ours.namespace.run(async move { client.output() }).unwrap();
            report = String::from_utf8_lossy(&output.stdout).into_owned();
            // It may still be busy with the one before, which the status does not tell.
            output.status.success() && !report.contains("\"error\"")
        });
        let report: serde_json::Value = serde_json::from_str(&report).unwrap();
        let bytes = report.pointer("/end/sum_received/bytes").or_else(|| report.pointer("/end/sum/bytes"));
        let bytes = bytes.and_then(serde_json::Value::as_f64).unwrap_or(0.0);
        assert!(bytes > 4.0 * CHUNK as f64, "{arguments:?}: {report}");
    }
    let _ = server.kill();
    let _ = server.wait();
    ours.stop();
}
