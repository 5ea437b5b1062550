//! What this computer remembers of a clan's ledger, outside of the disk of the clan's machine: `ledger.redb` beside it.
//!
//! With it only what is new is fetched for a decision; and a machine whose disk was put back to an earlier state is given
//! what it knew, so that it signs no place of its log twice. Until it has been told, it signs nothing
//! (`ControlRequest::Remember`).

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use clan_ledger::{Entry, Ledger, Published, Vector};
use clan_os::channel::Channel;
use clan_store::{LedgerStore, SealKey, StoreError};
use clan_types::ClanId;
use tokio::{sync::Mutex, time::sleep};

use crate::{
    clan::RecordCell,
    guest::{self, GuestError},
    link::Outlets,
    paths::ClanPaths,
    problem, record,
};

const RETRY: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// What is remembered; read from disk when it is first asked for.
pub(crate) struct Memory {
    clan: ClanId,
    paths: ClanPaths,
    kept: Mutex<Option<Kept>>,
    /// What the clan publishes, as of what was learnt last.
    published: std::sync::Mutex<Option<Published>>,
}

struct Kept {
    ledger: Ledger,
    /// Absent while it cannot be opened: then this manager remembers, and not the next.
    store: Option<Arc<LedgerStore>>,
    /// What is on disk.
    written: Vector,
}

/// The ledger as the machine and this computer have it together.
pub(crate) struct Known {
    pub(crate) ledger: Ledger,
    /// What the machine has of it.
    pub(crate) has: Vector,
}

impl Memory {
    pub(crate) fn new(clan: ClanId, paths: ClanPaths) -> Self {
        Self { clan, paths, kept: Mutex::new(None), published: std::sync::Mutex::new(None) }
    }

    /// What the clan publishes, as far as this computer has heard.
    pub(crate) fn published(&self) -> Option<Published> {
        self.published.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads what an earlier manager has learnt, so that it is told of a machine that does not run.
    pub(crate) async fn recall(&self) {
        let mut kept = self.kept.lock().await;
        if kept.is_none() && self.paths.ledger().exists() {
            self.note(self.stored(&mut kept).await);
        }
    }

    /// Fetches what is new.
    pub(crate) async fn refresh(&self, control: &Channel) -> Result<Known, GuestError> {
        let mut kept = self.kept.lock().await;
        let known = self.stored(&mut kept).await;
        let (ledger, has) = guest::entries_since(control, known.ledger.clone()).await?;
        known.ledger = ledger;
        self.note(known);
        self.write(known).await;
        Ok(Known { ledger: known.ledger.clone(), has })
    }

    fn note(&self, known: &Kept) {
        let published = known.ledger.state().published.clone();
        *self.published.lock().unwrap_or_else(PoisonError::into_inner) = published;
    }

    /// What is remembered, with the file that keeps it if that can be opened.
    ///
    /// INVARIANT: what was remembered stays, also if this is dropped in the middle.
    async fn stored<'a>(&self, kept: &'a mut Option<Kept>) -> &'a mut Kept {
        match kept.take_if(|known| known.store.is_some()) {
            Some(known) => kept.insert(known),
            None => {
                let mut loaded = self.load().await;
                loaded.ledger.insert_all(kept.iter().flat_map(|known| known.ledger.entries()).cloned());
                kept.insert(loaded)
            }
        }
    }

    async fn load(&self) -> Kept {
        let (clan, paths) = (self.clan, self.paths.clone());
        let opened = tokio::task::spawn_blocking(move || open(&clan, &paths)).await;
        let (store, ledger) = match opened {
            Ok(Ok((store, ledger))) => (Some(Arc::new(store)), ledger),
            Ok(Err(why)) => {
                tracing::warn!(clan = %self.clan, why, "what is known of the clan's ledger cannot be kept on disk");
                (None, Ledger::open(self.clan))
            }
            Err(_) => (None, Ledger::open(self.clan)),
        };
        let written = ledger.vector();
        Kept { ledger, store, written }
    }

    async fn write(&self, kept: &mut Kept) {
        let vector = kept.ledger.vector();
        let Some(store) = kept.store.clone().filter(|_| vector != kept.written) else { return };
        let new: Vec<Entry> = kept.ledger.page(&kept.written, None, usize::MAX).entries.into_iter().cloned().collect();
        match tokio::task::spawn_blocking(move || store.append_all(&new)).await {
            Ok(Ok(())) => kept.written = vector,
            Ok(Err(error)) => {
                let why = problem::with_sources(&error);
                tracing::warn!(clan = %self.clan, why, "what is known of the clan's ledger cannot be kept on disk");
            }
            Err(_) => {}
        }
    }
}

