//! Debian's packages, unpacked: the first lab of a run downloads them, the others have them from it.

use std::{
    fs::{self, DirBuilder, DirEntry},
    io,
    os::unix::fs::{DirBuilderExt, chown},
    path::Path,
    process::Command,
    time::SystemTime,
};

use clan_lab::{Account, Person};

/// Where a person's manager keeps what it downloads, from their data folder.
const CACHE: &str = "cache";

/// Gives a person the newest packages that any lab of this account has.
pub(crate) fn share(person: &Person, account: &Account) -> io::Result<()> {
    let cache = person.data().join(CACHE);
    for folder in [person.data(), cache.clone()] {
        if !folder.is_dir() {
            DirBuilder::new().mode(0o700).create(&folder)?;
            chown(&folder, Some(account.uid), Some(account.gid))?;
        }
    }
    let state = account.state_root();
    let labs = entries(state.parent().unwrap_or(&state), "clan-lab");
    let roots = labs.flat_map(|lab| entries(&lab.path().join("founder/data").join(CACHE), "root-"));
    let Some(newest) = roots.max_by_key(|root| (made(root), root.path().starts_with(&cache))) else { return Ok(()) };
    let place = cache.join(newest.file_name());
    if place.exists() {
        return Ok(());
    }
    // Whole or not there.
    let half = cache.join(".half");
    if half.exists() {
        fs::remove_dir_all(&half)?;
    }
    let copied = Command::new("cp").args(["-a", "--reflink=auto"]).args([&newest.path(), &half]).status()?;
    if copied.success() { fs::rename(&half, &place) } else { Err(io::Error::other("cp failed")) }
}

fn entries(folder: &Path, prefix: &'static str) -> impl Iterator<Item = DirEntry> + use<> {
    let all = fs::read_dir(folder).into_iter().flatten().flatten();
    all.filter(move |entry| entry.file_name().to_string_lossy().starts_with(prefix))
}

fn made(folder: &DirEntry) -> SystemTime {
    folder.metadata().and_then(|found| found.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}
