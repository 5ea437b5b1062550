//! Conversations with the other machines of the clan: dialling, and the `clan/peer/1` stream.

use std::time::Duration;

use clan_os::channel::{recv_message, send_message};
use clan_replica::LinkId;
use clan_types::{MachineId, PeerAddr};
use clan_wire::peer::{ALPN_PEER, JoinRequest, MAX_JOIN_REQUEST, MAX_MESSAGE, PeerMessage};
use iroh::{
    Endpoint, RelayUrl,
    endpoint::{Connection, RecvStream, SendStream},
};
use tokio::{sync::mpsc, task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{core::CoreHandle, net, relay};

/// Messages that may wait for a slow peer; more are dropped, and made up for when vectors are compared.
const QUEUE: usize = 64;
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// Who is put out has so long to take the entries by which they were.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);

/// Tries to connect to the machines that come out of `dials`, and talks with those that it reaches; first of all with the
/// one that admitted this machine a moment ago, on the connection that there is already.
pub(crate) async fn dial(
    endpoint: Endpoint,
    core: CoreHandle,
    mut dials: mpsc::Receiver<PeerAddr>,
    admitted_by: Option<Connection>,
    cancel: CancellationToken,
) {
    let mut attempts = JoinSet::new();
    let mut host = admitted_by.as_ref().map(net::machine_of);
    if let Some(connection) = admitted_by {
        let core = core.clone();
        attempts.spawn(async move {
            let machine = net::machine_of(&connection);
            stay(connection, core).await;
            machine
        });
    }
    loop {
        tokio::select! {
            () = cancel.cancelled() => break,
            peer = dials.recv() => {
                let Some(peer) = peer else { break };
                if host == Some(peer.machine) {
                    // This attempt is under way, and its end will be told.
                    continue;
                }
                let (endpoint, core) = (endpoint.clone(), core.clone());
                attempts.spawn(async move {
                    let relays = relay::urls(&core.view());
                    if let Some(connection) = connect(&endpoint, &peer, &relays).await {
                        dialled(connection, core).await;
                    }
                    peer.machine
                });
            }
            Some(done) = attempts.join_next() => {
                if let Ok(machine) = done {
                    host = host.filter(|host| *host != machine);
                    core.dial_ended(machine).await;
                }
            }
        }
    }
    attempts.shutdown().await;
}

async fn connect(endpoint: &Endpoint, peer: &PeerAddr, relays: &[RelayUrl]) -> Option<Connection> {
    let addr = net::endpoint_addr(peer, relays)?;
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

/// Goes on as a machine of the clan on the connection by which this one was admitted.
async fn stay(connection: Connection, core: CoreHandle) {
    let Ok(Ok((mut send, recv))) = timeout(HELLO_LIMIT, connection.open_bi()).await else { return };
    if send_message(&mut send, &JoinRequest::Stay, MAX_JOIN_REQUEST).await.is_ok() {
        converse(connection, send, recv, core).await;
    }
}

/// Handles a connection that another machine made.
pub(crate) async fn accepted(connection: Connection, core: CoreHandle) {
    if !greets(&connection, &core) {
        return;
    }
    let Ok(Ok((send, recv))) = timeout(HELLO_LIMIT, connection.accept_bi()).await else { return };
    converse(connection, send, recv, core).await;
}

/// Whether the other end is, or was, a machine of the clan, or may be one for all that is known here; if not, the
/// connection is closed before anything is read from it. Whether it may stay is the replica's to say.
fn greets(connection: &Connection, core: &CoreHandle) -> bool {
    let (machine, view) = (net::machine_of(connection), core.view());
    let known = view.learning || view.state.machines.contains_key(&machine);
    if !known {
        // It may have been admitted elsewhere a moment ago: it asks again.
        tracing::debug!(%machine, "not a machine of this clan, as far as is known here");
        connection.close(2u32.into(), b"unknown machine");
    }
    known
}

/// Greets, then passes messages until the connection ends.
pub(crate) async fn converse(connection: Connection, mut send: SendStream, mut recv: RecvStream, core: CoreHandle) {
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
    let (out, mut queue) = mpsc::channel(QUEUE);
    let Some(link) = core.linked(machine, connection.clone(), out, vector).await else {
        bid_farewell(send, &mut queue).await;
        connection.close(3u32.into(), b"not in good standing");
        return;
    };
    tokio::select! {
        over = write(&mut send, &mut queue) => if over {
            // The core let go of it: it was put out, and hears why.
            bid_farewell(send, &mut queue).await;
            connection.close(3u32.into(), b"not in good standing");
        },
        () = read(recv, link, machine, &core) => {}
        _ = connection.closed() => {}
    }
    let reason = connection.close_reason();
    connection.close(0u32.into(), b"done");
    core.unlinked(link).await;
    tracing::info!(%machine, reason = reason.map(|r| r.to_string()), "disconnected");
}

/// Whether nothing more is to be sent; otherwise the stream broke.
async fn write(send: &mut SendStream, queue: &mut mpsc::Receiver<PeerMessage>) -> bool {
    while let Some(message) = queue.recv().await {
        if send_message(send, &message, MAX_MESSAGE).await.is_err() {
            return false;
        }
    }
    true
}

/// Sends what is left in a queue that has ended, and waits a moment until it has arrived. Nothing is read meanwhile.
async fn bid_farewell(mut send: SendStream, queue: &mut mpsc::Receiver<PeerMessage>) {
    let sent = timeout(FAREWELL_LIMIT, async {
        if write(&mut send, queue).await && send.finish().is_ok() {
            let _ = send.stopped().await;
        }
    });
    let _ = sent.await;
}

async fn read(mut recv: RecvStream, link: LinkId, machine: MachineId, core: &CoreHandle) {
    while let Ok(message) = recv_message::<PeerMessage, _>(&mut recv, MAX_MESSAGE).await {
        core.message(link, machine, message).await;
    }
}
