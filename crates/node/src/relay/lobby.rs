//! Which machines of the clan wait for four words, as they have told this one, which is a relay; and who may come for them.
//!
//! Whoever reaches the relay may ask who waits for a first word, and be passed on there for a moment. How often anybody may is
//! bounded for all together: there are 2048 first words, and words are valid for ten minutes.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use clan_relay::words::MAX_MACHINES;
use clan_types::{Channel, MachineId};
use clan_wire::words::MAX_CHANNELS;
use tokio::time::Instant;

use crate::core::View;

/// What a machine told counts for so long; it tells again well before.
const LASTS: Duration = Duration::from_secs(90);
/// Machines that are remembered.
const MAX_WAITING: usize = 256;
/// Questions that may come at once, and how long it takes until there may be another one.
const BURST: u32 = 24;
const ANOTHER: Duration = Duration::from_secs(2);

/// Too much was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooMany;

/// The memory of it.
pub(crate) struct Lobby(Mutex<Inside>);

struct Inside {
    waiting: BTreeMap<MachineId, (Vec<Channel>, Instant)>,
    /// Questions that may come now, and when the last was added.
    left: u32,
    since: Instant,
}

impl Default for Lobby {
    fn default() -> Self {
        Self(Mutex::new(Inside { waiting: BTreeMap::new(), left: BURST, since: Instant::now() }))
    }
}

impl Lobby {
    /// A machine of the clan waits for words that begin with these, and with no others.
    pub(crate) fn note(&self, machine: MachineId, mut channels: Vec<Channel>) {
        channels.truncate(MAX_CHANNELS);
        let mut inside = self.inside();
        inside.waiting.retain(|_, (_, told)| told.elapsed() < LASTS);
        inside.waiting.remove(&machine);
        if !channels.is_empty() && inside.waiting.len() < MAX_WAITING {
            inside.waiting.insert(machine, (channels, Instant::now()));
        }
    }

    /// Who waits for words that begin so, of those who still belong to the clan.
    ///
    /// INVARIANT: a stranger's question is paid for before it is answered, whatever the answer is.
    pub(crate) fn find(&self, channel: Channel, view: &View) -> Result<Vec<MachineId>, TooMany> {
        let mut inside = self.inside();
        inside.pay()?;
        let waits = inside.waiting.iter().filter(|(machine, (channels, told))| {
            told.elapsed() < LASTS
                && channels.contains(&channel)
                && view.state.machine_in_good_standing(machine).is_some()
        });
        Ok(waits.map(|(machine, _)| *machine).take(MAX_MACHINES).collect())
    }

    /// Held for a moment, never across an await.
    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inside {
    fn pay(&mut self) -> Result<(), TooMany> {
        while self.left < BURST && self.since.elapsed() >= ANOTHER {
            self.left += 1;
            self.since += ANOTHER;
        }
        if self.left == BURST {
            self.since = Instant::now();
        }
        self.left = self.left.checked_sub(1).ok_or(TooMany)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn strangers_together_ask_so_often_and_no_more() {
        let lobby = Lobby::default();
        let asked = |times: u32| (0..times).filter(|_| lobby.inside().pay().is_ok()).count();
        assert_eq!(asked(100), BURST as usize);
        tokio::time::advance(ANOTHER * 3).await;
        assert_eq!(asked(100), 3);
        // A scanner finds few of 2048 first words while words are valid.
        let mut found = 0;
        for _ in 0..600 {
            tokio::time::advance(Duration::from_secs(1)).await;
            found += asked(100);
        }
        assert!(found <= 301, "{found}");
        tokio::time::advance(ANOTHER * 1000).await;
        assert_eq!(asked(100), BURST as usize);
    }
}
