//! Four words that stand for an invitation link for a few minutes.
//!
//! The words are of the English list of [BIP-39](https://github.com/bitcoin/bips/blob/master/bip-0039.mediawiki) (2048
//! words, told apart by their first four letters; MIT licence, here by the crate `bip39`, CC0). The first word is the
//! *channel*: public, it finds the machine that waits for the words. The other three are the secret: one of 2^33.

use std::{fmt, str::FromStr};

use bip39::Language;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// How many words.
const COUNT: usize = 4;
/// BIP-39: so many letters tell every word of the list from every other one.
const ENOUGH_LETTERS: usize = 4;
/// INVARIANT: a text longer than this is refused before its words are looked up.
const MAX_TEXT: usize = 2048;

/// The public part of [`Words`]: tells the machine that waits for them from others on the same network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Channel(u16);

impl Channel {
    /// `None` if no word of the list has the number.
    pub fn from_number(number: u16) -> Option<Self> {
        (usize::from(number) < list().len()).then_some(Self(number))
    }

    /// Its word's place in the list.
    pub const fn number(self) -> u16 {
        self.0
    }

    /// Its word.
    pub fn word(self) -> &'static str {
        word(self.0)
    }
}

impl<'de> Deserialize<'de> for Channel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_number(u16::deserialize(deserializer)?).ok_or_else(|| D::Error::custom("no such word"))
    }
}

/// Four words: the channel and the secret. Never log them.
#[derive(Clone, PartialEq, Eq)]
pub struct Words([u16; COUNT]);

/// Why a text is not four words of the list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WordsError {
    /// Fewer or more.
    #[error("an invitation in words has four of them; here are {0}")]
    Count(usize),
    /// Not in the list.
    #[error("`{word}` is not one of the words that invitations are made of")]
    Unknown {
        /// The word that was given, shortened.
        word: String,
        /// The word of the list that it may have been meant to be.
        nearest: Option<&'static str>,
    },
}

impl Words {
    /// The words that 44 of these bits name: the caller's randomness, all of it secret.
    pub fn from_entropy(entropy: [u8; 6]) -> Self {
        let bits = entropy.iter().fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
        Self([33, 22, 11, 0].map(|shift| (bits >> shift & 0x7ff) as u16))
    }

    /// The public part.
    pub const fn channel(&self) -> Channel {
        Channel(self.0[0])
    }

    /// The secret part, in the form in which both sides put it into the key agreement.
    pub fn secret(&self) -> String {
        self.0[1..].iter().map(|at| word(*at)).collect::<Vec<_>>().join(" ")
    }

    /// Whether a text may be meant as words rather than as a link or a file: letters and separators only, and most of
    /// it words of the list.
    pub fn looks_like(text: &str) -> bool {
        if text.len() > MAX_TEXT || !text.chars().all(|c| c.is_alphabetic() || is_separator(c)) {
            return false;
        }
        let (mut all, mut known) = (0, 0);
        for word in split(text) {
            all += 1;
            known += usize::from(find_exactly(&word.to_lowercase()).is_some());
        }
        (2..=2 * COUNT).contains(&all) && known * 2 > all
    }
}

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.map(word).join(" "))
    }
}

impl fmt::Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Words(…)")
    }
}

impl FromStr for Words {
    type Err = WordsError;

    /// Takes capitals, abbreviations to four letters, and hyphens, commas, quotes or line breaks between the words.
    fn from_str(text: &str) -> Result<Self, WordsError> {
        let text: String = text.chars().take(MAX_TEXT).collect();
        let given: Vec<&str> = split(&text).collect();
        let given: [&str; COUNT] = given.try_into().map_err(|all: Vec<&str>| WordsError::Count(all.len()))?;
        let mut found = [0; COUNT];
        for (slot, given) in found.iter_mut().zip(given) {
            *slot = find(given)?;
        }
        Ok(Self(found))
    }
}

impl Serialize for Words {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Words {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

fn list() -> &'static [&'static str; 2048] {
    Language::English.word_list()
}

pub(crate) fn word(at: u16) -> &'static str {
    list().get(usize::from(at)).copied().unwrap_or_default()
}

fn is_separator(c: char) -> bool {
    c.is_whitespace() || matches!(c, '-' | ',' | ';' | '"' | '\'' | '`' | '“' | '”' | '„' | '‘' | '’')
}

pub(crate) fn split(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_separator).filter(|word| !word.is_empty())
}

