//! How two ledgers find out what one of them lacks.

use std::collections::HashMap;

use clan_types::{EntryId, MachineId};

use crate::{AuthorId, Body, Entry, InsertedMany, Ledger, log::Log};

/// What a ledger has: for each author key the next sequence number that it lacks. Beside these pairs stand others, under
/// keys derived from an author's, that tell apart logs of equal length; whoever does not know them passes them on.
pub type Vector = Vec<([u8; 32], u64)>;

/// INVARIANT: half of it holds what one author's dispute takes.
const LEAST_LIMIT: usize = 6;
/// More entries than these about one machine say nothing new.
const MAX_FAREWELL: usize = 8;
/// INVARIANT: whoever is sent a whole ledger takes no more bytes of entries than these.
const MAX_INTAKE: usize = 256 << 20;

/// A place among all entries of a ledger: an author, and a place in their log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    author: AuthorId,
    seq: u64,
}

/// Some of the entries that somebody lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<'a> {
    /// Each author's in order.
    pub entries: Vec<&'a Entry>,
    /// Where the next page begins, if there is more.
    pub next: Option<Place>,
}

impl Ledger {
    /// What this ledger has, for a peer's [`Ledger::missing`].
    pub fn vector(&self) -> Vector {
        let mut vector = Vector::new();
        for (author, log) in &self.logs {
            let wanted = log.wanted();
            vector.push((*author.as_bytes(), wanted));
            if let Some(last) = wanted.checked_sub(1).and_then(|seq| log.get(seq)) {
                vector.push((log.tags[0], short(&last.id())));
            }
            if let Some(rival) = &log.rival {
                vector.push((log.tags[1], short(&rival.id())));
            }
        }
        vector
    }

    /// Entries that the sender of the vector lacks, at most `limit` (which is at least 6), each author's in order. Ask
    /// again with the vector they lead to until there are none.
    pub fn missing(&self, vector: &[([u8; 32], u64)], limit: usize) -> Vec<&Entry> {
        let limit = limit.max(LEAST_LIMIT);
        let theirs: HashMap<&[u8; 32], u64> = vector.iter().map(|(key, value)| (key, *value)).collect();
        let next = |author: &AuthorId| theirs.get(author.as_bytes()).copied().unwrap_or(0);
        // Half of the room is for disputes, each whole or not at all: otherwise what they know already, or cannot place
        // before the dispute is settled, could fill it for ever.
        let mut disputed = Vec::new();
        for (author, log) in &self.logs {
            let entries = dispute(log, next(author), &theirs);
            if disputed.len() + entries.len() <= limit / 2 {
                disputed.extend(entries);
            }
        }
        let room = limit - disputed.len();
        // INVARIANT: room goes to authors in the order in which disputes are put in, so that what settles the first one's
        // gets there. Were it given out by time, what cannot be placed could keep it out for ever.
        let mut missing: Vec<&Entry> = Vec::new();
        for (author, log) in &self.logs {
            let from = usize::try_from(next(author)).unwrap_or(usize::MAX).min(log.chain.len());
            missing.extend(log.chain[from..].iter().take(room - missing.len()));
            if missing.len() == room {
                break;
            }
        }
        missing.extend(disputed);
        missing
    }

    /// All that the sender of the vector lacks, page after page, whatever its size: about so many bytes of entries from
    /// a place on (`None`: from the beginning). Entries that arrive meanwhile may be on none of the pages.
    pub fn page(&self, vector: &[([u8; 32], u64)], from: Option<Place>, bytes: usize) -> Page<'_> {
        let theirs: HashMap<&[u8; 32], u64> = vector.iter().map(|(key, value)| (key, *value)).collect();
        let (mut entries, mut taken) = (Vec::new(), 0);
        let logs = self.logs.range(from.map_or(AuthorId::LEAST, |place| place.author)..);
        for (author, log) in logs {
            let next = theirs.get(author.as_bytes()).copied().unwrap_or(0);
            let begun = from.filter(|place| place.author == *author).map_or(0, |place| place.seq);
            for seq in next.max(begun)..log.len() {
                let Some(entry) = log.get(seq) else { break };
                if taken >= bytes {
                    return Page { entries, next: Some(Place { author: *author, seq }) };
                }
                taken += entry.as_bytes().len();
                entries.push(entry);
            }
            entries.extend(dispute(log, next, &theirs));
        }
        Page { entries, next: None }
    }
}

