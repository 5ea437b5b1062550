//! What somebody on the way between two machines sees.

use clan_lab::{FOUNDER_ADDRESS, LabError, SECOND_ADDRESS};

use crate::Checked;

/// Smallest part of the page that is looked for: shorter ones occur by chance.
const PART: usize = 12;

/// No packet holds a part of the page, though the page crossed in packets of the tunnel.
pub(crate) fn is_sealed(capture: Option<Result<Vec<u8>, LabError>>, page: &str) -> Checked {
    let capture = capture.ok_or_else(|| LabError::Promise("nothing was captured".into()))??;
    let packets = packets(&capture).ok_or_else(|| LabError::Promise("the capture is no pcap file".into()))?;
    // WireGuard's own, or those of the QUIC connection that carries them.
    let between = packets.iter().filter(|packet| crosses(packet)).count();
    if between < 20 {
        let all = packets.len();
        return Err(LabError::Promise(format!(
            "only {between} of {all} packets went between the two: this proves nothing"
        )));
    }
    let parts: Vec<&str> =
        page.lines().map(str::trim).filter(|line| line.len() >= PART && line.contains("founder")).collect();
    if parts.is_empty() {
        return Err(LabError::Promise("the page has no line that names the founder: this proves nothing".into()));
    }
    match parts.iter().find(|part| packets.iter().any(|packet| contains(packet, part.as_bytes()))) {
        Some(part) => Err(LabError::Promise(format!("`{part}` crossed the internet in plain text"))),
        None => Ok(()),
    }
}

/// The packets of a little-endian pcap file of Ethernet frames.
fn packets(file: &[u8]) -> Option<Vec<&[u8]>> {
    let (header, mut rest) = file.split_at_checked(24)?;
    matches!(header[..4], [0xd4, 0xc3, 0xb2, 0xa1] | [0x4d, 0x3c, 0xb2, 0xa1]).then_some(())?;
    let mut packets = Vec::new();
    while let Some((header, after)) = rest.split_at_checked(16) {
        let length = u32::from_le_bytes(header[8..12].try_into().ok()?) as usize;
        // The last one may be cut.
        let Some((packet, after)) = after.split_at_checked(length) else { break };
        packets.push(packet);
        rest = after;
    }
    Some(packets)
}

/// UDP over IPv4, from one person's computer to the other's.
fn crosses(frame: &[u8]) -> bool {
    let Some(ip) = frame.get(14..34) else { return false };
    let ends = [FOUNDER_ADDRESS.octets(), SECOND_ADDRESS.octets()];
    frame[12..14] == [0x08, 0x00]
        && ip[9] == 17
        && ip[12..16] != ip[16..20]
        && [&ip[12..16], &ip[16..20]].iter().all(|end| ends.iter().any(|known| known == end))
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn plain_text_would_be_found() {
    let frame = |payload: &[u8]| {
        let ends = [FOUNDER_ADDRESS.octets(), SECOND_ADDRESS.octets()].concat();
        let mut frame = [&[0; 12][..], &[8, 0, 0x45], &[0; 8], &[17], &[0; 2], &ends, &[0; 8], payload].concat();
        let length = u32::try_from(frame.len()).unwrap().to_le_bytes();
        frame.splice(0..0, [&[0; 8][..], &length, &length].concat());
        frame
    };
    let page = "<html>\n<p>This page is served by founder.</p>\n</html>";
    let header = [&[0xd4, 0xc3, 0xb2, 0xa1][..], &[0; 20]].concat();
    let capture = |last: &[u8]| [header.clone(), frame(b"sealed").repeat(20), frame(last)].concat();
    assert!(is_sealed(Some(Ok(capture(b"noise"))), page).is_ok());
    assert!(is_sealed(Some(Ok(capture(page.as_bytes()))), page).is_err());
    assert!(is_sealed(Some(Ok(header.clone())), page).is_err(), "an empty capture proves nothing");
}
