//! File helpers that name the file in their errors.

use std::{fs, io, path::Path};

use clan_types::FileHash;

use crate::{BuildError, Step};

/// Names the action and the path in an I/O error; a full disk is an error of its own.
pub(crate) fn io_error(step: Step, action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BuildError {
    move |source| {
        if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            BuildError::DiskFull { step, tail: vec![format!("{}: no space left", path.display())] }
        } else {
            BuildError::Io { action, path: path.to_owned(), source }
        }
    }
}

/// The hash and size of a file.
pub(crate) fn hash_file(step: Step, path: &Path) -> Result<(FileHash, u64), BuildError> {
    let file = fs::File::open(path).map_err(io_error(step, "open", path))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file).map_err(io_error(step, "read", path))?;
    Ok((FileHash::from_bytes(*hasher.finalize().as_bytes()), hasher.count()))
}

/// Links a file to another place, or copies it where links do not reach.
pub(crate) fn link_or_copy(step: Step, from: &Path, to: &Path) -> Result<(), BuildError> {
    if fs::hard_link(from, to).is_err() {
        fs::copy(from, to).map_err(io_error(step, "write", to))?;
    }
    Ok(())
}

/// Free bytes for ordinary users, and the number of the file system, at a path.
pub(crate) fn free_space(path: &Path) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::statvfs(path)?;
    Ok((stat.f_bavail.saturating_mul(stat.f_frsize), stat.f_fsid))
}
