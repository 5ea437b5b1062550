//! Twelve words from which an owner's recovery key follows.
//!
//! As [BIP-39](https://github.com/bitcoin/bips/blob/master/bip-0039.mediawiki) has them: 128 bits and a checksum of 4, in
//! words of the list of [`crate::Words`]. The key is derived with BLAKE3, not as wallets derive theirs: a phrase with 128
//! bits needs no slow hash, and one that is used in both places gives nothing away.

use std::{fmt, str::FromStr};

use bip39::{Language, Mnemonic};

use crate::words::{self, WordsError};

const COUNT: usize = 12;
const MAX_TEXT: usize = 2048;
const KEY_CONTEXT: &str = "clan 2026-11 recovery key v1";

/// A recovery phrase: whoever has it can act for its owner. Shown once, never stored, never logged.
#[derive(Clone, PartialEq, Eq)]
pub struct RecoveryPhrase([u8; 16]);

/// Why a text is not a recovery phrase.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PhraseError {
    /// Fewer or more.
    #[error("a recovery phrase has twelve words; here are {0}")]
    Count(usize),
    /// Not in the list.
    #[error("`{word}` is not one of the words that recovery phrases are made of")]
    Unknown {
        /// The word that was given, shortened.
        word: String,
        /// The word of the list that it may have been meant to be.
        nearest: Option<&'static str>,
    },
    /// All are words of the list, but not these in this order.
    #[error("these words are not a recovery phrase: one of them is another, or their order is")]
    Checksum,
}

impl RecoveryPhrase {
    /// The phrase of 128 bits of the caller's randomness, all of it secret.
    pub const fn from_entropy(entropy: [u8; 16]) -> Self {
        Self(entropy)
    }

    /// The seed of the Ed25519 key that the phrase stands for. Never log it.
    pub fn key_seed(&self) -> [u8; 32] {
        blake3::derive_key(KEY_CONTEXT, &self.0)
    }

    /// The words, for the one time that they are shown.
    pub fn words(&self) -> String {
        // 16 bytes are a length that the standard has.
        Mnemonic::from_entropy(&self.0).map(|m| m.words().collect::<Vec<_>>().join(" ")).unwrap_or_default()
    }
}

impl fmt::Debug for RecoveryPhrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RecoveryPhrase(…)")
    }
}

impl FromStr for RecoveryPhrase {
    type Err = PhraseError;

    /// Takes what people make of twelve words, as [`crate::Words`] does; and the numbers before them.
    fn from_str(text: &str) -> Result<Self, PhraseError> {
        let text: String =
            text.chars().take(MAX_TEXT).map(|c| if c.is_ascii_digit() || c == '.' { ' ' } else { c }).collect();
        let given: Vec<&str> = words::split(&text).collect();
        if given.len() != COUNT {
            return Err(PhraseError::Count(given.len()));
        }
        let mut found = Vec::with_capacity(COUNT);
        for word in given {
            let at = words::find(word).map_err(|error| match error {
                WordsError::Unknown { word, nearest } => PhraseError::Unknown { word, nearest },
                WordsError::Count(count) => PhraseError::Count(count),
            })?;
            found.push(words::word(at));
        }
        let mnemonic = Mnemonic::parse_in_normalized(Language::English, &found.join(" "));
        let (entropy, length) = mnemonic.map_err(|_| PhraseError::Checksum)?.to_entropy_array();
        entropy[..length].try_into().map(Self).map_err(|_| PhraseError::Checksum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn words_round_trip_however_they_are_written(entropy: [u8; 16]) {
            let phrase = RecoveryPhrase::from_entropy(entropy);
            prop_assert_eq!(&phrase.words().parse::<RecoveryPhrase>().unwrap(), &phrase);
            let list: Vec<String> =
                phrase.words().split(' ').enumerate().map(|(n, w)| format!("{}. {}", n + 1, w.to_uppercase())).collect();
            prop_assert_eq!(&list.join("\n").parse::<RecoveryPhrase>().unwrap(), &phrase);
        }

        #[test]
        fn different_phrases_give_different_keys(one: [u8; 16], other: [u8; 16]) {
            prop_assume!(one != other);
            prop_assert_ne!(
                RecoveryPhrase::from_entropy(one).key_seed(),
                RecoveryPhrase::from_entropy(other).key_seed()
            );
        }

        #[test]
        fn any_text_is_parsed_without_a_panic(text in ".{0,200}") {
            let _ = text.parse::<RecoveryPhrase>();
        }
    }

    #[test]
    fn the_words_are_those_of_the_standard() {
        // The first test vectors of BIP-39.
        let zero = RecoveryPhrase::from_entropy([0; 16]);
        assert_eq!(zero.words(), format!("{}about", "abandon ".repeat(11)));
        let vector = RecoveryPhrase::from_entropy([0x7f; 16]);
        assert_eq!(vector.words(), "legal winner thank year wave sausage worth useful legal winner thank yellow");
    }

    #[test]
    fn a_mistake_is_noticed_and_named() {
        let phrase = RecoveryPhrase::from_entropy([0x7f; 16]).words();
        assert_eq!(phrase.replace("winner", "abandon").parse::<RecoveryPhrase>(), Err(PhraseError::Checksum));
        assert_eq!("legal winner".parse::<RecoveryPhrase>(), Err(PhraseError::Count(2)));
        assert_eq!(
            phrase.replace("sausage", "sausagee").parse::<RecoveryPhrase>(),
            Err(PhraseError::Unknown { word: "sausagee".into(), nearest: Some("sausage") })
        );
    }

    #[test]
    fn a_phrase_is_not_in_what_is_logged() {
        assert_eq!(format!("{:?}", RecoveryPhrase::from_entropy([1; 16])), "RecoveryPhrase(…)");
    }
}
