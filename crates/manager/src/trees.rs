//! Images, unpacked for containers: an ordinary user cannot mount them. Each file of an image once, by its hash.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc};

use clan_api::ApiProblem;
use clan_build::StoredImage;
use clan_types::FileHash;
use clan_vm::container;
use clan_wire::image::FileRole;

use crate::{disk, problem};

/// The folder that they are in.
#[derive(Debug, Clone)]
pub(crate) struct Trees {
    dir: PathBuf,
    /// Held while a tree comes or goes.
    one: Arc<tokio::sync::Mutex<()>>,
}

impl Trees {
    pub(crate) fn open(dir: PathBuf) -> Self {
        Self { dir, one: Arc::default() }
    }

    /// What a container's root is made of, the topmost first; unpacked if need be, which takes a second.
    pub(crate) async fn layers(&self, image: &StoredImage) -> Result<Vec<PathBuf>, ApiProblem> {
        let _one = self.one.lock().await;
        disk::create_dir(&self.dir).map_err(|e| problem::disk(&e))?;
        let mut layers = Vec::new();
        for file in image.manifest.files.iter().filter(|file| is_layer(file.role)) {
            let tree = self.dir.join(file.hash.to_string());
            container::unpack(&image.path(file.role), &tree).await.map_err(|e| problem::vm(&e))?;
            layers.push((file.role, tree));
        }
        // Layers lie above the root.
        layers.sort_by_key(|(role, _)| *role == FileRole::Root);
        Ok(layers.into_iter().map(|(_, tree)| tree).collect())
    }

    /// Whether a file of an image is unpacked already.
    pub(crate) fn has(&self, file: &FileHash) -> bool {
        self.dir.join(file.to_string()).is_dir()
    }

    /// Removes what none of these images needs.
    pub(crate) async fn keep(&self, images: &[StoredImage]) {
        let _one = self.one.lock().await;
        let files = images.iter().flat_map(|image| &image.manifest.files).filter(|file| is_layer(file.role));
        let kept: BTreeSet<String> = files.map(|file| file.hash.to_string()).collect();
        for tree in disk::list(&self.dir) {
            let name = tree.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if !kept.contains(name)
                && let Err(error) = container::remove(&tree).await
            {
                tracing::warn!(tree = %tree.display(), %error, "an unpacked image stays on disk");
            }
        }
    }
}

fn is_layer(role: FileRole) -> bool {
    matches!(role, FileRole::Root | FileRole::Layer)
}
