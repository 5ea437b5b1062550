//! The resolver configuration file (`resolv.conf`), changed and put back.
//!
//! Our file starts with [`MARKER`]. What was there before is kept beside it in `<name>.before-clan`; whoever finds the
//! marker after a crash knows that the backup is the real file.

use std::{
    fs,
    io::{self, Write},
    net::{IpAddr, UdpSocket},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use tracing::debug;

/// The first line of a file that was written here.
pub const MARKER: &str = "# Written by clan; the previous content is kept in a file beside this one.";
/// The first line of a backup that says that there was no file.
const ABSENT: &str = "# clan: there was no file here";
/// A resolver configuration longer than this is not kept as a backup but refused.
const MAX_FILE: u64 = 1 << 20;
/// What resolvers accept.
const MAX_SEARCH: usize = 6;

/// Why the resolver configuration could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum ResolvError {
    /// Reading or writing failed.
    #[error("cannot {action} `{path}`")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another controller, which runs, has written it.
    #[error("`{path}` leads to the name server of another clan, {nameserver}")]
    Taken {
        /// The file.
        path: PathBuf,
        /// Where it leads.
        nameserver: IpAddr,
    },
    /// The file cannot be a resolver configuration.
    #[error("`{path}` is too large to be a resolver configuration")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
}

/// The resolver configuration file.
pub struct ResolvConf;

/// Puts the previous resolver configuration back, on [`Undo::undo`] or when dropped.
#[must_use]
pub struct Undo {
    path: PathBuf,
    done: bool,
}

impl ResolvConf {
    /// Writes `path` (normally `/etc/resolv.conf`) with one name server and search domains; the previous content is
    /// kept beside it, also across a crash. A symbolic link at `path` is replaced and put back as the file it led to. A file
    /// that leads to the name server of another controller, which answers, is left alone.
    pub fn install(path: &Path, nameserver: IpAddr, search: &[String]) -> Result<Undo, ResolvError> {
        // INVARIANT: our own file never becomes the backup.
        if is_ours(path)? {
            // One that a killed controller left leads nowhere: nobody holds its address.
            let other = nameservers(&read(path)?.unwrap_or_default()).into_iter().find(|known| *known != nameserver);
            if let Some(other) = other.filter(|other| is_held(*other)) {
                return Err(ResolvError::Taken { path: path.to_owned(), nameserver: other });
            }
        } else {
            let backup = match read(path)? {
                Some(content) => content,
                None => format!("{ABSENT}\n").into_bytes(),
            };
            write_atomically(&backup_path(path), &backup)?;
        }
        let mut text = format!("{MARKER}\nnameserver {nameserver}\n");
        // INVARIANT: a search domain cannot add lines.
        let search: Vec<&str> = search.iter().map(String::as_str).filter(|s| is_domain(s)).take(MAX_SEARCH).collect();
        if !search.is_empty() {
            text.push_str(&format!("search {}\n", search.join(" ")));
        }
        text.push_str("options edns0 timeout:3\n");
        write_atomically(path, text.as_bytes())?;
        debug!(path = %path.display(), %nameserver, "resolver configuration installed");
        Ok(Undo { path: path.to_owned(), done: false })
    }

    /// Puts back what a crashed predecessor left; true if there was something to put back. A file that somebody else
    /// has written since stays. `install` copes without this.
    pub fn recover(path: &Path) -> Result<bool, ResolvError> {
        let backup = backup_path(path);
        let kept = read(&backup)?;
        let ours = is_ours(path)?;
        match (ours, kept) {
            (true, Some(content)) if content.starts_with(ABSENT.as_bytes()) => remove(path)?,
            (true, Some(content)) => write_atomically(path, &content)?,
            (true, None) | (false, None) => return Ok(false),
            // Somebody else's file is newer than the backup.
            (false, Some(_)) => {}
        }
        remove(&backup)?;
        debug!(path = %path.display(), ours, "resolver configuration put back");
        Ok(ours)
    }
}

impl Undo {
    /// Restores the previous file, unless somebody else has changed it since.
    pub fn undo(mut self) -> Result<(), ResolvError> {
        self.done = true;
        ResolvConf::recover(&self.path).map(drop)
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if !self.done
            && let Err(error) = ResolvConf::recover(&self.path)
        {
            tracing::warn!(%error, path = %self.path.display(), "resolver configuration could not be put back");
        }
    }
}

/// The name servers that were configured before, in order: where other names can be asked. Reads the backup if the
/// file is ours.
pub fn previous_nameservers(path: &Path) -> Result<Vec<IpAddr>, ResolvError> {
    Ok(nameservers(&previous(path)?))
}

/// The search domains that were configured before. Reads the backup if the file is ours.
pub fn previous_search(path: &Path) -> Result<Vec<String>, ResolvError> {
    let text = String::from_utf8_lossy(&previous(path)?).into_owned();
    // The last such line counts (resolv.conf(5)).
    let domains = text.lines().rev().find_map(|line| {
        let mut words = line.split_whitespace();
        matches!(words.next(), Some("search" | "domain")).then(|| words.map(str::to_owned).collect())
    });
    Ok(domains.unwrap_or_default())
}

fn previous(path: &Path) -> Result<Vec<u8>, ResolvError> {
    let path = if is_ours(path)? { backup_path(path) } else { path.to_owned() };
    Ok(read(&path)?.unwrap_or_default())
}

fn nameservers(content: &[u8]) -> Vec<IpAddr> {
    let server =
        |line: &str| line.trim().strip_prefix("nameserver")?.split_whitespace().next()?.split('%').next()?.parse().ok();
    String::from_utf8_lossy(content).lines().filter_map(server).collect()
}

