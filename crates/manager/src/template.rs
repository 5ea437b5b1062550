//! Templates: the state of a guest right before it makes its first secret, from which others of its image go on.
//!
//! The first guest of an image leaves one behind in passing: it boots as far as the gate ([`clan_wire::agent::GATE`]), is
//! paused, saved with its disk, and goes on. A later one begins with a copy of that disk, at the gate, and need not boot.
//! What must differ is renewed before the gate opens.
//!
//! INVARIANT: until its template is complete, nobody has told a guest anything but to make itself ready for it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use clan_os::channel::Channel;
use clan_types::{ByteSize, ImageId};
use clan_vm::{AccelKind, Qemu, Vm, VmError, copy_data_disk};
use clan_wire::agent::{AgentRequest, AgentResponse, ENTROPY, Renewal};
use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use crate::{
    disk::{self, DiskError},
    guest::{self, GuestError},
    record::{ClanRecord, random},
    tasks::now,
};

/// Change this when an older template shall not be used any more.
const FORMAT: u32 = 1;
const STAGING: &str = ".new-";
/// From the start of a guest until its controller waits at the gate and the system has settled.
const LIMIT: Duration = Duration::from_secs(90);
const ASK_AGAIN: Duration = Duration::from_millis(250);
/// A guest that uses less than a tenth of a processor for so long has settled.
const QUIET: Duration = Duration::from_millis(500);
/// Beside the guest's memory, so much stays free on the disk.
const DISK_RESERVE: ByteSize = ByteSize::from_mib(512);
/// Templates are a convenience: the newest few are kept.
const KEPT: usize = 2;

/// The templates of a data directory: `<dir>/<name>/{template.json,state,data.ext4}`.
#[derive(Debug, Clone)]
pub(crate) struct Templates {
    dir: PathBuf,
}

/// What a template is of; for anything else, another is needed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Kind {
    format: u32,
    image: ImageId,
    memory: ByteSize,
    cpus: u8,
    disk: ByteSize,
    accelerator: AccelKind,
    /// Which QEMU.
    qemu: String,
    /// With hardware acceleration, the guest has seen the processor.
    processor: Option<String>,
}

impl Kind {
    /// What the clan's VM would need.
    ///
    /// INVARIANT: nothing of a VM whose disk is encrypted is saved in the clear, so it neither leaves a template nor begins with one.
    pub(crate) fn of(record: &ClanRecord, accelerator: AccelKind, qemu: &Qemu) -> Option<Self> {
        if record.encrypted {
            return None;
        }
        Some(Self {
            format: FORMAT,
            image: record.image?,
            memory: record.memory,
            cpus: record.cpus,
            disk: record.disk,
            accelerator,
            qemu: qemu.fingerprint().ok()?,
            processor: (accelerator == AccelKind::Kvm).then(processor),
        })
    }

    fn name(&self) -> Option<String> {
        let bytes = serde_json::to_vec(self).ok()?;
        Some(HEXLOWER.encode(&blake3::derive_key("clan 2026-11 template", &bytes)[..16]))
    }
}

/// What of the processor a guest may depend on: kernel, model, features.
fn processor() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let first = info.split("\n\n").next().unwrap_or_default();
    let told = first.lines().filter(|l| ["model name", "microcode", "flags"].iter().any(|key| l.starts_with(key)));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    HEXLOWER.encode(&blake3::hash([kernel.trim(), &told.collect::<String>()].concat().as_bytes()).as_bytes()[..16])
}

/// A complete template.
#[derive(Debug, Clone)]
pub(crate) struct Template {
    pub(crate) name: String,
    dir: PathBuf,
}

impl Template {
    /// The guest's state, for [`clan_vm::Begin::Saved`].
    pub(crate) fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// The disk that belongs to it.
    pub(crate) fn data_disk(&self) -> PathBuf {
        self.dir.join("data.ext4")
    }
}

/// A template in the making; what is left of it goes when this is dropped.
#[derive(Debug)]
pub(crate) struct Staging {
    kind: Kind,
    name: String,
    dir: PathBuf,
    templates: Templates,
}

impl Staging {
    /// Where the guest's state goes.
    pub(crate) fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// Puts it in its place with a copy of the disk, which nobody writes to now. Blocks on the disk.
    pub(crate) fn commit(self, data_disk: &Path) -> Result<(), LeaveError> {
        copy_data_disk(data_disk, &self.dir.join("data.ext4"))?;
        fs::File::open(self.state()).and_then(|f| f.sync_all()).map_err(|source| DiskError::Io {
            action: "write",
            path: self.state(),
            source,
        })?;
        disk::write_json(&self.dir.join("template.json"), &self.kind)?;
        let place = self.templates.dir.join(&self.name);
        if !place.exists() {
            disk::rename_dir(&self.dir, &place)?;
        }
        self.templates.trim();
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After the commit there is nothing of this name.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Why a guest leaves no template behind. It goes on all the same.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LeaveError {
    #[error("its controller did not wait, or its system did not settle, within {} s: {why}", LIMIT.as_secs())]
    NotReady { why: String },
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error("its disk was not copied")]
    Copy,
}

impl Templates {
    /// Those in a directory, without what an interrupted manager left.
    pub(crate) fn open(dir: PathBuf) -> Self {
        for path in disk::list(&dir) {
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(STAGING)) {
                let _ = fs::remove_dir_all(path);
            }
        }
        Self { dir }
    }

