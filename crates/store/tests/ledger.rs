//! The ledger's file.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests")]

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    process::Command,
};

use clan_ledger::{Body, Entry, Ledger};
use clan_store::{LedgerStore, SealKey, StoreError};
use clan_types::{ByteSize, ClanId, ImageId, Timestamp};
use ed25519_dalek::SigningKey;

fn clan(entries: usize) -> (ClanId, Vec<Entry>) {
    let key = SigningKey::from_bytes(&[1; 32]);
    let now = Timestamp::from_millis(1_800_000_000_000);
    let (mut ledger, first) =
        Ledger::found(&key, "family".parse().unwrap(), "ada".parse().unwrap(), [7; 32], now).unwrap();
    let mut all = vec![first];
    while all.len() < entries {
        let description = clan_ledger::VmDescription {
            image: ImageId::from_bytes([9; 32]),
            title: "x".repeat(200).parse().unwrap(),
            memory: ByteSize::from_mib(512),
            cpus: 1,
            disk: ByteSize::from_mib(4096),
        };
        let entry = ledger.author(&key, Body::Publish { description }, now).unwrap();
        ledger.insert(entry.clone()).unwrap();
        all.push(entry);
    }
    (ledger.clan(), all)
}

fn ids(ledger: &Ledger) -> Vec<clan_types::EntryId> {
    ledger.entries().map(Entry::id).collect()
}

fn open_error(path: &Path, clan: &ClanId) -> StoreError {
    LedgerStore::open(path, clan).expect_err("it does not open")
}

#[test]
fn what_was_appended_is_there_after_opening_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.redb");
    let (id, all) = clan(20);
    let store = LedgerStore::open(&path, &id).unwrap();
    assert!(store.load().unwrap().is_empty());
    for entry in &all {
        store.append(entry).unwrap();
    }
    store.append_all(&all).unwrap();
    assert!(matches!(open_error(&path, &id), StoreError::InUse { .. }), "one process at a time");
    drop(store);
    let ledger = LedgerStore::open(&path, &id).unwrap().load().unwrap();
    assert_eq!(ids(&ledger), all.iter().map(Entry::id).collect::<Vec<_>>());
    assert!(ledger.state().published.is_some());
    let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["ledger.redb"], "nothing is left behind");
}

#[test]
fn what_was_sealed_loads_and_what_somebody_else_put_there_is_verified() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.redb");
    let (id, all) = clan(20);
    let key = SealKey::derive(&[1; 32]);
    LedgerStore::open_sealed(&path, &id, key.clone()).unwrap().append_all(&all).unwrap();
    let load = |key: &SealKey| LedgerStore::open_sealed(&path, &id, key.clone()).and_then(|store| store.load());
    assert_eq!(ids(&load(&key).unwrap()), all.iter().map(Entry::id).collect::<Vec<_>>());
    assert_eq!(load(&SealKey::derive(&[2; 32])).unwrap().len(), 20, "without a seal that fits each is verified");
    // Somebody who can write the file, but has not the key, puts an entry there that nobody signed.
    let mut forged = all[19].encode();
    let last = forged.len() - 1;
    forged[last] ^= 1;
    forge(&path, &forged, blake3::hash(&forged).as_bytes());
    assert!(matches!(load(&key), Err(StoreError::Corrupt { .. })), "it is noticed, and the file is kept aside");
    assert!(load(&key).unwrap().is_empty());
}

/// Adds an entry to the file as somebody would who knows how it is made, with the seal of another one.
fn forge(path: &Path, bytes: &[u8], id: &[u8; 32]) {
    let entries = redb::TableDefinition::<&[u8; 32], &[u8]>::new("entries");
    let seals = redb::TableDefinition::<&[u8; 32], &[u8; 16]>::new("seals");
    let meta = redb::TableDefinition::<&str, &[u8]>::new("meta");
    let database = redb::Database::open(path).unwrap();
    let write = database.begin_write().unwrap();
    {
        use redb::ReadableTable as _;
        let mut seals = write.open_table(seals).unwrap();
        let seal = *seals.iter().unwrap().next().unwrap().unwrap().1.value();
        seals.insert(id, &seal).unwrap();
        let mut entries = write.open_table(entries).unwrap();
        entries.insert(id, bytes).unwrap();
        write.open_table(meta).unwrap().insert("count", 21u64.to_le_bytes().as_slice()).unwrap();
    }
    write.commit().unwrap();
}

#[test]
fn another_clans_file_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.redb");
    let (id, all) = clan(3);
    LedgerStore::open(&path, &id).unwrap().append_all(&all).unwrap();
    let foreign = open_error(&path, &ClanId::from_bytes([5; 32]));
    assert!(matches!(foreign, StoreError::ForeignClan { found, .. } if found == id));
    assert_eq!(LedgerStore::open(&path, &id).unwrap().load().unwrap().len(), 3);
}

