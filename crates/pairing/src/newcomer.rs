//! The side that was told the words.

use clan_types::{MachineId, Words};
use zeroize::Zeroizing;

use crate::spake::{self, Agreement, Run, Seeded};

/// A newcomer who has sent their share.
pub struct Newcomer(Run);

/// A newcomer who has agreed on a key, with whom remains to be seen.
pub struct Agreed(Agreement);

/// Why there is no link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PairingError {
    /// The machine's share is none.
    #[error("the machine that waits for these words sent something else than its share of the key")]
    Malformed,
    /// The machine does not know the words, or what it sent was changed on the way.
    #[error("the machine that answered does not know these words")]
    Wrong,
}

impl Newcomer {
    /// Begins: gives the share to send. `seed` is 32 fresh random bytes; a seed is used once.
    pub fn begin(words: &Words, newcomer: &MachineId, machine: &MachineId, seed: &[u8; 32]) -> (Self, Vec<u8>) {
        let (a, b) = spake::identities(words.channel(), newcomer, machine);
        let (run, share) = Run::start_a_with_rng(&spake::password(words), &a, &b, Seeded::new(seed));
        (Self(run), share)
    }

    /// Takes the machine's share: gives the tag to confirm with.
    pub fn agree(self, share: &[u8]) -> Result<(Agreed, [u8; 32]), PairingError> {
        let agreement = spake::agree(self.0, share).ok_or(PairingError::Malformed)?;
        let tag = agreement.tag();
        Ok((Agreed(agreement), tag))
    }
}

impl Agreed {
    /// Opens what the machine sealed: only one that has the words can have.
    pub fn open(self, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, PairingError> {
        self.0.open(sealed).ok_or(PairingError::Wrong)
    }
}
