//! Serves the image that this machine booted from to newcomers: the files are on its own read-only disks.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use clan_transfer::{Extent, Held};
use clan_wire::{
    image::{FileRole, ImageFile, Manifest},
    peer::ImageRequest,
};
use iroh::endpoint::Connection;

use crate::{
    core::{CoreHandle, now},
    net,
};

/// Where the parts of the running image lie on this machine.
#[derive(Debug, Clone)]
pub(crate) struct Disks {
    root: PathBuf,
    layer: PathBuf,
    /// Kernel, then initramfs.
    boot: PathBuf,
}

impl Disks {
    /// As the manager attaches them to a VM.
    pub(crate) fn of_this_machine() -> Self {
        Self { root: "/dev/vda".into(), layer: "/dev/vdb".into(), boot: "/dev/vdd".into() }
    }

    /// As the manager shows them to a container.
    pub(crate) fn of_this_container() -> Self {
        Self::at(Path::new("/run/image/root"), Path::new("/run/image/layer"), Path::new("/run/image/boot"))
    }

    pub(crate) fn at(root: &Path, layer: &Path, boot: &Path) -> Self {
        Self { root: root.into(), layer: layer.into(), boot: boot.into() }
    }

    /// Which disk holds a file of the image, and from which byte on.
    fn locate(&self, manifest: &Manifest, file: &ImageFile) -> Option<Extent> {
        let kernel = manifest.file(FileRole::Kernel).ok()?;
        let (disk, start) = match file.role {
            FileRole::Kernel => (&self.boot, 0),
            FileRole::Initramfs => (&self.boot, kernel.size.as_bytes()),
            FileRole::Root => (&self.root, 0),
            FileRole::Layer => (&self.layer, 0),
        };
        Some(Extent { path: disk.clone(), start })
    }
}

/// Serves the parts of one image.
pub(crate) struct ImageServer {
    /// None on a machine that did not boot from an image.
    disks: Option<Disks>,
    held: Mutex<Option<Arc<Held>>>,
}

impl ImageServer {
    pub(crate) fn new(disks: Option<Disks>) -> Self {
        Self { disks, held: Mutex::new(None) }
    }

    /// Says which image the disks hold, and the hashes of its pieces. Bytes that are no manifest mean: none.
    pub(crate) fn set_manifest(&self, encoded: &[u8], pieces: &[u8]) {
        let held = self.disks.as_ref().and_then(|disks| {
            let held = Held::new(encoded, pieces, |manifest, file| disks.locate(manifest, file));
            held.map(Arc::new).inspect_err(|error| tracing::debug!(%error, "no image is served")).ok()
        });
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = held;
    }

    pub(crate) async fn serve(self: Arc<Self>, connection: Connection, core: CoreHandle) {
        let held = || self.held.lock().unwrap_or_else(PoisonError::into_inner).clone();
        clan_transfer::serve(connection, held, |connection, request| entitled(connection, &core, request)).await;
    }
}

/// Machines of the clan may have the image, and whoever holds an invite that still works.
fn entitled(connection: &Connection, core: &CoreHandle, request: &ImageRequest) -> bool {
    let (endpoint, view) = (net::machine_of(connection), core.view());
    view.state.machine_in_good_standing(&endpoint).is_some()
        || request.proof.as_ref().is_some_and(|proof| {
            proof.is_valid(&view.clan, &endpoint)
                && clan_replica::check_invite(&view.state, &proof.invite, now()).is_ok()
        })
}

#[cfg(test)]
mod tests {
    use clan_types::{ByteSize, FileHash};

    use super::*;

    fn file(role: FileRole, size: u64, hash: u8) -> ImageFile {
        ImageFile { role, size: ByteSize::from_bytes(size), hash: FileHash::from_bytes([hash; 32]) }
    }

    #[test]
    fn kernel_and_initramfs_lie_one_after_the_other_on_the_boot_disk() {
        let manifest = Manifest {
            version: 1,
            title: "test".into(),
            architecture: "x86_64".into(),
            inputs: FileHash::from_bytes([0; 32]),
            memory_min: ByteSize::from_mib(1),
            files: vec![
                file(FileRole::Kernel, 1000, 1),
                file(FileRole::Initramfs, 500, 2),
                file(FileRole::Root, 70, 3),
            ],
        };
        let disks = Disks::of_this_machine();
        let of = |role| disks.locate(&manifest, manifest.file(role).unwrap());
        assert_eq!(of(FileRole::Kernel), Some(Extent { path: "/dev/vdd".into(), start: 0 }));
        assert_eq!(of(FileRole::Initramfs), Some(Extent { path: "/dev/vdd".into(), start: 1000 }));
        assert_eq!(of(FileRole::Root), Some(Extent { path: "/dev/vda".into(), start: 0 }));
    }
}
