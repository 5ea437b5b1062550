//! A process that appends to a ledger and says so is killed, again and again.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::{
    collections::{BTreeSet, hash_map::RandomState},
    hash::BuildHasher,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use clan_ledger::{Body, Entry, Ledger};
use clan_store::LedgerStore;
use clan_types::{ByteSize, EntryId, ImageId, Timestamp};
use ed25519_dalek::SigningKey;

/// So often a process is killed, in each of [`PARTS`] tests that run beside each other.
const KILLS: usize = 500 / PARTS;
const PARTS: usize = 4;
/// So many of them work on one file, the first on one that is not there yet.
const PER_FILE: usize = 10;
/// Set in the child: the ledger's file.
const FILE: &str = "CLAN_TEST_LEDGER_TO_APPEND_TO";
const NOW: Timestamp = Timestamp::from_millis(1_800_000_000_000);

fn key() -> SigningKey {
    SigningKey::from_bytes(&[1; 32])
}

fn founding() -> (Ledger, Entry) {
    Ledger::found(&key(), "family".parse().unwrap(), "ada".parse().unwrap(), [7; 32], NOW).unwrap()
}

/// Appends for ever, and says of each entry that it is there.
fn append(path: &Path) {
    let (founded, first) = founding();
    let store = LedgerStore::open(path, &founded.clan()).unwrap();
    let mut ledger = store.load().unwrap();
    if ledger.is_empty() {
        store.append(&first).unwrap();
        ledger.insert(first).unwrap();
    }
    let mut out = std::io::stdout();
    loop {
        // Of many sizes, and now and then several at once.
        let mut batch = Vec::new();
        for _ in 0..=(ledger.len() % 7) / 3 {
            let description = clan_ledger::VmDescription {
                image: ImageId::from_bytes([9; 32]),
                title: "x".repeat(ledger.len() * 31 % 200).parse().unwrap(),
                memory: ByteSize::from_mib(512),
                cpus: 1,
                disk: ByteSize::from_mib(4096),
            };
            let entry = ledger.author(&key(), Body::Publish { description }, NOW).unwrap();
            ledger.insert(entry.clone()).unwrap();
            batch.push(entry);
        }
        store.append_all(&batch).unwrap();
        for entry in &batch {
            writeln!(out, "\nack {}", entry.id()).unwrap();
        }
        out.flush().unwrap();
    }
}

fn spawn(path: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "what_appends_until_it_is_killed"])
        .env(FILE, path)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Numbers that differ from run to run: the kernel's scheduling does so anyway.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

#[test]
fn what_appends_until_it_is_killed() {
    if let Some(path) = std::env::var_os(FILE) {
        append(&PathBuf::from(path));
    }
}

#[test]
fn a_killed_process_loses_nothing_that_it_acknowledged() {
    kill_and_look();
}

#[test]
fn nor_does_a_second_one() {
    kill_and_look();
}

#[test]
fn nor_a_third() {
    kill_and_look();
}

#[test]
fn nor_a_fourth() {
    kill_and_look();
}

fn kill_and_look() {
    // What a process wrote outlives it in any file system; one in memory does not make us wait for a disk.
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let clan = founding().0.clan();
    let mut dice = Dice(RandomState::new().hash_one(0u8));
    let mut total = 0;
    for file in 0..KILLS.div_ceil(PER_FILE) {
        let path = dir.path().join(format!("ledger-{file}.redb"));
        let mut acknowledged: BTreeSet<EntryId> = BTreeSet::new();
        for round in 0..PER_FILE {
            let mut child = spawn(&path);
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            let take = |line: Option<std::io::Result<String>>, acknowledged: &mut BTreeSet<EntryId>| {
                let line = line?.ok()?;
                if let Some(id) = line.strip_prefix("ack ") {
                    // A last line may have been cut.
                    acknowledged.extend(id.parse::<EntryId>().ok());
                }
                Some(())
            };
            // A third are killed at any moment of their start, the making of the file included.
            if dice.below(3) > 0 {
                let wanted = acknowledged.len() + usize::try_from(dice.below(12)).unwrap() + 1;
                while acknowledged.len() < wanted && take(lines.next(), &mut acknowledged).is_some() {}
                std::thread::sleep(Duration::from_micros(dice.below(1500)));
            } else {
                std::thread::sleep(Duration::from_micros(dice.below(25_000)));
            }
            child.kill().unwrap();
            child.wait().unwrap();
            // What it had said and nobody had read yet counts as well.
            while take(lines.next(), &mut acknowledged).is_some() {}
            if path.exists() {
                let ledger = LedgerStore::open(&path, &clan).and_then(|store| store.load());
                let ledger = ledger.unwrap_or_else(|error| panic!("kill {round} of file {file}: {error:?}"));
                let found: BTreeSet<_> = ledger.entries().map(Entry::id).collect();
                let lost: Vec<_> = acknowledged.difference(&found).collect();
                assert!(lost.is_empty(), "kill {round} of file {file} lost {lost:?}");
            } else {
                assert!(acknowledged.is_empty(), "kill {round} of file {file} lost the whole file");
            }
        }
        total += acknowledged.len();
    }
    assert!(total > KILLS, "only {total} entries were acknowledged: nothing was tested");
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains("corrupt")), "{left:?}");
}
