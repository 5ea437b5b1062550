//! Encrypted data disks: [LUKS](crate::luks), opened by QEMU for a guest that sees a plain disk.
//!
//! What the guest has not written yet reads as noise, as on a new disk of any computer: file systems are made for that. What
//! it discards stays where it is, encrypted.

use std::{
    fs::File,
    io::{self, PipeReader, Write},
    os::unix::fs::FileExt,
    path::Path,
};

use clan_types::{ByteSize, Passphrase};
use rustix::{fs::SeekFrom, io::Errno};

use crate::{
    VmError,
    disk::{self, Temporary},
    luks::{self, Layout, Luks, LuksError, SECTOR},
};

/// At once.
const CHUNK: usize = 1 << 20;

/// Makes a sparse, encrypted data disk with an empty ext4 file system labelled `clan-data`, on which the guest sees `size`. It
/// appears whole or not at all, and never in place of another file. Takes a second or two, of which a guess of the passphrase
/// will take one.
///
/// # Errors
/// As [`crate::create_data_disk`].
pub async fn create_encrypted_disk(path: &Path, size: ByteSize, passphrase: &Passphrase) -> Result<(), VmError> {
    let mkfs = disk::begin(path, size)?;
    // Nothing that a person wrote is ever on this one.
    let plain = Temporary::new(&path.with_extension("plain"))?;
    let full = |error| disk::explain(error, path, size);
    // A whole number of sectors, of any size.
    plain.1.set_len(size.as_bytes() & !0xfff).map_err(VmError::io("write", plain.path()))?;
    disk::format(&mkfs, plain.path(), disk::Holes::AreNoise).await.map_err(full)?;
    let (to, phrase) = (path.to_owned(), passphrase.clone());
    let filled = tokio::task::spawn_blocking(move || {
        let encrypted = Temporary::new(&to)?;
        encrypt(&plain.1, &encrypted.1, &phrase, luks::affordable())
            .map_err(|error| disk::explain(VmError::io("write", &to)(error), &to, size))?;
        disk::commit(&encrypted, &to)
    });
    filled.await.map_err(|error| VmError::io("write", path)(io::Error::other(error)))?
}

