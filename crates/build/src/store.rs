//! The image store: `<dir>/<ImageId>/{manifest,kernel,initramfs,root.erofs,layer.erofs,boot.img,pieces}`.
//!
//! All calls block on the disk; from async code, call them in `spawn_blocking`.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU64, Ordering},
};

use clan_types::{ByteSize, FileHash, ImageId};
use clan_wire::{
    image::{FileRole, ImageFile, MAX_MANIFEST, Manifest, ManifestError},
    pieces::{PIECE, Pieces, hash_of, piece_len},
};

use crate::lock::Held;

const MANIFEST: &str = "manifest";
const BOOT_DISK: &str = "boot.img";
const PIECES: &str = "pieces";
const STAGING: &str = ".incoming-";
const LOCK: &str = "lock";
/// Sizes of disks are whole sectors.
const SECTOR: u64 = 512;

/// The images of one data directory.
#[derive(Debug, Clone)]
pub struct ImageStore {
    dir: PathBuf,
}

/// A complete image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredImage {
    /// Its name.
    pub id: ImageId,
    /// What it consists of.
    pub manifest: Manifest,
    /// Where its files are.
    pub dir: PathBuf,
}

/// Why the store cannot do as asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such image.
    #[error("image {} is not in the store", .0.short())]
    Unknown(ImageId),
    /// A file of an image is not what the manifest says.
    #[error("`{file}` of image {} is damaged: {damage}", image.short())]
    Damaged {
        /// The image.
        image: ImageId,
        /// The file, by its name in the image's directory.
        file: String,
        /// What is wrong with it.
        damage: Damage,
    },
    /// The image is being fetched or built already.
    #[error("image {} is being fetched already", .0.short())]
    Busy(ImageId),
    /// The disk filled up.
    #[error("the disk is full, writing {path}", path = .0.display())]
    DiskFull(PathBuf),
    /// The manifest is not valid.
    #[error("the image has no valid manifest")]
    Manifest(#[from] ManifestError),
    /// Reading or writing a file failed.
    #[error("could not {action} {path}", path = path.display())]
    Io {
        /// What was attempted, as an infinitive.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl StoreError {
    /// Somebody who writes a file of an image could not.
    pub fn on_write(path: PathBuf, source: io::Error) -> Self {
        io_error("write", &path)(source)
    }
}

/// What is wrong with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// It is not there.
    #[error("it is missing")]
    Missing,
    /// It has another size.
    #[error("it has {found} bytes instead of {expected}")]
    Size {
        /// Bytes, by the manifest.
        expected: u64,
        /// Bytes, on disk.
        found: u64,
    },
    /// It has the right size and another content.
    #[error("its content is not what the manifest says")]
    Content,
}

/// An image that is being put together. Dropping it keeps what is there, so that a later [`ImageStore::begin`] resumes.
#[derive(Debug)]
pub struct Incoming {
    store: ImageStore,
    id: ImageId,
    manifest: Manifest,
    dir: PathBuf,
    /// Held while this value lives.
    _held: Held,
}

/// One file of an [`Incoming`] image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IncomingFile {
    /// What it is for.
    pub role: FileRole,
    /// What it must hash to.
    pub hash: FileHash,
    /// Where to put it.
    pub path: PathBuf,
    /// Bytes that are there already.
    pub have: u64,
    /// Bytes when complete.
    pub size: u64,
}

impl IncomingFile {
    /// Whether all bytes are there; [`Incoming::finish`] checks whether they are the right ones.
    pub const fn is_complete(&self) -> bool {
        self.have >= self.size
    }
}

impl StoredImage {
    /// The path of the file with a role.
    pub fn path(&self, role: FileRole) -> PathBuf {
        self.dir.join(file_name(role))
    }

    /// The path of the boot disk: kernel, then initramfs, then zeros up to a whole sector.
    pub fn boot_disk(&self) -> PathBuf {
        self.dir.join(BOOT_DISK)
    }

