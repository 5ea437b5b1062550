//! Copies of disks on a computer whose own is full: a small file system in a namespace of the test's own.

use std::path::PathBuf;

use clan_cramped::Disk;
use clan_vm::{AccelKind, Qemu};

use super::*;
use crate::{
    record::{ClanRecord, tests},
    template::{Kind, Templates},
};

#[test]
fn a_full_disk_is_told_and_leaves_everything_as_it_was() {
    clan_cramped::run("snapshots::full::on_a_small_disk");
}

/// Every file with its length, but for what a clan's memory of its ledger is in.
fn files(folder: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    for path in disk::list(folder) {
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push((path.clone(), fs::metadata(&path).unwrap().len()));
        }
    }
    found
}

#[tokio::test]
#[ignore = "run by the test above, in a namespace"]
async fn on_a_small_disk() {
    let small = Disk::mounted(ByteSize::from_mib(600));
    let full = small.path();
    let shared = Shared::for_tests(full);
    let record = ClanRecord { disk: ByteSize::from_mib(4), ..tests::record(1, Phase::Ready) };
    let record = ClanRecord { image: Some(ImageId::from_bytes([1; 32])), memory: ByteSize::from_mib(1), ..record };
    tests::put(&shared.paths, &record, None);
    let data = shared.paths.clan(&record.id).data_disk();
    fs::write(&data, vec![1; 4 << 20]).unwrap();
    let clan = shared.adopt(record.clone()).unwrap();
    make(&clan, "whole", None).await.unwrap();
    fs::write(&data, vec![2; 4 << 20]).unwrap();
    let templates = Templates::open(full.join("templates"));
    let staging = templates.begin(Kind::of(&record, AccelKind::Tcg, &Qemu::Search).unwrap()).unwrap();
    fs::write(staging.state(), "state").unwrap();
    // Two disks are there, and no room for a third.
    small.resize(ByteSize::from_mib(10));
    let before = files(full);

    let told = make(&clan, "half", None).await.unwrap_err();
    assert_eq!(told.code, ErrorCode::DiskFull, "{told:?}");
    assert!(told.hints[0].contains("free some space"), "{told:?}");
    assert_eq!(files(full), before);
    assert_eq!(list(&clan).len(), 1);

    let snapshot = find(&clan, "whole").ok().unwrap();
    let told = put_back(&clan, &snapshot).await.unwrap_err();
    assert_eq!(told.code, ErrorCode::DiskFull, "{told:?}");
    assert!(fs::read(&data).unwrap() == vec![2; 4 << 20], "the disk is the one that it was");
    assert!(!clan.record.paths().dir.join(RESTORING).exists());

    staging.commit(&data).unwrap_err();
    assert!(disk::list(&full.join("templates")).is_empty());

    // Not even room for a page: what was written before stays.
    small.fill(ByteSize::default());
    let told = problem::disk(&clan.record.update(|r| r.wanted = true).unwrap_err());
    assert_eq!(told.code, ErrorCode::DiskFull, "{told:?}");
    let on_disk = ClanRecord::load(clan.record.paths()).unwrap();
    assert!(!on_disk.wanted && !clan.record.get().wanted);
    assert_eq!(on_disk, clan.record.get());

    small.resize(ByteSize::from_mib(64));
    small.relieve();
    put_back(&clan, &snapshot).await.unwrap();
    assert!(fs::read(&data).unwrap() == vec![1; 4 << 20]);
}
