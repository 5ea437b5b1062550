//! Relays: machines of the clan that pass packets on between machines that do not reach each other.
//!
//! The ledger says which machines are relays, and where. Every machine's endpoint uses them all ([`follow`]); a machine
//! that the ledger names runs one ([`serve`]). What a relay passes on is encrypted from end to end; it learns who talks
//! to whom, when and how much.
//!
//! How an endpoint finds and recognises a relay is in [`clan_relay`].

mod access;
mod certificate;
mod health;
mod lobby;
mod server;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use clan_relay::{MAX_RELAYS, Names, Place, url_of};
use clan_types::{MachineId, MachineName, RelayAddr};
use iroh::{Endpoint, RelayUrl};
use tokio_util::sync::CancellationToken;

pub(crate) use self::{certificate::Certificate, health::Health, lobby::Lobby};
use crate::core::{CoreHandle, View};

/// A relay that cannot listen is tried again after this long: its port may become free.
const RETRY: Duration = Duration::from_secs(10);

/// The relays that a machine may use, in one order for all: of too many, those of the least machine ids.
pub(crate) fn known(view: &View) -> Vec<(MachineId, RelayAddr)> {
    let relays = view.state.good_relays().take(MAX_RELAYS);
    relays
        .map(|(machine, relay)| {
            (*machine, RelayAddr { host: relay.host.clone(), port: relay.port, certificate: relay.certificate })
        })
        .collect()
}

/// Their names inside the endpoint, for dialling a machine: nobody needs to know which one it listens at.
pub(crate) fn urls(view: &View) -> Vec<RelayUrl> {
    known(view).iter().filter_map(|(_, relay)| url_of(relay)).collect()
}

/// The name of the machine whose relay this is.
pub(crate) fn machine_at(view: &View, url: &RelayUrl) -> Option<MachineName> {
    let (machine, _) = known(view).into_iter().find(|(_, relay)| url_of(relay).as_ref() == Some(url))?;
    Some(view.state.machine_in_good_standing(&machine)?.name.clone())
}

/// Makes the endpoint look at once which relays it reaches; by itself it does so every half minute.
pub(crate) async fn look_again(endpoint: &Endpoint, view: &View) {
    for (machine, relay) in known(view) {
        if let Some(url) = url_of(&relay) {
            // Nothing changes, but it looks.
            clan_relay::insert(endpoint, url, &relay, machine == view.machine, None).await;
        }
    }
}

/// Keeps the endpoint's relays those that the ledger names, until cancelled; `introduced` are those it has already.
pub(crate) async fn follow(
    endpoint: Endpoint,
    names: Names,
    introduced: Vec<RelayUrl>,
    core: CoreHandle,
    cancel: CancellationToken,
) {
    let mut views = core.watch();
    let mut current: BTreeMap<RelayUrl, Option<RelayAddr>> = introduced.into_iter().map(|url| (url, None)).collect();
    loop {
        let view = views.borrow_and_update().clone();
        let mut wanted = BTreeMap::new();
        for (machine, relay) in known(&view) {
            let Some(url) = url_of(&relay) else { continue };
            let own = machine == view.machine;
            // One that the endpoint was introduced to as a newcomer's, too: no proof is needed any more.
            if current.get(&url).and_then(Option::as_ref) != Some(&relay) {
                let place = if own { Place::Loopback } else { Place::Host(relay.host.clone()) };
                names.set(&relay.certificate, place);
                clan_relay::insert(&endpoint, url.clone(), &relay, own, None).await;
                tracing::info!(%machine, host = %relay.host, port = relay.port, "a relay is used");
            }
            wanted.insert(url, Some(relay));
        }
        for url in current.keys().filter(|url| !wanted.contains_key(*url)) {
            endpoint.remove_relay(url).await;
            tracing::info!(%url, "a relay is no longer used");
        }
        current = wanted;
        tokio::select! {
            () = cancel.cancelled() => return,
            changed = views.changed() => if changed.is_err() { return },
        }
    }
}

/// Runs the machine's relay whenever the ledger says that it is one, until cancelled.
pub(crate) async fn serve(
    certificate: Arc<Certificate>,
    lobby: Arc<Lobby>,
    core: CoreHandle,
    cancel: CancellationToken,
) {
    let mut views = core.watch();
    let mut running: Option<(u16, server::Server)> = None;
    loop {
        let view = views.borrow_and_update().clone();
        let relay = view.state.good_relays().find(|(machine, _)| **machine == view.machine).map(|(_, relay)| relay);
        let wanted = relay.filter(|relay| relay.certificate == certificate.hash()).map(|relay| relay.port);
        let stale = relay.is_some() && wanted.is_none();
        let mut retry = None;
        if running.as_ref().map(|(port, _)| *port) != wanted {
            if let Some((port, server)) = running.take() {
                server.stop().await;
                tracing::info!(port, "the relay stopped");
            }
            if let Some(port) = wanted {
                match server::Server::start(port, &certificate, lobby.clone(), core.clone()).await {
                    Ok(server) => {
                        tracing::info!(port, "this machine is a relay");
                        running = Some((port, server));
                    }
                    Err(error) => {
                        tracing::warn!(port, %error, "the relay cannot start");
                        retry = Some(RETRY);
                    }
                }
            }
        }
        let problem = match (&retry, stale) {
            (Some(_), _) => wanted.map(|port| {
                format!(
                    "The clan counts on this machine as a relay, but it cannot listen on port {port}: free the port."
                )
            }),
            (None, true) => Some(
                "The clan counts on this machine as a relay by a certificate that it no longer has: \
                 turn the relay on again."
                    .to_owned(),
            ),
            (None, false) => None,
        };
        core.problem("relay", problem).await;
        tokio::select! {
            () = cancel.cancelled() => break,
            changed = views.changed() => if changed.is_err() { break },
            () = tokio::time::sleep(retry.unwrap_or(Duration::MAX)), if retry.is_some() => {}
        }
    }
    if let Some((_, server)) = running {
        server.stop().await;
    }
}
