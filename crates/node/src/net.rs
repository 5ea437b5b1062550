//! The QUIC endpoint, and who is let in where.

use std::{borrow::Cow, net::SocketAddr, sync::Arc, time::Duration};

use clan_os::addresses;
use clan_relay::Names;
use clan_types::{MachineId, PeerAddr};
use clan_wire::{
    helm::ALPN_HELM,
    peer::{ALPN_IMAGE, ALPN_JOIN, ALPN_PEER},
    words::ALPN_WORDS,
};
use iroh::{
    Endpoint, EndpointAddr, RelayUrl, SecretKey, TransportAddr,
    endpoint::{Builder, Connection, QuicTransportConfig, RecvStream, SendStream, presets},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    NodeError,
    core::CoreHandle,
    helm::{self, Helm},
    image::ImageServer,
    join, peer,
    places::{Origin, Place, Places},
    sockets::Alarm,
    words::WordsDesk,
};

/// How often machines on a LAN tell where they are.
pub(crate) const DISCOVERY: Duration = Duration::from_secs(3);

/// Opens the endpoint. Bound to all addresses it offers our own tunnel as a path, too: [`clan_os::wireguard`] keeps its
/// packets out of there. If it is not `announced` on the local network from the beginning, [`helm::keep_announcing`] sees to
/// that.
pub(crate) async fn endpoint(
    key: SecretKey,
    bind: SocketAddr,
    names: &Names,
    announced: bool,
) -> Result<Endpoint, NodeError> {
    let mut builder = builder(key, names)
        .clear_ip_transports()
        .bind_addr(bind)
        .map_err(|e| NodeError::network("the QUIC endpoint", e))?;
    if announced {
        builder = builder.address_lookup(helm::lookup(true));
    }
    builder.bind().await.map_err(|e| NodeError::network("the QUIC endpoint", e))
}

/// What a LAN is told. INVARIANT: addresses inside tunnels, the clan's and others', are nothing for those outside.
#[allow(clippy::ptr_arg, clippy::owned_cow, reason = "as iroh has it")]
pub(crate) fn outside(all: &Vec<TransportAddr>) -> Cow<'_, Vec<TransportAddr>> {
    let inside = match addresses::point_to_point() {
        Ok(inside) => inside,
        Err(error) => {
            tracing::warn!(%error, "this LAN is told no address");
            return Cow::Owned(all.iter().filter(|addr| addr.is_relay()).cloned().collect());
        }
    };
    let told = |addr: &&TransportAddr| !matches!(addr, TransportAddr::Ip(addr) if inside.contains(&addr.ip()));
    Cow::Owned(all.iter().filter(told).cloned().collect())
}

/// An endpoint that asks nobody anything but machines and relays of the clan.
pub(crate) fn builder(key: SecretKey, names: &Names) -> Builder {
    clan_relay::prepare(Endpoint::builder(presets::Minimal), names)
        .secret_key(key)
        .alpns(vec![
            ALPN_PEER.to_vec(),
            ALPN_JOIN.to_vec(),
            ALPN_IMAGE.to_vec(),
            ALPN_WORDS.to_vec(),
            ALPN_HELM.to_vec(),
        ])
        .transport_config(transport())
}

/// Packets of 1312 bytes (a WireGuard packet of our MTU) must fit a datagram from the start.
fn transport() -> QuicTransportConfig {
    QuicTransportConfig::builder()
        .initial_mtu(1452)
        .keep_alive_interval(Duration::from_secs(5))
        .datagram_receive_buffer_size(Some(4 << 20))
        .datagram_send_buffer_size(4 << 20)
        // QEMU's user-mode network cards compute no checksums, and Linux then refuses segmentation (EIO). The first flight
        // of the first connection would be lost to finding that out.
        .enable_segmentation_offload(false)
        .build()
}

/// Who answers those that connect.
#[derive(Clone)]
pub(crate) struct Desks {
    pub(crate) core: CoreHandle,
    pub(crate) images: Arc<ImageServer>,
    pub(crate) words: Arc<WordsDesk>,
    pub(crate) helm: Arc<Helm>,
}

