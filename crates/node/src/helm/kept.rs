//! What a machine keeps on its disk about how it is steered: who may, its settings, and what was done by whom.
//!
//! Pure: changes come in, the entry that tells of them goes out.

use clan_types::{ControlMode, ServiceName, Timestamp};
use clan_wire::helm::{Actor, Deed, JournalEntry, MAX_JOURNAL, Refusal, Setting};
use serde::{Deserialize, Serialize};

/// What is the user's of the computer itself, whatever the mode.
const USERS: [&str; 7] = ["memory", "disk", "cpus", "control", "power", "snapshots", "ports"];
const ANNOUNCE: &str = "announce";
const SERVICES: &str = "services";

/// `helm.json`. One file, so that no change is without its entry.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Kept {
    /// Who may steer.
    pub(crate) mode: ControlMode,
    /// Settings.
    #[serde(default)]
    pub(crate) settings: Settings,
    /// Number of the last entry.
    #[serde(default)]
    last: u64,
    /// The latest entries, oldest first.
    #[serde(default)]
    journal: Vec<JournalEntry>,
}

/// What can be set on a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settings {
    /// Whether the local network is told that this machine is there.
    #[serde(default = "yes")]
    pub(crate) announce: bool,
    /// Services of the image to run; `None`: those with which the machine began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) services: Option<Vec<ServiceName>>,
}

const fn yes() -> bool {
    true
}

impl Default for Settings {
    fn default() -> Self {
        Self { announce: true, services: None }
    }
}

/// What a machine could be set to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Possible {
    /// Services of the image; `None` where there is no image, as on a computer that has other business too.
    pub(crate) services: Option<Vec<ServiceName>>,
    /// Those with which the machine began.
    pub(crate) offers: Vec<ServiceName>,
}

impl Kept {
    /// With nothing done yet.
    pub(crate) fn new(mode: ControlMode) -> Self {
        Self { mode, ..Self::default() }
    }

    /// The journal, oldest entry first.
    pub(crate) fn journal(&self) -> &[JournalEntry] {
        &self.journal
    }

    /// The settings, for people.
    pub(crate) fn settings(&self, possible: &Possible) -> Vec<Setting> {
        let setting = |name: &str, about: &str| {
            let value = self.value(name, possible)?;
            Some(Setting { name: name.to_owned(), value, about: about.to_owned() })
        };
        let all = [
            setting(ANNOUNCE, "tell the local network that this machine is there: on or off"),
            setting(SERVICES, "services of the image that it runs and offers: names with commas between, or none"),
        ];
        all.into_iter().flatten().collect()
    }

    /// Writes down what was done.
    pub(crate) fn note(&mut self, by: Actor, what: Deed, at: Timestamp) -> JournalEntry {
        self.last += 1;
        let entry = JournalEntry { number: self.last, at, by, what };
        self.journal.push(entry.clone());
        // INVARIANT: however often somebody changes something, the file stays small.
        let over = self.journal.len().saturating_sub(MAX_JOURNAL);
        self.journal.drain(..over);
        entry
    }

    /// Writes down when a terminal ended, if its entry is still there.
    pub(crate) fn note_end(&mut self, number: u64, at: Timestamp) {
        if let Some(entry) = self.journal.iter_mut().find(|entry| entry.number == number)
            && let Deed::Terminal { ended } = &mut entry.what
        {
            *ended = Some(at);
        }
    }

    /// Terminals that were open when the controller last ended did not outlive it.
    pub(crate) fn note_all_ends(&mut self, at: Timestamp) {
        for entry in &mut self.journal {
            if let Deed::Terminal { ended: ended @ None } = &mut entry.what {
                *ended = Some(at);
            }
        }
    }

    /// Changes who may steer; `None` if it is so already.
    pub(crate) fn set_mode(&mut self, mode: ControlMode, by: Actor, at: Timestamp) -> Option<JournalEntry> {
        self.change_mode(mode, None, by, at)
    }

    /// Changes a setting; `None` if it is so already.
    pub(crate) fn set(
        &mut self,
        name: &str,
        value: &str,
        possible: &Possible,
        by: Actor,
        at: Timestamp,
    ) -> Result<Option<JournalEntry>, Refusal> {
        self.change(name, value, None, possible, by, at)
    }

