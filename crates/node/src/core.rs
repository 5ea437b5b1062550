//! The one owner of what this machine knows: it drives the [`Replica`], which decides, with real connections and the
//! ledger's file.
//!
//! Everybody else holds a [`CoreHandle`]: questions and changes go in as commands, and each change publishes a new
//! [`View`], which is all that readers ever see.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clan_ledger::{Ledger, Place, State};
use clan_os::channel::{MessageError, send_message};
pub(crate) use clan_replica::Own;
use clan_replica::{Action, Answer, Close, Config, LinkId, Now, Rejected, Replica, Ticket, WriteId};
use clan_store::{LedgerStore, StoreError};
use clan_types::{ClanId, ClanName, MachineId, PeerAddr, Timestamp};
use clan_wire::{
    beacon::{self, Beacon},
    peer::{DeviceProof, EncodedEntry, EntryPage, InviteProof, JoinRefusal, MAX_PAGE, PeerMessage, Vector},
};
use ed25519_dalek::SigningKey;
use iroh::endpoint::Connection;
use tokio::{
    io::AsyncWrite,
    sync::{mpsc, oneshot, watch},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

/// Commands that may wait for the core; more make their senders wait.
const QUEUE: usize = 256;
/// Machines that wait to be dialled; the replica asks again for those that find no place.
const DIALS: usize = 256;
/// How long a reader of the ledger may take for a page.
const PAGE_LIMIT: Duration = Duration::from_secs(20);
/// What problems with the ledger's file are about.
const DISK: &str = "disk";

/// What this machine knows, at one moment.
#[derive(Clone)]
pub(crate) struct View {
    pub clan: ClanId,
    pub clan_name: ClanName,
    /// The machine is still finding out what its clan's ledger is.
    pub learning: bool,
    /// The machine is out of the clan, and another one has said that it knows.
    pub let_go: bool,
    pub machine: MachineId,
    pub state: Arc<State>,
    pub entries: u64,
    /// What the ledger has, for greeting other machines.
    pub vector: Arc<Vector>,
    /// The latest beacon of each machine, expired ones included: their addresses are still the best guess.
    pub beacons: Arc<BTreeMap<MachineId, Beacon>>,
    /// Live connections to other machines.
    pub links: Arc<BTreeMap<MachineId, Connection>>,
    pub problems: Vec<String>,
}

/// Why an entry or a command is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CoreError {
    #[error(transparent)]
    Rejected(#[from] Rejected),
    #[error("the ledger cannot be written")]
    Store(#[from] StoreError),
    #[error("the controller is stopping")]
    Stopping,
}

enum Command {
    Insert {
        entries: Vec<EncodedEntry>,
        reply: oneshot::Sender<Result<(), CoreError>>,
    },
    Message {
        link: LinkId,
        from: MachineId,
        message: PeerMessage,
    },
    Linked {
        machine: MachineId,
        connection: Connection,
        out: mpsc::Sender<PeerMessage>,
        vector: Vector,
        reply: oneshot::Sender<Option<LinkId>>,
    },
    Unlinked {
        link: LinkId,
    },
    DialEnded {
        machine: MachineId,
    },
    Preview {
        proof: InviteProof,
        endpoint: MachineId,
        reply: oneshot::Sender<Result<(), JoinRefusal>>,
    },
    Locate {
        proof: DeviceProof,
        endpoint: MachineId,
        reply: oneshot::Sender<Result<(), JoinRefusal>>,
    },
    Redeem {
        entries: Vec<EncodedEntry>,
        reply: oneshot::Sender<Result<(), JoinRefusal>>,
    },
    Page {
        have: Arc<Vector>,
        from: Option<Place>,
        reply: oneshot::Sender<Option<(EntryPage, Option<Place>)>>,
    },
    Remembered {
        restored: bool,
        reply: oneshot::Sender<bool>,
    },
    ChangeOwn(Box<dyn FnOnce(&mut Own) + Send>),
    Problem {
        about: &'static str,
        what: Option<String>,
    },
    Hurry(MachineId),
}

/// A way to ask the core.
#[derive(Clone)]
pub(crate) struct CoreHandle {
    commands: mpsc::Sender<Command>,
    view: watch::Receiver<Arc<View>>,
}

impl CoreHandle {
    pub(crate) fn view(&self) -> Arc<View> {
        self.view.borrow().clone()
    }

    /// Wakes at every change.
    pub(crate) fn watch(&self) -> watch::Receiver<Arc<View>> {
        self.view.clone()
    }

    /// Adds entries that this machine's person signed, durably, and passes the new ones on.
    pub(crate) async fn insert(&self, entries: Vec<EncodedEntry>) -> Result<(), CoreError> {
        self.ask(|reply| Command::Insert { entries, reply }).await.unwrap_or(Err(CoreError::Stopping))
    }

    /// Passes a message of another machine on.
    pub(crate) async fn message(&self, link: LinkId, from: MachineId, message: PeerMessage) {
        let _ = self.commands.send(Command::Message { link, from, message }).await;
    }

    /// Registers a connection; `None` if the machine may not be here.
    pub(crate) async fn linked(
        &self,
        machine: MachineId,
        connection: Connection,
        out: mpsc::Sender<PeerMessage>,
        vector: Vector,
    ) -> Option<LinkId> {
        self.ask(|reply| Command::Linked { machine, connection, out, vector, reply }).await?
    }

    pub(crate) async fn unlinked(&self, link: LinkId) {
        let _ = self.commands.send(Command::Unlinked { link }).await;
    }

    /// An attempt to dial, or the connection that it led to, has ended.
    pub(crate) async fn dial_ended(&self, machine: MachineId) {
        let _ = self.commands.send(Command::DialEnded { machine }).await;
    }

    pub(crate) async fn preview(&self, proof: InviteProof, endpoint: MachineId) -> Result<(), JoinRefusal> {
        self.ask(|reply| Command::Preview { proof, endpoint, reply }).await.unwrap_or(Err(JoinRefusal::NotReady))
    }

    pub(crate) async fn locate(&self, proof: DeviceProof, endpoint: MachineId) -> Result<(), JoinRefusal> {
        self.ask(|reply| Command::Locate { proof, endpoint, reply }).await.unwrap_or(Err(JoinRefusal::NotReady))
    }

    pub(crate) async fn redeem(&self, entries: Vec<EncodedEntry>) -> Result<(), JoinRefusal> {
        self.ask(|reply| Command::Redeem { entries, reply }).await.unwrap_or(Err(JoinRefusal::NotReady))
    }

    /// Sends what is lacking there of the ledger, in pages: each is taken from the ledger when the one before it is out, so
    /// that no slow reader has a copy of all of it made. A reader who does not go on for [`PAGE_LIMIT`] is left.
    pub(crate) async fn send_ledger<W>(&self, stream: &mut W, have: Vector) -> Result<(), MessageError>
    where
        W: AsyncWrite + Unpin + ?Sized,
    {
        let (have, mut from) = (Arc::new(have), None);
        loop {
            let page = self.ask(|reply| Command::Page { have: have.clone(), from, reply }).await.flatten();
            let Some((page, next)) = page else { return Err(MessageError::Ended) };
            let sent = timeout(PAGE_LIMIT, send_message(stream, &page, MAX_PAGE)).await;
            sent.map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))??;
            if next.is_none() {
                return Ok(());
            }
            from = next;
        }
    }

    /// All entries.
    #[cfg(test)]
    pub(crate) async fn entries(&self) -> Vec<EncodedEntry> {
        let (have, mut from, mut entries) = (Arc::new(Vector::new()), None, Vec::new());
        loop {
            let page = self.ask(|reply| Command::Page { have: have.clone(), from, reply }).await.flatten();
            let Some((page, next)) = page else { return entries };
            entries.extend(page.entries);
            if next.is_none() {
                return entries;
            }
            from = next;
        }
    }

    /// What is remembered outside of this machine's disk was handed over. Whether the machine is sure now of what it has
    /// signed.
    pub(crate) async fn remembered(&self, restored: bool) -> bool {
        self.ask(|reply| Command::Remembered { restored, reply }).await.unwrap_or(false)
    }

    /// Changes what the machine says of itself; a change is announced at once.
    pub(crate) async fn change_own(&self, change: impl FnOnce(&mut Own) + Send + 'static) {
        let _ = self.commands.send(Command::ChangeOwn(Box::new(change))).await;
    }

    /// Has a machine that is not linked dialled at once, whoever's turn it is.
    pub(crate) async fn hurry(&self, machine: MachineId) {
        let _ = self.commands.send(Command::Hurry(machine)).await;
    }

    /// Says what needs attention about something, or that nothing does.
    pub(crate) async fn problem(&self, about: &'static str, what: Option<String>) {
        let _ = self.commands.send(Command::Problem { about, what }).await;
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.ok()?;
        answer.await.ok()
    }
}

