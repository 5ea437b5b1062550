//! What a guest reaches, and who ends with whom. Needs `passt`, and a network of the computer that runs the tests.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "network/frames.rs"]
mod frames;
mod guest;

use std::{
    env, fs,
    io::{ErrorKind, Read},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket},
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use clan_vm::{ExitReason, Network, UdpForward, Vm, network};
use frames::Hostile;
use guest::{LIMIT, Then, adopted, feeders, gone, kill, spec, started};
use serde_json::json;
use tokio::time::timeout;

const GUEST_PORT: u16 = 41640;
const FOLDER: &str = "CLAN_VM_TEST_FOLDER";

/// An address of this computer that is not its loopback. Nothing is sent.
fn own_address() -> Ipv4Addr {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.connect("192.0.2.1:9").expect("this computer has a network");
    match socket.local_addr().unwrap() {
        SocketAddr::V4(own) if !own.ip().is_loopback() => *own.ip(),
        other => panic!("no address of this computer: {other}"),
    }
}

fn free_port() -> u16 {
    UdpSocket::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port()
}

fn listen(address: Ipv4Addr) -> (UdpSocket, TcpListener, u16) {
    let tcp = TcpListener::bind((address, 0)).unwrap();
    let port = tcp.local_addr().unwrap().port();
    let udp = UdpSocket::bind((address, port)).unwrap();
    udp.set_read_timeout(Some(LIMIT)).unwrap();
    (udp, tcp, port)
}

fn hear(udp: &UdpSocket) -> (SocketAddr, Vec<u8>) {
    let mut bytes = [0; 100];
    let (length, from) = udp.recv_from(&mut bytes).expect("a datagram comes");
    (from, bytes[..length].to_vec())
}

async fn exit(vm: &Vm) -> ExitReason {
    timeout(LIMIT, vm.wait_exit()).await.expect("it ends").reason
}

