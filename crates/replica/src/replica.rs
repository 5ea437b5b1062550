//! One machine's copy of what the clan knows; see the crate's documentation.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use clan_ledger::{Entry, Inserted, Ledger, Place, State};
use clan_types::{ClanId, EntryId, MachineId, PeerAddr};
use clan_wire::{
    beacon::{self, Beacon},
    peer::{EncodedEntry, EntryPage, JoinRefusal, MAX_ENTRIES, PAGE_BYTES, PeerMessage, Vector, digest},
};
use ed25519_dalek::SigningKey;

use crate::{
    Action, Answer, Close, LinkId, Now, Own, Rejected, Ticket, WriteId, beacons::Beacons, dial::Dialer, newcomer,
    recent::Recent, rng::Rng,
};

mod doubt;
mod others;
mod redeem;

use doubt::{Doubt, Doubts};

/// Entries sent to a peer in one message. INVARIANT: together they fit into it, however long they are.
const BATCH: usize = 500;
/// Pushed entries may be lost to a full queue: comparing what each has repairs that.
const COMPARE_INTERVAL: Duration = Duration::from_secs(15);
/// With so many machines at a time, chosen at random: what one of them has gets to all in a few rounds.
const COMPARE_WITH: usize = 4;

/// What a replica begins with.
pub struct Config {
    /// The machine's key: signs beacons and countersignatures.
    pub key: SigningKey,
    /// Program version, as beacons tell it.
    pub version: String,
    /// What the machine says of itself.
    pub own: Own,
    /// Machines that could be reached before: more addresses to try.
    pub bootstrap: Vec<PeerAddr>,
    /// Fresh and random.
    pub seed: [u8; 32],
    /// Whether the machine ran before: it then countersigns nothing for so long, unless it hears before from other
    /// machines, or from whoever remembers ([`Replica::handle_remembered`]), that it knows all that it has signed.
    pub doubt: Option<Duration>,
}

/// One machine's copy of what the clan knows.
///
/// After every `handle_*`, poll [`Replica::poll_action`] until there is nothing left.
pub struct Replica {
    key: SigningKey,
    machine: MachineId,
    version: String,
    own: Own,
    bootstrap: Vec<PeerAddr>,
    ledger: Ledger,
    /// What readers see: of the ledger as it is on disk.
    state: Arc<State>,
    vector: Arc<Vector>,
    beacons: Beacons,
    links: BTreeMap<MachineId, LinkId>,
    doubts: Doubts,
    /// By whom this machine was put out, in a sentence.
    put_out: Option<String>,
    /// Whether another machine has said that it knows.
    let_go: bool,
    /// Machines that we should be linked with.
    wanted: BTreeSet<MachineId>,
    /// Something has changed that decides whom to dial.
    look_around: bool,
    dialer: Dialer,
    recent: Recent,
    rng: Rng,
    beacon_due: Duration,
    compare_due: Duration,
    inputs: VecDeque<Input>,
    writing: Option<Writing>,
    writes: u64,
    actions: VecDeque<Action>,
}

enum Input {
    Insert { ticket: Option<Ticket>, from: Option<MachineId>, entries: Vec<EncodedEntry> },
    Redeem { ticket: Ticket, entries: Vec<EncodedEntry> },
    Message { link: LinkId, from: MachineId, message: PeerMessage },
    Linked { machine: MachineId, link: LinkId, vector: Vector },
    Unlinked { link: LinkId },
    DialEnded { machine: MachineId },
    Hurry { machine: MachineId },
    Own(Own),
    Remembered { restored: bool },
    Timeout,
}

/// Entries that are in memory and on their way to the disk.
struct Writing {
    write: WriteId,
    entries: Vec<EntryId>,
    fresh: Vec<EncodedEntry>,
    from: Option<MachineId>,
    then: Then,
}

/// What happens when entries are on disk.
enum Then {
    Insert { ticket: Option<Ticket>, outcome: Result<(), Rejected>, more: bool },
    Redeem { ticket: Ticket, entries: Vec<Entry> },
}

