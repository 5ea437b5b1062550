//! Frames, and how to find them among bytes that may begin anywhere.

/// Version of the frames.
pub const PROTOCOL: u8 = 1;
/// Largest payload of a frame, bytes.
pub const MAX_PAYLOAD: usize = 32 << 10;

/// Bytes of a header.
pub(super) const HEADER: usize = 32;
/// Longest program version in a Hello.
pub(super) const MAX_TEXT: usize = 256;

const MAGIC: [u8; 4] = *b"\xC1mux";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Hello = 1,
    Open,
    Data,
    Credit,
    Fin,
    Reset,
    Ping,
    Pong,
}

impl Kind {
    pub(super) fn from_byte(byte: u8) -> Option<Self> {
        use Kind::{Credit, Data, Fin, Hello, Open, Ping, Pong, Reset};
        [Hello, Open, Data, Credit, Fin, Reset, Ping, Pong].into_iter().find(|kind| *kind as u8 == byte)
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub(super) version: u8,
    pub(super) kind: u8,
    pub(super) session: u64,
    pub(super) stream: u32,
    length: usize,
    payload_crc: u32,
}

pub(super) fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

pub(super) fn long(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

impl Header {
    /// `None` if the bytes are no header, or one that no one may send.
    fn parse(bytes: &[u8]) -> Option<Self> {
        if bytes.get(..4)? != MAGIC || crc32fast::hash(bytes.get(..28)?) != word(bytes, 28) {
            return None;
        }
        let length = usize::try_from(word(bytes, 20)).ok()?;
        let header = Self {
            version: bytes[4],
            kind: bytes[5],
            session: long(bytes, 8),
            stream: word(bytes, 16),
            length,
            payload_crc: word(bytes, 24),
        };
        // INVARIANT: no more than MAX_PAYLOAD bytes are ever awaited or kept.
        (length <= if header.is_hello() { 8 + MAX_TEXT } else { MAX_PAYLOAD }).then_some(header)
    }

    pub(super) fn is_hello(&self) -> bool {
        self.kind == Kind::Hello as u8
    }
}

pub(super) fn frame(kind: Kind, session: u64, stream: u32, payload: &[&[u8]]) -> Vec<u8> {
    let length: usize = payload.iter().map(|part| part.len()).sum();
    let mut bytes = Vec::with_capacity(HEADER + length);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&[PROTOCOL, kind as u8, 0, 0]);
    bytes.extend_from_slice(&session.to_le_bytes());
    bytes.extend_from_slice(&stream.to_le_bytes());
    bytes.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    let mut crc = crc32fast::Hasher::new();
    payload.iter().for_each(|part| crc.update(part));
    bytes.extend_from_slice(&crc.finalize().to_le_bytes());
    let crc = crc32fast::hash(&bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    payload.iter().for_each(|part| bytes.extend_from_slice(part));
    bytes
}

/// Finds frames among bytes that may begin anywhere.
#[derive(Debug, Default)]
pub(super) struct Parser {
    buffer: Vec<u8>,
    at: usize,
    /// Until this offset only a Hello counts: these bytes were announced as the payload of a frame that turned out to be
    /// cut, so what looks like frames in there may be anybody's data.
    suspect_until: usize,
    /// Bytes that belong to no frame were met.
    pub(super) lost_place: bool,
}

impl Parser {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.at);
        self.suspect_until = self.suspect_until.saturating_sub(self.at);
        self.at = 0;
        self.buffer.extend_from_slice(bytes);
    }

    pub(super) fn next(&mut self) -> Option<(Header, Vec<u8>)> {
        loop {
            let rest = &self.buffer[self.at..];
            let skip = rest.iter().position(|byte| *byte == MAGIC[0]).unwrap_or(rest.len());
            self.lost_place |= skip > 0;
            self.at += skip;
            let rest = &rest[skip..];
            if rest.len() < HEADER {
                return None;
            }
            let header = Header::parse(rest).filter(|header| self.at >= self.suspect_until || header.is_hello());
            let Some(header) = header else {
                self.lost_place = true;
                self.at += 1;
                continue;
            };
            let payload = rest.get(HEADER..HEADER + header.length)?;
            if crc32fast::hash(payload) != header.payload_crc {
                self.lost_place = true;
                self.suspect_until = self.suspect_until.max(self.at + HEADER + header.length);
                self.at += 1;
                continue;
            }
            let payload = payload.to_vec();
            self.at += HEADER + header.length;
            if header.is_hello() {
                self.suspect_until = 0;
            }
            return Some((header, payload));
        }
    }
}
