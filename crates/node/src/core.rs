//! The one owner of what this machine knows: the ledger, the beacons, the links to other machines.
//!
//! Everybody else holds a [`CoreHandle`]: questions and changes go in as commands, and each change publishes a new
//! [`View`], which is all that readers ever see.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clan_ledger::{Body, Entry, Inserted, Ledger, State};
use clan_store::LedgerStore;
use clan_types::{ClanId, ClanName, MachineId, PeerAddr, Timestamp};
use clan_wire::{
    beacon::{self, Beacon, ServiceOffer, SignedBeacon},
    image::Manifest,
    peer::{EncodedEntry, InviteProof, JoinRefusal, MAX_ENTRIES, PeerMessage, Vector},
};
use ed25519_dalek::SigningKey;
use iroh::endpoint::Connection;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::join;

/// Commands that may wait for the core; more make their senders wait.
const QUEUE: usize = 256;
/// Entries sent to a peer in one message.
const BATCH: usize = 500;
/// A beacon made further in the future than this is refused: its machine's clock is wrong, or it lies.
const MAX_AHEAD: Duration = Duration::from_secs(600);

/// What this machine knows, at one moment.
#[derive(Clone)]
pub(crate) struct View {
    pub clan: ClanId,
    pub clan_name: ClanName,
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

/// What the machine says of itself in its beacons.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Own {
    pub quic: Vec<SocketAddr>,
    pub wireguard: Vec<SocketAddr>,
    pub services: Vec<ServiceOffer>,
    pub manifest: Vec<u8>,
}