/// Entries that have entered the ledger in memory.
#[derive(Default)]
struct Taking {
    stored: Vec<Entry>,
    fresh: Vec<EncodedEntry>,
}

impl Taking {
    fn add(&mut self, entry: Entry, inserted: Inserted) {
        match inserted {
            Inserted::Known => {}
            Inserted::Waiting => self.stored.push(entry),
            Inserted::New => {
                self.fresh.push(entry.encode());
                self.stored.push(entry);
            }
        }
    }
}

impl Replica {
    /// Begins with the ledger as it is on disk.
    pub fn new(config: Config, ledger: Ledger, now: Now) -> Self {
        let machine = MachineId::from_bytes(config.key.verifying_key().to_bytes());
        let (state, vector) = (Arc::new(ledger.state().clone()), Arc::new(ledger.vector()));
        let started = |wait| Doubt::Started { until: now.at + wait, heard: None };
        let doubt = if state.machines.contains_key(&machine) { config.doubt.map(started) } else { Some(Doubt::Lost) };
        let put_out = others::out_of_the_clan(&ledger, &machine);
        let mut replica = Self {
            put_out,
            let_go: false,
            key: config.key,
            machine,
            version: config.version,
            own: config.own,
            bootstrap: config.bootstrap,
            ledger,
            state,
            vector,
            beacons: Beacons::default(),
            links: BTreeMap::new(),
            doubts: Doubts::new(doubt),
            wanted: BTreeSet::new(),
            look_around: true,
            dialer: Dialer::default(),
            recent: Recent::default(),
            rng: Rng::new(config.seed),
            beacon_due: now.at,
            compare_due: now.at + COMPARE_INTERVAL,
            inputs: VecDeque::new(),
            writing: None,
            writes: 0,
            actions: VecDeque::new(),
        };
        replica.choose_neighbours();
        replica
    }

    /// Takes entries from another machine, or from this one (`from` is `None`). Good ones are taken whatever the others
    /// are like. Answered by [`Answer::Inserted`].
    pub fn handle_entries(
        &mut self,
        ticket: Option<Ticket>,
        from: Option<MachineId>,
        entries: Vec<EncodedEntry>,
        now: Now,
    ) {
        self.handle(Input::Insert { ticket, from, entries }, now);
    }

    /// A newcomer asks to be admitted. Answered by [`Answer::Redeemed`].
    pub fn handle_redemption(&mut self, ticket: Ticket, entries: Vec<EncodedEntry>, now: Now) {
        self.handle(Input::Redeem { ticket, entries }, now);
    }

    /// A message arrived.
    pub fn handle_message(&mut self, link: LinkId, from: MachineId, message: PeerMessage, now: Now) {
        self.handle(Input::Message { link, from, message }, now);
    }

    /// A connection to a machine is up, and both have greeted; `vector` is from its greeting.
    /// [`Action::Close`] says if it may not stay.
    pub fn handle_linked(&mut self, machine: MachineId, link: LinkId, vector: Vector, now: Now) {
        self.handle(Input::Linked { machine, link, vector }, now);
    }

    /// A connection has ended.
    pub fn handle_unlinked(&mut self, link: LinkId, now: Now) {
        self.handle(Input::Unlinked { link }, now);
    }

    /// What [`Action::Dial`] began has ended.
    pub fn handle_dial_ended(&mut self, machine: MachineId, now: Now) {
        self.handle(Input::DialEnded { machine }, now);
    }

    /// A machine that is not linked shall be dialled now, whoever's turn it is: this end knows, and the other does not, that
    /// their connection is gone.
    pub fn handle_hurry(&mut self, machine: MachineId, now: Now) {
        self.handle(Input::Hurry { machine }, now);
    }

    /// Changes what the machine says of itself; a change is announced at once.
    pub fn handle_own(&mut self, own: Own, now: Now) {
        self.handle(Input::Own(own), now);
    }

    /// Whoever remembers outside of this machine's disk what its ledger was has handed all of that over, by
    /// [`Replica::handle_entries`]. `restored`: the disk was put back to an earlier state. Ask then
    /// [`Replica::is_in_doubt`].
    pub fn handle_remembered(&mut self, restored: bool, now: Now) {
        self.handle(Input::Remembered { restored }, now);
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Now) {
        self.handle(Input::Timeout, now);
    }

