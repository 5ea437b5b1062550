//! Images between machines, over QUIC.
//!
//! A file travels in pieces ([`clan_wire::pieces`]), each asked for by itself: from every machine that has the image, as fast
//! as each gives them. A piece that arrived is checked before it is written, so whoever lies is known at once, and what is on
//! disk is right. Nothing else is kept: after a cut of any kind the pieces on disk are checked again.
//!
//! Not iroh-blobs, whose providers give from a store of their own: a guest has its image as read-only disks, two files on one
//! of them, and no room for a second copy; and because whoever asks must prove that they may.

mod fetch;
mod part;
mod pool;
mod serve;

pub use fetch::{Event, FetchError, NoManifest, Source, Taken, fetch, manifest};
pub use part::Wanted;
pub use serve::{Extent, Held, serve};
