//! Whether connections live. QUIC gives a silent one up after half a minute, and an endpoint looks for another relay about as
//! often; packets of the clan travel inside. So connections are watched here: one that does not answer is closed within
//! seconds, after which its machine is dialled anew, by another way if need be.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use clan_relay::Names;
use clan_types::{CertificateHash, MachineId};
use iroh::{Endpoint, TransportAddr, Watcher, endpoint::Connection};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{
    core::CoreHandle,
    relay::{self, Health},
};

/// How often connections are looked at: usually, and while one is in doubt.
const LOOK: Duration = Duration::from_secs(1);
const LOOK_CLOSELY: Duration = Duration::from_millis(100);
/// A connection on which nothing is said but what keeps it alive is asked after this long a silence: more than one such message
/// must be missing.
const IDLE: Duration = Duration::from_secs(12);
/// One on which something was said is asked after this long without any answer.
const SPOKEN_TO: Duration = Duration::from_secs(1);
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How long a question may stay unanswered: a busy computer is slow, but not dead.
const PATIENCE: Duration = Duration::from_secs(8);
/// The same when this computer has changed its network: then what led through the old one is dead. A relay has to be connected to
/// again first. Round trips come on top.
const MOVED_DIRECT: Duration = Duration::from_millis(300);
const MOVED_RELAYED: Duration = Duration::from_millis(800);
/// A home relay may be out of reach for so long before another is looked for, and so long passes until the next look.
const HOMELESS: Duration = Duration::from_millis(500);
const LOOK_FOR_HOME: Duration = Duration::from_secs(3);
/// Whoever has found none for so long may be where none is to be found: the endpoint goes on looking by itself.
const LOOK_FOR: Duration = Duration::from_secs(30);
/// The endpoint must have heard that a connection is closed before it is asked for another, or it will send where that one did.
const CLOSED: Duration = Duration::from_millis(20);
/// What is asked: too short to be anybody's packet, so it is dropped, but its receipt is acknowledged.
const QUESTION: &[u8] = &[0];

/// Whether what came inside a connection is only the question whether it lives.
pub(crate) fn is_question(packet: &[u8]) -> bool {
    packet.len() <= QUESTION.len()
}

/// Watches all connections until cancelled. `moved` says that this computer is in another network.
pub(crate) async fn watch(
    endpoint: Endpoint,
    names: Names,
    core: CoreHandle,
    moved: Arc<Notify>,
    cancel: CancellationToken,
) {
    let mut health = Health::new(names);
    let mut pulses: BTreeMap<usize, Pulse> = BTreeMap::new();
    let mut homes = endpoint.home_relay_status();
    let (mut homeless, mut looked_for_home) = (None::<Instant>, None::<Instant>);
    loop {
        let doubt = homeless.is_some_and(|since| since.elapsed() < LOOK_FOR) || pulses.values().any(Pulse::is_asked);
        let pause = if doubt { LOOK_CLOSELY } else { LOOK };
        let has_moved = tokio::select! {
            () = cancel.cancelled() => return,
            () = moved.notified() => true,
            updated = homes.updated() => match updated {
                Ok(_) => false,
                // The endpoint is gone, and its connections with it.
                Err(_) => return,
            },
            () = tokio::time::sleep(pause) => false,
        };
        let (view, now) = (core.view(), Instant::now());
        let links: BTreeMap<usize, (MachineId, &Connection)> =
            view.links.iter().map(|(machine, link)| (link.stable_id(), (*machine, link))).collect();
        pulses.retain(|id, _| links.contains_key(id));
        let changed = health.look(doubt, &view, &endpoint);
        let mut lost = Vec::new();
        for (id, (machine, connection)) in links {
            let stats = connection.stats();
            let (heard, said) = (stats.udp_rx.datagrams, stats.udp_tx.datagrams);
            let pulse = pulses.entry(id).or_insert_with(|| Pulse::new(now));
            if has_moved {
                pulse.doubt(heard, patience_after_move(connection), now);
            }
            let hopeless = pulse.is_asked() && !health.dead().is_empty() && leads_through(connection, health.dead());
            match pulse.look(heard, said, hopeless, now) {
                Verdict::Lives => {}
                Verdict::Ask => {
                    let _ = connection.send_datagram(Bytes::from_static(QUESTION));
                }
                Verdict::Dead => {
                    tracing::info!(%machine, "does not answer any more: connection closed");
                    connection.close(3u32.into(), b"silent");
                    lost.push((machine, pulse.moved));
                }
            }
        }
        let connected = homes.get().iter().all(iroh::endpoint::RelayStatus::is_connected);
        homeless = if connected { None } else { homeless.or(Some(now)) };
        let is_homeless = homeless.is_some_and(|since| (HOMELESS..LOOK_FOR).contains(&since.elapsed()));
        let due = looked_for_home.is_none_or(|at| at.elapsed() > LOOK_FOR_HOME);
        if changed || due && (is_homeless || !lost.is_empty()) {
            relay::look_again(&endpoint, &view).await;
            looked_for_home = Some(now);
        }
        if lost.iter().any(|(_, moved)| *moved) {
            tokio::time::sleep(CLOSED).await;
        }
        for (machine, _) in lost.into_iter().filter(|(_, moved)| *moved) {
            // The other end does not know yet, so it will not dial, whoever's turn it is.
            core.hurry(machine).await;
        }
    }
}

