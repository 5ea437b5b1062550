//! The logs of one clan.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::OnceLock,
    time::Duration,
};

use clan_types::{
    ClanId, ClanName, DeviceId, EntryId, Hlc, MachineId, MachineName, PersonId, PersonName, Role, Timestamp,
};
use ed25519_dalek::SigningKey;

use crate::{
    AuthorId, Body, Entry, EntryError, InviteProblem, LastEntry, State,
    log::{Log, Placed},
    weigh::Folded,
};

/// How far an entry's time may lie ahead of the reader's clock and still be believed.
pub const MAX_AHEAD: Duration = Duration::from_secs(600);

/// INVARIANT: no more entries than these wait for a predecessor.
const MAX_WAITING: usize = 4096;

/// What became of an inserted entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inserted {
    /// It is in the log, or kept as evidence that its author equivocated. Store it and pass it on.
    New,
    /// Nothing changed.
    Known,
    /// It is kept until its predecessor arrives. Store it; do not pass it on.
    Waiting,
}

/// Why an entry is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InsertError {
    /// It belongs to another clan.
    #[error("the entry belongs to another clan")]
    ForeignClan,
    /// It is not later than its predecessor.
    #[error("the entry is not later than the one before it")]
    TimeRunsBack,
    /// Its predecessor is missing and too many entries wait already. It can be offered again.
    #[error("too many entries wait for their predecessors")]
    TooManyWaiting,
}

/// Why a newcomer's entries cannot be countersigned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RedeemProblem {
    /// They are not an admission, then machines and devices, of one new author in this clan.
    #[error("the entries are not a newcomer's admission")]
    Malformed,
    /// The invite does not allow it.
    #[error("the invite cannot be redeemed")]
    Invite(#[source] InviteProblem),
    /// The person's name is taken.
    #[error("the name `{0}` is taken by another person")]
    PersonNameTaken(PersonName),
    /// The machine's name is taken.
    #[error("the name `{0}` is taken by another machine")]
    MachineNameTaken(MachineName),
    /// The machine or its WireGuard key is enrolled already.
    #[error("the machine's key is enrolled already")]
    KeyTaken,
    /// The newcomer's clock is ahead by more than [`MAX_AHEAD`].
    #[error("the newcomer's clock is ahead by more than {} minutes", MAX_AHEAD.as_secs() / 60)]
    ClockAhead,
}

/// The logs of one clan and, folded on demand, its [`State`].
#[derive(Debug, Clone)]
pub struct Ledger {
    clan: ClanId,
    pub(crate) logs: BTreeMap<AuthorId, Log>,
    /// The entries that count for the fold (no evidence, none waiting), in the order in which they take effect.
    pub(crate) order: BTreeMap<(Hlc, EntryId), (AuthorId, u64)>,
    waiting: BTreeMap<(AuthorId, u64, EntryId), Entry>,
    folded: Cache,
}

/// What the entries amount to, as far as it has been asked for. A copy of a ledger folds for itself.
#[derive(Default)]
struct Cache(OnceLock<Box<Folded>>);

impl Cache {
    fn forget(&mut self) {
        self.0 = OnceLock::new();
    }
}

impl Clone for Cache {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.get().is_some() { "folded" } else { "not folded" })
    }
}

/// What became of many inserted entries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InsertedMany {
    /// Those that were [`Inserted::New`], in the order given.
    pub new: Vec<Entry>,
    /// Those that were [`Inserted::Waiting`].
    pub waiting: Vec<Entry>,
    /// Those that were refused, and why.
    pub refused: Vec<(EntryId, InsertError)>,
}

impl Ledger {
    /// Founds a clan: its ledger, and the founding entry that is in it already. `nonce` must be random.
    pub fn found(
        key: &SigningKey,
        clan: ClanName,
        founder: PersonName,
        nonce: [u8; 32],
        now: Timestamp,
    ) -> Result<(Self, Entry), EntryError> {
        let body = Body::Found { clan, founder, nonce };
        let entry = Entry::sign(key, None, 0, None, Hlc { wall: now, counter: 0 }, body)?;
        let mut ledger = Self::open(entry.clan());
        // The first entry of an empty ledger of its own clan is always placed.
        let _ = ledger.insert(entry.clone());
        Ok((ledger, entry))
    }

