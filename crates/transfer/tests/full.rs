//! A disk that fills up while an image arrives: a small file system in a namespace of the test's own.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

mod common;

use clan_cramped::Disk;
use clan_transfer::FetchError;
use clan_types::ByteSize;
use common::{Image, Member, Then, take};

#[test]
fn a_full_disk_is_said_and_what_arrived_counts_once_there_is_room() {
    clan_cramped::run("on_a_small_disk");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "run by the test above, in a namespace"]
async fn on_a_small_disk() {
    let image = Image::new();
    let small = Disk::mounted(ByteSize::from_mib(6));
    let into = small.path();
    let alice = Member::new("alice", image.held(image.dir.path()), |_| Then::Answer).await;
    let (outcome, events) = take(&image, into, &[&alice]).await;
    let Err(FetchError::Io { source, path }) = outcome else { panic!("{outcome:?}") };
    assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
    assert!(path.starts_with(into), "{}", path.display());
    assert_eq!(events, [], "nobody else is blamed");
    // There is room: nothing that arrived comes again.
    small.resize(ByteSize::from_mib(64));
    let asked = alice.asked() as u64;
    let taken = take(&image, into, &[&alice]).await.0.unwrap();
    image.assert_whole(into);
    assert!(taken["alice"] < image.count() && asked > 10, "{taken:?} after {asked}");
}
