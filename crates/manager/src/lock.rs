//! Encrypted data disks: who knows the passphrase, and what a VM does without it.
//!
//! The disk is encrypted when it is made ([`clan_vm::create_encrypted_disk`]), and opened by QEMU alone. The passphrase is in the
//! manager's memory ([`crate::clan::RecordCell`]): after the manager's end the VM is locked until somebody says it again. What
//! runs goes on.

use std::sync::Arc;

use clan_api::{ApiProblem, ErrorCode, TaskKind, VmState};
use clan_types::{ByteSize, Passphrase};
use clan_vm::{VmError, change_passphrase, check_passphrase, encryption_overhead};

use crate::{
    clan::Clan,
    fetch::blocking,
    leave::{is_vm, vm_task},
    manager::Shared,
    problem, snapshots,
    tasks::{Task, TaskHandle},
};

/// Why a locked VM does not start.
pub(crate) fn locked() -> ApiProblem {
    ApiProblem::new(ErrorCode::Locked, "its disk is encrypted and locked: unlock it with `clan vm unlock`")
        .why("the passphrase is kept in the manager's memory only, and this manager was not told it")
        .hint("unlock it: `clan vm unlock`")
}

/// Refuses what would start a VM that is locked.
pub(crate) fn check_unlocked(clan: &Clan) -> Result<(), ApiProblem> {
    if clan.record.is_locked() { Err(locked()) } else { Ok(()) }
}

/// Waits until a VM is not locked, and tells so.
pub(crate) async fn unlocked(clan: &Clan, task: &TaskHandle) {
    if !clan.record.is_locked() {
        return;
    }
    task.detail("it waits for the passphrase of its encrypted disk: `clan vm unlock`");
    let mut said = clan.record.watch_passphrase();
    // Its sender lives as long as the clan.
    let _ = said.wait_for(Option::is_some).await;
    task.no_detail();
}

fn check_encrypted(clan: &Clan) -> Result<(), ApiProblem> {
    is_vm(clan, "start")?;
    if clan.record.get().encrypted {
        return Ok(());
    }
    Err(ApiProblem::new(ErrorCode::Conflict, "the disk of this VM is not encrypted")
        .why("a disk is encrypted when it is made: `clan create --encrypt`, `clan join --encrypt`"))
}

/// Opens the disk, for as long as this manager lives; the VM starts if it is to run.
pub(crate) async fn unlock(clan: &Arc<Clan>, passphrase: Passphrase) -> Result<(), ApiProblem> {
    check_encrypted(clan)?;
    let disk = clan.record.paths().data_disk();
    if !disk.exists() {
        return Err(being_made());
    }
    let said = passphrase.clone();
    blocking(move || check_passphrase(&disk, &said)).await?.map_err(|e| problem::vm(&e))?;
    clan.record.set_passphrase(Some(passphrase));
    if clan.keeper.vm().is_some() {
        return Ok(());
    }
    clan.keeper.want(clan.record.get().wanted).await
}

/// Forgets the passphrase of a VM that does not run.
pub(crate) async fn lock(shared: &Shared, clan: &Clan) -> Result<(), ApiProblem> {
    check_encrypted(clan)?;
    shared.check_idle(clan)?;
    if clan.record.get().wanted || clan.keeper.view().state != VmState::Stopped && !clan.record.is_locked() {
        return Err(ApiProblem::new(ErrorCode::Conflict, "the VM runs, or is to run").hint("stop it: `clan vm stop`"));
    }
    clan.record.set_passphrase(None);
    clan.keeper.want(false).await
}

