//! The image for a new clan: built here, unless it is here already.

use clan_api::ApiProblem;
use clan_build::{Builder, Progress, Recipe, StoredImage};

use crate::{manager::Shared, problem, tasks::TaskHandle};

/// The image of the present recipe.
pub(crate) async fn default_image(shared: &Shared, task: &TaskHandle) -> Result<StoredImage, ApiProblem> {
    let options = &shared.options;
    let builder = Builder {
        cache_dir: shared.paths.cache(),
        store: shared.images.clone(),
        proxy: options.proxy.clone(),
        mirror: options.mirror.clone(),
    };
    let recipe = Recipe::default_debian(&options.clan_executable, &options.agent_executable);
    // Two tasks share one build: the second finds its result.
    let _one = shared.building.lock().await;
    let reporter = task.clone();
    let progress = move |progress: Progress| {
        match progress.fraction {
            Some(fraction) => {
                reporter.detail(format!("{} ({} %)", progress.step, (fraction.clamp(0.0, 1.0) * 100.0) as u32))
            }
            None if progress.line.is_none() => reporter.detail(progress.step.to_string()),
            None => {}
        }
        if let Some(line) = progress.line {
            reporter.log(line);
        }
    };
    let id = builder.build(&recipe, progress, task.cancel_token()).await.map_err(|e| problem::build(&e))?;
    shared.images.get(&id).ok_or_else(|| problem::store(&clan_build::StoreError::Unknown(id)))
}
