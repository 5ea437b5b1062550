//! Four words in place of a link: handing them to the inviter's machine, and getting the link for them as a newcomer.

use std::time::Duration;

use clan_api::{ApiProblem, ErrorCode};
use clan_os::channel::{Channel, recv_message, send_message};
use clan_pairing::{LIFETIME, Newcomer};
use clan_types::{InviteLink, MachineId, Timestamp, Words};
use clan_wire::{
    control::{ControlRequest, SecretText},
    words::{ALPN_WORDS, MAX_MESSAGE, WordsRefusal, WordsRequest, WordsResponse, announced},
};
use futures_util::StreamExt;
use iroh::{Endpoint, EndpointAddr, endpoint::Connection};
use iroh_mdns_address_lookup::DiscoveryEvent;
use tokio::time::{Instant, sleep_until, timeout};
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

/// The link in a pasted text, or the one that the words in it stand for.
pub(crate) async fn find(text: &str) -> Result<InviteLink, ApiProblem> {
    if !Words::looks_like(text.trim()) {
        return InviteLink::in_text(text).map_err(|e| problem::link(&e));
    }
    let words: Words = text.parse().map_err(|e| problem::words(&e))?;
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
    let outcome = search(&endpoint, &mut events, &words).await;
    endpoint.close().await;
    outcome
}

async fn search(
    endpoint: &Endpoint,
    events: &mut (impl futures_util::Stream<Item = DiscoveryEvent> + Unpin),
    words: &Words,
) -> Result<InviteLink, ApiProblem> {
    let mut until = Instant::now() + SEARCH;
    let mut last = None;
    let mut guesses = 0;
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
        let failure = match converse(endpoint, endpoint_info.to_endpoint_addr(), words).await {
            Ok(link) => return Ok(link),
            Err(failure) => failure,
        };
        tracing::debug!(machine = %endpoint_info.endpoint_id, ?failure, "no link for the words");
        match failure {
            Failure::Refused(_) => until = until.min(Instant::now() + SECOND_CHANCE),
            Failure::Guessed(_) => guesses += 1,
            Failure::Broken(_) => {}
        }
        let over = matches!(failure, Failure::Guessed(WordsRefusal::Void)) || guesses >= MAX_GUESSES;
        last = Some(failure);
        if over {
            break;
        }
    }
    Err(match last {
        Some(Failure::Refused(refusal) | Failure::Guessed(refusal)) => problem::words_refusal(refusal),
        Some(Failure::Broken(why)) => {
            ApiProblem::new(ErrorCode::Unreachable, "the machine that waits for these words does not answer")
                .why(why)
                .hint("try again: these words are still good")
        }
        None => problem::words_refusal(WordsRefusal::NotOpen),
    })
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
        WordsResponse::Link(_) => return Err(Failure::Broken("an answer to another question".into())),
    };
    let (agreed, tag) = newcomer.agree(&theirs).map_err(|e| broken(&e))?;
    send_message(&mut send, &WordsRequest::Confirm { tag }, MAX_MESSAGE).await.map_err(|e| broken(&e))?;
    let _ = send.finish();
    let sealed = match recv_message(&mut recv, MAX_MESSAGE).await.map_err(|e| broken(&e))? {
        WordsResponse::Link(sealed) => sealed,
        WordsResponse::Refused(refusal) => return Err(Failure::Guessed(refusal)),
        WordsResponse::Share(_) => return Err(Failure::Guessed(WordsRefusal::Malformed)),
    };
    // Somebody who answers for every first word: they had their guess, and it was wrong.
    let link = agreed.open(&sealed).map_err(|_| Failure::Guessed(WordsRefusal::NotOpen))?;
    let link = std::str::from_utf8(&link).ok().and_then(|text| text.parse().ok());
    link.ok_or_else(|| Failure::Broken("what it gave for the words is no invitation".into()))
}
