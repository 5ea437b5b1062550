//! A DNS message (RFC 1035, section 4), read with bounds from whatever somebody has sent.

use std::ops::Range;

/// INVARIANT: no name is longer (RFC 1035, section 2.3.4).
const MAX_NAME: usize = 255;
const HEADER: usize = 12;
/// INVARIANT: no more questions and records than these are looked at.
const MAX_ITEMS: usize = 256;

pub(super) const A: u16 = 1;
pub(super) const CNAME: u16 = 5;
pub(super) const PTR: u16 = 12;
pub(super) const HINFO: u16 = 13;
pub(super) const TXT: u16 = 16;
pub(super) const AAAA: u16 = 28;
pub(super) const SRV: u16 = 33;
pub(super) const OPT: u16 = 41;
pub(super) const NSEC: u16 = 47;

/// A name as it is on the wire, without compression and without the root's empty label; lower case.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Name(Vec<u8>);

impl std::fmt::Debug for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.labels().try_for_each(|label| write!(f, "{}.", label.escape_ascii()))
    }
}

impl Name {
    /// Its labels, the most special one first.
    pub(super) fn labels(&self) -> impl DoubleEndedIterator<Item = &[u8]> + Clone {
        let mut labels = Vec::new();
        let mut rest = self.0.as_slice();
        while let Some((length, behind)) = rest.split_first() {
            let (label, next) = behind.split_at(usize::from(*length).min(behind.len()));
            labels.push(label);
            rest = next;
        }
        labels.into_iter()
    }

    /// Whether it is below, or is, the name with these labels.
    pub(super) fn is_in(&self, zone: &[&str]) -> bool {
        let mut labels = self.labels().rev();
        zone.iter().rev().all(|label| labels.next() == Some(label.as_bytes()))
    }

    fn read(bytes: &[u8], mut at: usize) -> Option<(Self, usize)> {
        let mut name = Vec::new();
        let mut end = None;
        // INVARIANT: every pointer leads further to the front, so this comes to an end.
        let mut before = at;
        loop {
            let length = *bytes.get(at)?;
            match length >> 6 {
                0 if length == 0 => return Some((Self(name), end.unwrap_or(at + 1))),
                0 => {
                    let next = at + 1 + usize::from(length);
                    let label = bytes.get(at..next)?;
                    if name.len() + label.len() >= MAX_NAME {
                        return None;
                    }
                    name.push(length);
                    name.extend(label[1..].iter().map(u8::to_ascii_lowercase));
                    at = next;
                }
                3 => {
                    let to = usize::from(length & 0x3f) << 8 | usize::from(*bytes.get(at + 1)?);
                    if to >= before {
                        return None;
                    }
                    end = end.or(Some(at + 2));
                    (at, before) = (to, to);
                }
                _ => return None,
            }
        }
    }
}

#[derive(Debug)]
pub(super) struct Question {
    pub(super) name: Name,
    /// Whether it wants to be answered alone (RFC 6762, section 5.4).
    pub(super) alone: bool,
}

/// Which part of the message a record is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Section {
    Answers,
    Authority,
    Additional,
}

#[derive(Debug)]
pub(super) struct Record {
    pub(super) section: Section,
    pub(super) name: Name,
    pub(super) kind: u16,
    /// Where its data are.
    pub(super) data: Range<usize>,
    /// The name in its data, of the kinds that have one which matters.
    pub(super) target: Option<Name>,
}

#[derive(Debug)]
pub(super) struct Message {
    /// Answers, rather than asks.
    pub(super) response: bool,
    pub(super) questions: Vec<Question>,
    pub(super) records: Vec<Record>,
}

