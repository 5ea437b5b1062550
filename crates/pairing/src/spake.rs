//! What both sides compute alike: identities, keys, the tag and the seal.

use chacha20poly1305::{
    ChaCha20Poly1305, Key, KeyInit, Nonce,
    aead::{Aead, Payload},
};
use clan_types::{Channel, MachineId, Words};
use rand_core::{CryptoRng, RngCore};
use spake2::{Ed25519Group, Identity, Password, Spake2};
use zeroize::Zeroizing;

/// A run of the key agreement that waits for the other side's share.
pub(crate) type Run = Spake2<Ed25519Group>;

/// Length of a share: a tag for its side, and a point.
pub(crate) const SHARE: usize = 33;

/// What the two sides agreed on, if they had the same words.
pub(crate) struct Agreement {
    tag: blake3::Hash,
    seal: Zeroizing<[u8; 32]>,
}

pub(crate) fn password(words: &Words) -> Password {
    Password::new(words.secret())
}

/// The channel is bound by both identities.
pub(crate) fn identities(channel: Channel, newcomer: &MachineId, machine: &MachineId) -> (Identity, Identity) {
    let identity = |role: &[u8], id: &MachineId| {
        Identity::new(&[b"clan words v1 ", role, channel.word().as_bytes(), b" ", id.as_bytes().as_slice()].concat())
    };
    (identity(b"newcomer ", newcomer), identity(b"machine ", machine))
}

/// `None` if the share is no share.
pub(crate) fn agree(run: Run, share: &[u8]) -> Option<Agreement> {
    let key = Zeroizing::new(run.finish(share).ok()?);
    Some(Agreement {
        tag: blake3::Hash::from_bytes(blake3::derive_key("clan 2026-11 words confirmation v1", &key)),
        seal: Zeroizing::new(blake3::derive_key("clan 2026-11 words seal v1", &key)),
    })
}

impl Agreement {
    pub(crate) fn tag(&self) -> [u8; 32] {
        *self.tag.as_bytes()
    }

    /// In constant time.
    pub(crate) fn is_confirmed_by(&self, tag: &[u8; 32]) -> bool {
        self.tag == blake3::Hash::from_bytes(*tag)
    }

    /// INVARIANT: called once for an agreement, so that the fixed nonce is used once for a key.
    pub(crate) fn seal(self, link: &[u8]) -> Option<Vec<u8>> {
        self.cipher().encrypt(&Nonce::default(), Payload { msg: link, aad: self.tag.as_bytes() }).ok()
    }

    pub(crate) fn open(self, sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        self.cipher()
            .decrypt(&Nonce::default(), Payload { msg: sealed, aad: self.tag.as_bytes() })
            .ok()
            .map(Zeroizing::new)
    }

    fn cipher(&self) -> ChaCha20Poly1305 {
        ChaCha20Poly1305::new(Key::from_slice(self.seal.as_slice()))
    }
}

/// The caller's seed, stretched.
pub(crate) struct Seeded(blake3::OutputReader);

impl Seeded {
    pub(crate) fn new(seed: &[u8; 32]) -> Self {
        Self(blake3::Hasher::new_keyed(seed).update(b"clan 2026-11 words scalar v1").finalize_xof())
    }
}

impl RngCore for Seeded {
    fn next_u32(&mut self) -> u32 {
        let mut bytes = [0; 4];
        self.fill_bytes(&mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn next_u64(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.fill_bytes(&mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn fill_bytes(&mut self, dest: &mut [u8]) {
        self.0.fill(dest);
    }

    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), rand_core::Error> {
        self.fill_bytes(dest);
        Ok(())
    }
}

/// As good as its seed, which the caller drew from the operating system.
impl CryptoRng for Seeded {}
