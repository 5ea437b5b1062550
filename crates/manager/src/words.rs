//! Four words in place of a link: handing them to the inviter's machine, and getting the link for them as a newcomer.

use std::time::Duration;

use clan_api::{ApiProblem, ErrorCode};
use clan_os::channel::{Channel, recv_message, send_message};
use clan_pairing::{LIFETIME, Newcomer};
use clan_relay::{Names, words as at_relay};
use clan_types::{Host, InviteLink, MachineId, RelayAddr, Timestamp, Words};
use clan_wire::{
    control::{ControlRequest, SecretText},
    words::{ALPN_WORDS, MAX_MESSAGE, WordsRefusal, WordsRequest, WordsResponse, announced},
};
use futures_util::StreamExt;
use iroh::{Endpoint, EndpointAddr, endpoint::Connection};
use iroh_mdns_address_lookup::DiscoveryEvent;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use zeroize::Zeroizing;

use crate::{
    fetch::Passing,
    guest::{self, GuestError},
    problem,
    tasks::now,
};

/// A guest tells where it is every three seconds or so.
const SEARCH: Duration = Duration::from_secs(15);
/// After a machine refused, for another one with the same first word.
const SECOND_CHANCE: Duration = Duration::from_secs(4);
/// Between questions to a relay that knows of nobody yet.
const ASK_AGAIN: Duration = Duration::from_secs(2);
/// Of relays, unless another is named.
const RELAY_PORT: u16 = 443;
const CONNECT: Duration = Duration::from_secs(8);
const ANSWER: Duration = Duration::from_secs(12);
/// INVARIANT: so many machines at most get a guess at the words of one newcomer's attempt.
const MAX_GUESSES: u32 = 3;
/// A first word may be in use already.
const ATTEMPTS: u32 = 3;

/// Lets the clan's machine here wait for words that stand for a link. `None` if it cannot.
pub(crate) async fn open(control: &Channel, link: &InviteLink) -> Option<(Words, Timestamp)> {
    for _ in 0..ATTEMPTS {
        let mut entropy = Zeroizing::new([0; 6]);
        getrandom::fill(entropy.as_mut_slice()).ok()?;
        let words = Words::from_entropy(*entropy);
        let request = ControlRequest::OpenWords { words: words.clone(), link: SecretText::new(link.to_string()) };
        match guest::tell(control, &request).await {
            Ok(()) => return Some((words, now().plus(LIFETIME))),
            Err(GuestError::Failed { why, .. }) => tracing::debug!(why, "other words are tried"),
            Err(error) => {
                tracing::info!(%error, "the invite has no words: its machine may run an older version");
                return None;
            }
        }
    }
    None
}

/// The link in a pasted text, or the one that the words in it stand for: on the local network, or at a relay.
pub(crate) async fn find(text: &str, relay: Option<&str>) -> Result<InviteLink, ApiProblem> {
    if !Words::looks_like(text.trim()) {
        return InviteLink::in_text(text).map_err(|e| problem::link(&e));
    }
    let words: Words = text.parse().map_err(|e| problem::words(&e))?;
    match relay {
        Some(relay) => find_at(relay, &words).await,
        None => find_here(&words).await,
    }
}

async fn find_here(words: &Words) -> Result<InviteLink, ApiProblem> {
    let passing = Passing::new()?;
    let Some(lookup) = passing.lookup() else {
        return Err(ApiProblem::new(
            ErrorCode::Unreachable,
            "this network cannot be searched for the inviter's machine",
        )
        .why("it carries no multicast")
        .hint("ask for the link instead of the words"));
    };
    // From before anything can be found: a machine that is known is not told of again.
    let mut events = lookup.subscribe().await;
    let endpoint = passing.bind().await?;
    let outcome = search(&endpoint, &mut events, words).await;
    endpoint.close().await;
    outcome
}

async fn search(
    endpoint: &Endpoint,
    events: &mut (impl futures_util::Stream<Item = DiscoveryEvent> + Unpin),
    words: &Words,
) -> Result<InviteLink, ApiProblem> {
    let mut attempt = Attempt::new();
    let mut until = Instant::now() + SEARCH;
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            () = sleep_until(until) => None,
        };
        let Some(event) = event else { break };
        let DiscoveryEvent::Discovered { endpoint_info, .. } = event else { continue };
        let told = endpoint_info.user_data().map(|data| announced(data.as_ref())).unwrap_or_default();
        if !told.contains(&words.channel()) {
            continue;
        }
        if let Some(link) = attempt.ask(endpoint, endpoint_info.to_endpoint_addr(), words).await {
            return Ok(link);
        }
        if attempt.is_over() {
            break;
        }
        if matches!(attempt.last, Some(Failure::Refused(_))) {
            until = until.min(Instant::now() + SECOND_CHANCE);
        }
    }
    Err(attempt.problem(|| problem::words_refusal(WordsRefusal::NotOpen)))
}

