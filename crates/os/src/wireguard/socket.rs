//! The UDP socket: large buffers, and runs of packets to one address in one system call.

use std::{
    io, mem,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd},
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use gotatun::{
    packet::Packet,
    udp::{
        UdpRecv,
        socket::{SockOpt, UdpSocket},
    },
};
use rustix::net::sockopt;
use tokio::io::Interest;
use tracing::debug;

const BUFFER: usize = 4 << 20;
/// The kernel's limit on segments in one call.
const MAX_SEGMENTS: usize = 64;
/// The most bytes in one call: what an IPv6 datagram can carry, with room to spare.
const MAX_RUN: usize = 65_000;
/// `UDP_SEGMENT` of <linux/udp.h>, which the C library does not name everywhere.
const UDP_SEGMENT: libc::c_int = 103;

/// A socket for IPv4 and IPv6.
#[derive(Clone)]
pub(crate) struct Socket {
    inner: UdpSocket,
    /// Cleared when the network refuses segmentation.
    segments: Arc<AtomicBool>,
}

impl Socket {
    pub(crate) fn bind(port: u16) -> io::Result<Self> {
        let options = SockOpt { only_v6: Some(false), ..SockOpt::default() };
        let both = UdpSocket::bind(([0u16; 8], port).into(), options);
        let inner = match both {
            Ok(socket) => socket,
            // No IPv6 on this machine.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {
                UdpSocket::bind(([0u8; 4], port).into(), SockOpt::default())?
            }
            Err(error) => return Err(error),
        };
        if let Err(error) = inner.enable_udp_gro() {
            debug!(%error, "the kernel does not join received packets");
        }
        let fd = inner.as_fd();
        // With the right to exceed the system's limit do so, otherwise take what it allows.
        let buffers = sockopt::set_socket_recv_buffer_size_force(fd, BUFFER)
            .or_else(|_| sockopt::set_socket_recv_buffer_size(fd, BUFFER))
            .and_then(|()| {
                sockopt::set_socket_send_buffer_size_force(fd, BUFFER)
                    .or_else(|_| sockopt::set_socket_send_buffer_size(fd, BUFFER))
            });
        if let Err(error) = buffers {
            debug!(%error, "socket buffers keep their size");
        }
        Ok(Self { inner, segments: Arc::new(AtomicBool::new(true)) })
    }

    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    /// For receiving, with the kernel joining packets.
    pub(crate) fn receiver(&self) -> UdpSocket {
        self.inner.clone()
    }

    /// Sends at once or not at all.
    pub(crate) fn try_send(&self, bytes: &[u8], to: SocketAddr) -> io::Result<()> {
        self.inner.socket().try_send_to(bytes, to).map(drop)
    }

    pub(crate) async fn send(&self, bytes: &[u8], to: SocketAddr) -> io::Result<()> {
        self.inner.socket().send_to(bytes, to).await.map(drop)
    }

    /// Sends all packets to one address, as few calls as possible. On an error the rest is not sent.
    pub(crate) async fn send_run(&self, packets: &[(Packet, SocketAddr)], to: SocketAddr) -> io::Result<()> {
        let mut rest = packets;
        while let [(first, _), ..] = rest {
            let count = if self.segments.load(Ordering::Relaxed) { run_length(rest) } else { 1 };
            let (run, after) = rest.split_at(count);
            rest = after;
            if count == 1 {
                self.send(first, to).await?;
                continue;
            }
            let sent = self
                .inner
                .socket()
                .async_io(Interest::WRITABLE, || send_segments(self.inner.as_fd().as_raw_fd(), run, to))
                .await;
            match sent {
                // What a device without checksum offload, or an old kernel, says.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::EOPNOTSUPP)) => {
                    debug!(%error, "the network refuses segmentation; packets are sent one by one");
                    self.segments.store(false, Ordering::Relaxed);
                    for (packet, _) in run {
                        self.send(packet, to).await?;
                    }
                }
                other => other?,
            }
        }
        Ok(())
    }
}

/// How many packets from the start can go in one call: all as long as the first, and one shorter at the end.
fn run_length(packets: &[(Packet, SocketAddr)]) -> usize {
    let Some((first, _)) = packets.first() else { return 0 };
    let (segment, mut total, mut count) = (first.len(), 0, 0);
    for (packet, _) in packets.iter().take(MAX_SEGMENTS) {
        total += packet.len();
        if packet.len() > segment || total > MAX_RUN {
            break;
        }
        count += 1;
        if packet.len() < segment {
            break;
        }
    }
    count.max(1)
}

