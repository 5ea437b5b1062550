//! Leaving a clan, and removing what is left of it here.

use std::{sync::Arc, time::Duration};

use clan_api::{ApiProblem, ErrorCode, TaskKind, TaskResult, VmState};
use clan_ledger::Body;

use crate::{
    boot,
    clan::Clan,
    contained, guest, lock,
    manager::Shared,
    problem,
    record::{Flavour, Phase},
    sign,
    tasks::{Task, TaskHandle},
    update,
};

const FAREWELL_STEPS: [&str; 3] = ["Tell the clan", "Stop the virtual machine", "Remove its files"];
const CONTAINER_STEPS: [&str; 3] = ["Tell the clan", "Stop the container", "Remove its files"];
const INTEGRATED_STEPS: [&str; 2] = ["Tell the clan", "Forget it on this computer"];
const STARTED: Duration = Duration::from_secs(180);
const STOPPED: Duration = Duration::from_secs(180);

/// Starts leaving. The VM must run: the clan's machines learn of it through it.
pub(crate) fn begin(shared: &Arc<Shared>, clan: Arc<Clan>) -> Result<Arc<Task>, ApiProblem> {
    shared.check_idle(&clan)?;
    if clan.record.get().phase == Phase::Ready {
        clan.control().map_err(|e| match clan.keeper.view().problem {
            Some(known) if clan.record.get().is_integrated() => {
                known.hint("or give this machine up, and the clan keeps its entry: `clan vm delete --force`")
            }
            _ => problem::guest(&e).hint("start it: `clan vm start`; or give it up: `clan vm delete --force`"),
        })?;
        clan.record.update(|r| r.phase = Phase::Leaving).map_err(|e| problem::disk(&e))?;
    }
    Ok(spawn(shared, clan))
}

/// Starts, or goes on with, leaving.
pub(crate) fn spawn(shared: &Arc<Shared>, clan: Arc<Clan>) -> Arc<Task> {
    let name = clan.name();
    let shared_ = shared.clone();
    let record = clan.record.get();
    let integrated = record.is_integrated();
    let steps: &[&str] = match record.flavour {
        Flavour::Vm => &FAREWELL_STEPS,
        Flavour::Container => &CONTAINER_STEPS,
        Flavour::Integrated { .. } => &INTEGRATED_STEPS,
    };
    shared.tasks.spawn(
        TaskKind::LeaveClan,
        format!("Leave the clan {name}"),
        Some(name),
        steps,
        move |task| async move {
            task.begin(0);
            let heard = match task.unless_cancelled(farewell(&clan, &task)).await {
                Ok(heard) => heard,
                // Gone on with by the next manager.
                Err(problem) if shared_.is_stopping() => return Err(problem),
                Err(problem) => {
                    clan.record.update(|r| r.phase = Phase::Ready).map_err(|e| problem::disk(&e))?;
                    return Err(problem);
                }
            };
            // The clan knows: from here on there is no way back, and a restart only removes.
            clan.record.update(|r| r.phase = Phase::Removing).map_err(|e| problem::disk(&e))?;
            task.begin(1);
            if !integrated {
                stop(&clan).await?;
                task.begin(2);
            }
            shared_.discard(&clan).await?;
            Ok(TaskResult::Left { heard })
        },
    )
}

/// Whether another machine of the clan has heard it.
async fn farewell(clan: &Clan, task: &TaskHandle) -> Result<bool, ApiProblem> {
    clan.keeper.want(true).await?;
    let control = boot::wait(clan, clan.keeper.watch_control(), "controller", STARTED, task).await?;
    let identity = guest::identify(&control).await.map_err(|e| problem::guest(&e))?;
    let person = clan.person();
    // The owner's last machine takes the person with it.
    let mut others = false;
    let mut gone = false;
    let body = |ledger: &clan_ledger::Ledger| {
        let state = ledger.state();
        others = state.good_machines().any(|(id, m)| m.owner == person && *id != identity.machine);
        gone = state.machine_in_good_standing(&identity.machine).is_none();
        if gone {
            return Err(ApiProblem::new(ErrorCode::NotFound, "this machine is not in the clan any more"));
        }
        Ok(if others { Body::Remove { machine: identity.machine } } else { Body::Leave })
    };
    match sign::bid_farewell(clan, body).await {
        // Removed by somebody else, or by an earlier attempt.
        Err(_) if gone => Ok(true),
        told => told,
    }
}

/// Stops a VM and waits until it is.
pub(crate) async fn stop(clan: &Clan) -> Result<(), ApiProblem> {
    let mut view = clan.keeper.watch();
    clan.keeper.want(false).await?;
    let stopped =
        view.wait_for(|v| matches!(v.state, VmState::Stopped | VmState::Locked | VmState::Failed) && v.pid.is_none());
    match tokio::time::timeout(STOPPED, stopped).await {
        Ok(_) => Ok(()),
        Err(_) => {
            let what = clan.record.get().what();
            Err(ApiProblem::new(ErrorCode::TimedOut, format!("the {what} did not stop"))
                .hint("delete it, or restart this computer"))
        }
    }
}

