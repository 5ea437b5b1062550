//! Connections between machines: ordered and whole while nothing is wrong, as QUIC streams are.

use std::collections::BTreeMap;

use clan_replica::LinkId;
use clan_wire::peer::PeerMessage;

/// Messages that may wait for a slow peer; more are dropped, as the controller does.
const QUEUE: usize = 64;

/// One connection. The end that dialled is the first.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) ends: [End; 2],
}

/// One end of it.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) node: usize,
    /// Which run of the node's controller.
    pub(crate) life: u64,
    /// The replica was told of it, and not of its end.
    pub(crate) linked: bool,
    pub(crate) open: bool,
    pub(crate) in_flight: usize,
    /// What was sent before arrives before.
    pub(crate) last_arrival: u64,
}

/// All connections, by number.
#[derive(Debug, Default)]
pub(crate) struct Network {
    pub(crate) connections: BTreeMap<u64, Connection>,
    count: u64,
    /// Which side of the partition each node is on; nodes on different sides do not hear each other.
    pub(crate) sides: Vec<u8>,
}

impl Network {
    pub(crate) fn reaches(&self, a: usize, b: usize) -> bool {
        let side = |node: usize| self.sides.get(node).copied().unwrap_or(0);
        side(a) == side(b)
    }

    pub(crate) fn connect(&mut self, dialler: (usize, u64), accepter: (usize, u64)) -> u64 {
        self.count += 1;
        let end = |(node, life)| End { node, life, linked: false, open: true, in_flight: 0, last_arrival: 0 };
        self.connections.insert(self.count, Connection { ends: [end(dialler), end(accepter)] });
        self.count
    }

    /// Takes a place in the queue from this end; `false` if there is none.
    pub(crate) fn takes(&mut self, number: u64, from: usize) -> bool {
        let Some(connection) = self.connections.get_mut(&number) else { return false };
        let end = &mut connection.ends[from];
        let takes = end.open && end.in_flight < QUEUE;
        end.in_flight += usize::from(takes);
        takes
    }
}

/// What a replica calls one end of a connection.
pub(crate) fn link_of(number: u64, end: usize) -> LinkId {
    LinkId(number * 2 + end as u64)
}

/// Which end of which connection a replica means.
pub(crate) fn end_of(link: LinkId) -> (u64, usize) {
    (link.0 / 2, usize::from(link.0 % 2 == 1))
}

/// Whether a message is the greeting, without which there is no conversation.
pub(crate) fn greets(message: &PeerMessage) -> bool {
    matches!(message, PeerMessage::Hello { .. })
}
