//! The frames between host and guest, in both directions.

use std::time::{Duration, Instant};

use clan_wire::mux::{Event, MAX_STREAMS, Mux, Role, StreamId, WINDOW};

use crate::clan;

const SESSION: u64 = 5;

/// Bytes on the virtio-serial port: as they come, or as frames with rightful checksums, to either side.
pub fn mux(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else { return };
    let role = if first & 1 == 0 { Role::Host } else { Role::Guest };
    // The time of the test's beginning is no input: only differences count.
    let start = Instant::now();
    let mut mux = Mux::new(role, SESSION, "1", start);
    let mut open: Vec<StreamId> = Vec::new();
    let mut held = 0;
    turn(&mut mux, &mut open, &mut held, false);
    if first & 2 == 0 {
        mux.handle_bytes(&frame(1, SESSION, 0, &[&7u64.to_le_bytes()[..], b"2"].concat()));
    }
    let mut now = start;
    for part in clan::parts(rest) {
        let Some((kind, rest)) = part.split_first() else { continue };
        match kind {
            0xff => mux.handle_bytes(rest),
            0xfe => open.extend(mux.open()),
            0xfd => open.iter().for_each(|id| _ = mux.send(*id, rest)),
            0xfc => open.drain(..).for_each(|id| mux.release(id)),
            0xfb => open.iter().for_each(|id| mux.fin(*id)),
            kind => {
                let (stream, payload) = rest.split_first().unwrap_or((&0, &[]));
                mux.handle_bytes(&frame(kind % 16, SESSION + u64::from(kind >> 6), u32::from(*stream), payload));
            }
        }
        now += Duration::from_millis(100);
        mux.handle_timeout(now);
        turn(&mut mux, &mut open, &mut held, kind % 2 == 0);
    }
    assert!(held <= 2 * MAX_STREAMS * WINDOW, "what nobody reads takes bounded memory");
}

/// Takes what comes out.
fn turn(mux: &mut Mux, open: &mut Vec<StreamId>, held: &mut usize, read: bool) {
    let mut count = 0;
    while let Some(event) = mux.poll_event() {
        count += 1;
        assert!(count < 100_000, "there is an end to what happens");
        match event {
            Event::Opened(id) => open.push(id),
            Event::Data(id, bytes) if read => mux.consumed(id, bytes.len()),
            Event::Data(_, bytes) => *held += bytes.len(),
            Event::Restarted => {
                open.clear();
                *held = 0;
            }
            _ => {}
        }
    }
    let mut count = 0;
    while mux.poll_transmit().is_some() {
        count += 1;
        assert!(count < 100_000, "there is an end to what is sent");
    }
}

/// A frame as `clan_wire::mux` makes it.
fn frame(kind: u8, session: u64, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"\xC1mux".to_vec();
    bytes.extend_from_slice(&[1, kind, 0, 0]);
    bytes.extend_from_slice(&session.to_le_bytes());
    bytes.extend_from_slice(&stream.to_le_bytes());
    bytes.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(payload).to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_that_are_made_here_are_understood() {
        let mut mux = Mux::new(Role::Host, SESSION, "1", Instant::now());
        mux.handle_bytes(&frame(1, SESSION, 0, &[&7u64.to_le_bytes()[..], b"2"].concat()));
        assert_eq!(mux.poll_event(), Some(Event::Started { peer_version: "2".into() }));
        mux.handle_bytes(&frame(2, SESSION, 2, &[]));
        assert!(matches!(mux.poll_event(), Some(Event::Opened(_))));
    }
}
