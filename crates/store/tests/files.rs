//! Atomic, versioned and secret files.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

use clan_store::{SecretFile, StoreError, atomic_write, create_private_dir, read_versioned_json, write_versioned_json};
use serde::{Deserialize, Serialize};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    colour: String,
    count: u32,
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_write_replaces_the_whole_content_and_sets_the_mode() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    atomic_write(&path, b"long content", 0o644).unwrap();
    assert_eq!(mode(&path), 0o644);
    atomic_write(&path, b"new", 0o600).unwrap();
    assert_eq!((fs::read(&path).unwrap().as_slice(), mode(&path)), (b"new".as_slice(), 0o600));
    assert_eq!(names(dir.path()), ["file"]);
}

#[test]
fn a_write_that_fails_names_the_file_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing/file");
    let error = atomic_write(&missing, b"x", 0o600).unwrap_err();
    assert_eq!(error.kind(), Some(std::io::ErrorKind::NotFound));
    assert_eq!(error.to_string(), format!("cannot write {}", missing.display()));
    let taken = dir.path().join("taken");
    fs::create_dir(&taken).unwrap();
    assert!(atomic_write(&taken, b"x", 0o600).is_err());
    assert_eq!(names(dir.path()), ["taken"]);
}

#[test]
fn versioned_files_round_trip_and_are_private() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("settings.json");
    assert_eq!(read_versioned_json::<Settings>(&path).unwrap(), None);
    let settings = Settings { colour: "green".into(), count: 3 };
    write_versioned_json(&path, &settings).unwrap();
    assert!(fs::read_to_string(&path).unwrap().contains("\"version\": 1"));
    assert_eq!(mode(&path), 0o600);
    assert_eq!(read_versioned_json(&path).unwrap(), Some(settings));
}

#[test]
fn a_file_that_cannot_be_understood_is_kept_aside() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("settings.json");
    let contents = ["", "{", "[]", "{}", "{\"version\":0}", "{\"version\":1,\"colour\":3}", "\u{0}"];
    for (n, content) in contents.into_iter().enumerate() {
        fs::write(&path, content).unwrap();
        let Err(StoreError::Corrupt { kept, .. }) = read_versioned_json::<Settings>(&path) else {
            panic!("{content:?} was accepted");
        };
        assert_eq!(fs::read_to_string(kept).unwrap(), content);
        assert_eq!(names(dir.path()).len(), n + 1, "each is kept under a name of its own");
        assert_eq!(read_versioned_json::<Settings>(&path).unwrap(), None);
    }
}

#[test]
fn a_file_from_a_newer_program_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("settings.json");
    fs::write(&path, "{\"version\":2,\"other\":true}").unwrap();
    let error = read_versioned_json::<Settings>(&path).unwrap_err();
    assert!(matches!(error, StoreError::NewerVersion { found: 2, .. }));
    assert!(path.exists());
}

#[test]
fn a_secret_is_made_once_and_read_by_its_owner_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("machine.key");
    let made = SecretFile::load_or_create(&path).unwrap();
    let read = SecretFile::load_or_create(&path).unwrap();
    assert_eq!(made.expose(), read.expose());
    assert_ne!(made.expose(), SecretFile::load_or_create(&dir.path().join("other.key")).unwrap().expose());
    assert_eq!((mode(&path), names(dir.path()).len()), (0o600, 2));
    assert_eq!(format!("{made:?}"), "Secret(…)");
}

#[test]
fn a_secret_that_others_can_read_is_refused_until_it_is_restricted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("machine.key");
    let made = SecretFile::load_or_create(&path).unwrap();
    for exposed in [0o640, 0o604, 0o660] {
        fs::set_permissions(&path, fs::Permissions::from_mode(exposed)).unwrap();
        let error = SecretFile::load_or_create(&path).unwrap_err();
        assert!(matches!(error, StoreError::Exposed { mode, .. } if mode == exposed));
    }
    SecretFile::restrict(&path).unwrap();
    assert_eq!(SecretFile::load(&path).unwrap().unwrap().expose(), made.expose());
}

#[test]
fn a_damaged_secret_is_refused_and_stays_in_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("machine.key");
    SecretFile::load_or_create(&path).unwrap();
    let whole = fs::read(&path).unwrap();
    let mut flipped = whole.clone();
    flipped[20] ^= 1;
    for damaged in [&whole[..whole.len() - 1], &flipped, b"", &[whole.as_slice(), b"x"].concat()] {
        fs::write(&path, damaged).unwrap();
        assert!(matches!(SecretFile::load_or_create(&path), Err(StoreError::DamagedSecret { .. })));
        assert_eq!(fs::read(&path).unwrap(), damaged);
    }
}

#[test]
fn secrets_made_at_the_same_time_are_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("machine.key");
    let secrets: Vec<[u8; 32]> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..8).map(|_| scope.spawn(|| *SecretFile::load_or_create(&path).unwrap().expose())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(secrets.iter().all(|secret| *secret == secrets[0]));
    assert_eq!(names(dir.path()), ["machine.key"]);
}

#[test]
fn a_private_directory_is_private_even_if_it_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("a/b");
    create_private_dir(&inner).unwrap();
    assert_eq!((mode(&inner), mode(&dir.path().join("a"))), (0o700, 0o700));
    fs::set_permissions(&inner, fs::Permissions::from_mode(0o755)).unwrap();
    create_private_dir(&inner).unwrap();
    assert_eq!(mode(&inner), 0o700);
    fs::write(dir.path().join("file"), "").unwrap();
    assert!(create_private_dir(&dir.path().join("file")).is_err());
    symlink(&inner, dir.path().join("link")).unwrap();
    create_private_dir(&dir.path().join("link")).unwrap();
}
