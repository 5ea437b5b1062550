//! The two sides against each other.

use super::*;
use crate::{Agreed, Newcomer, PairingError};
use proptest::prelude::*;

const LINK: &[u8] = b"clan://join/somewhere";
const START: Timestamp = Timestamp::from_millis(1_700_000_000_000);

fn machine() -> MachineId {
    MachineId::from_bytes([1; 32])
}

fn newcomer() -> MachineId {
    MachineId::from_bytes([2; 32])
}

fn words(entropy: u8) -> Words {
    Words::from_entropy([7, 7, 7, 7, 7, entropy])
}

fn open(known: &Words) -> Codes {
    let mut codes = Codes::new(machine());
    codes.open(known, Zeroizing::new(LINK.to_vec()), START).unwrap();
    codes
}

fn seed(n: u64) -> [u8; 32] {
    *blake3::hash(&n.to_le_bytes()).as_bytes()
}

/// Goes as far as the newcomer's tag.
fn greet(
    codes: &mut Codes,
    id: u64,
    given: &Words,
    from: &MachineId,
    to: &MachineId,
) -> Result<(Agreed, [u8; 32]), WordsRefusal> {
    let (side, share) = Newcomer::begin(given, from, to, &seed(id));
    let ours = codes.begin(ConversationId(id), from, given.channel(), &share, &seed(id + 1000), START)?;
    Ok(side.agree(&ours).unwrap())
}

