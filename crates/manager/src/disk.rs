//! Files and directories of the data directory, beyond what [`clan_store`] does.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read},
    path::{Path, PathBuf},
};

pub(crate) use clan_store::{
    StoreError as DiskError, create_private_dir as create_dir, read_versioned_json as read_json,
    write_versioned_json as write_json,
};

/// Largest small file that is read whole.
const MAX_FILE: u64 = 64 << 10;

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DiskError {
    let path = path.to_owned();
    move |source| DiskError::Io { action, path, source }
}

/// A file that should be there is not.
pub(crate) fn missing(path: &Path) -> DiskError {
    failed("find", path)(ErrorKind::NotFound.into())
}

/// Reads a small file whole; `None` if it is not there.
pub(crate) fn read(path: &Path) -> Result<Option<Vec<u8>>, DiskError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("read", path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(failed("read", path))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(failed("read", path)(ErrorKind::FileTooLarge.into()));
    }
    Ok(Some(bytes))
}

/// Replaces a file that only its owner can read, durably.
pub(crate) fn write_secret(path: &Path, bytes: &[u8]) -> Result<(), DiskError> {
    clan_store::atomic_write(path, bytes, 0o600)
}

/// Removes a directory and what is in it, if it is there.
pub(crate) fn remove_dir(path: &Path) -> Result<(), DiskError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Removes a file, if it is there.
pub(crate) fn remove_file(path: &Path) -> Result<(), DiskError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Moves a directory, durably.
pub(crate) fn rename_dir(from: &Path, to: &Path) -> Result<(), DiskError> {
    let sync = |path: &Path| File::open(path).and_then(|d| d.sync_all());
    sync(from)
        .and_then(|()| fs::rename(from, to))
        .and_then(|()| sync(to.parent().unwrap_or(Path::new("."))))
        .map_err(failed("write", to))
}

/// Removes the drafts of files that were being replaced when a manager was killed. Nobody may be writing there.
pub(crate) fn sweep(dir: &Path) {
    for path in list(dir).into_iter().filter(|path| path.is_file() && is_draft(path)) {
        // What cannot be removed now is tried again.
        let _ = fs::remove_file(path);
    }
}

/// By what [`clan_store`] and [`clan_vm`] call theirs: another file's name, `.new`, and a process's number.
fn is_draft(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    name.rsplit_once(".new").is_some_and(|(of, number)| {
        !of.is_empty()
            && number.contains(|c: char| c.is_ascii_digit())
            && number.chars().all(|c| c.is_ascii_digit() || c == '-')
    })
}

/// What is in a directory, by name; nothing if it is not there.
pub(crate) fn list(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
    paths.sort();
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drafts_are_told_from_what_counts() {
        let draft = |name: &str| is_draft(Path::new(name));
        for name in ["clan.json.new-4711-0", "person.log.new-1-22", "data.ext4.new4711", "data.ext4.restoring.new1"] {
            assert!(draft(name), "{name}");
        }
        for name in [
            "clan.json",
            "data.ext4",
            "data.ext4.new",
            "data.ext4.newer",
            ".new-12",
            "ledger.redb.corrupt-17",
            "person.key.new-",
        ] {
            assert!(!draft(name), "{name}");
        }
    }

    #[test]
    fn sweeping_takes_drafts_only_and_no_directories() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["clan.json", "clan.json.new-1-0", "data.ext4.new1"] {
            fs::write(dir.path().join(name), name).unwrap();
        }
        fs::create_dir(dir.path().join("data.new-1")).unwrap();
        sweep(dir.path());
        let left: Vec<_> = list(dir.path()).iter().map(|p| p.file_name().unwrap().to_owned()).collect();
        assert_eq!(left, ["clan.json", "data.new-1"]);
        sweep(&dir.path().join("nothing"));
    }
}
