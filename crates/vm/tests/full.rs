//! A disk that is full, or fills up in the middle: a small file system in a namespace of the test's own.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod guest;

use std::{fs, io::ErrorKind, os::unix::fs::FileExt, path::Path};

use clan_cramped::Disk;
use clan_types::ByteSize;
use clan_vm::{Begin, ExitReason, VmError, VmSpec, copy_data_disk, create_data_disk, create_encrypted_disk};
use guest::{LIMIT, Then, says_r, spec, started, write_console};
use tokio::time::timeout;

#[test]
fn a_full_disk_is_told_and_leaves_nothing_half_made() {
    clan_cramped::run("on_a_small_disk");
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by the test above, in a namespace"]
async fn on_a_small_disk() {
    let small = Disk::mounted(ByteSize::from_mib(24));
    let full = small.path();
    let disk = full.join("data.ext4");
    let told = |outcome: Result<(), VmError>| {
        assert!(matches!(&outcome, Err(VmError::NoSpace { path, .. }) if *path == disk), "{outcome:?}");
    };

    // More than is free is refused before; what fills up meanwhile is found out.
    let passphrase = "correct horse".parse().unwrap();
    told(create_data_disk(&disk, ByteSize::from_mib(64)).await);
    told(create_encrypted_disk(&disk, ByteSize::from_mib(64), &passphrase).await);
    assert!(names(full).is_empty());
    let source = tempfile::tempdir().unwrap();
    let source = source.path().join("source");
    fs::File::create(&source).unwrap().write_all_at(&vec![7; 32 << 20], 0).unwrap();
    told(copy_data_disk(&source, &disk).map(drop));
    assert!(names(full).is_empty());

    // The beginning of an encrypted disk alone takes as much as is left.
    small.fill(ByteSize::from_bytes(260 << 10));
    told(create_encrypted_disk(&disk, ByteSize::from_bytes(256 << 10), &passphrase).await);
    assert_eq!(names(full), ["filling"]);
    small.relieve();

    // A guest's state that does not fit is not kept, and the guest goes on.
    let outside = tempfile::tempdir().unwrap();
    let spec = VmSpec { begin: Begin::BootToSave, ..spec(outside.path(), &Then::PowerOffWhenTold) };
    let vm = started(&spec).await;
    says_r(&vm).await;
    small.fill(ByteSize::from_bytes(16 << 10));
    let saved = vm.save(&full.join("state")).await;
    let is_full = matches!(&saved, Err(VmError::Io { source, .. }) if source.kind() == ErrorKind::StorageFull);
    assert!(is_full, "{saved:?}");
    assert_eq!(names(full), ["filling"]);
    vm.resume().await.unwrap();
    write_console(&vm).await;
    assert_eq!(timeout(LIMIT, vm.wait_exit()).await.unwrap().reason, ExitReason::PoweredOff);
}