    /// The encoded [`Pieces`] of the files, in the manifest's order, one after the other: what a machine needs to give the
    /// image to others. Made by reading the files once, and kept beside them.
    pub fn pieces(&self) -> Result<Vec<u8>, StoreError> {
        let path = self.dir.join(PIECES);
        if let Ok(kept) = fs::read(&path)
            && self.are_pieces(&kept)
        {
            return Ok(kept);
        }
        let mut pieces = Vec::new();
        for file in &self.manifest.files {
            let source = self.path(file.role);
            pieces_of(&source, file.size.as_bytes(), &mut pieces).map_err(io_error("read", &source))?;
        }
        if !self.are_pieces(&pieces) {
            // Whoever asked for the image would be given something else.
            check_files(&self.id, &self.manifest, &self.dir)?;
        }
        if let Err(error) = self.keep_pieces(&pieces) {
            tracing::warn!(%error, image = %self.id.short(), "the hashes of the image's pieces are made anew each time");
        }
        Ok(pieces)
    }

    /// Several may do this at once: they write the same.
    fn keep_pieces(&self, pieces: &[u8]) -> Result<(), StoreError> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = self.dir.join(PIECES);
        let new = self.dir.join(format!("{PIECES}.new-{}-{count}", process::id()));
        fs::write(&new, pieces).and_then(|()| fs::rename(&new, &path)).map_err(|error| {
            let _ = fs::remove_file(&new);
            io_error("write", &path)(error)
        })
    }

    fn are_pieces(&self, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        let fits = self.manifest.files.iter().all(|file| {
            let size = file.size.as_bytes();
            let length = usize::try_from(Pieces::encoded_len(size)).unwrap_or(usize::MAX);
            let Some((list, after)) = rest.split_at_checked(length) else { return false };
            rest = after;
            Pieces::decode(list, size, &file.hash).is_ok()
        });
        fits && rest.is_empty()
    }
}

fn pieces_of(path: &Path, size: u64, pieces: &mut Vec<u8>) -> io::Result<()> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; PIECE];
    for index in 0..Pieces::count(size) {
        let piece = &mut buffer[..piece_len(size, index)];
        file.read_exact(piece)?;
        pieces.extend_from_slice(&hash_of(size, index, piece));
    }
    Ok(())
}

/// The name of a file in an image's directory.
const fn file_name(role: FileRole) -> &'static str {
    match role {
        FileRole::Kernel => "kernel",
        FileRole::Initramfs => "initramfs",
        FileRole::Root => "root.erofs",
        FileRole::Layer => "layer.erofs",
    }
}

