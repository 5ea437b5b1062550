//! The controller's end of a Unix socket: what a virtio-serial port is to a guest, this is to a controller on the base
//! OS itself.

use std::{
    fs, io,
    os::{
        fd::OwnedFd,
        unix::fs::{PermissionsExt, chown},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags},
    io::Errno,
};
use tokio::net::{UnixListener, UnixStream};

/// Pause after a connection could not be taken: out of descriptors, mostly.
const PAUSE: Duration = Duration::from_millis(100);
const ROOT: u32 = 0;

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// Somebody listens on it already.
    #[error("another controller listens on {}", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// The path holds something that is no socket.
    #[error("{} is there already, and is no socket", path.display())]
    Occupied {
        /// The path.
        path: PathBuf,
    },
    /// Something else.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A Unix socket that one user, and root, may connect to. The file goes when this is dropped.
#[derive(Debug)]
pub struct LocalListener {
    listener: UnixListener,
    /// Held while this lives; the kernel lets go of it when we are killed.
    _lock: OwnedFd,
    path: PathBuf,
    user: u32,
}

impl LocalListener {
    /// Listens for `user`. A socket that a killed predecessor left is replaced. Folders above are made, for everybody to
    /// pass through: who may connect is decided at the socket.
    pub fn bind(path: &Path, user: u32) -> Result<Self, LocalError> {
        let failed = |action: &'static str| move |source| LocalError::Io { action, path: path.to_owned(), source };
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(failed("make the folder of"))?;
        }
        // INVARIANT: whoever holds the lock is the only one to listen there. A connection would not tell a live socket from a
        // leftover: a service without the rights of a real root may not connect to what it gave to its user.
        let lock = lock(path)?;
        remove_stale(path)?;
        let listener = UnixListener::bind(path).map_err(failed("listen on"))?;
        let bound = Self { listener, _lock: lock, path: path.to_owned(), user };
        // Before the owner, so that it is at no time more open than this.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed("make private"))?;
        if rustix::process::geteuid().as_raw() != user {
            chown(path, Some(user), None).map_err(failed("give away"))?;
        }
        Ok(bound)
    }

    /// The next connection of somebody who may.
    pub async fn accept(&self) -> UnixStream {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => match stream.peer_cred() {
                    // INVARIANT: the kernel names the other end's user; the file's mode is only the first bolt.
                    Ok(peer) if peer.uid() == self.user || peer.uid() == ROOT => return stream,
                    Ok(peer) => tracing::warn!(user = peer.uid(), "another user tried to steer this controller"),
                    Err(error) => tracing::debug!(%error, "a connection of somebody unknown"),
                },
                Err(error) => {
                    tracing::debug!(%error, "a connection was not accepted");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

impl Drop for LocalListener {
    fn drop(&mut self) {
        // A leftover would be replaced by the next controller.
        let _ = fs::remove_file(&self.path);
    }
}

/// The file stays: if it were removed, two could hold one of that name.
fn lock(path: &Path) -> Result<OwnedFd, LocalError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let failed = |source: Errno| LocalError::Io { action: "lock", path: path.to_owned(), source: source.into() };
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::open(Path::new(&name), flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(LocalError::InUse { path: path.to_owned() }),
        Err(error) => Err(failed(error)),
    }
}

fn remove_stale(path: &Path) -> Result<(), LocalError> {
    use std::os::unix::fs::FileTypeExt;
    let failed = |action: &'static str| move |source| LocalError::Io { action, path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("look at")(error)),
        Ok(found) if !found.file_type().is_socket() => Err(LocalError::Occupied { path: path.to_owned() }),
        Ok(_) => fs::remove_file(path).map_err(failed("remove the stale socket")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    #[tokio::test]
    async fn the_user_gets_in_and_a_leftover_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/clan.sock");
        let first = LocalListener::bind(&path, own()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(LocalListener::bind(&path, own()), Err(LocalError::InUse { .. })));
        // As after a kill: the file stays, nobody listens.
        let copy = dir.path().join("left");
        fs::hard_link(&path, &copy).unwrap();
        drop(first);
        assert!(!path.exists());
        fs::rename(&copy, &path).unwrap();
        let second = LocalListener::bind(&path, own()).unwrap();
        let (connected, _accepted) = tokio::join!(UnixStream::connect(&path), second.accept());
        connected.unwrap();
    }

    #[tokio::test]
    async fn a_file_in_the_way_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes.txt");
        fs::write(&path, "mine").unwrap();
        assert!(matches!(LocalListener::bind(&path, own()), Err(LocalError::Occupied { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    }
}
