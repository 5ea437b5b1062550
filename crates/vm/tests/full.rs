//! A disk that is full, or fills up in the middle: a small file system in a namespace of the test's own.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod guest;

use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use clan_types::ByteSize;
use clan_vm::{Begin, ExitReason, VmError, VmSpec, copy_data_disk, create_data_disk, create_encrypted_disk};
use guest::{LIMIT, Then, says_r, spec, started, write_console};
use tokio::time::timeout;

const FOLDER: &str = "CLAN_TEST_FULL_DISK";

#[test]
fn a_full_disk_is_told_and_leaves_nothing_half_made() {
    let dir = tempfile::tempdir().unwrap();
    let ran = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "on_a_small_disk", "--ignored", "--nocapture"])
        .env(FOLDER, dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success() && said.contains("1 passed"), "{said}");
}

fn mount(options: &str, at: &Path) {
    assert!(Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(at).status().unwrap().success());
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Takes room, all but so many KiB.
fn fill(folder: &Path, but: u64) {
    let free = rustix::fs::statvfs(folder).map(|s| s.f_bavail * s.f_frsize).unwrap();
    fs::write(folder.join("filling"), vec![1; usize::try_from(free - (but << 10)).unwrap()]).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by the test above, in a namespace"]
async fn on_a_small_disk() {
    let full: PathBuf = std::env::var_os(FOLDER).unwrap().into();
    mount("size=24m", &full);
    let disk = full.join("data.ext4");
    let told = |outcome: Result<(), VmError>| {
        assert!(matches!(&outcome, Err(VmError::NoSpace { path, .. }) if *path == disk), "{outcome:?}");
    };

    // More than is free is refused before; what fills up meanwhile is found out.
    let passphrase = "correct horse".parse().unwrap();
    told(create_data_disk(&disk, ByteSize::from_mib(64)).await);
    told(create_encrypted_disk(&disk, ByteSize::from_mib(64), &passphrase).await);
    assert!(names(&full).is_empty());
    let source = tempfile::tempdir().unwrap();
    let source = source.path().join("source");
    fs::File::create(&source).unwrap().write_all_at(&vec![7; 32 << 20], 0).unwrap();
    told(copy_data_disk(&source, &disk).map(drop));
    assert!(names(&full).is_empty());

    // The beginning of an encrypted disk alone takes as much as is left.
    fill(&full, 260);
    told(create_encrypted_disk(&disk, ByteSize::from_bytes(256 << 10), &passphrase).await);
    assert_eq!(names(&full), ["filling"]);
    fs::remove_file(full.join("filling")).unwrap();

    // A guest's state that does not fit is not kept, and the guest goes on.
    let outside = tempfile::tempdir().unwrap();
    let spec = VmSpec { begin: Begin::BootToSave, ..spec(outside.path(), &Then::PowerOffWhenTold) };
    let vm = started(&spec).await;
    says_r(&vm).await;
    fill(&full, 16);
    let saved = vm.save(&full.join("state")).await;
    let is_full = matches!(&saved, Err(VmError::Io { source, .. }) if source.kind() == ErrorKind::StorageFull);
    assert!(is_full, "{saved:?}");
    assert_eq!(names(&full), ["filling"]);
    vm.resume().await.unwrap();
    write_console(&vm).await;
    assert_eq!(timeout(LIMIT, vm.wait_exit()).await.unwrap().reason, ExitReason::PoweredOff);
}
