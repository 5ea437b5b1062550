//! Snapshots of data disks: `<clan>/snapshots/<name>/{snapshot.json,data.ext4}`.
//!
//! A snapshot is of the disk only. One of a running guest is as after a power cut right after everything was written out:
//! the guest's file system is made for that. A copy of an encrypted disk is encrypted as the disk is, and no copy has the guest's
//! memory.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clan_api::{ApiProblem, ErrorCode, SnapshotInfo, TaskKind};
use clan_types::{ByteSize, ImageId, Timestamp};
use clan_vm::{Vm, copy_data_disk};
use clan_wire::agent::AgentRequest;
use serde::{Deserialize, Serialize};

use crate::{
    clan::Clan,
    disk,
    fetch::blocking,
    guest,
    leave::{is_vm, start, vm_task},
    lock, machine,
    manager::Shared,
    paths::ClanPaths,
    problem,
    record::Phase,
    tasks::{Task, now},
};

const FOLDER: &str = "snapshots";
const STAGING: &str = ".new-";
/// Beside the data disk, while it is put in its place.
const RESTORING: &str = "data.ext4.restoring";
const MAX_SNAPSHOTS: usize = 32;
/// For the guest to write out what it has.
const SYNC: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Snapshot {
    made: Timestamp,
    image: Option<ImageId>,
    running: bool,
}

fn folder(clan: &Clan) -> PathBuf {
    clan.record.paths().dir.join(FOLDER)
}

/// INVARIANT: a name stays within its folder.
fn checked(name: &str) -> Result<&str, ApiProblem> {
    let usual = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.len() > 40 || !name.chars().all(usual) || name.starts_with('-') || name.ends_with('-') {
        return Err(ApiProblem::new(ErrorCode::BadRequest, "this is no name for a snapshot")
            .why("a name is up to 40 of a-z, 0-9 and inner hyphens"));
    }
    Ok(name)
}

/// The snapshots of a clan's VM, oldest first.
pub(crate) fn list(clan: &Clan) -> Vec<SnapshotInfo> {
    let mut all: Vec<_> = disk::list(&folder(clan)).iter().filter_map(|dir| info(clan, dir)).collect();
    all.sort_by_key(|s| (s.made, s.name.clone()));
    all
}

fn info(clan: &Clan, dir: &Path) -> Option<SnapshotInfo> {
    let name = checked(dir.file_name()?.to_str()?).ok()?.to_owned();
    let snapshot: Snapshot = disk::read_json(&dir.join("snapshot.json")).ok()??;
    let data = dir.join("data.ext4");
    let meta = fs::metadata(&data).ok()?;
    // One that is damaged is listed all the same: only what is on it is unknown.
    let beside = lock::overhead(clan, &data).unwrap_or_default();
    Some(SnapshotInfo {
        name,
        made: snapshot.made,
        size: ByteSize::from_bytes(meta.len().saturating_sub(beside.as_bytes())),
        used: ByteSize::from_bytes(meta.blocks().saturating_mul(512)),
        image: snapshot.image,
        running: snapshot.running,
    })
}

/// The files of all copies, each with its name.
pub(crate) fn disks(clan: &Clan) -> Vec<(String, PathBuf)> {
    list(clan).into_iter().map(|s| (s.name.clone(), folder(clan).join(s.name).join("data.ext4"))).collect()
}

fn find(clan: &Clan, name: &str) -> Result<SnapshotInfo, ApiProblem> {
    let known = list(clan);
    known.iter().find(|s| s.name == name).cloned().ok_or_else(|| {
        let problem = ApiProblem::new(ErrorCode::NotFound, "there is no such snapshot of this VM");
        match known.as_slice() {
            [] => problem.hint("make one: `clan vm snapshot`"),
            some => {
                let names: Vec<&str> = some.iter().map(|s| s.name.as_str()).collect();
                problem.hint(format!("there is: {}", names.join(", ")))
            }
        }
    })
}

fn check_ready(clan: &Clan) -> Result<(), ApiProblem> {
    is_vm(clan, "stop")?;
    if clan.record.get().phase != Phase::Ready {
        return Err(ApiProblem::new(ErrorCode::Conflict, "the VM is being made or removed").hint("wait for that task"));
    }
    Ok(())
}

