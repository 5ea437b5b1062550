//! Gives out an image.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clan_os::channel::{recv_message, send_message};
use clan_types::{FileHash, ImageId};
use clan_wire::{
    image::{ImageFile, Manifest, ManifestError},
    peer::{ImagePart, ImageRequest, ImageResponse, MAX_IMAGE_MESSAGE},
    pieces::{PIECE, Pieces, piece_len},
};
use iroh::endpoint::{Connection, SendStream};
use tokio::time::timeout;

const REQUEST_LIMIT: Duration = Duration::from_secs(20);
/// A reader that takes nothing for this long is gone.
const STALL_LIMIT: Duration = Duration::from_secs(60);

/// Where a file of an image lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// The file or disk that contains it.
    pub path: PathBuf,
    /// Its first byte there.
    pub start: u64,
}

/// An image that can be given out.
#[derive(Debug)]
pub struct Held {
    id: ImageId,
    manifest: Vec<u8>,
    files: Vec<HeldFile>,
}

#[derive(Debug)]
struct HeldFile {
    file: ImageFile,
    place: Extent,
    pieces: Vec<u8>,
}

impl Held {
    /// An image by its encoded manifest and the encoded [`Pieces`] of its files, one after the other. Those are not checked:
    /// whoever gets them does that. With some that do not fit the manifest nobody is served. `locate` knows where files are.
    pub fn new(
        encoded: &[u8],
        pieces: &[u8],
        locate: impl Fn(&Manifest, &ImageFile) -> Option<Extent>,
    ) -> Result<Self, ManifestError> {
        let manifest = Manifest::decode(encoded, None)?;
        let mut files = Vec::new();
        let mut rest = pieces;
        for file in &manifest.files {
            let length = usize::try_from(Pieces::encoded_len(file.size.as_bytes())).unwrap_or(usize::MAX);
            let (pieces, after) = rest.split_at_checked(length).ok_or(ManifestError::Malformed)?;
            rest = after;
            if let Some(place) = locate(&manifest, file) {
                files.push(HeldFile { file: file.clone(), place, pieces: pieces.to_vec() });
            }
        }
        if !rest.is_empty() {
            return Err(ManifestError::Malformed);
        }
        Ok(Self { id: Manifest::id_of(encoded), manifest: encoded.to_vec(), files })
    }

    fn file(&self, hash: &FileHash) -> Option<&HeldFile> {
        self.files.iter().find(|held| held.file.hash == *hash)
    }

    /// The bytes that were asked for; `None` if they are not here.
    async fn part(&self, what: &ImagePart) -> Option<Vec<u8>> {
        match what {
            ImagePart::Manifest(id) => (*id == self.id).then(|| self.manifest.clone()),
            ImagePart::Pieces(file) => Some(self.file(file)?.pieces.clone()),
            ImagePart::Piece { file, index } => {
                let held = self.file(file)?;
                let length = piece_len(held.file.size.as_bytes(), u64::from(*index));
                let at = held.place.start.checked_add(u64::from(*index).checked_mul(PIECE as u64)?)?;
                let path = held.place.path.clone();
                let read = tokio::task::spawn_blocking(move || read(&path, at, length));
                read.await.ok()?
            }
        }
    }
}

fn read(path: &Path, at: u64, length: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; length];
    File::open(path)
        .and_then(|file| file.read_exact_at(&mut bytes, at))
        .map_err(|error| tracing::warn!(path = %path.display(), %error, "cannot read this machine's own image"))
        .ok()?;
    Some(bytes)
}

/// Answers on a connection until it ends. `held` is the image that is here at the moment, `entitled` judges each request by
/// who is at the other end, and by the proof that came with it.
pub async fn serve(
    connection: Connection,
    held: impl Fn() -> Option<Arc<Held>> + Send,
    entitled: impl Fn(&Connection, &ImageRequest) -> bool + Send,
) {
    while let Ok(Ok((mut send, mut recv))) = timeout(STALL_LIMIT, connection.accept_bi()).await {
        let request = timeout(REQUEST_LIMIT, recv_message::<ImageRequest, _>(&mut recv, MAX_IMAGE_MESSAGE)).await;
        let Ok(Ok(request)) = request else { break };
        let part = match (entitled(&connection, &request), held()) {
            (false, _) => Err(ImageResponse::Denied),
            (true, None) => Err(ImageResponse::NotFound),
            (true, Some(held)) => held.part(&request.what).await.ok_or(ImageResponse::NotFound),
        };
        // One piece may be wanted no more, having come from elsewhere: that ends its stream only.
        let answered = timeout(STALL_LIMIT, answer(&mut send, part)).await;
        if answered.is_err() {
            break;
        }
    }
}

async fn answer(send: &mut SendStream, part: Result<Vec<u8>, ImageResponse>) -> Option<()> {
    match part {
        Ok(bytes) => {
            send_message(send, &ImageResponse::Bytes(bytes.len() as u64), MAX_IMAGE_MESSAGE).await.ok()?;
            send.write_all(&bytes).await.ok()?;
        }
        Err(refusal) => send_message(send, &refusal, MAX_IMAGE_MESSAGE).await.ok()?,
    }
    send.finish().ok()
}