/// Asks a relay who waits for the words, until somebody does, and them for the link, through it.
async fn find_at(relay: &str, words: &Words) -> Result<InviteLink, ApiProblem> {
    let (host, port) = read_place(relay)?;
    let passing = Passing::new()?;
    let names = passing.names();
    let endpoint = passing.bind().await?;
    let outcome = search_at(&endpoint, &names, (&host, port), words).await;
    endpoint.close().await;
    outcome
}

async fn search_at(
    endpoint: &Endpoint,
    names: &Names,
    (host, port): (&Host, u16),
    words: &Words,
) -> Result<InviteLink, ApiProblem> {
    let mut attempt = Attempt::new();
    let until = Instant::now() + SEARCH;
    let mut asked: Vec<MachineId> = Vec::new();
    loop {
        let (relay, machines) =
            at_relay::ask(host, port, words.channel()).await.map_err(|error| problem::words_relay(&error))?;
        for machine in machines {
            let Ok(id) = iroh::PublicKey::from_bytes(machine.as_bytes()) else { continue };
            if asked.contains(&machine) {
                continue;
            }
            asked.push(machine);
            let Some(url) = clan_relay::introduce_for_words(endpoint, names, &relay, words.channel()).await else {
                continue;
            };
            if let Some(link) = attempt.ask(endpoint, EndpointAddr::new(id).with_relay_url(url), words).await {
                return Ok(link);
            }
            if attempt.is_over() {
                break;
            }
        }
        // The inviter's machine tells the relay a moment after its person has read the words.
        if !asked.is_empty() || Instant::now() + ASK_AGAIN > until {
            break;
        }
        sleep(ASK_AGAIN).await;
    }
    Err(attempt.problem(|| problem::words_unknown_at(&place_of(host, port))))
}

/// Where a relay is, as people write it.
fn read_place(text: &str) -> Result<(Host, u16), ApiProblem> {
    let text = text.trim();
    let bad = |why: String| {
        ApiProblem::new(ErrorCode::BadRequest, "that is no place of a relay")
            .why(why)
            .hint("for example 203.0.113.7, relay.example.org:8443 or [2001:db8::7]:443")
    };
    // A bare IPv6 address has colons of its own.
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => {
            (host, port.parse().map_err(|_| bad("after the colon comes a port, a number up to 65535".into()))?)
        }
        _ => (text, RELAY_PORT),
    };
    Ok((host.parse().map_err(|e: clan_types::HostError| bad(e.to_string()))?, port))
}

/// The same of a relay that the clan has.
pub(crate) fn place(relay: &RelayAddr) -> String {
    place_of(&relay.host, relay.port)
}

fn place_of(host: &Host, port: u16) -> String {
    match host.ip() {
        _ if port == RELAY_PORT => host.to_string(),
        Some(std::net::IpAddr::V6(ip)) => format!("[{ip}]:{port}"),
        _ => format!("{host}:{port}"),
    }
}

/// What became of the words at the machines that were asked so far.
struct Attempt {
    guesses: u32,
    last: Option<Failure>,
}

impl Attempt {
    fn new() -> Self {
        Self { guesses: 0, last: None }
    }

    /// Gives a machine its guess.
    async fn ask(&mut self, endpoint: &Endpoint, machine: EndpointAddr, words: &Words) -> Option<InviteLink> {
        let id = machine.id;
        match converse(endpoint, machine, words).await {
            Ok(link) => Some(link),
            Err(failure) => {
                tracing::debug!(machine = %id, ?failure, "no link for the words");
                self.guesses += u32::from(matches!(failure, Failure::Guessed(_)));
                self.last = Some(failure);
                None
            }
        }
    }

    fn is_over(&self) -> bool {
        matches!(self.last, Some(Failure::Guessed(WordsRefusal::Void))) || self.guesses >= MAX_GUESSES
    }