    /// The ledger of a clan, empty. Only entries of that clan enter it, and its founding entry is recognised by its
    /// hash: nothing that arrives later can be somebody else's clan.
    pub fn open(clan: ClanId) -> Self {
        Self { clan, logs: BTreeMap::new(), order: BTreeMap::new(), waiting: BTreeMap::new(), folded: Cache::default() }
    }

    /// The clan.
    pub fn clan(&self) -> ClanId {
        self.clan
    }

    /// Takes an entry in, in any order. One whose predecessor is missing waits for it.
    pub fn insert(&mut self, entry: Entry) -> Result<Inserted, InsertError> {
        if entry.clan() != self.clan {
            return Err(InsertError::ForeignClan);
        }
        let author = entry.author();
        if self.waiting.contains_key(&(author, entry.seq(), entry.id())) {
            return Ok(Inserted::Known);
        }
        let log = self.logs.entry(author).or_insert_with(|| Log::new(&author));
        let result = match log.place(&entry) {
            Placed::Chained(displaced) => {
                log.rechecked(entry.seq());
                self.chained(&entry, &displaced);
                Ok(Inserted::New)
            }
            Placed::Evidence => {
                self.folded.forget();
                self.drop_waiting_after(&entry);
                Ok(Inserted::New)
            }
            Placed::Lost => {
                self.drop_waiting_after(&entry);
                Ok(Inserted::Known)
            }
            Placed::Known => {
                log.rechecked(entry.seq());
                Ok(Inserted::Known)
            }
            Placed::TimeRunsBack => Err(InsertError::TimeRunsBack),
            Placed::Waits => {
                if entry.seq() <= log.len() {
                    log.recheck.get_or_insert(0);
                }
                if self.waiting.len() >= MAX_WAITING {
                    return Err(InsertError::TooManyWaiting);
                }
                self.waiting.insert((author, entry.seq(), entry.id()), entry);
                Ok(Inserted::Waiting)
            }
        };
        if self.logs.get(&author).is_some_and(|log| log.chain.is_empty()) {
            self.logs.remove(&author);
        }
        result
    }

    /// Takes many entries in; a refused one does not stop the others.
    pub fn insert_all(&mut self, entries: impl IntoIterator<Item = Entry>) -> InsertedMany {
        let mut result = InsertedMany::default();
        for entry in entries {
            match self.insert(entry.clone()) {
                Ok(Inserted::New) => result.new.push(entry),
                Ok(Inserted::Waiting) => result.waiting.push(entry),
                Ok(Inserted::Known) => {}
                Err(error) => result.refused.push((entry.id(), error)),
            }
        }
        result
    }

    /// What the entries amount to. Folded when asked for the first time after a change.
    pub fn state(&self) -> &State {
        self.folded.0.get_or_init(|| Box::new(Folded::new(self))).state(self)
    }

