//! Names of clans, machines, people and services. Each is one DNS label, so that it can stand in a host name as it is.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// No characters at all.
    #[error("a {kind} cannot be empty")]
    Empty {
        /// Which kind of name.
        kind: &'static str,
    },
    /// Longer than a DNS label (RFC 1035: 63 octets).
    #[error("a {kind} has at most 63 characters")]
    TooLong {
        /// Which kind of name.
        kind: &'static str,
    },
    /// A character that cannot stand in a host name.
    #[error("`{found}` cannot be in a {kind}: use a-z, 0-9 and inner hyphens")]
    BadCharacter {
        /// Which kind of name.
        kind: &'static str,
        /// The first offending character.
        found: char,
    },
}

fn check(kind: &'static str, text: &str) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty { kind });
    }
    if text.len() > 63 {
        return Err(NameError::TooLong { kind });
    }
    if let Some(found) = text.chars().find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '-')) {
        return Err(NameError::BadCharacter { kind, found });
    }
    if text.starts_with('-') || text.ends_with('-') {
        return Err(NameError::BadCharacter { kind, found: '-' });
    }
    Ok(())
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// The label, lower case.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.0)
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                let text = text.to_ascii_lowercase();
                check($kind, &text)?;
                Ok(Self(text))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                self.0.serialize(serializer)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                // INVARIANT: a name from a peer, a guest or a file is checked like one that a person typed.
                String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
            }
        }
    };
}

name!(
    /// A clan's name, as in `<machine>.<clan>.clan`. Not unique in the world: the [`crate::ClanId`] is.
    ClanName, "clan name"
);
name!(
    /// A machine's name, unique in its clan.
    MachineName, "machine name"
);
name!(
    /// A person's name, unique in their clan.
    PersonName, "person's name"
);
name!(
    /// The name of a person's device, unique among that person's.
    DeviceName, "device name"
);
name!(
    /// The name of a group of people and machines, unique in its clan.
    GroupName, "group name"
);
name!(
    /// The name of an access rule, unique in its clan.
    RuleName, "rule name"
);
name!(
    /// A service's name, as in `<service>.<clan>.clan`.
    ServiceName, "service name"
);
name!(
    /// An application's name, as the catalog has it. A service is an application that runs somewhere.
    AppName, "application's name"
);
name!(
    /// What carries packets between a clan's machines. Any name can stand here, so that what a newer version of Clan knows
    /// can be read, told and refused: ask [`NetworkLayer::is_known`].
    NetworkLayer, "network layer"
);

impl NetworkLayer {
    /// Clan's own.
    pub const MESH: &'static str = "mesh";

    /// Whether this version of Clan can carry packets by it.
    pub fn is_known(&self) -> bool {
        self.as_str() == Self::MESH
    }
}

impl Default for NetworkLayer {
    fn default() -> Self {
        Self(Self::MESH.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels() {
        assert_eq!("Family".parse::<ClanName>().unwrap().as_str(), "family");
        assert_eq!("".parse::<ClanName>(), Err(NameError::Empty { kind: "clan name" }));
        assert!(matches!("a b".parse::<ClanName>(), Err(NameError::BadCharacter { found: ' ', .. })));
        assert!(matches!("-a".parse::<ClanName>(), Err(NameError::BadCharacter { found: '-', .. })));
        assert!(matches!("x".repeat(64).parse::<ClanName>(), Err(NameError::TooLong { .. })));
        assert!("../../etc".parse::<MachineName>().is_err());
    }
}