    /// The entries of a [`Action::Persist`] are on disk.
    pub fn handle_persisted(&mut self, write: WriteId, now: Now) {
        if let Some(writing) = self.writing.take_if(|w| w.write == write) {
            self.persisted(writing);
            self.advance(now);
        }
    }

    /// They are not, and will not be.
    pub fn handle_not_persisted(&mut self, write: WriteId, now: Now) {
        if let Some(writing) = self.writing.take_if(|w| w.write == write) {
            self.forget(&writing.entries);
            let answer = match writing.then {
                Then::Insert { ticket, .. } => ticket.map(|t| (t, Answer::Inserted(Err(Rejected::NotPersisted)))),
                Then::Redeem { ticket, .. } => Some((ticket, Answer::Redeemed(Err(JoinRefusal::NotReady)))),
            };
            if let Some((ticket, answer)) = answer {
                self.actions.push_back(Action::Answer { ticket, answer });
            }
            self.advance(now);
        }
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Replica::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Duration {
        let due = [Some(self.beacon_due), Some(self.compare_due), self.dialer.next(), self.doubts.due()];
        due.into_iter().flatten().min().unwrap_or(self.beacon_due)
    }

    /// The clan.
    pub fn clan(&self) -> ClanId {
        self.ledger.clan()
    }

    /// This machine.
    pub fn machine(&self) -> MachineId {
        self.machine
    }

    /// What the ledger amounts to.
    pub fn state(&self) -> &Arc<State> {
        &self.state
    }

    /// The ledger, to be looked at. While a write is outstanding it has what is not on disk.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Whether this machine is still finding out what its clan's ledger is.
    pub fn is_learning(&self) -> bool {
        self.doubts.is_learning()
    }

    /// Whether this machine may have signed what it does not know of, so that it signs nothing.
    pub fn is_in_doubt(&self) -> bool {
        self.doubts.now.is_some()
    }

    /// Whether this machine is out of the clan, and another one has said that it knows.
    pub fn is_let_go(&self) -> bool {
        self.put_out.is_some() && self.let_go
    }

    /// What the ledger has, for greeting other machines.
    pub fn vector(&self) -> &Arc<Vector> {
        &self.vector
    }

    /// The latest beacon of each machine, this one's and expired ones included.
    pub fn beacons(&self) -> &Arc<BTreeMap<MachineId, Beacon>> {
        self.beacons.opened()
    }

    /// Live connections.
    pub fn links(&self) -> &BTreeMap<MachineId, LinkId> {
        &self.links
    }

    /// What the machine says of itself.
    pub fn own(&self) -> &Own {
        &self.own
    }

    /// What needs attention, one sentence each.
    pub fn problems(&self) -> Vec<String> {
        let own = [self.doubts.problem(), self.put_out.clone(), self.beacons.clock_problem()];
        own.into_iter().flatten().collect()
    }

    /// How many entries the ledger has. Like [`Replica::entries`] not to be asked while a write is outstanding.
    pub fn len(&self) -> usize {
        self.ledger.len()
    }

    /// Whether the ledger has no entry.
    pub fn is_empty(&self) -> bool {
        self.ledger.is_empty()
    }

    /// All entries; none while a write is outstanding, because some of them are not on disk yet.
    pub fn entries(&self) -> Vec<EncodedEntry> {
        if self.writing.is_some() {
            return Vec::new();
        }
        self.ledger.entries().map(Entry::encode).collect()
    }

    /// The first message of a conversation with another machine.
    pub fn hello(&self) -> PeerMessage {
        PeerMessage::Hello { clan: self.clan(), vector: self.vector.to_vec() }
    }

    /// Whether a machine that connects is listened to.
    pub fn welcomes(&self, machine: &MachineId) -> bool {
        // One that is unknown may have been admitted elsewhere a moment ago: it asks again.
        self.is_learning() || self.state.machine_in_good_standing(machine).is_some()
    }

    /// The entries that are lacking there, a page of them: see [`Ledger::page`]. `None` while a write is outstanding.
    pub fn page(&self, vector: &Vector, from: Option<Place>) -> Option<(EntryPage, Option<Place>)> {
        if self.writing.is_some() {
            return None;
        }
        let page = self.ledger.page(vector, from, PAGE_BYTES);
        let entries = page.entries.into_iter().map(Entry::encode).collect();
        Some((EntryPage { entries, more: page.next.is_some() }, page.next))
    }

    fn handle(&mut self, input: Input, now: Now) {
        self.inputs.push_back(input);
        self.advance(now);
    }

    fn advance(&mut self, now: Now) {
        // INVARIANT: nothing happens while entries are in memory and not on disk.
        while self.writing.is_none() {
            let Some(input) = self.inputs.pop_front() else { break };
            self.take(input, now);
        }
        if self.writing.is_none() && std::mem::take(&mut self.look_around) {
            self.dial(now);
        }
    }

    fn take(&mut self, input: Input, now: Now) {
        match input {
            Input::Insert { ticket, from, entries } => self.insert(ticket, from, &entries, false),
            Input::Redeem { ticket, entries } => {
                if let Err(refused) = self.redeem(ticket, &entries, now) {
                    self.actions.push_back(Action::Answer { ticket, answer: Answer::Redeemed(refused) });
                }
            }
            Input::Message { link, from, message } => {
                // What a closed connection had still on its way counts no more.
                if self.links.get(&from) == Some(&link) {
                    self.message(from, message, now);
                }
            }
            Input::Linked { machine, link, vector } => self.link(machine, link, &vector),
            Input::Remembered { restored } => self.remembered(restored, now),
            Input::Unlinked { link } => {
                let before = self.links.len();
                self.links.retain(|_, known| *known != link);
                if self.links.len() < before {
                    self.look_around = true;
                    self.actions.push_back(Action::Changed);
                }
            }
            Input::DialEnded { machine } => {
                self.dialer.ended(&machine);
                self.look_around = true;
            }
            Input::Hurry { machine } => {
                self.dialer.hurry(machine, now.at);
                self.look_around = true;
            }
            Input::Own(own) => {
                if own != self.own {
                    self.own = own;
                    self.announce(now);
                }
            }
            Input::Timeout => self.timeout(now),
        }
    }

    fn message(&mut self, from: MachineId, message: PeerMessage, now: Now) {
        match message {
            PeerMessage::Entries(entries) => {
                self.notice_farewell(&entries);
                self.insert(None, Some(from), &entries, false);
            }
            PeerMessage::EntriesAndMore(entries) => self.insert(None, Some(from), &entries, true),
            PeerMessage::Vector(vector) => {
                self.compare(&from, &vector);
                self.send_missing(&from, &vector);
            }
            PeerMessage::Digest(theirs) => {
                let ours = self.vector.clone();
                if theirs == digest(&ours) {
                    self.compare(&from, &ours);
                } else {
                    self.reply(&from, PeerMessage::Differs);
                }
            }
            PeerMessage::Differs => self.reply(&from, PeerMessage::Vector(self.vector.to_vec())),
            PeerMessage::Beacon(beacon) => self.take_beacon(&from, beacon, now),
            // A second greeting means nothing.
            PeerMessage::Hello { .. } => {}
        }
    }

    fn timeout(&mut self, now: Now) {
        self.look_around = true;
        self.outlast_doubt(now);
        if now.at >= self.beacon_due {
            self.beacon_due = now.at + beacon::INTERVAL;
            self.announce(now);
        }
        if now.at >= self.compare_due {
            self.compare_due = now.at + COMPARE_INTERVAL;
            let digest = digest(&self.vector);
            for link in self.some_links(COMPARE_WITH, |_| true) {
                let message = PeerMessage::Digest(digest);
                self.actions.push_back(Action::Send { link, message });
            }
        }
    }

    /// `more`: the sender has more for us.
    fn insert(&mut self, ticket: Option<Ticket>, from: Option<MachineId>, encoded: &[EncodedEntry], more: bool) {
        let mut taking = Taking::default();
        let mut outcome = Ok(());
        for bytes in encoded.iter().take(MAX_ENTRIES) {
            // One bad entry does not cost the good ones around it.
            let taken = self.recent.decode(bytes).map_err(Rejected::from).and_then(|entry| {
                let inserted = self.ledger.insert(entry.clone())?;
                Ok((entry, inserted))
            });
            match taken {
                Ok((entry, inserted)) => taking.add(entry, inserted),
                Err(error) => outcome = Err(error),
            }
        }
        if let (Some(from), Err(why)) = (from, outcome) {
            self.actions.push_back(Action::Refused { from, why });
        }
        self.persist(taking, from, Then::Insert { ticket, outcome, more });
    }

    fn persist(&mut self, taking: Taking, from: Option<MachineId>, then: Then) {
        self.writes += 1;
        let write = WriteId(self.writes);
        let entries = taking.stored.iter().map(Entry::id).collect();
        let writing = Writing { write, entries, fresh: taking.fresh, from, then };
        if taking.stored.is_empty() {
            return self.persisted(writing);
        }
        // INVARIANT: an entry is on disk before anybody is told that it is known.
        self.writing = Some(writing);
        self.actions.push_back(Action::Persist { write, entries: taking.stored });
    }

    fn persisted(&mut self, writing: Writing) {
        if !writing.entries.is_empty() {
            self.refresh();
            self.weigh_what_was_heard();
        }
        for batch in writing.fresh.chunks(BATCH) {
            self.pass_on(writing.from, batch);
        }
        // Only who has taken something asks on: two machines that cannot agree do not talk for ever.
        if let Then::Insert { more: true, .. } = writing.then
            && !writing.entries.is_empty()
            && let Some(link) = writing.from.and_then(|from| self.links.get(&from))
        {
            self.actions.push_back(Action::Send { link: *link, message: PeerMessage::Vector(self.vector.to_vec()) });
        }
        let (ticket, answer) = match writing.then {
            Then::Insert { ticket: None, .. } => return,
            Then::Insert { ticket: Some(ticket), outcome, .. } => (ticket, Answer::Inserted(outcome)),
            Then::Redeem { ticket, entries } => {
                let refusal = || newcomer::awaits(&entries, &self.state).unwrap_or(JoinRefusal::Malformed);
                let in_clan = newcomer::belongs(&entries, &self.state);
                (ticket, Answer::Redeemed(if in_clan { Ok(()) } else { Err(refusal()) }))
            }
        };
        self.actions.push_back(Action::Answer { ticket, answer });
    }

    /// Takes entries out of memory that did not get to the disk: the sender will offer them again.
    fn forget(&mut self, gone: &[EntryId]) {
        let gone: HashSet<_> = gone.iter().collect();
        let mut ledger = Ledger::open(self.ledger.clan());
        ledger.insert_all(self.ledger.entries().filter(|entry| !gone.contains(&entry.id())).cloned());
        self.ledger = ledger;
    }

    /// After a change of the ledger.
    fn refresh(&mut self) {
        self.state = Arc::new(self.ledger.state().clone());
        self.vector = Arc::new(self.ledger.vector());
        self.put_out = others::out_of_the_clan(&self.ledger, &self.machine);
        self.choose_neighbours();
        // INVARIANT: only machines in good standing are ever in `links`, unless this one is learning; packets and
        // entries come from there alone.
        let (state, learning) = (self.state.clone(), self.is_learning());
        let stays = |machine: &MachineId| learning || state.machine_in_good_standing(machine).is_some();
        let strangers: Vec<_> = self.links.keys().filter(|machine| !stays(machine)).copied().collect();
        for machine in strangers {
            if let Some(link) = self.links.remove(&machine) {
                self.bid_farewell(link, &machine, None);
                self.actions.push_back(Action::Close { link, why: Close::NotInGoodStanding });
            }
        }
        let this = self.machine;
        self.beacons.retain(|machine| *machine == this || stays(machine));
        self.actions.push_back(Action::Changed);
    }
}