#[tokio::test]
async fn whatever_a_guest_sends_does_not_reach_the_base_os_loopback() {
    let folder = tempfile::tempdir().unwrap();
    let vm = started(&spec(folder.path(), &Then::Halt)).await;
    assert_eq!(*vm.network(), Network::Apart);

    let own = own_address();
    let (udp, tcp, port) = listen(Ipv4Addr::LOCALHOST);
    let (own_udp, own_tcp, own_port) = listen(own);
    let gateway = Ipv4Addr::new(10, 0, 2, 2);

    // That this test can see it: QEMU's own network leads there.
    let mut exposed = Hostile::start(None, None);
    exposed.send_udp(GUEST_PORT, SocketAddrV4::new(gateway, port), b"in");
    assert_eq!(hear(&udp).1, b"in");
    exposed.send_syn(5000, SocketAddrV4::new(gateway, port));
    tcp.accept().unwrap();
    drop(exposed);

    // Frames that went two ways may come twice.
    udp.set_nonblocking(true).unwrap();
    tcp.set_nonblocking(true).unwrap();
    let mut rest = [0; 8];
    while udp.recv(&mut rest).is_ok() {}
    while tcp.accept().is_ok() {}

    let mut hostile = Hostile::start(Some(vm.pid()), None);
    let targets = [
        gateway,
        Ipv4Addr::new(10, 0, 2, 3),
        Ipv4Addr::new(10, 0, 2, 4),
        frames::GUEST,
        Ipv4Addr::new(10, 0, 2, 255),
        Ipv4Addr::LOCALHOST,
        Ipv4Addr::new(127, 5, 5, 5),
        Ipv4Addr::UNSPECIFIED,
        Ipv4Addr::new(0, 0, 0, 1),
        Ipv4Addr::BROADCAST,
        own,
    ];
    for (index, target) in targets.into_iter().enumerate() {
        hostile.send_udp(GUEST_PORT, SocketAddrV4::new(target, port), b"in");
        hostile.send_syn(6000 + u16::try_from(index).unwrap(), SocketAddrV4::new(target, port));
    }
    // What is sent last arrives where it may, so the rest has been dealt with.
    hostile.send_syn(7000, SocketAddrV4::new(own, own_port));
    own_tcp.accept().unwrap();
    hostile.send_udp(GUEST_PORT, SocketAddrV4::new(own, own_port), b"last");
    assert_eq!(hear(&own_udp).1, b"last");
    assert_eq!(udp.recv(&mut rest).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(tcp.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    vm.quit(LIMIT).await;
}

#[tokio::test]
async fn a_peer_sees_the_forwarded_port_and_is_heard_through_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut spec = spec(folder.path(), &Then::Halt);
    let (own, port) = (own_address(), free_port());
    let forward = UdpForward { host: (Ipv4Addr::UNSPECIFIED, port).into(), guest_port: GUEST_PORT };
    spec.forwards = vec![forward];
    let vm = started(&spec).await;
    // The guest that halts makes room for one that talks.
    let line = format!("hostfwd_remove net udp:0.0.0.0:{port}");
    vm.qmp().execute("human-monitor-command", json!({ "command-line": line })).await.unwrap();
    let mut guest = Hostile::start(Some(vm.pid()), Some(&format!("udp:0.0.0.0:{port}-:{GUEST_PORT}")));

    let (peer, _, peer_port) = listen(own);
    let peer_address = SocketAddrV4::new(own, peer_port);
    guest.send_udp(GUEST_PORT, peer_address, b"to the peer");
    assert_eq!(hear(&peer), (SocketAddr::from((own, port)), b"to the peer".to_vec()));
    peer.send_to(b"back", (own, port)).unwrap();
    assert_eq!(guest.receive_udp(GUEST_PORT), (peer_address, b"back".to_vec()));

    let (stranger, _, stranger_port) = listen(own);
    stranger.send_to(b"unasked", (own, port)).unwrap();
    assert_eq!(guest.receive_udp(GUEST_PORT), (SocketAddrV4::new(own, stranger_port), b"unasked".to_vec()));
    vm.quit(LIMIT).await;
}

#[tokio::test]
async fn the_port_is_free_again_when_the_end_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let mut spec = spec(folder.path(), &Then::Halt);
    let host = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
    spec.forwards = vec![UdpForward { host, guest_port: GUEST_PORT }];
    for _ in 0..3 {
        let vm = started(&spec).await;
        assert_eq!(UdpSocket::bind(host).unwrap_err().kind(), ErrorKind::AddrInUse);
        vm.kill().unwrap();
        assert_eq!(exit(&vm).await, ExitReason::Signalled(9));
        UdpSocket::bind(host).unwrap();
    }
}

#[tokio::test]
async fn a_machine_whose_network_is_killed_ends_and_says_so() {
    // pasta, and what it waits for.
    for victim in [0, 1] {
        let folder = tempfile::tempdir().unwrap();
        let vm = started(&spec(folder.path(), &Then::Halt)).await;
        let feeders = feeders(vm.pid());
        kill(feeders[victim]);
        assert_eq!(exit(&vm).await, ExitReason::NetworkLost);
        gone(&feeders).await;
        gone(&[vm.pid()]).await;
    }
}

#[tokio::test]
async fn with_nobody_watching_the_network_ends_with_its_machine() {
    let folder = tempfile::tempdir().unwrap();
    let vm = started(&spec(folder.path(), &Then::Halt)).await;
    let (pid, feeders) = (vm.pid(), feeders(vm.pid()));
    vm.leave();
    kill(pid);
    gone(&feeders).await;
}

#[tokio::test]
async fn a_machine_is_adopted_with_its_network() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path(), &Then::Halt);
    let vm = started(&spec).await;
    let feeders = feeders(vm.pid());
    vm.leave();
    let vm = adopted(&spec.dir).await;
    assert_eq!(*vm.network(), Network::Apart);
    kill(feeders[0]);
    assert_eq!(exit(&vm).await, ExitReason::NetworkLost);
    gone(&feeders).await;
}

