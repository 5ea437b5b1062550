//! 32-byte identifiers. Each kind is a type of its own, so that one can never be passed for another.

use std::{fmt, str::FromStr};

use data_encoding::BASE32_NOPAD;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// Why a text is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The text is not base32 of the expected length.
    #[error("`{text}` is not {kind}: expected 52 characters a-z and 2-7")]
    Malformed {
        /// What was expected, with its article.
        kind: &'static str,
        /// The text that was given, shortened.
        text: String,
    },
}

/// Lower-case base32 (RFC 4648, no padding) of 32 bytes: 52 characters.
fn to_text(bytes: &[u8; 32]) -> String {
    BASE32_NOPAD.encode(bytes).to_ascii_lowercase()
}

fn from_text(kind: &'static str, text: &str) -> Result<[u8; 32], IdError> {
    let malformed = || IdError::Malformed { kind, text: text.chars().take(60).collect() };
    if text.len() != 52 || !text.is_ascii() {
        return Err(malformed());
    }
    let bytes = BASE32_NOPAD.decode(text.to_ascii_uppercase().as_bytes()).map_err(|_| malformed())?;
    bytes.try_into().map_err(|_| malformed())
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 32]);

        impl $name {
            /// Wraps 32 raw bytes.
            pub const fn from_bytes(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }

            /// The 32 raw bytes.
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// The first ten characters of the text form, for people; never for look-ups.
            pub fn short(&self) -> String {
                to_text(&self.0)[..10].to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&to_text(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.short())
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                from_text($kind, text).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.collect_str(self)
                } else {
                    self.0.serialize(serializer)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
                } else {
                    <[u8; 32]>::deserialize(deserializer).map(Self)
                }
            }
        }
    };
}

id!(
    /// A clan: the BLAKE3 hash of its signed founding entry.
    ClanId, "a clan id"
);
id!(
    /// A person: an Ed25519 public key. The private half stays on the person's own devices.
    PersonId, "a person id"
);
id!(
    /// A machine: an Ed25519 public key, which is also its iroh endpoint id.
    MachineId, "a machine id"
);
id!(
    /// A person's device: the Ed25519 public key that signs there. The first device's key is also the person's id.
    DeviceId, "a device id"
);
id!(
    /// One signed ledger entry: the BLAKE3 hash of its encoding, signature included.
    EntryId, "an entry id"
);
id!(
    /// One invite: the Ed25519 public key whose private half travels in the link.
    InviteId, "an invite id"
);
id!(
    /// A bootable image: the BLAKE3 hash of its manifest.
    ImageId, "an image id"
);
id!(
    /// The content of one file: its BLAKE3 hash.
    FileHash, "a file hash"
);
id!(
    /// A TLS certificate: the BLAKE3 hash of its DER encoding.
    CertificateHash, "a certificate's hash"
);
id!(
    /// A machine's WireGuard public key (X25519).
    WgPublicKey, "a WireGuard key"
);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn text_form_round_trips(bytes: [u8; 32]) {
            let id = ClanId::from_bytes(bytes);
            prop_assert_eq!(id.to_string().parse::<ClanId>().unwrap(), id);
        }

        #[test]
        fn parsing_any_text_never_panics(text in ".{0,80}") {
            let _ = text.parse::<MachineId>();
        }
    }

    #[test]
    fn json_form_is_the_text_form() {
        let id = PersonId::from_bytes([7; 32]);
        assert_eq!(serde_json::to_string(&id).unwrap(), format!("\"{id}\""));
    }
}