/// The place in the list of a word as a person wrote it.
pub(crate) fn find(given: &str) -> Result<u16, WordsError> {
    let lower = given.to_lowercase();
    let unknown = || WordsError::Unknown { word: given.chars().take(24).collect(), nearest: nearest(&lower) };
    find_exactly(&lower).ok_or_else(unknown)
}

/// A word of the list, or its beginning if that is of no other.
fn find_exactly(lower: &str) -> Option<u16> {
    if let Some(at) = Language::English.find_word(lower) {
        return Some(at);
    }
    if lower.chars().count() < ENOUGH_LETTERS {
        return None;
    }
    list().iter().position(|word| word.starts_with(lower)).and_then(|at| u16::try_from(at).ok())
}

/// The word of the list that takes the fewest changes of a letter, if two are enough.
fn nearest(given: &str) -> Option<&'static str> {
    let given: Vec<char> = given.chars().take(12).collect();
    list()
        .iter()
        .map(|word| (distance(&given, word), *word))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, _)| *distance <= 2)
        .map(|(_, word)| word)
}

/// Levenshtein's distance.
fn distance(a: &[char], b: &str) -> usize {
    let mut row: Vec<usize> = (0..=a.len()).collect();
    for (line, letter) in b.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = line + 1;
        for (at, other) in a.iter().enumerate() {
            let cost = diagonal + usize::from(*other != letter);
            diagonal = row[at + 1];
            row[at + 1] = cost.min(row[at] + 1).min(diagonal + 1);
        }
    }
    row[a.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn text_form_round_trips(entropy: [u8; 6]) {
            let words = Words::from_entropy(entropy);
            prop_assert_eq!(&words.to_string().parse::<Words>().unwrap(), &words);
            prop_assert!(Words::looks_like(&words.to_string()));
        }

        #[test]
        fn words_may_be_written_as_people_write_them(entropy: [u8; 6]) {
            let words = Words::from_entropy(entropy);
            let all: Vec<String> = words.to_string().split(' ').map(str::to_uppercase).collect();
            prop_assert_eq!(&format!(" “{}”\n", all.join("-")).parse::<Words>().unwrap(), &words);
            let short: Vec<String> = all.iter().map(|w| w.chars().take(4).collect()).collect();
            prop_assert_eq!(&short.join(", ").parse::<Words>().unwrap(), &words);
        }

        #[test]
        fn parsing_any_text_never_panics(text in ".{0,80}") {
            let _ = text.parse::<Words>();
        }
    }

    #[test]
    fn the_list_is_the_published_one() {
        let text = list().map(|word| format!("{word}\n")).concat();
        // english.txt of the BIP-39 repository; its SHA-256 is 2f5eed53a4727b4bf8880d8f3f199efc90e58503646d9ff8eff3a2ed3b24dbda.
        assert_eq!(
            blake3::hash(text.as_bytes()).to_hex().as_str(),
            "43afe08c75f902534cfd2a694bef11db381f4804cd3ef76cd05a8ad0d7199122"
        );
        assert!((0..2047).all(|at| word(at)[..word(at).len().min(4)] != word(at + 1)[..word(at + 1).len().min(4)]));
    }

    #[test]
    fn a_misspelt_word_is_named_with_the_nearest() {
        assert_eq!(
            "zebra zoo abandon ablee".parse::<Words>(),
            Err(WordsError::Unknown { word: "ablee".into(), nearest: Some("able") })
        );
        assert_eq!("zebra zoo".parse::<Words>(), Err(WordsError::Count(2)));
        assert!(Words::looks_like("zebra zoo abandon ablee"));
        assert!(!Words::looks_like("not a link"));
        assert!(!Words::looks_like("clan://join/abc"));
        assert!(!Words::looks_like("invite.png"));
    }

    #[test]
    fn all_bits_count_and_the_first_word_is_the_channel() {
        let words = Words::from_entropy([0x0f, 0xff, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(words.to_string(), "zoo zoo zoo zoo");
        let words = Words::from_entropy([0, 0, 0, 0, 0, 1]);
        assert_eq!((words.channel().word(), words.secret().as_str()), ("abandon", "abandon abandon ability"));
    }

    #[test]
    fn words_are_not_in_what_is_logged() {
        assert_eq!(format!("{:?}", Words::from_entropy([1; 6])), "Words(…)");
    }
}
