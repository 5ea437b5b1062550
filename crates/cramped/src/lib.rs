//! Tests on a disk that is full, or fills up in the middle. Such a test is two: one that everybody runs, and one that it runs
//! again, in namespaces of its own, where it may mount a small file system.
//!
//! ```no_run
//! // #[test]
//! fn a_full_disk_is_told() {
//!     clan_cramped::run("on_a_small_disk");
//! }
//!
//! // #[test]
//! // #[ignore = "run by the test above, in a namespace"]
//! fn on_a_small_disk() {
//!     let full = clan_cramped::Disk::mounted(clan_types::ByteSize::from_mib(6));
//!     full.fill(clan_types::ByteSize::default());
//! }
//! ```
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use clan_types::ByteSize;

const FOLDER: &str = "CLAN_TEST_FULL_DISK";

/// Runs an ignored test of this test program, by its whole name, in namespaces of its own.
///
/// # Panics
/// When it fails, or there is no such test.
pub fn run(test: &str) {
    let dir = tempfile::tempdir().unwrap();
    let ran = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env(FOLDER, dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success() && said.contains("1 passed"), "{said}");
}

/// A file system of a few MiB. It goes with the namespace that it is mounted in.
#[derive(Debug)]
pub struct Disk(PathBuf);

impl Disk {
    /// Mounts an empty one, in a test that [`run`] runs.
    ///
    /// # Panics
    /// When something else runs the test, or the kernel does not mount it.
    pub fn mounted(size: ByteSize) -> Self {
        let folder = std::env::var_os(FOLDER).expect("the test is run by another one, in a namespace");
        let disk = Self(folder.into());
        disk.mount("", size);
        disk
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes it larger, or as small as what is on it.
    ///
    /// # Panics
    /// When the kernel refuses.
    pub fn resize(&self, size: ByteSize) {
        self.mount("remount,", size);
    }

    /// Takes all the room that is left, but for so much, by a file `filling` on it.
    ///
    /// # Panics
    /// When so much is not left.
    pub fn fill(&self, but: ByteSize) {
        let free = rustix::fs::statvfs(&self.0).map(|s| s.f_bavail * s.f_frsize).unwrap();
        let taken = free.checked_sub(but.as_bytes()).unwrap();
        fs::write(self.filling(), vec![1; usize::try_from(taken).unwrap()]).unwrap();
    }

    /// Gives back what [`Self::fill`] took.
    ///
    /// # Panics
    /// When it has taken nothing.
    pub fn relieve(&self) {
        fs::remove_file(self.filling()).unwrap();
    }

    fn filling(&self) -> PathBuf {
        self.0.join("filling")
    }

    fn mount(&self, how: &str, size: ByteSize) {
        let options = format!("{how}size={}", size.as_bytes());
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&self.0).status();
        assert!(mounted.unwrap().success());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_as_small_as_asked_and_goes_with_its_namespace() {
        run("tests::on_a_small_disk");
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(std::env::var_os(FOLDER).is_none() && !mounts.contains("size=4096k"), "{mounts}");
    }

    #[test]
    #[ignore = "run by the test above, in a namespace"]
    fn on_a_small_disk() {
        let disk = Disk::mounted(ByteSize::from_mib(4));
        let file = disk.path().join("file");
        assert!(fs::write(&file, vec![0; 5 << 20]).is_err());
        fs::remove_file(&file).unwrap();
        disk.fill(ByteSize::from_bytes(64 << 10));
        assert!(fs::write(&file, vec![0; 128 << 10]).is_err());
        disk.relieve();
        disk.resize(ByteSize::from_mib(8));
        fs::write(&file, vec![0; 5 << 20]).unwrap();
    }
}
