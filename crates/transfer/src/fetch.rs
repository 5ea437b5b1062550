//! Fetches files from every machine that has them, at once.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use clan_os::channel::{recv_message, send_message};
use clan_types::ImageId;
use clan_wire::{
    image::{MAX_MANIFEST, Manifest, ManifestError},
    peer::{ALPN_IMAGE, ImagePart, ImageRequest, ImageResponse, InviteProof, MAX_IMAGE_MESSAGE},
    pieces::{Pieces, PiecesError},
};
use futures_util::{StreamExt, stream::FuturesUnordered};
use iroh::{Endpoint, EndpointAddr, endpoint::Connection};
use tokio::time::{Instant, sleep_until, timeout};

use crate::{
    part::Wanted,
    pool::{Claim, Pool},
};

const CONNECT: Duration = Duration::from_secs(12);
const ANSWER: Duration = Duration::from_secs(20);
/// A machine that gives nothing for so long is connected to anew. Its pieces go to others before that: see [`DOUBLES`].
const STALL: Duration = Duration::from_secs(30);
/// Pause before a machine that failed is asked again.
const PAUSE: Duration = Duration::from_secs(1);
/// Attempts in a row without a single piece, after which a machine is given up.
const ATTEMPTS: u32 = 5;
/// Pieces asked of a machine at once: 2 MiB under way keep a link of 100 Mbit/s and 150 ms busy.
const DEPTH: usize = 8;
/// When every piece has been asked for: so many are asked for once more by a machine that has nothing else to give. Nobody
/// waits for one that is slow or dead.
const DOUBLES: usize = 4;

/// A machine that may have the files.
#[derive(Debug, Clone)]
pub struct Source {
    /// For people.
    pub name: String,
    /// Where it is.
    pub addr: EndpointAddr,
}

/// What happens on the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It is known what of the files an earlier attempt left. Told once.
    Found {
        /// Bytes that are here, checked.
        here: u64,
        /// Bytes of all files.
        total: u64,
    },
    /// A piece has arrived: so many bytes are here, checked.
    Progress {
        /// Bytes that are here.
        here: u64,
        /// Bytes of all files.
        total: u64,
        /// The machine that gave the piece.
        from: String,
    },
    /// A machine failed, and why.
    Failed {
        /// The machine.
        name: String,
        /// Why.
        why: String,
    },
    /// A machine gave something that is not what was asked for. It is not asked again.
    Lied {
        /// The machine.
        name: String,
        /// What was wrong.
        what: String,
    },
}

/// How many pieces each machine gave, by its name.
pub type Taken = BTreeMap<String, u64>;

/// Why files were not fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// No machine is left to ask. What has arrived is kept.
    #[error("no machine gives it")]
    NoSource {
        /// What went wrong last.
        last: Option<String>,
        /// Machines that gave something else.
        liars: Vec<String>,
    },
    /// Writing failed. What has arrived is kept.
    #[error("could not write {path}", path = path.display())]
    Io {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Why a conversation with a machine ended early.
enum Broke {
    /// Another attempt may do better.
    Cut(String),
    /// It does not have the image, or does not give it.
    Without(String),
    /// It gave something else.
    Lied(String),
    /// It is our disk's fault.
    Disk(FetchError),
}

impl Broke {
    fn cut(error: &dyn std::fmt::Display) -> Self {
        Self::Cut(error.to_string())
    }
}

/// Fetches files, going on from what an earlier attempt left. Returns when all are in their places, every piece checked.
///
/// Safe to drop at any time. Two at a time must not write to the same places.
pub async fn fetch(
    endpoint: &Endpoint,
    sources: &[Source],
    proof: Option<InviteProof>,
    wanted: Vec<Wanted>,
    report: impl Fn(Event) + Send + Sync,
) -> Result<Taken, FetchError> {
    let pool = Arc::new(Pool::new(wanted));
    let fetch = Fetch { endpoint, proof, pool: pool.clone(), report: &report };
    let mut workers: FuturesUnordered<_> = sources.iter().map(|source| fetch.from(source)).collect();
    let (mut last, mut liars) = (None, Vec::new());
    let mut changes = pool.changes();
    while !pool.is_done() {
        let ended = tokio::select! {
            _ = changes.changed() => continue,
            ended = workers.next() => ended,
        };
        match ended {
            Some(Ok(())) => {}
            Some(Err((_, Broke::Disk(error)))) => return Err(error),
            Some(Err((name, Broke::Lied(_)))) => liars.push(name),
            Some(Err((_, Broke::Cut(why) | Broke::Without(why)))) => last = Some(why),
            None => return Err(FetchError::NoSource { last, liars }),
        }
    }
    // Whoever is still asked for a piece that came from elsewhere is told by the end of the connection.
    drop(workers);
    blocking(move || pool.parts().iter().try_for_each(|part| part.complete().map_err(io_error(part.path())))).await?;
    Ok(fetch.pool.taken())
}

/// Why a machine gave no manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoManifest {
    /// It did not; another may.
    #[error("{0}")]
    Failed(String),
    /// It gave something else; another may give the right one.
    #[error("{0}")]
    Lied(String),
    /// It gave the right one, which cannot be used. Everybody has the same.
    #[error(transparent)]
    Unusable(#[from] ManifestError),
}

/// Asks one machine for the manifest of an image.
pub async fn manifest(
    endpoint: &Endpoint,
    source: &Source,
    proof: Option<InviteProof>,
    image: &ImageId,
) -> Result<Manifest, NoManifest> {
    let connection = connect(endpoint, source).await.map_err(NoManifest::Failed)?;
    let line = Line::new(&connection, proof);
    let bytes = match timeout(ANSWER, line.ask(ImagePart::Manifest(*image), MAX_MANIFEST)).await {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(Broke::Cut(why) | Broke::Without(why))) => return Err(NoManifest::Failed(why)),
        Ok(Err(Broke::Lied(what))) => return Err(NoManifest::Lied(what)),
        Ok(Err(Broke::Disk(error))) => return Err(NoManifest::Failed(error.to_string())),
        Err(_) => return Err(NoManifest::Failed(format!("no answer within {} s", ANSWER.as_secs()))),
    };
    connection.close(0u32.into(), b"done");
    Manifest::decode(&bytes, Some(image)).map_err(|error| match error {
        // Its hash is not the image's name.
        ManifestError::WrongImage => NoManifest::Lied(error.to_string()),
        error => NoManifest::Unusable(error),
    })
}

