//! The data disk grows: its file system follows, while it is in use.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::fd::AsRawFd,
    path::Path,
};

use crate::cmdline::Disks;

/// `EXT4_IOC_RESIZE_FS` of the kernel's `fs/ext4/ext4.h`.
const RESIZE: libc::Ioctl = 0x4008_6610_u32 as libc::Ioctl;
const MOUNTED_AT: &str = "/data";

/// Has the file system on the data disk use all of the disk, which has `least` bytes at least. Nothing happens if it does.
pub(crate) fn grow(least: u64) -> io::Result<()> {
    let cmdline = std::fs::read_to_string("/proc/cmdline")?;
    let disks = Disks::parse(&cmdline).map_err(io::Error::other)?;
    let size = File::open(Path::new("/dev").join(&disks.data))?.seek(SeekFrom::End(0))?;
    if size < least {
        // The kernel hears of a new size a moment after QEMU has it.
        return Err(io::Error::other("the disk has not grown yet"));
    }
    let mounted = File::open(MOUNTED_AT)?;
    let stat = rustix::fs::fstatfs(&mounted)?;
    let block = u64::try_from(stat.f_bsize).ok().filter(|block| *block > 0).ok_or(io::ErrorKind::InvalidData)?;
    let blocks = size / block;
    // SAFETY: the kernel reads one number, which lives through the call.
    match unsafe { libc::ioctl(mounted.as_raw_fd(), RESIZE, &raw const blocks) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
