//! Packets that do not fit into one datagram of a QUIC connection, on ways that take small packets only: they travel in halves.
//!
//! ```text
//! 0   0xC2 (WireGuard's packets start with 1 to 4)
//! 1   number of the packet
//! 2   which half: 0 or 1
//! 3.. bytes
//! ```

use bytes::{BufMut, Bytes, BytesMut};

const MARK: u8 = 0xC2;
const HEADER: usize = 3;
/// INVARIANT: nothing longer is put together, whatever a peer sends.
const MAX_WHOLE: usize = 2048;

/// Numbers the packets that are split.
#[derive(Debug, Default)]
pub(crate) struct Splitter {
    number: u8,
}

impl Splitter {
    /// The halves of a packet, of at most `max` bytes each; `None` if even they do not fit.
    pub(crate) fn split(&mut self, packet: &Bytes, max: usize) -> Option<[Bytes; 2]> {
        let room = max.checked_sub(HEADER)?;
        if packet.len() > MAX_WHOLE || packet.len().div_ceil(2) > room {
            return None;
        }
        self.number = self.number.wrapping_add(1);
        let (first, second) = packet.split_at_checked(packet.len().div_ceil(2))?;
        Some([(0, first), (1, second)].map(|(which, bytes)| {
            let mut half = BytesMut::with_capacity(HEADER + bytes.len());
            half.put_slice(&[MARK, self.number, which]);
            half.put_slice(bytes);
            half.freeze()
        }))
    }
}

/// Puts halves together, one packet at a time: half a packet whose rest was lost gives way to the next.
#[derive(Debug, Default)]
pub(crate) struct Joiner {
    waiting: Option<(u8, u8, Bytes)>,
}

impl Joiner {
    /// A whole packet, once there is one.
    pub(crate) fn join(&mut self, datagram: Bytes) -> Option<Bytes> {
        let &[MARK, number, which @ 0..=1, ..] = datagram.as_ref() else { return Some(datagram) };
        let bytes = datagram.slice(HEADER..);
        match self.waiting.take() {
            Some((same, other, rest)) if same == number && other != which => {
                let (first, second) = if which == 0 { (bytes, rest) } else { (rest, bytes) };
                (first.len() + second.len() <= MAX_WHOLE).then(|| [first, second].concat().into())
            }
            _ => {
                self.waiting = Some((number, which, bytes));
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_lost_half_costs_its_packet_only() {
        let (mut splitter, mut joiner) = (Splitter::default(), Joiner::default());
        let packets = [1, 2, 4].map(|kind| Bytes::from(vec![kind; 1312]));
        let [one, two, three] = packets.each_ref().map(|packet| splitter.split(packet, 1162).unwrap());
        assert_eq!(joiner.join(one[0].clone()), None);
        assert_eq!(joiner.join(two[1].clone()), None);
        assert_eq!(joiner.join(two[0].clone()).as_ref(), Some(&packets[1]), "in any order");
        assert_eq!(joiner.join(three[0].clone()), None);
        assert_eq!(joiner.join(packets[0].clone()).as_ref(), Some(&packets[0]), "whole packets pass between");
        assert_eq!(joiner.join(three[1].clone()).as_ref(), Some(&packets[2]));
        assert_eq!(splitter.split(&packets[0], 600), None);
        assert_eq!(splitter.split(&packets[0], 2), None);
    }

    proptest! {
        #[test]
        fn what_was_split_fits_and_comes_out_again(packet in prop::collection::vec(any::<u8>(), 2..MAX_WHOLE), spare in 0usize..9) {
            let packet = Bytes::from(packet);
            let max = packet.len().div_ceil(2) + HEADER + spare;
            let halves = Splitter::default().split(&packet, max).unwrap();
            prop_assert!(halves.iter().all(|half| half.len() <= max));
            let mut joiner = Joiner::default();
            let whole: Vec<Bytes> = halves.into_iter().filter_map(|half| joiner.join(half)).collect();
            prop_assert_eq!(whole, [packet]);
        }

        #[test]
        fn anything_may_come(datagrams in prop::collection::vec(prop::collection::vec(prop_oneof![Just(MARK), any::<u8>()], 0..9), 0..9)) {
            let mut joiner = Joiner::default();
            for datagram in datagrams {
                let _ = joiner.join(datagram.into());
            }
        }
    }
}