fn open(clan: &ClanId, paths: &ClanPaths) -> Result<(LedgerStore, Ledger), String> {
    // What was verified before it was written is marked by this.
    let key = record::load_key(paths).map_err(|e| problem::with_sources(&e))?;
    let open = || LedgerStore::open_sealed(paths.ledger(), clan, SealKey::derive(&key.to_bytes()));
    let opened = match open() {
        // It was put aside; what it held is fetched again.
        Err(StoreError::Corrupt { .. }) => open(),
        opened => opened,
    };
    let store = opened.map_err(|e| problem::with_sources(&e))?;
    let ledger = store.load().map_err(|e| problem::with_sources(&e))?;
    Ok((store, ledger))
}

/// Tells the machine what is remembered, until it is sure of what it has signed, then remembers what it learns.
pub(crate) async fn keep(channel: &Channel, record: &RecordCell, out: &Outlets) {
    let mut told = out.told.subscribe();
    let (mut sure, mut pause) = (false, RETRY);
    loop {
        let count = told.borrow_and_update().as_ref().map(|told| told.status.entries);
        let outcome = if sure {
            record.memory().refresh(channel).await.map(drop)
        } else {
            remind(channel, record).await.map(|now| sure = now)
        };
        match outcome {
            Ok(()) if sure => {
                pause = RETRY;
                let learnt = told.wait_for(|told| told.as_ref().map(|told| told.status.entries) != count);
                if learnt.await.is_err() {
                    return;
                }
            }
            Ok(()) => sleep(RETRY).await,
            Err(error) => {
                tracing::debug!(%error, "the controller cannot be told what is remembered, or tell what is new");
                sleep(pause).await;
                pause = (pause * 2).min(RETRY_MAX);
            }
        }
    }
}

/// Whether the machine is sure now.
async fn remind(channel: &Channel, record: &RecordCell) -> Result<bool, GuestError> {
    let Known { ledger, has } = record.memory().refresh(channel).await?;
    let lacks: Vec<_> = ledger.page(&has, None, usize::MAX).entries.into_iter().map(Entry::encode).collect();
    let restored = record.get().restored;
    let sure = guest::remember(channel, restored, &lacks).await?;
    if sure
        && restored
        && let Err(error) = record.update(|r| r.restored = false)
    {
        tracing::warn!(%error, "the clan's record is not written");
    }
    Ok(sure)
}

#[cfg(test)]
mod tests {
    use clan_ledger::{Body, VmDescription};
    use clan_types::{ByteSize, ImageId};
    use futures_util::FutureExt;

    use super::*;
    use crate::{
        authority::tests::{clan, key, say},
        paths::Paths,
        record::{Phase, tests},
    };

    #[tokio::test]
    async fn what_could_not_be_written_stays_when_whoever_asks_hangs_up_and_is_written_later() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path());
        let (ledger, mut record) = (clan(), tests::record(1, Phase::Ready));
        record.id = ledger.clan();
        tests::put(&paths, &record, None);
        let memory = Memory::new(record.id, paths.clan(&record.id));
        let mut kept = Some(Kept { written: Vector::new(), store: None, ledger: ledger.clone() });
        // The first poll opens the file, on another thread.
        let _ = memory.stored(&mut kept).now_or_never();
        assert_eq!(kept.as_ref().map(|known| known.ledger.len()), Some(ledger.len()));
        // The file is free once that thread has let go of it.
        while kept.as_ref().is_none_or(|known| known.store.is_none()) {
            memory.stored(&mut kept).await;
        }
        memory.write(kept.as_mut().unwrap()).await;
        drop(kept);
        let again = Memory::new(record.id, paths.clan(&record.id));
        assert_eq!(again.stored(&mut None).await.ledger.len(), ledger.len(), "on disk");
    }

    #[tokio::test]
    async fn what_the_clan_publishes_is_told_after_a_restart_while_its_machine_is_off() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path());
        let (mut ledger, mut record) = (clan(), tests::record(1, Phase::Ready));
        let image = ImageId::from_bytes([2; 32]);
        let (memory, disk) = (ByteSize::from_mib(128), ByteSize::from_mib(64));
        let description = VmDescription { image, title: "newer".parse().unwrap(), memory, cpus: 1, disk };
        say(&mut ledger, &key(1), Body::Publish { description });
        record.id = ledger.clan();
        tests::put(&paths, &record, None);
        let never = Memory::new(record.id, paths.clan(&record.id));
        never.recall().await;
        assert!(never.published().is_none() && !paths.clan(&record.id).ledger().exists(), "nothing was heard");

        let earlier = Memory::new(record.id, paths.clan(&record.id));
        let mut kept = None;
        earlier.stored(&mut kept).await;
        let known = kept.as_mut().unwrap();
        known.ledger.insert_all(ledger.entries().cloned());
        earlier.write(known).await;
        drop(kept);
        let memory = Memory::new(record.id, paths.clan(&record.id));
        assert!(memory.published().is_none());
        memory.recall().await;
        assert_eq!(memory.published().unwrap().description.image, image);
    }
}
