//! What a packet belongs to, read with bounds from whatever a peer has sent.

use std::net::IpAddr;

use crate::ip;

pub(super) const ICMP_V4: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMP_V6: u8 = 58;
/// INVARIANT: no more extension headers than this are followed.
const MAX_EXTENSIONS: usize = 8;

/// The two ends of a conversation, as one packet of it names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Flow {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) protocol: u8,
    /// Ports of TCP and UDP; of an echo its identifier, twice; otherwise 0.
    pub(super) source_port: u16,
    pub(super) destination_port: u16,
    pub(super) kind: Kind,
    /// Whether it may be the first packet of a conversation: of TCP, only the one that opens a connection.
    pub(super) begins: bool,
    /// Of TCP, whether it belongs to a connection that both ends know.
    pub(super) established: bool,
}

/// What kind of packet it is, as far as that matters to whether it may pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// TCP, UDP or a protocol without ports.
    Plain,
    /// Is anybody there?
    EchoRequest,
    /// Yes.
    EchoReply,
    /// An error about a packet, which is quoted from this byte on.
    Error(usize),
    /// The first piece of a packet, with this identification.
    FirstFragment(u32),
    /// A later piece: it has no ports.
    LaterFragment(u32),
}

/// Reads a packet; `None` if it is not complete, or none that a host should be sent.
pub(super) fn read(packet: &[u8]) -> Option<Flow> {
    let addresses = ip::addresses(packet)?;
    let mut fragment = None;
    let (protocol, at) = if packet[0] >> 4 == 4 {
        let header = usize::from(packet[0] & 0x0f) * 4;
        if header < 20 {
            return None;
        }
        let position = u16::from_be_bytes([packet[6], packet[7]]);
        let identification = u32::from(u16::from_be_bytes([packet[4], packet[5]]));
        if position & 0x3fff != 0 {
            fragment = Some((position & 0x1fff == 0, identification));
        }
        (packet[9], header)
    } else {
        let (mut protocol, mut at, mut followed) = (packet[6], 40, 0);
        loop {
            let length = match protocol {
                // Hop-by-hop, routing and destination options (RFC 8200).
                0 | 43 | 60 => (usize::from(*packet.get(at + 1)?) + 1) * 8,
                44 => {
                    let header = packet.get(at..at + 8)?;
                    let position = u16::from_be_bytes([header[2], header[3]]);
                    let identification = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                    if position & 0xfff9 != 0 {
                        fragment = Some((position & 0xfff8 == 0, identification));
                    }
                    8
                }
                _ => break,
            };
            followed += 1;
            if followed > MAX_EXTENSIONS {
                return None;
            }
            protocol = packet[at];
            at += length;
            if matches!(fragment, Some((false, _))) {
                break;
            }
        }
        (protocol, at)
    };
    let flow = |source_port, destination_port, kind| Flow {
        source: addresses.source,
        destination: addresses.destination,
        protocol,
        source_port,
        destination_port,
        kind,
        begins: true,
        established: false,
    };
    if let Some((false, identification)) = fragment {
        return Some(flow(0, 0, Kind::LaterFragment(identification)));
    }
    let plain = fragment.map_or(Kind::Plain, |(_, identification)| Kind::FirstFragment(identification));
    let pair = |at: usize| Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]));
    match protocol {
        TCP => {
            const SYN: u8 = 0x02;
            const ACK: u8 = 0x10;
            // An error quotes eight bytes at least, which end before the flags.
            let flags = packet.get(at + 13).copied().unwrap_or(0);
            let (begins, established) = (flags & (SYN | ACK) == SYN, flags & (SYN | ACK) == ACK);
            Some(Flow { begins, established, ..flow(pair(at)?, pair(at + 2)?, plain) })
        }
        UDP => Some(flow(pair(at)?, pair(at + 2)?, plain)),
        ICMP_V4 | ICMP_V6 => {
            let quoted = at + 8;
            let kind = match (protocol, *packet.get(at)?) {
                (ICMP_V4, 8) | (ICMP_V6, 128) => Kind::EchoRequest,
                (ICMP_V4, 0) | (ICMP_V6, 129) => Kind::EchoReply,
                (ICMP_V4, 3 | 11 | 12) | (ICMP_V6, 1..=4) => return Some(flow(0, 0, Kind::Error(quoted))),
                // Redirects, router advertisements and the like have no place in a tunnel.
                _ => return None,
            };
            let identifier = pair(at + 4)?;
            // A large echo comes in pieces like everything else.
            let kind = if fragment.is_some() { plain } else { kind };
            Some(flow(identifier, identifier, kind))
        }
        _ => Some(flow(0, 0, plain)),
    }
}
