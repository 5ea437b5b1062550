//! A guest that sends any frame it likes: QEMU's user-mode network, with a socket where a guest would be.

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddrV4},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Child, Command, Stdio},
};

use rustix::{
    io::FdFlags,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::guest::LIMIT;

pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 10, 0, 2, 2];
const EVERYBODY: [u8; 6] = [0xff; 6];
const TCP: u8 = 6;
const UDP: u8 = 17;

/// It ends with the test.
pub(crate) struct Hostile {
    qemu: Child,
    wire: UnixStream,
}

impl Hostile {
    /// Where the process `qemu` is, or where the test is. `forward` is as in QEMU's `hostfwd`.
    pub(crate) fn start(beside: Option<u32>, forward: Option<&str>) -> Self {
        let (wire, theirs) = UnixStream::pair().unwrap();
        wire.set_read_timeout(Some(LIMIT)).unwrap();
        let spaces: Vec<(OwnedFd, LinkNameSpaceType)> = beside
            .into_iter()
            .flat_map(|pid| {
                let kinds = [LinkNameSpaceType::User, LinkNameSpaceType::Network, LinkNameSpaceType::Mount];
                ["user", "net", "mnt"].map(|kind| format!("/proc/{pid}/ns/{kind}")).into_iter().zip(kinds)
            })
            // What it has in common with the test needs not be joined, and may not.
            .filter(|(path, _)| fs::read_link(path).unwrap() != fs::read_link(own(path)).unwrap())
            .map(|(path, kind)| (File::open(path).unwrap().into(), kind))
            .collect();
        let forward = forward.map(|rule| format!(",hostfwd={rule}")).unwrap_or_default();
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-machine", "none", "-nodefaults", "-display", "none"]);
        command.arg("-netdev").arg(format!("user,id=net,ipv6=off{forward}"));
        command.arg("-netdev").arg(format!("socket,id=wire,fd={}", theirs.as_raw_fd()));
        command.args(["-netdev", "hubport,id=a,hubid=0,netdev=net", "-netdev", "hubport,id=b,hubid=0,netdev=wire"]);
        command.stdin(Stdio::null());
        // SAFETY: system calls only, on descriptors that the closure owns.
        unsafe {
            command.pre_exec(move || {
                for (space, kind) in &spaces {
                    move_into_link_name_space(std::os::fd::AsFd::as_fd(space), Some(*kind))?;
                }
                Ok(rustix::io::fcntl_setfd(&theirs, FdFlags::empty())?)
            });
        }
        let mut hostile = Self { qemu: command.spawn().unwrap(), wire };
        // So that QEMU knows where the guest is.
        let question = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &GUEST_MAC, &GUEST.octets(), &[0; 6], &[10, 0, 2, 2]].concat();
        hostile.send([&EVERYBODY[..], &GUEST_MAC, &[8, 6], &question].concat());
        while hostile.receive()[12..14] != [8, 6] {}
        hostile
    }

    fn send(&mut self, frame: Vec<u8>) {
        let length = u32::try_from(frame.len()).unwrap().to_be_bytes();
        self.wire.write_all(&[&length[..], &frame].concat()).unwrap();
    }

    fn receive(&mut self) -> Vec<u8> {
        let mut length = [0; 4];
        self.wire.read_exact(&mut length).expect("a frame comes");
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.wire.read_exact(&mut frame).unwrap();
        frame
    }

    fn send_ip(&mut self, protocol: u8, to: Ipv4Addr, payload: &[u8]) {
        let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
        let fixed = [0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, protocol, 0, 0];
        let mut header = [&fixed[..], &GUEST.octets(), &to.octets()].concat();
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum);
        // An honest guest asks the gateway to pass it on.
        for mac in [GATEWAY_MAC, EVERYBODY] {
            self.send([&mac[..], &GUEST_MAC, &[8, 0], &header, payload].concat());
        }
    }

    pub(crate) fn send_udp(&mut self, from: u16, to: SocketAddrV4, text: &[u8]) {
        let length = u16::try_from(8 + text.len()).unwrap().to_be_bytes();
        let datagram = [&from.to_be_bytes()[..], &to.port().to_be_bytes(), &length, &[0, 0], text].concat();
        self.send_ip(UDP, *to.ip(), &datagram);
    }

    /// The first packet of a connection.
    pub(crate) fn send_syn(&mut self, from: u16, to: SocketAddrV4) {
        let ports = [from.to_be_bytes(), to.port().to_be_bytes()].concat();
        let mut segment = [&ports[..], &[0, 0, 3, 232, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]].concat();
        let pseudo = [&GUEST.octets()[..], &to.ip().octets(), &[0, TCP, 0, 20], &segment].concat();
        let sum = checksum(&pseudo);
        segment[16..18].copy_from_slice(&sum);
        self.send_ip(TCP, *to.ip(), &segment);
    }

    /// The next datagram for a port: who sent it, and what it says.
    pub(crate) fn receive_udp(&mut self, port: u16) -> (SocketAddrV4, Vec<u8>) {
        loop {
            let frame = self.receive();
            if frame[12..14] == [8, 0] && frame[23] == UDP && frame[36..38] == port.to_be_bytes() {
                let address = Ipv4Addr::new(frame[26], frame[27], frame[28], frame[29]);
                let from = u16::from_be_bytes([frame[34], frame[35]]);
                let end = 34 + usize::from(u16::from_be_bytes([frame[38], frame[39]]));
                return (SocketAddrV4::new(address, from), frame[42..end].to_vec());
            }
        }
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// The same namespace of the test.
fn own(path: &str) -> String {
    format!("/proc/self/ns/{}", path.rsplit('/').next().unwrap())
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}