/// Whether some program of this computer serves names at an address of it.
fn is_held(address: IpAddr) -> bool {
    matches!(UdpSocket::bind((address, 53)), Err(error) if error.kind() == io::ErrorKind::AddrInUse)
}

fn is_domain(text: &str) -> bool {
    !text.is_empty() && text.len() <= 253 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.')
}

fn backup_path(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".before-clan");
    path.with_file_name(name)
}

fn is_ours(path: &Path) -> Result<bool, ResolvError> {
    Ok(read(path)?.is_some_and(|content| content.starts_with(MARKER.as_bytes())))
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, ResolvError> {
    let failed = |source| ResolvError::Io { action: "read", path: path.to_owned(), source };
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > MAX_FILE => return Err(ResolvError::TooLarge { path: path.to_owned() }),
        Ok(_) => {}
        // Also a symbolic link that leads nowhere.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    }
    fs::read(path).map(Some).map_err(failed)
}

fn remove(path: &Path) -> Result<(), ResolvError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(ResolvError::Io { action: "remove", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn write_atomically(path: &Path, content: &[u8]) -> Result<(), ResolvError> {
    let failed = |source| ResolvError::Io { action: "write", path: path.to_owned(), source };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new-clan");
    let temporary = path.with_file_name(name);
    let write = || {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&temporary)?;
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
        file.write_all(content)?;
        file.sync_all()?;
        match fs::rename(&temporary, path) {
            // A file that is mounted, as in containers, cannot be replaced: only what is in it can.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                fs::remove_file(&temporary)?;
                let mut file = fs::OpenOptions::new().write(true).truncate(true).open(path)?;
                file.write_all(content)?;
                return file.sync_all();
            }
            other => other?,
        }
        match path.parent().filter(|p| !p.as_os_str().is_empty()) {
            Some(folder) => fs::File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    };
    write().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "nameserver 192.0.2.53\nnameserver fe80::1%eth0\nsearch example.org\n";

    fn folder() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resolv.conf");
        (folder, path)
    }

    fn install(path: &Path) -> Undo {
        ResolvConf::install(path, "::1".parse().unwrap(), &["family.clan".into(), "clan".into()]).unwrap()
    }

    fn names(path: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(path.parent().unwrap())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_previous_file_comes_back_and_nothing_else_remains() {
        let (_folder, path) = folder();
        fs::write(&path, BEFORE).unwrap();
        let undo = install(&path);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains("nameserver ::1\nsearch family.clan clan\n"), "{text}");
        assert_eq!(
            previous_nameservers(&path).unwrap(),
            ["192.0.2.53".parse::<IpAddr>().unwrap(), "fe80::1".parse().unwrap()]
        );
        undo.undo().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), BEFORE);
        assert_eq!(names(&path), ["resolv.conf"]);
    }

    #[test]
    fn the_search_domains_from_before_are_known() {
        let (_folder, path) = folder();
        fs::write(&path, "search old.example\nnameserver 192.0.2.53\nsearch a.example b.example\n").unwrap();
        assert_eq!(previous_search(&path).unwrap(), ["a.example", "b.example"]);
        let _installed = install(&path);
        assert_eq!(previous_search(&path).unwrap(), ["a.example", "b.example"]);
    }

    #[test]
    fn what_a_killed_controller_of_another_clan_left_is_taken_over() {
        let (_folder, path) = folder();
        fs::write(&path, BEFORE).unwrap();
        std::mem::forget(ResolvConf::install(&path, "127.99.1.1".parse().unwrap(), &[]).unwrap());
        install(&path).undo().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), BEFORE);
    }

    #[test]
    fn dropping_restores_too() {
        let (_folder, path) = folder();
        fs::write(&path, BEFORE).unwrap();
        drop(install(&path));
        assert_eq!(fs::read_to_string(&path).unwrap(), BEFORE);
    }

    #[test]
    fn where_there_was_no_file_there_is_none_afterwards() {
        let (_folder, path) = folder();
        install(&path).undo().unwrap();
        assert!(names(&path).is_empty(), "{:?}", names(&path));
    }

    #[test]
    fn after_a_crash_the_real_file_is_found_again() {
        let (_folder, path) = folder();
        fs::write(&path, BEFORE).unwrap();
        std::mem::forget(install(&path));
        // A second start that does not recover first must not take our file for the real one.
        std::mem::forget(install(&path));
        assert!(ResolvConf::recover(&path).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), BEFORE);
        assert!(!ResolvConf::recover(&path).unwrap(), "nothing left to recover");
        assert_eq!(fs::read_to_string(&path).unwrap(), BEFORE);
    }

    #[test]
    fn a_crash_between_backup_and_change_leaves_the_real_file() {
        let (_folder, path) = folder();
        fs::write(&path, BEFORE).unwrap();
        fs::write(backup_path(&path), "stale\n").unwrap();
        assert!(!ResolvConf::recover(&path).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), BEFORE);
        assert_eq!(names(&path), ["resolv.conf"]);
    }

    #[test]
    fn what_somebody_else_wrote_meanwhile_stays() {
        let (_folder, path) = folder();
        fs::write(&path, BEFORE).unwrap();
        let undo = install(&path);
        fs::write(&path, "nameserver 198.51.100.1\n").unwrap();
        undo.undo().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "nameserver 198.51.100.1\n");
        assert_eq!(names(&path), ["resolv.conf"]);
    }

    #[test]
    fn a_search_domain_cannot_smuggle_in_lines() {
        let (_folder, path) = folder();
        let undo =
            ResolvConf::install(&path, "::1".parse().unwrap(), &["a\nnameserver 192.0.2.66".into(), "ok.clan".into()])
                .unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(!text.contains("192.0.2.66") && text.contains("search ok.clan\n"));
        undo.undo().unwrap();
    }
}
