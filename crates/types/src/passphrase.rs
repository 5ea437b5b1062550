//! What a person remembers, and an encrypted disk opens by.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use zeroize::Zeroizing;

/// Fewer can be guessed, however slow each guess is made.
const LEAST: usize = 8;
/// In bytes.
const MOST: usize = 512;

/// A passphrase: wiped from memory when dropped, never stored, never logged. Nothing of what was typed is left out.
#[derive(Clone, PartialEq, Eq)]
pub struct Passphrase(Zeroizing<String>);

/// Why a text is no passphrase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PassphraseError {
    /// It would be guessed.
    #[error("a passphrase has at least {} characters", LEAST)]
    Short,
    /// Nobody types so much.
    #[error("a passphrase has at most {} bytes", MOST)]
    Long,
    /// Keyboards and programs differ in what they make of these.
    #[error("a passphrase is one line, without control characters")]
    Control,
}

impl Passphrase {
    /// The text. Never log it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(…)")
    }
}

impl FromStr for Passphrase {
    type Err = PassphraseError;

    fn from_str(text: &str) -> Result<Self, PassphraseError> {
        if text.len() > MOST {
            return Err(PassphraseError::Long);
        }
        if text.chars().any(char::is_control) {
            return Err(PassphraseError::Control);
        }
        if text.chars().count() < LEAST {
            return Err(PassphraseError::Short);
        }
        Ok(Self(Zeroizing::new(text.to_owned())))
    }
}

impl Serialize for Passphrase {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Passphrase {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Zeroizing::new(String::deserialize(deserializer)?).parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passphrase_is_long_enough_one_line_and_taken_as_it_is() {
        let check = |text: &str| text.parse::<Passphrase>().map(|p| p.expose().to_owned());
        assert_eq!(check("grün wie früher "), Ok("grün wie früher ".into()));
        assert_eq!(check("seven77"), Err(PassphraseError::Short));
        assert_eq!(check("two lines\nare not one"), Err(PassphraseError::Control));
        assert_eq!(check(&"a".repeat(MOST + 1)), Err(PassphraseError::Long));
    }

    #[test]
    fn it_is_not_in_what_programs_print() {
        let passphrase: Passphrase = "correct horse".parse().unwrap();
        assert_eq!(format!("{passphrase:?}"), "Passphrase(…)");
        let json = serde_json::to_string(&passphrase).unwrap();
        assert_eq!(serde_json::from_str::<Passphrase>(&json).unwrap(), passphrase);
        let refused = serde_json::from_str::<Passphrase>("\"hunter2\"").unwrap_err().to_string();
        assert!(!refused.contains("hunter2"), "{refused}");
    }
}