/// Why an entry or a command is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CoreError {
    #[error("an entry is malformed or not rightly signed")]
    Entry(#[from] clan_ledger::EntryError),
    #[error("an entry does not fit the ledger")]
    Insert(#[from] clan_ledger::InsertError),
    #[error("the ledger cannot be written")]
    Store(#[from] clan_store::StoreError),
    #[error("the controller is stopping")]
    Stopping,
}

enum Command {
    Insert {
        from: Option<MachineId>,
        entries: Vec<EncodedEntry>,
        reply: oneshot::Sender<Result<(), CoreError>>,
    },
    Beacon {
        from: MachineId,
        beacon: SignedBeacon,
    },
    Linked {
        machine: MachineId,
        connection: Connection,
        out: mpsc::Sender<PeerMessage>,
        vector: Vector,
        reply: oneshot::Sender<bool>,
    },
    Unlinked {
        machine: MachineId,
        stable_id: usize,
    },
    Vector {
        from: MachineId,
        vector: Vector,
    },
    Preview {
        proof: InviteProof,
        endpoint: MachineId,
        reply: oneshot::Sender<Result<Vec<EncodedEntry>, JoinRefusal>>,
    },
    Redeem {
        entries: Vec<EncodedEntry>,
        reply: oneshot::Sender<Result<Vec<EncodedEntry>, JoinRefusal>>,
    },
    Entries {
        reply: oneshot::Sender<Vec<EncodedEntry>>,
    },
    ChangeOwn(Box<dyn FnOnce(&mut Own) + Send>),
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

    /// Adds entries, durably, and passes the new ones on. `from` is the machine that sent them, if any.
    pub(crate) async fn insert(&self, from: Option<MachineId>, entries: Vec<EncodedEntry>) -> Result<(), CoreError> {
        self.ask(|reply| Command::Insert { from, entries, reply }).await.unwrap_or(Err(CoreError::Stopping))
    }

    pub(crate) async fn beacon(&self, from: MachineId, beacon: SignedBeacon) {
        let _ = self.commands.send(Command::Beacon { from, beacon }).await;
    }

    /// Registers a connection; `false` if the machine may not be here.
    pub(crate) async fn linked(
        &self,
        machine: MachineId,
        connection: Connection,
        out: mpsc::Sender<PeerMessage>,
        vector: Vector,
    ) -> bool {
        self.ask(|reply| Command::Linked { machine, connection, out, vector, reply }).await.unwrap_or(false)
    }

    pub(crate) async fn unlinked(&self, machine: MachineId, stable_id: usize) {
        let _ = self.commands.send(Command::Unlinked { machine, stable_id }).await;
    }

    pub(crate) async fn vector(&self, from: MachineId, vector: Vector) {
        let _ = self.commands.send(Command::Vector { from, vector }).await;
    }

    pub(crate) async fn preview(
        &self,
        proof: InviteProof,
        endpoint: MachineId,
    ) -> Result<Vec<EncodedEntry>, JoinRefusal> {
        self.ask(|reply| Command::Preview { proof, endpoint, reply }).await.unwrap_or(Err(JoinRefusal::NotReady))
    }

    pub(crate) async fn redeem(&self, entries: Vec<EncodedEntry>) -> Result<Vec<EncodedEntry>, JoinRefusal> {
        self.ask(|reply| Command::Redeem { entries, reply }).await.unwrap_or(Err(JoinRefusal::NotReady))
    }

    pub(crate) async fn entries(&self) -> Vec<EncodedEntry> {
        self.ask(|reply| Command::Entries { reply }).await.unwrap_or_default()
    }

    /// Changes what the machine says of itself; a change is announced at once.
    pub(crate) async fn change_own(&self, change: impl FnOnce(&mut Own) + Send + 'static) {
        let _ = self.commands.send(Command::ChangeOwn(Box::new(change))).await;
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.ok()?;
        answer.await.ok()
    }
}

struct Link {
    connection: Connection,
    out: mpsc::Sender<PeerMessage>,
}

/// The owner itself; see the module's documentation.
pub(crate) struct Core {
    key: SigningKey,
    machine: MachineId,
    clan_name: ClanName,
    ledger: Ledger,
    store: LedgerStore,
    own: Own,
    beacons: BTreeMap<MachineId, (SignedBeacon, Beacon)>,
    links: BTreeMap<MachineId, Link>,
    problems: Vec<String>,
    publish: watch::Sender<Arc<View>>,
    commands: mpsc::Receiver<Command>,
}

impl Core {
    /// `None` if the ledger lacks its founding entry.
    pub(crate) fn new(key: SigningKey, ledger: Ledger, store: LedgerStore, own: Own) -> Option<(Self, CoreHandle)> {
        let clan_name = ledger.state().clan_name.clone()?;
        let machine = MachineId::from_bytes(key.verifying_key().to_bytes());
        let (sender, commands) = mpsc::channel(QUEUE);
        let view = View {
            clan: ledger.clan(),
            clan_name: clan_name.clone(),
            machine,
            state: Arc::new(ledger.state().clone()),
            entries: ledger.len() as u64,
            vector: Arc::new(ledger.vector()),
            beacons: Arc::default(),
            links: Arc::default(),
            problems: Vec::new(),
        };
        let (publish, view) = watch::channel(Arc::new(view));
        let core = Self {
            key,
            machine,
            clan_name,
            ledger,
            store,
            own,
            beacons: BTreeMap::new(),
            links: BTreeMap::new(),
            problems: Vec::new(),
            publish,
            commands,
        };
        Some((core, CoreHandle { commands: sender, view }))
    }

    /// The event loop.
    pub(crate) async fn run(mut self, cancel: CancellationToken) {
        let mut beacon_due = tokio::time::interval(beacon::INTERVAL);
        let mut compare_due = tokio::time::interval(Duration::from_secs(15));
        loop {
            tokio::select! {
                biased;
                () = cancel.cancelled() => break,
                command = self.commands.recv() => match command {
                    Some(command) => self.handle(command),
                    None => break,
                },
                _ = beacon_due.tick() => self.announce(),
                // Pushed entries may have been dropped on a full queue: comparing what each has repairs that.
                _ = compare_due.tick() => self.broadcast(None, &PeerMessage::Vector(self.ledger.vector())),
            }
        }
        for link in self.links.values() {
            link.connection.close(0u32.into(), b"stopping");
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Insert { from, entries, reply } => {
                let outcome = self.insert(from, &entries);
                if let (Err(error), Some(from)) = (&outcome, from) {
                    tracing::info!(%from, %error, "a machine sent entries that do not count");
                }
                let _ = reply.send(outcome);
            }
            Command::Beacon { from, beacon } => self.take_beacon(from, beacon),
            Command::Linked { machine, connection, out, vector, reply } => {
                let _ = reply.send(self.link(machine, connection, out, &vector));
            }
            Command::Unlinked { machine, stable_id } => {
                if self.links.get(&machine).is_some_and(|l| l.connection.stable_id() == stable_id) {
                    self.links.remove(&machine);
                    self.publish();
                }
            }
            Command::Vector { from, vector } => self.send_missing(&from, &vector),
            Command::Preview { proof, endpoint, reply } => {
                let _ = reply.send(self.preview(&proof, &endpoint));
            }
            Command::Redeem { entries, reply } => {
                let _ = reply.send(self.redeem(&entries));
            }
            Command::Entries { reply } => {
                let _ = reply.send(self.encoded());
            }
            Command::ChangeOwn(change) => {
                let before = self.own.clone();
                change(&mut self.own);
                if self.own != before {
                    self.announce();
                }
            }
        }
    }

    fn insert(&mut self, from: Option<MachineId>, encoded: &[EncodedEntry]) -> Result<(), CoreError> {
        let mut fresh = Vec::new();
        let mut outcome = Ok(());
        for bytes in encoded.iter().take(MAX_ENTRIES) {
            // One bad entry does not cost the good ones around it.
            match self.insert_one(bytes) {
                Ok(Some(bytes)) => fresh.push(bytes),
                Ok(None) => {}
                Err(error) => outcome = Err(error),
            }
        }
        if !fresh.is_empty() {
            self.drop_strangers();
            self.publish();
            for batch in fresh.chunks(BATCH) {
                self.broadcast(from, &PeerMessage::Entries(batch.to_vec()));
            }
        }
        outcome
    }

    fn insert_one(&mut self, bytes: &[u8]) -> Result<Option<EncodedEntry>, CoreError> {
        let entry = Entry::decode(bytes)?;
        // INVARIANT: an entry is on disk before anybody is told that it is known.
        match self.ledger.insert(entry.clone())? {
            Inserted::Known => Ok(None),
            inserted @ (Inserted::New | Inserted::Waiting) => {
                if let Err(error) = self.store.append(&entry) {
                    // Memory must not know more than the disk: the sender will offer the entry again.
                    self.ledger = self.store.load()?;
                    return Err(error.into());
                }
                Ok((inserted == Inserted::New).then(|| bytes.to_vec()))
            }
        }
    }

    /// Machines that lost their standing lose their connection.
    fn drop_strangers(&mut self) {
        let state = self.ledger.state();
        self.links.retain(|machine, link| {
            let stays = state.machine_in_good_standing(machine).is_some();
            if !stays {
                tracing::info!(%machine, "no longer in the clan: connection closed");
                link.connection.close(3u32.into(), b"not in good standing");
            }
            stays
        });
    }

    fn take_beacon(&mut self, from: MachineId, signed: SignedBeacon) {
        let Ok(beacon) = signed.open() else {
            tracing::info!(%from, "a machine sent a beacon that does not count");
            return;
        };
        let known = beacon.clan == self.ledger.clan()
            && self.ledger.state().machine_in_good_standing(&beacon.machine).is_some();
        let newer = self.beacons.get(&beacon.machine).is_none_or(|(_, old)| old.made < beacon.made);
        if known && newer && beacon.machine != self.machine && beacon.made <= now().plus(MAX_AHEAD) {
            self.beacons.insert(beacon.machine, (signed.clone(), beacon));
            self.publish();
            self.broadcast(Some(from), &PeerMessage::Beacon(signed));
        }
    }

    fn link(
        &mut self,
        machine: MachineId,
        connection: Connection,
        out: mpsc::Sender<PeerMessage>,
        vector: &Vector,
    ) -> bool {
        // INVARIANT: only machines in good standing are ever in `links`; packets and entries come from there alone.
        if self.ledger.state().machine_in_good_standing(&machine).is_none() {
            return false;
        }
        tracing::info!(%machine, "connected");
        if let Some(old) = self.links.insert(machine, Link { connection, out }) {
            old.connection.close(1u32.into(), b"replaced");
        }
        self.send_missing(&machine, vector);
        for (signed, _) in self.beacons.values() {
            self.send(&machine, PeerMessage::Beacon(signed.clone()));
        }
        self.publish();
        true
    }

    fn send_missing(&self, machine: &MachineId, vector: &Vector) {
        let missing: Vec<EncodedEntry> =
            self.ledger.missing(vector, MAX_ENTRIES).into_iter().map(Entry::encode).collect();
        for batch in missing.chunks(BATCH) {
            self.send(machine, PeerMessage::Entries(batch.to_vec()));
        }
    }

    fn send(&self, machine: &MachineId, message: PeerMessage) {
        if let Some(link) = self.links.get(machine) {
            // A full queue means a slow peer; comparing vectors brings it up to date later.
            let _ = link.out.try_send(message);
        }
    }

    fn broadcast(&self, except: Option<MachineId>, message: &PeerMessage) {
        for machine in self.links.keys().filter(|m| Some(**m) != except) {
            self.send(machine, message.clone());
        }
    }

    fn announce(&mut self) {
        let beacon = Beacon {
            clan: self.ledger.clan(),
            machine: self.machine,
            made: now(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            quic: self.own.quic.clone(),
            wireguard: self.own.wireguard.clone(),
            services: self.own.services.clone(),
            image: (!self.own.manifest.is_empty()).then(|| Manifest::id_of(&self.own.manifest)),
        };
        match SignedBeacon::sign(&beacon, &self.key) {
            Ok(signed) => {
                self.beacons.insert(self.machine, (signed.clone(), beacon));
                self.broadcast(None, &PeerMessage::Beacon(signed));
                self.publish();
            }
            Err(error) => tracing::error!(%error, "cannot make a beacon"),
        }
    }

    fn preview(&mut self, proof: &InviteProof, endpoint: &MachineId) -> Result<Vec<EncodedEntry>, JoinRefusal> {
        if !proof.is_valid(&self.ledger.clan(), endpoint) {
            return Err(JoinRefusal::UnknownInvite);
        }
        join::check_invite(self.ledger.state(), &proof.invite, now())?;
        Ok(self.encoded())
    }

    /// Admits a newcomer: their entries are checked against the ledger as it is, recorded, and countersigned.
    fn redeem(&mut self, encoded: &[EncodedEntry]) -> Result<Vec<EncodedEntry>, JoinRefusal> {
        let entries = join::decode_newcomer(encoded)?;
        if join::belongs(&entries, self.ledger.state()) {
            // The answer to an earlier attempt was lost.
            return Ok(self.encoded());
        }
        let admission = self.ledger.check_redemption(&entries, now()).map_err(join::redeem_refusal)?.id();
        let recorded = self.insert(None, encoded).and_then(|()| {
            let countersign = self.ledger.author(&self.key, Body::Countersign { admission }, now())?;
            self.insert(None, &[countersign.encode()])
        });
        if let Err(error) = recorded {
            tracing::error!(%error, "cannot record an admission");
            return Err(JoinRefusal::NotReady);
        }
        if !join::belongs(&entries, self.ledger.state()) {
            tracing::error!(%admission, "a countersigned admission does not count");
            return Err(JoinRefusal::Malformed);
        }
        Ok(self.encoded())
    }

    fn encoded(&self) -> Vec<EncodedEntry> {
        self.ledger.entries().map(Entry::encode).collect()
    }

    fn publish(&mut self) {
        let view = View {
            clan: self.ledger.clan(),
            clan_name: self.clan_name.clone(),
            machine: self.machine,
            entries: self.ledger.len() as u64,
            vector: Arc::new(self.ledger.vector()),
            state: Arc::new(self.ledger.state().clone()),
            beacons: Arc::new(self.beacons.iter().map(|(id, (_, beacon))| (*id, beacon.clone())).collect()),
            links: Arc::new(self.links.iter().map(|(id, link)| (*id, link.connection.clone())).collect()),
            problems: self.problems.clone(),
        };
        self.publish.send_replace(Arc::new(view));
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
