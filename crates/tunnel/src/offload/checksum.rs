//! The Internet checksum (RFC 1071), in the machine's own byte order: it does not matter to a one's complement sum.

/// A sum that is not folded yet.
#[inline]
pub(crate) fn sum(bytes: &[u8]) -> u64 {
    let mut chunks = bytes.chunks_exact(4);
    // Four bytes at a time cannot overflow 64 bits in any packet, and the compiler makes vector code of it.
    let mut total: u64 = chunks.by_ref().map(|c| u64::from(u32::from_ne_bytes([c[0], c[1], c[2], c[3]]))).sum();
    let mut last = [0; 4];
    let rest = chunks.remainder();
    last[..rest.len()].copy_from_slice(rest);
    total += u64::from(u32::from_ne_bytes(last));
    total
}

/// Folds a sum to 16 bits, not yet complemented.
#[inline]
pub(crate) fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The sum over the pseudo-header (RFC 768, 793, 8200) of a transport segment of `length` bytes behind the IP header
/// `ip`, which must be complete.
#[inline]
pub(crate) fn pseudo_header(ip: &[u8], protocol: u8, length: usize) -> u64 {
    let addresses = if ip[0] >> 4 == 4 { &ip[12..20] } else { &ip[8..40] };
    let length = u64::from(u16::from_ne_bytes((length as u16).to_be_bytes()));
    sum(addresses) + u64::from(u16::from_ne_bytes([0, protocol])) + length
}

/// Puts the checksum of an IPv4 header of these bytes into it.
#[inline]
pub(crate) fn seal_ipv4(header: &mut [u8]) {
    header[10..12].fill(0);
    let checksum = !fold(sum(header));
    header[10..12].copy_from_slice(&checksum.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_rfc_1071_is_right() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(sum(&bytes)).to_ne_bytes(), [0xdd, 0xf2]);
        assert_eq!(
            fold(sum(&bytes[..7])).to_ne_bytes(),
            fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0])).to_ne_bytes()
        );
    }
}