impl ImageStore {
    /// Opens the store in a directory, creating the directory if needed.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let dir = dir.into();
        fs::create_dir_all(&dir).map_err(io_error("create", &dir))?;
        Ok(Self { dir })
    }

    /// The directory of the store.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All complete images, by id. Files are not hashed: see [`Self::verify`].
    pub fn list(&self) -> Vec<StoredImage> {
        let Ok(entries) = fs::read_dir(&self.dir) else { return Vec::new() };
        let mut images: Vec<_> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter_map(|id| self.get(&id))
            .collect();
        images.sort_by_key(|image| image.id);
        images
    }

    /// An image; `None` if it is not there or has no readable manifest.
    pub fn get(&self, id: &ImageId) -> Option<StoredImage> {
        let dir = self.dir.join(id.to_string());
        let manifest = read_manifest(&dir.join(MANIFEST), id).inspect_err(|error| {
            if dir.exists() {
                tracing::warn!(image = %id.short(), %error, "an image in the store cannot be read");
            }
        });
        Some(StoredImage { id: *id, manifest: manifest.ok()?, dir })
    }

    /// Starts, or resumes, putting an image together. Files that another image of the store has are taken from there.
    pub fn begin(&self, manifest: Manifest) -> Result<Incoming, StoreError> {
        // INVARIANT: a manifest that was not decoded from bytes passes the same checks as one that was.
        let id = manifest.id()?;
        let manifest = Manifest::decode(&manifest.encode()?, Some(&id))?;
        if manifest.files.iter().filter(|f| f.role == FileRole::Layer).count() > 1 {
            return Err(ManifestError::Incomplete(FileRole::Layer).into());
        }
        let dir = self.dir.join(format!("{STAGING}{id}"));
        fs::create_dir_all(&dir).map_err(io_error("create", &dir))?;
        let lock_path = dir.join(LOCK);
        let held = Held::take(&lock_path).map_err(io_error("lock", &lock_path))?;
        let held = held.ok_or(StoreError::Busy(id))?;
        let incoming = Incoming { store: self.clone(), id, manifest, dir, _held: held };
        incoming.share_files();
        Ok(incoming)
    }

    /// Bytes of an image's files that are not here: neither with another image, nor from a transfer that broke off, of which
    /// nothing has been checked.
    pub fn missing(&self, manifest: &Manifest) -> u64 {
        let here = self.list();
        let has = |file: &ImageFile| {
            here.iter().any(|i| i.manifest.files.iter().any(|f| (f.hash, f.size) == (file.hash, file.size)))
        };
        let begun = manifest.id().map(|id| self.dir.join(format!("{STAGING}{id}")));
        let arrived = |file: &ImageFile| {
            let dir = begun.as_ref().ok()?;
            // A file that arrives has its full length from the start: what it takes on the disk is what has come.
            let names = [file_name(file.role).to_owned(), format!("{}.part", file_name(file.role))];
            let taken = names.iter().filter_map(|name| fs::metadata(dir.join(name)).ok()).map(|m| m.blocks() * 512);
            taken.max()
        };
        let missing = manifest.files.iter().filter(|file| !has(file));
        missing.map(|file| file.size.as_bytes().saturating_sub(arrived(file).unwrap_or(0))).fold(0, u64::saturating_add)
    }

    /// Directories of transfers and removals that broke off, which [`Self::gc`] removes.
    pub fn left_over(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten().map(|entry| entry.path());
        entries
            .filter(|path| path.file_name().and_then(|n| n.to_str()).is_some_and(|n| is_left_over(n, path)))
            .collect()
    }

    /// Reads every file of an image and compares it with the manifest.
    pub fn verify(&self, id: &ImageId) -> Result<(), StoreError> {
        let image = self.get(id).ok_or(StoreError::Unknown(*id))?;
        check_files(id, &image.manifest, &image.dir)?;
        let path = image.boot_disk();
        let damaged = |damage| StoreError::Damaged { image: *id, file: BOOT_DISK.to_owned(), damage };
        let mut disk = match File::open(&path) {
            Ok(disk) => disk,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(damaged(Damage::Missing)),
            Err(error) => return Err(io_error("open", &path)(error)),
        };
        let parts = [image.manifest.file(FileRole::Kernel)?, image.manifest.file(FileRole::Initramfs)?];
        let expected = boot_disk_size(&parts);
        let found = disk.metadata().map_err(io_error("read", &path))?.len();
        if found != expected {
            return Err(damaged(Damage::Size { expected, found }));
        }
        for part in parts {
            let mut hasher = blake3::Hasher::new();
            hasher.update_reader((&mut disk).take(part.size.as_bytes())).map_err(io_error("read", &path))?;
            if hasher.finalize().as_bytes() != part.hash.as_bytes() {
                return Err(damaged(Damage::Content));
            }
        }
        Ok(())
    }

    /// Removes an image. No guest may be running from it.
    pub fn remove(&self, id: &ImageId) -> Result<(), StoreError> {
        let dir = self.dir.join(id.to_string());
        if !dir.exists() {
            return Err(StoreError::Unknown(*id));
        }
        // Renamed first: an interrupted removal leaves no image that looks complete.
        let doomed = self.dir.join(format!(".removed-{id}"));
        if doomed.exists() {
            fs::remove_dir_all(&doomed).map_err(io_error("remove", &doomed))?;
        }
        fs::rename(&dir, &doomed).map_err(io_error("rename", &dir))?;
        sync_dir(&self.dir)?;
        fs::remove_dir_all(&doomed).map_err(io_error("remove", &doomed))
    }

    /// Removes every image but those in `keep`, and what interrupted transfers and removals left. Returns what it removed.
    pub fn gc(&self, keep: &[ImageId]) -> Result<Vec<ImageId>, StoreError> {
        let mut removed = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(io_error("read", &self.dir))? {
            let entry = entry.map_err(io_error("read", &self.dir))?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if let Ok(id) = name.parse::<ImageId>() {
                if !keep.contains(&id) {
                    self.remove(&id)?;
                    removed.push(id);
                }
            } else if is_left_over(name, &entry.path()) {
                fs::remove_dir_all(entry.path()).map_err(io_error("remove", &entry.path()))?;
            }
        }
        removed.sort();
        Ok(removed)
    }
}