struct Link {
    machine: MachineId,
    connection: Connection,
    out: mpsc::Sender<PeerMessage>,
}

/// Who waits for an answer of the replica.
enum Asked {
    Insert(oneshot::Sender<Result<(), CoreError>>),
    Redeem(oneshot::Sender<Result<(), JoinRefusal>>),
}

/// The owner itself; see the module's documentation.
pub(crate) struct Core {
    replica: Replica,
    /// As it was known when the machine joined.
    clan_name: ClanName,
    store: LedgerStore,
    /// What the disk said to the last write that failed.
    refused: Option<StoreError>,
    /// What needs attention, by what it is about; of the disk, until a write succeeds.
    problems: BTreeMap<&'static str, String>,
    started: Instant,
    links: BTreeMap<LinkId, Link>,
    asked: BTreeMap<Ticket, Asked>,
    /// For numbering links and questions.
    count: u64,
    dials: mpsc::Sender<PeerAddr>,
    publish: watch::Sender<Arc<View>>,
    commands: mpsc::Receiver<Command>,
}

impl Core {
    /// A ledger that lacks its founding entry, as after the disk lost it, is learnt from other machines; until then the clan
    /// is called `clan_name`. `doubt`: see [`Config`]. Third comes whom [`crate::peer::dial`] is to dial.
    pub(crate) fn new(
        key: SigningKey,
        ledger: Ledger,
        store: LedgerStore,
        own: Own,
        bootstrap: Vec<PeerAddr>,
        clan_name: ClanName,
        doubt: Option<Duration>,
    ) -> (Self, CoreHandle, mpsc::Receiver<PeerAddr>) {
        let mut seed = [0; 32];
        if let Err(error) = getrandom::fill(&mut seed) {
            // Spreads load, and no more.
            tracing::warn!(%error, "no randomness for choosing among machines");
        }
        let config = Config { key, version: env!("CARGO_PKG_VERSION").to_owned(), own, bootstrap, seed, doubt };
        let replica = Replica::new(config, ledger, Now { at: Duration::ZERO, wall: now() });
        let (sender, commands) = mpsc::channel(QUEUE);
        let (dials, to_dial) = mpsc::channel(DIALS);
        let (publish, view) = watch::channel(Arc::new(view(&replica, &clan_name, BTreeMap::new(), &BTreeMap::new())));
        let core = Self {
            replica,
            clan_name,
            store,
            refused: None,
            problems: BTreeMap::new(),
            started: Instant::now(),
            links: BTreeMap::new(),
            asked: BTreeMap::new(),
            count: 0,
            dials,
            publish,
            commands,
        };
        (core, CoreHandle { commands: sender, view }, to_dial)
    }

