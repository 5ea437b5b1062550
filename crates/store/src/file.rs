//! Atomic files and private directories.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{Damage, StoreError};

/// Replaces a file's content as one step: readers, and a power cut, see the old content or the new. On disk on return.
/// `mode` is the permission bits of the file, whatever the umask. On an error the old content is still there.
pub fn atomic_write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), StoreError> {
    let temporary = write_temporary(path, bytes, mode)?;
    fs::rename(&temporary, path).map_err(|error| {
        let _ = fs::remove_file(&temporary);
        StoreError::io("replace", path)(error)
    })?;
    sync_parent(path)
}

/// Creates a directory, and those above it that are missing, for its owner only (0700). One that exists is made so.
pub fn create_private_dir(path: &Path) -> Result<(), StoreError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(StoreError::io("create the directory", path))?;
    let mode = fs::metadata(path).map_err(StoreError::io("read", path))?.permissions().mode();
    if mode & 0o077 != 0 {
        fs::set_permissions(path, Permissions::from_mode(0o700)).map_err(StoreError::io("make private", path))?;
    }
    Ok(())
}

/// Writes a new file beside `path` and forces it to disk.
pub(crate) fn write_temporary(path: &Path, bytes: &[u8], mode: u32) -> Result<PathBuf, StoreError> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let temporary = sibling(path, &format!(".new-{}-{count}", std::process::id()));
    let write = || -> io::Result<()> {
        // A process with the same id that was killed in the middle may have left one.
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode & 0o700).open(&temporary)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&temporary);
        StoreError::io("write", path)(error)
    })?;
    Ok(temporary)
}

/// Forces a file's name to disk.
pub(crate) fn sync_parent(path: &Path) -> Result<(), StoreError> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(StoreError::io("write the directory", parent))
}

/// Renames a damaged file out of the way; gives the error that reports it.
pub(crate) fn keep_aside(path: &Path, why: impl Into<String>) -> StoreError {
    let millis = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis());
    // Two damaged files within a millisecond must not replace one another.
    let free = (millis..millis.saturating_add(1000)).map(|millis| sibling(path, &format!(".corrupt-{millis}")));
    let Some(kept) = free.into_iter().find(|kept| fs::symlink_metadata(kept).is_err()) else {
        return StoreError::io("keep aside the damaged file", path)(io::ErrorKind::AlreadyExists.into());
    };
    match fs::rename(path, &kept).map_err(StoreError::io("keep aside the damaged file", path)) {
        Ok(()) => {
            let _ = sync_parent(path);
            StoreError::Corrupt { path: path.to_owned(), kept, why: Damage(why.into()) }
        }
        Err(error) => error,
    }
}

/// The path with something added to the file name.
pub(crate) fn sibling(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path.as_os_str());
    name.push(suffix);
    name.into()
}
