//! Locks on files.

use std::{
    fs::{File, TryLockError},
    io,
    path::Path,
};

/// A lock that ends with this value.
///
/// INVARIANT: it is let go of, and not only closed: a child between fork and exec has the file open too, and would hold the lock on
/// for a moment in which the next one is turned away.
#[derive(Debug)]
pub(crate) struct Held(File);

impl Held {
    /// Takes the lock on a file, which is created if needed; `None` if somebody has it.
    pub(crate) fn take(path: &Path) -> io::Result<Option<Self>> {
        Self::on(File::create(path)?)
    }

    /// The same on a file that is open already.
    pub(crate) fn on(file: File) -> io::Result<Option<Self>> {
        match file.try_lock() {
            Ok(()) => Ok(Some(Self(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Closing it lets go as well, only later.
        let _ = self.0.unlock();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_free_again_though_somebody_else_still_has_its_file_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = Held::take(&path).unwrap().unwrap();
        assert!(Held::take(&path).unwrap().is_none());
        // What a fork does.
        let inherited = held.0.try_clone().unwrap();
        drop(held);
        assert!(Held::take(&path).unwrap().is_some());
        drop(inherited);
    }
}