/// Opens a damaged copy: either everything that was acknowledged is there, or the file is kept aside and reported.
fn opens_whole_or_is_kept(path: &Path, content: &[u8], id: &ClanId, acknowledged: usize) -> bool {
    fs::write(path, content).unwrap();
    match LedgerStore::open(path, id).and_then(|store| store.load()) {
        Ok(ledger) => {
            assert!(ledger.len() >= acknowledged, "{} of {acknowledged} entries, and no complaint", ledger.len());
            true
        }
        Err(StoreError::Corrupt { kept, .. }) => {
            assert!(fs::metadata(&kept).unwrap().len() >= content.len() as u64, "what is left of it is kept");
            assert!(!path.exists(), "a damaged file is out of the way");
            fs::remove_file(kept).unwrap();
            assert_eq!(LedgerStore::open(path, id).unwrap().load().unwrap().len(), 0, "and a new one can begin");
            false
        }
        Err(error) => panic!("{error}: {error:?}"),
    }
}

#[test]
fn a_truncated_file_opens_whole_or_is_kept_aside() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.redb");
    let (id, all) = clan(400);
    let store = LedgerStore::open(&path, &id).unwrap();
    let mut running = Vec::new();
    for (n, entry) in all.iter().enumerate() {
        store.append(entry).unwrap();
        if [5, 200, 399].contains(&n) {
            // As a killed process leaves it.
            running.push((n + 1, fs::read(&path).unwrap()));
        }
    }
    drop(store);
    running.push((all.len(), fs::read(&path).unwrap()));
    let copy = dir.path().join("copy.redb");
    for (acknowledged, content) in running {
        assert!(opens_whole_or_is_kept(&copy, &content, &id, acknowledged), "uncut, it opens");
        for part in 0..16 {
            opens_whole_or_is_kept(&copy, &content[..content.len() * part / 16], &id, acknowledged);
        }
        for cut in [1, 511, 4095, 4096, 4097] {
            opens_whole_or_is_kept(&copy, &content[..content.len() - cut], &id, acknowledged);
        }
        for end in [1, 64, 320, 4096] {
            opens_whole_or_is_kept(&copy, &content[..end], &id, acknowledged);
        }
    }
}

#[test]
fn a_file_with_a_page_of_garbage_opens_whole_or_is_kept_aside() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.redb");
    let (id, all) = clan(100);
    LedgerStore::open(&path, &id).unwrap().append_all(&all).unwrap();
    let content = fs::read(&path).unwrap();
    let copy = dir.path().join("copy.redb");
    let mut refused = 0;
    for page in (0..content.len().min(400_000)).step_by(4096) {
        for fill in [0x00, 0xa5] {
            let mut damaged = content.clone();
            let end = damaged.len().min(page + 4096);
            damaged[page..end].fill(fill);
            refused += usize::from(!opens_whole_or_is_kept(&copy, &damaged, &id, all.len()));
        }
    }
    assert!(refused > 10, "only {refused} damaged files were noticed");
}

#[test]
fn appends_survive_the_death_of_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.redb");
    let (id, all) = clan(60);
    let store = LedgerStore::open(&path, &id).unwrap();
    let copy = dir.path().join("copy.redb");
    for (n, entry) in all.iter().enumerate() {
        store.append(entry).unwrap();
        fs::copy(&path, &copy).unwrap();
        let ledger = LedgerStore::open(&copy, &id).unwrap().load().unwrap();
        assert_eq!(ledger.len(), n + 1);
    }
}

/// Set in the child that runs inside its own mount namespace, where this directory is a small file system.
const SMALL: &str = "CLAN_TEST_SMALL_FILE_SYSTEM";

#[test]
fn on_a_full_disk_nothing_acknowledged_is_lost_and_writing_goes_on_once_there_is_room() {
    if let Some(dir) = std::env::var_os(SMALL) {
        return fill_and_recover(&PathBuf::from(dir));
    }
    let dir = tempfile::tempdir().unwrap();
    // Root needs no user namespace, which not every kernel and container allows.
    let how = if fs::metadata("/proc/self").is_ok_and(|me| std::os::unix::fs::MetadataExt::uid(&me) == 0) {
        "-m"
    } else {
        "-Urm"
    };
    let script = "mount -t tmpfs -o size=2m tmpfs \"$0\" && exec \"$@\"";
    let probe = Command::new("unshare").args([how, "sh", "-c", script]).arg(dir.path()).arg("true").output();
    if !probe.as_ref().is_ok_and(|output| output.status.success()) {
        assert_ne!(how, "-m", "root can mount a small file system: {probe:?}");
        eprintln!("skipped: no user and mount namespace for a small file system: {probe:?}");
        return;
    }
    let output = Command::new("unshare")
        .args([how, "sh", "-c", script])
        .arg(dir.path())
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "--nocapture",
            "on_a_full_disk_nothing_acknowledged_is_lost_and_writing_goes_on_once_there_is_room",
        ])
        .env(SMALL, dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("went on after"), "{said}");
}