async fn connect(endpoint: &Endpoint, source: &Source) -> Result<Connection, String> {
    match timeout(CONNECT, endpoint.connect(source.addr.clone(), ALPN_IMAGE)).await {
        Ok(connected) => connected.map_err(|e| e.to_string()),
        Err(_) => Err(format!("no answer within {} s", CONNECT.as_secs())),
    }
}

struct Fetch<'a, R> {
    endpoint: &'a Endpoint,
    proof: Option<InviteProof>,
    pool: Arc<Pool>,
    report: &'a R,
}

impl<R: Fn(Event) + Send + Sync> Fetch<'_, R> {
    /// Takes what a machine gives until everything is here, or it is given up.
    async fn from(&self, source: &Source) -> Result<(), (String, Broke)> {
        let given = || self.pool.taken().get(&source.name).copied().unwrap_or(0);
        let (mut tries, mut before) = (0, given());
        loop {
            let broke = match connect(self.endpoint, source).await {
                Ok(connection) => match self.session(source, &connection).await {
                    Ok(()) => {
                        connection.close(0u32.into(), b"done");
                        return Ok(());
                    }
                    Err(broke) => {
                        connection.close(0u32.into(), b"broke off");
                        broke
                    }
                },
                Err(why) => Broke::Cut(why),
            };
            let name = source.name.clone();
            let why = match broke {
                Broke::Cut(why) => why,
                Broke::Lied(what) => {
                    tracing::warn!(machine = name, what, "a machine gives a false image: it is not asked again");
                    (self.report)(Event::Lied { name: name.clone(), what: what.clone() });
                    return Err((name, Broke::Lied(what)));
                }
                Broke::Without(why) => {
                    (self.report)(Event::Failed { name: name.clone(), why: why.clone() });
                    return Err((name, Broke::Without(why)));
                }
                disk @ Broke::Disk(_) => return Err((name, disk)),
            };
            (self.report)(Event::Failed { name: name.clone(), why: why.clone() });
            // One that gets on is not given up.
            tries = if given() > before { 1 } else { tries + 1 };
            before = given();
            if tries >= ATTEMPTS {
                return Err((name, Broke::Cut(why)));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn session(&self, source: &Source, connection: &Connection) -> Result<(), Broke> {
        let line = Line::new(connection, self.proof.clone());
        for (number, wanted) in self.pool.unopened() {
            self.open(number, wanted, &line).await?;
        }
        if let Some((here, total)) = self.pool.found() {
            (self.report)(Event::Found { here, total });
        }
        let mut changes = self.pool.changes();
        let mut flying = FuturesUnordered::new();
        let mut mine: Vec<(usize, usize)> = Vec::new();
        while !self.pool.is_done() {
            // INVARIANT: pieces that others were asked for are asked for again only when there is nothing else to do.
            let doubles = mine.is_empty();
            while mine.len() < if doubles { DOUBLES } else { DEPTH }
                && let Some(claim) = self.pool.claim(&mine, doubles)
            {
                mine.push((claim.file, claim.index));
                flying.push(self.piece(&line, claim));
            }
            tokio::select! {
                Some(arrived) = flying.next() => {
                    let claim = arrived?;
                    mine.retain(|m| *m != (claim.file, claim.index));
                    self.pool.fulfil(&claim, &source.name);
                    let (here, total) = self.pool.progress();
                    (self.report)(Event::Progress { here, total, from: source.name.clone() });
                }
                _ = changes.changed() => {}
                () = line.stalled(), if !mine.is_empty() => return Err(Broke::Cut("the transfer stands still".into())),
            }
        }
        Ok(())
    }

    /// Finds out what is here of a file, by the list of its pieces.
    async fn open(&self, number: usize, wanted: Wanted, line: &Line<'_>) -> Result<(), Broke> {
        let length = usize::try_from(Pieces::encoded_len(wanted.size)).unwrap_or(usize::MAX);
        let asked = timeout(ANSWER, line.ask(ImagePart::Pieces(wanted.hash), length)).await;
        let bytes = asked.map_err(|_| Broke::Cut(format!("no answer within {} s", ANSWER.as_secs())))??;
        let pieces =
            Pieces::decode(&bytes, wanted.size, &wanted.hash).map_err(|e: PiecesError| Broke::Lied(e.to_string()))?;
        let pool = self.pool.clone();
        let found = blocking(move || pool.open(number, pieces).map_err(io_error(&wanted.place)));
        found.await.map_err(Broke::Disk)
    }

    async fn piece(&self, line: &Line<'_>, claim: Claim) -> Result<Claim, Broke> {
        let hash = claim.part.hash();
        let index = u32::try_from(claim.index).map_err(|e| Broke::cut(&e))?;
        let bytes = line.ask(ImagePart::Piece { file: hash, index }, claim.part.len_of(claim.index)).await?;
        let (part, index) = (claim.part.clone(), claim.index);
        let right =
            blocking(move || part.put(index, &bytes).map_err(io_error(part.path()))).await.map_err(Broke::Disk)?;
        if right {
            Ok(claim)
        } else {
            Err(Broke::Lied(format!("piece {index} of the file {} is not genuine", hash.short())))
        }
    }
}

/// A connection to a machine that has the image.
struct Line<'a> {
    connection: &'a Connection,
    proof: Option<InviteProof>,
    /// When the machine last gave anything.
    heard: Mutex<Instant>,
}

impl<'a> Line<'a> {
    fn new(connection: &'a Connection, proof: Option<InviteProof>) -> Self {
        Self { connection, proof, heard: Mutex::new(Instant::now()) }
    }

    fn heard(&self) -> std::sync::MutexGuard<'_, Instant> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends when the machine has given nothing for [`STALL`].
    async fn stalled(&self) {
        loop {
            let due = *self.heard() + STALL;
            if Instant::now() >= due {
                return;
            }
            sleep_until(due).await;
        }
    }

    /// Asks for a part of at most `limit` bytes; of exactly so many, if it is not a manifest.
    async fn ask(&self, what: ImagePart, limit: usize) -> Result<Vec<u8>, Broke> {
        let exact = !matches!(what, ImagePart::Manifest(_));
        let (mut send, mut recv) = self.connection.open_bi().await.map_err(|e| Broke::cut(&e))?;
        let request = ImageRequest { proof: self.proof.clone(), what };
        send_message(&mut send, &request, MAX_IMAGE_MESSAGE).await.map_err(|e| Broke::cut(&e))?;
        // The other side needs no end of ours.
        let _ = send.finish();
        let answer: ImageResponse = recv_message(&mut recv, MAX_IMAGE_MESSAGE).await.map_err(|e| Broke::cut(&e))?;
        let length = match answer {
            ImageResponse::Bytes(length) => usize::try_from(length).unwrap_or(usize::MAX),
            ImageResponse::NotFound => return Err(Broke::Without("it does not have the image".into())),
            ImageResponse::Denied => {
                return Err(Broke::Without("it does not give the image out for this invite".into()));
            }
        };
        // INVARIANT: no more is taken than the manifest says.
        if length > limit || (exact && length != limit) {
            return Err(Broke::Lied("a part of the image has the wrong size".into()));
        }
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            let chunk = recv.read_chunk(length - bytes.len()).await.map_err(|e| Broke::cut(&e))?;
            let chunk = chunk.ok_or_else(|| Broke::Cut("the other side stopped".into()))?;
            bytes.extend_from_slice(chunk.as_ref());
            *self.heard() = Instant::now();
        }
        Ok(bytes)
    }
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> FetchError {
    let path = path.to_owned();
    move |source| FetchError::Io { path, source }
}

/// Runs something that blocks on the disk.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FetchError> + Send + 'static,
) -> Result<T, FetchError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(FetchError::Io { path: PathBuf::new(), source: io::Error::other(error) }),
    }
}