/// Starts a VM and waits until its controller answers.
pub(crate) async fn start(clan: &Clan, task: &TaskHandle) -> Result<(), ApiProblem> {
    clan.keeper.want(true).await?;
    boot::wait(clan, clan.keeper.watch_control(), "controller", STARTED, task).await.map(drop)
}

/// Only a VM can be paused, resized and copied.
pub(crate) fn is_vm(clan: &Clan, verb: &str) -> Result<(), ApiProblem> {
    match clan.record.get().flavour {
        Flavour::Container => Err(contained::no_vm()),
        _ => is_kept(clan, verb),
    }
}

/// Only a VM or a container is for the manager to start and to stop.
pub(crate) fn is_kept(clan: &Clan, verb: &str) -> Result<(), ApiProblem> {
    match clan.record.get().flavour {
        Flavour::Vm | Flavour::Container => Ok(()),
        Flavour::Integrated { socket } => {
            let problem =
                ApiProblem::new(ErrorCode::Conflict, format!("the clan `{}` has no virtual machine here", clan.name()))
                    .why(format!(
                        "this computer itself is its machine, by the controller that listens on {}",
                        socket.display()
                    ));
            Err(problem.hint(format!("if the controller is a service: `sudo systemctl {verb} clan-controller`")))
        }
    }
}

/// Starts a VM, as a task.
pub(crate) fn start_task(shared: &Arc<Shared>, clan: Arc<Clan>) -> Result<Arc<Task>, ApiProblem> {
    is_kept(&clan, "start")?;
    lock::check_unlocked(&clan)?;
    let shared_ = shared.clone();
    let step = format!("Start the {}", clan.record.get().what());
    vm_task(shared, clan, TaskKind::StartVm, "Start", &[&step], move |clan, task| async move {
        if clan.record.get().trial.is_some() {
            return update::judge(&shared_, &clan, &task).await;
        }
        task.unless_cancelled(start(&clan, &task)).await
    })
}

/// Stops a VM, as a task.
pub(crate) fn stop_task(shared: &Arc<Shared>, clan: Arc<Clan>) -> Result<Arc<Task>, ApiProblem> {
    is_kept(&clan, "stop")?;
    let step = format!("Stop the {}", clan.record.get().what());
    vm_task(shared, clan, TaskKind::StopVm, "Stop", &[&step], |clan, task| async move {
        // Nor is it to run again after what could not be ended the last time.
        clan.record.update(|r| r.held = false).map_err(|e| problem::disk(&e))?;
        task.unless_cancelled(stop(&clan)).await
    })
}

/// Deletes a VM, its disk, and the person's key in the clan, as a task.
pub(crate) fn delete_task(shared: &Arc<Shared>, clan: Arc<Clan>, force: bool) -> Result<Arc<Task>, ApiProblem> {
    if !force && clan.record.get().phase == Phase::Ready {
        let name = clan.name();
        return Err(ApiProblem::new(ErrorCode::Conflict, format!("it is a machine of the clan `{name}`"))
            .why("the others would go on waiting for it, and your key in the clan would be lost with it")
            .hint(format!("leave the clan: `clan leave {name}`"))
            .hint("or delete it all the same with `--force`"));
    }
    let shared_ = shared.clone();
    let step = match clan.record.get().flavour {
        Flavour::Vm => "Delete the virtual machine and its disk",
        Flavour::Container => "Delete the container and its files",
        Flavour::Integrated { .. } => "Forget the clan on this computer",
    };
    vm_task(shared, clan, TaskKind::DeleteVm, "Delete", &[step], move |clan, _task| async move {
        shared_.discard(&clan).await
    })
}

/// Starts a task that works on a VM, in its first step.
pub(crate) fn vm_task<F>(
    shared: &Arc<Shared>,
    clan: Arc<Clan>,
    kind: TaskKind,
    verb: &str,
    steps: &[&str],
    work: impl FnOnce(Arc<Clan>, TaskHandle) -> F,
) -> Result<Arc<Task>, ApiProblem>
where
    F: Future<Output = Result<(), ApiProblem>> + Send + 'static,
{
    shared.check_idle(&clan)?;
    let name = clan.name();
    let what = clan.record.get().what();
    let task = shared.tasks.spawn(kind, format!("{verb} the {what} of {name}"), Some(name), steps, move |task| {
        task.begin(0);
        let work = work(clan, task);
        async move { work.await.map(|()| TaskResult::Nothing) }
    });
    Ok(task)
}
