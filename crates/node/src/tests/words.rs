//! Four words over real connections.

use clan_pairing::Newcomer;
use clan_types::Words;
use clan_wire::words::{ALPN_WORDS, MAX_MESSAGE, WordsRefusal, WordsRequest, WordsResponse, announced};

use super::*;

const LINK: &str = "clan://join/test";

fn id(endpoint: &Endpoint) -> MachineId {
    MachineId::from_bytes(*endpoint.id().as_bytes())
}

/// What a newcomer's manager does with the words; `None` if the machine broke off.
async fn pair(host: &Machine, from: &Endpoint, words: &Words) -> Option<Result<String, WordsRefusal>> {
    let connection = from.connect(net::endpoint_addr(&host.addr(), &[]).unwrap(), ALPN_WORDS).await.unwrap();
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    let (newcomer, share) = Newcomer::begin(words, &id(from), &host.id(), &[7; 32]);
    let request = WordsRequest::Begin { channel: words.channel(), share };
    send_message(&mut send, &request, MAX_MESSAGE).await.ok()?;
    let share = match recv_message(&mut recv, MAX_MESSAGE).await.ok()? {
        WordsResponse::Share(share) => share,
        WordsResponse::Refused(refusal) => return Some(Err(refusal)),
        WordsResponse::Link(_) | WordsResponse::Noted => panic!("a link before anything was agreed on"),
    };
    let (agreed, tag) = newcomer.agree(&share).unwrap();
    send_message(&mut send, &WordsRequest::Confirm { tag }, MAX_MESSAGE).await.ok()?;
    match recv_message(&mut recv, MAX_MESSAGE).await.ok()? {
        WordsResponse::Link(sealed) => Some(Ok(String::from_utf8(agreed.open(&sealed).unwrap().to_vec()).unwrap())),
        WordsResponse::Refused(refusal) => Some(Err(refusal)),
        WordsResponse::Share(_) | WordsResponse::Noted => panic!("a second share"),
    }
}

fn problems(machine: &Machine) -> Vec<String> {
    machine.core.view().problems.clone()
}

#[tokio::test]
async fn whoever_has_the_words_gets_the_link_once() {
    let (founder, _) = founded(1, tomorrow()).await;
    let words = Words::from_entropy([1; 6]);
    founder.words.open(&words, LINK).unwrap();
    let newcomer = endpoint(&key(5)).await;
    assert_eq!(pair(&founder, &newcomer, &words).await, Some(Ok(LINK.to_owned())));
    assert_eq!(pair(&founder, &newcomer, &words).await, Some(Err(WordsRefusal::Used)));
    assert!(problems(&founder).is_empty());
}

#[tokio::test]
async fn a_wrong_guess_makes_the_words_void_and_the_inviter_is_told() {
    let (founder, _) = founded(1, tomorrow()).await;
    let words = Words::from_entropy([1; 6]);
    founder.words.open(&words, LINK).unwrap();
    let guess: Words = format!("{} zoo zoo zoo", words.channel().word()).parse().unwrap();
    let newcomer = endpoint(&key(5)).await;
    assert_eq!(pair(&founder, &newcomer, &guess).await, Some(Err(WordsRefusal::Void)));
    assert_eq!(pair(&founder, &newcomer, &words).await, Some(Err(WordsRefusal::Void)), "the right ones are too late");
    founder.until("the inviter is told", |v| v.problems.iter().any(|p| p.contains(words.channel().word()))).await;
    assert!(!problems(&founder).iter().any(|p| p.contains(&words.secret())));
}

#[tokio::test]
async fn words_of_another_clans_machine_are_not_known_and_cost_nothing() {
    let (founder, _) = founded(1, tomorrow()).await;
    let (ours, foreign) = (Words::from_entropy([1; 6]), Words::from_entropy([9; 6]));
    assert_ne!(ours.channel(), foreign.channel());
    founder.words.open(&ours, LINK).unwrap();
    let newcomer = endpoint(&key(5)).await;
    assert_eq!(pair(&founder, &newcomer, &foreign).await, Some(Err(WordsRefusal::NotOpen)));
    assert_eq!(pair(&founder, &newcomer, &ours).await, Some(Ok(LINK.to_owned())));
}

#[tokio::test]
async fn of_two_who_come_at_once_one_gets_the_link() {
    let (founder, _) = founded(1, tomorrow()).await;
    let words = Words::from_entropy([1; 6]);
    founder.words.open(&words, LINK).unwrap();
    let (one, other) = (endpoint(&key(5)).await, endpoint(&key(6)).await);
    let (first, second) = tokio::join!(pair(&founder, &one, &words), pair(&founder, &other, &words));
    let mut outcomes = [first.unwrap(), second.unwrap()];
    outcomes.sort_by_key(Result::is_err);
    assert_eq!(outcomes, [Ok(LINK.to_owned()), Err(WordsRefusal::Used)]);
}

#[tokio::test]
async fn a_machine_announces_the_first_words_and_nothing_else() {
    let (founder, _) = founded(1, tomorrow()).await;
    let words = Words::from_entropy([1; 6]);
    let data = desk::announced_by(&founder.words);
    assert!(announced(&data).is_empty());
    founder.words.open(&words, LINK).unwrap();
    let data = desk::announced_by(&founder.words);
    assert_eq!(announced(&data), [words.channel()]);
    assert!(data.len() < 30, "{data}");
}

#[tokio::test]
async fn a_stranger_who_sends_rubbish_gets_nothing() {
    let (founder, _) = founded(1, tomorrow()).await;
    let words = Words::from_entropy([1; 6]);
    founder.words.open(&words, LINK).unwrap();
    let from = endpoint(&key(5)).await;
    let connection = from.connect(net::endpoint_addr(&founder.addr(), &[]).unwrap(), ALPN_WORDS).await.unwrap();
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
    send.write_all(&[0xaa; 5000]).await.unwrap();
    assert!(recv_message::<WordsResponse, _>(&mut recv, MAX_MESSAGE).await.is_err());
    connection.close(0u32.into(), b"");
    assert_eq!(pair(&founder, &from, &words).await, Some(Ok(LINK.to_owned())));
}
