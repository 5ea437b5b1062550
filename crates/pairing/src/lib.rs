//! How a newcomer who was told four words gets the invitation link from the machine that waits for them.
//!
//! The words' first is a public channel; the other three are a password of 33 bits. Both sides run SPAKE2
//! ([RFC 9382](https://www.rfc-editor.org/rfc/rfc9382) describes the protocol; the crate `spake2` predates it and
//! differs in its encodings) with the QUIC endpoint ids that the connection has proved as identities: whoever sits in between
//! is another endpoint and agrees on nothing. Then
//!
//! ```text
//! newcomer                                    machine
//!    │── Begin { channel, share } ──────────────▶│  Codes::begin
//!    │◀───────────────────────────── Share(..) ──│
//!    │── Confirm { tag } ───────────────────────▶│  Codes::confirm: a wrong tag makes the words void
//!    │◀── Link(sealed with the agreed key) ──────│  the words are used up
//! ```
//!
//! The newcomer confirms first, so that the machine tells nothing about the words to somebody who does not know them; the
//! seal is the machine's confirmation. Each side gives the other one guess in 2^33.
//!
//! Nothing here reads a clock, a socket or a random number: times, keys and seeds come in as arguments.

mod codes;
mod newcomer;
mod spake;

pub use codes::{Codes, ConversationId, LIFETIME, MAX_LINK, OpenError, Report};
pub use newcomer::{Agreed, Newcomer, PairingError};
