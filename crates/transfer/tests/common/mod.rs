//! An image, and members that give it, over real endpoints on loopback and from real files.
#![allow(dead_code, reason = "each test uses its part")]

use std::{
    fs,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use clan_transfer::{Event, Extent, FetchError, Held, Source, Taken, Wanted, fetch};
use clan_types::{ByteSize, FileHash};
use clan_wire::{
    image::{FileRole, ImageFile, Manifest},
    peer::{ALPN_IMAGE, ImagePart},
    pieces::{PIECE, Pieces, hash_of},
};
use iroh::{Endpoint, EndpointAddr, TransportAddr, endpoint::presets};
use tempfile::TempDir;
use tokio::task::JoinHandle;

pub(crate) const LIMIT: Duration = Duration::from_secs(60);
pub(crate) const ROOT: usize = 60 * PIECE + 777;

fn content(size: usize, seed: usize) -> Vec<u8> {
    (0..size).map(|i| (i.wrapping_mul(131) ^ (i >> 8) ^ seed) as u8).collect()
}

fn pieces_of(content: &[u8]) -> Vec<u8> {
    let size = content.len() as u64;
    content.chunks(PIECE).enumerate().flat_map(|(i, piece)| hash_of(size, i as u64, piece)).collect()
}

/// What a clan runs: the initramfs behind the kernel on one disk, as in a guest.
pub(crate) struct Image {
    pub(crate) dir: TempDir,
    pub(crate) manifest: Manifest,
    pub(crate) pieces: Vec<u8>,
    pub(crate) files: Vec<Vec<u8>>,
}

impl Image {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let files = vec![content(3 * PIECE, 1), content(1234, 2), content(ROOT, 3)];
        fs::write(dir.path().join("boot"), [files[0].clone(), files[1].clone()].concat()).unwrap();
        fs::write(dir.path().join("root"), &files[2]).unwrap();
        let roles = [FileRole::Kernel, FileRole::Initramfs, FileRole::Root];
        let entry = |(role, content): (FileRole, &Vec<u8>)| ImageFile {
            role,
            size: ByteSize::from_bytes(content.len() as u64),
            hash: FileHash::from_bytes(*blake3::hash(content).as_bytes()),
        };
        let manifest = Manifest {
            version: 1,
            title: "test".into(),
            architecture: "x86_64".into(),
            inputs: FileHash::from_bytes([0; 32]),
            memory_min: ByteSize::from_mib(1),
            files: roles.into_iter().zip(&files).map(entry).collect(),
        };
        let pieces = files.iter().flat_map(|content| pieces_of(content)).collect();
        Self { dir, manifest, pieces, files }
    }

    /// As a member holds it whose disks are in this directory.
    pub(crate) fn held(&self, disks: &Path) -> Held {
        Held::new(&self.manifest.encode().unwrap(), &self.pieces, |manifest, file| {
            let (disk, start) = match file.role {
                FileRole::Kernel => ("boot", 0),
                FileRole::Initramfs => ("boot", manifest.file(FileRole::Kernel).unwrap().size.as_bytes()),
                _ => ("root", 0),
            };
            Some(Extent { path: disks.join(disk), start })
        })
        .unwrap()
    }

    pub(crate) fn wanted(&self, into: &Path) -> Vec<Wanted> {
        let name = |file: &ImageFile| into.join(format!("{:?}", file.role));
        let wanted = |file: &ImageFile| Wanted { hash: file.hash, size: file.size.as_bytes(), place: name(file) };
        self.manifest.files.iter().filter(|f| !name(f).exists()).map(wanted).collect()
    }

    pub(crate) fn assert_whole(&self, into: &Path) {
        for (file, content) in self.manifest.files.iter().zip(&self.files) {
            assert!(fs::read(into.join(format!("{:?}", file.role))).unwrap() == *content, "{:?}", file.role);
        }
        assert_eq!(fs::read_dir(into).unwrap().count(), self.files.len(), "nothing else is left");
    }

    pub(crate) fn count(&self) -> u64 {
        self.files.iter().map(|content| Pieces::count(content.len() as u64)).sum()
    }
}

/// What becomes of a request for a piece, by how many came before it.
pub(crate) enum Then {
    Answer,
    /// The member's computer goes off.
    Die,
}

pub(crate) struct Member {
    name: &'static str,
    endpoint: Endpoint,
    asked: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Member {
    pub(crate) async fn new(
        name: &'static str,
        held: Held,
        each: impl Fn(usize) -> Then + Send + Sync + 'static,
    ) -> Self {
        let endpoint = endpoint().await;
        let asked = Arc::new(AtomicUsize::new(0));
        let (held, each) = (Arc::new(held), Arc::new(each));
        let (accepting, count) = (endpoint.clone(), asked.clone());
        let task = tokio::spawn(async move {
            while let Some(incoming) = accepting.accept().await {
                let Ok(connection) = incoming.accept().unwrap().await else { continue };
                let (held, each, count, endpoint) = (held.clone(), each.clone(), count.clone(), accepting.clone());
                tokio::spawn(clan_transfer::serve(
                    connection,
                    move || Some(held.clone()),
                    move |connection, request| {
                        if matches!(request.what, ImagePart::Piece { .. }) {
                            let before = count.fetch_add(1, Ordering::SeqCst);
                            if let Then::Die = tokio::task::block_in_place(|| each(before)) {
                                connection.close(1u32.into(), b"power cut");
                                let endpoint = endpoint.clone();
                                tokio::spawn(async move { endpoint.close().await });
                            }
                        }
                        true
                    },
                ));
            }
        });
        Self { name, endpoint, asked, task }
    }

    pub(crate) fn source(&self) -> Source {
        let addrs = self.endpoint.bound_sockets().into_iter().map(|addr| {
            let loopback = if addr.is_ipv4() { "127.0.0.1" } else { "::1" };
            TransportAddr::Ip((loopback.parse::<std::net::IpAddr>().unwrap(), addr.port()).into())
        });
        Source { name: self.name.into(), addr: EndpointAddr::from_parts(self.endpoint.id(), addrs) }
    }

    pub(crate) fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(crate) async fn endpoint() -> Endpoint {
    Endpoint::builder(presets::Minimal).alpns(vec![ALPN_IMAGE.to_vec()]).bind().await.unwrap()
}

/// Fetches into a directory; gives the outcome, and what was reported besides progress.
pub(crate) async fn take(image: &Image, into: &Path, from: &[&Member]) -> (Result<Taken, FetchError>, Vec<Event>) {
    let here = endpoint().await;
    let sources: Vec<Source> = from.iter().map(|m| m.source()).collect();
    let events = Mutex::new(Vec::new());
    let report = |event: Event| match event {
        Event::Progress { here, total, from } => {
            assert!(here <= total);
            assert!(sources.iter().any(|source| source.name == from), "{from}");
        }
        // What a test expects of it is in what was taken.
        Event::Found { here, total } => assert!(here <= total),
        other => events.lock().unwrap().push(other),
    };
    let taken = tokio::time::timeout(LIMIT, fetch(&here, &sources, None, image.wanted(into), report)).await;
    here.close().await;
    (taken.expect("in time"), events.into_inner().unwrap())
}