/// Whether a connection uses a relay that is out of reach.
fn leads_through(connection: &Connection, dead: &BTreeSet<CertificateHash>) -> bool {
    connection.paths().iter().filter(|path| path.is_selected()).any(|path| match path.remote_addr() {
        TransportAddr::Relay(url) => clan_relay::certificate_of(url).is_some_and(|hash| dead.contains(&hash)),
        _ => false,
    })
}

fn patience_after_move(connection: &Connection) -> Duration {
    let paths = connection.paths();
    let selected = paths.iter().find(|path| path.is_selected());
    let rtt = selected.as_ref().map_or(Duration::ZERO, |path| path.rtt());
    match selected.as_ref().map(|path| path.remote_addr()) {
        Some(TransportAddr::Relay(_)) => MOVED_RELAYED + 6 * rtt,
        _ => MOVED_DIRECT + 3 * rtt,
    }
}

/// What is known about one connection.
#[derive(Debug)]
struct Pulse {
    /// Datagrams that had come when it was last looked at, and had been sent when the last one came.
    heard: u64,
    said: u64,
    last: Instant,
    asked: Option<Instant>,
    asked_again: Option<Instant>,
    patience: Duration,
    moved: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Lives,
    Ask,
    Dead,
}

impl Pulse {
    fn new(now: Instant) -> Self {
        Self { heard: 0, said: 0, last: now, asked: None, asked_again: None, patience: PATIENCE, moved: false }
    }

    fn is_asked(&self) -> bool {
        self.asked.is_some()
    }

    /// The network has changed: only what comes from now on counts.
    fn doubt(&mut self, heard: u64, patience: Duration, now: Instant) {
        *self = Self { heard, asked: Some(now), patience, moved: true, last: now, ..*self };
    }

    /// `hopeless`: a question that is not answered now never will be.
    fn look(&mut self, heard: u64, said: u64, hopeless: bool, now: Instant) -> Verdict {
        if heard != self.heard {
            *self = Self { heard, said, ..Self::new(now) };
            return Verdict::Lives;
        }
        let silent = now - self.last;
        match self.asked {
            Some(asked) if hopeless || now - asked > self.patience => Verdict::Dead,
            // Not more often: what a dead relay does not take waits, and keeps others waiting.
            Some(_) if self.moved || self.asked_again.is_none_or(|at| now - at >= ASK_AGAIN) => {
                self.asked_again = Some(now);
                Verdict::Ask
            }
            Some(_) => Verdict::Lives,
            None if silent > IDLE || silent > SPOKEN_TO && said != self.said => {
                (self.asked, self.asked_again) = (Some(now), Some(now));
                Verdict::Ask
            }
            None => Verdict::Lives,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn whoever_answers_lives_however_long_nobody_spoke() {
        let began = Instant::now();
        let mut pulse = Pulse::new(began);
        assert_eq!(pulse.look(5, 5, false, began), Verdict::Lives);
        assert_eq!(pulse.look(5, 5, false, began + 11_000 * MS), Verdict::Lives, "silence, but nobody was spoken to");
        assert_eq!(pulse.look(5, 5, false, began + 12_100 * MS), Verdict::Ask);
        assert_eq!(pulse.look(6, 6, false, began + 12_200 * MS), Verdict::Lives);
        assert!(!pulse.is_asked());
    }

    #[test]
    fn whoever_does_not_answer_is_asked_and_then_dead() {
        let began = Instant::now();
        let mut pulse = Pulse::new(began);
        assert_eq!(pulse.look(5, 5, false, began), Verdict::Lives);
        assert_eq!(pulse.look(5, 9, false, began + 900 * MS), Verdict::Lives);
        assert_eq!(pulse.look(5, 9, false, began + 1_100 * MS), Verdict::Ask);
        assert_eq!(pulse.look(5, 10, false, began + 1_200 * MS), Verdict::Lives, "asked a moment ago");
        assert_eq!(pulse.look(5, 12, false, began + 9_000 * MS), Verdict::Ask);
        assert_eq!(pulse.look(5, 20, false, began + 9_200 * MS), Verdict::Dead);
    }

    #[test]
    fn whoever_is_silent_behind_a_dead_relay_is_not_waited_for() {
        let began = Instant::now();
        let mut pulse = Pulse::new(began);
        assert_eq!(pulse.look(5, 5, false, began), Verdict::Lives);
        assert_eq!(pulse.look(5, 9, true, began + 1_100 * MS), Verdict::Ask, "it may still be heard");
        assert_eq!(pulse.look(5, 9, true, began + 1_200 * MS), Verdict::Dead);
    }

    #[test]
    fn after_a_move_what_was_heard_before_does_not_count() {
        let began = Instant::now();
        let mut pulse = Pulse::new(began);
        assert_eq!(pulse.look(5, 5, false, began), Verdict::Lives);
        pulse.doubt(7, 300 * MS, began + 50 * MS);
        assert_eq!(pulse.look(7, 9, false, began + 50 * MS), Verdict::Ask);
        assert_eq!(pulse.look(7, 9, false, began + 400 * MS), Verdict::Dead);
        assert!(pulse.moved);
        assert_eq!(pulse.look(8, 9, false, began + 500 * MS), Verdict::Lives);
        assert!(!pulse.moved, "that is over");
    }
}
