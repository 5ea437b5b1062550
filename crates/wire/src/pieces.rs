//! A file's pieces: each can be checked by itself, before the rest of the file is there.
//!
//! The hash of a file is BLAKE3, which is a tree: the hashes of aligned power-of-two parts ("chaining values") lead to that
//! of the whole (BLAKE3 paper, section 2.1). So a list of them proves itself against the file's hash, needs no signature, and
//! may come from anybody.

use blake3::{
    Hasher,
    hazmat::{HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root},
};
use clan_types::FileHash;

use crate::image::MAX_FILE;

/// Bytes of a piece; the last one of a file may be shorter. INVARIANT: a power of two, and at least a BLAKE3 chunk.
pub const PIECE: usize = 256 << 10;
const HASH: usize = 32;

/// Why bytes are not the list that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PiecesError {
    /// Another number of hashes than the file has pieces.
    #[error("the list of pieces has the wrong length")]
    Length,
    /// The hashes do not lead to the file's.
    #[error("the list of pieces is another file's")]
    WrongFile,
}

/// The hashes of a file's pieces. They belong to the file's hash: nothing else can be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pieces {
    size: u64,
    hashes: Vec<[u8; HASH]>,
}

impl Pieces {
    /// How many pieces a file of so many bytes has: at least one, which may be empty.
    pub const fn count(size: u64) -> u64 {
        if size == 0 { 1 } else { size.div_ceil(PIECE as u64) }
    }

    /// Bytes of the encoded list for a file of so many bytes.
    pub const fn encoded_len(size: u64) -> u64 {
        Self::count(size) * HASH as u64
    }

    /// Takes a list that somebody gave for the file of this hash and size.
    pub fn decode(bytes: &[u8], size: u64, file: &FileHash) -> Result<Self, PiecesError> {
        let (hashes, rest) = bytes.as_chunks::<HASH>();
        if size > MAX_FILE || !rest.is_empty() || hashes.len() as u64 != Self::count(size) {
            return Err(PiecesError::Length);
        }
        if root(hashes, size) != *file.as_bytes() {
            return Err(PiecesError::WrongFile);
        }
        Ok(Self { size, hashes: hashes.to_vec() })
    }

    /// The hashes, one after the other, 32 bytes each.
    pub fn encode(&self) -> Vec<u8> {
        self.hashes.concat()
    }

    /// Bytes of the file.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// How many there are.
    pub const fn len(&self) -> usize {
        self.hashes.len()
    }

    /// Whether there are none; never true.
    pub const fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// Bytes of a piece, 0 for those beyond the end.
    pub fn len_of(&self, index: usize) -> usize {
        piece_len(self.size, index as u64)
    }

    /// Whether these bytes are the piece.
    pub fn is_piece(&self, index: usize, bytes: &[u8]) -> bool {
        let Some(expected) = self.hashes.get(index) else { return false };
        bytes.len() == self.len_of(index) && hash_of(self.size, index as u64, bytes) == *expected
    }
}

/// Bytes of a piece of a file of this size, 0 for those beyond the end.
pub fn piece_len(size: u64, index: u64) -> usize {
    let left = size.saturating_sub(index.saturating_mul(PIECE as u64));
    usize::try_from(left).unwrap_or(PIECE).min(PIECE)
}

/// The hash of one piece of a file of this size, for the list.
pub fn hash_of(size: u64, index: u64, bytes: &[u8]) -> [u8; HASH] {
    if Pieces::count(size) == 1 || bytes.is_empty() {
        return *blake3::hash(bytes).as_bytes();
    }
    let mut hasher = Hasher::new();
    hasher.set_input_offset(index.saturating_mul(PIECE as u64));
    hasher.update(bytes).finalize_non_root()
}

/// What the hashes lead to. `hashes` are as many as a file of this size has pieces.
fn root(hashes: &[[u8; HASH]], size: u64) -> [u8; HASH] {
    if let [only] = hashes {
        return *only;
    }
    let (left, right, left_len) = split(hashes, size);
    *merge_subtrees_root(&inner(left, left_len), &inner(right, size - left_len), Mode::Hash).as_bytes()
}

