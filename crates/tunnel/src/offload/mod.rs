//! Super-packets: what the kernel hands over, and takes, in place of many packets of one stream.
//!
//! [`split`] makes packets of what a TUN device with offload gives; [`Joiner`] does the reverse. Both leave what an
//! application sees unchanged: every packet that is made, or taken apart again by the kernel, has the headers and
//! checksums that it would have had without.

pub(crate) mod checksum;
mod join;
mod split;

pub use join::{Group, Joiner};
pub use split::{Malformed, split};

/// The length of [`Offload`] in front of each packet, in bytes.
pub const HEADER_LEN: usize = 10;

const NEEDS_CHECKSUM: u8 = 1;
const TCP_V4: u8 = 1;
const TCP_V6: u8 = 4;
const UDP: u8 = 5;
/// Congestion bits in the first packet's TCP header.
const ECN: u8 = 0x80;

/// What is left to do with a packet: `struct virtio_net_hdr`, little endian on the machines that we run on.
///
/// ```text
/// 0     flags: 1 = the checksum from 6..8 on, to be put at 8..10 behind that, is not computed yet
/// 1     0 one packet, 1 TCP over IPv4, 4 TCP over IPv6, 5 UDP; plus 0x80 if TCP's congestion bits are in use
/// 2..4  length of all headers: a hint
/// 4..6  bytes of payload in each packet but the last
/// 6..8, 8..10  see above
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offload {
    flags: u8,
    kind: u8,
    headers: u16,
    segment: u16,
    checksum_start: u16,
    checksum_offset: u16,
}

impl Offload {
    /// Reads it from the bytes in front of a packet.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        let pair = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            kind: bytes[1],
            headers: pair(2),
            segment: pair(4),
            checksum_start: pair(6),
            checksum_offset: pair(8),
        }
    }

    /// The bytes to put in front of a packet.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = self.flags;
        bytes[1] = self.kind;
        bytes[2..4].copy_from_slice(&self.headers.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.segment.to_ne_bytes());
        bytes[6..8].copy_from_slice(&self.checksum_start.to_ne_bytes());
        bytes[8..10].copy_from_slice(&self.checksum_offset.to_ne_bytes());
        bytes
    }
}
