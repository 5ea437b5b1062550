//! A process that works on an image store is killed at each of its steps: before every call that changes the file system, one
//! run for each. What it said is so afterwards, and nothing stands in the way of the next. Needs strace.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::Command,
};

use clan_build::ImageStore;
use clan_types::{ByteSize, FileHash, ImageId};
use clan_wire::{
    image::{FileRole, ImageFile, Manifest},
    pieces::{PIECE, Pieces},
};
use rustix::process::Signal;

/// Set in the child: the store's directory.
const STORE: &str = "CLAN_TEST_IMAGE_STORE_TO_WORK_ON";
/// Whatever the store may change the file system by. One that it does not use costs one run.
const CALLS: [&str; 18] = [
    "mkdir",
    "openat",
    "link",
    "linkat",
    "write",
    "pwrite64",
    "copy_file_range",
    "sendfile",
    "splice",
    "ftruncate",
    "fsync",
    "rename",
    "renameat",
    "renameat2",
    "unlink",
    "unlinkat",
    "rmdir",
    "flock",
];
/// The old image, the one that comes in, and one of which something is there and no more ever comes.
const OLD: u8 = 11;
const NEW: u8 = 12;
const GIVEN_UP: u8 = 13;

/// The contents of an image's files; those of the kernel and the initramfs are the same in all.
fn contents(n: u8) -> [(FileRole, Vec<u8>); 4] {
    [
        (FileRole::Kernel, vec![1; 700]),
        (FileRole::Initramfs, vec![2; 300]),
        (FileRole::Root, vec![n; PIECE + 1000]),
        (FileRole::Layer, vec![n; 5000]),
    ]
}

fn manifest(n: u8) -> Manifest {
    let file = |(role, content): &(FileRole, Vec<u8>)| ImageFile {
        role: *role,
        size: ByteSize::from_bytes(content.len() as u64),
        hash: FileHash::from_bytes(*blake3::hash(content).as_bytes()),
    };
    Manifest {
        version: 1,
        title: format!("image {n}"),
        architecture: "x86_64".into(),
        inputs: FileHash::from_bytes([n; 32]),
        memory_min: ByteSize::from_mib(1),
        files: contents(n).iter().map(file).collect(),
    }
}

fn id(n: u8) -> ImageId {
    manifest(n).id().unwrap()
}

/// Puts an image together as a transfer does, and says of each step that it is done.
fn put(store: &ImageStore, n: u8, mut say: impl FnMut(&str)) {
    let incoming = store.begin(manifest(n)).unwrap();
    say("begun");
    for (role, content) in contents(n) {
        let file = incoming.files().into_iter().find(|file| file.role == role).unwrap();
        if file.is_complete() {
            continue;
        }
        let part = PathBuf::from(format!("{}.part", file.path.display()));
        let mut arriving = fs::File::create(&part).unwrap();
        for half in content.chunks(content.len().div_ceil(2)) {
            arriving.write_all(half).unwrap();
        }
        fs::rename(&part, &file.path).unwrap();
        say(&format!("{role:?}"));
    }
    incoming.finish().unwrap();
    say("finished");
}

/// All that a store goes through.
fn work(store: &ImageStore) {
    let mut out = std::io::stdout();
    let mut say = |what: &str| {
        out.write_all(format!("done: {what}\n").as_bytes()).unwrap();
        out.flush().unwrap();
    };
    put(store, NEW, &mut say);
    store.get(&id(NEW)).unwrap().pieces().unwrap();
    say("pieces");
    store.gc(&[id(NEW)]).unwrap();
    say("collected");
}

#[test]
#[ignore = "run by the test below, which kills it"]
fn child() {
    work(&ImageStore::open(std::env::var_os(STORE).unwrap()).unwrap());
}

/// A store with a whole image and the beginning of another.
fn prepared() -> (tempfile::TempDir, ImageStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path().join("images")).unwrap();
    put(&store, OLD, |_| ());
    let begun = store.begin(manifest(GIVEN_UP)).unwrap();
    fs::write(&begun.files()[3].path, b"not much").unwrap();
    drop(begun);
    (dir, store)
}