    /// The event loop.
    pub(crate) async fn run(mut self, cancel: CancellationToken) {
        loop {
            let due = self.started + self.replica.poll_timeout();
            tokio::select! {
                biased;
                () = cancel.cancelled() => break,
                // Before commands: a machine that others keep busy says where it is all the same.
                () = tokio::time::sleep_until(due) => self.replica.handle_timeout(self.now()),
                command = self.commands.recv() => match command {
                    Some(command) => self.handle(command),
                    None => break,
                },
            }
            self.carry_out();
        }
        for link in self.links.values() {
            link.connection.close(0u32.into(), b"stopping");
        }
    }

    fn now(&self) -> Now {
        Now { at: self.started.elapsed(), wall: now() }
    }

    fn handle(&mut self, command: Command) {
        let now = self.now();
        match command {
            Command::Insert { entries, reply } => {
                let ticket = Ticket(self.number());
                self.asked.insert(ticket, Asked::Insert(reply));
                self.replica.handle_entries(Some(ticket), None, entries, now);
            }
            Command::Message { link, from, message } => self.replica.handle_message(link, from, message, now),
            Command::Linked { machine, connection, out, vector, reply } => {
                let link = LinkId(self.number());
                self.links.insert(link, Link { machine, connection, out });
                self.replica.handle_linked(machine, link, vector, now);
                self.carry_out();
                let stays = self.links.contains_key(&link);
                if stays {
                    tracing::info!(%machine, "connected");
                }
                let _ = reply.send(stays.then_some(link));
            }
            Command::Unlinked { link } => {
                self.links.remove(&link);
                self.replica.handle_unlinked(link, now);
            }
            Command::DialEnded { machine } => self.replica.handle_dial_ended(machine, now),
            Command::Preview { proof, endpoint, reply } => {
                let _ = reply.send(self.replica.preview(&proof, &endpoint, now));
            }
            Command::Locate { proof, endpoint, reply } => {
                let _ = reply.send(self.replica.locate(&proof, &endpoint, now));
            }
            Command::Redeem { entries, reply } => {
                let ticket = Ticket(self.number());
                self.asked.insert(ticket, Asked::Redeem(reply));
                self.replica.handle_redemption(ticket, entries, now);
            }
            Command::Page { have, from, reply } => {
                let _ = reply.send(self.replica.page(&have, from));
            }
            Command::Remembered { restored, reply } => {
                self.replica.handle_remembered(restored, now);
                let _ = reply.send(!self.replica.is_in_doubt());
            }
            Command::ChangeOwn(change) => {
                let mut own = self.replica.own().clone();
                change(&mut own);
                self.replica.handle_own(own, now);
            }
            Command::Hurry(machine) => self.replica.handle_hurry(machine, now),
            Command::Problem { about, what } => {
                let before = match what.clone() {
                    Some(what) => self.problems.insert(about, what),
                    None => self.problems.remove(about),
                };
                if before != what {
                    self.publish();
                }
            }
        }
    }

