//! What a ledger is kept on: a file, or a disk that a simulator makes fail.

use std::{
    fmt,
    fs::{self, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use redb::{Builder, Database, DatabaseError};

use crate::{
    StoreError,
    file::{keep_aside, sibling, sync_parent},
};

/// What one ledger is kept on.
pub trait Medium: fmt::Debug + Send + Sync {
    /// Its name, for errors.
    fn path(&self) -> &Path;

    /// Bytes of the ledger's file; `None` if there is none.
    fn length(&self) -> io::Result<Option<u64>>;

    /// Opens the file.
    fn open(&self, builder: &mut Builder) -> Result<Database, DatabaseError>;

    /// Begins a new file, which has no name yet: one that was cut short in the making is never taken for a damaged one.
    fn begin(&self, builder: &mut Builder) -> Result<Database, DatabaseError>;

    /// Names the file that was begun, unless there is a named one already, and forces the name to disk.
    fn finish(&self) -> Result<(), StoreError>;

    /// Removes what was begun and has no name.
    fn abandon(&self);

    /// Puts a damaged file out of the way; gives the error that reports it.
    fn keep_aside(&self, why: String) -> StoreError;
}

/// A file of the file system.
#[derive(Debug)]
pub(crate) struct FileMedium {
    path: PathBuf,
}

impl FileMedium {
    pub(crate) fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    fn unnamed(&self) -> PathBuf {
        sibling(&self.path, ".new")
    }
}

impl Medium for FileMedium {
    fn path(&self) -> &Path {
        &self.path
    }

    fn length(&self) -> io::Result<Option<u64>> {
        match fs::symlink_metadata(&self.path) {
            // A symbolic link's target counts.
            Ok(_) => fs::metadata(&self.path).map(|found| Some(found.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn open(&self, builder: &mut Builder) -> Result<Database, DatabaseError> {
        builder.open(&self.path)
    }

    fn begin(&self, builder: &mut Builder) -> Result<Database, DatabaseError> {
        let unnamed = self.unnamed();
        match fs::remove_file(&unnamed) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(redb::StorageError::Io(error).into()),
            _ => {}
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&unnamed);
        builder.create_file(file.map_err(redb::StorageError::Io)?)
    }

    fn finish(&self) -> Result<(), StoreError> {
        // A link, unlike a rename, never replaces a ledger that somebody else made meanwhile.
        match fs::hard_link(self.unnamed(), &self.path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(StoreError::io("create", &self.path)(error))
            }
            _ => sync_parent(&self.path),
        }
    }

    fn abandon(&self) {
        let _ = fs::remove_file(self.unnamed());
    }

    fn keep_aside(&self, why: String) -> StoreError {
        keep_aside(&self.path, why)
    }
}