fn fill_and_recover(dir: &Path) {
    let ballast = dir.join("ballast");
    fs::write(&ballast, vec![0; 200_000]).unwrap();
    let path = dir.join("ledger.redb");
    let (id, all) = clan(3000);
    let store = LedgerStore::open(&path, &id).unwrap();
    let mut stored = 0;
    let error = loop {
        match store.append(&all[stored]) {
            Ok(()) => stored += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), Some(ErrorKind::StorageFull), "{error:?}");
    assert_eq!(error.path(), path);
    assert!(store.append(&all[stored]).is_err(), "still full");
    drop(store);
    // A file cannot be opened for writing without room for its repair; it is never taken for a damaged one.
    match LedgerStore::open(&path, &id) {
        Ok(store) => assert!(store.load().unwrap().len() >= stored),
        Err(error) => assert_eq!(error.kind(), Some(ErrorKind::StorageFull), "{error:?}"),
    }
    let json = clan_store::write_versioned_json(&dir.join("x.json"), &serde_json_object(200_000)).unwrap_err();
    assert_eq!(json.kind(), Some(ErrorKind::StorageFull), "{json:?}");
    fs::remove_file(&ballast).unwrap();
    let store = LedgerStore::open(&path, &id).unwrap();
    let ledger = store.load().unwrap();
    assert!(ledger.len() >= stored, "{} of {stored}", ledger.len());
    store.append(&all[stored]).unwrap();
    assert!(store.load().unwrap().len() > stored);
    let names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["ledger.redb"], "nothing half-written is left");
    drop(store);
    fs::remove_file(&path).unwrap();
    full_at_every_size(dir);
    println!("went on after {stored} entries");
}

/// With every amount of room from none on: what was acknowledged is there, and work goes on once there is room.
fn full_at_every_size(dir: &Path) {
    const STEP: usize = 8192;
    let (id, all) = clan(12);
    let (path, ballast, json) = (dir.join("small.redb"), dir.join("ballast"), dir.join("small.json"));
    let (mut refused, mut whole) = (0, 0);
    for room in (0..140).map(|step| step * STEP) {
        fs::write(&ballast, b"").unwrap();
        let mut fill = fs::OpenOptions::new().append(true).open(&ballast).unwrap();
        while std::io::Write::write_all(&mut fill, &[0; STEP]).is_ok() {}
        let length = fs::metadata(&ballast).unwrap().len();
        fill.set_len(length.saturating_sub(room as u64)).unwrap();
        drop(fill);
        let small = serde_json_object(2000);
        let json_written = clan_store::write_versioned_json(&json, &small);
        let mut stored = 0;
        let worked = LedgerStore::open(&path, &id).and_then(|store| {
            for entry in &all {
                store.append(entry)?;
                stored += 1;
            }
            Ok(())
        });
        match &worked {
            Ok(()) => whole += 1,
            Err(error) => {
                assert_eq!(error.kind(), Some(ErrorKind::StorageFull), "{room} bytes of room: {error:?}");
                refused += 1;
            }
        }
        fs::remove_file(&ballast).unwrap();
        let store = LedgerStore::open(&path, &id).unwrap();
        assert!(store.load().unwrap().len() >= stored, "{room} bytes of room");
        store.append_all(&all).unwrap();
        assert_eq!(store.load().unwrap().len(), all.len());
        let read: Option<std::collections::BTreeMap<String, String>> = clan_store::read_versioned_json(&json).unwrap();
        assert_eq!(read.is_some(), json_written.is_ok(), "a file is there whole or not at all");
        drop(store);
        for file in fs::read_dir(dir).unwrap().map(|file| file.unwrap().path()) {
            let name = file.file_name().unwrap().to_string_lossy().into_owned();
            assert!(["small.redb", "small.json"].contains(&name.as_str()), "{name} is left");
        }
        let _ = (fs::remove_file(&path), fs::remove_file(&json));
    }
    assert!(refused > 10 && whole > 10, "refused {refused} times, whole {whole} times");
}

fn serde_json_object(size: usize) -> std::collections::BTreeMap<&'static str, String> {
    [("text", "x".repeat(size))].into()
}
