//! How the machines of a clan come to know the same: one machine's ledger, beacons and links, without I/O.
//!
//! A [`Replica`] is told what happened (`handle_*`, with the time) and says what is to be done ([`Replica::poll_action`]).
//! The controller drives it with QUIC connections and a file; the simulator drives the same code with a network and
//! disks of its own, in virtual time.
//!
//! ```text
//!  entries, beacons, links, dials that ended ──▶ ┌─────────┐ ──▶ send, close, dial
//!  requests of newcomers and of the manager  ──▶ │ Replica │ ──▶ answers
//!  "it is on disk"                           ──▶ └─────────┘ ──▶ put this on disk
//! ```
//!
//! # Durable before acknowledged
//!
//! Entries that change the ledger go out as [`Action::Persist`]. Until the caller has said [`Replica::handle_persisted`],
//! nothing else happens: no answer, no message, no new state; what is handled meanwhile waits its turn.
//! [`Replica::handle_not_persisted`] takes the entries back out of memory.
//!
//! # Learning
//!
//! A machine whose ledger was lost (a damaged file is kept aside and a new one begun) does not know who belongs to its
//! clan. Entries prove themselves, and the clan's id is the hash of its founding entry: so it listens to whoever
//! connects, and dials where it was told to, until it has the same as one of them. Until then it signs nothing, because
//! its own log may have been longer.
//!
//! The same is asked of a machine whose disk was put back to an earlier state, which others must tell it
//! ([`Replica::handle_remembered`]), and, for a short time, of every machine that starts: see [`Config::doubt`].

mod beacons;
mod dial;
mod newcomer;
mod recent;
mod replica;
mod rng;
#[cfg(test)]
mod tests;

use std::time::Duration;

use clan_ledger::Entry;
use clan_types::{MachineId, PeerAddr, Timestamp};
use clan_wire::peer::{JoinRefusal, PeerMessage};

pub use beacons::Own;
pub use newcomer::{belongs, check_invite, decode_newcomer};
pub use replica::{Config, Replica};

/// A moment, by both clocks that the caller has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Since any fixed moment; never runs backwards, does not stop.
    pub at: Duration,
    /// The wall clock, which may be wrong and may jump.
    pub wall: Timestamp,
}

/// A connection to another machine. The caller numbers them and uses no number twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub u64);

/// A question that is answered by [`Action::Answer`]. The caller numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// Names one [`Action::Persist`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteId(pub(crate) u64);

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Put these on disk, all or none, then say so: [`Replica::handle_persisted`], [`Replica::handle_not_persisted`].
    Persist {
        /// Which write this is.
        write: WriteId,
        /// What to write.
        entries: Vec<Entry>,
    },
    /// Send to the machine at the other end. It may be dropped if the peer is slow.
    Send {
        /// Where.
        link: LinkId,
        /// What.
        message: PeerMessage,
    },
    /// Close a connection. It is no longer a link; [`Replica::handle_unlinked`] may follow and does nothing.
    Close {
        /// Which.
        link: LinkId,
        /// Why.
        why: Close,
    },
    /// Try to connect, at these addresses or by what else is known of the machine, then say
    /// [`Replica::handle_dial_ended`]: after a failure at once, otherwise when the connection has ended.
    Dial(PeerAddr),
    /// A question is answered.
    Answer {
        /// Which.
        ticket: Ticket,
        /// How.
        answer: Answer,
    },
    /// What readers see has changed.
    Changed,
    /// A machine sent entries, or a beacon, of which one does not count. Worth a line in the log.
    Refused {
        /// The machine.
        from: MachineId,
        /// Why.
        why: Rejected,
    },
}

/// How a question is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The entries are in the ledger and on disk; or why one of them is not. The others are all the same.
    Inserted(Result<(), Rejected>),
    /// The newcomer is in, and may have the ledger: [`Replica::page`]. Or why not.
    Redeemed(Result<(), JoinRefusal>),
}

/// Why an entry is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// It is no entry.
    #[error("an entry is malformed or not rightly signed")]
    Entry(#[from] clan_ledger::EntryError),
    /// It does not fit the ledger.
    #[error("an entry does not fit the ledger")]
    Insert(#[from] clan_ledger::InsertError),
    /// It could not be put on disk.
    #[error("the ledger cannot be written")]
    NotPersisted,
}

/// Why a connection is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Close {
    /// A newer one to the same machine took its place.
    Replaced,
    /// The machine is not in the clan, as far as is known here.
    Unknown,
    /// The machine was put out, or left.
    NotInGoodStanding,
    /// The other end is in another clan, or does not greet.
    ForeignClan,
}

impl Close {
    /// Code and text for the other end.
    pub const fn reason(self) -> (u32, &'static str) {
        match self {
            Self::Replaced => (1, "replaced"),
            Self::Unknown => (2, "unknown machine"),
            Self::ForeignClan => (2, "another clan"),
            Self::NotInGoodStanding => (3, "not in good standing"),
        }
    }
}
