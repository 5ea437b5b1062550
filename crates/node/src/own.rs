//! Where a machine on a computer of its own standing may be reached: on the computer's own addresses, as they come and go.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use clan_os::{addresses, wireguard::Wireguard};
use iroh::Endpoint;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{core::CoreHandle, host::Ports};

/// How often the addresses are looked at, beside when the kernel tells of a change: what others see of us, it cannot know.
const EVERY: Duration = Duration::from_secs(5);
/// The same in the seconds after a change, when others say one after the other how they see us.
const OFTEN: Duration = Duration::from_millis(300);
const SECONDS: Duration = Duration::from_secs(5);
/// How many addresses are told others, of each kind; they do not try more.
const MAX_TOLD: usize = 12;
/// A change comes in several parts.
const PAUSE: Duration = Duration::from_millis(50);

/// Whom a change of the network concerns.
pub(crate) struct News {
    /// The data plane, if there is one.
    pub(crate) wireguard: Option<Arc<Wireguard>>,
    /// Whoever watches the connections.
    pub(crate) moved: Arc<Notify>,
}

/// Keeps the beacon true about the addresses, until cancelled; a change of the network is told the data plane and whoever watches
/// the connections.
pub(crate) async fn follow(
    endpoint: Endpoint,
    ports: Ports,
    News { wireguard: packets, moved }: News,
    core: CoreHandle,
    cancel: CancellationToken,
) {
    if let Some(packets) = &packets {
        packets.keep_outside(ports.quic);
    }
    let mut changed = Instant::now();
    let mut changes = changes();
    let mut before = addresses::physical().await.ok();
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(if changed.elapsed() < SECONDS { OFTEN } else { EVERY }) => {}
            () = next(&mut changes) => tokio::time::sleep(PAUSE).await,
        }
        // Without any address there is nothing to tell, and nowhere to ask; the next one may look like the last in another
        // network.
        let now = addresses::physical().await.ok().filter(|addresses| !addresses.is_empty());
        if now.is_none() {
            before = None;
        } else if now != before {
            tracing::info!("this computer is in another network now");
            if let Some(wireguard) = &packets {
                wireguard.moved();
            }
            endpoint.network_change().await;
            moved.notify_one();
            (before, changed) = (now, Instant::now());
        }
        let Some((quic, wireguard)) = look(&endpoint, ports).await else { continue };
        // As others see them: behind a router with a dependable mapping these lead here.
        // INVARIANT: where it is unknown which of them are inside of tunnels, none of them is told.
        let Ok(inside) = addresses::inside_tunnels().await else { continue };
        let outside = endpoint.addr();
        let seen = outside.ip_addrs().copied().filter(|addr| !inside.contains(&addr.ip()) && !quic.contains(addr));
        let quic = some(seen.collect(), &quic);
        let wireguard = packets.as_ref().map_or_else(Vec::new, |packets| some(packets.observed(), &wireguard));
        core.change_own(move |own| {
            own.quic = quic;
            own.wireguard = wireguard;
        })
        .await;
    }
}

/// INVARIANT: never more addresses than a beacon may name. Those that lead here from everywhere come first.
fn some(outside: Vec<SocketAddr>, here: &[SocketAddr]) -> Vec<SocketAddr> {
    let more = here.iter().filter(|addr| !outside.contains(addr));
    outside.iter().chain(more).take(MAX_TOLD).copied().collect()
}

/// All addresses of the kind that the computer has.
pub(crate) fn everywhere(found: Option<IpAddr>) -> IpAddr {
    match found {
        Some(IpAddr::V6(_)) => Ipv6Addr::UNSPECIFIED.into(),
        Some(IpAddr::V4(_)) | None => Ipv4Addr::UNSPECIFIED.into(),
    }
}

/// Changes of the network, if the kernel tells of them.
pub(crate) fn changes() -> Option<addresses::Changes> {
    addresses::changes().inspect_err(|error| tracing::warn!(%error, "a change of the network is noticed late")).ok()
}

/// Waits for the next change; for ever if none is told.
pub(crate) async fn next(changes: &mut Option<addresses::Changes>) {
    match changes {
        Some(changes) => changes.next().await,
        None => std::future::pending().await,
    }
}

/// Where the machine may be reached now: over QUIC, and over WireGuard.
pub(crate) async fn look(endpoint: &Endpoint, ports: Ports) -> Option<(Vec<SocketAddr>, Vec<SocketAddr>)> {
    match addresses::local().await {
        Ok(here) => {
            let (quic, wireguard) = (reachable(&endpoint.bound_sockets(), &here), at(&here, ports.wireguard));
            Some((some(Vec::new(), &quic), some(Vec::new(), &wireguard)))
        }
        Err(error) => {
            tracing::warn!(%error, "other machines may not find this one");
            None
        }
    }
}

/// The addresses at which bound sockets are reached.
fn reachable(bound: &[SocketAddr], here: &[IpAddr]) -> Vec<SocketAddr> {
    let mut all: Vec<SocketAddr> = bound
        .iter()
        .flat_map(|socket| {
            if socket.ip().is_unspecified() {
                let same = |ip: &&IpAddr| ip.is_ipv4() == socket.is_ipv4();
                here.iter().filter(same).map(|ip| SocketAddr::new(*ip, socket.port())).collect()
            } else {
                vec![*socket]
            }
        })
        .collect();
    all.sort();
    all.dedup();
    all
}

fn at(here: &[IpAddr], port: u16) -> Vec<SocketAddr> {
    here.iter().map(|ip| SocketAddr::new(*ip, port)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_bound_to_everything_is_reached_at_every_address_of_its_kind() {
        let here: Vec<IpAddr> = ["192.0.2.7", "198.51.100.2", "2001:db8::7"].map(|a| a.parse().unwrap()).into();
        let all = reachable(&["0.0.0.0:9".parse().unwrap()], &here);
        assert_eq!(all, ["192.0.2.7:9", "198.51.100.2:9"].map(|a| a.parse().unwrap()));
        let one = reachable(&["192.0.2.7:9".parse().unwrap()], &here);
        assert_eq!(one, ["192.0.2.7:9"].map(|a| a.parse::<SocketAddr>().unwrap()));
    }

    #[test]
    fn what_leads_here_from_everywhere_is_told_first_and_not_too_much_is_told() {
        let here: Vec<SocketAddr> = (1..40).map(|n| SocketAddr::from(([10, 0, 0, n], 9))).collect();
        let outside: SocketAddr = "203.0.113.7:4".parse().unwrap();
        let told = some(vec![outside, here[0]], &here);
        assert_eq!(told.len(), MAX_TOLD);
        assert_eq!(&told[..3], [outside, here[0], here[1]]);
    }
}
