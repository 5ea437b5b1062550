//! The ledger's store on a disk that fails at every single write.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeSet;

use clan_ledger::{Body, Entry, Ledger};
use clan_sim::disk::Disk;
use clan_store::{LedgerStore, StoreError};
use clan_types::{ByteSize, ClanId, EntryId, ImageId, Timestamp};
use ed25519_dalek::SigningKey;

const BATCHES: usize = 8;

fn clan() -> (ClanId, Vec<Vec<Entry>>) {
    let key = SigningKey::from_bytes(&[1; 32]);
    let now = Timestamp::from_millis(1_800_000_000_000);
    let (mut ledger, first) =
        Ledger::found(&key, "family".parse().unwrap(), "ada".parse().unwrap(), [7; 32], now).unwrap();
    let mut batches = vec![vec![first]];
    for batch in 1..BATCHES {
        let mut entries = Vec::new();
        for _ in 0..=batch % 3 {
            let description = clan_ledger::VmDescription {
                image: ImageId::from_bytes([9; 32]),
                title: "x".repeat(200 - batch).parse().unwrap(),
                memory: ByteSize::from_mib(512),
                cpus: 1,
                disk: ByteSize::from_mib(4096),
            };
            let entry = ledger.author(&key, Body::Publish { description }, now).unwrap();
            ledger.insert(entry.clone()).unwrap();
            entries.push(entry);
        }
        batches.push(entries);
    }
    (ledger.clan(), batches)
}

fn found(store: &LedgerStore) -> BTreeSet<EntryId> {
    store.load().unwrap().entries().map(Entry::id).collect()
}

/// Opens and appends until something fails; gives the batches that were acknowledged.
fn work(disk: &Disk, clan: &ClanId, batches: &[Vec<Entry>]) -> (usize, Result<(), StoreError>) {
    let store = match disk.open(clan) {
        Ok(store) => store,
        Err(error) => return (0, Err(error)),
    };
    for (number, batch) in batches.iter().enumerate() {
        if let Err(error) = store.append_all(batch) {
            return (number, Err(error));
        }
    }
    (batches.len(), Ok(()))
}

fn ids(batches: &[Vec<Entry>]) -> BTreeSet<EntryId> {
    batches.iter().flatten().map(Entry::id).collect()
}

#[test]
fn power_that_fails_at_any_write_costs_nothing_that_was_acknowledged() {
    let (clan, batches) = clan();
    let mut tried = 0;
    for fails_at in 1.. {
        let mut outcomes = 0;
        // What of the last writes got to the disk differs from seed to seed: torn pages among them.
        for seed in 0..12 {
            let disk = Disk::new("test", seed);
            disk.fail_power_in(fails_at);
            let (acknowledged, outcome) = work(&disk, &clan, &batches);
            outcomes += usize::from(outcome.is_ok());
            disk.cut_power();
            disk.power_on();
            let store = disk.open(&clan).unwrap_or_else(|e| panic!("write {fails_at}, seed {seed}: {e:?}"));
            let found = found(&store);
            assert!(found.is_superset(&ids(&batches[..acknowledged])), "write {fails_at}, seed {seed}");
            // A batch is there whole or not at all.
            assert!((acknowledged..=batches.len()).any(|whole| found == ids(&batches[..whole])), "write {fails_at}");
            for batch in &batches {
                store.append_all(batch).unwrap();
            }
            assert_eq!(store.load().unwrap().entries().count(), ids(&batches).len());
        }
        tried += 1;
        if outcomes == 12 {
            break;
        }
    }
    assert!(tried > 40, "only {tried} writes");
}

#[test]
fn a_disk_that_is_full_at_any_write_costs_nothing_and_goes_on_once_there_is_room() {
    let (clan, batches) = clan();
    let mut tried = 0;
    for fills_at in 1.. {
        let disk = Disk::new("test", fills_at);
        disk.fill_in(fills_at);
        let store = disk.open(&clan);
        let Ok(store) = store else {
            assert_eq!(store.unwrap_err().kind(), Some(std::io::ErrorKind::StorageFull), "write {fills_at}");
            disk.set_full(false);
            assert!(found(&disk.open(&clan).unwrap()).is_empty());
            continue;
        };
        let mut refused = 0;
        for batch in &batches {
            if let Err(error) = store.append_all(batch) {
                assert_eq!(error.kind(), Some(std::io::ErrorKind::StorageFull), "write {fills_at}: {error:?}");
                refused += 1;
                // As long as there is no room, nothing changes.
                assert!(store.append_all(batch).is_err());
                disk.set_full(false);
                store.append_all(batch).unwrap();
            }
        }
        // Without room it may not even open, and says so.
        disk.set_full(false);
        assert_eq!(found(&store), ids(&batches), "write {fills_at}");
        disk.cut_power();
        disk.power_on();
        assert_eq!(found(&disk.open(&clan).unwrap()), ids(&batches), "write {fills_at}");
        tried += 1;
        if refused == 0 {
            break;
        }
    }
    assert!(tried > 20, "only {tried} writes");
}