    /// Where they are.
    #[cfg(test)]
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// A template of a kind.
    pub(crate) fn find(&self, kind: &Kind) -> Option<Template> {
        let name = kind.name()?;
        let dir = self.dir.join(&name);
        let found: Kind = disk::read_json(&dir.join("template.json")).ok()??;
        (found == *kind).then_some(Template { name, dir })
    }

    /// Begins a template, unless there is one or no room for it.
    pub(crate) fn begin(&self, kind: Kind) -> Option<Staging> {
        if self.find(&kind).is_some() {
            return None;
        }
        let name = kind.name()?;
        disk::create_dir(&self.dir).ok()?;
        let free = rustix::fs::statvfs(&self.dir).ok().map(|s| s.f_bavail.saturating_mul(s.f_frsize))?;
        if free < kind.memory.as_bytes().saturating_add(DISK_RESERVE.as_bytes()) {
            tracing::debug!("no room on the disk for a template");
            return None;
        }
        let unique = HEXLOWER.encode(&random::<8>(&self.dir).ok()?);
        let dir = self.dir.join(format!("{STAGING}{unique}"));
        disk::create_dir(&dir).ok()?;
        Some(Staging { kind, name, dir, templates: self.clone() })
    }

    /// Removes one that proved to be of no use.
    pub(crate) fn remove(&self, name: &str) {
        if let Err(error) = fs::remove_dir_all(self.dir.join(name))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "a template that is of no use cannot be removed");
        }
    }

    /// All, the newest first.
    fn all(&self) -> Vec<(PathBuf, Kind)> {
        let mut all: Vec<_> = disk::list(&self.dir)
            .into_iter()
            .filter_map(|dir| {
                let made = fs::metadata(dir.join("template.json")).ok()?.modified().ok()?;
                Some((made, disk::read_json(&dir.join("template.json")).ok()??, dir))
            })
            .collect();
        all.sort_by_key(|(made, ..)| std::cmp::Reverse(*made));
        all.into_iter().map(|(_, kind, dir)| (dir, kind)).collect()
    }

    /// Whether there is one of an image.
    pub(crate) fn has_image(&self, image: &ImageId) -> bool {
        self.all().iter().any(|(_, kind)| kind.image == *image)
    }

    fn trim(&self) {
        for (dir, _) in self.all().into_iter().skip(KEPT) {
            let _ = fs::remove_dir_all(dir);
        }
    }

    /// Removes those of other images than these.
    pub(crate) fn keep_images(&self, keep: impl Fn(&ImageId) -> bool) {
        for (dir, _) in self.all().into_iter().filter(|(_, kind)| !keep(&kind.image)) {
            let _ = fs::remove_dir_all(dir);
        }
    }
}

/// Has a guest that waits at the gate leave its template behind. It goes on, whatever came of it.
pub(crate) async fn leave(vm: &Vm, agent: &Channel, staging: Staging, data_disk: &Path) {
    let began = Instant::now();
    let left = try_leave(vm, agent, staging, data_disk).await;
    if vm.is_paused().await.is_ok_and(|paused| paused)
        && let Err(error) = vm.resume().await
    {
        tracing::error!(%error, "the VM was paused for a template, and does not go on");
    }
    match left {
        Ok(()) => tracing::info!(seconds = began.elapsed().as_secs(), "kept a template: the next VM starts at once"),
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            tracing::info!(error, "no template was kept: the next VM boots");
        }
    }
}

async fn try_leave(vm: &Vm, agent: &Channel, staging: Staging, data_disk: &Path) -> Result<(), LeaveError> {
    let deadline = Instant::now() + LIMIT;
    sealed(agent, deadline).await?;
    settled(vm, deadline).await?;
    // What the system wrote while it settled.
    sealed(agent, deadline).await?;
    vm.save(&staging.state()).await?;
    let data_disk = data_disk.to_owned();
    let committed = crate::fetch::blocking(move || staging.commit(&data_disk)).await;
    committed.map_err(|_| LeaveError::Copy)?
}

