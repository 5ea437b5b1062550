//! Guests whose state is saved, and that go on from it: with QEMU, and guests of a few bytes.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod guest;

use std::{fs, path::Path};

use clan_vm::{Begin, ExitReason, Vm, VmError, VmSpec, copy_data_disk};
use guest::{LIMIT, Then, adopted, says_r, spec, started, write_console};
use tokio::time::timeout;

/// A guest to be saved, and the file for its state.
fn to_save(folder: &Path) -> (VmSpec, std::path::PathBuf) {
    let state = folder.join("state");
    let spec = VmSpec { begin: Begin::BootToSave, ..spec(folder, &Then::PowerOffWhenTold) };
    (spec, state)
}

/// Another guest, in the state of the first.
fn from(first: &VmSpec, state: &Path, name: &str) -> VmSpec {
    let folder = first.dir.parent().unwrap();
    let data_disk = folder.join(format!("data-{name}"));
    copy_data_disk(&first.data_disk, &data_disk).unwrap();
    VmSpec { dir: folder.join(name), data_disk, begin: Begin::Saved(state.into()), ..first.clone() }
}

#[tokio::test]
async fn two_guests_go_on_where_one_was_saved_and_so_does_that_one() {
    let folder = tempfile::tempdir().unwrap();
    let (first, state) = to_save(folder.path());
    let vm = started(&first).await;
    says_r(&vm).await;
    assert!(!vm.is_paused().await.unwrap());
    vm.save(&state).await.unwrap();
    assert!(vm.is_paused().await.unwrap());
    let (one, two) = (from(&first, &state, "one"), from(&first, &state, "two"));
    vm.resume().await.unwrap();
    let copies = [started(&one).await, started(&two).await];
    for vm in [&vm, &copies[0], &copies[1]] {
        assert!(!vm.is_paused().await.unwrap());
        write_console(vm).await;
        assert_eq!(timeout(LIMIT, vm.wait_exit()).await.unwrap().reason, ExitReason::PoweredOff);
    }
    // Neither has booted, which would have been heard.
    assert_eq!(copies[0].console_tail(5).unwrap() + &copies[1].console_tail(5).unwrap(), "");
}

#[tokio::test]
async fn a_state_that_is_cut_off_or_damaged_starts_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (first, state) = to_save(folder.path());
    let vm = started(&first).await;
    says_r(&vm).await;
    vm.save(&state).await.unwrap();
    vm.quit(LIMIT).await;
    let whole = fs::read(&state).unwrap();
    let mut scrambled = whole.clone();
    scrambled[4] ^= 0xff;
    let copy = from(&first, &state, "copy");
    for bad in [&whole[..whole.len() / 2], &whole[..0], &scrambled] {
        fs::write(&state, bad).unwrap();
        let refused = timeout(LIMIT, Vm::start(copy.clone())).await.unwrap();
        assert!(matches!(refused, Err(VmError::DiedAtStart { .. })), "{refused:?}");
        assert!(Vm::adopt(&copy.dir).await.unwrap().is_none());
    }
    fs::write(&state, whole).unwrap();
    started(&copy).await.quit(LIMIT).await;
}

#[tokio::test]
async fn a_machine_that_was_left_while_paused_is_found_paused() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path(), &Then::PowerOffWhenTold);
    let vm = started(&spec).await;
    says_r(&vm).await;
    vm.pause().await.unwrap();
    vm.leave();
    let vm = adopted(&spec.dir).await;
    assert!(vm.is_paused().await.unwrap());
    // And may be saved by whoever finds it; not over another file.
    let state = folder.path().join("state");
    vm.save(&state).await.unwrap();
    assert!(matches!(vm.save(&state).await, Err(VmError::Io { .. })));
    vm.resume().await.unwrap();
    write_console(&vm).await;
    assert_eq!(timeout(LIMIT, vm.wait_exit()).await.unwrap().reason, ExitReason::PoweredOff);
}

#[test]
fn a_copied_disk_has_the_holes_of_the_first() {
    use std::os::unix::fs::{FileExt, MetadataExt};
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    let file = fs::File::create(&from).unwrap();
    file.set_len(64 << 20).unwrap();
    for at in [0, 5 << 20, (64 << 20) - 4096] {
        file.write_all_at(&[at as u8 | 1; 4096], at).unwrap();
    }
    copy_data_disk(&from, &to).unwrap();
    assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
    assert!(fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20, "it takes no more room");
    assert!(matches!(copy_data_disk(&from, &to), Err(VmError::Io { .. })), "nothing is replaced");
}

#[test]
fn a_disk_is_copied_to_another_file_system_too() {
    use std::os::unix::fs::{FileExt, MetadataExt};
    let here = tempfile::tempdir().unwrap();
    // Not everywhere another file system; here the copy is the same in any case.
    let Ok(there) = tempfile::tempdir_in("/dev/shm") else { return };
    let (from, to) = (here.path().join("from"), there.path().join("to"));
    let file = fs::File::create(&from).unwrap();
    file.set_len(32 << 20).unwrap();
    for at in [0, 5 << 20, (32 << 20) - 4096] {
        file.write_all_at(&[at as u8 | 1; 4096], at).unwrap();
    }
    copy_data_disk(&from, &to).unwrap();
    assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
    assert!(fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20, "it takes no more room");
}