/// Makes a snapshot, as a task.
pub(crate) fn make_task(shared: &Arc<Shared>, clan: Arc<Clan>, name: Option<String>) -> Result<Arc<Task>, ApiProblem> {
    check_ready(&clan)?;
    let name = name.unwrap_or_else(|| format!("at-{}", now().as_millis() / 1000));
    checked(&name)?;
    let known = list(&clan);
    if known.iter().any(|s| s.name == name) {
        return Err(ApiProblem::new(ErrorCode::Conflict, format!("there is a snapshot `{name}` already"))
            .hint("choose another name, or discard that one: `clan vm discard`"));
    }
    if known.len() >= MAX_SNAPSHOTS {
        return Err(ApiProblem::new(ErrorCode::Conflict, format!("this VM has {MAX_SNAPSHOTS} snapshots already"))
            .hint("discard one: `clan vm discard`"));
    }
    vm_task(shared, clan, TaskKind::SnapshotVm, "Snapshot", &["Copy the disk"], move |clan, task| async move {
        task.log(format!("the snapshot is `{name}`"));
        let vm = clan.keeper.vm();
        if vm.is_some() || !clan.record.get().wanted {
            return task.unless_cancelled(make(&clan, &name, vm)).await;
        }
        // One that waits for its turn, or for its next attempt, waits for this too: it would write to its disk meanwhile.
        let hold = task.unless_cancelled(machine::hold(&clan));
        let made = machine::while_held(&clan, hold, task.unless_cancelled(make(&clan, &name, None)));
        made.await.map(drop)
    })
}

async fn make(clan: &Clan, name: &str, vm: Option<Vm>) -> Result<(), ApiProblem> {
    let on_disk = |e| problem::disk(&e);
    let folder = folder(clan);
    disk::create_dir(&folder).map_err(on_disk)?;
    let staging = Staging(folder.join(format!("{STAGING}{name}")));
    disk::create_dir(&staging.0).map_err(on_disk)?;
    let snapshot = Snapshot { made: now(), image: clan.record.get().image, running: vm.is_some() };
    let (from, to) = (clan.record.paths().data_disk(), staging.0.join("data.ext4"));
    let copy = async { blocking(move || copy_data_disk(&from, &to)).await?.map_err(|e| problem::vm(&e)) };
    match vm {
        Some(vm) => held(clan, vm, copy).await?,
        None => copy.await?,
    }
    disk::write_json(&staging.0.join("snapshot.json"), &snapshot).map_err(on_disk)?;
    disk::rename_dir(&staging.0, &folder.join(name)).map_err(on_disk)
}

/// Removes what an interrupted manager left of snapshots.
pub(crate) fn sweep(paths: &ClanPaths) {
    // What cannot be removed now is tried again.
    let _ = disk::remove_file(&paths.dir.join(RESTORING));
    disk::sweep(&paths.dir);
    for path in disk::list(&paths.dir.join(FOLDER)) {
        if path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(STAGING)) {
            let _ = disk::remove_dir(&path);
        }
    }
}

/// What is left of a snapshot that did not come to be goes.
struct Staging(PathBuf);

