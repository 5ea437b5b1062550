//! Super-packets and the packets that they stand for, against a builder that knows nothing of either.

#![allow(clippy::unwrap_used)] // Helpers of tests.

use bytes::BytesMut;
use clan_tunnel::offload::{HEADER_LEN, Joiner, Offload, split};
use proptest::prelude::*;

const MTU: usize = 1280;

/// The Internet checksum, as simply as it can be written.
fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let words = bytes.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[derive(Debug, Clone)]
struct Stream {
    v4: bool,
    tcp: bool,
    port: u16,
    sequence: u32,
    options: Vec<u8>,
    flags: u8,
}

impl Stream {
    fn ip_len(&self) -> usize {
        if self.v4 { 20 } else { 40 }
    }

    fn headers(&self) -> usize {
        self.ip_len() + if self.tcp { 20 + self.options.len() } else { 8 }
    }

    /// One packet of the stream with `payload`, which starts `offset` bytes into it.
    fn packet(&self, number: u16, offset: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut transport = Vec::new();
        transport.extend(self.port.to_be_bytes());
        transport.extend(5201u16.to_be_bytes());
        if self.tcp {
            transport.extend(self.sequence.wrapping_add(offset).to_be_bytes());
            transport.extend(77u32.to_be_bytes());
            transport.extend([((20 + self.options.len()) as u8 / 4) << 4, flags, 1, 2, 0, 0, 0, 0]);
            transport.extend(&self.options);
        } else {
            transport.extend((8 + payload.len() as u16).to_be_bytes());
            transport.extend([0, 0]);
        }
        transport.extend(payload);
        let length = transport.len() as u16;
        let protocol = if self.tcp { 6 } else { 17 };
        let mut ip = Vec::new();
        if self.v4 {
            ip.extend([0x45, 0]);
            ip.extend((20 + length).to_be_bytes());
            ip.extend(number.to_be_bytes());
            ip.extend([0x40, 0, 64, protocol, 0, 0, 100, 64, 0, 1, 100, 64, 0, 2]);
            let sum = checksum(&[&ip]);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
        } else {
            ip.extend([0x60, 1, 2, 3]);
            ip.extend(length.to_be_bytes());
            ip.extend([protocol, 64]);
            ip.extend([0xfd; 16]);
            ip.extend([0xfe; 16]);
        }
        let addresses = if self.v4 { &ip[12..20] } else { &ip[8..40] };
        let pseudo = [addresses, &[0, protocol], &length.to_be_bytes()].concat();
        let at = if self.tcp { 16 } else { 6 };
        let mut sum = checksum(&[&pseudo, &transport]);
        if sum == 0 && !self.tcp {
            sum = 0xffff;
        }
        transport[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        ip.extend(transport);
        ip
    }

    /// The packets of `payload` in pieces of `segment`, with the flags on the last.
    fn packets(&self, segment: usize, payload: &[u8]) -> Vec<Vec<u8>> {
        let count = payload.len().div_ceil(segment);
        let pieces = payload.chunks(segment).enumerate();
        let flags = |index| if index + 1 == count { self.flags } else { self.flags & !0x09 };
        pieces.map(|(i, piece)| self.packet(i as u16, (i * segment) as u32, flags(i), piece)).collect()
    }

    /// What the kernel hands over for all of it.
    fn super_packet(&self, segment: usize, payload: &[u8]) -> (Offload, Vec<u8>) {
        let mut packet = self.packet(0, 0, self.flags, payload);
        let (ip, at) = (self.ip_len(), if self.tcp { 16 } else { 6 });
        // Length and checksum of the headers are not to be relied on; the kernel leaves them half done.
        packet[ip + at..ip + at + 2].copy_from_slice(&[0xaa, 0xbb]);
        let kind = match (self.tcp, self.v4) {
            (true, true) => 1,
            (true, false) => 4,
            (false, _) => 5,
        };
        let mut header = [0; HEADER_LEN];
        (header[0], header[1]) = (1, kind);
        header[2..4].copy_from_slice(&(self.headers() as u16).to_ne_bytes());
        header[4..6].copy_from_slice(&(segment as u16).to_ne_bytes());
        header[6..8].copy_from_slice(&(ip as u16).to_ne_bytes());
        header[8..10].copy_from_slice(&(at as u16).to_ne_bytes());
        (Offload::decode(&header), packet)
    }
}

fn stream() -> impl Strategy<Value = Stream> {
    let options = prop::sample::select(vec![vec![], vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]]);
    (any::<bool>(), any::<bool>(), any::<u16>(), any::<u32>(), options, prop::sample::select(vec![0x10, 0x18]))
        .prop_map(|(v4, tcp, port, sequence, options, flags)| Stream { v4, tcp, port, sequence, options, flags })
}