    /// Does what the replica wants done. Writing is done at once, so that none is outstanding afterwards.
    fn carry_out(&mut self) {
        let (mut changed, mut answers) = (false, Vec::new());
        while let Some(action) = self.replica.poll_action() {
            match action {
                Action::Persist { write, entries } => changed |= self.persist(write, &entries),
                Action::Send { link, message } => {
                    if let Some(link) = self.links.get(&link) {
                        // A full queue means a slow peer; comparing vectors brings it up to date later.
                        let _ = link.out.try_send(message);
                    }
                }
                Action::Close { link, why } => self.close(link, why),
                Action::Dial(peer) => {
                    if let Err(error) = self.dials.try_send(peer) {
                        self.replica.handle_dial_ended(error.into_inner().machine, self.now());
                    }
                }
                Action::Answer { ticket, answer } => answers.push((ticket, answer)),
                Action::Changed => changed = true,
                Action::Refused { from, why } => {
                    tracing::info!(%from, error = %why, "a machine sent entries that do not count");
                }
            }
        }
        if changed {
            self.publish();
        }
        // INVARIANT: whoever hears that something is done sees it in the view.
        for (ticket, answer) in answers {
            self.answer(ticket, answer);
        }
    }

    /// Says whether there is anything new to tell about the disk.
    fn persist(&mut self, write: WriteId, entries: &[clan_ledger::Entry]) -> bool {
        let before = self.problems.contains_key(DISK);
        match self.store.append_all(entries) {
            Ok(()) => {
                self.problems.remove(DISK);
                self.replica.handle_persisted(write, self.now());
            }
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "the ledger cannot be written");
                self.problems.insert(DISK, format!("nothing can be recorded: {error}"));
                self.refused = Some(error);
                self.replica.handle_not_persisted(write, self.now());
            }
        }
        before != self.problems.contains_key(DISK)
    }

    fn close(&mut self, link: LinkId, why: Close) {
        let Some(link) = self.links.remove(&link) else { return };
        if why == Close::NotInGoodStanding {
            tracing::info!(machine = %link.machine, "not in the clan any more: the connection is closed");
            // With the queue ends the conversation, after what is in it: see `peer`. Packets over it are no longer taken,
            // as it is no link any more.
            return;
        }
        let (code, reason) = why.reason();
        link.connection.close(code.into(), reason.as_bytes());
    }

    fn answer(&mut self, ticket: Ticket, answer: Answer) {
        match (self.asked.remove(&ticket), answer) {
            (Some(Asked::Insert(reply)), Answer::Inserted(outcome)) => {
                let outcome = outcome.map_err(|why| match self.refused.take_if(|_| why == Rejected::NotPersisted) {
                    Some(error) => error.into(),
                    None => why.into(),
                });
                let _ = reply.send(outcome);
            }
            (Some(Asked::Redeem(reply)), Answer::Redeemed(outcome)) => {
                let _ = reply.send(outcome);
            }
            _ => {}
        }
    }

    fn number(&mut self) -> u64 {
        self.count += 1;
        self.count
    }

    fn publish(&self) {
        let connection = |link: &LinkId| self.links.get(link).map(|known| known.connection.clone());
        let links = self.replica.links().iter().filter_map(|(machine, link)| Some((*machine, connection(link)?)));
        let view = view(&self.replica, &self.clan_name, links.collect(), &self.problems);
        self.publish.send_replace(Arc::new(view));
    }
}

