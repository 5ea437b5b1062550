//! Data disks.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::Stdio,
};

use clan_types::ByteSize;
use rustix::{
    fs::{CWD, RenameFlags, SeekFrom},
    io::Errno,
};
use tokio::process::Command;

use crate::{VmError, file, tool};

/// By which the guest knows the file system.
const LABEL: &str = "clan-data";
const MKFS: &str = "mkfs.ext4";

/// Makes a sparse data disk with an empty ext4 file system labelled `clan-data`. It appears whole or not at all, and
/// never in place of another file.
///
/// # Errors
/// [`VmError::NoSpace`] if the disk could not be filled with what is free now; [`VmError::MissingTool`] without
/// `mkfs.ext4`; [`VmError::Io`], with `AlreadyExists` if there is a file of this name.
pub async fn create_data_disk(path: &Path, size: ByteSize) -> Result<(), VmError> {
    let mkfs = begin(path, size)?;
    let temporary = Temporary::new(path)?;
    temporary.1.set_len(size.as_bytes()).map_err(VmError::io("write", &temporary.0))?;
    format(&mkfs, &temporary.0, Holes::AreZero).await.map_err(|error| explain(error, path, size))?;
    commit(&temporary, path)
}

/// Sees whether there can be a disk of this name and size, and what makes its file system.
pub(crate) fn begin(path: &Path, size: ByteSize) -> Result<PathBuf, VmError> {
    if path.symlink_metadata().is_ok() {
        return Err(VmError::io("create", path)(io::ErrorKind::AlreadyExists.into()));
    }
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    file::create_private_dir(parent).map_err(VmError::io("create", parent))?;
    let available = free_space(parent).map_err(VmError::io("measure", parent))?;
    if size > available {
        return Err(VmError::NoSpace { path: path.into(), asked: size, available });
    }
    tool::find(&[MKFS]).ok_or(VmError::MissingTool { tool: MKFS, package: "e2fsprogs" })
}

/// Puts a disk that is complete in its place, durably.
pub(crate) fn commit(temporary: &Temporary, path: &Path) -> Result<(), VmError> {
    temporary.1.sync_all().map_err(VmError::io("write", &temporary.0))?;
    rustix::fs::renameat_with(CWD, &temporary.0, CWD, path, RenameFlags::NOREPLACE)
        .map_err(|error| VmError::io("create", path)(error.into()))?;
    file::sync_parent(path).map_err(VmError::io("create", path))
}

/// What ended the making of a disk, as lack of room if it is that.
pub(crate) fn explain(error: VmError, path: &Path, size: ByteSize) -> VmError {
    let full = match &error {
        VmError::ToolFailed { log, .. } => log.contains("No space left"),
        VmError::Io { source, .. } => source.kind() == io::ErrorKind::StorageFull,
        _ => false,
    };
    if !full {
        return error;
    }
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    VmError::NoSpace { path: path.into(), asked: size, available: free_space(parent).unwrap_or_default() }
}

/// Copies a data disk that nothing writes to: holes stay holes, and where the file system can, nothing is copied at all. It
/// appears whole or not at all, and never in place of another file. Blocks on the disk.
///
/// # Errors
/// [`VmError::NoSpace`] if there is not enough; [`VmError::Io`], with `AlreadyExists` if there is a file of this name.
pub fn copy_data_disk(from: &Path, to: &Path) -> Result<(), VmError> {
    if to.symlink_metadata().is_ok() {
        return Err(VmError::io("create", to)(io::ErrorKind::AlreadyExists.into()));
    }
    let source = File::open(from).map_err(|source| VmError::MissingFile { path: from.into(), source })?;
    let parent = to.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    file::create_private_dir(parent).map_err(VmError::io("create", parent))?;
    let temporary = Temporary::new(to)?;
    copy_sparse(&source, &temporary.1).and_then(|()| temporary.1.sync_all()).map_err(|error| match error.kind() {
        io::ErrorKind::StorageFull => VmError::NoSpace {
            path: to.into(),
            asked: ByteSize::from_bytes(source.metadata().map_or(0, |m| m.blocks() * 512)),
            available: free_space(parent).unwrap_or_default(),
        },
        _ => VmError::io("write", to)(error),
    })?;
    rustix::fs::renameat_with(CWD, &temporary.0, CWD, to, RenameFlags::NOREPLACE)
        .map_err(|error| VmError::io("create", to)(error.into()))?;
    file::sync_parent(to).map_err(VmError::io("create", to))
}

fn copy_sparse(from: &File, to: &File) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let end = from.metadata()?.len();
    to.set_len(end)?;
    let mut at = 0;
    while at < end {
        let data = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(data) => data,
            // The rest is a hole.
            Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        at = rustix::fs::seek(from, SeekFrom::Hole(data))?;
        let (mut read, mut write) = (data, data);
        while read < at {
            let length = usize::try_from(at - read).unwrap_or(usize::MAX);
            match rustix::fs::copy_file_range(from, Some(&mut read), to, Some(&mut write), length) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                // From one file system to another, not every kernel does it.
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                    copy_through(from, to, read, at)?;
                    (read, write) = (at, at);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

fn copy_through(from: &File, to: &File, mut at: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    while at < end {
        let length = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
        let chunk = &mut buffer[..length];
        from.read_exact_at(chunk, at)?;
        to.write_all_at(chunk, at)?;
        at += length as u64;
    }
    Ok(())
}

/// Whether a file can be opened past the page cache; some file systems cannot.
pub(crate) fn supports_direct(path: &Path) -> bool {
    let flags = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).unwrap_or(0);
    File::options().read(true).custom_flags(flags).open(path).is_ok()
}

fn free_space(dir: &Path) -> io::Result<ByteSize> {
    let stat = rustix::fs::statvfs(dir)?;
    Ok(ByteSize::from_bytes(stat.f_bavail.saturating_mul(stat.f_frsize)))
}

/// What the guest finds where nothing was ever written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holes {
    AreZero,
    AreNoise,
}

/// Makes an empty file system.
pub(crate) async fn format(mkfs: &Path, image: &Path, holes: Holes) -> Result<(), VmError> {
    // Tables are written when the guest needs them; the root belongs to the guest's root, whoever runs this.
    let mut options = "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0".to_owned();
    if holes == Holes::AreNoise {
        // What it discards it takes for zeros, and notes so in the file system.
        options.push_str(",nodiscard");
    }
    let output = Command::new(mkfs)
        .args(["-q", "-F", "-m", "0", "-L", LABEL, "-E", &options])
        .arg(image)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(VmError::io("run", mkfs))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(VmError::ToolFailed { tool: MKFS, log: said.trim().chars().take(2000).collect() })
}

/// A new file beside the one to come; gone when dropped, unless renamed.
pub(crate) struct Temporary(PathBuf, pub(crate) File);

impl Temporary {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn new(beside: &Path) -> Result<Self, VmError> {
        let mut name = beside.as_os_str().to_owned();
        name.push(format!(".new{}", std::process::id()));
        let path = PathBuf::from(name);
        let file = File::options().read(true).write(true).create(true).truncate(true).mode(0o600).open(&path);
        Ok(Self(path.clone(), file.map_err(VmError::io("create", path))?))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After the rename there is nothing of this name.
        let _ = fs::remove_file(&self.0);
    }
}