async fn sealed(agent: &Channel, deadline: Instant) -> Result<(), LeaveError> {
    loop {
        match guest::ask_agent(agent, &AgentRequest::Seal, guest::PATIENCE).await {
            Ok(AgentResponse::Done) => return Ok(()),
            Ok(_) => return Err(GuestError::Unexpected { what: "make ready for a template" }.into()),
            Err(GuestError::Failed { why, .. }) if Instant::now() > deadline => {
                return Err(LeaveError::NotReady { why });
            }
            Err(GuestError::Failed { .. }) => sleep(ASK_AGAIN).await,
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits until the guest does next to nothing.
async fn settled(vm: &Vm, deadline: Instant) -> Result<(), LeaveError> {
    let mut before = vm.host_stats()?.cpu_time;
    loop {
        sleep(QUIET).await;
        let now = vm.host_stats()?.cpu_time;
        if now.saturating_sub(before) < QUIET / 10 {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(LeaveError::NotReady { why: "it is busy".into() });
        }
        before = now;
    }
}

/// Makes a guest differ from every other that came from the same template; of one that booted, sets the clock.
pub(crate) async fn renew(agent: &Channel) {
    let mut entropy = vec![0; ENTROPY];
    if getrandom::fill(&mut entropy).is_err() {
        tracing::error!("no random numbers: the guest stays where it is");
        return;
    }
    let request = AgentRequest::Renew(Renewal { now: now(), entropy }.into());
    match guest::ask_agent(agent, &request, guest::PATIENCE).await {
        Ok(_) => {}
        // One of an older image does not know how, and has nothing to renew.
        Err(GuestError::Message { .. }) => {
            if let Err(error) = guest::ask_agent(agent, &AgentRequest::SetClock(now()), guest::PATIENCE).await {
                tracing::debug!(%error, "the guest's clock was not set");
            }
        }
        Err(error) => tracing::warn!(%error, "the guest was not renewed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(n: u8) -> Kind {
        Kind {
            format: FORMAT,
            image: ImageId::from_bytes([n; 32]),
            memory: ByteSize::from_mib(1),
            cpus: 1,
            disk: ByteSize::from_mib(64),
            accelerator: AccelKind::Tcg,
            qemu: "/qemu 1 2".into(),
            processor: None,
        }
    }

    /// A template of a few bytes.
    fn put(templates: &Templates, kind: Kind, data_disk: &Path) {
        let staging = templates.begin(kind).unwrap();
        fs::write(staging.state(), "state").unwrap();
        staging.commit(data_disk).unwrap();
    }

    #[test]
    fn a_template_is_found_for_its_kind_only() {
        let dir = tempfile::tempdir().unwrap();
        let data_disk = dir.path().join("disk");
        fs::write(&data_disk, "disk").unwrap();
        let templates = Templates::open(dir.path().join("templates"));
        assert!(templates.find(&kind(1)).is_none());
        put(&templates, kind(1), &data_disk);
        let found = templates.find(&kind(1)).unwrap();
        assert_eq!(fs::read(found.state()).unwrap(), b"state");
        assert_eq!(fs::read(found.data_disk()).unwrap(), b"disk");
        assert!(templates.begin(kind(1)).is_none(), "one is enough");
        let others = [
            Kind { memory: ByteSize::from_mib(2), ..kind(1) },
            Kind { qemu: "/qemu 1 3".into(), ..kind(1) },
            Kind { accelerator: AccelKind::Kvm, ..kind(1) },
            Kind { format: FORMAT + 1, ..kind(1) },
        ];
        for other in others {
            assert!(templates.find(&other).is_none(), "{other:?}");
        }
        templates.remove(&found.name);
        assert!(templates.find(&kind(1)).is_none());
    }

    #[test]
    fn what_is_not_finished_is_no_template_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let templates = Templates::open(dir.path().join("templates"));
        let staging = templates.begin(kind(1)).unwrap();
        fs::write(staging.state(), "half").unwrap();
        assert!(templates.find(&kind(1)).is_none());
        // As if the manager was killed.
        std::mem::forget(staging);
        assert_eq!(disk::list(&dir.path().join("templates")).len(), 1);
        Templates::open(dir.path().join("templates"));
        assert_eq!(disk::list(&dir.path().join("templates")).len(), 0);
        drop(templates.begin(kind(1)).unwrap());
        assert_eq!(disk::list(&dir.path().join("templates")).len(), 0);
    }

    #[test]
    fn few_are_kept_and_none_of_images_that_are_gone() {
        let dir = tempfile::tempdir().unwrap();
        let data_disk = dir.path().join("disk");
        fs::write(&data_disk, "disk").unwrap();
        let templates = Templates::open(dir.path().join("templates"));
        for n in 1..=3 {
            put(&templates, kind(n), &data_disk);
        }
        assert_eq!(templates.all().len(), KEPT);
        templates.keep_images(|image| *image == ImageId::from_bytes([3; 32]));
        assert!(templates.all().iter().all(|(_, kind)| kind.image == ImageId::from_bytes([3; 32])));
    }
}
