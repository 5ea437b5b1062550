//! Conversations with the other machines of the clan: who dials whom, and the `clan/peer/1` stream.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use clan_os::channel::{recv_message, send_message};
use clan_types::{MachineId, PeerAddr};
use clan_wire::peer::{ALPN_PEER, MAX_MESSAGE, PeerMessage};
use iroh::{
    Endpoint,
    endpoint::{Connection, RecvStream, SendStream},
};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{core::CoreHandle, net};

/// Messages that may wait for a slow peer; more are dropped, and made up for when vectors are compared.
const QUEUE: usize = 64;
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// The machine with the greater key leaves dialling to the other one for this long, so that two connections do not cross.
const COURTESY: Duration = Duration::from_secs(6);
const RETRY: Duration = Duration::from_secs(2);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// Keeps a connection to every other machine in good standing.
pub(crate) async fn dial(endpoint: Endpoint, core: CoreHandle, bootstrap: Vec<PeerAddr>, cancel: CancellationToken) {
    let mut view = core.watch();
    let mut waiting: BTreeMap<MachineId, Backoff> = BTreeMap::new();
    let mut running: BTreeSet<MachineId> = BTreeSet::new();
    let mut attempts = JoinSet::new();
    loop {
        let now = Instant::now();
        let current = view.borrow_and_update().clone();
        let mut wake = now + RETRY_MAX;
        waiting.retain(|machine, _| current.state.machine_in_good_standing(machine).is_some());
        for (machine, _) in current.state.good_machines() {
            if *machine == current.machine || current.links.contains_key(machine) || running.contains(machine) {
                if current.links.contains_key(machine) {
                    waiting.remove(machine);
                }
                continue;
            }
            let backoff = waiting.entry(*machine).or_insert_with(|| Backoff::new(now, current.machine < *machine));
            if backoff.due > now {
                wake = wake.min(backoff.due);
                continue;
            }
            backoff.failed(now);
            let mut peer = current.addresses_of(machine);
            for known in bootstrap.iter().filter(|p| p.machine == *machine) {
                peer.addrs.extend(known.addrs.iter().copied());
            }
            peer.addrs.sort();
            peer.addrs.dedup();
            running.insert(*machine);
            let (endpoint, core, machine) = (endpoint.clone(), core.clone(), *machine);
            attempts.spawn(async move {
                if let Some(connection) = connect(&endpoint, &peer).await {
                    dialled(connection, core).await;
                }
                machine
            });
        }
        tokio::select! {
            () = cancel.cancelled() => break,
            changed = view.changed() => if changed.is_err() { break },
            Some(done) = attempts.join_next() => {
                if let Ok(machine) = done {
                    running.remove(&machine);
                }
            }
            () = tokio::time::sleep_until(wake) => {}
        }
    }
    attempts.shutdown().await;
}

struct Backoff {
    due: Instant,
    delay: Duration,
}

impl Backoff {
    fn new(now: Instant, ours_to_dial: bool) -> Self {
        Self { due: if ours_to_dial { now } else { now + COURTESY }, delay: RETRY }
    }

    fn failed(&mut self, now: Instant) {
        self.due = now + self.delay;
        self.delay = (self.delay * 2).min(RETRY_MAX);
    }
}

async fn connect(endpoint: &Endpoint, peer: &PeerAddr) -> Option<Connection> {
    let addr = net::endpoint_addr(peer)?;
    match timeout(CONNECT_LIMIT, endpoint.connect(addr, ALPN_PEER)).await {
        Ok(Ok(connection)) => Some(connection),
        Ok(Err(error)) => {
            tracing::debug!(machine = %peer.machine, addrs = ?peer.addrs, %error, "cannot connect");
            None
        }
        Err(_) => {
            tracing::debug!(machine = %peer.machine, addrs = ?peer.addrs, "no answer");
            None
        }
    }
}

async fn dialled(connection: Connection, core: CoreHandle) {
    let Ok(Ok((send, recv))) = timeout(HELLO_LIMIT, connection.open_bi()).await else { return };
    converse(connection, send, recv, core).await;
}

/// Handles a connection that another machine made.
pub(crate) async fn accepted(connection: Connection, core: CoreHandle) {
    if !greets(&connection, &core) {
        return;
    }
    let Ok(Ok((send, recv))) = timeout(HELLO_LIMIT, connection.accept_bi()).await else { return };
    converse(connection, send, recv, core).await;
}

/// Whether the other end is a machine of the clan; if not, the connection is closed before anything is read from it.
fn greets(connection: &Connection, core: &CoreHandle) -> bool {
    let machine = net::machine_of(connection);
    let known = core.view().state.machine_in_good_standing(&machine).is_some();
    if !known {
        // It may have been admitted elsewhere a moment ago: it asks again.
        tracing::debug!(%machine, "not a machine of this clan, as far as is known here");
        connection.close(2u32.into(), b"unknown machine");
    }
    known
}

/// Greets, then passes messages until the connection ends.
async fn converse(connection: Connection, mut send: SendStream, mut recv: RecvStream, core: CoreHandle) {
    let (machine, view) = (net::machine_of(&connection), core.view());
    let hello = PeerMessage::Hello { clan: view.clan, vector: view.vector.to_vec() };
    if send_message(&mut send, &hello, MAX_MESSAGE).await.is_err() {
        return;
    }
    let greeting = timeout(HELLO_LIMIT, recv_message::<PeerMessage, _>(&mut recv, MAX_MESSAGE)).await;
    let Ok(Ok(PeerMessage::Hello { clan, vector })) = greeting else { return };
    if clan != view.clan {
        connection.close(2u32.into(), b"another clan");
        return;
    }
    let (out, queue) = mpsc::channel(QUEUE);
    if !core.linked(machine, connection.clone(), out, vector).await {
        connection.close(2u32.into(), b"unknown machine");
        return;
    }
    tokio::select! {
        () = write(send, queue) => {}
        () = read(recv, machine, &core) => {}
        _ = connection.closed() => {}
    }
    let reason = connection.close_reason();
    connection.close(0u32.into(), b"done");
    core.unlinked(machine, connection.stable_id()).await;
    tracing::info!(%machine, reason = reason.map(|r| r.to_string()), "disconnected");
}

async fn write(mut send: SendStream, mut queue: mpsc::Receiver<PeerMessage>) {
    while let Some(message) = queue.recv().await {
        if send_message(&mut send, &message, MAX_MESSAGE).await.is_err() {
            return;
        }
    }
}

async fn read(mut recv: RecvStream, machine: MachineId, core: &CoreHandle) {
    while let Ok(message) = recv_message::<PeerMessage, _>(&mut recv, MAX_MESSAGE).await {
        match message {
            PeerMessage::Entries(entries) => {
                let _ = core.insert(Some(machine), entries).await;
            }
            PeerMessage::Vector(vector) => core.vector(machine, vector).await,
            PeerMessage::Beacon(beacon) => core.beacon(machine, beacon).await,
            // A second greeting means nothing.
            PeerMessage::Hello { .. } => {}
        }
    }
}