    /// Restores what was before an entry, if nothing has come over it since.
    pub(crate) fn revert(
        &mut self,
        number: u64,
        possible: &Possible,
        by: Actor,
        at: Timestamp,
    ) -> Result<Option<JournalEntry>, Refusal> {
        let entry = self.journal.iter().find(|entry| entry.number == number);
        match entry.ok_or(Refusal::NoEntry { number })?.what.clone() {
            Deed::Set { name, before, after, .. } => {
                let now = self.value(&name, possible).ok_or(Refusal::NotRevertible { number })?;
                if now != after {
                    return Err(Refusal::Stale { number, now });
                }
                self.change(&name, &before, Some(number), possible, by, at)
            }
            // INVARIANT: who may steer is said by the base OS user, and by nobody in another's name.
            Deed::Mode { .. } if !by.here => Err(Refusal::UserOnly { what: "the control mode".to_owned() }),
            Deed::Mode { before, after, .. } if self.mode == after => {
                Ok(self.change_mode(before, Some(number), by, at))
            }
            Deed::Mode { .. } => Err(Refusal::Stale { number, now: self.mode.to_string() }),
            // An image is for the manager to put back: see `order`.
            Deed::Restart | Deed::Terminal { .. } | Deed::Image { .. } => Err(Refusal::NotRevertible { number }),
        }
    }

    /// The services that are to run.
    pub(crate) fn services(&self, possible: &Possible) -> Vec<ServiceName> {
        self.settings.services.clone().unwrap_or_else(|| possible.offers.clone())
    }

    fn change_mode(
        &mut self,
        mode: ControlMode,
        reverts: Option<u64>,
        by: Actor,
        at: Timestamp,
    ) -> Option<JournalEntry> {
        let before = std::mem::replace(&mut self.mode, mode);
        (before != mode).then(|| self.note(by, Deed::Mode { before, after: mode, reverts }, at))
    }

    fn change(
        &mut self,
        name: &str,
        value: &str,
        reverts: Option<u64>,
        possible: &Possible,
        by: Actor,
        at: Timestamp,
    ) -> Result<Option<JournalEntry>, Refusal> {
        let before = self.value(name, possible).ok_or_else(|| self.no_setting(name, possible))?;
        let bad = |why: String| Refusal::BadValue { name: name.to_owned(), value: value.to_owned(), why };
        match name {
            ANNOUNCE => {
                self.settings.announce = match value {
                    "on" => true,
                    "off" => false,
                    _ => return Err(bad("it is on or off".to_owned())),
                };
            }
            _ => {
                let known = possible.services.as_deref().unwrap_or_default();
                self.settings.services = Some(services(value, known).map_err(bad)?);
            }
        }
        let after = self.value(name, possible).unwrap_or_default();
        if before == after {
            return Ok(None);
        }
        Ok(Some(self.note(by, Deed::Set { name: name.to_owned(), before, after, reverts }, at)))
    }

    /// `None` if the machine has no such setting.
    fn value(&self, name: &str, possible: &Possible) -> Option<String> {
        match name {
            ANNOUNCE => Some(if self.settings.announce { "on" } else { "off" }.to_owned()),
            SERVICES if possible.services.is_some() => {
                let names: Vec<String> = self.services(possible).iter().map(ToString::to_string).collect();
                Some(if names.is_empty() { "none".to_owned() } else { names.join(",") })
            }
            _ => None,
        }
    }

    fn no_setting(&self, name: &str, possible: &Possible) -> Refusal {
        if USERS.contains(&name) {
            return Refusal::UserOnly { what: name.to_owned() };
        }
        let known = self.settings(possible).into_iter().map(|setting| setting.name).collect();
        Refusal::NoSetting { name: name.to_owned(), known }
    }
}

fn services(value: &str, known: &[ServiceName]) -> Result<Vec<ServiceName>, String> {
    if value == "none" {
        return Ok(Vec::new());
    }
    let mut wanted = Vec::new();
    for name in value.split(',').map(str::trim) {
        let service = known.iter().find(|service| service.as_str() == name).ok_or_else(|| {
            let known: Vec<&str> = known.iter().map(ServiceName::as_str).collect();
            format!("the image has {}, or say none", known.join(", "))
        })?;
        if !wanted.contains(service) {
            wanted.push(service.clone());
        }
    }
    wanted.sort();
    Ok(wanted)
}

#[cfg(test)]
mod tests {
    use clan_types::{MachineId, PersonId};
    use proptest::prelude::*;

    use super::*;

    fn actor(here: bool) -> Actor {
        Actor {
            person: Some(PersonId::from_bytes([1; 32])),
            name: Some("ada".parse().unwrap()),
            machine: MachineId::from_bytes([2; 32]),
            machine_name: None,
            here,
        }
    }

    fn at(n: u64) -> Timestamp {
        Timestamp::from_millis(n)
    }

    fn guest() -> Possible {
        let web: ServiceName = "web".parse().unwrap();
        Possible { services: Some(vec![web.clone(), "wiki".parse().unwrap()]), offers: vec![web] }
    }