    /// All entries, evidence included, those that wait excluded. Each author's chain is contiguous.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.logs.values().flat_map(|log| log.chain.iter().chain(&log.rival))
    }

    /// How many entries [`Ledger::entries`] yields.
    pub fn len(&self) -> usize {
        self.logs.values().map(|log| log.chain.len() + usize::from(log.rival.is_some())).sum()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.logs.is_empty()
    }

    /// The last entry of an author's log: what a revocation names as the last that counts.
    pub fn head(&self, author: AuthorId) -> Option<LastEntry> {
        self.logs.get(&author).and_then(Log::head)
    }

    /// The entry with the id.
    pub fn get(&self, id: &EntryId) -> Option<&Entry> {
        self.entries().find(|entry| entry.id() == *id)
    }

    /// Signs the next entry of the key's log; the caller stores it, then inserts it. `now` is the wall clock.
    pub fn author(&self, key: &SigningKey, body: Body, now: Timestamp) -> Result<Entry, EntryError> {
        let head = self.logs.get(&AuthorId::of(key)).and_then(|log| log.chain.last());
        let (seq, prev) = head.map_or((0, None), |head| (head.seq() + 1, Some(head.id())));
        let time = self.next_time(now).max(head.map_or(Hlc::default(), |head| head.time().next(now)));
        Entry::sign(key, Some(&self.clan), seq, prev, time, body)
    }

    /// The bodies that put a person, their devices and their machines out, each with the last entry known here as the
    /// last that counts. Whoever has them all has cut everything off that the person may still write: a device or a
    /// machine that is not known here was added by an entry that is cut off.
    pub fn revocation_of_person(&self, person: &PersonId) -> Vec<Body> {
        let state = self.state();
        let first = AuthorId::from(*person).device();
        let machines = state.machines.iter().filter(|(_, machine)| machine.owner == *person);
        let mut bodies: Vec<_> = machines.map(|(machine, _)| self.revocation_of_machine(machine)).collect();
        let further = state.devices_of(person).filter(|(id, _)| **id != first);
        bodies.extend(further.map(|(device, _)| self.revocation_of_device(device)));
        bodies.push(Body::RevokePerson { person: *person, last: self.head((*person).into()) });
        bodies
    }

    /// The body that puts a device out, with the last of its entries known here as the last that counts.
    pub fn revocation_of_device(&self, device: &DeviceId) -> Body {
        Body::RevokeDevice { device: *device, last: self.head((*device).into()) }
    }

    /// The body that gives a person another role, with all that is known here of them counting under the old one.
    pub fn role_change(&self, person: &PersonId, role: Role) -> Body {
        let devices = self.state().devices_of(person);
        let last = devices.filter_map(|(device, _)| Some((*device, self.head((*device).into())?))).collect();
        Body::SetRole { person: *person, role, last }
    }

    /// The body that puts a machine out, with the last of its entries known here as the last that counts.
    pub fn revocation_of_machine(&self, machine: &MachineId) -> Body {
        Body::RevokeMachine { machine: *machine, last: self.head((*machine).into()) }
    }

    /// Whether a newcomer's entries (their admission, then what they add of their own) would count if they were inserted here and
    /// countersigned now. Gives the admission, whose id the countersignature names.
    pub fn check_redemption<'a>(&self, entries: &'a [Entry], now: Timestamp) -> Result<&'a Entry, RedeemProblem> {
        let (admission, rest) = entries.split_first().ok_or(RedeemProblem::Malformed)?;
        let Body::Admission { invite, name, .. } = admission.body() else { return Err(RedeemProblem::Malformed) };
        let author = admission.author();
        let state = self.state();
        if admission.clan() != self.clan || state.person_of(&author).is_some() {
            return Err(RedeemProblem::Malformed);
        }
        let mut before = admission;
        let mut seen = self.next_time(now);
        let (mut keys, mut names, mut wgs) = (BTreeSet::from([author]), BTreeSet::new(), BTreeSet::new());
        for entry in rest {
            let follows = entry.author() == author && entry.clan() == self.clan && entry.prev() == Some(before.id());
            if !follows || entry.seq() != before.seq() + 1 || entry.time() <= before.time() {
                return Err(RedeemProblem::Malformed);
            }
            let key = match entry.body() {
                Body::Enrol { machine, name, wg, .. } => {
                    if !names.insert(name) || state.is_node_name(name) {
                        return Err(RedeemProblem::MachineNameTaken(name.clone()));
                    }
                    let known = state.machines.values().any(|known| known.wg == *wg) || state.peers.contains_key(wg);
                    if known || !wgs.insert(wg) {
                        return Err(RedeemProblem::KeyTaken);
                    }
                    AuthorId::from(*machine)
                }
                Body::AddDevice { device, .. } => AuthorId::from(*device),
                _ => return Err(RedeemProblem::Malformed),
            };
            let known = state.machines.contains_key(&key.machine()) || state.person_of(&key).is_some();
            if known || !keys.insert(key) {
                return Err(RedeemProblem::KeyTaken);
            }
            before = entry;
        }
        // Another admission of theirs, recorded before, would displace or be displaced by this one.
        let differs = |entry: &Entry, log: &Log| log.get(entry.seq()).is_some_and(|known| known.id() != entry.id());
        if self.logs.get(&author).is_some_and(|log| entries.iter().any(|entry| differs(entry, log))) {
            return Err(RedeemProblem::Malformed);
        }
        if before.time().wall > now.plus(MAX_AHEAD) {
            return Err(RedeemProblem::ClockAhead);
        }
        // The countersignature will be later than all it has seen, and that is the time that must not be past expiry.
        seen = seen.max(before.time());
        state.check_invite(invite, seen.wall).map_err(RedeemProblem::Invite)?;
        if state.is_person_name(name) {
            return Err(RedeemProblem::PersonNameTaken(name.clone()));
        }
        Ok(admission)
    }

    /// A reading later than everything seen, except times that lie absurdly far ahead.
    fn next_time(&self, now: Timestamp) -> Hlc {
        let end = Hlc { wall: now.plus(MAX_AHEAD), counter: u32::MAX };
        let seen = self.order.range(..=(end, EntryId::from_bytes([0xff; 32]))).next_back();
        seen.map_or(Hlc { wall: now, counter: 0 }, |((seen, _), _)| seen.next(now))
    }

    /// Books an entry that entered a chain, and places those that waited for it.
    fn chained(&mut self, entry: &Entry, displaced: &[Entry]) {
        let author = entry.author();
        if !displaced.is_empty() {
            self.folded.forget();
        }
        for gone in displaced {
            self.order.remove(&(gone.time(), gone.id()));
            self.drop_waiting_after(gone);
        }
        self.book(entry);
        let mut parents = vec![entry.clone()];
        while let Some(parent) = parents.pop() {
            for child in self.take_waiting_after(&parent) {
                let Some(log) = self.logs.get_mut(&author) else { return };
                match log.place(&child) {
                    Placed::Chained(displaced) => {
                        for gone in displaced {
                            self.folded.forget();
                            self.order.remove(&(gone.time(), gone.id()));
                        }
                        self.book(&child);
                        parents.push(child);
                    }
                    Placed::Evidence => {
                        self.folded.forget();
                        self.drop_waiting_after(&child);
                    }
                    Placed::Lost | Placed::TimeRunsBack => self.drop_waiting_after(&child),
                    Placed::Known => {}
                    // A sibling displaced the parent meanwhile.
                    Placed::Waits => self.drop_waiting_after(&child),
                }
            }
        }
        self.settle(author);
    }

    /// Puts an entry of a chain into its place in the order of effects.
    fn book(&mut self, entry: &Entry) {
        self.order.insert((entry.time(), entry.id()), (entry.author(), entry.seq()));
        if self.folded.0.get_mut().is_some_and(|folded| !folded.take(entry)) {
            self.folded.forget();
        }
    }

    /// Takes out the waiting entries that name `parent` as their predecessor.
    fn take_waiting_after(&mut self, parent: &Entry) -> Vec<Entry> {
        let next = parent.seq() + 1;
        let (least, end) = ((parent.author(), next, EntryId::from_bytes([0; 32])), EntryId::from_bytes([0xff; 32]));
        let range = self.waiting.range(least..=(parent.author(), next, end));
        let keys: Vec<_> = range.filter(|(_, entry)| entry.prev() == Some(parent.id())).map(|(key, _)| *key).collect();
        keys.iter().filter_map(|key| self.waiting.remove(key)).collect()
    }

    /// Forgets the waiting entries of a branch that lost.
    fn drop_waiting_after(&mut self, lost: &Entry) {
        let mut parents = vec![lost.clone()];
        while let Some(parent) = parents.pop() {
            parents.extend(self.take_waiting_after(&parent));
        }
        self.settle(lost.author());
    }

    /// Ends the search for a fork once nothing contradicts the chain any more, or begins one.
    fn settle(&mut self, author: AuthorId) {
        let Some(log) = self.logs.get_mut(&author) else { return };
        let (least, end) = (EntryId::from_bytes([0; 32]), EntryId::from_bytes([0xff; 32]));
        let contradicted = self.waiting.range((author, 0, least)..=(author, log.len(), end)).next().is_some();
        if !contradicted {
            log.recheck = None;
        } else {
            log.recheck.get_or_insert(0);
        }
    }
}
