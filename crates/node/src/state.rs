//! The machine's place in its clan, on disk.

use std::{
    io,
    path::{Path, PathBuf},
};

use clan_types::{ClanId, ClanName, MachineName, PeerAddr, ServiceName};
use serde::{Deserialize, Serialize};

/// What a machine remembers of how it was provisioned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Place {
    /// The clan.
    pub clan: ClanId,
    /// What it is called: to go by while the ledger is lost.
    #[serde(default)]
    pub clan_name: Option<ClanName>,
    /// The machine's own name.
    pub name: MachineName,
    /// Services to run and to offer.
    pub offers: Vec<ServiceName>,
    /// Machines that could be reached at the time of joining: where to begin after a restart.
    pub peers: Vec<PeerAddr>,
}

/// Why the place cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file cannot be read or written, or is damaged.
    #[error(transparent)]
    Store(#[from] clan_store::StoreError),
    /// Another controller works with the same state.
    #[error("another controller uses {}", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// The folder's lock cannot be taken.
    #[error("cannot lock {}", path.display())]
    Lock {
        /// The lock.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What is to be forgotten cannot be removed.
    #[error("cannot remove {}", path.display())]
    Forget {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Files that make a machine the one it is in its clan; the place first, as without it the rest says nothing.
const TRACES: [&str; 8] = [
    "place.json",
    "helm.json",
    "ledger.redb",
    "machine.key",
    "wireguard.key",
    "relay.key",
    "ports.json",
    crate::recall::FILE,
];

/// Removes everything that a machine knows of its clan, and its keys with it.
pub(crate) fn forget(dir: &Path) -> Result<(), StateError> {
    for name in TRACES {
        let path = dir.join(name);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(StateError::Forget { path, source }),
            _ => {}
        }
    }
    Ok(())
}

impl Place {
    pub(crate) fn load(dir: &Path) -> Result<Option<Self>, StateError> {
        Ok(clan_store::read_versioned_json(&Self::path(dir))?)
    }

    pub(crate) fn save(&self, dir: &Path) -> Result<(), StateError> {
        Ok(clan_store::write_versioned_json(&Self::path(dir), self)?)
    }

    fn path(dir: &Path) -> PathBuf {
        dir.join("place.json")
    }
}
