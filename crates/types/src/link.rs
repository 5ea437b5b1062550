//! Invitation links, `clan://join/<payload>`, and links that make a computer a device of somebody: `clan://device/<payload>`.
//!
//! The payload is base64url of `version (1 byte) ‖ postcard body ‖ checksum (4 bytes of BLAKE3)`. The checksum tells a
//! damaged link from a foreign one; it authenticates nothing. What authenticates is the invite secret: its public half
//! is in the clan's ledger.

use std::{fmt, net::SocketAddr, str::FromStr, time::Duration};

use data_encoding::BASE64URL_NOPAD;
use serde::{Deserialize, Serialize};

use crate::{CertificateHash, ClanId, Host, MachineId};

const SCHEME: &str = "clan://";
/// Links that other programs made for NixOS configurations.
const NIX: &str = "nix://";
const PREFIXES: [(&str, Purpose); 2] = [("clan://join/", Purpose::Join), ("clan://device/", Purpose::Device)];
/// What the names of the passing devices begin with that device links stand for.
pub const DEVICE_LINK: &str = "link-";
/// How long a device link works.
pub const DEVICE_LINK_LIFETIME: Duration = Duration::from_secs(600);
const VERSION: u8 = 2;
/// INVARIANT: a link longer than this is refused before it is decoded.
const MAX_TEXT: usize = 2048;
const MAX_PEERS: usize = 8;
const MAX_ADDRS: usize = 16;
const MAX_RELAYS: usize = 2;

/// Where a machine can be reached on the base network.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PeerAddr {
    /// The machine, whose key the connection authenticates.
    pub machine: MachineId,
    /// QUIC addresses, best first.
    pub addrs: Vec<SocketAddr>,
}

/// Where a relay is, for whoever cannot read the clan's ledger yet.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RelayAddr {
    /// Where it is reached.
    pub host: Host,
    /// TCP port, and UDP port of address discovery.
    pub port: u16,
    /// The certificate that it shows.
    pub certificate: CertificateHash,
}

/// The private half of an invite: whoever holds it may redeem the invite.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InviteSecret([u8; 32]);

impl InviteSecret {
    /// Wraps an Ed25519 seed.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The Ed25519 seed. Never log it.
    pub const fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for InviteSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InviteSecret(…)")
    }
}

/// What a link is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Purpose {
    /// Lets somebody in; the secret is an invite's.
    #[default]
    Join,
    /// Makes a computer a device of the person who made the link; the secret is a device's that can do that only.
    Device,
}

/// What an invitation link carries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InviteLink {
    /// What it is for; in the text form, what stands in front.
    #[serde(skip)]
    pub purpose: Purpose,
    /// The clan that the link leads to; what is fetched must hash to it.
    pub clan: ClanId,
    /// The right to join.
    pub secret: InviteSecret,
    /// Machines that can admit the newcomer: at least one.
    pub peers: Vec<PeerAddr>,
    /// Relays at which these machines can be reached if not at their addresses: two at most, so that links stay short.
    pub relays: Vec<RelayAddr>,
}

/// Why a text is not an invitation link.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// Not a `clan://` link at all.
    #[error("this is not a clan link")]
    Foreign,
    /// A `clan://` or `nix://` link, but not an invitation: it leads to a configuration.
    #[error("this link leads to a configuration, which this version of Clan cannot build yet")]
    NotAnInvitation,
    /// Characters are missing, added or changed.
    #[error("the invitation link is incomplete or damaged")]
    Damaged,
    /// Made by a newer Clan.
    #[error("the invitation link was made by a newer version of Clan (link version {0})")]
    NewerVersion(u8),
}

impl fmt::Display for InviteLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = vec![VERSION];
        // Serialising plain data into memory cannot fail.
        bytes.extend(postcard::to_allocvec(self).map_err(|_| fmt::Error)?);
        let checksum = blake3::hash(&bytes);
        bytes.extend_from_slice(&checksum.as_bytes()[..4]);
        let prefix = PREFIXES.iter().find(|(_, purpose)| *purpose == self.purpose).map_or("", |(prefix, _)| prefix);
        write!(f, "{prefix}{}", BASE64URL_NOPAD.encode(&bytes))
    }
}

