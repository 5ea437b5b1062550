//! What QEMU may touch on the base OS, tried by a program in its place.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod guest;

use std::{fs, os::unix::fs::PermissionsExt};

use clan_vm::{Qemu, Vm, VmError, has_fence};
use guest::{LIMIT, Then, spec};
use tokio::time::timeout;

/// Answers as QEMU does when it is asked which machines it knows, and where its files are; then tries this and that, and ends.
const SCRIPT: &str = r#"#!/bin/sh
case "$*" in "-machine help") echo "pc-q35-7.2 a machine"; exit;; "-L help") exit;; esac
try() { if sh -c "$2" 2>/dev/null; then echo "$1: yes"; else echo "$1: no"; fi; }
{
try "writes to its folder" ': >inside && rm inside'
try "writes to its disk" ": >>'DISK'"
try "reads its image" "cat 'KERNEL' >/dev/null"
try "reads the system's files" "cat /etc/passwd >/dev/null"
try "writes to its image" ": >>'KERNEL'"
try "reads another's disk" "cat 'OTHER/data' >/dev/null"
try "writes beside its folder" ": >'OTHER/new'"
try "removes another's disk" "rm -f 'OTHER/data' && ! test -e 'OTHER/data'"
} >tried
"#;

#[tokio::test]
async fn qemu_touches_its_own_files_and_no_others() {
    if !has_fence() {
        // Such a kernel is not what is tested here.
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut spec = spec(folder.path(), &Then::Halt);
    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("data"), "secret").unwrap();
    let program = folder.path().join("bin/qemu-in-its-place");
    fs::create_dir(program.parent().unwrap()).unwrap();
    let script = SCRIPT
        .replace("DISK", spec.data_disk.to_str().unwrap())
        .replace("KERNEL", spec.image.kernel.to_str().unwrap())
        .replace("OTHER", other.to_str().unwrap());
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    spec.qemu = Qemu::At(program);
    let ended = timeout(LIMIT, Vm::start(spec.clone())).await.unwrap();
    assert!(matches!(ended, Err(VmError::DiedAtStart { .. })), "{ended:?}");
    let tried = fs::read_to_string(spec.dir.join("tried")).unwrap();
    let outcomes: Vec<_> = tried.lines().map(|line| line.rsplit_once(": ").unwrap().1).collect();
    assert_eq!(outcomes, ["yes", "yes", "yes", "yes", "no", "no", "no", "no"], "{tried}");
    assert_eq!(fs::read(other.join("data")).unwrap(), b"secret");
}
