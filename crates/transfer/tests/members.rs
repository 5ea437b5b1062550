//! Images from several members, over real endpoints on loopback and real files: with members that die, lie, or say nothing.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

mod common;

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex},
};

use clan_transfer::{Event, FetchError, fetch};
use clan_types::FileHash;
use clan_wire::pieces::PIECE;
use common::{Image, LIMIT, Member, ROOT, Then, endpoint, take};
use tempfile::TempDir;

/// Counts what members were asked for, so that one can wait for another.
#[derive(Default)]
struct Turns {
    asked: Mutex<BTreeSet<&'static str>>,
    changed: Condvar,
}

impl Turns {
    fn note(&self, who: &'static str) {
        self.asked.lock().unwrap().insert(who);
        self.changed.notify_all();
    }

    fn until(&self, who: &'static str) {
        let asked = self.asked.lock().unwrap();
        let (asked, _) = self.changed.wait_timeout_while(asked, LIMIT, |asked| !asked.contains(who)).unwrap();
        assert!(asked.contains(who), "{who} is asked for a piece meanwhile");
    }
}

fn liar(events: &[Event]) -> Vec<&str> {
    let lied = events.iter().filter_map(|e| match e {
        Event::Lied { name, .. } => Some(name.as_str()),
        _ => None,
    });
    lied.collect()
}