impl Incoming {
    /// The image's name.
    pub const fn id(&self) -> ImageId {
        self.id
    }

    /// What it will consist of.
    pub const fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Where to write the file with a hash, and how much of it is there; `None` if the image has no such file.
    pub fn file(&self, hash: &FileHash) -> Option<IncomingFile> {
        self.files().into_iter().find(|f| f.hash == *hash)
    }

    /// All files, with how much of each is there.
    pub fn files(&self) -> Vec<IncomingFile> {
        self.manifest.files.iter().map(|file| self.state(file)).collect()
    }

    /// Checks every file, writes the boot disk and moves the image to its place. After [`StoreError::Damaged`] call
    /// [`ImageStore::begin`] again: a file with a wrong content has been dropped, the other files are kept.
    pub fn finish(self) -> Result<StoredImage, StoreError> {
        if let Some(image) = self.store.get(&self.id) {
            // Someone else was faster, with the same content.
            fs::remove_dir_all(&self.dir).map_err(io_error("remove", &self.dir))?;
            return Ok(image);
        }
        if let Err(error) = check_files(&self.id, &self.manifest, &self.dir) {
            if let StoreError::Damaged { file, damage: Damage::Content | Damage::Size { .. }, .. } = &error {
                let path = self.dir.join(file);
                let longer_or_wrong = self.files().iter().any(|f| f.path == path && f.is_complete());
                if longer_or_wrong {
                    fs::remove_file(&path).map_err(io_error("remove", &path))?;
                }
            }
            return Err(error);
        }
        self.write_boot_disk()?;
        let manifest_path = self.dir.join(MANIFEST);
        fs::write(&manifest_path, self.manifest.encode()?).map_err(io_error("write", &manifest_path))?;
        self.remove_others()?;
        for entry in fs::read_dir(&self.dir).map_err(io_error("read", &self.dir))? {
            let path = entry.map_err(io_error("read", &self.dir))?.path();
            File::open(&path).and_then(|f| f.sync_all()).map_err(io_error("sync", &path))?;
        }
        sync_dir(&self.dir)?;
        let place = self.store.dir.join(self.id.to_string());
        if place.exists() {
            // An image without a readable manifest: the complete one replaces it.
            fs::remove_dir_all(&place).map_err(io_error("remove", &place))?;
        }
        fs::rename(&self.dir, &place).map_err(io_error("rename", &self.dir))?;
        sync_dir(&self.store.dir)?;
        Ok(StoredImage { id: self.id, manifest: self.manifest.clone(), dir: place })
    }

    /// Gives up: removes what is there.
    pub fn discard(self) -> Result<(), StoreError> {
        fs::remove_dir_all(&self.dir).map_err(io_error("remove", &self.dir))
    }

    /// What does not belong to an image: the lock, and beginnings of files that came from elsewhere after all.
    fn remove_others(&self) -> Result<(), StoreError> {
        let ours = |name: &str| {
            [MANIFEST, BOOT_DISK].contains(&name) || self.manifest.files.iter().any(|f| file_name(f.role) == name)
        };
        for entry in fs::read_dir(&self.dir).map_err(io_error("read", &self.dir))? {
            let entry = entry.map_err(io_error("read", &self.dir))?;
            if !entry.file_name().to_str().is_some_and(ours) {
                fs::remove_file(entry.path()).map_err(io_error("remove", &entry.path()))?;
            }
        }
        Ok(())
    }