    /// What to tell the newcomer.
    fn problem(self, nobody: impl FnOnce() -> ApiProblem) -> ApiProblem {
        match self.last {
            Some(Failure::Refused(refusal) | Failure::Guessed(refusal)) => problem::words_refusal(refusal),
            Some(Failure::Broken(why)) => {
                ApiProblem::new(ErrorCode::Unreachable, "the machine that waits for these words does not answer")
                    .why(why)
                    .hint("try again: these words are still good")
            }
            None => nobody(),
        }
    }
}

#[derive(Debug)]
enum Failure {
    /// Before anything was told about the words.
    Refused(WordsRefusal),
    /// After the machine had its guess.
    Guessed(WordsRefusal),
    /// The connection, or what came over it.
    Broken(String),
}

async fn converse(endpoint: &Endpoint, machine: EndpointAddr, words: &Words) -> Result<InviteLink, Failure> {
    let connection = match timeout(CONNECT, endpoint.connect(machine, ALPN_WORDS)).await {
        Ok(connected) => connected.map_err(|e| Failure::Broken(e.to_string()))?,
        Err(_) => return Err(Failure::Broken(format!("no answer within {} s", CONNECT.as_secs()))),
    };
    let outcome = timeout(ANSWER, ask(endpoint, &connection, words)).await;
    connection.close(0u32.into(), b"done");
    outcome.unwrap_or_else(|_| Err(Failure::Broken(format!("no answer within {} s", ANSWER.as_secs()))))
}

async fn ask(endpoint: &Endpoint, connection: &Connection, words: &Words) -> Result<InviteLink, Failure> {
    let broken = |e: &dyn std::fmt::Display| Failure::Broken(e.to_string());
    let (mut send, mut recv) = connection.open_bi().await.map_err(|e| broken(&e))?;
    let mut seed = Zeroizing::new([0; 32]);
    getrandom::fill(seed.as_mut_slice()).map_err(|e| broken(&e))?;
    let id = |key: iroh::PublicKey| MachineId::from_bytes(*key.as_bytes());
    let (newcomer, share) = Newcomer::begin(words, &id(endpoint.id()), &id(connection.remote_id()), &seed);
    let request = WordsRequest::Begin { channel: words.channel(), share };
    send_message(&mut send, &request, MAX_MESSAGE).await.map_err(|e| broken(&e))?;
    let theirs = match recv_message(&mut recv, MAX_MESSAGE).await.map_err(|e| broken(&e))? {
        WordsResponse::Share(share) => share,
        WordsResponse::Refused(refusal) => return Err(Failure::Refused(refusal)),
        WordsResponse::Link(_) | WordsResponse::Noted => {
            return Err(Failure::Broken("an answer to another question".into()));
        }
    };
    let (agreed, tag) = newcomer.agree(&theirs).map_err(|e| broken(&e))?;
    send_message(&mut send, &WordsRequest::Confirm { tag }, MAX_MESSAGE).await.map_err(|e| broken(&e))?;
    let _ = send.finish();
    let sealed = match recv_message(&mut recv, MAX_MESSAGE).await.map_err(|e| broken(&e))? {
        WordsResponse::Link(sealed) => sealed,
        WordsResponse::Refused(refusal) => return Err(Failure::Guessed(refusal)),
        WordsResponse::Share(_) | WordsResponse::Noted => return Err(Failure::Guessed(WordsRefusal::Malformed)),
    };
    // Somebody who answers for every first word: they had their guess, and it was wrong.
    let link = agreed.open(&sealed).map_err(|_| Failure::Guessed(WordsRefusal::NotOpen))?;
    let link = std::str::from_utf8(&link).ok().and_then(|text| text.parse().ok());
    link.ok_or_else(|| Failure::Broken("what it gave for the words is no invitation".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_of_a_relay_is_read_as_it_is_written() {
        for (text, host, port) in [
            ("203.0.113.7", "203.0.113.7", 443),
            (" relay.example.org:8443 ", "relay.example.org", 8443),
            ("2001:db8::7", "2001:db8::7", 443),
            ("[2001:db8::7]", "2001:db8::7", 443),
            ("[2001:db8::7]:80", "2001:db8::7", 80),
        ] {
            let (read, at) = read_place(text).unwrap();
            assert_eq!((read.as_str(), at), (host, port), "{text}");
            assert_eq!(read_place(&place_of(&read, at)).unwrap(), (read, at), "{text}");
        }
        for wrong in ["", "203.0.113.7:", "relay:99999", "https://relay.example.org", "re lay"] {
            assert_eq!(read_place(wrong).unwrap_err().code, ErrorCode::BadRequest, "{wrong}");
        }
    }
}
