//! The images on this computer: which there are, whether they are whole, and removing those that nobody needs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::Arc,
};

use clan_api::{ApiProblem, ErrorCode, ImageGc, ImageInfo, TaskKind, TaskResult};
use clan_build::{StoreError, StoredImage};
use clan_types::{ByteSize, ClanName, ImageId};

use crate::{disk, fetch::blocking, image, manager::Shared, problem, tasks::Task};

/// Fewer characters of an id do not name anything.
const LEAST_PREFIX: usize = 4;

/// Which clans' VMs run which images.
fn users(shared: &Shared) -> BTreeMap<ImageId, Vec<ClanName>> {
    let mut users: BTreeMap<ImageId, Vec<ClanName>> = BTreeMap::new();
    for clan in shared.clans() {
        let record = clan.record.get();
        // A VM that tries an image may go back to the one before.
        let trial = record.trial.map(|trial| trial.previous);
        // What those who steer a machine change, they can take back.
        let previous = record.previous.filter(|_| record.control.is_for_admins());
        for image in record.image.into_iter().chain(trial).chain(previous) {
            users.entry(image).or_default().push(record.name.clone());
        }
    }
    users
}

/// All images, by id.
pub(crate) async fn list(shared: &Arc<Shared>) -> Result<Vec<ImageInfo>, ApiProblem> {
    let users = users(shared);
    let (images, templates) = (shared.images.clone(), shared.templates.clone());
    blocking(move || {
        let info = |image: StoredImage| ImageInfo {
            used: ByteSize::from_bytes(files(&image.dir).into_values().sum()),
            title: image.manifest.title.chars().filter(|c| !c.is_control()).take(100).collect(),
            memory_min: image.manifest.memory_min,
            clans: users.get(&image.id).cloned().unwrap_or_default(),
            template: templates.has_image(&image.id),
            id: image.id,
        };
        images.list().into_iter().map(info).collect()
    })
    .await
}

/// The files of a directory, by device and number, with the bytes that they take. A file that has another name elsewhere takes
/// its room once.
fn files(dir: &Path) -> BTreeMap<(u64, u64), u64> {
    let metas = disk::list(dir).into_iter().filter_map(|path| fs::symlink_metadata(path).ok());
    metas.filter(fs::Metadata::is_file).map(|m| ((m.dev(), m.ino()), m.blocks().saturating_mul(512))).collect()
}

/// The image with an id, or a unique beginning of one.
pub(crate) fn find(shared: &Shared, text: &str) -> Result<StoredImage, ApiProblem> {
    let wanted = text.to_ascii_lowercase();
    let all = shared.images.list();
    let mut begins = all.iter().filter(|i| wanted.len() >= LEAST_PREFIX && i.id.to_string().starts_with(&wanted));
    match (begins.next(), begins.next()) {
        (Some(image), None) => Ok(image.clone()),
        (Some(_), Some(_)) => {
            Err(ApiProblem::new(ErrorCode::Ambiguous, "more than one image's id begins like this")
                .hint("give more of it"))
        }
        (None, _) => Err(ApiProblem::new(ErrorCode::NotFound, "there is no such image on this computer")
            .hint("see which there are: `clan image list`")),
    }
}

/// Builds the image that a clan founded now would run, as a task; at once if it is there.
pub(crate) fn build_task(shared: &Arc<Shared>) -> Arc<Task> {
    let shared_ = shared.clone();
    let title = "Build the image".to_owned();
    shared.tasks.spawn(TaskKind::BuildImage, title.clone(), None, &[&title], move |task| async move {
        task.begin(0);
        let image = task.unless_cancelled(image::default_image(&shared_, &task)).await?;
        Ok(TaskResult::Image { id: image.id })
    })
}

/// An image is not as its name says, or cannot be read: how it is made or fetched anew.
pub(crate) fn not_whole(shared: &Shared, image: &ImageId, error: &StoreError) -> ApiProblem {
    let problem = problem::store(error);
    match error {
        StoreError::Damaged { .. } | StoreError::Manifest(_) => {}
        _ => return problem,
    }
    let anew = "`clan image gc` removes it; then `clan image build` makes, or `clan vm update` fetches it anew";
    match users(shared).get(image) {
        // Nothing that a machine runs is ever removed.
        Some(clans) => {
            let names: Vec<&str> = clans.iter().map(ClanName::as_str).collect();
            let first = format!(
                "give the machine of {} another image first, `clan vm update --image ID`: what one runs is not removed",
                names.join(" and that of ")
            );
            problem.hint(first).hint(format!("after that {anew}"))
        }
        None => problem.hint(anew),
    }
}

