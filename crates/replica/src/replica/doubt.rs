//! While a machine may have signed what it does not know of, it signs nothing: two entries for one place of its log would
//! leave that log disputed for ever.
//!
//! Its ledger may be less than it was: lost, or on a disk that was put back to an earlier state. Whoever keeps a
//! memory of the clan outside of that disk (the manager) hands it over and says whether the disk was put back; other
//! machines have what they were told.

use std::time::Duration;

use clan_types::MachineId;
use clan_wire::peer::{EncodedEntry, Vector};

use super::{Input, Replica};
use crate::{Action, Now, Ticket};

/// Whoever remembers more has handed it over: others have so long to say what even that one missed.
const PATIENCE: Duration = Duration::from_secs(600);
/// INVARIANT: no more newcomers than these wait until this machine is sure. They lose patience before that.
const MAX_DEFERRED: usize = 16;

/// Why nothing is signed.
#[derive(Debug, Clone, Copy)]
pub(super) enum Doubt {
    /// The ledger does not know this machine: it is new, or was lost.
    Lost,
    /// What is remembered was handed over, but the last of it may be missing.
    Restored { until: Duration },
    /// It has just started. `heard` is how long others say that its log is.
    Started { until: Duration, heard: Option<u64> },
}

#[derive(Default)]
pub(super) struct Doubts {
    pub(super) now: Option<Doubt>,
    /// Whether somebody who remembers has spoken since the start.
    remembered: bool,
    deferred: Vec<(Ticket, Vec<EncodedEntry>)>,
}

impl Doubts {
    pub(super) fn new(now: Option<Doubt>) -> Self {
        Self { now, ..Self::default() }
    }

    /// Whether this machine listens to whoever connects.
    pub(super) fn is_learning(&self) -> bool {
        matches!(self.now, Some(Doubt::Lost | Doubt::Restored { .. }))
    }

    pub(super) fn due(&self) -> Option<Duration> {
        match self.now {
            Some(Doubt::Restored { until } | Doubt::Started { until, .. }) => Some(until),
            _ => None,
        }
    }

    pub(super) fn problem(&self) -> Option<String> {
        let what = match self.now? {
            Doubt::Lost => {
                "this machine does not have the clan's ledger, or lost it, and learns it from the other machines; until then it admits nobody"
            }
            Doubt::Restored { .. } => {
                "this machine's disk was put back, and it has yet to hear from another machine what it signed since; until then, ten minutes at most, it admits nobody"
            }
            Doubt::Started { .. } => return None,
        };
        Some(what.to_owned())
    }

    /// A newcomer waits. `false`: there is no room.
    pub(super) fn defer(&mut self, ticket: Ticket, entries: &[EncodedEntry]) -> bool {
        let room = self.deferred.len() < MAX_DEFERRED && matches!(self.now, Some(Doubt::Started { .. }));
        if room {
            self.deferred.push((ticket, entries.to_vec()));
        }
        room
    }
}

impl Replica {
    /// Whoever remembers this machine's log outside of its disk has handed over what they have: it is in the ledger.
    pub(super) fn remembered(&mut self, restored: bool, now: Now) {
        let first = !std::mem::replace(&mut self.doubts.remembered, true);
        let knows_itself = self.state.machines.contains_key(&self.machine);
        match self.doubts.now {
            Some(Doubt::Lost) if !knows_itself => return,
            Some(Doubt::Lost) => self.doubts.now = Some(Doubt::Restored { until: now.at + PATIENCE }),
            _ if restored && first => {
                self.doubts.now = Some(Doubt::Restored { until: now.at + PATIENCE });
                self.choose_neighbours();
                self.actions.push_back(Action::Changed);
            }
            Some(Doubt::Started { .. }) if !restored => self.be_sure(),
            _ => {}
        }
        let alone = self.state.good_machines().all(|(machine, _)| *machine == self.machine);
        if alone && matches!(self.doubts.now, Some(Doubt::Restored { .. })) {
            self.be_sure();
        }
    }

    /// What another machine has. Only those in good standing are believed: strangers may echo what they were told.
    pub(super) fn compare(&mut self, machine: &MachineId, theirs: &Vector) {
        if self.doubts.now.is_none() || self.state.machine_in_good_standing(machine).is_none() {
            return;
        }
        let knows_itself = self.state.machines.contains_key(&self.machine);
        if self.doubts.is_learning() && knows_itself && *theirs == *self.vector {
            return self.be_sure();
        }
        let own = theirs.iter().find(|(author, _)| author == self.machine.as_bytes()).map_or(0, |(_, next)| *next);
        if let Some(Doubt::Started { heard, .. }) = &mut self.doubts.now {
            *heard = heard.max(&mut Some(own)).to_owned();
        }
        self.weigh_what_was_heard();
    }

    /// After a change of the ledger, or of what was heard.
    pub(super) fn weigh_what_was_heard(&mut self) {
        let own = self.ledger.head(self.machine.into()).map_or(0, |head| head.seq + 1);
        if matches!(self.doubts.now, Some(Doubt::Started { heard: Some(heard), .. }) if heard <= own) {
            self.be_sure();
        }
    }

    pub(super) fn outlast_doubt(&mut self, now: Now) {
        if self.doubts.due().is_some_and(|until| until <= now.at) {
            self.be_sure();
        }
    }

    fn be_sure(&mut self) {
        let learnt = self.doubts.is_learning();
        self.doubts.now = None;
        let waited = std::mem::take(&mut self.doubts.deferred);
        self.inputs.extend(waited.into_iter().map(|(ticket, entries)| Input::Redeem { ticket, entries }));
        if learnt {
            self.refresh();
        }
    }
}
