//! From the packets of one TCP stream to one super-packet.

use bytes::{Buf, BytesMut};

use super::{
    NEEDS_CHECKSUM, Offload, TCP_V4, TCP_V6,
    checksum::{fold, pseudo_header, seal_ipv4, sum},
};

/// The most bytes in a super-packet, headers included.
const MAX_BYTES: usize = 65_535;
/// The most packets in one, well below what `writev` takes.
const MAX_PACKETS: usize = 64;
/// How many groups are looked at for a packet's stream, from the newest on.
const OPEN: usize = 8;
const ACK: u8 = 0x10;
const PSH: u8 = 0x08;

/// Packets that go to the kernel in one piece, or a single one.
#[derive(Debug, Default)]
pub struct Group {
    /// The first packet, then the payloads of those that follow it.
    parts: Vec<BytesMut>,
    headers: Headers,
    /// Bytes in all parts.
    total: usize,
    /// The sequence number that comes next.
    next: u32,
    /// Payload bytes of the first packet.
    segment: usize,
    open: bool,
}

/// Where the headers of a TCP packet are.
#[derive(Debug, Clone, Copy, Default)]
struct Headers {
    ip: usize,
    /// All headers together; 0: the packet is none that can be joined.
    all: usize,
}

impl Group {
    /// What to write in front, and the parts behind it.
    pub fn finish(&mut self) -> (Offload, &[BytesMut]) {
        if self.parts.len() < 2 {
            return (Offload::default(), &self.parts);
        }
        let (Headers { ip, all }, total) = (self.headers, self.total);
        let mut kind = TCP_V6;
        if let Some(first) = self.parts.first_mut() {
            if first[0] >> 4 == 4 {
                kind = TCP_V4;
                first[2..4].copy_from_slice(&(total as u16).to_be_bytes());
                seal_ipv4(&mut first[..ip]);
            } else {
                first[4..6].copy_from_slice(&((total - ip) as u16).to_be_bytes());
            }
            let partial = fold(pseudo_header(first, 6, total - ip));
            first[ip + 16..ip + 18].copy_from_slice(&partial.to_ne_bytes());
        }
        let offload = Offload {
            flags: NEEDS_CHECKSUM,
            kind,
            headers: all as u16,
            segment: self.segment as u16,
            checksum_start: ip as u16,
            checksum_offset: 16,
        };
        (offload, &self.parts)
    }

    /// Takes the next packet of the stream, or gives it back.
    fn append(&mut self, mut packet: BytesMut, headers: Headers) -> Result<(), BytesMut> {
        let Headers { ip, all } = headers;
        let parts = self.parts.len();
        let Some(first) = self.parts.first_mut() else { return Err(packet) };
        let payload = packet.len() - all;
        let flags = packet[ip + 13];
        let fits = self.open
            && all == self.headers.all
            && sequence(&packet, ip) == self.next
            && payload <= self.segment
            && self.total + payload <= MAX_BYTES
            && parts < MAX_PACKETS
            && same_but_for_lengths(first, &packet, headers);
        if !fits {
            return Err(packet);
        }
        if flags & PSH != 0 {
            first[ip + 13] |= PSH;
        }
        self.open = flags & PSH == 0 && payload == self.segment;
        self.total += payload;
        self.next = self.next.wrapping_add(payload as u32);
        packet.advance(all);
        self.parts.push(packet);
        Ok(())
    }
}

/// Collects packets and joins those that belong together. The order within each stream stays.
#[derive(Debug, Default)]
pub struct Joiner {
    groups: Vec<Group>,
    used: usize,
}

impl Joiner {
    /// Takes a packet, which must be complete and without padding.
    pub fn push(&mut self, packet: BytesMut) {
        let headers = joinable(&packet);
        let mut packet = packet;
        if let Some(headers) = headers {
            let from = self.used.saturating_sub(OPEN);
            for group in self.groups[from..self.used].iter_mut().rev() {
                if group.headers.all == 0 || !same_stream(&group.parts[0], &packet, group.headers.ip, headers.ip) {
                    continue;
                }
                match group.append(packet, headers) {
                    Ok(()) => return,
                    Err(back) => packet = back,
                }
                // INVARIANT: nothing of a stream goes into a group older than its newest one.
                group.open = false;
                break;
            }
        }
        self.begin(packet, headers.unwrap_or_default());
    }

    /// Gives out all groups, in order, and forgets them.
    pub fn drain(&mut self, mut write: impl FnMut(&mut Group)) {
        for group in &mut self.groups[..self.used] {
            write(group);
            group.parts.clear();
        }
        self.used = 0;
    }

    fn begin(&mut self, packet: BytesMut, headers: Headers) {
        if self.used == self.groups.len() {
            self.groups.push(Group::default());
        }
        let group = &mut self.groups[self.used];
        self.used += 1;
        let joinable = headers.all > 0;
        group.segment = packet.len() - headers.all;
        group.next = if joinable { sequence(&packet, headers.ip).wrapping_add(group.segment as u32) } else { 0 };
        group.open = joinable && packet[headers.ip + 13] & PSH == 0;
        group.total = packet.len();
        group.headers = headers;
        group.parts.push(packet);
    }
}

/// The headers of a packet that may be joined: plain TCP data with a right checksum.
fn joinable(packet: &[u8]) -> Option<Headers> {
    let ip = match packet.first()? {
        // No options, no fragments.
        0x45 if packet.len() > 40 && packet[9] == 6 && packet[6] & 0x3f == 0 && packet[7] == 0 => 20,
        byte if byte >> 4 == 6 && packet.len() > 60 && packet[6] == 6 => 40,
        _ => return None,
    };
    let all = ip + usize::from(packet[ip + 12] >> 4) * 4;
    let plain = packet[ip + 13] & !PSH == ACK && all >= ip + 20 && packet.len() > all;
    let right = || fold(sum(&packet[ip..]) + pseudo_header(packet, 6, packet.len() - ip)) == 0xffff;
    // INVARIANT: a wrong checksum stays what it is, since the kernel computes that of a super-packet anew.
    (plain && right() && (ip == 40 || fold(sum(&packet[..20])) == 0xffff)).then_some(Headers { ip, all })
}

fn sequence(packet: &[u8], ip: usize) -> u32 {
    u32::from_be_bytes([packet[ip + 4], packet[ip + 5], packet[ip + 6], packet[ip + 7]])
}

/// Same addresses and ports.
fn same_stream(a: &[u8], b: &[u8], a_ip: usize, b_ip: usize) -> bool {
    let addresses = if a_ip == 20 { 12..20 } else { 8..40 };
    a_ip == b_ip && a[addresses.clone()] == b[addresses] && a[a_ip..a_ip + 4] == b[b_ip..b_ip + 4]
}

/// Whether two packets of a stream differ in nothing that the kernel would have to keep apart.
fn same_but_for_lengths(a: &[u8], b: &[u8], headers: Headers) -> bool {
    let Headers { ip, all } = headers;
    let network = if ip == 20 {
        // Class, flags, hops.
        a[1] == b[1] && a[6] == b[6] && a[8] == b[8]
    } else {
        a[..4] == b[..4] && a[7] == b[7]
    };
    // Acknowledgement, length and reserved bits; window; the urgent pointer (which says nothing here) and options.
    network
        && a[ip + 8..ip + 13] == b[ip + 8..ip + 13]
        && a[ip + 14..ip + 16] == b[ip + 14..ip + 16]
        && a[ip + 18..all] == b[ip + 18..all]
}