/// Encrypts what is on a disk, but for its holes. `iterations` is what a guess of the passphrase costs.
fn encrypt(plain: &File, encrypted: &File, passphrase: &Passphrase, iterations: u32) -> io::Result<()> {
    let (begin, luks) = Luks::create(passphrase, iterations)?;
    encrypted.write_all_at(&begin, 0)?;
    let payload = Layout::read(encrypted).map_err(io::Error::other)?.payload();
    let end = plain.metadata()?.len();
    encrypted.set_len(payload + end)?;
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < end {
        let data = match rustix::fs::seek(plain, SeekFrom::Data(at)) {
            // Holes are as long as the file system likes.
            Ok(data) => data - data % SECTOR as u64,
            Err(Errno::NXIO) => return encrypted.sync_all(),
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(plain, SeekFrom::Hole(data))?;
        at = data;
        while at < hole {
            let left = (hole - at).next_multiple_of(SECTOR as u64);
            let length = CHUNK.min(usize::try_from(left).unwrap_or(CHUNK));
            let chunk = &mut buffer[..length];
            plain.read_exact_at(chunk, at)?;
            luks.encrypt(at / SECTOR as u64, chunk);
            encrypted.write_all_at(chunk, payload + at)?;
            at += length as u64;
        }
    }
    encrypted.sync_all()
}

/// Sees whether a passphrase opens a disk; a virtual machine may have it open. Blocks, for about a second.
///
/// # Errors
/// [`VmError::WrongPassphrase`]; [`VmError::DamagedDisk`] if it is no encrypted disk.
pub fn check_passphrase(path: &Path, passphrase: &Passphrase) -> Result<(), VmError> {
    let file = File::open(path).map_err(|source| VmError::MissingFile { path: path.into(), source })?;
    let opened = Layout::read(&file).and_then(|layout| layout.open(&file, passphrase));
    opened.map(drop).map_err(|error| explain(error, path))
}

/// Gives an encrypted disk another passphrase; a virtual machine may have it open. Wherever this is cut short, the old one or the new
/// one opens it, and doing the same again comes to the end. Blocks, for some seconds.
///
/// # Errors
/// As [`check_passphrase`], of the old one; [`VmError::Io`] also if the disk has no room for another key.
pub fn change_passphrase(path: &Path, old: &Passphrase, new: &Passphrase) -> Result<(), VmError> {
    let file = File::options().read(true).write(true).open(path);
    let file = file.map_err(|source| VmError::MissingFile { path: path.into(), source })?;
    let write = |at, bytes: &[u8]| file.write_all_at(bytes, at).and_then(|()| file.sync_data());
    luks::change(&file, old, new, luks::affordable(), write).map_err(|error| explain(error, path))
}

/// How much longer the file of an encrypted disk is than the disk that the guest sees.
///
/// # Errors
/// [`VmError::DamagedDisk`] if it is no encrypted disk.
pub fn encryption_overhead(path: &Path) -> Result<ByteSize, VmError> {
    let file = File::open(path).map_err(|source| VmError::MissingFile { path: path.into(), source })?;
    Layout::read(&file).map(|layout| ByteSize::from_bytes(layout.payload())).map_err(|error| explain(error, path))
}

fn explain(error: LuksError, path: &Path) -> VmError {
    match error {
        LuksError::WrongPassphrase => VmError::WrongPassphrase { path: path.into() },
        LuksError::Damaged(why) => VmError::DamagedDisk { path: path.into(), why },
        LuksError::Io(source) => VmError::io("use", path)(source),
        LuksError::Full => VmError::io("write", path)(io::Error::other(error)),
    }
}

/// A passphrase on its way to a QEMU that inherits this: it can be read once, and is nowhere else.
pub(crate) fn hand_over(passphrase: &Passphrase) -> io::Result<PipeReader> {
    let (reader, mut writer) = io::pipe()?;
    // INVARIANT: shorter than what a pipe takes without a reader.
    writer.write_all(passphrase.expose().as_bytes())?;
    Ok(reader)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn data_is_encrypted_where_it_is_and_holes_stay_holes() {
        let folder = tempfile::tempdir().unwrap();
        let (plain, encrypted) =
            ["plain", "encrypted"].map(|name| File::create_new(folder.path().join(name)).unwrap()).into();
        let plain_again = File::open(folder.path().join("plain")).unwrap();
        let encrypted_again = File::options().read(true).write(true).open(folder.path().join("encrypted")).unwrap();
        plain.set_len(64 << 20).unwrap();
        for at in [0, 5 << 20, (64 << 20) - 4096] {
            plain.write_all_at(&[b'x'; 4096], at).unwrap();
        }
        let passphrase: Passphrase = "correct horse".parse().unwrap();
        encrypt(&plain_again, &encrypted_again, &passphrase, 1000).unwrap();
        assert!(encrypted.metadata().unwrap().blocks() * 512 < 8 << 20, "it takes little more room");
        let path = folder.path().join("encrypted");
        assert_eq!(encryption_overhead(&path).unwrap(), ByteSize::from_mib(2));
        assert_eq!(encrypted.metadata().unwrap().len(), 66 << 20);
        let luks =
            Layout::read(&encrypted_again).and_then(|layout| layout.open(&encrypted_again, &passphrase)).unwrap();
        for at in [0, 5 << 20, (64 << 20) - 4096] {
            let mut data = [0; 4096];
            encrypted_again.read_exact_at(&mut data, (2 << 20) + at).unwrap();
            assert_ne!(data, [b'x'; 4096]);
            luks.decrypt(at / 512, &mut data);
            assert_eq!(data, [b'x'; 4096]);
        }
        check_passphrase(&path, &passphrase).unwrap();
        let wrong = check_passphrase(&path, &"correct house".parse().unwrap());
        assert!(matches!(wrong, Err(VmError::WrongPassphrase { .. })), "{wrong:?}");
        let none = check_passphrase(&folder.path().join("plain"), &passphrase);
        assert!(matches!(none, Err(VmError::DamagedDisk { .. })), "{none:?}");
    }

    #[test]
    fn the_longest_passphrase_fits_and_is_there_once() {
        let longest: Passphrase = "x".repeat(512).parse().unwrap();
        let reader = hand_over(&longest).unwrap();
        assert_eq!(io::read_to_string(&reader).unwrap(), "x".repeat(512));
        assert_eq!(io::read_to_string(&reader).unwrap(), "");
    }
}
