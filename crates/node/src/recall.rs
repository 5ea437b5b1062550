//! Where the clan's machines were last, on disk: one that starts finds the others again, even if all of them start at once.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use clan_types::{MachineId, PeerAddr};
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

use crate::core::{CoreHandle, View};

pub(crate) const FILE: &str = "peers.json";
/// Machines that come and go are written down together.
const PAUSE: Duration = Duration::from_secs(5);

#[derive(Serialize, Deserialize)]
struct Remembered {
    peers: Vec<PeerAddr>,
}

/// What was kept in `dir`. It may be out of date; a file that cannot be read is put aside, and nobody is remembered.
pub(crate) fn load(dir: &Path) -> Vec<PeerAddr> {
    match clan_store::read_versioned_json::<Remembered>(&dir.join(FILE)) {
        Ok(remembered) => remembered.map(|r| r.peers).unwrap_or_default(),
        Err(error) => {
            tracing::warn!(%error, "this machine does not remember where the others were, and waits for them");
            Vec::new()
        }
    }
}

/// Keeps what the machines say of their addresses, beginning with what is kept already, until cancelled.
pub(crate) async fn keep(dir: PathBuf, kept: Vec<PeerAddr>, core: CoreHandle, cancel: CancellationToken) {
    let mut views = core.watch();
    let mut kept = kept;
    loop {
        let over = cancel.is_cancelled();
        let present = remember(&views.borrow_and_update().clone(), &kept);
        if present != kept {
            let (path, remembered) = (dir.join(FILE), Remembered { peers: present.clone() });
            match spawn_blocking(move || clan_store::write_versioned_json(&path, &remembered)).await {
                Ok(Ok(())) => kept = present,
                Ok(Err(error)) => tracing::warn!(%error, "where the other machines are is not kept"),
                Err(_) => return,
            }
        }
        if over {
            return;
        }
        let mut news = async || {
            tokio::time::sleep(PAUSE).await;
            views.changed().await
        };
        tokio::select! {
            () = cancel.cancelled() => {}
            changed = news() => if changed.is_err() { return },
        }
    }
}

/// The other machines in good standing, each with the addresses of its latest beacon, or else with those that were kept.
fn remember(view: &View, kept: &[PeerAddr]) -> Vec<PeerAddr> {
    if view.learning {
        return kept.to_vec();
    }
    let before: BTreeMap<MachineId, &PeerAddr> = kept.iter().map(|peer| (peer.machine, peer)).collect();
    let others = view.state.good_machines().map(|(machine, _)| *machine).filter(|machine| *machine != view.machine);
    let peers = others.filter_map(|machine| match view.beacons.get(&machine) {
        Some(beacon) if !beacon.quic.is_empty() => Some(PeerAddr { machine, addrs: beacon.quic.clone() }),
        _ => before.get(&machine).map(|peer| (*peer).clone()),
    });
    let mut peers: Vec<_> = peers.collect();
    peers.sort_by_key(|peer| peer.machine);
    peers
}
