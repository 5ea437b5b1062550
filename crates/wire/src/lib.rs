//! What machines, managers and guests say to each other: messages, their encoding and their size limits.
//!
//! Everything that arrives is hostile until decoded here: a length is checked before memory is taken for it, and names,
//! addresses and keys are checked as they are parsed. No I/O; the callers own the streams.

pub mod agent;
pub mod beacon;
pub mod codec;
pub mod control;
pub mod helm;
pub mod image;
pub mod mux;
pub mod order;
pub mod peer;
pub mod pieces;
pub mod words;