    #[test]
    fn a_change_is_taken_back_while_it_is_the_last_word() {
        let (mut kept, possible) = (Kept::new(ControlMode::Shared), guest());
        let first = kept.set(SERVICES, "wiki, web", &possible, actor(false), at(1)).unwrap().unwrap();
        let second = kept.set(SERVICES, "none", &possible, actor(true), at(2)).unwrap().unwrap();
        assert_eq!(
            kept.revert(first.number, &possible, actor(true), at(3)),
            Err(Refusal::Stale { number: 1, now: "none".into() })
        );
        let third = kept.revert(second.number, &possible, actor(false), at(3)).unwrap().unwrap();
        assert_eq!(
            third.what,
            Deed::Set { name: SERVICES.into(), before: "none".into(), after: "web,wiki".into(), reverts: Some(2) }
        );
        kept.revert(first.number, &possible, actor(true), at(4)).unwrap().unwrap();
        assert_eq!(kept.services(&possible), guest().offers);
        // And what was taken back, too.
        kept.revert(4, &possible, actor(true), at(5)).unwrap().unwrap();
        assert_eq!(kept.journal().len(), 5);
        assert_eq!(kept.revert(9, &possible, actor(true), at(6)), Err(Refusal::NoEntry { number: 9 }));
    }

    #[test]
    fn what_changes_nothing_is_no_entry() {
        let (mut kept, possible) = (Kept::new(ControlMode::Shared), guest());
        assert_eq!(kept.set(ANNOUNCE, "on", &possible, actor(false), at(1)), Ok(None));
        assert_eq!(kept.set(SERVICES, "web", &possible, actor(false), at(1)), Ok(None));
        assert_eq!(kept.set_mode(ControlMode::Shared, actor(true), at(1)), None);
        assert!(kept.journal().is_empty());
    }

    #[test]
    fn who_may_steer_is_not_for_admins_to_take_back() {
        let (mut kept, possible) = (Kept::new(ControlMode::Shared), guest());
        kept.set_mode(ControlMode::Local, actor(true), at(1)).unwrap();
        kept.set_mode(ControlMode::Shared, actor(true), at(2)).unwrap();
        let refused = kept.revert(1, &possible, actor(false), at(3));
        assert!(matches!(refused, Err(Refusal::UserOnly { .. })), "{refused:?}");
        kept.revert(2, &possible, actor(true), at(3)).unwrap().unwrap();
        assert_eq!(kept.mode, ControlMode::Local);
    }

    #[test]
    fn settings_that_are_not_there_and_values_that_make_no_sense_are_told_apart() {
        let (mut kept, possible) = (Kept::new(ControlMode::Shared), guest());
        let mut set = |name: &str, value: &str, possible: &Possible| {
            kept.set(name, value, possible, actor(false), at(1)).unwrap_err().to_string()
        };
        assert_eq!(set("memory", "1G", &possible), "memory is the user's of its own computer to change");
        assert_eq!(set("colour", "red", &possible), "the machine has no setting `colour`");
        assert_eq!(set(SERVICES, "web", &Possible::default()), "the machine has no setting `services`");
        assert_eq!(set(ANNOUNCE, "maybe", &possible), "`maybe` is no value for `announce`: it is on or off");
        let bad = set(SERVICES, "web,mail", &possible);
        assert_eq!(bad, "`web,mail` is no value for `services`: the image has web, wiki, or say none");
        assert!(kept.journal().is_empty());
    }

    #[test]
    fn terminals_end_in_the_journal() {
        let mut kept = Kept::new(ControlMode::Remote);
        let open = Deed::Terminal { ended: None };
        let first = kept.note(actor(false), open.clone(), at(1));
        kept.note(actor(false), open, at(2));
        kept.note_end(first.number, at(5));
        kept.note_all_ends(at(9));
        let ends: Vec<_> = kept.journal().iter().map(|entry| entry.what.clone()).collect();
        assert_eq!(ends, [at(5), at(9)].map(|end| Deed::Terminal { ended: Some(end) }));
    }

    proptest! {
        #[test]
        fn a_revert_restores_what_was_before_and_the_journal_stays_bounded(
            steps in prop::collection::vec((0usize..5, any::<bool>()), 1..40), more in 0usize..400,
        ) {
            let (mut kept, possible) = (Kept::new(ControlMode::Shared), guest());
            for n in 0..more {
                kept.set(ANNOUNCE, ["on", "off"][n % 2], &possible, actor(true), at(0)).unwrap();
            }
            for (n, (kind, here)) in steps.into_iter().enumerate() {
                let before = kept.clone();
                let (name, value) = [(ANNOUNCE, "on"), (ANNOUNCE, "off"), (SERVICES, "web"), (SERVICES, "none"), (SERVICES, "wiki")][kind];
                if let Some(entry) = kept.set(name, value, &possible, actor(here), at(n as u64)).unwrap() {
                    let mut back = kept.clone();
                    back.revert(entry.number, &possible, actor(!here), at(n as u64)).unwrap().unwrap();
                    prop_assert_eq!(back.settings(&possible), before.settings(&possible));
                }
                prop_assert!(kept.journal().len() <= MAX_JOURNAL);
                prop_assert!(kept.journal().windows(2).all(|pair| pair[0].number + 1 == pair[1].number));
            }
        }
    }
}