/// Gives the disk, and the copies of it, another passphrase, as a task; the VM may run. A manager that is killed in the middle leaves
/// disks of which each opens by the old passphrase or the new one, and the same again comes to the end.
pub(crate) fn change_task(
    shared: &Arc<Shared>,
    clan: Arc<Clan>,
    old: Passphrase,
    new: Passphrase,
) -> Result<Arc<Task>, ApiProblem> {
    check_encrypted(&clan)?;
    let disk = clan.record.paths().data_disk();
    if !disk.exists() {
        return Err(being_made());
    }
    let steps = ["Change the passphrase of the copies", "Change the passphrase of the disk"];
    let verb = "Change the passphrase of";
    vm_task(shared, clan, TaskKind::ChangePassphrase, verb, &steps, move |clan, task| async move {
        let judged = (disk.clone(), old.clone(), new.clone());
        // A copy is changed only where the disk will be.
        let judge = move || check_passphrase(&judged.0, &judged.1).or_else(|_| check_passphrase(&judged.0, &judged.2));
        blocking(judge).await?.map_err(|e| problem::vm(&e))?;
        for (name, copy) in snapshots::disks(&clan) {
            let (old, new) = (old.clone(), new.clone());
            match blocking(move || change_passphrase(&copy, &old, &new)).await? {
                Ok(()) => {}
                Err(VmError::WrongPassphrase { .. }) => {
                    task.log(format!("the copy {name} has another passphrase, and keeps it"));
                }
                Err(error) => task.log(format!("the copy {name} keeps its passphrase: {error}")),
            }
        }
        task.begin(1);
        let (said, next) = (new.clone(), disk.clone());
        blocking(move || change_passphrase(&next, &old, &said)).await?.map_err(|e| problem::vm(&e))?;
        // Whoever locked it meanwhile has it locked.
        if !clan.record.is_locked() {
            clan.record.set_passphrase(Some(new));
        }
        Ok(())
    })
}

fn being_made() -> ApiProblem {
    ApiProblem::new(ErrorCode::Conflict, "the VM is being made or removed").hint("wait for that task")
}

