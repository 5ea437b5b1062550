//! The UDP socket: large buffers, and many packets of one peer in one system call.

use std::{
    io, mem,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    ptr,
    sync::atomic::{AtomicBool, Ordering},
};

use bytes::BytesMut;
use gotatun::packet::Packet;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tracing::debug;

const BUFFER: usize = 4 << 20;
/// The kernel's limit on segments in one call.
const MAX_SEGMENTS: usize = 64;
/// The most bytes in one call: what an IPv6 datagram can carry, with room to spare.
const MAX_RUN: usize = 65_000;
/// `UDP_SEGMENT` and `UDP_GRO` of <linux/udp.h>, which the C library does not name everywhere.
const UDP_SEGMENT: libc::c_int = 103;
const UDP_GRO: libc::c_int = 104;
/// Datagrams taken by one call; with `UDP_GRO` each may stand for many.
const RECEIVED: usize = 8;
/// The longest datagram, also one that stands for many.
const DATAGRAM: usize = 65_536;

/// A socket for IPv4 and IPv6 that never blocks.
pub(crate) struct Socket {
    inner: UdpSocket,
    /// Cleared when the network refuses segmentation.
    segments: AtomicBool,
}

impl Socket {
    pub(crate) fn bind(port: u16) -> io::Result<Self> {
        let both = || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let fd = rustix::net::socket_with(AddressFamily::INET6, SocketType::DGRAM, flags, None)?;
            sockopt::set_ipv6_v6only(&fd, false)?;
            rustix::net::bind(&fd, &SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0))?;
            io::Result::Ok(UdpSocket::from(fd))
        };
        let inner = match both() {
            Ok(socket) => socket,
            // No IPv6 on this machine.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {
                let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?;
                socket.set_nonblocking(true)?;
                socket
            }
            Err(error) => return Err(error),
        };
        let on: libc::c_int = 1;
        // SAFETY: the option takes a C int, which outlives the call.
        let joined = unsafe {
            let size = mem::size_of_val(&on) as libc::socklen_t;
            libc::setsockopt(inner.as_raw_fd(), libc::SOL_UDP, UDP_GRO, ptr::from_ref(&on).cast(), size)
        };
        if joined < 0 {
            debug!(error = %io::Error::last_os_error(), "the kernel does not join received packets");
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
        Ok(Self { inner, segments: AtomicBool::new(true) })
    }

    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    /// Sends one packet at once or not at all.
    pub(crate) fn send(&self, bytes: &[u8], to: SocketAddr) -> io::Result<()> {
        let mut vector = [libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }];
        // SAFETY: the vector points to a slice that outlives the call and is only read.
        unsafe { send_message(self.inner.as_raw_fd(), &mut vector, None, to) }
    }

    /// Sends packets from the start of `packets` in one call, and says how many. Waits for nothing.
    pub(crate) fn send_run(&self, packets: &[Packet], to: SocketAddr) -> io::Result<usize> {
        let Some(first) = packets.first() else { return Ok(0) };
        let count = if self.segments.load(Ordering::Relaxed) { run_length(packets) } else { 1 };
        if count == 1 {
            return self.send(first, to).map(|()| 1);
        }
        let segment = u16::try_from(first.len()).map_err(|_| io::Error::from_raw_os_error(libc::EMSGSIZE))?;
        let mut vectors = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; MAX_SEGMENTS];
        for (vector, packet) in vectors.iter_mut().zip(&packets[..count]) {
            *vector = libc::iovec { iov_base: packet.as_ptr().cast_mut().cast(), iov_len: packet.len() };
        }
        // SAFETY: the vectors point to the packets, which outlive the call and are only read.
        let sent = unsafe { send_message(self.inner.as_raw_fd(), &mut vectors[..count], Some(segment), to) };
        match sent {
            // Too long for this way (Linux 6.13 and later say so): one by one, they are sent in fragments.
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => self.send(first, to).map(|()| 1),
            // What a device without checksum offload, or an old kernel, says.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::EOPNOTSUPP)) => {
                debug!(%error, "the network refuses segmentation; packets are sent one by one");
                self.segments.store(false, Ordering::Relaxed);
                self.send(first, to).map(|()| 1)
            }
            other => other.map(|()| count),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

