//! A file that arrives: at its full size from the start, under another name until it is whole.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use clan_types::FileHash;
use clan_wire::pieces::{PIECE, Pieces};

/// A file that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// What it hashes to.
    pub hash: FileHash,
    /// Its size in bytes.
    pub size: u64,
    /// Where it is to be. Until it is whole it is beside that, with `.part` behind the name.
    pub place: PathBuf,
}

impl Wanted {
    fn part(&self) -> PathBuf {
        let mut name = self.place.as_os_str().to_owned();
        name.push(".part");
        name.into()
    }
}

/// A file of which some pieces are there. All calls block on the disk.
#[derive(Debug)]
pub(crate) struct Part {
    file: File,
    path: PathBuf,
    wanted: Wanted,
    pieces: Pieces,
}

impl Part {
    /// Opens what there is of a file, and says for every piece whether it is there. INVARIANT: nothing is believed of the
    /// file, whoever wrote it, and whatever happened to the power meanwhile: its pieces are hashed.
    pub(crate) fn open(wanted: &Wanted, pieces: Pieces) -> io::Result<(Self, Vec<bool>)> {
        let path = wanted.part();
        if !path.exists() && wanted.place.exists() {
            // What is too short there is a beginning, as good as any.
            fs::rename(&wanted.place, &path)?;
        }
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path)?;
        let found = file.metadata()?.len();
        file.set_len(wanted.size)?;
        let mut buffer = vec![0; PIECE];
        let mut here = Vec::with_capacity(pieces.len());
        for index in 0..pieces.len() {
            let at = index as u64 * PIECE as u64;
            let buffer = &mut buffer[..pieces.len_of(index)];
            let written = at < found || wanted.size == 0;
            here.push(written && file.read_exact_at(buffer, at).is_ok() && pieces.is_piece(index, buffer));
        }
        Ok((Self { file, path, wanted: wanted.clone(), pieces }, here))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn hash(&self) -> FileHash {
        self.wanted.hash
    }

    /// Bytes of a piece.
    pub(crate) fn len_of(&self, index: usize) -> usize {
        self.pieces.len_of(index)
    }

    /// Writes a piece if it is the right one, and says whether it was.
    pub(crate) fn put(&self, index: usize, bytes: &[u8]) -> io::Result<bool> {
        if !self.pieces.is_piece(index, bytes) {
            return Ok(false);
        }
        self.file.write_all_at(bytes, index as u64 * PIECE as u64)?;
        Ok(true)
    }

    /// Gives the file its name: every piece is there.
    pub(crate) fn complete(&self) -> io::Result<()> {
        fs::rename(&self.path, &self.wanted.place)
    }
}