/// How much longer the file of a VM's disk, or of a copy of it, is than what the guest sees.
pub(crate) fn overhead(clan: &Clan, disk: &std::path::Path) -> Result<ByteSize, ApiProblem> {
    match clan.record.get().encrypted {
        true => encryption_overhead(disk).map_err(|e| problem::vm(&e)),
        false => Ok(ByteSize::default()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;
    use crate::{
        leave, machine,
        record::{ClanRecord, Phase, tests},
        snapshots,
    };

    const SIZE: ByteSize = ByteSize::from_mib(16);

    fn phrase(text: &str) -> Passphrase {
        text.parse().unwrap()
    }

    /// A clan whose VM is stopped, and has an encrypted disk.
    async fn clan(shared: &Arc<Shared>) -> Arc<Clan> {
        let record = ClanRecord { encrypted: true, disk: SIZE, cpus: 1, ..tests::record(1, Phase::Ready) };
        tests::put(&shared.paths, &record, None);
        let disk = shared.paths.clan(&record.id).data_disk();
        clan_vm::create_encrypted_disk(&disk, SIZE, &phrase("correct horse")).await.unwrap();
        shared.adopt(record).unwrap()
    }

    #[tokio::test]
    async fn only_the_right_passphrase_unlocks_and_nothing_starts_without() {
        let dir = tempfile::tempdir().unwrap();
        let shared = Shared::for_tests(dir.path());
        let clan = clan(&shared).await;
        assert!(clan.record.is_locked());
        for refused in
            [leave::start_task(&shared, clan.clone()).err(), machine::restart_task(&shared, clan.clone()).err()]
        {
            assert_eq!(refused.unwrap().code, ErrorCode::Locked);
        }
        let wrong = unlock(&clan, phrase("correct house")).await.unwrap_err();
        assert_eq!(wrong.code, ErrorCode::WrongPassphrase);
        assert!(clan.record.is_locked());
        unlock(&clan, phrase("correct horse")).await.unwrap();
        assert!(!clan.record.is_locked());
        assert_eq!(clan.keeper.view().state, VmState::Stopped);

        clan.record.update(|r| r.wanted = true).unwrap();
        assert_eq!(lock(&shared, &clan).await.unwrap_err().code, ErrorCode::Conflict);
        clan.record.update(|r| r.wanted = false).unwrap();
        lock(&shared, &clan).await.unwrap();
        assert!(clan.record.is_locked());
        assert_eq!(clan.keeper.view().state, VmState::Locked);
    }

    #[tokio::test]
    async fn another_passphrase_opens_the_disk_and_its_copies_and_the_manager_knows_it() {
        let dir = tempfile::tempdir().unwrap();
        let shared = Shared::for_tests(dir.path());
        let clan = clan(&shared).await;
        let (old, new) = (phrase("correct horse"), phrase("battery staple"));
        unlock(&clan, old.clone()).await.unwrap();
        snapshots::make_task(&shared, clan.clone(), Some("first".into())).unwrap().finished().await;
        let copy = snapshots::disks(&clan)[0].1.clone();
        let change = |from: &Passphrase| change_task(&shared, clan.clone(), from.clone(), new.clone()).unwrap();

        let wrong = change(&phrase("neither of them"));
        wrong.finished().await;
        assert_eq!(wrong.info().problem.unwrap().code, ErrorCode::WrongPassphrase);
        check_passphrase(&copy, &old).unwrap();
        // As a manager leaves it that was killed after the first copy.
        change_passphrase(&copy, &old, &new).unwrap();
        let task = change(&old);
        task.finished().await;
        assert_eq!(task.info().problem, None);
        for file in [clan.record.paths().data_disk(), copy] {
            check_passphrase(&file, &new).unwrap();
            assert!(matches!(check_passphrase(&file, &old), Err(VmError::WrongPassphrase { .. })));
        }
        assert_eq!(clan.record.passphrase(), Some(new.clone()), "what the VM starts with");
        lock(&shared, &clan).await.unwrap();
        assert_eq!(unlock(&clan, old).await.unwrap_err().code, ErrorCode::WrongPassphrase);
        unlock(&clan, new).await.unwrap();
    }

    #[tokio::test]
    async fn a_disk_that_is_not_encrypted_has_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        let shared = Shared::for_tests(dir.path());
        let record = tests::record(1, Phase::Ready);
        tests::put(&shared.paths, &record, None);
        let clan = shared.adopt(record).unwrap();
        assert!(!clan.record.is_locked());
        assert_eq!(unlock(&clan, phrase("correct horse")).await.unwrap_err().code, ErrorCode::Conflict);
        assert_eq!(lock(&shared, &clan).await.unwrap_err().code, ErrorCode::Conflict);
    }

    #[tokio::test]
    async fn a_locked_disk_grows_and_is_copied_and_sizes_are_those_that_the_guest_sees() {
        let dir = tempfile::tempdir().unwrap();
        let shared = Shared::for_tests(dir.path());
        let clan = clan(&shared).await;
        let disk = clan.record.paths().data_disk();
        let length = |path: &std::path::Path| std::fs::metadata(path).unwrap().len();
        assert_eq!(length(&disk), 18 << 20);
        let task = snapshots::make_task(&shared, clan.clone(), Some("first".into())).unwrap();
        task.finished().await;
        assert_eq!(snapshots::list(&clan)[0].size, SIZE);
        let larger = clan_api::ResizeVm { disk: Some(ByteSize::from_mib(64)), ..Default::default() };
        machine::resize(&shared, &clan, &larger).await.unwrap();
        assert_eq!(length(&disk), 66 << 20);

        // Nobody can unlock one whose beginning is damaged, so a copy is put back without that.
        std::fs::OpenOptions::new().write(true).open(&disk).unwrap().write_all_at(&[0; 512], 0).unwrap();
        let damaged = unlock(&clan, phrase("correct horse")).await.unwrap_err();
        assert_eq!(damaged.code, ErrorCode::DamagedFile);
        let task = snapshots::restore_task(&shared, clan.clone(), "first").unwrap();
        task.finished().await;
        assert_eq!(length(&disk), 66 << 20);
        unlock(&clan, phrase("correct horse")).await.unwrap();
    }
}
