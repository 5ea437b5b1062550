//! The controller: one machine's part in a clan.
//!
//! ```text
//!  manager ─────channel─────▶ control ─┐                         ┌─▶ mesh (WireGuard, names)
//!  newcomers ──clan/join/1──▶ join ────┼──▶ Core (one task: ─────┼─▶ peers (clan/peer/1: ledger, beacons, packets)
//!  machines ──clan/peer/1───▶ peer ────┘     ledger, beacons)    └─▶ status, statistics
//!  newcomers ──clan/image/1─▶ image (reads the disks the machine booted from)
//!  newcomers ──clan/words/1─▶ words (gives an invitation link for four words)
//!  admins ─────clan/helm/1──▶ helm (who steers this machine: settings, terminals, what was done)
//! ```
//!
//! One task, [`core`], owns the ledger, the beacons and what is known of peers; everything else asks it. A machine that
//! has no place in a clan yet only answers its manager; [`control`] starts the rest once it was provisioned. What
//! differs between a clan's own VM and a computer that has other business too is decided in [`host`].

mod access;
mod control;
mod core;
mod gate;
mod halves;
mod helm;
mod host;
mod identity;
mod image;
mod join;
mod memory;
mod mesh;
mod net;
mod own;
mod peer;
mod ping;
mod places;
mod pulse;
mod recall;
mod relay;
mod report;
mod services;
mod sockets;
mod state;
mod stats;
mod status;
mod streams;
#[cfg(test)]
mod tests;
mod words;

use std::path::PathBuf;

use tokio_util::sync::CancellationToken;

pub use gate::pass_gate;
pub use host::{Computer, DEFAULT_PORT, Host, Names, forget};
pub use identity::IdentityError;
pub use state::StateError;

/// How a controller is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the machine keeps its keys, its ledger and its place in the clan; of a VM, on the data disk.
    pub state_dir: PathBuf,
    /// What it runs on.
    pub host: Host,
}

/// Why the controller stopped.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The machine's keys cannot be read or made.
    #[error("the machine's identity is not usable")]
    Identity(#[from] IdentityError),
    /// The machine's place in its clan cannot be read or written.
    #[error("the machine's state is not usable")]
    State(#[from] StateError),
    /// The ledger cannot be read or written.
    #[error("the clan's ledger is not usable")]
    Ledger(#[from] clan_store::StoreError),
    /// The port to the manager is missing.
    #[error("cannot open the port to the manager")]
    Port(#[source] std::io::Error),
    /// The socket for the manager is not to be had.
    #[error("cannot listen for the manager")]
    Socket(#[source] clan_os::channel::LocalError),
    /// A UDP port is not to be had.
    #[error("UDP port {port} is not free")]
    Udp {
        /// The port.
        port: u16,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The endpoint was lost while the controller ran, and with it all that others say.
    #[error("the controller lost its socket, and hears no other machine")]
    Deaf,
    /// The network could not be set up.
    #[error("cannot set up {what}")]
    Network {
        /// Which part.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl NodeError {
    fn network(what: &'static str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Network { what, source: source.into() }
    }
}

/// Runs the controller until it is told to stop (SIGTERM, SIGINT).
pub async fn run(options: Options) -> Result<(), NodeError> {
    let cancel = CancellationToken::new();
    let stop = cancel.clone();
    let signals = tokio::spawn(async move {
        wait_for_signal().await;
        stop.cancel();
    });
    let outcome = control::serve(options, cancel).await;
    signals.abort();
    outcome
}

async fn wait_for_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        tracing::error!("cannot listen for signals");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}
