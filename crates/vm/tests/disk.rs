//! Data disks, with the real `mkfs.ext4`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
};

use clan_types::ByteSize;
use clan_vm::{VmError, create_data_disk};

#[tokio::test]
async fn a_new_disk_is_sparse_private_and_labelled() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("clans/x/data.ext4");
    create_data_disk(&path, ByteSize::from_mib(512)).await.unwrap();
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(metadata.len(), 512 << 20);
    assert!(metadata.blocks() * 512 < 64 << 20, "{} blocks", metadata.blocks());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    let mut superblock = [0; 1024];
    fs::File::open(&path).unwrap().read_exact_at(&mut superblock, 1024).unwrap();
    assert_eq!(superblock[0x38..0x3a], [0x53, 0xef]);
    assert_eq!(&superblock[0x78..0x78 + 10], b"clan-data\0");
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing is left beside it");
}

#[tokio::test]
async fn an_existing_disk_is_never_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.ext4");
    fs::write(&path, "precious").unwrap();
    let error = create_data_disk(&path, ByteSize::from_mib(64)).await.expect_err("it exists");
    assert!(matches!(&error, VmError::Io { source, .. } if source.kind() == ErrorKind::AlreadyExists), "{error:?}");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

#[tokio::test]
async fn a_disk_that_cannot_fit_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.ext4");
    let error = create_data_disk(&path, "900T".parse().unwrap()).await.expect_err("too large");
    assert!(matches!(error, VmError::NoSpace { .. }), "{error:?}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_failed_format_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let error = create_data_disk(&folder.path().join("d"), ByteSize::from_bytes(512)).await.expect_err("too small");
    assert!(matches!(error, VmError::ToolFailed { .. }), "{error:?}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}