/// Runs the child until it is about to make this call for the `n`th time. Gives what it said; `None` if it got to its end.
fn until(call: &str, n: usize, store: &ImageStore) -> Option<BTreeSet<String>> {
    let output = Command::new("strace")
        .args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}")])
        .args(["-e", &format!("inject={call}:signal=SIGKILL:when={n}")])
        .arg(std::env::current_exe().unwrap())
        .args(["child", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env(STORE, store.dir())
        .output()
        .expect("strace is installed: `make deps` does it");
    if output.status.success() {
        return None;
    }
    let killed = output.status.signal() == Some(Signal::KILL.as_raw());
    assert!(killed, "{call} {n}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8(output.stdout).unwrap();
    // The harness writes the test's name in front of the first.
    Some(said.lines().filter_map(|line| line.split("done: ").nth(1)).map(str::to_owned).collect())
}

fn names(dir: &Path) -> BTreeSet<String> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn check(store: &ImageStore, said: &BTreeSet<String>, at: &str) {
    let store = ImageStore::open(store.dir()).unwrap();
    let said = |what: &str| said.contains(what);
    let listed: Vec<ImageId> = store.list().iter().map(|image| image.id).collect();
    for id in &listed {
        // Never one that is not whole.
        store.verify(id).unwrap_or_else(|error| panic!("{at}: {error}"));
    }
    assert!(!(said("collected") && listed.contains(&id(OLD))), "{at}: what was collected is there");
    assert!(said("pieces") || listed.contains(&id(OLD)), "{at}: an image went before anybody collected");
    if listed.contains(&id(NEW)) {
        assert!(said("Layer"), "{at}: it is complete before its last file has arrived");
        assert!(!store.dir().join(format!(".incoming-{}", id(NEW))).exists(), "{at}");
    } else {
        assert!(!said("finished"), "{at}: what was finished is not there");
        let incoming = store.begin(manifest(NEW)).unwrap_or_else(|error| panic!("{at}: {error}"));
        for file in incoming.files() {
            let shared = matches!(file.role, FileRole::Kernel | FileRole::Initramfs);
            let arrived = said(&format!("{:?}", file.role));
            assert!(file.is_complete() || !(shared || arrived), "{at}: {:?} is to be fetched again", file.role);
        }
        drop(incoming);
        put(&store, NEW, |_| ());
    }
    // Whether its list of pieces was there, or half of it, or not.
    let new = store.get(&id(NEW)).unwrap();
    let mut pieces = &*new.pieces().unwrap();
    for file in &new.manifest.files {
        let size = file.size.as_bytes();
        let (list, rest) = pieces.split_at(usize::try_from(Pieces::encoded_len(size)).unwrap());
        Pieces::decode(list, size, &file.hash).unwrap_or_else(|error| panic!("{at}: {error}"));
        pieces = rest;
    }
    store.gc(&[id(NEW)]).unwrap();
    assert_eq!(names(store.dir()), BTreeSet::from([id(NEW).to_string()]), "{at}: something is never collected");
    store.verify(&id(NEW)).unwrap();
}

#[test]
fn killed_at_any_step_a_store_keeps_what_it_said_and_goes_on() {
    let mut kills = 0;
    let mut ends = BTreeSet::new();
    for call in CALLS {
        for n in 1.. {
            let (_dir, store) = prepared();
            let Some(said) = until(call, n, &store) else { break };
            kills += 1;
            ends.insert(said.len());
            check(&store, &said, &format!("killed before {call} number {n}, having said {said:?}"));
        }
    }
    println!("killed {kills} times");
    // Begun, two files, finished, pieces, collected: killed within every one of them.
    assert!((0..=5).all(|count| ends.contains(&count)), "only after {ends:?} of six steps");
    assert!(kills > 50, "{kills}");
}
