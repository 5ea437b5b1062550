//! Finding an invitation in what a person pasted.

use crate::{InviteLink, LinkError};

const BEGINNINGS: [&str; 2] = ["clan://join/", "clan://device/"];
/// INVARIANT: nothing beyond this many characters is looked at.
const MAX_PASTED: usize = 16 << 10;

impl InviteLink {
    /// The invitation in a pasted text: quotes and words around it, blanks and line breaks in it do not matter.
    pub fn in_text(text: &str) -> Result<Self, LinkError> {
        let text: String = text.chars().take(MAX_PASTED).filter(|c| !is_invisible(*c)).collect();
        let lower = text.to_ascii_lowercase();
        let found = BEGINNINGS.iter().find_map(|beginning| Some((lower.find(beginning)?, *beginning)));
        let Some((at, beginning)) = found else {
            // What is wrong with it is said of the text itself, without its quotes.
            return text.trim_matches(|c: char| c.is_whitespace() || is_quote(c)).parse();
        };
        // A mail program may have broken the link, and words may follow it: the checksum says where it ends.
        let mut link = beginning.to_owned();
        let mut outcome = Err(LinkError::Damaged);
        for piece in text[at + beginning.len()..].split_whitespace() {
            let piece = piece.trim_start_matches(['>', '|']);
            let end = piece.find(|c| !is_payload(c)).unwrap_or(piece.len());
            link.push_str(&piece[..end]);
            match link.parse() {
                Ok(link) => return Ok(link),
                Err(newer @ LinkError::NewerVersion(_)) => return Err(newer),
                Err(error) => outcome = Err(error),
            }
            if end < piece.len() && piece[end..].chars().any(|c| !is_quote(c)) {
                break;
            }
        }
        outcome
    }
}

fn is_payload(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_')
}

fn is_quote(c: char) -> bool {
    matches!(c, '"' | '\'' | '`' | '<' | '>' | '“' | '”' | '„' | '‘' | '’' | '«' | '»' | '(' | ')' | '=')
}

fn is_invisible(c: char) -> bool {
    matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{2060}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ClanId, InviteSecret, MachineId, PeerAddr, Purpose};
    use proptest::prelude::*;

    fn link() -> InviteLink {
        InviteLink {
            purpose: Purpose::Join,
            clan: ClanId::from_bytes([1; 32]),
            secret: InviteSecret::from_bytes([2; 32]),
            peers: vec![PeerAddr {
                machine: MachineId::from_bytes([3; 32]),
                addrs: vec!["192.0.2.1:41640".parse().unwrap(), "[2001:db8::1]:41640".parse().unwrap()],
            }],
            relays: Vec::new(),
        }
    }

    #[test]
    fn what_programs_and_people_put_around_a_link_does_not_matter() {
        let text = link().to_string();
        let (front, back) = text.split_at(80);
        for pasted in [
            format!("  {text}\n"),
            format!("\"{text}\""),
            format!("‘{text}’,"),
            format!("<{text}>"),
            format!("Hello Ben,\nhere it is: {text}.\nSee you tomorrow"),
            format!("{front}\n{back}"),
            format!("{front}\r\n  {back} See you"),
            format!("> {front}\n> {back}\n"),
            format!("{front}\u{200b}{back}\u{feff}"),
            text.replace("clan://join", "CLAN://Join"),
        ] {
            assert_eq!(InviteLink::in_text(&pasted), Ok(link()), "{pasted:?}");
        }
    }

    #[test]
    fn a_link_for_a_device_is_told_apart_from_one_for_a_person() {
        let device = InviteLink { purpose: Purpose::Device, ..link() };
        assert_eq!(InviteLink::in_text(&format!("“{device}”")), Ok(device.clone()));
        assert!(device.to_string().starts_with("clan://device/"));
    }

    #[test]
    fn what_is_no_link_is_told_apart_from_a_damaged_one() {
        let text = link().to_string();
        assert_eq!(InviteLink::in_text("https://example.org"), Err(LinkError::Foreign));
        assert_eq!(InviteLink::in_text("'clan://github.com/x'"), Err(LinkError::NotAnInvitation));
        assert_eq!(InviteLink::in_text("clan://join/"), Err(LinkError::Damaged));
        assert_eq!(InviteLink::in_text(&text[..text.len() - 3]), Err(LinkError::Damaged));
        assert_eq!(InviteLink::in_text(&text[..text.len() - 3].replacen('/', " /", 5)), Err(LinkError::Foreign));
    }

    proptest! {
        #[test]
        fn a_link_may_be_broken_anywhere(cuts in prop::collection::vec(12usize..200, 0..6)) {
            let mut text = link().to_string();
            for cut in cuts {
                if cut < text.len() {
                    text.insert_str(cut, "\n ");
                }
            }
            prop_assert_eq!(InviteLink::in_text(&text), Ok(link()));
        }

        #[test]
        fn any_text_is_looked_at_without_a_panic(text in ".{0,200}") {
            let _ = InviteLink::in_text(&format!("clan://join/{text}"));
            let _ = InviteLink::in_text(&text);
        }
    }
}
