//! One author's entries: the chain that counts, and evidence if the author signed two for one place.

use clan_types::{EntryId, Hlc};

use crate::{AuthorId, Body, Entry, LastEntry};

const HEAD: &str = "clan 2026-11 ledger vector head v1";
const RIVAL: &str = "clan 2026-11 ledger vector rival v1";

/// One author's log.
///
/// INVARIANT: which entries it ends up with depends on the set of entries that were offered, not on their order. At
/// each fork the chain follows the least child by [`precedence`]; `rival` is the least, by place and then id, of the
/// entries that lost such a choice next to the chain. An entry that loses once loses for good, so that nothing of its
/// branch has to be kept.
#[derive(Debug, Clone)]
pub(crate) struct Log {
    /// What stands for its head, and for its rival, in vectors.
    pub(crate) tags: [[u8; 32]; 2],
    pub(crate) chain: Vec<Entry>,
    pub(crate) rival: Option<Entry>,
    /// Set while entries wait that contradict the chain: how much of it was offered again since. The place where the
    /// branches part is found by asking peers for the chain from its start.
    pub(crate) recheck: Option<u64>,
}

/// What became of an entry that was offered to a log.
pub(crate) enum Placed {
    /// It extends the chain, or replaces its end from that place on: these fell out.
    Chained(Vec<Entry>),
    /// It lost against the chain and is kept as evidence.
    Evidence,
    /// It lost against the chain and nothing is kept of it.
    Lost,
    Known,
    /// Its predecessor is missing.
    Waits,
    /// It is not later than its predecessor.
    TimeRunsBack,
}

impl Log {
    pub(crate) fn new(author: &AuthorId) -> Self {
        let tags = [HEAD, RIVAL].map(|kind| blake3::derive_key(kind, author.as_bytes()));
        Self { tags, chain: Vec::new(), rival: None, recheck: None }
    }

    pub(crate) fn place(&mut self, entry: &Entry) -> Placed {
        let Some(seq) = usize::try_from(entry.seq()).ok().filter(|seq| *seq <= self.chain.len()) else {
            return Placed::Waits;
        };
        if self.rival.as_ref().is_some_and(|rival| rival.id() == entry.id()) {
            return Placed::Known;
        }
        if let Some(before) = seq.checked_sub(1).and_then(|before| self.chain.get(before)) {
            if entry.prev() != Some(before.id()) {
                let lost = self.rival.as_ref().is_some_and(|rival| entry.prev() == Some(rival.id()));
                return if lost { Placed::Lost } else { Placed::Waits };
            }
            if entry.time() <= before.time() {
                return Placed::TimeRunsBack;
            }
        }
        match self.chain.get(seq) {
            None => {
                self.chain.push(entry.clone());
                Placed::Chained(Vec::new())
            }
            Some(present) if present.id() == entry.id() => Placed::Known,
            Some(present) if precedence(entry) < precedence(present) => {
                let displaced = self.chain.split_off(seq);
                self.chain.push(entry.clone());
                if let Some(loser) = displaced.first() {
                    self.keep_evidence(loser);
                }
                Placed::Chained(displaced)
            }
            Some(_) => {
                if self.keep_evidence(entry) {
                    Placed::Evidence
                } else {
                    Placed::Lost
                }
            }
        }
    }

    fn keep_evidence(&mut self, loser: &Entry) -> bool {
        let better = self.rival.as_ref().is_none_or(|rival| (loser.seq(), loser.id()) < (rival.seq(), rival.id()));
        if better {
            self.rival = Some(loser.clone());
        }
        better
    }

    /// The chain's last entry.
    pub(crate) fn head(&self) -> Option<LastEntry> {
        self.chain.last().map(|entry| LastEntry { seq: entry.seq(), id: entry.id() })
    }

    pub(crate) fn len(&self) -> u64 {
        self.chain.len() as u64
    }

    /// The next entry to ask others for.
    pub(crate) fn wanted(&self) -> u64 {
        self.recheck.unwrap_or(u64::MAX).min(self.len())
    }

    /// The entry of the chain at this place was offered.
    pub(crate) fn rechecked(&mut self, seq: u64) {
        if self.recheck == Some(seq) {
            self.recheck = Some(seq + 1);
        }
    }

    pub(crate) fn get(&self, seq: u64) -> Option<&Entry> {
        self.chain.get(usize::try_from(seq).ok()?)
    }

    /// How many entries of the chain count if `last` is the last that does.
    pub(crate) fn count_up_to(&self, last: LastEntry) -> u64 {
        let fork = self.rival.as_ref().map(Entry::seq).filter(|seq| *seq <= last.seq);
        match self.get(last.seq) {
            Some(entry) if entry.id() == last.id => last.seq + 1,
            // `last` is on a branch that lost (or on none): what both branches share still counts.
            Some(_) => fork.unwrap_or(0),
            None => fork.unwrap_or(last.seq.saturating_add(1)),
        }
    }
}

/// The least of several entries for one place is the one that counts. The founding entry, which is the clan's id, is
/// less than anything; then the earlier one is.
fn precedence(entry: &Entry) -> (bool, Hlc, EntryId) {
    (!matches!(entry.body(), Body::Found { .. }), entry.time(), entry.id())
}
