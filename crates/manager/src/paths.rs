//! Where things are in a data directory.

use std::path::{Path, PathBuf};

use clan_types::ClanId;

/// The layout of a person's data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    root: PathBuf,
}

impl Paths {
    /// The layout under a directory.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the socket is.
    pub fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    /// The socket for the command line.
    pub fn socket(&self) -> PathBuf {
        self.run().join("manager.sock")
    }

    /// Held by the manager that owns this directory.
    pub fn lock(&self) -> PathBuf {
        self.run().join("manager.lock")
    }

    /// The token for TCP.
    pub fn token(&self) -> PathBuf {
        self.root.join("token")
    }

    /// The image store.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// What can be made again.
    pub fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// States of guests from which others go on.
    pub(crate) fn templates(&self) -> PathBuf {
        self.cache().join("templates")
    }

    /// Images, unpacked for containers.
    pub(crate) fn trees(&self) -> PathBuf {
        self.cache().join("trees")
    }

    /// Finished tasks.
    pub fn tasks(&self) -> PathBuf {
        self.root.join("tasks")
    }

    /// All clans.
    pub fn clans(&self) -> PathBuf {
        self.root.join("clans")
    }

    /// One clan.
    pub(crate) fn clan(&self, id: &ClanId) -> ClanPaths {
        ClanPaths { dir: self.clans().join(id.to_string()) }
    }
}

/// The layout of one clan's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClanPaths {
    pub(crate) dir: PathBuf,
}

impl ClanPaths {
    pub(crate) fn at(dir: PathBuf) -> Self {
        Self { dir }
    }

    pub(crate) fn record(&self) -> PathBuf {
        self.dir.join("clan.json")
    }

    /// The person's key in this clan.
    pub(crate) fn key(&self) -> PathBuf {
        self.dir.join("person.key")
    }

    /// What the person signed in this clan.
    pub(crate) fn log(&self) -> PathBuf {
        self.dir.join("person.log")
    }

    /// What is remembered of the clan's ledger.
    pub(crate) fn ledger(&self) -> PathBuf {
        self.dir.join("ledger.redb")
    }

    /// The link, while the clan is being joined.
    pub(crate) fn link(&self) -> PathBuf {
        self.dir.join("invite.link")
    }

    pub(crate) fn data_disk(&self) -> PathBuf {
        self.dir.join("data.ext4")
    }

    /// Everything that a container writes.
    pub(crate) fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub(crate) fn vm(&self) -> PathBuf {
        self.dir.join("vm")
    }

    pub(crate) fn console_log(&self) -> PathBuf {
        self.vm().join("console.log")
    }
}