/// A copy of the image's disks with one byte changed.
fn forged(image: &Image, disk: &str, at: u64) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["boot", "root"] {
        fs::copy(image.dir.path().join(name), dir.path().join(name)).unwrap();
    }
    let file = fs::OpenOptions::new().read(true).write(true).open(dir.path().join(disk)).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    dir
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_members_give_an_image_at_once() {
    let (image, into, turns) = (Image::new(), tempfile::tempdir().unwrap(), Arc::new(Turns::default()));
    // Each goes on after some pieces only if the other one is asked, too.
    let waits = |me: &'static str, other: &'static str| {
        let turns = turns.clone();
        move |before: usize| {
            turns.note(me);
            if before == 5 {
                turns.until(other);
            }
            Then::Answer
        }
    };
    let alice = Member::new("alice", image.held(image.dir.path()), waits("alice", "bob")).await;
    let bob = Member::new("bob", image.held(image.dir.path()), waits("bob", "alice")).await;
    let (taken, events) = take(&image, into.path(), &[&alice, &bob]).await;
    let taken = taken.unwrap();
    image.assert_whole(into.path());
    assert_eq!(taken.values().sum::<u64>(), image.count());
    assert!(taken["alice"] >= 5 && taken["bob"] >= 5, "{taken:?}");
    assert_eq!(events, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_member_that_dies_midway_is_made_up_for_by_the_other() {
    let (image, into, turns) = (Image::new(), tempfile::tempdir().unwrap(), Arc::new(Turns::default()));
    let dying = {
        let turns = turns.clone();
        move |before| {
            if before == 12 {
                turns.note("dead");
                return Then::Die;
            }
            Then::Answer
        }
    };
    let waiting = move |before| {
        if before == 1 {
            turns.until("dead");
        }
        Then::Answer
    };
    let alice = Member::new("alice", image.held(image.dir.path()), dying).await;
    let bob = Member::new("bob", image.held(image.dir.path()), waiting).await;
    let (taken, events) = take(&image, into.path(), &[&alice, &bob]).await;
    let taken = taken.unwrap();
    image.assert_whole(into.path());
    assert!(taken["alice"] <= 13, "{taken:?}");
    assert!(matches!(&events[0], Event::Failed { name, .. } if name == "alice"), "{events:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_member_that_says_nothing_is_not_waited_for() {
    let (image, into, turns) = (Image::new(), tempfile::tempdir().unwrap(), Arc::new(Turns::default()));
    let silent = {
        let turns = turns.clone();
        move |before| {
            if before == 4 {
                turns.note("silent");
                // Longer than the whole test may take; ends with it.
                turns.until("over");
            }
            Then::Answer
        }
    };
    let waiting = {
        let turns = turns.clone();
        move |before| {
            if before == 1 {
                turns.until("silent");
            }
            Then::Answer
        }
    };
    let alice = Member::new("alice", image.held(image.dir.path()), silent).await;
    let bob = Member::new("bob", image.held(image.dir.path()), waiting).await;
    let (taken, _) = take(&image, into.path(), &[&alice, &bob]).await;
    turns.note("over");
    let taken = taken.unwrap();
    image.assert_whole(into.path());
    assert!(taken.get("alice").copied().unwrap_or(0) <= 4, "{taken:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_liar_is_named_and_left_at_its_first_wrong_piece() {
    for (disk, at) in [("boot", 0), ("boot", 3 * PIECE as u64 + 5), ("root", 0), ("root", ROOT as u64 - 1)] {
        let (image, into) = (Image::new(), tempfile::tempdir().unwrap());
        let false_disks = forged(&image, disk, at);
        let mallory = Member::new("mallory", image.held(false_disks.path()), |_| Then::Answer).await;
        let alone = take(&image, into.path(), &[&mallory]).await;
        assert!(
            matches!(&alone.0, Err(FetchError::NoSource { liars, .. }) if liars == &["mallory"]),
            "{disk} {at}: {:?}",
            alone.0
        );
        assert_eq!(liar(&alone.1), ["mallory"], "named once: {disk} {at}");

        // Beside an honest one it is found out again, or not needed any more.
        let bob = Member::new("bob", image.held(image.dir.path()), |_| Then::Answer).await;
        take(&image, into.path(), &[&mallory, &bob]).await.0.unwrap();
        image.assert_whole(into.path());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_false_list_of_pieces_is_a_lie() {
    let (image, into) = (Image::new(), tempfile::tempdir().unwrap());
    let mut false_list = Image { pieces: image.pieces.clone(), ..Image::new() };
    false_list.pieces[40] ^= 1;
    let mallory = Member::new("mallory", false_list.held(image.dir.path()), |_| Then::Answer).await;
    let (taken, events) = take(&image, into.path(), &[&mallory]).await;
    assert!(matches!(taken, Err(FetchError::NoSource { .. })), "{taken:?}");
    assert_eq!(liar(&events), ["mallory"]);
    assert_eq!(mallory.asked(), 0, "no piece was asked for");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn after_a_cut_only_what_is_missing_or_damaged_is_fetched() {
    let (image, into) = (Image::new(), tempfile::tempdir().unwrap());
    let dying = |before| if before == 20 { Then::Die } else { Then::Answer };
    let alice = Member::new("alice", image.held(image.dir.path()), dying).await;
    // The computer that fetches goes off: nothing of the attempt is left but its files.
    {
        let here = endpoint().await;
        let (source, arrived) = (alice.source(), tokio::sync::Notify::new());
        let report = |event| {
            if let Event::Progress { here, .. } = event
                && here > 10 * PIECE as u64
            {
                arrived.notify_one();
            }
        };
        let sources = [source];
        tokio::select! {
            _ = fetch(&here, &sources, None, image.wanted(into.path()), report) => {}
            () = arrived.notified() => {}
        }
        here.close().await;
    }
    let genuine = |path: PathBuf, content: &[u8]| {
        let found = fs::read(path).unwrap();
        content.chunks(PIECE).zip(found.chunks(PIECE)).filter(|(a, b)| a == b).count()
    };
    let root = into.path().join("Root.part");
    let kept: usize = [("Kernel.part", 0), ("Initramfs.part", 1), ("Root.part", 2)]
        .map(|(name, i)| genuine(into.path().join(name), &image.files[i]))
        .iter()
        .sum();
    assert!(kept >= 10, "{kept}");
    // And the disk forgot something of what it had.
    let file = fs::OpenOptions::new().write(true).open(&root).unwrap();
    file.write_all_at(&[!image.files[2][100]], 100).unwrap();

    let bob = Member::new("bob", image.held(image.dir.path()), |_| Then::Answer).await;
    let (taken, _) = take(&image, into.path(), &[&bob]).await;
    let taken = taken.unwrap();
    image.assert_whole(into.path());
    assert_eq!(taken["bob"], image.count() - kept as u64 + 1, "{taken:?}, kept {kept}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_member_without_the_image_is_asked_once() {
    let (image, into) = (Image::new(), tempfile::tempdir().unwrap());
    let other = Image { files: vec![], ..Image::new() };
    let mut manifest = other.manifest.clone();
    manifest.files.iter_mut().for_each(|f| f.hash = FileHash::from_bytes([9; 32]));
    let other = Image { manifest, ..other };
    let eve = Member::new("eve", other.held(image.dir.path()), |_| Then::Answer).await;
    let (taken, events) = take(&image, into.path(), &[&eve]).await;
    assert!(matches!(taken, Err(FetchError::NoSource { last: Some(_), .. })));
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(fs::read_dir(into.path()).unwrap().count(), 0, "nothing half-made is left");
}
