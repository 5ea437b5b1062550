//! What the manager of a machine's computer is to do for whoever steers the machine: give it another image, which takes the
//! image store and QEMU, out of the controller's reach.
//!
//! The controller asks by a stream that the manager has opened for that ([`crate::control::ControlRequest::Orders`]), one order
//! each: [`Asks::Order`], [`Says::Sign`], [`Asks::Signed`], [`Says::Accepted`], [`Asks::Noted`]. What is in between, the
//! controller passes on between the manager and whoever steers ([`crate::helm::Answer::Sign`]).
//!
//! INVARIANT: an [`Order`] is worth nothing without the signature of the person who gives it, over a challenge of the manager that is
//! to obey it: a controller, or a guest that has taken it over, can neither make one nor repeat one.

use clan_types::{ClanId, ImageId, MachineId};
use ed25519_dalek::SigningKey;
use serde::{Deserialize, Serialize};

use crate::helm::{Proof, Refusal};

/// Largest message of either side.
pub const MAX_ORDER: usize = 8 << 10;

/// Who is to do what, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    /// In which clan.
    pub clan: ClanId,
    /// Whose manager.
    pub machine: MachineId,
    /// The image that the machine is to run.
    pub image: ImageId,
    /// Only say what would be.
    pub dry_run: bool,
    /// The manager's own, for one order.
    pub challenge: [u8; 32],
}

impl Order {
    /// Signs it, as a person.
    pub fn sign(&self, key: &SigningKey) -> Proof {
        Proof::of(key, &self.statement())
    }

    /// Whether the proof's device signed this order.
    pub fn is_signed(&self, proof: &Proof) -> bool {
        proof.covers(&self.statement())
    }

    fn statement(&self) -> Vec<u8> {
        let dry_run = [u8::from(self.dry_run)];
        let parts: [&[u8]; 6] = [
            b"clan order v1",
            self.clan.as_bytes(),
            self.machine.as_bytes(),
            self.image.as_bytes(),
            &dry_run,
            &self.challenge,
        ];
        parts.concat()
    }
}

/// From the controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Asks {
    /// Somebody wants the machine to run another image. Answered by [`Says::Sign`], or by why not.
    Order {
        /// Which.
        image: ImageId,
        /// Only say what would be.
        dry_run: bool,
    },
    /// They have signed it. Answered by [`Says::Accepted`], [`Says::Unchanged`], or by why not.
    Signed(Proof),
    /// It is written down by whom and what: the manager begins.
    Noted,
}

/// From the manager.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Says {
    /// The order with this challenge is to be signed.
    Sign([u8; 32]),
    /// It will be done once it is written down.
    Accepted {
        /// The image that the machine has until then.
        before: ImageId,
    },
    /// The machine has this image.
    Unchanged,
    /// No, and why.
    Refused(Refusal),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_for_one_machine_one_image_and_once() {
        let key = SigningKey::from_bytes(&[5; 32]);
        let order = Order {
            clan: ClanId::from_bytes([1; 32]),
            machine: MachineId::from_bytes([2; 32]),
            image: ImageId::from_bytes([3; 32]),
            dry_run: true,
            challenge: [4; 32],
        };
        let proof = order.sign(&key);
        assert!(order.is_signed(&proof));
        for other in [
            Order { clan: ClanId::from_bytes([9; 32]), ..order },
            Order { machine: MachineId::from_bytes([9; 32]), ..order },
            Order { image: ImageId::from_bytes([9; 32]), ..order },
            Order { dry_run: false, ..order },
            Order { challenge: [9; 32], ..order },
        ] {
            assert!(!other.is_signed(&proof), "{other:?}");
        }
        let forged = Proof { device: clan_types::DeviceId::from_bytes([7; 32]), ..proof };
        assert!(!order.is_signed(&forged));
    }
}
