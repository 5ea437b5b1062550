//! The image, from every machine of the link at once.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use clan_api::{ApiProblem, ErrorCode};
use clan_build::{ImageStore, StoreError, StoredImage};
use clan_ledger::State;
use clan_transfer::{Event, FetchError, NoManifest, Source, Wanted};
use clan_types::{ByteSize, ImageId};
use clan_wire::image::{Manifest, ManifestError};

use super::{Fetcher, blocking, race::Race};
use crate::{problem, tasks::TaskHandle};

impl Fetcher {
    /// The machines of the link, by the names that the ledger has for them.
    fn sources(&self, state: &State) -> Vec<Source> {
        let peers = self.ordered();
        let source = |peer| {
            let peer: &clan_types::PeerAddr = peer;
            let name = state.machines.get(&peer.machine).map(|m| m.name.to_string());
            Some(Source { name: name.unwrap_or_else(|| peer.machine.short()), addr: self.addr(peer)? })
        };
        peers.iter().filter_map(source).collect()
    }

    /// The manifest of an image, from whichever machine is first to give the right one.
    pub(crate) async fn manifest(&self, state: &State, image: &ImageId) -> Result<Manifest, ApiProblem> {
        let began = std::time::Instant::now();
        let (mut last, mut liars) = (None, Vec::new());
        let sources = self.sources(state);
        let mut race = Race::new(&sources, |source, _| async move {
            (source, clan_transfer::manifest(&self.endpoint, source, Some(self.proof()), image).await)
        });
        while let Some((source, answer)) = race.next().await {
            match answer {
                Ok(manifest) => return Ok(manifest),
                Err(NoManifest::Unusable(error)) => return Err(unusable(&error)),
                Err(NoManifest::Lied(what)) => {
                    tracing::warn!(machine = source.name, what, "a machine gives a false image");
                    liars.push(source.name.clone());
                }
                Err(NoManifest::Failed(why)) => last = Some(why),
            }
        }
        if liars.is_empty() {
            return Err(self.unreachable(began.elapsed(), last));
        }
        Err(self.not_fetched(FetchError::NoSource { last, liars }))
    }

    /// Fetches an image into the store, going on where an earlier attempt stopped.
    pub(crate) async fn image(
        &self,
        store: &ImageStore,
        state: &State,
        manifest: &Manifest,
        task: &TaskHandle,
    ) -> Result<StoredImage, ApiProblem> {
        let sources = self.sources(state);
        if sources.is_empty() {
            return Err(self.unreachable(Duration::ZERO, None));
        }
        // What was right when it arrived may be damaged on this disk: once more, then the disk is to blame.
        for attempt in 0..2 {
            let (images, manifest) = (store.clone(), manifest.clone());
            let incoming = blocking(move || images.begin(manifest)).await?.map_err(|e| problem::store(&e))?;
            let missing = incoming.files().into_iter().filter(|f| !f.is_complete());
            let wanted: Vec<Wanted> = missing.map(|f| Wanted { hash: f.hash, size: f.size, place: f.path }).collect();
            let givers = Mutex::new(BTreeSet::new());
            let report = |event| match event {
                Event::Found { here, total } => {
                    task.progress(here, Some(total));
                    if here > 0 {
                        let (here, total) = (ByteSize::from_bytes(here), ByteSize::from_bytes(total));
                        task.log(format!("{here} of {total} are here from an earlier attempt"));
                    }
                }
                Event::Progress { here, total, from } => {
                    task.progress(here, Some(total));
                    let mut givers = givers.lock().unwrap_or_else(PoisonError::into_inner);
                    if givers.insert(from) {
                        let names: Vec<&str> = givers.iter().map(String::as_str).collect();
                        task.detail(format!("from {}", names.join(", ")));
                    }
                }
                Event::Failed { name, why } => task.log(format!("{name} does not give the image: {why}")),
                Event::Lied { name, what } => {
                    task.log(format!("{name} gives a false image, and is not asked again: {what}"));
                }
            };
            let taken = clan_transfer::fetch(&self.endpoint, &sources, Some(self.proof()), wanted, report).await;
            let taken = taken.map_err(|error| self.not_fetched(error))?;
            for (name, pieces) in taken {
                task.log(format!("{pieces} pieces of the image came from {name}"));
            }
            task.detail("checking the image");
            match blocking(move || incoming.finish()).await? {
                Ok(image) => return Ok(image),
                Err(error @ StoreError::Damaged { .. }) if attempt == 0 => {
                    task.log(format!("{error}: fetching it once more"));
                }
                Err(error) => return Err(problem::store(&error)),
            }
        }
        Err(ApiProblem::new(ErrorCode::DamagedFile, "the image is damaged on this disk as soon as it is written"))
    }

    fn not_fetched(&self, error: FetchError) -> ApiProblem {
        const KEPT: &str = "try again: what is here already is kept";
        match error {
            FetchError::NoSource { liars, .. } if !liars.is_empty() => {
                let problem = ApiProblem::new(ErrorCode::Untrusted, "the image that is offered is not the clan's");
                let from = liars.join(", ");
                if self.way.member {
                    return problem.why(format!("a false one came from {from}, and no other machine gives it")).hint(
                        "tell an admin of the clan, and try again when other machines are there: `clan machines`",
                    );
                }
                problem
                    .why(format!("a false one came from {from}, and no other machine of the link gives it"))
                    .hint("tell whoever invited you, and ask for a link that another machine of the clan made")
            }
            FetchError::NoSource { last, .. } => {
                let problem = ApiProblem::new(ErrorCode::Unreachable, "the image could not be downloaded").hint(KEPT);
                match last {
                    Some(why) => problem.why(why),
                    None => problem,
                }
            }
            FetchError::Io { path, source } => problem::store(&StoreError::on_write(path, source)),
        }
    }
}

/// The manifest is what the clan published, and no image can be like this.
fn unusable(error: &ManifestError) -> ApiProblem {
    let problem = ApiProblem::new(ErrorCode::Untrusted, "the clan's image cannot be used").why(error.to_string());
    match error {
        ManifestError::NewerVersion(_) => problem.hint("update Clan on this computer, then try again"),
        _ => problem.hint("tell whoever invited you: an admin of the clan can publish another, `clan image publish`"),
    }
}