/// The packets that come out, without padding.
fn split_all(offload: &Offload, packet: &[u8]) -> Vec<Vec<u8>> {
    let (mut out, mut lengths) = (BytesMut::new(), Vec::new());
    split(&mut packet.to_vec(), offload, MTU, &mut out, &mut lengths).unwrap();
    assert_eq!(out.len(), lengths.iter().sum::<usize>());
    lengths
        .into_iter()
        .map(|length| {
            let padded = out.split_to(length);
            let own = if padded[0] >> 4 == 4 {
                u16::from_be_bytes([padded[2], padded[3]]) as usize
            } else {
                40 + u16::from_be_bytes([padded[4], padded[5]]) as usize
            };
            assert!(length == own.next_multiple_of(16).min(MTU).max(own), "{own} bytes padded to {length}");
            assert!(padded[own..].iter().all(|byte| *byte == 0));
            padded[..own].to_vec()
        })
        .collect()
}

fn joined(packets: &[Vec<u8>]) -> Vec<(Offload, Vec<u8>)> {
    let mut joiner = Joiner::default();
    packets.iter().for_each(|packet| joiner.push(BytesMut::from(&packet[..])));
    let mut groups = Vec::new();
    joiner.drain(|group| {
        let (offload, parts) = group.finish();
        groups.push((offload, parts.concat()));
    });
    joiner.drain(|_| panic!("drained before"));
    groups
}

proptest! {
    #[test]
    fn a_super_packet_becomes_the_packets_it_stands_for(
        stream in stream(), segment in 1usize..1200, payload in prop::collection::vec(any::<u8>(), 1..20_000)
    ) {
        // A packet must fit the device.
        let segment = segment.min(MTU - stream.headers()).max(payload.len().div_ceil(200));
        let (offload, packet) = stream.super_packet(segment, &payload);
        prop_assert_eq!(split_all(&offload, &packet), stream.packets(segment, &payload));
    }

    #[test]
    fn joined_packets_are_the_same_when_split_again(
        streams in prop::collection::vec((stream(), 1usize..1200, prop::collection::vec(any::<u8>(), 1..8_000)), 1..4),
        order in prop::collection::vec(any::<prop::sample::Index>(), 0..200),
    ) {
        // Several streams, each in its own order but mixed.
        let mut queues: Vec<_> = streams
            .iter()
            .enumerate()
            .map(|(i, (stream, segment, payload))| {
                let stream = Stream { port: i as u16, ..stream.clone() };
                stream.packets((*segment).max(payload.len().div_ceil(150)), payload).into_iter()
            })
            .collect();
        let mut packets = Vec::new();
        for index in order {
            let at = index.index(queues.len());
            packets.extend(queues[at].next());
        }
        packets.extend(queues.into_iter().flatten());
        let groups = joined(&packets);
        let mut back: Vec<Vec<u8>> = groups.iter().flat_map(|(offload, packet)| split_all(offload, packet)).collect();
        // The identification of IPv4 is counted anew in each group, and means nothing in packets that are not split.
        let forget = |packet: &mut Vec<u8>| if packet[0] >> 4 == 4 {
            packet[4..6].fill(0);
            packet[10..12].fill(0);
        };
        back.iter_mut().for_each(forget);
        packets.iter_mut().for_each(forget);
        for port in 0..4u16 {
            let of = |all: &[Vec<u8>]| -> Vec<Vec<u8>> {
                let ip = |p: &[u8]| if p[0] >> 4 == 4 { 20 } else { 40 };
                all.iter().filter(|p| p[ip(p)..ip(p) + 2] == port.to_be_bytes()).cloned().collect()
            };
            prop_assert_eq!(of(&back), of(&packets));
        }
    }

    #[test]
    fn anything_is_split_and_joined_within_bounds(
        header: [u8; HEADER_LEN], mut packet in prop::collection::vec(any::<u8>(), 0..300), version in 0u8..3
    ) {
        if let (Some(first), true) = (packet.first_mut(), version > 0) {
            *first = if version == 1 { 0x45 } else { 0x60 };
        }
        let (mut out, mut lengths) = (BytesMut::new(), Vec::new());
        let _ = split(&mut packet.clone(), &Offload::decode(&header), MTU, &mut out, &mut lengths);
        prop_assert_eq!(out.len(), lengths.iter().sum::<usize>());
        let groups = joined(&[packet.clone(), packet.clone(), packet.clone()]);
        prop_assert_eq!(groups.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() >= packet.len(), true);
    }
}

#[test]
fn a_stream_in_order_becomes_one_piece() {
    for v4 in [true, false] {
        let stream = Stream { v4, tcp: true, port: 1, sequence: u32::MAX - 5000, options: vec![], flags: 0x18 };
        let payload = vec![7; 40_000];
        let groups = joined(&stream.packets(1000, &payload));
        assert_eq!(groups.len(), 1);
        assert_eq!(groups[0].1.len(), stream.headers() + payload.len());
        assert_ne!(groups[0].0, Offload::default());
    }
}

#[test]
fn a_wrong_checksum_is_not_made_right() {
    let stream = Stream { v4: false, tcp: true, port: 1, sequence: 1, options: vec![], flags: 0x10 };
    let mut packets = stream.packets(1000, &[7; 3000]);
    packets[1][100] ^= 1;
    let groups = joined(&packets);
    assert_eq!(groups.iter().map(|(_, bytes)| bytes.clone()).collect::<Vec<_>>(), packets);
}
