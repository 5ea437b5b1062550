//! Which relays are out of reach, for as long as there is reason to ask.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use clan_relay::Names;
use clan_types::{CertificateHash, RelayAddr};
use iroh::Endpoint;
use tokio::{net::TcpStream, task::JoinSet, time::timeout};

use super::known;
use crate::core::View;

/// How often they are tried: at first, and once that has gone on for a while.
const EVERY: Duration = Duration::from_secs(1);
const LATER: Duration = Duration::from_secs(10);
const AT_FIRST: Duration = Duration::from_secs(30);
/// How long one may take to take a connection.
const LIMIT: Duration = Duration::from_millis(1500);
/// Less than a lookup's own patience: it begins anew, and so outlasts the pause in which the endpoint drops what it cannot send.
const ASK_ANEW: Duration = Duration::from_secs(2);

/// Tries relays, and has the endpoint leave those alone that do not take connections; see [`Names::hold_back`].
pub(crate) struct Health {
    names: Names,
    trying: JoinSet<Option<CertificateHash>>,
    failed: BTreeSet<CertificateHash>,
    dead: BTreeSet<CertificateHash>,
    began: Option<Instant>,
    tried: Option<Instant>,
    asked_anew: Option<Instant>,
}

impl Health {
    pub(crate) fn new(names: Names) -> Self {
        let (failed, dead) = (BTreeSet::new(), BTreeSet::new());
        Self { names, trying: JoinSet::new(), failed, dead, began: None, tried: None, asked_anew: None }
    }

    /// Those that are out of reach, as far as was tried.
    pub(crate) fn dead(&self) -> &BTreeSet<CertificateHash> {
        &self.dead
    }

    /// Goes on trying if there is `doubt`, or was. True if the answer has changed.
    pub(crate) fn look(&mut self, doubt: bool, view: &View, endpoint: &Endpoint) -> bool {
        while let Some(done) = self.trying.try_join_next() {
            self.failed.extend(done.ok().flatten());
        }
        let mut changed = false;
        if self.trying.is_empty() && self.tried.is_some() {
            let found = std::mem::take(&mut self.failed);
            changed = found != self.dead;
            if changed {
                tracing::info!(count = found.len(), "relays are out of reach");
                self.names.hold_back(&found.iter().copied().collect::<Vec<_>>());
                self.dead = found;
            }
        }
        if self.trying.is_empty() {
            let for_long = self.began.is_some_and(|at| at.elapsed() > AT_FIRST);
            let every = if for_long { LATER } else { EVERY };
            if !doubt && self.dead.is_empty() {
                (self.began, self.tried) = (None, None);
            } else if self.tried.is_none_or(|at| at.elapsed() > every) {
                self.began.get_or_insert_with(Instant::now);
                self.tried = Some(Instant::now());
                self.failed.clear();
                for (machine, relay) in known(view) {
                    if machine != view.machine {
                        self.trying.spawn(try_one(relay));
                    }
                }
            } else {
                // Nothing was tried since the last look.
                self.failed.clone_from(&self.dead);
            }
        }
        if !self.dead.is_empty() && self.asked_anew.is_none_or(|at| at.elapsed() > ASK_ANEW) {
            self.asked_anew = Some(Instant::now());
            if let Ok(resolver) = endpoint.dns_resolver() {
                resolver.reset();
            }
        }
        changed
    }
}

/// Its certificate, if it is out of reach.
async fn try_one(relay: RelayAddr) -> Option<CertificateHash> {
    let reached = timeout(LIMIT, TcpStream::connect((relay.host.as_str(), relay.port))).await;
    (!matches!(reached, Ok(Ok(_)))).then_some(relay.certificate)
}
