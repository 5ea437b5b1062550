//! Which path a packet to a peer takes: straight over UDP, or inside the QUIC connection that always works.
//!
//! [`Paths`] is a pure state machine. It sends small authenticated probes to every address at which a peer may be
//! reachable; an address counts as direct path once a probe sent to it was answered, and stops counting when answers
//! stay out for [`LOST_AFTER`]. The caller moves the bytes, reads the clock and asks [`Paths::path`] before it sends.
//!
//! Time is a [`std::time::Duration`] since any fixed moment, and must not run backwards.

pub mod filter;
pub mod ip;
pub mod multicast;
pub mod offload;
mod paths;
mod peer;
mod probe;
mod rng;

pub use paths::{MAX_OBSERVED, Paths, Transmit};
pub use peer::{LOST_AFTER, MAX_CANDIDATES, PathChange, PathChoice};
pub use probe::{PROBE_LEN, ProbeKey, is_probe};