fn view(
    replica: &Replica,
    clan_name: &ClanName,
    links: BTreeMap<MachineId, Connection>,
    problems: &BTreeMap<&'static str, String>,
) -> View {
    View {
        clan: replica.clan(),
        clan_name: replica.state().clan_name.as_ref().unwrap_or(clan_name).clone(),
        learning: replica.is_learning(),
        let_go: replica.is_let_go(),
        machine: replica.machine(),
        state: replica.state().clone(),
        entries: replica.len() as u64,
        vector: replica.vector().clone(),
        beacons: replica.beacons().clone(),
        links: Arc::new(links),
        problems: replica.problems().into_iter().chain(problems.values().cloned()).collect(),
    }
}

impl View {
    /// Where a machine may be reached over QUIC, as far as its beacon says.
    pub(crate) fn addresses_of(&self, machine: &MachineId) -> PeerAddr {
        let addrs = self.beacons.get(machine).map(|b| b.quic.clone()).unwrap_or_default();
        PeerAddr { machine: *machine, addrs }
    }

    /// Whether a machine's latest beacon is still believed.
    pub(crate) fn is_fresh(beacon: &Beacon, at: Timestamp) -> bool {
        at.since(beacon.made) < beacon::LIFETIME
    }
}

/// The wall clock; read here and handed to the cores.
pub(crate) fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_millis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