impl FromStr for InviteLink {
    type Err = LinkError;
    fn from_str(text: &str) -> Result<Self, LinkError> {
        let text = text.trim();
        if text.get(..NIX.len()).is_some_and(|s| s.eq_ignore_ascii_case(NIX)) {
            return Err(LinkError::NotAnInvitation);
        }
        if !text.get(..SCHEME.len()).is_some_and(|s| s.eq_ignore_ascii_case(SCHEME)) {
            return Err(LinkError::Foreign);
        }
        let begins = |prefix: &str| text.get(..prefix.len()).is_some_and(|t| t.eq_ignore_ascii_case(prefix));
        let (prefix, purpose) =
            PREFIXES.into_iter().find(|(prefix, _)| begins(prefix)).ok_or(LinkError::NotAnInvitation)?;
        let payload = &text[prefix.len()..];
        if text.len() > MAX_TEXT {
            return Err(LinkError::Damaged);
        }
        let bytes =
            BASE64URL_NOPAD.decode(payload.trim_end_matches(['/', '=']).as_bytes()).map_err(|_| LinkError::Damaged)?;
        let (signed, checksum) = bytes.split_at_checked(bytes.len().wrapping_sub(4)).ok_or(LinkError::Damaged)?;
        if blake3::hash(signed).as_bytes()[..4] != *checksum {
            return Err(LinkError::Damaged);
        }
        match signed {
            [VERSION, body @ ..] => {
                let link: Self = postcard::from_bytes(body).map_err(|_| LinkError::Damaged)?;
                let link = Self { purpose, ..link };
                let within = !link.peers.is_empty()
                    && link.peers.len() <= MAX_PEERS
                    && link.relays.len() <= MAX_RELAYS
                    && link.peers.iter().all(|p| p.addrs.len() <= MAX_ADDRS);
                within.then_some(link).ok_or(LinkError::Damaged)
            }
            [newer, ..] if *newer > VERSION => Err(LinkError::NewerVersion(*newer)),
            _ => Err(LinkError::Damaged),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn link() -> InviteLink {
        InviteLink {
            purpose: Purpose::Join,
            clan: ClanId::from_bytes([1; 32]),
            secret: InviteSecret::from_bytes([2; 32]),
            peers: vec![PeerAddr {
                machine: MachineId::from_bytes([3; 32]),
                addrs: vec!["192.0.2.1:4433".parse().unwrap()],
            }],
            relays: vec![RelayAddr {
                host: "203.0.113.7".parse().unwrap(),
                port: 443,
                certificate: CertificateHash::from_bytes([4; 32]),
            }],
        }
    }

    #[test]
    fn a_link_round_trips() {
        assert_eq!(link().to_string().parse(), Ok(link()));
        assert!(!format!("{:?}", link()).contains("[2, 2"), "debug output hides the secret");
    }

    #[test]
    fn a_truncated_link_is_damaged_wherever_it_is_cut() {
        let text = link().to_string();
        for end in PREFIXES[0].0.len()..text.len() {
            assert_eq!(text[..end].parse::<InviteLink>(), Err(LinkError::Damaged), "cut at {end}");
        }
    }

    #[test]
    fn foreign_links_are_told_apart() {
        assert_eq!("https://example.org".parse::<InviteLink>(), Err(LinkError::Foreign));
        assert_eq!("clan://github.com/some/flake".parse::<InviteLink>(), Err(LinkError::NotAnInvitation));
    }

    proptest! {
        #[test]
        fn a_changed_character_never_yields_another_link(at in 12usize..120, with in "[A-Za-z0-9_-]") {
            let mut text = link().to_string();
            prop_assume!(at < text.len() && text[at..=at] != with);
            text.replace_range(at..=at, &with);
            prop_assert!(text.parse::<InviteLink>().is_err());
        }

        #[test]
        fn parsing_any_text_never_panics(text in "(clan://join/)?[ -~é]{0,200}") {
            let _ = text.parse::<InviteLink>();
        }
    }
}