impl Ledger {
    /// What put a machine out: the entries that count about it or its owner, the earliest first. Nothing while it is in.
    pub fn put_out_by(&self, machine: &MachineId) -> Vec<&Entry> {
        let state = self.state();
        let Some(known) = state.machines.get(machine) else { return Vec::new() };
        if state.machine_in_good_standing(machine).is_some() {
            return Vec::new();
        }
        let counts = |entry: &Entry| !state.void.iter().any(|void| void.entry == entry.id());
        let entries = self.order.values().filter_map(|(author, seq)| self.logs.get(author)?.get(*seq));
        let about = entries.filter(|entry| match entry.body() {
            Body::RevokeMachine { machine: id, .. } | Body::Remove { machine: id } => id == machine,
            Body::RevokePerson { person, .. } => *person == known.owner,
            Body::Leave => state.person_of(&entry.author()) == Some(known.owner),
            _ => false,
        });
        about.filter(|entry| counts(entry)).take(MAX_FAREWELL).collect()
    }

    /// What a machine that is out may still see: what it lacks of all that is not later than what put it out, at most
    /// `limit` entries. Without its vector, or if it lacks nothing, only what put it out.
    pub fn farewell(&self, machine: &MachineId, vector: Option<&[([u8; 32], u64)]>, limit: usize) -> Vec<&Entry> {
        let out = self.put_out_by(machine);
        let (Some(vector), Some(last)) = (vector, out.iter().map(|entry| (entry.time(), entry.id())).max()) else {
            return out;
        };
        let theirs: HashMap<&[u8; 32], u64> = vector.iter().map(|(key, value)| (key, *value)).collect();
        let lacks = |entry: &&Entry| entry.seq() >= theirs.get(entry.author().as_bytes()).copied().unwrap_or(0);
        let entries = self.order.range(..=last).filter_map(|(_, (author, seq))| self.logs.get(author)?.get(*seq));
        let lacking: Vec<_> = entries.filter(lacks).take(limit).collect();
        if lacking.is_empty() { out } else { lacking }
    }
}

/// Why what a machine says its clan's ledger is, is not taken further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IntakeError {
    /// More than [`Intake`] takes.
    #[error("it is larger than {} MiB", MAX_INTAKE >> 20)]
    TooLarge,
    /// A page without anything that was lacking: there may be no end to such pages.
    #[error("it repeats itself")]
    NothingNew,
}

/// Takes in, page by page, what another machine says its clan's ledger is. Nothing that it says is believed further than
/// entries prove themselves, and its length is bounded.
#[derive(Debug)]
pub struct Intake {
    ledger: Ledger,
    bytes: usize,
}

impl Intake {
    /// Goes on from what is there; tell the other machine its [`Ledger::vector`].
    pub fn new(ledger: Ledger) -> Self {
        let bytes = ledger.entries().map(|entry| entry.as_bytes().len()).sum();
        Self { ledger, bytes }
    }

    /// What has been taken in.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The same.
    pub fn into_ledger(self) -> Ledger {
        self.ledger
    }

    /// Takes a page; what is no entry of the clan is left out. `last`: none follows.
    pub fn take<'a>(
        &mut self,
        page: impl IntoIterator<Item = &'a [u8]>,
        last: bool,
    ) -> Result<InsertedMany, IntakeError> {
        let decoded: Vec<Entry> = page.into_iter().filter_map(|bytes| Entry::decode(bytes).ok()).collect();
        self.bytes += decoded.iter().map(|entry| entry.as_bytes().len()).sum::<usize>();
        if self.bytes > MAX_INTAKE {
            return Err(IntakeError::TooLarge);
        }
        let taken = self.ledger.insert_all(decoded);
        if !last && taken.new.is_empty() {
            return Err(IntakeError::NothingNew);
        }
        Ok(taken)
    }
}

/// What shows a peer whose log of this author is on another branch that there are two. At most three entries.
fn dispute<'a>(log: &'a Log, next: u64, theirs: &HashMap<&[u8; 32], u64>) -> Vec<&'a Entry> {
    let mut entries = Vec::new();
    if let Some(head) = theirs.get(&log.tags[0])
        && let Some(ours) = next.checked_sub(1).and_then(|seq| log.get(seq))
        && *head != short(&ours.id())
    {
        entries.push(ours);
    }
    if let Some(rival) = &log.rival {
        if theirs.get(&log.tags[1]) != Some(&short(&rival.id())) {
            entries.extend(log.get(rival.seq()));
            entries.push(rival);
        }
        // Theirs is longer, so that we cannot tell whether it is the same branch: they can.
        if next > log.len() {
            entries.extend(log.chain.last());
        }
    }
    entries
}

fn short(id: &EntryId) -> u64 {
    id.as_bytes().iter().take(8).fold(0, |value, byte| value << 8 | u64::from(*byte))
}