#[tokio::test]
#[ignore = "not a test by itself: another test runs it as a program of its own, with other programs to find"]
async fn starter() {
    let folder = env::var_os(FOLDER).expect("run by the other test");
    let vm = started(&spec(Path::new(&folder), &Then::Halt)).await;
    let again = Vm::adopt(&Path::new(&folder).join("vm")).await.unwrap().unwrap();
    println!("\nnetwork {:?}", vm.network());
    println!("adopted {:?}", again.network());
    drop(again);
    assert_eq!(vm.quit(Duration::from_secs(5)).await.reason, ExitReason::Quit);
}

#[test]
fn without_pasta_a_machine_runs_and_says_what_its_guest_can_reach() {
    assert_eq!(network::exposure(), None);
    let folder = tempfile::tempdir().unwrap();
    let programs = folder.path().join("bin");
    fs::create_dir(&programs).unwrap();
    for name in ["cat", "qemu-system-x86_64"] {
        let places = env::split_paths(&env::var_os("PATH").unwrap()).map(|p| p.join(name)).collect::<Vec<_>>();
        symlink(places.iter().find(|p| p.exists()).unwrap(), programs.join(name)).unwrap();
    }
    let mut program = Command::new(env::current_exe().unwrap())
        .args(["--exact", "starter", "--ignored", "--nocapture"])
        .env(FOLDER, folder.path())
        .env("PATH", &programs)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    program.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(program.wait().unwrap().success(), "{said}");
    for line in ["network Exposed", "adopted Exposed"] {
        let line = said.lines().find(|l| l.starts_with(line)).unwrap_or_else(|| panic!("{said}"));
        assert!(line.contains("pasta is not installed") && line.contains("apt install passt"), "{line}");
    }
}

#[tokio::test]
#[ignore = "not a test by itself: another test runs it where there is such a name server"]
async fn asker() {
    let folder = env::var_os(FOLDER).expect("run by the other test");
    let server = UdpSocket::bind("127.0.0.53:53").unwrap();
    server.set_read_timeout(Some(LIMIT)).unwrap();
    let other = UdpSocket::bind("127.0.0.53:54").unwrap();
    other.set_nonblocking(true).unwrap();
    let vm = started(&spec(Path::new(&folder), &Then::Halt)).await;
    assert_eq!(*vm.network(), Network::Apart);
    let mut guest = Hostile::start(Some(vm.pid()), None);
    let name_server = |port| SocketAddrV4::new(Ipv4Addr::new(10, 0, 2, 3), port);
    guest.send_udp(5000, name_server(54), b"in");
    guest.send_udp(5001, name_server(53), b"question");
    let (from, question) = hear(&server);
    assert_eq!(question, b"question");
    server.send_to(b"answer", from).unwrap();
    assert_eq!(guest.receive_udp(5001), (name_server(53), b"answer".to_vec()));
    assert_eq!(other.recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::WouldBlock);
    vm.quit(LIMIT).await;
}

#[test]
fn a_name_server_on_the_base_os_loopback_is_asked_and_nothing_else_there() {
    let folder = tempfile::tempdir().unwrap();
    let resolv_conf = folder.path().join("resolv.conf");
    fs::write(&resolv_conf, "nameserver 127.0.0.53\n").unwrap();
    // A base OS without a network, and with another name server; /etc/resolv.conf may be a link.
    let prepare = r#"ip link set lo up && mount --bind "$0" "$(readlink -f /etc/resolv.conf)" && exec "$@""#;
    let finished = Command::new("unshare")
        .args(["--map-root-user", "--mount", "--net", "sh", "-c", prepare])
        .arg(&resolv_conf)
        .arg(env::current_exe().unwrap())
        .args(["--exact", "asker", "--ignored", "--nocapture"])
        .env(FOLDER, folder.path())
        .output()
        .unwrap();
    assert!(finished.status.success(), "{finished:?}");
    assert!(String::from_utf8_lossy(&finished.stdout).contains("1 passed"), "{finished:?}");
}
