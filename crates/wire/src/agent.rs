//! What the manager says to the initramfs agent, over the virtio-serial port [`PORT`], in streams of [`crate::mux`].
//! One request and one answer a stream.

use std::fmt;

use clan_types::{ByteSize, Timestamp};
use serde::{Deserialize, Serialize};

/// Name of the virtio-serial port.
pub const PORT: &str = "clan.agent.0";
/// Word of the kernel's command line that tells the agent to keep a [`GATE`].
pub const TEMPLATE: &str = "clan.template";
/// In a guest that may become a template: a named pipe that the controller waits at before it makes any secret. Whoever
/// opens it for reading goes on once [`AgentRequest::Renew`] has made this guest differ from every other.
pub const GATE: &str = "/run/clan/gate";
/// Made by the controller when it waits at the [`GATE`].
pub const AT_GATE: &str = "/run/clan/at-gate";
/// Bytes of randomness that a guest is renewed with.
pub const ENTROPY: usize = 64;
/// Largest message.
pub const MAX_MESSAGE: usize = 64 << 10;

/// From the manager.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentRequest {
    /// Are you there?
    Ping,
    /// Sets the guest's wall clock.
    SetClock(Timestamp),
    /// Orderly power-off: stops the services, unmounts, ends QEMU.
    PowerOff,
    /// Power-off without asking the services, after syncing the disks.
    PowerOffNow,
    /// Takes off the disk what only one machine may have, if the controller waits at the [`GATE`]; fails if it does not.
    /// The guest may be saved then.
    Seal,
    /// Makes the guest one that differs from every other: sets its clock, stirs its random numbers. If it has a [`GATE`],
    /// ids are made anew, and the gate opens, once.
    Renew(Box<Renewal>),
    /// Writes everything to the disks.
    Sync,
    /// Has the file system on the data disk use all of the disk; fails if the disk does not have so much yet.
    GrowDisk(ByteSize),
}

/// What a guest cannot have by itself.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewal {
    /// The wall clock.
    pub now: Timestamp,
    /// Random bytes, [`ENTROPY`] of them; never used for anything else.
    pub entropy: Vec<u8>,
}

impl fmt::Debug for Renewal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Renewal").field("now", &self.now).finish_non_exhaustive()
    }
}

/// Answer to an [`AgentRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentResponse {
    /// Alive.
    Pong {
        /// Program version.
        version: String,
        /// Guest uptime, milliseconds.
        uptime_ms: u64,
        /// `/proc/sys/kernel/random/boot_id`.
        boot_id: String,
        /// What has gone wrong so far, one line each; empty when all is well.
        problems: Vec<String>,
    },
    /// Done, or under way.
    Done,
    /// It did not work.
    Failed(String),
}