/// Accepts connections until cancelled. An endpoint that dies by itself raises the alarm.
pub(crate) async fn accept(endpoint: Endpoint, desks: Desks, cancel: CancellationToken, alarm: Alarm) {
    let (tasks, places) = (TaskTracker::new(), Places::default());
    loop {
        let incoming = tokio::select! {
            () = cancel.cancelled() => break,
            incoming = endpoint.accept() => incoming,
        };
        let Some(incoming) = incoming else {
            tracing::error!("the QUIC endpoint died");
            alarm.raise();
            break;
        };
        let origin = Origin::of(&incoming.remote_addr());
        if places.is_busy() && matches!(origin, Origin::Address(_)) && !incoming.remote_addr_validated() {
            // Costs nothing here; fails for those that are validated only.
            let _ = incoming.retry();
            continue;
        }
        // More are refused, not queued.
        let Some(unproved) = places.unproved(origin) else {
            incoming.refuse();
            continue;
        };
        let places = places.clone();
        let (desks, cancel) = (desks.clone(), cancel.clone());
        tasks.spawn(async move {
            let greeted = tokio::time::timeout(Duration::from_secs(10), async { incoming.accept().ok()?.await.ok() });
            let Ok(Some(connection)) = greeted.await else { return };
            let machine = machine_of(&connection);
            let known = desks.core.view().state.machine_in_good_standing(&machine).is_some();
            let place = if known {
                places.machine(machine).map(Held::Machine)
            } else {
                places.stranger(origin).map(Held::Stranger)
            };
            drop(unproved);
            let Some(place) = place else {
                connection.close(4u32.into(), b"too many connections");
                return;
            };
            let core = desks.core.clone();
            let stays = tokio::select! {
                () = cancel.cancelled() => return,
                stays = dispatch(connection.clone(), desks) => stays,
            };
            let Some((send, recv)) = stays else { return };
            if core.view().state.machine_in_good_standing(&machine).is_none() {
                connection.close(2u32.into(), b"unknown machine");
                return;
            }
            // It was a stranger when it came, and has one of the places for machines from now on.
            drop(place);
            let Some(_place) = places.machine(machine) else {
                connection.close(4u32.into(), b"too many connections");
                return;
            };
            tokio::select! {
                () = cancel.cancelled() => {}
                () = peer::converse(connection, send, recv, core) => {}
            }
        });
    }
    tasks.close();
    tasks.wait().await;
}

/// A connection's place, until it ends.
enum Held {
    Machine(#[expect(dead_code, reason = "it is held")] Place<MachineId>),
    Stranger(#[expect(dead_code, reason = "it is held")] Place<Origin>),
}

/// Serves a connection to its end, unless it is a newcomer's who stays: then there is the stream to talk on.
async fn dispatch(
    connection: Connection,
    Desks { core, images, words, helm }: Desks,
) -> Option<(SendStream, RecvStream)> {
    let remote = machine_of(&connection);
    match connection.alpn() {
        alpn if alpn == ALPN_JOIN => return join::serve(&connection, &core).await,
        alpn if alpn == ALPN_PEER => peer::accepted(connection, core).await,
        alpn if alpn == ALPN_IMAGE => images.serve(connection, core).await,
        alpn if alpn == ALPN_WORDS => words.serve(connection, &core).await,
        alpn if alpn == ALPN_HELM => helm.serve(connection, core).await,
        _ => tracing::debug!(%remote, "connection with an unknown protocol"),
    }
    None
}

/// The key that a connection's other end has proved.
pub(crate) fn machine_of(connection: &Connection) -> MachineId {
    MachineId::from_bytes(*connection.remote_id().as_bytes())
}

/// A machine's address in iroh's form, with the relays through which it may be reached; `None` if the id is no key.
pub(crate) fn endpoint_addr(peer: &PeerAddr, relays: &[RelayUrl]) -> Option<EndpointAddr> {
    let id = iroh::PublicKey::from_bytes(peer.machine.as_bytes()).ok()?;
    let direct = peer.addrs.iter().copied().map(TransportAddr::Ip);
    Some(EndpointAddr::from_parts(id, direct.chain(relays.iter().cloned().map(TransportAddr::Relay))))
}