/// How many packets from the start can go in one call: all as long as the first, and one shorter at the end.
fn run_length(packets: &[Packet]) -> usize {
    let Some(first) = packets.first() else { return 0 };
    let (segment, mut total, mut count) = (first.len(), 0, 0);
    for packet in packets.iter().take(MAX_SEGMENTS) {
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

/// Space for control messages, aligned like `cmsghdr`.
#[repr(C)]
union Control {
    header: mem::ManuallyDrop<[libc::cmsghdr; 1]>,
    bytes: [u8; 128],
}

/// # Safety
/// The vectors must point to memory that can be read during the call.
unsafe fn send_message(
    fd: libc::c_int,
    vectors: &mut [libc::iovec],
    segment: Option<u16>,
    to: SocketAddr,
) -> io::Result<()> {
    let mut control = Control { bytes: [0; 128] };
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
    message.msg_iovlen = vectors.len() as _;
    if let Some(segment) = segment {
        message.msg_control = ptr::from_mut(&mut control).cast();
        // SAFETY: `control` is larger than the space of one message with two bytes, and aligned for its header, so
        // the header and data pointers stay inside it.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(mem::size_of::<u16>() as u32) as _;
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_UDP;
            (*header).cmsg_type = UDP_SEGMENT;
            (*header).cmsg_len = libc::CMSG_LEN(mem::size_of::<u16>() as u32) as _;
            libc::CMSG_DATA(header).cast::<u16>().write_unaligned(segment);
        }
    }
    // SAFETY: name, vectors and control outlive the call; the kernel only reads what is behind the vectors.
    let sent = unsafe { libc::sendmsg(fd, &message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What one system call received.
pub(crate) struct Received {
    buffers: Vec<BytesMut>,
    count: usize,
    from: [Option<SocketAddr>; RECEIVED],
    /// Length of each packet but the last in the datagram.
    strides: [usize; RECEIVED],
}

impl Received {
    pub(crate) fn new() -> Self {
        Self {
            buffers: (0..RECEIVED).map(|_| BytesMut::with_capacity(DATAGRAM)).collect(),
            count: 0,
            from: [None; RECEIVED],
            strides: [0; RECEIVED],
        }
    }

    /// Takes what has arrived, without waiting, and says whether there may be more.
    pub(crate) fn receive(&mut self, socket: &Socket) -> io::Result<bool> {
        self.count = 0;
        for buffer in &mut self.buffers {
            buffer.clear();
            // Takes the old memory again unless somebody still holds a packet in it.
            buffer.reserve(DATAGRAM);
        }
        // SAFETY: all-zero bytes are a valid value of these plain C structures.
        let (mut names, mut vectors, mut messages): (
            [libc::sockaddr_storage; RECEIVED],
            [libc::iovec; RECEIVED],
            [libc::mmsghdr; RECEIVED],
        ) = unsafe { (mem::zeroed(), mem::zeroed(), mem::zeroed()) };
        let mut controls = [const { Control { bytes: [0; 128] } }; RECEIVED];
        for (index, buffer) in self.buffers.iter_mut().enumerate() {
            vectors[index] = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: DATAGRAM };
            let header = &mut messages[index].msg_hdr;
            header.msg_name = ptr::from_mut(&mut names[index]).cast();
            header.msg_namelen = mem::size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_iov = &mut vectors[index];
            header.msg_iovlen = 1;
            header.msg_control = ptr::from_mut(&mut controls[index]).cast();
            header.msg_controllen = mem::size_of::<Control>() as _;
        }
        // SAFETY: names, vectors, controls and the buffers behind the vectors outlive the call; each buffer has room for
        // `DATAGRAM` bytes.
        let count = unsafe {
            libc::recvmmsg(
                socket.inner.as_raw_fd(),
                messages.as_mut_ptr(),
                RECEIVED as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                ptr::null_mut(),
            )
        };
        if count < 0 {
            return Err(io::Error::last_os_error());
        }
        self.count = (count as usize).min(RECEIVED);
        for (index, message) in messages.iter().enumerate().take(self.count) {
            let length = (message.msg_len as usize).min(DATAGRAM);
            // SAFETY: the kernel has written this many bytes, which is at most the capacity.
            unsafe { self.buffers[index].set_len(length) };
            self.from[index] = address(&names[index]);
            self.strides[index] = stride(&message.msg_hdr).filter(|stride| *stride > 0).unwrap_or(length);
        }
        Ok(self.count == RECEIVED)
    }

    /// Each datagram with its sender and the length of the packets in it.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = (SocketAddr, BytesMut, usize)> + '_ {
        let count = mem::take(&mut self.count);
        let datagrams = self.buffers.iter_mut().take(count).zip(self.from).zip(self.strides);
        datagrams.filter_map(|((buffer, from), stride)| Some((from?, buffer.split(), stride)))
    }
}

fn address(name: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match libc::c_int::from(name.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says what the storage holds, and it is large and aligned enough for every address.
            let v4 = unsafe { &*ptr::from_ref(name).cast::<libc::sockaddr_in>() };
            Some(SocketAddr::from((v4.sin_addr.s_addr.to_ne_bytes(), u16::from_be(v4.sin_port))))
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let v6 = unsafe { &*ptr::from_ref(name).cast::<libc::sockaddr_in6>() };
            let (ip, port) = (Ipv6Addr::from(v6.sin6_addr.s6_addr), u16::from_be(v6.sin6_port));
            Some(match ip.to_ipv4_mapped() {
                Some(v4) => SocketAddr::from((v4, port)),
                None => SocketAddrV6::new(ip, port, 0, v6.sin6_scope_id).into(),
            })
        }
        _ => None,
    }
}

/// The length of the packets that the kernel joined.
fn stride(message: &libc::msghdr) -> Option<usize> {
    // SAFETY: the kernel filled the control space and set its length; the macros stay inside it.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_UDP && (*header).cmsg_type == UDP_GRO {
                return usize::try_from(libc::CMSG_DATA(header).cast::<libc::c_int>().read_unaligned()).ok();
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packets(lengths: &[usize]) -> Vec<Packet> {
        lengths.iter().map(|n| Packet::from_bytes(BytesMut::zeroed(*n))).collect()
    }

    #[test]
    fn a_run_ends_with_the_first_shorter_packet_and_before_a_longer_one() {
        assert_eq!(run_length(&packets(&[100, 100, 60, 60])), 3);
        assert_eq!(run_length(&packets(&[100, 100, 101])), 2);
        assert_eq!(run_length(&packets(&[1300; 80])), 50);
        assert_eq!(run_length(&packets(&[32; 80])), MAX_SEGMENTS);
        assert_eq!(run_length(&packets(&[100])), 1);
    }

    #[test]
    fn a_run_arrives_as_the_packets_it_was_made_of() {
        for ip in ["127.0.0.1", "::1"] {
            let (sender, receiver) = (Socket::bind(0).unwrap(), Socket::bind(0).unwrap());
            let to = SocketAddr::new(ip.parse().unwrap(), receiver.local_addr().unwrap().port());
            let lengths = [500, 500, 500, 7, 900];
            let run: Vec<Packet> = lengths
                .iter()
                .enumerate()
                .map(|(i, n)| Packet::from_bytes(BytesMut::from(&vec![i as u8; *n][..])))
                .collect();
            let mut rest = &run[..];
            while !rest.is_empty() {
                let sent = sender.send_run(rest, to).unwrap();
                rest = &rest[sent..];
            }
            let (mut received, mut got) = (Received::new(), Vec::new());
            while got.len() < lengths.len() {
                let waiting = rustix::event::PollFd::new(&receiver, rustix::event::PollFlags::IN);
                let seconds = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
                assert_eq!(rustix::event::poll(&mut [waiting], Some(&seconds)).unwrap(), 1, "nothing arrives");
                received.receive(&receiver).unwrap();
                for (from, mut datagram, stride) in received.drain() {
                    assert_eq!(from, SocketAddr::new(ip.parse().unwrap(), sender.local_addr().unwrap().port()));
                    while !datagram.is_empty() {
                        got.push(datagram.split_to(stride.min(datagram.len())));
                    }
                }
            }
            let shape: Vec<(usize, u8)> = got.iter().map(|packet| (packet.len(), packet[0])).collect();
            let sent: Vec<(usize, u8)> = lengths.iter().enumerate().map(|(i, n)| (*n, i as u8)).collect();
            assert_eq!(shape, sent);
        }
    }
}