    fn state(&self, file: &ImageFile) -> IncomingFile {
        let path = self.dir.join(file_name(file.role));
        let have = fs::metadata(&path).map_or(0, |m| m.len());
        IncomingFile { role: file.role, hash: file.hash, path, have, size: file.size.as_bytes() }
    }

    /// Links files that other images have, unless they are damaged there. INVARIANT: files of the store are never written
    /// to, so links are safe.
    fn share_files(&self) {
        for image in self.store.list() {
            for file in &self.manifest.files {
                let Some(same) = image.manifest.files.iter().find(|f| f.hash == file.hash && f.size == file.size)
                else {
                    continue;
                };
                let (source, missing) = (image.path(same.role), self.state(file).have == 0);
                if missing && matches!(check_file(&source, file.size, &file.hash), Ok(None)) {
                    // Without hard links the file is fetched like any other.
                    let _ = fs::hard_link(&source, self.dir.join(file_name(file.role)));
                }
            }
        }
    }

    fn write_boot_disk(&self) -> Result<(), StoreError> {
        let path = self.dir.join(BOOT_DISK);
        let parts = [self.manifest.file(FileRole::Kernel)?, self.manifest.file(FileRole::Initramfs)?];
        let mut disk = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .map_err(io_error("create", &path))?;
        for part in parts {
            let source = self.dir.join(file_name(part.role));
            let mut file = File::open(&source).map_err(io_error("open", &source))?;
            io::copy(&mut file, &mut disk).map_err(io_error("write", &path))?;
        }
        disk.set_len(boot_disk_size(&parts)).map_err(io_error("write", &path))?;
        disk.seek(SeekFrom::End(0)).and_then(|_| disk.flush()).map_err(io_error("write", &path))
    }
}

/// INVARIANT: nothing enters the store, and nothing is called intact, without this.
fn check_files(id: &ImageId, manifest: &Manifest, dir: &Path) -> Result<(), StoreError> {
    for file in &manifest.files {
        let name = file_name(file.role);
        check_file(&dir.join(name), file.size, &file.hash)?
            .map_or(Ok(()), |damage| Err(StoreError::Damaged { image: *id, file: name.to_owned(), damage }))?;
    }
    Ok(())
}

fn check_file(path: &Path, size: ByteSize, hash: &FileHash) -> Result<Option<Damage>, StoreError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some(Damage::Missing)),
        Err(error) => return Err(io_error("open", path)(error)),
    };
    let found = file.metadata().map_err(io_error("read", path))?.len();
    if found != size.as_bytes() {
        return Ok(Some(Damage::Size { expected: size.as_bytes(), found }));
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file).map_err(io_error("read", path))?;
    Ok((hasher.finalize().as_bytes() != hash.as_bytes()).then_some(Damage::Content))
}

fn boot_disk_size(parts: &[&ImageFile; 2]) -> u64 {
    parts.iter().map(|p| p.size.as_bytes()).sum::<u64>().next_multiple_of(SECTOR)
}

fn read_manifest(path: &Path, id: &ImageId) -> Result<Manifest, StoreError> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(io_error("open", path))?;
    file.take(MAX_MANIFEST as u64 + 1).read_to_end(&mut bytes).map_err(io_error("read", path))?;
    Ok(Manifest::decode(&bytes, Some(id))?)
}

fn is_left_over(name: &str, path: &Path) -> bool {
    name.starts_with(".removed-") || (name.starts_with(STAGING) && !is_locked(&path.join(LOCK)))
}

fn is_locked(path: &Path) -> bool {
    File::open(path).and_then(Held::on).is_ok_and(|free| free.is_none())
}

fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(io_error("sync", dir))
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |source| {
        if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            StoreError::DiskFull(path.to_owned())
        } else {
            StoreError::Io { action, path: path.to_owned(), source }
        }
    }
}

#[cfg(test)]
mod tests;
