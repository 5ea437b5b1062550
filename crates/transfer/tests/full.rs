//! A disk that fills up while an image arrives: a small file system in a namespace of the test's own.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

mod common;

use std::{path::PathBuf, process::Command};

use clan_transfer::FetchError;
use common::{Image, Member, Then, take};

const FOLDER: &str = "CLAN_TEST_FULL_DISK";

#[test]
fn a_full_disk_is_said_and_what_arrived_counts_once_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let ran = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "on_a_small_disk", "--ignored", "--nocapture"])
        .env(FOLDER, dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success() && said.contains("1 passed"), "{said}");
}

fn mount(options: &str, at: &PathBuf) {
    assert!(Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(at).status().unwrap().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "run by the test above, in a namespace"]
async fn on_a_small_disk() {
    let into = PathBuf::from(std::env::var_os(FOLDER).unwrap());
    let image = Image::new();
    mount("size=6m", &into);
    let alice = Member::new("alice", image.held(image.dir.path()), |_| Then::Answer).await;
    let (outcome, events) = take(&image, &into, &[&alice]).await;
    let Err(FetchError::Io { source, path }) = outcome else { panic!("{outcome:?}") };
    assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
    assert!(path.starts_with(&into), "{}", path.display());
    assert_eq!(events, [], "nobody else is blamed");
    // There is room: nothing that arrived comes again.
    mount("remount,size=64m", &into);
    let asked = alice.asked() as u64;
    let taken = take(&image, &into, &[&alice]).await.0.unwrap();
    image.assert_whole(&into);
    assert!(taken["alice"] < image.count() && asked > 10, "{taken:?} after {asked}");
}