impl Drop for Staging {
    fn drop(&mut self) {
        // Once it is in its place there is nothing of this name.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Does something while the guest holds still with everything written out; it goes on afterwards, even if this is dropped.
async fn held(clan: &Clan, vm: Vm, work: impl Future<Output = Result<(), ApiProblem>>) -> Result<(), ApiProblem> {
    if vm.is_paused().await.map_err(|e| problem::vm(&e))? {
        work.await?;
        // One that was killed meanwhile is started anew, and writes to its disk.
        return match vm.exited() {
            None => Ok(()),
            Some(_) => Err(ApiProblem::new(ErrorCode::VmFailed, "the VM ended while its disk was copied")
                .hint("make another snapshot: `clan vm snapshot`")),
        };
    }
    let agent = clan.keeper.watch_agent().borrow().clone();
    if let Some(agent) = agent
        && let Err(error) = guest::ask_agent(&agent, &AgentRequest::Sync, SYNC).await
    {
        tracing::debug!(%error, "the guest did not write out what it has");
    }
    vm.pause().await.map_err(|e| problem::vm(&e))?;
    let resumed = Resumed(Some(vm));
    let outcome = work.await;
    resumed.now().await?;
    outcome
}

struct Resumed(Option<Vm>);

impl Resumed {
    async fn now(mut self) -> Result<(), ApiProblem> {
        match self.0.take() {
            Some(vm) => vm.resume().await.map_err(|e| problem::vm(&e)),
            None => Ok(()),
        }
    }
}

impl Drop for Resumed {
    fn drop(&mut self) {
        if let (Some(vm), Ok(runtime)) = (self.0.take(), tokio::runtime::Handle::try_current()) {
            // Cancelled: nobody waits for it, and it takes a moment.
            runtime.spawn(async move {
                if let Err(error) = vm.resume().await {
                    tracing::warn!(%error, "the VM does not go on after a cancelled snapshot");
                }
            });
        }
    }
}

/// Puts a snapshot in the place of the data disk, as a task. The VM is stopped for it, and runs again if it was to.
pub(crate) fn restore_task(shared: &Arc<Shared>, clan: Arc<Clan>, name: &str) -> Result<Arc<Task>, ApiProblem> {
    check_ready(&clan)?;
    if clan.keeper.vm().is_some() {
        // What runs would not run again. One that does not is put back all the same: its disk may not open as it is.
        lock::check_unlocked(&clan)?;
    }
    let snapshot = find(&clan, checked(name)?)?;
    let steps = ["Stop the virtual machine", "Put the disk back", "Start the virtual machine"];
    vm_task(shared, clan, TaskKind::RestoreVm, "Restore", &steps, move |clan, task| async move {
        if let Ok(control) = clan.control()
            && let Err(error) = clan.record.memory().refresh(&control).await
        {
            // What the machine last told is remembered.
            tracing::debug!(%error, "the machine does not tell what is new before its disk is put back");
        }
        let hold = task.unless_cancelled(machine::hold(&clan));
        let put = machine::while_held(&clan, hold, async {
            task.begin(1);
            put_back(&clan, &snapshot).await
        });
        let ((), runs) = put.await?;
        if runs && clan.record.is_locked() {
            task.log("it starts when its disk is unlocked: `clan vm unlock`");
        } else if runs {
            task.begin(2);
            task.unless_cancelled(start(&clan, &task)).await?;
        }
        Ok(())
    })
}

async fn put_back(clan: &Clan, snapshot: &SnapshotInfo) -> Result<(), ApiProblem> {
    let from = folder(clan).join(&snapshot.name).join("data.ext4");
    let paths = clan.record.paths().clone();
    let size = clan.record.get().disk.max(snapshot.size);
    let length = ByteSize::from_bytes(size.as_bytes().saturating_add(lock::overhead(clan, &from)?.as_bytes()));
    // Its ledger will be an old one, and its machine sign nothing before it has heard what came after.
    clan.record.update(|r| (r.restored, r.fresh) = (true, None)).map_err(|e| problem::disk(&e))?;
    blocking(move || replace_disk(&paths, &from, length)).await??;
    clan.record.update(|r| r.disk = size).map_err(|e| problem::disk(&e))
}

/// Puts a copy of a disk in the place of a VM's, as a file at least so long: a crash leaves the one or the other. Nothing may use
/// either. Blocks on the disk.
pub(crate) fn replace_disk(paths: &ClanPaths, from: &Path, size: ByteSize) -> Result<(), ApiProblem> {
    let (place, beside) = (paths.data_disk(), paths.dir.join(RESTORING));
    disk::remove_file(&beside).map_err(|e| problem::disk(&e))?;
    copy_data_disk(from, &beside).map_err(|e| problem::vm(&e))?;
    let put = || -> io::Result<()> {
        let copy = fs::OpenOptions::new().write(true).open(&beside)?;
        // The VM's may have grown since; the guest makes use of that when it starts.
        if copy.metadata()?.len() < size.as_bytes() {
            copy.set_len(size.as_bytes())?;
            copy.sync_all()?;
        }
        fs::rename(&beside, &place)?;
        fs::File::open(&paths.dir)?.sync_all()
    };
    put().map_err(|e| {
        let _ = fs::remove_file(&beside);
        ApiProblem::new(ErrorCode::VmFailed, "the copy was not put in the place of the disk").why(e.to_string())
    })
}

/// Removes a snapshot, as a task.
pub(crate) fn discard_task(shared: &Arc<Shared>, clan: Arc<Clan>, name: &str) -> Result<Arc<Task>, ApiProblem> {
    check_ready(&clan)?;
    let snapshot = find(&clan, checked(name)?)?;
    vm_task(
        shared,
        clan,
        TaskKind::DiscardSnapshot,
        "Discard a snapshot of",
        &["Remove it"],
        move |clan, _| async move {
            let dir = folder(&clan).join(&snapshot.name);
            // Renamed first: an interrupted removal leaves no snapshot that looks complete.
            let doomed = folder(&clan).join(format!("{STAGING}{}", snapshot.name));
            blocking(move || {
                disk::remove_dir(&doomed)?;
                disk::rename_dir(&dir, &doomed)?;
                disk::remove_dir(&doomed)
            })
            .await?
            .map_err(|e| problem::disk(&e))
        },
    )
}

#[cfg(test)]
mod full;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{ClanRecord, tests};

    #[test]
    fn a_snapshots_name_stays_in_its_folder() {
        for bad in ["", ".", "..", "a/b", "-a", "a-", "A", "a b", "ä", &"a".repeat(41)] {
            assert!(checked(bad).is_err(), "{bad}");
        }
        assert_eq!(checked("before-2026-11").ok(), Some("before-2026-11"));
    }

    fn names(dir: &Path) -> Vec<String> {
        disk::list(dir).iter().map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect()
    }

    /// A clan whose VM is stopped, with a disk of these contents.
    fn clan(shared: &Arc<Shared>, content: &[u8]) -> Arc<Clan> {
        let record = ClanRecord { disk: ByteSize::from_mib(1), ..tests::record(1, Phase::Ready) };
        tests::put(&shared.paths, &record, None);
        fs::write(shared.paths.clan(&record.id).data_disk(), content).unwrap();
        shared.adopt(record).unwrap()
    }

    #[tokio::test]
    async fn a_disk_is_put_back_whole_and_what_is_remembered_says_so_before() {
        let dir = tempfile::tempdir().unwrap();
        let shared = Shared::for_tests(dir.path());
        let clan = clan(&shared, b"before");
        make(&clan, "first", None).await.unwrap();
        let disk = clan.record.paths().data_disk();
        fs::write(&disk, b"after").unwrap();
        let snapshot = find(&clan, "first").ok().unwrap();
        put_back(&clan, &snapshot).await.unwrap();
        let now = fs::read(&disk).unwrap();
        assert_eq!((&now[..6], now.len()), (&b"before"[..], 1 << 20), "as large as the VM's disk has become");
        assert!(clan.record.get().restored);

        // Something in its place that is no disk: the attempt leaves nothing of itself.
        clan.record.update(|r| r.restored = false).unwrap();
        fs::remove_file(&disk).unwrap();
        fs::create_dir_all(disk.join("in the way")).unwrap();
        put_back(&clan, &snapshot).await.unwrap_err();
        assert!(clan.record.get().restored, "it is doubted rather than trusted");
        assert!(!names(&clan.record.paths().dir).iter().any(|name| name.starts_with(RESTORING)));
    }

    #[tokio::test]
    async fn an_encrypted_disk_is_put_back_at_the_length_that_its_file_has_by_now() {
        let dir = tempfile::tempdir().unwrap();
        let shared = Shared::for_tests(dir.path());
        let clan = clan(&shared, b"");
        let disk = clan.record.paths().data_disk();
        fs::remove_file(&disk).unwrap();
        let passphrase = "correct horse".parse().unwrap();
        clan_vm::create_encrypted_disk(&disk, ByteSize::from_mib(16), &passphrase).await.unwrap();
        clan.record.update(|r| (r.encrypted, r.disk) = (true, ByteSize::from_mib(16))).unwrap();
        make(&clan, "first", None).await.unwrap();
        let snapshot = find(&clan, "first").ok().unwrap();
        assert_eq!(snapshot.size, ByteSize::from_mib(16));
        clan.record.update(|r| r.disk = ByteSize::from_mib(32)).unwrap();
        put_back(&clan, &snapshot).await.unwrap();
        assert_eq!(fs::metadata(&disk).unwrap().len(), 34 << 20);
        clan_vm::check_passphrase(&disk, &passphrase).unwrap();
    }

    #[tokio::test]
    async fn whatever_a_crash_leaves_of_copies_goes_and_the_disk_is_the_one_or_the_other() {
        for disk_now in [&b"old"[..], b"new"] {
            let dir = tempfile::tempdir().unwrap();
            let shared = Shared::for_tests(dir.path());
            let first = clan(&shared, b"old");
            make(&first, "whole", None).await.unwrap();
            let (id, paths) = (first.id(), first.record.paths().clone());
            let before = names(&paths.dir);
            // In the middle of a snapshot, of a discarded one, of a restoration, of a new disk and of a record.
            for half in [".new-half", ".new-gone"] {
                fs::create_dir(paths.dir.join(FOLDER).join(half)).unwrap();
                fs::write(paths.dir.join(FOLDER).join(half).join("data.ext4.new4711"), b"ha").unwrap();
            }
            fs::create_dir(paths.dir.join(FOLDER).join("damaged")).unwrap();
            fs::write(paths.dir.join(FOLDER).join("damaged/data.ext4"), b"half").unwrap();
            for draft in [RESTORING, "data.ext4.restoring.new4711", "data.ext4.new4711", "clan.json.new-4711-0"] {
                fs::write(paths.dir.join(draft), b"half").unwrap();
            }
            fs::write(paths.data_disk(), disk_now).unwrap();

            let next = Shared::for_tests(dir.path());
            let found = next.adopt(ClanRecord::load(&paths).unwrap()).unwrap();
            assert_eq!(found.id(), id);
            assert_eq!(names(&paths.dir), before);
            assert_eq!(names(&paths.dir.join(FOLDER)), ["damaged", "whole"]);
            let listed: Vec<String> = list(&found).into_iter().map(|snapshot| snapshot.name).collect();
            assert_eq!(listed, ["whole"], "what is not whole is no snapshot");
            assert_eq!(fs::read(paths.data_disk()).unwrap(), disk_now);
        }
    }
}
