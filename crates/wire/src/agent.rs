//! What the manager says to the initramfs agent, over the virtio-serial port [`PORT`], in streams of [`crate::mux`].
//! One request and one answer a stream.

use clan_types::Timestamp;
use serde::{Deserialize, Serialize};

/// Name of the virtio-serial port.
pub const PORT: &str = "clan.agent.0";
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
