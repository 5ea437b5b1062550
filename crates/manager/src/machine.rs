//! What a person does with their VM: pause, resume, start again, give it another size.

use std::{sync::Arc, time::Duration};

use clan_api::{ApiProblem, ErrorCode, ResizeVm, TaskKind, VmSize, VmState};
use clan_os::channel::Channel;
use clan_types::ByteSize;
use clan_wire::agent::AgentRequest;
use tokio::time::{Instant, sleep};

use crate::{
    clan::Clan,
    create::{self, Size},
    guest::{self, GuestError},
    leave::{is_kept, is_vm, start, stop, vm_task},
    lock,
    manager::Shared,
    problem,
    record::Phase,
    tasks::Task,
};

/// For a guest to hear that its disk has grown.
const HEARD: Duration = Duration::from_secs(10);
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// Halts a VM's processors, as a task.
pub(crate) fn pause_task(shared: &Arc<Shared>, clan: Arc<Clan>) -> Result<Arc<Task>, ApiProblem> {
    is_vm(&clan, "stop")?;
    let steps = ["Pause the virtual machine"];
    vm_task(shared, clan, TaskKind::PauseVm, "Pause", &steps, |clan, _| async move { clan.keeper.pause(true).await })
}

/// Lets a paused VM go on, as a task.
pub(crate) fn resume_task(shared: &Arc<Shared>, clan: Arc<Clan>) -> Result<Arc<Task>, ApiProblem> {
    is_vm(&clan, "start")?;
    let steps = ["Let the virtual machine go on"];
    vm_task(shared, clan, TaskKind::ResumeVm, "Resume", &steps, |clan, _| async move { clan.keeper.pause(false).await })
}

/// Stops a VM in good order and starts it again, as a task. Cancelled in between, it starts all the same.
pub(crate) fn restart_task(shared: &Arc<Shared>, clan: Arc<Clan>) -> Result<Arc<Task>, ApiProblem> {
    is_kept(&clan, "restart")?;
    lock::check_unlocked(&clan)?;
    let what = clan.record.get().what();
    let steps = [format!("Stop the {what}"), format!("Start the {what}")];
    vm_task(shared, clan, TaskKind::RestartVm, "Restart", &[&steps[0], &steps[1]], |clan, task| async move {
        // A manager that is killed meanwhile starts it: what the person wants does not change.
        clan.keeper.restart().await?;
        let mut view = clan.keeper.watch();
        let down = view.wait_for(|v| matches!(v.state, VmState::Starting | VmState::Failed | VmState::Locked));
        task.unless_cancelled(async {
            let _ = down.await;
            Ok(())
        })
        .await?;
        task.begin(1);
        task.unless_cancelled(start(&clan, &task)).await
    })
}

/// Gives a VM another size, or says what it would be.
pub(crate) async fn resize(shared: &Arc<Shared>, clan: &Clan, request: &ResizeVm) -> Result<VmSize, ApiProblem> {
    is_vm(clan, "restart")?;
    let record = clan.record.get();
    if record.phase != Phase::Ready {
        return Err(ApiProblem::new(ErrorCode::Conflict, "the VM is being made or removed").hint("wait for that task"));
    }
    let cpus = match request.cpus {
        None => record.cpus,
        Some(n) => u8::try_from(n)
            .map_err(|_| ApiProblem::new(ErrorCode::BadRequest, "that many processors no VM can have"))?,
    };
    let size =
        Size { memory: request.memory.unwrap_or(record.memory), disk: request.disk.unwrap_or(record.disk), cpus };
    create::check_computer(shared, size)?;
    let least = record.image.and_then(|id| shared.images.get(&id)).map(|image| image.manifest.memory_min);
    if let Some(least) = least.filter(|least| size.memory < *least) {
        return Err(ApiProblem::new(ErrorCode::TooSmall, format!("the image needs {least} of memory")));
    }
    if size.disk < record.disk {
        return Err(ApiProblem::new(ErrorCode::BadRequest, format!("the disk has {} already", record.disk))
            .why("a disk can grow; to shrink it would lose what is at its end"));
    }
    let free = free_beside(clan)?;
    let more = ByteSize::from_bytes(size.disk.as_bytes() - record.disk.as_bytes());
    if more > free {
        return Err(ApiProblem::new(ErrorCode::DiskFull, format!("the disk would grow by {more}, {free} are free")));
    }
    let runs = clan.keeper.vm().is_some();
    let told = VmSize {
        memory: size.memory,
        cpus: u32::from(size.cpus),
        disk: size.disk,
        restart_needed: runs && (size.memory, size.cpus) != (record.memory, record.cpus),
    };
    if request.dry_run {
        return Ok(told);
    }
    shared.check_idle(clan)?;
    if size.disk > record.disk {
        grow(clan, size.disk).await?;
    }
    let changed = clan.record.update(|r| (r.memory, r.cpus, r.disk) = (size.memory, size.cpus, size.disk));
    changed.map_err(|e| problem::disk(&e))?;
    Ok(told)
}

