//! The machine's place in its clan, on disk.

use std::path::{Path, PathBuf};

use clan_types::{ClanId, MachineName, PeerAddr, ServiceName};
use serde::{Deserialize, Serialize};

/// What a machine remembers of how it was provisioned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Place {
    /// The clan.
    pub clan: ClanId,
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
