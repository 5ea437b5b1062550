//! From one super-packet to the packets that it stands for.

use bytes::{BufMut, BytesMut};

use super::{
    ECN, NEEDS_CHECKSUM, Offload, TCP_V4, TCP_V6, UDP,
    checksum::{fold, pseudo_header, seal_ipv4, sum},
};

const TCP: u8 = 6;
const UDP_PROTOCOL: u8 = 17;
const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

/// A packet whose headers do not fit what is said about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// Appends the packets that `packet` stands for to `out`, one behind the other, and their lengths to `lengths`.
///
/// Each packet is padded with zeros to a multiple of 16 bytes, but not beyond `mtu`, as WireGuard wants it (section 5.4.6
/// of its paper). `packet` is changed.
pub fn split(
    packet: &mut [u8],
    offload: &Offload,
    mtu: usize,
    out: &mut BytesMut,
    lengths: &mut Vec<usize>,
) -> Result<(), Malformed> {
    let kind = offload.kind & !ECN;
    let start = usize::from(offload.checksum_start);
    if kind == 0 {
        if offload.flags & NEEDS_CHECKSUM != 0 {
            finish_checksum(packet, start, usize::from(offload.checksum_offset))?;
        }
        out.extend_from_slice(packet);
        lengths.push(pad(out, packet.len(), mtu));
        return Ok(());
    }
    let v4 = match packet.first().map(|byte| byte >> 4) {
        Some(4) => true,
        Some(6) => false,
        _ => return Err(Malformed),
    };
    let tcp = match kind {
        TCP_V4 if v4 => true,
        TCP_V6 if !v4 => true,
        UDP => false,
        _ => return Err(Malformed),
    };
    // INVARIANT: everything below stays inside these bounds.
    let least_ip = if v4 { 20 } else { 40 };
    let transport = if tcp {
        let offset = packet.get(start + 12).ok_or(Malformed)?;
        usize::from(offset >> 4) * 4
    } else {
        8
    };
    let (headers, segment) = (start + transport, usize::from(offload.segment));
    if start < least_ip || transport < if tcp { 20 } else { 8 } || segment == 0 || headers > packet.len() {
        return Err(Malformed);
    }
    let (header, payload) = packet.split_at(headers);
    let count = payload.len().div_ceil(segment).max(1);
    if payload.is_empty() || headers + segment > usize::from(u16::MAX) {
        return Err(Malformed);
    }
    let sequence = if tcp {
        u32::from_be_bytes([header[start + 4], header[start + 5], header[start + 6], header[start + 7]])
    } else {
        0
    };
    let identification = u16::from_be_bytes([header[4], header[5]]);
    out.reserve(payload.len() + count * (headers + 16));
    for (index, part) in payload.chunks(segment).enumerate() {
        let (at, length) = (out.len(), headers + part.len());
        out.extend_from_slice(header);
        out.extend_from_slice(part);
        let made = &mut out[at..];
        if v4 {
            made[2..4].copy_from_slice(&(length as u16).to_be_bytes());
            made[4..6].copy_from_slice(&identification.wrapping_add(index as u16).to_be_bytes());
            seal_ipv4(&mut made[..start]);
        } else {
            made[4..6].copy_from_slice(&((length - 40) as u16).to_be_bytes());
        }
        let (protocol, checksum) = if tcp {
            let own = sequence.wrapping_add((index * segment) as u32);
            made[start + 4..start + 8].copy_from_slice(&own.to_be_bytes());
            if index + 1 < count {
                made[start + 13] &= !FIN_PSH;
            }
            if index > 0 {
                made[start + 13] &= !CWR;
            }
            (TCP, start + 16)
        } else {
            made[start + 4..start + 6].copy_from_slice(&((8 + part.len()) as u16).to_be_bytes());
            (UDP_PROTOCOL, start + 6)
        };
        made[checksum..checksum + 2].fill(0);
        let total = sum(&made[start..]) + pseudo_header(made, protocol, length - start);
        made[checksum..checksum + 2].copy_from_slice(&complement(total, !tcp).to_ne_bytes());
        lengths.push(pad(out, length, mtu));
    }
    Ok(())
}

/// Completes a checksum that holds the pseudo-header's sum already.
fn finish_checksum(packet: &mut [u8], start: usize, offset: usize) -> Result<(), Malformed> {
    let at = start + offset;
    if at + 2 > packet.len() {
        return Err(Malformed);
    }
    let checksum = complement(sum(&packet[start..]), true);
    packet[at..at + 2].copy_from_slice(&checksum.to_ne_bytes());
    Ok(())
}

/// 0 means "none" in UDP (RFC 768); its other form is as good everywhere.
fn complement(sum: u64, never_zero: bool) -> u16 {
    match !fold(sum) {
        0 if never_zero => 0xffff,
        checksum => checksum,
    }
}

/// Pads what was appended last, and returns its length.
fn pad(out: &mut BytesMut, length: usize, mtu: usize) -> usize {
    let padded = length.next_multiple_of(16).min(mtu).max(length);
    out.put_bytes(0, padded - length);
    padded
}