fn pair(codes: &mut Codes, id: u64, given: &Words) -> Result<Vec<u8>, WordsRefusal> {
    let (side, tag) = greet(codes, id, given, &newcomer(), &machine())?;
    let sealed = codes.confirm(ConversationId(id), &tag, START)?;
    Ok(side.open(&sealed).unwrap().to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn whoever_has_the_words_gets_the_link_and_nobody_else(known: [u8; 6], given: [u8; 6]) {
        let (known, given) = (Words::from_entropy(known), Words::from_entropy(given));
        prop_assert_eq!(pair(&mut open(&known), 1, &known), Ok(LINK.to_vec()));
        if given != known {
            prop_assert!(pair(&mut open(&known), 1, &given).is_err());
        }
    }

    #[test]
    fn any_share_and_any_tag_are_taken_without_a_panic(share in prop::collection::vec(any::<u8>(), 0..40), tag: [u8; 32]) {
        let mut codes = open(&words(1));
        let _ = codes.begin(ConversationId(1), &newcomer(), words(1).channel(), &share, &seed(1), START);
        prop_assert!(codes.confirm(ConversationId(1), &tag, START).is_err());
        prop_assert!(Newcomer::begin(&words(1), &newcomer(), &machine(), &seed(2)).0.agree(&share).is_err() || share.len() == SHARE);
    }
}

#[test]
fn wrong_words_make_the_words_void_and_both_sides_know() {
    let mut codes = open(&words(1));
    assert_eq!(pair(&mut codes, 1, &words(2)), Err(WordsRefusal::Void));
    assert_eq!(codes.reports(), [Report::Void { channel: words(1).channel(), at: START }]);
    assert_eq!(pair(&mut codes, 2, &words(1)), Err(WordsRefusal::Void), "the right ones come too late");
}

#[test]
fn words_work_once() {
    let mut codes = open(&words(1));
    assert_eq!(pair(&mut codes, 1, &words(1)), Ok(LINK.to_vec()));
    assert_eq!(pair(&mut codes, 2, &words(1)), Err(WordsRefusal::Used));
    assert_eq!(codes.reports(), []);
}

#[test]
fn of_two_who_come_at_once_one_gets_the_link() {
    let mut codes = open(&words(1));
    let other = MachineId::from_bytes([3; 32]);
    let (first, first_tag) = greet(&mut codes, 1, &words(1), &newcomer(), &machine()).unwrap();
    let (_, second_tag) = greet(&mut codes, 2, &words(1), &other, &machine()).unwrap();
    let sealed = codes.confirm(ConversationId(1), &first_tag, START).unwrap();
    assert_eq!(codes.confirm(ConversationId(2), &second_tag, START), Err(WordsRefusal::Used));
    assert_eq!(first.open(&sealed).unwrap().as_slice(), LINK);
}

#[test]
fn a_guess_beside_an_honest_newcomer_makes_the_words_void_for_both() {
    let mut codes = open(&words(1));
    let (_, honest) = greet(&mut codes, 1, &words(1), &newcomer(), &machine()).unwrap();
    assert_eq!(pair(&mut codes, 2, &words(2)), Err(WordsRefusal::Void));
    assert_eq!(codes.confirm(ConversationId(1), &honest, START), Err(WordsRefusal::Void));
}

#[test]
fn words_expire_before_and_during_a_conversation() {
    let late = START.plus(LIFETIME).plus(Duration::from_millis(1));
    let mut codes = open(&words(1));
    let (_, tag) = greet(&mut codes, 1, &words(1), &newcomer(), &machine()).unwrap();
    assert_eq!(codes.confirm(ConversationId(1), &tag, late), Err(WordsRefusal::Expired));
    let (_, share) = Newcomer::begin(&words(1), &newcomer(), &machine(), &seed(2));
    let begin =
        |codes: &mut Codes, at| codes.begin(ConversationId(2), &newcomer(), words(1).channel(), &share, &seed(3), at);
    assert_eq!(begin(&mut codes, late), Err(WordsRefusal::Expired));
    assert_eq!(begin(&mut codes, Timestamp::from_millis(5)), Err(WordsRefusal::Expired), "nor by a clock set back");
    assert_eq!(begin(&mut codes, START.plus(MEMORY)), Err(WordsRefusal::NotOpen), "and are forgotten");
    assert!(codes.channels().is_empty());
}

#[test]
fn a_recorded_conversation_does_not_work_again() {
    let mut codes = open(&words(1));
    let (_, share) = Newcomer::begin(&words(1), &newcomer(), &machine(), &seed(1));
    let (_, tag) = greet(&mut codes, 1, &words(1), &newcomer(), &machine()).unwrap();
    // The same newcomer's messages, against a fresh share of ours.
    codes.begin(ConversationId(2), &newcomer(), words(1).channel(), &share, &seed(77), START).unwrap();
    assert_eq!(codes.confirm(ConversationId(2), &tag, START), Err(WordsRefusal::Void));
}

#[test]
fn somebody_in_between_agrees_with_neither() {
    let mut codes = open(&words(1));
    let between = MachineId::from_bytes([9; 32]);
    // The newcomer is connected to `between`, which passes everything on over its own connection.
    let (side, share) = Newcomer::begin(&words(1), &newcomer(), &between, &seed(1));
    let ours = codes.begin(ConversationId(1), &between, words(1).channel(), &share, &seed(2), START).unwrap();
    let (_, tag) = side.agree(&ours).unwrap();
    assert_eq!(codes.confirm(ConversationId(1), &tag, START), Err(WordsRefusal::Void));
}

#[test]
fn what_is_changed_on_the_way_is_noticed() {
    let mut codes = open(&words(1));
    let (side, tag) = greet(&mut codes, 1, &words(1), &newcomer(), &machine()).unwrap();
    let mut sealed = codes.confirm(ConversationId(1), &tag, START).unwrap();
    sealed[5] ^= 1;
    assert_eq!(side.open(&sealed).unwrap_err(), PairingError::Wrong);
}

#[test]
fn a_machine_that_does_not_know_the_words_cannot_seal_a_link() {
    // It follows the protocol, with other words, and ignores that the tag does not fit.
    let (side, share) = Newcomer::begin(&words(1), &newcomer(), &machine(), &seed(1));
    let (a, b) = spake::identities(words(1).channel(), &newcomer(), &machine());
    let (run, theirs) = Run::start_b_with_rng(&spake::password(&words(2)), &a, &b, Seeded::new(&seed(2)));
    let (agreed, _) = side.agree(&theirs).unwrap();
    let sealed = spake::agree(run, &share).unwrap().seal(b"clan://join/trap").unwrap();
    assert_eq!(agreed.open(&sealed).unwrap_err(), PairingError::Wrong);
}

#[test]
fn the_words_of_another_clan_are_not_known_here() {
    let mut codes = open(&words(1));
    let foreign = Words::from_entropy([200, 7, 7, 7, 7, 1]);
    assert_ne!(foreign.channel(), words(1).channel());
    assert_eq!(pair(&mut codes, 1, &foreign), Err(WordsRefusal::NotOpen));
    assert_eq!(pair(&mut codes, 2, &words(1)), Ok(LINK.to_vec()), "which costs our own words nothing");
}

#[test]
fn the_channel_is_part_of_what_is_agreed_on() {
    let (one, other) = (words(1), Words::from_entropy([200, 7, 7, 7, 7, 1]));
    assert_eq!(one.secret(), other.secret());
    let mut codes = open(&one);
    let (side, share) = Newcomer::begin(&other, &newcomer(), &machine(), &seed(1));
    let ours = codes.begin(ConversationId(1), &newcomer(), one.channel(), &share, &seed(2), START).unwrap();
    let (_, tag) = side.agree(&ours).unwrap();
    assert_eq!(codes.confirm(ConversationId(1), &tag, START), Err(WordsRefusal::Void));
}

#[test]
fn a_connection_that_breaks_off_costs_no_guess() {
    let mut codes = open(&words(1));
    for id in 1..=40 {
        greet(&mut codes, id, &words(1), &newcomer(), &machine()).unwrap();
        codes.hang_up(ConversationId(id));
    }
    assert_eq!(pair(&mut codes, 99, &words(1)), Ok(LINK.to_vec()));
}

#[test]
fn conversations_are_bounded_at_once_and_in_all() {
    let mut codes = open(&words(1));
    for id in 0..MAX_AT_ONCE as u64 {
        greet(&mut codes, id, &words(1), &newcomer(), &machine()).unwrap();
    }
    assert_eq!(greet(&mut codes, 99, &words(1), &newcomer(), &machine()).err(), Some(WordsRefusal::Busy));
    for id in 0..MAX_AT_ONCE as u64 {
        codes.hang_up(ConversationId(id));
    }
    for id in 100..100 + u64::from(MAX_CONVERSATIONS) - MAX_AT_ONCE as u64 {
        greet(&mut codes, id, &words(1), &newcomer(), &machine()).unwrap();
        codes.hang_up(ConversationId(id));
    }
    assert_eq!(greet(&mut codes, 999, &words(1), &newcomer(), &machine()).err(), Some(WordsRefusal::Busy));
}

#[test]
fn so_many_words_are_waited_for_and_what_is_over_makes_room() {
    let mut codes = Codes::new(machine());
    let numbered = |n: u8| Words::from_entropy([0, n * 2, 0, 0, 0, 0]);
    let add = |codes: &mut Codes, n| codes.open(&numbered(n), Zeroizing::new(LINK.to_vec()), START).map(drop);
    for n in 0..MAX_CHANNELS as u8 {
        add(&mut codes, n).unwrap();
    }
    assert_eq!(add(&mut codes, 1), Err(OpenError::ChannelTaken));
    assert_eq!(add(&mut codes, 100), Err(OpenError::TooMany));
    assert_eq!(pair(&mut codes, 1, &numbered(3)), Ok(LINK.to_vec()));
    add(&mut codes, 100).unwrap();
    assert_eq!(pair(&mut codes, 2, &numbered(3)), Err(WordsRefusal::NotOpen));
    assert_eq!(codes.channels().len(), MAX_CHANNELS);
    let long = Zeroizing::new(vec![0; MAX_LINK + 1]);
    assert_eq!(codes.open(&numbered(101), long, START), Err(OpenError::TooLong));
}
