//! Serves the image that this machine booted from to newcomers: the files are on its own read-only disks.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use clan_os::channel::{recv_message, send_message};
use clan_types::FileHash;
use clan_wire::{
    image::{FileRole, Manifest},
    peer::{ImagePart, ImageRequest, ImageResponse, MAX_MESSAGE},
};
use iroh::endpoint::{Connection, SendStream};
use tokio::time::timeout;

use crate::{
    core::{CoreHandle, now},
    net,
};

const CHUNK: usize = 256 << 10;
const REQUEST_LIMIT: Duration = Duration::from_secs(20);
/// A reader that takes nothing for this long is gone.
const STALL_LIMIT: Duration = Duration::from_secs(60);

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

    #[cfg(test)]
    pub(crate) fn at(root: &Path, layer: &Path, boot: &Path) -> Self {
        Self { root: root.into(), layer: layer.into(), boot: boot.into() }
    }

    /// Which disk holds a file of the image, and from which byte on.
    fn locate(&self, manifest: &Manifest, hash: &FileHash) -> Option<Extent> {
        let kernel = manifest.file(FileRole::Kernel).ok()?;
        let file = manifest.files.iter().find(|f| f.hash == *hash)?;
        let (disk, start) = match file.role {
            FileRole::Kernel => (&self.boot, 0),
            FileRole::Initramfs => (&self.boot, kernel.size.as_bytes()),
            FileRole::Root => (&self.root, 0),
            FileRole::Layer => (&self.layer, 0),
        };
        Some(Extent { disk: disk.clone(), start, size: file.size.as_bytes() })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Extent {
    disk: PathBuf,
    start: u64,
    size: u64,
}

/// Serves the parts of one image.
pub(crate) struct ImageServer {
    /// None on a machine that did not boot from an image.
    disks: Option<Disks>,
    manifest: Mutex<Option<(Vec<u8>, Manifest)>>,
}

impl ImageServer {
    pub(crate) fn new(disks: Option<Disks>) -> Self {
        Self { disks, manifest: Mutex::new(None) }
    }

    /// Says which image the disks hold. Bytes that are no manifest mean: none.
    pub(crate) fn set_manifest(&self, encoded: &[u8]) {
        let manifest = Manifest::decode(encoded, None).ok().filter(|_| self.disks.is_some());
        let manifest = manifest.map(|m| (encoded.to_vec(), m));
        *self.manifest.lock().unwrap_or_else(PoisonError::into_inner) = manifest;
    }

    fn locate(&self, manifest: &Manifest, hash: &FileHash) -> Option<Extent> {
        self.disks.as_ref()?.locate(manifest, hash)
    }

    pub(crate) async fn serve(self: Arc<Self>, connection: Connection, core: CoreHandle) {
        while let Ok(Ok((send, mut recv))) = timeout(STALL_LIMIT, connection.accept_bi()).await {
            let request = timeout(REQUEST_LIMIT, recv_message::<ImageRequest, _>(&mut recv, MAX_MESSAGE)).await;
            let Ok(Ok(request)) = request else { break };
            if self.answer(&connection, &core, request, send).await.is_none() {
                break;
            }
        }
    }

    async fn answer(
        &self,
        connection: &Connection,
        core: &CoreHandle,
        request: ImageRequest,
        mut send: SendStream,
    ) -> Option<()> {
        if !entitled(connection, core, &request) {
            send_message(&mut send, &ImageResponse::Denied, MAX_MESSAGE).await.ok()?;
            return send.finish().ok();
        }
        let held = self.manifest.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match (request.what, held) {
            (ImagePart::Manifest(id), Some((encoded, _))) if Manifest::id_of(&encoded) == id => {
                send_message(&mut send, &ImageResponse::Bytes(encoded.len() as u64), MAX_MESSAGE).await.ok()?;
                send.write_all(&encoded).await.ok()?;
            }
            (ImagePart::File { hash, offset }, Some((_, manifest))) => match self.locate(&manifest, &hash) {
                Some(extent) if offset <= extent.size => {
                    send_message(&mut send, &ImageResponse::Bytes(extent.size - offset), MAX_MESSAGE).await.ok()?;
                    stream(&extent, offset, &mut send).await?;
                }
                _ => send_message(&mut send, &ImageResponse::NotFound, MAX_MESSAGE).await.ok()?,
            },
            _ => send_message(&mut send, &ImageResponse::NotFound, MAX_MESSAGE).await.ok()?,
        }
        send.finish().ok()
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

async fn stream(extent: &Extent, offset: u64, send: &mut SendStream) -> Option<()> {
    let disk = Arc::new(open(&extent.disk)?);
    let (mut at, end) = (extent.start + offset, extent.start + extent.size);
    while at < end {
        let want = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
        let (disk, from) = (disk.clone(), at);
        let chunk = tokio::task::spawn_blocking(move || {
            let mut chunk = vec![0; want];
            disk.read_exact_at(&mut chunk, from).map(|()| chunk)
        });
        let chunk = match chunk.await.ok()? {
            Ok(chunk) => chunk,
            Err(error) => {
                tracing::warn!(disk = %extent.disk.display(), %error, "cannot read this machine's own image");
                return None;
            }
        };
        timeout(STALL_LIMIT, send.write_all(&chunk)).await.ok()?.ok()?;
        at += want as u64;
    }
    Some(())
}

fn open(disk: &Path) -> Option<File> {
    File::open(disk)
        .map_err(|error| tracing::warn!(disk = %disk.display(), %error, "cannot open this machine's own image"))
        .ok()
}

#[cfg(test)]
mod tests {
    use clan_types::ByteSize;
    use clan_wire::image::ImageFile;

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
        let of = |hash| disks.locate(&manifest, &FileHash::from_bytes([hash; 32]));
        assert_eq!(of(2), Some(Extent { disk: "/dev/vdd".into(), start: 1000, size: 500 }));
        assert_eq!(of(3), Some(Extent { disk: "/dev/vda".into(), start: 0, size: 70 }));
        assert_eq!(of(9), None, "a hash that the manifest does not name is not served");
    }
}
