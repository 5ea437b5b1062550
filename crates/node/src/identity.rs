//! The machine's keys: made on the machine, never leaving it.

use std::{panic::resume_unwind, path::Path, thread};

use clan_types::{MachineId, WgPublicKey};
use ed25519_dalek::SigningKey;
use x25519_dalek::{PublicKey, StaticSecret};

/// The machine's keys.
pub(crate) struct Identity {
    signing: SigningKey,
    wireguard: StaticSecret,
}

/// Why the machine's keys are not usable.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The key file cannot be read or written.
    #[error(transparent)]
    Store(#[from] clan_store::StoreError),
}

impl Identity {
    /// Reads the keys of a machine, or makes them on its first start.
    pub(crate) fn load_or_create(dir: &Path) -> Result<Self, IdentityError> {
        let secret = |name| clan_store::SecretFile::load_or_create(&dir.join(name));
        // Each takes its way to the disk.
        let (signing, wireguard) = thread::scope(|scope| {
            let wireguard = scope.spawn(|| secret("wireguard.key"));
            (secret("machine.key"), wireguard.join().unwrap_or_else(|panic| resume_unwind(panic)))
        });
        let (signing, wireguard) = (signing?, wireguard?);
        Ok(Self {
            signing: SigningKey::from_bytes(signing.expose()),
            wireguard: StaticSecret::from(*wireguard.expose()),
        })
    }

    pub(crate) fn machine(&self) -> MachineId {
        MachineId::from_bytes(self.signing.verifying_key().to_bytes())
    }

    pub(crate) fn signing(&self) -> &SigningKey {
        &self.signing
    }

    pub(crate) fn wireguard_public(&self) -> WgPublicKey {
        WgPublicKey::from_bytes(PublicKey::from(&self.wireguard).to_bytes())
    }

    pub(crate) fn wireguard_secret(&self) -> [u8; 32] {
        self.wireguard.to_bytes()
    }

    pub(crate) fn endpoint_key(&self) -> iroh::SecretKey {
        iroh::SecretKey::from_bytes(&self.signing.to_bytes())
    }
}
