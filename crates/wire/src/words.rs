//! What a newcomer who was told four words and the machine that waits for them say over QUIC.
//!
//! One bi-directional stream of the newcomer's: [`WordsRequest::Begin`] is answered by [`WordsResponse::Share`],
//! [`WordsRequest::Confirm`] by [`WordsResponse::Link`]; either by [`WordsResponse::Refused`], which ends it. What the
//! fields mean is `clan-pairing`'s. Machines of the clan tell those that are relays what they wait for:
//! [`WordsRequest::Wait`].

use clan_types::Channel;
use serde::{Deserialize, Serialize};

/// Newcomer to machine.
pub const ALPN_WORDS: &[u8] = b"clan/words/1";
/// Largest message.
pub const MAX_MESSAGE: usize = 4 << 10;
/// Channels that one announcement has room for.
pub const MAX_CHANNELS: usize = 8;

const ANNOUNCEMENT: &str = "clan-words-1=";

/// From the newcomer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum WordsRequest {
    /// Opens a conversation.
    Begin {
        /// The first word.
        channel: Channel,
        /// The newcomer's share of the key agreement.
        share: Vec<u8>,
    },
    /// Shows that the newcomer agreed on the same key.
    Confirm {
        /// Proof.
        tag: [u8; 32],
    },
    /// From a machine of the clan to one that is a relay: it waits for words that begin with these, and with no others. The
    /// relay says so to newcomers who ask. Answered by [`WordsResponse::Noted`].
    Wait {
        /// First words.
        channels: Vec<Channel>,
    },
}

/// From the machine that waits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum WordsResponse {
    /// The machine's share of the key agreement.
    Share(Vec<u8>),
    /// The link, sealed with the key that both agreed on.
    Link(Vec<u8>),
    /// No, and why.
    Refused(WordsRefusal),
    /// See [`WordsRequest::Wait`].
    Noted,
}

/// Why a machine does not go on with a newcomer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum WordsRefusal {
    /// It waits for no words that begin so.
    #[error("nobody waits for these words")]
    NotOpen,
    /// These words, or those of an earlier newcomer, were wrong; nobody gets another guess.
    #[error("wrong words were given, and each invitation allows one attempt: these words are void now")]
    Void,
    /// They have done their work.
    #[error("these words have been used already")]
    Used,
    /// Their time is over.
    #[error("these words have expired")]
    Expired,
    /// Too many conversations.
    #[error("the machine that waits for these words is too busy")]
    Busy,
    /// A message that makes no sense here.
    #[error("the machine that waits for these words did not understand")]
    Malformed,
}

/// What a machine adds to its announcements on the local network while it waits for words.
pub fn announcement(channels: &[Channel]) -> String {
    let numbers: Vec<String> = channels.iter().take(MAX_CHANNELS).map(|c| c.number().to_string()).collect();
    format!("{ANNOUNCEMENT}{}", numbers.join(","))
}

/// The channels of a machine's announcement; none if it is no such announcement.
pub fn announced(text: &str) -> Vec<Channel> {
    let numbers = text.strip_prefix(ANNOUNCEMENT).unwrap_or_default().split(',').take(MAX_CHANNELS);
    numbers.filter_map(|n| n.parse().ok()).filter_map(Channel::from_number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_announcement_is_read_as_it_was_written(numbers in prop::collection::vec(0u16..2048, 0..8)) {
            let channels: Vec<Channel> = numbers.into_iter().filter_map(Channel::from_number).collect();
            let text = announcement(&channels);
            // iroh carries at most so many bytes.
            prop_assert!(text.len() <= 245);
            prop_assert_eq!(announced(&text), channels);
        }

        #[test]
        fn any_announcement_is_read_without_a_panic(text in ".{0,300}") {
            prop_assert!(announced(&text).len() <= MAX_CHANNELS);
            let text = format!("{ANNOUNCEMENT}{text}");
            prop_assert!(announced(&text).len() <= MAX_CHANNELS);
        }

        #[test]
        fn any_bytes_are_decoded_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = crate::codec::decode::<WordsRequest>(&bytes);
            let _ = crate::codec::decode::<WordsResponse>(&bytes);
        }
    }

    #[test]
    fn other_announcements_name_no_channel() {
        assert!(announced("").is_empty());
        assert!(announced("something else").is_empty());
        assert!(announced("clan-words-1=2048,-1,x").is_empty());
    }
}
