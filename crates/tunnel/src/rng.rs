//! Unpredictable numbers from the caller's seed.

use zeroize::Zeroizing;

/// A stream of nonces: BLAKE3 keyed with the seed, over a counter.
pub(crate) struct Rng {
    seed: Zeroizing<[u8; 32]>,
    counter: u64,
}

impl Rng {
    pub(crate) fn new(seed: [u8; 32]) -> Self {
        Self { seed: Zeroizing::new(seed), counter: 0 }
    }

    pub(crate) fn nonce(&mut self) -> [u8; 16] {
        self.counter = self.counter.wrapping_add(1);
        let hash = blake3::keyed_hash(&self.seed, &self.counter.to_le_bytes());
        let mut nonce = [0; 16];
        nonce.copy_from_slice(&hash.as_bytes()[..16]);
        nonce
    }
}
