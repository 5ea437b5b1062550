//! Where a machine on a computer of its own standing may be reached: on the computer's own addresses, as they come and go.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use clan_os::addresses;
use iroh::Endpoint;
use tokio_util::sync::CancellationToken;

use crate::{core::CoreHandle, host::Ports};

/// How often the addresses are looked at.
const EVERY: Duration = Duration::from_secs(5);

/// Keeps the beacon true about the addresses, until cancelled.
pub(crate) async fn follow(
    endpoint: Endpoint,
    ports: Ports,
    packets: bool,
    core: CoreHandle,
    cancel: CancellationToken,
) {
    let mut tick = tokio::time::interval(EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = tick.tick() => {}
        }
        let Some((quic, wireguard)) = look(&endpoint, ports).await else { continue };
        let wireguard = if packets { wireguard } else { Vec::new() };
        core.change_own(move |own| {
            own.quic = quic;
            own.wireguard = wireguard;
        })
        .await;
    }
}

/// Where the machine may be reached now: over QUIC, and over WireGuard.
pub(crate) async fn look(endpoint: &Endpoint, ports: Ports) -> Option<(Vec<SocketAddr>, Vec<SocketAddr>)> {
    match addresses::local().await {
        Ok(here) => Some((reachable(&endpoint.bound_sockets(), &here), at(&here, ports.wireguard))),
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
}
