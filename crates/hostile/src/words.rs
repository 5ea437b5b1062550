//! Newcomers who do not know the words, and machines that do not.

use clan_pairing::{Codes, ConversationId, Newcomer};
use clan_types::{Channel, Words};
use clan_wire::words::{MAX_CHANNELS, WordsRequest, WordsResponse, announced};

use crate::{clan, round_trip};

/// Announcements on the local network, and conversations about words that the other side does not know.
pub fn words(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    match *kind {
        0 => assert!(announced(&String::from_utf8_lossy(rest)).len() <= MAX_CHANNELS),
        1 => {
            let _ = String::from_utf8_lossy(rest).parse::<Words>();
        }
        2 => drop(round_trip::<WordsResponse>(rest)),
        3 => machine(rest),
        _ => newcomer(rest),
    }
}

fn known() -> Words {
    Words::from_entropy([7; 6])
}

/// INVARIANT looked for: the link is not given to somebody who does not know the words.
fn machine(data: &[u8]) {
    let mut codes = Codes::new(clan::machine(clan::MEMBER));
    codes.open(&known(), b"clan://join/secret".to_vec().into(), clan::now(0).wall).expect("nothing else is open");
    let stranger = clan::machine(clan::STRANGER);
    let mut seconds = 0;
    for part in clan::parts(data) {
        let Some((kind, rest)) = part.split_first() else { continue };
        seconds += u64::from(*kind >> 2);
        let (id, now) = (ConversationId(u64::from(*kind & 3)), clan::now(seconds).wall);
        // The first word is public: that of a message is taken for the right one more often than it is.
        let begins = match round_trip::<WordsRequest>(rest) {
            Some(WordsRequest::Begin { channel, share }) => Some((channel, share)),
            Some(WordsRequest::Confirm { tag }) => {
                assert!(codes.confirm(id, &tag, now).is_err(), "a link for no words");
                None
            }
            // Of strangers no machine takes it.
            Some(WordsRequest::Wait { .. }) => None,
            None => rest.split_first_chunk::<2>().map(|(number, share)| {
                let number = Channel::from_number(u16::from_le_bytes(*number));
                (number.unwrap_or(known().channel()), share.to_vec())
            }),
        };
        if let Some((channel, share)) = begins {
            let _ = codes.begin(id, &stranger, channel, &share, &[*kind; 32], now);
        }
        assert!(codes.channels().len() <= MAX_CHANNELS && codes.reports().len() <= 1);
    }
}

fn newcomer(data: &[u8]) {
    let mut parts = clan::parts(data);
    let (share, sealed) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let (us, them) = (clan::machine(clan::STRANGER), clan::machine(clan::MEMBER));
    let (newcomer, _) = Newcomer::begin(&known(), &us, &them, &[1; 32]);
    if let Ok((agreed, _)) = newcomer.agree(share) {
        assert!(agreed.open(sealed).is_err(), "a link from somebody who does not know the words");
    }
}
