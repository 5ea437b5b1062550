//! Encrypted disks, as the real QEMU opens them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod guest;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
};

use clan_types::{ByteSize, Passphrase};
use clan_vm::{ExitReason, Vm, VmError, VmSpec, change_passphrase, create_encrypted_disk};
use guest::{LIMIT, Then, adopted, spec, started};
use tokio::time::timeout;

const RIGHT: &str = "correct horse";

/// A guest that does nothing, with an encrypted disk.
async fn encrypted(folder: &Path) -> VmSpec {
    let spec = spec(folder, &Then::Halt);
    fs::remove_file(&spec.data_disk).unwrap();
    let passphrase: Passphrase = RIGHT.parse().unwrap();
    create_encrypted_disk(&spec.data_disk, ByteSize::from_mib(24), &passphrase).await.unwrap();
    VmSpec { passphrase: Some(passphrase), ..spec }
}

/// Has QEMU read or write the disk as the guest does; what it says is in its log when it has ended.
async fn has(vm: &Vm, command: &str) {
    let all = vm.qmp().execute("query-block", serde_json::Value::Null).await.unwrap();
    let disk = all.as_array().unwrap().iter().find(|disk| disk["inserted"]["node-name"] == "data").unwrap();
    let line = format!("qemu-io -d {} \"{command}\"", disk["qdev"].as_str().unwrap());
    vm.qmp().execute("human-monitor-command", serde_json::json!({ "command-line": line })).await.unwrap();
}

async fn ended(spec: &VmSpec, vm: guest::Running) -> String {
    assert_eq!(vm.quit(LIMIT).await.reason, ExitReason::Quit);
    fs::read_to_string(spec.dir.join("qemu.log")).unwrap()
}

#[tokio::test]
async fn a_guest_sees_a_plain_disk_and_the_base_os_none() {
    let folder = tempfile::tempdir().unwrap();
    let spec = encrypted(folder.path()).await;
    let meta = fs::metadata(&spec.data_disk).unwrap();
    assert_eq!((meta.len(), meta.permissions().mode() & 0o777), (26 << 20, 0o600));
    assert!(meta.blocks() * 512 < 8 << 20, "{} blocks", meta.blocks());
    let drafts =
        fs::read_dir(folder.path()).unwrap().flatten().filter(|e| e.file_name().to_string_lossy().contains(".new"));
    assert_eq!(drafts.count(), 0, "nothing is left beside it");

    let vm = started(&spec).await;
    // The passphrase is nowhere that others can see.
    let proc = format!("/proc/{}", vm.pid());
    for file in ["cmdline", "environ"] {
        let text = fs::read(format!("{proc}/{file}")).unwrap();
        assert!(!text.windows(RIGHT.len()).any(|w| w == RIGHT.as_bytes()), "it is in {file}");
    }
    // The file system's mark, its label, and what is written.
    has(&vm, "read -P 0x53 1080 1").await;
    has(&vm, "read -P 0xef 1081 1").await;
    has(&vm, "read -P 0x63 1144 1").await;
    has(&vm, "write -P 0xa5 1048576 65536").await;
    vm.grow_data_disk(ByteSize::from_mib(32)).await.unwrap();
    has(&vm, "write -P 0x5a 31457280 4096").await;
    let said = ended(&spec, vm).await;
    assert_eq!(said.matches("bytes at offset").count(), 5, "{said}");
    assert!(!said.contains("ailed"), "{said}");
    assert_eq!(fs::metadata(&spec.data_disk).unwrap().len(), 34 << 20);
    let file = fs::read(&spec.data_disk).unwrap();
    for plain in [&[0xa5; 512][..], &[0x5a; 512], b"clan-data"] {
        assert!(!file.windows(plain.len()).any(|w| w == plain), "{:?} is in the clear", &plain[..9]);
    }

    // The next one, and one that its manager found.
    let vm = started(&spec).await;
    has(&vm, "read -P 0xa5 1048576 65536").await;
    vm.leave();
    let vm = adopted(&spec.dir).await;
    has(&vm, "read -P 0x5a 31457280 4096").await;
    let said = ended(&spec, vm).await;
    assert_eq!(said.matches("bytes at offset").count(), 2, "{said}");
    assert!(!said.contains("ailed"), "{said}");
    assert!(!spec.dir.join("console.log").exists(), "what a guest says on its console is not written down");
}

#[tokio::test]
async fn a_wrong_passphrase_starts_nothing_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let right = encrypted(folder.path()).await;
    let before = fs::read(&right.data_disk).unwrap();
    let wrong = VmSpec { passphrase: Some("correct house".parse().unwrap()), ..right.clone() };
    let refused = timeout(LIMIT, Vm::start(wrong)).await.unwrap();
    assert!(matches!(refused, Err(VmError::WrongPassphrase { .. })), "{refused:?}");
    assert!(Vm::adopt(&right.dir).await.unwrap().is_none());
    assert!(fs::read(&right.data_disk).unwrap() == before);
    started(&right).await.quit(LIMIT).await;
}

#[tokio::test]
async fn a_passphrase_changes_under_a_guest_that_goes_on_and_the_next_one_needs_the_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let before = encrypted(folder.path()).await;
    let vm = started(&before).await;
    has(&vm, "write -P 0xa5 1048576 65536").await;
    let new: Passphrase = "battery staple".parse().unwrap();
    let (disk, said) = (before.data_disk.clone(), new.clone());
    let change = move || change_passphrase(&disk, &RIGHT.parse().unwrap(), &said);
    tokio::task::spawn_blocking(change).await.unwrap().unwrap();
    has(&vm, "write -P 0x5a 2097152 4096").await;
    let said = ended(&before, vm).await;
    assert!(said.matches("bytes at offset").count() == 2 && !said.contains("ailed"), "{said}");

    let refused = timeout(LIMIT, Vm::start(before.clone())).await.unwrap();
    assert!(matches!(refused, Err(VmError::WrongPassphrase { .. })), "{refused:?}");
    let after = VmSpec { passphrase: Some(new), ..before };
    let vm = started(&after).await;
    for read in ["read -P 0xa5 1048576 65536", "read -P 0x5a 2097152 4096", "read -P 0x53 1080 1"] {
        has(&vm, read).await;
    }
    let said = ended(&after, vm).await;
    assert!(said.matches("bytes at offset").count() == 3 && !said.contains("ailed"), "{said}");
}

#[tokio::test]
async fn an_encrypted_disk_that_cannot_fit_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.ext4");
    let passphrase: Passphrase = RIGHT.parse().unwrap();
    let refused = create_encrypted_disk(&path, "900T".parse().unwrap(), &passphrase).await;
    assert!(matches!(refused, Err(VmError::NoSpace { .. })), "{refused:?}");
    fs::write(&path, "precious").unwrap();
    assert!(create_encrypted_disk(&path, ByteSize::from_mib(64), &passphrase).await.is_err());
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}
