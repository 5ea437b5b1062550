//! Image manifests. An image is a kernel, an initramfs and read-only layers; the manifest names each by its hash, and
//! the hash of the manifest names the image.

use clan_types::{ByteSize, FileHash, ImageId};
use serde::{Deserialize, Serialize};

/// Largest manifest, encoded.
pub const MAX_MANIFEST: usize = 64 << 10;
const MAX_FILES: usize = 16;
/// Largest file of an image.
pub const MAX_FILE: u64 = 16 << 30;
const CONTEXT: &str = "clan 2026-11 image manifest v1";

/// What an image consists of, and what it needs to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Format version: 1.
    pub version: u32,
    /// One line for people: distribution, flavour.
    pub title: String,
    /// Processor architecture, as in `uname -m`.
    pub architecture: String,
    /// Hash of everything that went into the build; equal inputs need no second build.
    pub inputs: FileHash,
    /// Least memory a guest of this image needs.
    pub memory_min: ByteSize,
    /// The files, each role once but for [`FileRole::Layer`].
    pub files: Vec<ImageFile>,
}

/// One file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFile {
    /// What it is for.
    pub role: FileRole,
    /// Its size.
    pub size: ByteSize,
    /// Its content.
    pub hash: FileHash,
}

/// What a file of an image is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum FileRole {
    /// Uncompressed kernel with a PVH entry point.
    Kernel,
    /// Raw cpio archive whose `/init` is the agent.
    Initramfs,
    /// The distribution: an erofs file system, lowest layer of the root.
    Root,
    /// The `clan` executable and its units: an erofs file system, laid over [`FileRole::Root`].
    Layer,
}

/// Why bytes are not a manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Not a manifest, or over a limit.
    #[error("the image manifest is damaged")]
    Malformed,
    /// A file is larger than any image's may be.
    #[error("the image manifest names a file of {0}, and {max} is the most", max = ByteSize::from_bytes(MAX_FILE))]
    TooLarge(ByteSize),
    /// From a newer Clan.
    #[error("the image manifest has version {0}, which this version of Clan does not know")]
    NewerVersion(u32),
    /// A needed file is missing, or there twice.
    #[error("the image manifest does not name exactly one {0:?}")]
    Incomplete(FileRole),
    /// The bytes are another image's.
    #[error("the image manifest is not the one that was asked for")]
    WrongImage,
}

impl Manifest {
    /// The encoding that is hashed, stored and sent.
    pub fn encode(&self) -> Result<Vec<u8>, ManifestError> {
        postcard::to_allocvec(self).map_err(|_| ManifestError::Malformed)
    }

    /// Decodes and checks a manifest; `expect` is the image that was asked for.
    pub fn decode(bytes: &[u8], expect: Option<&ImageId>) -> Result<Self, ManifestError> {
        if bytes.len() > MAX_MANIFEST {
            return Err(ManifestError::Malformed);
        }
        if expect.is_some_and(|id| *id != Self::id_of(bytes)) {
            return Err(ManifestError::WrongImage);
        }
        let manifest: Self = crate::codec::decode(bytes).map_err(|_| ManifestError::Malformed)?;
        if manifest.version != 1 {
            return Err(ManifestError::NewerVersion(manifest.version));
        }
        if manifest.files.len() > MAX_FILES {
            return Err(ManifestError::Malformed);
        }
        if let Some(file) = manifest.files.iter().find(|f| f.size.as_bytes() > MAX_FILE) {
            return Err(ManifestError::TooLarge(file.size));
        }
        for role in [FileRole::Kernel, FileRole::Initramfs, FileRole::Root] {
            if manifest.files.iter().filter(|f| f.role == role).count() != 1 {
                return Err(ManifestError::Incomplete(role));
            }
        }
        Ok(manifest)
    }

    /// The image's id.
    pub fn id(&self) -> Result<ImageId, ManifestError> {
        Ok(Self::id_of(&self.encode()?))
    }

    /// The id of the image with this encoded manifest.
    pub fn id_of(bytes: &[u8]) -> ImageId {
        ImageId::from_bytes(blake3::derive_key(CONTEXT, bytes))
    }

    /// The file with a role that occurs once.
    pub fn file(&self, role: FileRole) -> Result<&ImageFile, ManifestError> {
        self.files.iter().find(|f| f.role == role).ok_or(ManifestError::Incomplete(role))
    }

    /// Bytes of all files.
    pub fn total_size(&self) -> ByteSize {
        ByteSize::from_bytes(self.files.iter().map(|f| f.size.as_bytes()).fold(0, u64::saturating_add))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let file = |(n, role)| ImageFile { role, size: ByteSize::from_mib(1), hash: FileHash::from_bytes([n; 32]) };
        let roles = [FileRole::Kernel, FileRole::Initramfs, FileRole::Root, FileRole::Layer];
        Manifest {
            version: 1,
            title: "Debian 12".into(),
            architecture: "x86_64".into(),
            inputs: FileHash::from_bytes([7; 32]),
            memory_min: ByteSize::from_mib(256),
            files: (1..).zip(roles).map(file).collect(),
        }
    }

    #[test]
    fn no_bit_of_a_manifest_can_be_changed_and_no_byte_left_out_or_added() {
        let (bytes, id) = (manifest().encode().unwrap(), manifest().id().unwrap());
        assert_eq!(Manifest::decode(&bytes, Some(&id)).unwrap(), manifest());
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut changed = bytes.clone();
                changed[at] ^= 1 << bit;
                assert_eq!(
                    Manifest::decode(&changed, Some(&id)),
                    Err(ManifestError::WrongImage),
                    "bit {bit} of byte {at}"
                );
            }
            assert_eq!(Manifest::decode(&bytes[..at], Some(&id)), Err(ManifestError::WrongImage));
            assert!(Manifest::decode(&bytes[..at], None).is_err(), "cut after {at} bytes");
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert_eq!(Manifest::decode(&longer, Some(&id)), Err(ManifestError::WrongImage));
        assert_eq!(Manifest::decode(&longer, None), Err(ManifestError::Malformed));
    }

    #[test]
    fn a_manifest_with_files_of_a_tebibyte_or_without_end_is_refused() {
        for size in [MAX_FILE + 1, 1 << 40, u64::MAX] {
            let mut huge = manifest();
            huge.files[2].size = ByteSize::from_bytes(size);
            let refused = Manifest::decode(&huge.encode().unwrap(), None);
            assert_eq!(refused, Err(ManifestError::TooLarge(ByteSize::from_bytes(size))));
        }
        let mut many = manifest();
        many.files.extend(vec![many.files[3].clone(); MAX_FILES]);
        assert_eq!(Manifest::decode(&many.encode().unwrap(), None), Err(ManifestError::Malformed));
        assert_eq!(Manifest::decode(&vec![0; MAX_MANIFEST + 1], None), Err(ManifestError::Malformed));
        let mut twice = manifest();
        twice.files[2].role = FileRole::Kernel;
        assert_eq!(Manifest::decode(&twice.encode().unwrap(), None), Err(ManifestError::Incomplete(FileRole::Kernel)));
    }
}