/// Space for one control message with a `u16`, aligned like `cmsghdr`.
#[repr(C)]
union Control {
    header: mem::ManuallyDrop<[libc::cmsghdr; 1]>,
    bytes: [u8; 64],
}

fn send_segments(fd: libc::c_int, run: &[(Packet, SocketAddr)], to: SocketAddr) -> io::Result<()> {
    let Some((first, _)) = run.first() else { return Ok(()) };
    let segment = u16::try_from(first.len()).map_err(|_| io::Error::from_raw_os_error(libc::EMSGSIZE))?;
    let mut vectors = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; MAX_SEGMENTS];
    for (vector, (packet, _)) in vectors.iter_mut().zip(run) {
        *vector = libc::iovec { iov_base: packet.as_ptr().cast_mut().cast(), iov_len: packet.len() };
    }
    let mut control = Control { bytes: [0; 64] };
    // SAFETY: all-zero bytes are a valid value of these plain C structures.
    let (mut v4, mut v6, mut message): (libc::sockaddr_in, libc::sockaddr_in6, libc::msghdr) =
        unsafe { (mem::zeroed(), mem::zeroed(), mem::zeroed()) };
    match to {
        SocketAddr::V4(to) => {
            v4.sin_family = libc::AF_INET as libc::sa_family_t;
            v4.sin_port = to.port().to_be();
            v4.sin_addr.s_addr = u32::from_ne_bytes(to.ip().octets());
            message.msg_name = ptr::from_mut(&mut v4).cast();
            message.msg_namelen = mem::size_of::<libc::sockaddr_in>() as libc::socklen_t;
        }
        SocketAddr::V6(to) => {
            v6.sin6_family = libc::AF_INET6 as libc::sa_family_t;
            v6.sin6_port = to.port().to_be();
            v6.sin6_addr.s6_addr = to.ip().octets();
            v6.sin6_scope_id = to.scope_id();
            message.msg_name = ptr::from_mut(&mut v6).cast();
            message.msg_namelen = mem::size_of::<libc::sockaddr_in6>() as libc::socklen_t;
        }
    }
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = run.len().min(MAX_SEGMENTS) as _;
    message.msg_control = ptr::from_mut(&mut control).cast();
    // SAFETY: `control` is larger than the space of one message with two bytes, and aligned for its header, so the
    // header and data pointers stay inside it; name, vectors and control outlive the call, and the kernel only reads
    // the packets behind the vectors.
    let sent = unsafe {
        message.msg_controllen = libc::CMSG_SPACE(mem::size_of::<u16>() as u32) as _;
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_UDP;
        (*header).cmsg_type = UDP_SEGMENT;
        (*header).cmsg_len = libc::CMSG_LEN(mem::size_of::<u16>() as u32) as _;
        libc::CMSG_DATA(header).cast::<u16>().write_unaligned(segment);
        libc::sendmsg(fd, &message, libc::MSG_DONTWAIT)
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BytesMut;

    fn packets(lengths: &[usize]) -> Vec<(Packet, SocketAddr)> {
        let to = "127.0.0.1:9".parse().unwrap();
        lengths.iter().map(|n| (Packet::from_bytes(BytesMut::zeroed(*n)), to)).collect()
    }

    #[test]
    fn a_run_ends_with_the_first_shorter_packet_and_before_a_longer_one() {
        assert_eq!(run_length(&packets(&[100, 100, 60, 60])), 3);
        assert_eq!(run_length(&packets(&[100, 100, 101])), 2);
        assert_eq!(run_length(&packets(&[1300; 80])), 50);
        assert_eq!(run_length(&packets(&[32; 80])), MAX_SEGMENTS);
        assert_eq!(run_length(&packets(&[100])), 1);
    }

    #[tokio::test]
    async fn a_run_arrives_as_the_packets_it_was_made_of() {
        for target in ["127.0.0.1:0", "[::1]:0"] {
            let receiver = std::net::UdpSocket::bind(target).unwrap();
            receiver.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
            let to = receiver.local_addr().unwrap();
            let run: Vec<_> = [500, 500, 500, 7, 900]
                .iter()
                .enumerate()
                .map(|(i, n)| (Packet::from_bytes(BytesMut::from(&vec![i as u8; *n][..])), to))
                .collect();
            Socket::bind(0).unwrap().send_run(&run, to).await.unwrap();
            for (i, (packet, _)) in run.iter().enumerate() {
                let mut buffer = [0; 2000];
                let (length, _) = receiver.recv_from(&mut buffer).unwrap();
                assert_eq!((length, buffer[0]), (packet.len(), i as u8));
            }
        }
    }
}
