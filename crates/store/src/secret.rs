//! Secret keys in files.

use std::{
    fmt,
    fs::{self, File, Permissions},
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use zeroize::Zeroizing;

use crate::{
    StoreError,
    file::{sync_parent, write_temporary},
};

const MAGIC: &[u8; 8] = b"clankey1";
const CHECK: usize = 4;

/// 32 secret bytes, wiped from memory when dropped.
pub struct Secret(Zeroizing<[u8; 32]>);

impl Secret {
    /// The bytes. Never log them.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// A file that holds a [`Secret`]: a mark, 32 bytes and a checksum, readable by its owner only (0600).
#[derive(Debug)]
pub struct SecretFile;

impl SecretFile {
    /// Reads the secret, or makes one from the operating system's randomness. Two that start at once get the same.
    pub fn load_or_create(path: &Path) -> Result<Secret, StoreError> {
        if let Some(secret) = Self::load(path)? {
            return Ok(secret);
        }
        let mut secret = Zeroizing::new([0; 32]);
        getrandom::fill(secret.as_mut_slice()).map_err(|_| StoreError::NoRandomness { path: path.to_owned() })?;
        let mut bytes = Zeroizing::new(Vec::with_capacity(MAGIC.len() + 32 + CHECK));
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(secret.as_slice());
        bytes.extend_from_slice(&checksum(&secret));
        let temporary = write_temporary(path, &bytes, 0o600)?;
        // A link, unlike a rename, never replaces a secret that somebody else made meanwhile.
        let linked = fs::hard_link(&temporary, path);
        let _ = fs::remove_file(&temporary);
        match linked {
            Ok(()) => sync_parent(path).map(|()| Secret(secret)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Self::load(path)?.ok_or_else(|| StoreError::io("open", path)(io::ErrorKind::NotFound.into()))
            }
            Err(error) => Err(StoreError::io("write", path)(error)),
        }
    }

    /// Reads the secret; `None` if there is no file. Refuses one that others can read ([`StoreError::Exposed`], see
    /// [`SecretFile::restrict`]) and one that is damaged.
    pub fn load(path: &Path) -> Result<Option<Secret>, StoreError> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::io("open", path)(error)),
        };
        let mode = file.metadata().map_err(StoreError::io("read", path))?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(StoreError::Exposed { path: path.to_owned(), mode });
        }
        const LENGTH: usize = MAGIC.len() + 32 + CHECK;
        let mut bytes = Zeroizing::new(Vec::with_capacity(LENGTH + 1));
        file.take(LENGTH as u64 + 1).read_to_end(&mut bytes).map_err(StoreError::io("read", path))?;
        let damaged = || StoreError::DamagedSecret { path: path.to_owned() };
        let body = bytes.strip_prefix(MAGIC.as_slice()).ok_or_else(damaged)?;
        let (secret, check) = body.split_at_checked(32).ok_or_else(damaged)?;
        let secret = Zeroizing::new(<[u8; 32]>::try_from(secret).map_err(|_| damaged())?);
        if check != checksum(&secret) {
            return Err(damaged());
        }
        Ok(Some(Secret(secret)))
    }

    /// Takes the right to read the file from everybody but its owner. Whoever read it before still knows it.
    pub fn restrict(path: &Path) -> Result<(), StoreError> {
        fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(StoreError::io("make private", path))
    }
}

fn checksum(secret: &[u8; 32]) -> [u8; CHECK] {
    let hash = blake3::derive_key("clan 2026-11 secret file checksum v1", secret);
    [hash[0], hash[1], hash[2], hash[3]]
}
