//! Why a file cannot be read or written.

use std::{
    io,
    path::{Path, PathBuf},
};

use clan_types::ClanId;

/// Why a file cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system refused; see [`StoreError::kind`] for what it says.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried: a verb, and words up to the path.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The content cannot be read. The file was renamed, so that the next start begins with a new one.
    #[error("{} is damaged; it was kept as {}", path.display(), kept.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where it is now.
        kept: PathBuf,
        /// What is wrong with it.
        #[source]
        why: Damage,
    },
    /// A secret that cannot be read. It was left in place.
    #[error("the secret file {} is damaged", path.display())]
    DamagedSecret {
        /// The file.
        path: PathBuf,
    },
    /// Other users of the computer can read a secret, or own it.
    #[error("other users can read the secret file {} (mode {mode:03o})", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file is from a newer program. It was left in place.
    #[error("{} was written by a newer version of Clan (file version {found})", path.display())]
    NewerVersion {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
    /// A ledger of another clan.
    #[error("{} holds the ledger of another clan ({found})", path.display())]
    ForeignClan {
        /// The file.
        path: PathBuf,
        /// Whose ledger it holds.
        found: ClanId,
    },
    /// Another process, or another part of this one, has the file open.
    #[error("{} is in use by another process", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// No randomness for a new secret.
    #[error("the operating system gives no randomness for {}", path.display())]
    NoRandomness {
        /// The secret file.
        path: PathBuf,
    },
}

/// What is wrong with a file's content; one sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Damage(pub(crate) String);

impl Damage {
    /// From one sentence.
    pub fn new(why: impl Into<String>) -> Self {
        Self(why.into())
    }
}

impl StoreError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// What the operating system said, for a remedy: [`io::ErrorKind::StorageFull`], for example.
    pub fn kind(&self) -> Option<io::ErrorKind> {
        match self {
            Self::Io { source, .. } => Some(source.kind()),
            _ => None,
        }
    }

    /// The file or directory that it is about.
    pub fn path(&self) -> &Path {
        match self {
            Self::Io { path, .. }
            | Self::Corrupt { path, .. }
            | Self::DamagedSecret { path }
            | Self::Exposed { path, .. }
            | Self::NewerVersion { path, .. }
            | Self::ForeignClan { path, .. }
            | Self::InUse { path }
            | Self::NoRandomness { path } => path,
        }
    }
}
