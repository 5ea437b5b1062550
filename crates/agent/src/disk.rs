//! The data disk grows: its file system follows, while it is in use.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::Path,
};

use crate::cmdline::Disks;

/// `EXT4_IOC_RESIZE_FS` of the kernel's `fs/ext4/ext4.h`.
const RESIZE: libc::Ioctl = 0x4008_6610_u32 as libc::Ioctl;
const MOUNTED_AT: &str = "/data";
/// Where an ext4 file system has its superblock, and in it what [`blocks`] reads: the kernel's
/// `Documentation/filesystems/ext4/super.rst`.
const SUPERBLOCK: u64 = 1024;
const BLOCKS_LOW: usize = 0x04;
const LOG_BLOCK_SIZE: usize = 0x18;
const BLOCKS_HIGH: usize = 0x150;

/// Has the file system on the data disk use all of the disk, which has `least` bytes at least. Nothing happens if it does.
pub(crate) fn grow(least: u64) -> io::Result<()> {
    let cmdline = std::fs::read_to_string("/proc/cmdline")?;
    let disks = Disks::parse(&cmdline).map_err(io::Error::other)?;
    let mut device = File::open(Path::new("/dev").join(&disks.data))?;
    let size = device.seek(SeekFrom::End(0))?;
    if size < least {
        // The kernel hears of a new size a moment after QEMU has it.
        return Err(io::Error::other("the disk has not grown yet"));
    }
    let mut superblock = [0; 1024];
    device.read_exact_at(&mut superblock, SUPERBLOCK)?;
    let (has, block) = blocks(&superblock);
    let blocks = size / block;
    // Asking for what is there takes the kernel a while, too.
    if has == blocks {
        return Ok(());
    }
    let mounted = File::open(MOUNTED_AT)?;
    // SAFETY: the kernel reads one number, which lives through the call.
    match unsafe { libc::ioctl(mounted.as_raw_fd(), RESIZE, &raw const blocks) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// How many blocks a file system has, and their size in bytes.
fn blocks(superblock: &[u8; 1024]) -> (u64, u64) {
    let word = |at: usize| {
        let bytes = superblock[at..at + 4].try_into().unwrap_or_default();
        u64::from(u32::from_le_bytes(bytes))
    };
    (word(BLOCKS_HIGH) << 32 | word(BLOCKS_LOW), 1024 << word(LOG_BLOCK_SIZE).min(16))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_file_system_tells_its_size() {
        let disk = std::env::temp_dir().join(format!("clan-agent-disk-{}", std::process::id()));
        for (size, block) in [(64 << 20, 1024), (6 << 40, 4096)] {
            let _ = std::fs::remove_file(&disk);
            File::create(&disk).unwrap().set_len(size).unwrap();
            let made = Command::new("mkfs.ext4")
                .args(["-q", "-F", "-O", "64bit", "-E", "lazy_itable_init=1", "-N", "1024", "-b", &block.to_string()])
                .arg(&disk)
                .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
                .status();
            assert!(made.unwrap().success());
            let mut superblock = [0; 1024];
            File::open(&disk).unwrap().read_exact_at(&mut superblock, SUPERBLOCK).unwrap();
            assert_eq!(blocks(&superblock), (size / block, block));
        }
        std::fs::remove_file(&disk).unwrap();
    }
}