/// Reads every file of an image and compares it with what the image's name says, as a task.
pub(crate) fn verify_task(shared: &Arc<Shared>, text: &str) -> Result<Arc<Task>, ApiProblem> {
    let image = find(shared, text)?;
    let shared_ = shared.clone();
    let title = format!("Verify the image {}", image.id.short());
    Ok(shared.tasks.spawn(TaskKind::VerifyImage, title, None, &["Read every file"], move |task| async move {
        task.begin(0);
        let (images, id) = (shared_.images.clone(), image.id);
        let verified = task.unless_cancelled(blocking(move || images.verify(&id))).await?;
        verified.map_err(|e| not_whole(&shared_, &id, &e))?;
        Ok(TaskResult::Image { id })
    }))
}

/// Removes the images that no VM here runs, with their templates, or says which.
pub(crate) async fn gc(shared: &Arc<Shared>, dry_run: bool) -> Result<ImageGc, ApiProblem> {
    // INVARIANT: nobody founds or joins meanwhile, so that what is in use now stays all there is.
    let _none = shared.admission.lock().await;
    let _built = shared.building.try_lock().map_err(|_| {
        ApiProblem::new(ErrorCode::Conflict, "an image is being built").hint("wait for that task, or cancel it")
    })?;
    if let Some(task) = shared.tasks.list().into_iter().find(|t| !t.state.is_final() && needs_images(t.kind)) {
        return Err(ApiProblem::new(ErrorCode::Conflict, format!("a task may need images: {}", task.title))
            .hint("wait for it, or cancel it"));
    }
    let keep: Vec<ImageId> = users(shared).into_keys().collect();
    let (images, templates) = (shared.images.clone(), shared.templates.clone());
    if !dry_run {
        shared.keep_trees().await;
    }
    blocking(move || {
        let (kept, doomed): (Vec<_>, Vec<_>) = images.list().into_iter().partition(|image| keep.contains(&image.id));
        let shared_files: BTreeSet<_> = kept.iter().flat_map(|i| files(&i.dir).into_keys()).collect();
        let broken_off = images.left_over();
        let going = doomed.iter().map(|i| &i.dir).chain(&broken_off);
        let going: BTreeMap<_, _> = going.flat_map(|dir| files(dir)).collect();
        let freed = going.into_iter().filter(|(file, _)| !shared_files.contains(file)).map(|(_, size)| size);
        let freed = ByteSize::from_bytes(freed.sum());
        let removed: Vec<ImageId> = doomed.iter().map(|i| i.id).collect();
        if !dry_run {
            // First what cannot be used without them.
            templates.keep_images(|id| keep.contains(id));
            images.gc(&keep).map_err(|e| problem::store(&e))?;
        }
        Ok(ImageGc { removed, unfinished: u32::try_from(broken_off.len()).unwrap_or(u32::MAX), freed })
    })
    .await?
}

fn needs_images(kind: TaskKind) -> bool {
    matches!(
        kind,
        TaskKind::CreateClan | TaskKind::JoinClan | TaskKind::UpdateVm | TaskKind::BuildImage | TaskKind::VerifyImage
    )
}

#[cfg(test)]
mod tests {
    use clan_build::Damage;

    use super::*;
    use crate::record::{ClanRecord, Phase, tests};

    #[tokio::test]
    async fn whoever_has_a_damaged_image_is_told_what_can_be_done_about_it() {
        let dir = tempfile::tempdir().unwrap();
        let shared = Shared::for_tests(dir.path());
        let id = ImageId::from_bytes([3; 32]);
        let error = StoreError::Damaged { image: id, file: "root".into(), damage: Damage::Content };
        insta::assert_snapshot!(
            not_whole(&shared, &id, &error).hints.join("\n"),
            @"`clan image gc` removes it; then `clan image build` makes, or `clan vm update` fetches it anew"
        );
        let record = ClanRecord { image: Some(id), ..tests::record(1, Phase::Ready) };
        tests::put(&shared.paths, &record, None);
        shared.adopt(record).unwrap();
        insta::assert_snapshot!(not_whole(&shared, &id, &error).hints.join("\n"), @r"
        give the machine of family another image first, `clan vm update --image ID`: what one runs is not removed
        after that `clan image gc` removes it; then `clan image build` makes, or `clan vm update` fetches it anew
        ");
        let unread = StoreError::Unknown(id);
        assert!(not_whole(&shared, &id, &unread).hints.is_empty());
    }
}
