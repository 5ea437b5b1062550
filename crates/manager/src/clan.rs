//! A clan on this computer: its record, the person's key and log, and its VM's keeper.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use clan_api::ApiProblem;
use clan_ledger::AuthorId;
use clan_os::channel::Channel;
use clan_types::{ClanId, ClanName, Passphrase, PersonId};
use clan_wire::control::NodeStatus;
use ed25519_dalek::SigningKey;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    disk::DiskError,
    guest::{self, GuestError},
    keeper::Keeper,
    link::Told,
    memory::Memory,
    paths::ClanPaths,
    problem,
    record::{ClanRecord, PersonLog},
    tasks::now,
};

/// How long somebody who only looks waits for the present where the past is known.
const GLANCE: Duration = Duration::from_secs(2);

/// A clan's record, kept on disk.
pub(crate) struct RecordCell {
    paths: ClanPaths,
    record: Mutex<ClanRecord>,
    memory: Memory,
    /// INVARIANT: nowhere else, but on its way to a QEMU.
    passphrase: watch::Sender<Option<Passphrase>>,
}

impl RecordCell {
    pub(crate) fn new(paths: ClanPaths, record: ClanRecord) -> Self {
        let passphrase = watch::Sender::new(None);
        Self { memory: Memory::new(record.id, paths.clone()), paths, record: Mutex::new(record), passphrase }
    }

    /// What opens the data disk, if it is encrypted and somebody said it.
    pub(crate) fn passphrase(&self) -> Option<Passphrase> {
        self.passphrase.borrow().clone()
    }

    /// Remembers what opens the data disk; or forgets it.
    pub(crate) fn set_passphrase(&self, passphrase: Option<Passphrase>) {
        self.passphrase.send_replace(passphrase);
    }

    /// Wakes when it is said, or forgotten.
    pub(crate) fn watch_passphrase(&self) -> watch::Receiver<Option<Passphrase>> {
        self.passphrase.subscribe()
    }

    /// Whether the data disk is encrypted, and nobody has said what opens it.
    pub(crate) fn is_locked(&self) -> bool {
        self.lock().encrypted && self.passphrase.borrow().is_none()
    }

    /// What is remembered of the clan's ledger.
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    pub(crate) fn paths(&self) -> &ClanPaths {
        &self.paths
    }

    pub(crate) fn get(&self) -> ClanRecord {
        self.lock().clone()
    }

    /// Changes the record on disk, then here. Blocks on the disk, for less than a page.
    pub(crate) fn update(&self, change: impl FnOnce(&mut ClanRecord)) -> Result<(), DiskError> {
        let mut record = self.lock();
        let mut changed = record.clone();
        change(&mut changed);
        if changed != *record {
            changed.save(&self.paths)?;
            *record = changed;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, ClanRecord> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A clan on this computer.
pub(crate) struct Clan {
    pub(crate) record: Arc<RecordCell>,
    pub(crate) keeper: Keeper,
    pub(crate) key: SigningKey,
    /// Held while an entry is signed and handed over: the person's log has one writer.
    pub(crate) log: tokio::sync::Mutex<PersonLog>,
    /// Cancelled when this computer is no more in the clan, or the manager stops.
    pub(crate) over: CancellationToken,
}

impl Clan {
    pub(crate) fn id(&self) -> ClanId {
        self.record.lock().id
    }

    pub(crate) fn name(&self) -> ClanName {
        self.record.lock().name.clone()
    }

    /// Whose computer this is in the clan.
    pub(crate) fn person(&self) -> PersonId {
        self.record.lock().owner.unwrap_or_else(|| self.author().person())
    }

    /// Whose log the entries of this computer are in: a device of that person's.
    pub(crate) fn author(&self) -> AuthorId {
        AuthorId::of(&self.key)
    }

    /// The channel to the controller, if it answers now.
    pub(crate) fn control(&self) -> Result<Channel, GuestError> {
        self.keeper.control().ok_or(GuestError::NotConnected { who: "controller" })
    }

    /// The state of the clan as the controller has it now.
    ///
    /// INVARIANT: what a person decides, and what they see right after it, rests on this. What the controller told last may
    /// be older than what the person did last.
    pub(crate) async fn state(&self) -> Result<NodeStatus, ApiProblem> {
        let asked = async { guest::status(&self.control()?, guest::PATIENCE).await };
        asked.await.map_err(|e| problem::guest(&e))
    }

    /// The same for somebody who looks: where the controller does not answer, what it told last.
    pub(crate) async fn seen(&self) -> Option<Told> {
        let told = self.keeper.told();
        let Ok(control) = self.control() else { return told };
        let patience = if told.is_some() { GLANCE } else { guest::PATIENCE };
        match guest::status(&control, patience).await {
            Ok(status) => Some(Told { at: now(), status: Arc::new(status) }),
            Err(error) => {
                tracing::debug!(clan = %self.name(), %error, "what was told last is shown");
                told
            }
        }
    }
}

/// Short grouped text of a clan's id, to compare by eye: a hundred bits of it.
pub(crate) fn fingerprint(id: &ClanId) -> String {
    let text = id.to_string();
    let groups: Vec<&str> = (0..5).filter_map(|n| text.get(n * 4..n * 4 + 4)).collect();
    groups.join("-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        paths::Paths,
        record::{Phase, tests},
    };

    #[test]
    fn a_change_that_cannot_be_written_does_not_happen() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path());
        let made = tests::record(1, Phase::Ready);
        tests::put(&paths, &made, None);
        let clan = paths.clan(&made.id);
        let cell = RecordCell::new(clan.clone(), made);
        cell.update(|r| r.wanted = true).unwrap();
        assert!(ClanRecord::load(&clan).unwrap().wanted);
        // A directory in the way.
        std::fs::remove_file(clan.record()).unwrap();
        std::fs::create_dir(clan.record()).unwrap();
        assert!(cell.update(|r| r.wanted = false).is_err());
        assert!(cell.get().wanted);
    }

    #[test]
    fn a_fingerprint_is_short_and_grouped() {
        let text = fingerprint(&ClanId::from_bytes([0xa5; 32]));
        assert_eq!(text.len(), 24);
        assert_eq!(text.split('-').count(), 5);
    }
}
