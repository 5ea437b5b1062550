//! One echo over the mesh (RFC 4443): what a person means by whether a machine is there.

use std::{
    io,
    net::{Ipv6Addr, SocketAddrV6},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use clan_os::wireguard::Wireguard;
use clan_types::MachineId;
use clan_wire::control::ControlResponse;
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recv, sendto, socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
};

use crate::{core::CoreHandle, status};

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(2);
const REQUEST: u8 = 128;
const REPLY: u8 = 129;
const HEADER: usize = 8;
const NONCE: usize = 8;

/// Sends one echo to a machine that the clan knows, and says how it is reached.
pub(crate) async fn ping(machine: MachineId, core: &CoreHandle, wireguard: Option<&Wireguard>) -> ControlResponse {
    let find = async || status::machines(&core.view(), wireguard).await.into_iter().find(|known| known.id == machine);
    // INVARIANT: echoes go to addresses of the clan's machines, and nowhere else.
    let Some(known) = find().await else {
        return ControlResponse::Failed("there is no such machine in the clan".to_owned());
    };
    if wireguard.is_none() {
        return ControlResponse::Failed("no packets flow between this computer and the clan".to_owned());
    }
    let rtt = match tokio::task::spawn_blocking(move || echo(known.address, LIMIT)).await {
        Ok(Ok(rtt)) => rtt,
        Ok(Err(error)) => return ControlResponse::Failed(format!("no echo can be sent: {error}")),
        Err(error) => return ControlResponse::Failed(format!("no echo can be sent: {error}")),
    };
    // Asked again: a first echo brings paths about.
    let path = find().await.and_then(|known| known.path);
    ControlResponse::Pong { rtt_us: rtt.map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)), path }
}

/// Sends an echo request and waits for its answer: the round trip; `None` if none came in time. Blocks.
fn echo(to: Ipv6Addr, limit: Duration) -> io::Result<Option<Duration>> {
    let mut nonce = [0; NONCE];
    getrandom::fill(&mut nonce).map_err(|e| io::Error::other(e.to_string()))?;
    let socket = open()?;
    let began = Instant::now();
    let request = request(&nonce);
    match sendto(&socket, &request, SendFlags::empty(), &SocketAddrV6::new(to, 0, 0, 0)) {
        Ok(_) => {}
        // The device is there, and has no way to the machine.
        Err(Errno::HOSTUNREACH | Errno::NETUNREACH) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let mut packet = [0; 256];
    loop {
        let left = limit.saturating_sub(began.elapsed());
        if left.is_zero() {
            return Ok(None);
        }
        set_socket_timeout(&socket, Timeout::Recv, Some(left))?;
        match recv(&socket, packet.as_mut_slice(), RecvFlags::empty()) {
            // A raw socket hears of every answer to this computer.
            Ok((length, _)) if answers(packet.get(..length).unwrap_or_default(), &nonce) => {
                return Ok(Some(began.elapsed()));
            }
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN | Errno::HOSTUNREACH | Errno::NETUNREACH) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The kernel fills in the checksum and, where it opens sockets for echoes, the identifier. On a raw socket it is what we say:
/// one of its own for each echo, as by it and the addresses firewalls tell our echoes from those that come to us.
fn request(nonce: &[u8; NONCE]) -> [u8; HEADER + NONCE] {
    let [a, b, c, d, e, f, g, h] = *nonce;
    [REQUEST, 0, 0, 0, a, b, 0, 1, a, b, c, d, e, f, g, h]
}

/// What the system allows: a socket for echoes; or, as root where those are not allowed to anybody, a raw one.
fn open() -> io::Result<OwnedFd> {
    let kind = |kind| socket_with(AddressFamily::INET6, kind, SocketFlags::CLOEXEC, Some(ipproto::ICMPV6));
    Ok(kind(SocketType::DGRAM).or_else(|_| kind(SocketType::RAW))?)
}

fn answers(packet: &[u8], nonce: &[u8; NONCE]) -> bool {
    packet.first() == Some(&REPLY) && packet.get(HEADER..HEADER + NONCE) == Some(nonce.as_slice())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_computer_answers() {
        match echo(Ipv6Addr::LOCALHOST, Duration::from_secs(5)) {
            Ok(answer) => assert!(answer.is_some()),
            // Neither kind of socket is allowed here, or there is no IPv6.
            Err(error) => assert!(
                matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::AddrNotAvailable)
                    || error.raw_os_error() == Some(Errno::AFNOSUPPORT.raw_os_error()),
                "{error}"
            ),
        }
    }

    #[test]
    fn echoes_are_told_apart_by_their_identifiers() {
        let [one, other] = [[1, 2, 3, 4, 5, 6, 7, 8], [2, 1, 3, 4, 5, 6, 7, 8]].map(|nonce| request(&nonce));
        assert_ne!(one[4..6], other[4..6]);
        let mut answer = one;
        answer[0] = REPLY;
        assert!(answers(&answer, &[1, 2, 3, 4, 5, 6, 7, 8]) && !answers(&answer, &[2, 1, 3, 4, 5, 6, 7, 8]));
    }

    #[test]
    fn other_packets_are_no_answer() {
        let nonce = [7; NONCE];
        let mut packet = vec![REPLY, 0, 0, 0, 1, 2, 0, 1];
        packet.extend_from_slice(&nonce);
        assert!(answers(&packet, &nonce));
        assert!(!answers(&packet[..12], &nonce));
        assert!(!answers(&[], &nonce));
        packet[0] = REQUEST;
        assert!(!answers(&packet, &nonce), "our own request");
    }
}