/// Grows the disk, and the file system on it: now if the guest runs, else when it starts.
async fn grow(clan: &Clan, size: ByteSize) -> Result<(), ApiProblem> {
    let Some(vm) = clan.keeper.vm() else {
        let path = clan.record.paths().data_disk();
        let length = size.as_bytes().saturating_add(lock::overhead(clan, &path)?.as_bytes());
        let grown = std::fs::OpenOptions::new().write(true).open(&path).and_then(|disk| disk.set_len(length));
        return grown.map_err(|e| {
            ApiProblem::new(ErrorCode::VmFailed, format!("{} does not grow", path.display())).why(e.to_string())
        });
    };
    vm.grow_data_disk(size).await.map_err(|e| problem::vm(&e))?;
    let agent = clan.keeper.watch_agent().borrow().clone();
    let grown = match agent {
        Some(agent) => grow_in_guest(&agent, size).await,
        None => Err(GuestError::NotConnected { who: "agent" }),
    };
    // The disk has grown; the guest makes use of it when it next starts.
    grown.or_else(|error| {
        tracing::warn!(%error, "the guest does not use its larger disk before it starts again");
        Ok(())
    })
}

/// The guest hears of the new size a moment later.
async fn grow_in_guest(agent: &Channel, size: ByteSize) -> Result<(), GuestError> {
    let deadline = Instant::now() + HEARD;
    let request = AgentRequest::GrowDisk(ByteSize::from_mib(size.as_mib()));
    loop {
        match guest::ask_agent(agent, &request, guest::PATIENCE).await {
            Err(GuestError::Failed { .. }) if Instant::now() < deadline => sleep(ASK_AGAIN).await,
            answer => return answer.map(drop),
        }
    }
}

fn free_beside(clan: &Clan) -> Result<ByteSize, ApiProblem> {
    let stat = rustix::fs::statvfs(&clan.record.paths().dir)
        .map_err(|e| ApiProblem::new(ErrorCode::Internal, "the disk cannot be measured").why(e.to_string()))?;
    Ok(ByteSize::from_bytes(stat.f_bavail.saturating_mul(stat.f_frsize)))
}

/// Does something for which a VM has to be stopped; `hold` is [`hold`], or that unless cancelled, and `work` begins when it has
/// ended well. Gives what came of it, and whether the VM runs again.
///
/// INVARIANT: it runs again if it was to, whatever came of it.
pub(crate) async fn while_held<T>(
    clan: &Clan,
    hold: impl Future<Output = Result<(), ApiProblem>>,
    work: impl Future<Output = Result<T, ApiProblem>>,
) -> Result<(T, bool), ApiProblem> {
    let outcome = match hold.await {
        Ok(()) => work.await,
        Err(problem) => Err(problem),
    };
    match (outcome, release(clan).await) {
        (Ok(done), Ok(runs)) => Ok((done, runs)),
        (Err(problem), Ok(_)) => Err(problem),
        (Ok(_), Err(problem)) => Err(problem.hint("it does not run now: `clan vm start`")),
        (Err(problem), Err(_)) => Err(problem.hint("it does not run now: `clan vm start`")),
    }
}

/// Stops a VM, which is to run again if it was to.
pub(crate) async fn hold(clan: &Clan) -> Result<(), ApiProblem> {
    // One that could not be started again the last time is to run all the same.
    clan.record.update(|r| r.held |= r.wanted).map_err(|e| problem::disk(&e))?;
    stop(clan).await
}

/// Whether the VM runs again after [`hold`]; it begins to, if so.
async fn release(clan: &Clan) -> Result<bool, ApiProblem> {
    let run = clan.record.get().held;
    if run {
        clan.keeper.want(true).await?;
        clan.record.update(|r| r.held = false).map_err(|e| problem::disk(&e))?;
    }
    Ok(run)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::record::{ClanRecord, tests};

    #[tokio::test]
    async fn a_disk_that_fails_while_a_vm_is_held_does_not_keep_it_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let shared = Shared::for_tests(dir.path());
        let record = tests::record(1, Phase::Ready);
        tests::put(&shared.paths, &record, None);
        let clan = shared.adopt(record).unwrap();
        clan.keeper.want(true).await.unwrap();
        let file = clan.record.paths().record();
        let aside = file.with_extension("aside");
        let work = async {
            assert!(clan.record.get().held && !clan.record.get().wanted);
            // A folder in the way of the file.
            fs::rename(&file, &aside).unwrap();
            fs::create_dir(&file).unwrap();
            let written = clan.record.update(|r| r.cpus += 1).map_err(|e| problem::disk(&e));
            fs::remove_dir(&file).unwrap();
            fs::rename(&aside, &file).unwrap();
            written
        };
        let outcome = while_held(&clan, hold(&clan), work).await;
        assert!(outcome.is_err(), "it is told");
        let after = clan.record.get();
        assert!(after.wanted && !after.held, "{after:?}");
        assert_eq!(ClanRecord::load(clan.record.paths()).unwrap(), after);

        // And where it cannot be said that it runs again, that is made up for the next time.
        clan.record.update(|r| (r.wanted, r.held) = (false, true)).unwrap();
        let ((), runs) = while_held(&clan, hold(&clan), async { Ok(()) }).await.unwrap();
        assert!(runs && clan.record.get().wanted && !clan.record.get().held);
        clan.keeper.destroy().await;
    }
}