/// Reads a whole message; `None` if it is none, says more than it holds, or is of another kind than questions and answers.
pub(super) fn read(bytes: &[u8]) -> Option<Message> {
    let pair = |at: usize| Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
    let flags = pair(2)?;
    // Section 18 of RFC 6762: other operations, and errors, are to be ignored.
    if flags & 0x780f != 0 {
        return None;
    }
    let counts = [pair(4)?, pair(6)?, pair(8)?, pair(10)?].map(usize::from);
    if counts.iter().sum::<usize>() > MAX_ITEMS {
        return None;
    }
    let mut message = Message { response: flags & 0x8000 != 0, questions: Vec::new(), records: Vec::new() };
    let mut at = HEADER;
    for _ in 0..counts[0] {
        let (name, next) = Name::read(bytes, at)?;
        message.questions.push(Question { name, alone: pair(next + 2)? & 0x8000 != 0 });
        at = next + 4;
    }
    let sections = [Section::Answers, Section::Authority, Section::Additional];
    for (section, count) in sections.into_iter().zip(&counts[1..]) {
        for _ in 0..*count {
            let (name, next) = Name::read(bytes, at)?;
            let kind = pair(next)?;
            let data = next + 10..next + 10 + usize::from(pair(next + 8)?);
            at = data.end;
            if at > bytes.len() {
                return None;
            }
            let target = match kind {
                CNAME | PTR => Some(data.start),
                SRV => Some(data.start + 6),
                _ => None,
            };
            let target = match target {
                Some(from) => {
                    let (target, end) = Name::read(bytes, from)?;
                    if end != data.end {
                        return None;
                    }
                    Some(target)
                }
                None => None,
            };
            message.records.push(Record { section, name, kind, data, target });
        }
    }
    (at == bytes.len()).then_some(message)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Writes a message, with names as text.
    pub(crate) struct Writer(Vec<u8>);

    impl Writer {
        pub(crate) fn query() -> Self {
            Self(vec![0; HEADER])
        }

        pub(crate) fn response() -> Self {
            let mut bytes = vec![0; HEADER];
            bytes[2] = 0x84;
            Self(bytes)
        }

        fn name(text: &str) -> Vec<u8> {
            let labels = text.split('.').filter(|label| !label.is_empty());
            let mut name: Vec<u8> =
                labels.flat_map(|label| [&[label.len() as u8], label.as_bytes()].concat()).collect();
            name.push(0);
            name
        }

        pub(crate) fn ask(mut self, name: &str, kind: u16, alone: bool) -> Self {
            self.0[5] += 1;
            self.0.extend(Self::name(name));
            self.0.extend(kind.to_be_bytes());
            self.0.extend([if alone { 0x80 } else { 0 }, 1]);
            self
        }

        /// `section`: 0 answers, 1 authority, 2 additional.
        pub(crate) fn record(mut self, section: usize, name: &str, kind: u16, data: &[u8]) -> Self {
            self.0[7 + 2 * section] += 1;
            self.0.extend(Self::name(name));
            self.0.extend(kind.to_be_bytes());
            self.0.extend([0x80, 1, 0, 0, 0, 120]);
            self.0.extend((data.len() as u16).to_be_bytes());
            self.0.extend(data);
            self
        }

        pub(crate) fn answer(self, name: &str, kind: u16, data: &[u8]) -> Self {
            self.record(0, name, kind, data)
        }

        pub(crate) fn pointer(self, name: &str, target: &str) -> Self {
            self.answer(name, PTR, &Self::name(target))
        }

        pub(crate) fn service(self, name: &str, port: u16, target: &str) -> Self {
            let data = [&[0, 0, 0, 0], port.to_be_bytes().as_slice(), &Self::name(target)].concat();
            self.answer(name, SRV, &data)
        }

        pub(crate) fn bytes(self) -> Vec<u8> {
            self.0
        }
    }

    proptest! {
        #[test]
        fn anything_is_read_within_bounds(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Some(message) = read(&bytes) {
                prop_assert!(message.questions.len() + message.records.len() <= MAX_ITEMS);
                prop_assert!(message.records.iter().all(|record| record.data.end <= bytes.len()));
            }
        }

        #[test]
        fn a_damaged_message_is_read_within_bounds(at in 0usize..100, byte: u8, cut in 0usize..100) {
            let mut bytes = Writer::response()
                .pointer("_http._tcp.local", "page._http._tcp.local")
                .service("page._http._tcp.local", 80, "ann.local")
                .answer("ann.local", A, &[100, 64, 0, 1])
                .bytes();
            let at = at % bytes.len();
            bytes[at] = byte;
            let _ = read(&bytes);
            bytes.truncate(bytes.len() - cut % bytes.len());
            let _ = read(&bytes);
        }
    }

    #[test]
    fn names_are_followed_to_the_front_only() {
        let mut bytes = Writer::response().answer("ann.local", A, &[100, 64, 0, 1]).bytes();
        // A second record whose name is the first one's: `bob` and a pointer to `local`.
        bytes[7] += 1;
        bytes.extend([3, b'B', b'o', b'b', 0xc0, 16, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4, 1, 2, 3, 4]);
        let message = read(&bytes).unwrap();
        assert_eq!(format!("{:?}", message.records[1].name), "bob.local.");
        assert!(message.records[1].name.is_in(&["local"]) && !message.records[1].name.is_in(&["ann", "local"]));
        let pointer = bytes.len() - 15;
        for to in [pointer as u8 - 1, pointer as u8 - 4, 255] {
            bytes[pointer] = to;
            assert!(read(&bytes).is_none(), "a loop, or a way to the back: {to}");
        }
    }

    #[test]
    fn a_message_says_what_it_holds_and_no_more() {
        let whole = Writer::response().service("page._http._tcp.local", 80, "ann.local").bytes();
        assert!(read(&whole).unwrap().response);
        for length in 0..whole.len() {
            assert!(read(&whole[..length]).is_none(), "{length}");
        }
        assert!(read(&[whole.clone(), vec![0]].concat()).is_none());
        for (at, value) in [(2, 0x8c), (3, 3), (4, 1), (6, 2)] {
            let mut other = whole.clone();
            other[at] = value;
            assert!(read(&other).is_none(), "{at}");
        }
        let long = Writer::response().answer(&"a23456789.".repeat(26), TXT, b"").bytes();
        assert!(read(&long).is_none());
    }
}