/// As deep as the tree is, which the largest file bounds.
fn inner(hashes: &[[u8; HASH]], size: u64) -> [u8; HASH] {
    if let [only] = hashes {
        return *only;
    }
    let (left, right, left_len) = split(hashes, size);
    merge_subtrees_non_root(&inner(left, left_len), &inner(right, size - left_len), Mode::Hash)
}

/// The tree's left side is the largest power of two that leaves something to the right; with more than one piece that is
/// whole pieces.
fn split(hashes: &[[u8; HASH]], size: u64) -> (&[[u8; HASH]], &[[u8; HASH]], u64) {
    let left_len = left_subtree_len(size);
    let pieces = usize::try_from(left_len / PIECE as u64).unwrap_or(usize::MAX).min(hashes.len());
    let (left, right) = hashes.split_at(pieces);
    (left, right, left_len)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn content(size: usize) -> Vec<u8> {
        (0..size).map(|i| (i.wrapping_mul(31) ^ (i >> 9)) as u8).collect()
    }

    fn list(content: &[u8]) -> Vec<u8> {
        if content.is_empty() {
            return hash_of(0, 0, content).to_vec();
        }
        let size = content.len() as u64;
        content.chunks(PIECE).enumerate().flat_map(|(i, piece)| hash_of(size, i as u64, piece)).collect()
    }

    fn hash(content: &[u8]) -> FileHash {
        FileHash::from_bytes(*blake3::hash(content).as_bytes())
    }

    fn check(size: usize) {
        let content = content(size);
        let pieces = Pieces::decode(&list(&content), size as u64, &hash(&content)).unwrap();
        let mut at = 0;
        for index in 0..pieces.len() {
            let piece = &content[at..at + pieces.len_of(index)];
            assert!(pieces.is_piece(index, piece), "piece {index} of {size} bytes");
            at += piece.len();
        }
        assert_eq!(at, size);
        assert_eq!(pieces.len_of(pieces.len()), 0);
        assert_eq!(pieces.encode().len() as u64, Pieces::encoded_len(size as u64));
    }

    #[test]
    fn a_list_leads_to_the_hash_of_the_file_at_every_boundary() {
        for size in [0, 1, 1023, 1024, 1025] {
            check(size);
        }
        for pieces in [1, 2, 3, 4, 5, 7, 8, 9] {
            for off in [-1025, -1024, -1, 0, 1, 1024, 1025] {
                check(usize::try_from(pieces * PIECE as i64 + off).unwrap());
            }
        }
    }

    #[test]
    fn the_last_piece_of_a_file_of_two_is_not_the_whole_of_another() {
        // What hashes as a file of its own does not as a part, and the other way round.
        let content = content(PIECE + 10);
        let pieces = Pieces::decode(&list(&content), content.len() as u64, &hash(&content)).unwrap();
        let mut swapped = pieces.encode();
        swapped[32..].copy_from_slice(blake3::hash(&content[PIECE..]).as_bytes());
        assert_eq!(Pieces::decode(&swapped, content.len() as u64, &hash(&content)), Err(PiecesError::WrongFile));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn any_size_checks(size in 0..5 * PIECE) {
            check(size);
        }

        #[test]
        fn a_bit_changed_anywhere_is_found(size in 1..3 * PIECE, at: prop::sample::Index, bit in 0..8u8) {
            let mut content = content(size);
            let pieces = Pieces::decode(&list(&content), size as u64, &hash(&content)).unwrap();
            let at = at.index(size);
            content[at] ^= 1 << bit;
            let index = at / PIECE;
            let piece = &content[index * PIECE..size.min((index + 1) * PIECE)];
            prop_assert!(!pieces.is_piece(index, piece));
            prop_assert!(!pieces.is_piece(index, &piece[1..]), "shorter");
        }

        #[test]
        fn a_list_with_a_bit_changed_is_refused(size in 1..6 * PIECE, at: prop::sample::Index, bit in 0..8u8) {
            let content = content(size);
            let mut list = list(&content);
            let at = at.index(list.len());
            list[at] ^= 1 << bit;
            prop_assert_eq!(
                Pieces::decode(&list, size as u64, &hash(&content)),
                Err(PiecesError::WrongFile)
            );
        }

        #[test]
        fn a_list_of_another_length_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), size: u64) {
            prop_assert!(Pieces::decode(&bytes, size, &FileHash::from_bytes([0; 32])).is_err());
        }
    }
}
