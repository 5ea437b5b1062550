//! Entries seen a moment ago: in a clan of many machines each arrives from many of them, and checking a signature costs
//! more than everything else that is done with it.

use std::collections::{HashMap, VecDeque};

use clan_ledger::{Entry, EntryError};

/// INVARIANT: no more than these are kept. An entry is at most [`clan_ledger::MAX_ENTRY`] bytes.
const CAPACITY: usize = 1024;

/// The last entries that were decoded, by the hash of their encoding, which is their only one.
#[derive(Default)]
pub(crate) struct Recent {
    entries: HashMap<[u8; 32], Entry>,
    order: VecDeque<[u8; 32]>,
}

impl Recent {
    /// The same as [`Entry::decode`].
    pub(crate) fn decode(&mut self, bytes: &[u8]) -> Result<Entry, EntryError> {
        if bytes.len() > clan_ledger::MAX_ENTRY {
            return Err(EntryError::TooLong);
        }
        let hash = *blake3::hash(bytes).as_bytes();
        if let Some(known) = self.entries.get(&hash) {
            return Ok(known.clone());
        }
        let entry = Entry::decode(bytes)?;
        if self.order.len() >= CAPACITY
            && let Some(oldest) = self.order.pop_front()
        {
            self.entries.remove(&oldest);
        }
        self.order.push_back(hash);
        self.entries.insert(hash, entry.clone());
        Ok(entry)
    }
}
