//! From a record on disk to a guest whose controller answers: what founding and joining have in common.

use std::time::Duration;

use clan_api::{ApiProblem, ErrorCode, VmState};
use clan_os::channel::Channel;
use clan_vm::{VmError, copy_data_disk, create_data_disk, create_encrypted_disk, probe};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use crate::{
    clan::Clan,
    fetch::blocking,
    guest::{self, GuestError, Identity},
    keeper::VmView,
    lock, logs,
    manager::Shared,
    problem,
    record::{Flavour, Fresh},
    tasks::TaskHandle,
    template::Kind,
};

const AGENT: Duration = Duration::from_secs(60);
const CONTROLLER: Duration = Duration::from_secs(120);
const CONSOLE_LINES: usize = 15;

/// Makes the data disk, unless it is there: from a template if there is one, so that the VM need not boot; an encrypted one boots.
/// A container has none, and needs its image unpacked.
pub(crate) async fn data_disk(shared: &Shared, clan: &Clan, task: &TaskHandle) -> Result<(), ApiProblem> {
    if clan.record.get().is_container() {
        let image = clan.record.get().image.and_then(|id| shared.images.get(&id));
        let image = image.ok_or_else(|| ApiProblem::new(ErrorCode::Conflict, "the container has no image yet"))?;
        return shared.trees.layers(&image).await.map(drop);
    }
    let path = clan.record.paths().data_disk();
    if path.exists() {
        // An earlier manager made it, and knew the passphrase.
        lock::unlocked(clan, task).await;
        task.skip();
        return Ok(());
    }
    let record = clan.record.get();
    if record.encrypted {
        let forgotten = || {
            ApiProblem::new(ErrorCode::Locked, "the passphrase for its disk is not known any more")
                .why("the manager that was told it ended before it had made the disk")
                .hint("begin anew")
        };
        let passphrase = clan.record.passphrase().ok_or_else(forgotten)?;
        return create_encrypted_disk(&path, record.disk, &passphrase).await.map_err(|e| problem::vm(&e));
    }
    let accelerator = probe::accelerator(&shared.paths.cache()).await;
    let kind = Kind::of(&record, accelerator.kind, &shared.options.qemu);
    if let Some(template) = kind.and_then(|kind| shared.templates.find(&kind)) {
        let from = template.data_disk();
        let to = path.clone();
        clan.record.update(|r| r.fresh = Some(Fresh::Template(template.name))).map_err(|e| problem::disk(&e))?;
        match blocking(move || copy_data_disk(&from, &to)).await? {
            Ok(()) => {
                task.log("the VM goes on from a template, and need not boot");
                return Ok(());
            }
            Err(error @ VmError::NoSpace { .. }) => return Err(problem::vm(&error)),
            Err(error) => tracing::warn!(%error, "the template cannot be used"),
        }
    }
    clan.record.update(|r| r.fresh = Some(Fresh::Empty)).map_err(|e| problem::disk(&e))?;
    create_data_disk(&path, record.disk).await.map_err(|e| problem::vm(&e))
}

/// Starts the VM and waits for its agent, then, in the next step, for its controller. In a container there is the controller
/// only; that of an integrated machine is not for us to start.
pub(crate) async fn bring_up(
    clan: &Clan,
    task: &TaskHandle,
    controller_step: usize,
) -> Result<(Channel, Identity), ApiProblem> {
    clan.keeper.want(true).await?;
    if clan.record.get().flavour == Flavour::Vm {
        wait(clan, clan.keeper.watch_agent(), "agent", AGENT, task).await?;
    }
    task.begin(controller_step);
    let control = wait(clan, clan.keeper.watch_control(), "controller", CONTROLLER, task).await?;
    let identity = identify(clan, control, task).await?;
    Ok(identity)
}

/// Asks who the machine is; a controller that restarts meanwhile is asked again.
async fn identify(clan: &Clan, first: Channel, task: &TaskHandle) -> Result<(Channel, Identity), ApiProblem> {
    let mut control = first;
    for _ in 0..3 {
        match guest::identify(&control).await {
            Ok(identity) => return Ok((control, identity)),
            Err(GuestError::Channel(_) | GuestError::Message { .. } | GuestError::TimedOut { .. }) => {
                control = wait(clan, clan.keeper.watch_control(), "controller", CONTROLLER, task).await?;
            }
            Err(error) => return Err(problem::guest(&error)),
        }
    }
    Err(silent(clan, "controller", CONTROLLER))
}

/// Waits for a channel, or for the VM to be given up. What it waits for itself is in the task's detail.
pub(crate) async fn wait(
    clan: &Clan,
    mut channel: watch::Receiver<Option<Channel>>,
    who: &'static str,
    limit: Duration,
    task: &TaskHandle,
) -> Result<Channel, ApiProblem> {
    let mut view = clan.keeper.watch();
    let failed = async {
        match view.wait_for(|v| matches!(v.state, VmState::Failed | VmState::Locked)).await {
            Ok(view) => view.problem.clone().unwrap_or_else(|| ApiProblem::new(ErrorCode::VmFailed, "the VM failed")),
            Err(_) => ApiProblem::new(ErrorCode::Stopping, "the manager is stopping"),
        }
    };
    let connected = async {
        match channel.wait_for(Option::is_some).await.ok().and_then(|c| c.clone()) {
            Some(channel) => channel,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        channel = connected => Ok(channel),
        problem = failed => Err(problem),
        () = too_late(clan.keeper.watch(), limit) => Err(silent(clan, who, limit)),
        () = tell(clan.keeper.watch(), task) => Err(ApiProblem::new(ErrorCode::Stopping, "the manager is stopping")),
    }
}

/// Tells in the task's detail what a queued VM waits for. Returns when its keeper is gone.
async fn tell(mut view: watch::Receiver<VmView>, task: &TaskHandle) {
    let mut told = false;
    loop {
        let reason = {
            let now = view.borrow_and_update();
            now.problem.as_ref().filter(|_| now.queued).map(|problem| problem.message.clone())
        };
        match reason {
            Some(reason) => {
                task.detail(reason);
                told = true;
            }
            None if told => {
                task.no_detail();
                told = false;
            }
            None => {}
        }
        if view.changed().await.is_err() {
            return;
        }
    }
}

/// Returns when a VM has had its time. Waiting for other VMs, or for memory, does not count; and one that was started anew,
/// which is done so many times only, has its time anew.
async fn too_late(mut view: watch::Receiver<VmView>, limit: Duration) {
    let mut pid = view.borrow_and_update().pid;
    let mut deadline = Instant::now() + limit;
    loop {
        tokio::select! {
            biased;
            changed = view.changed() => {
                if changed.is_err() {
                    return std::future::pending().await;
                }
                let now = view.borrow_and_update();
                if now.queued || now.pid.is_some_and(|now| Some(now) != pid) {
                    pid = now.pid.or(pid);
                    deadline = Instant::now() + limit;
                }
            }
            () = sleep_until(deadline), if !view.borrow().queued => return,
        }
    }
}

fn silent(clan: &Clan, who: &str, limit: Duration) -> ApiProblem {
    if clan.record.get().is_integrated() {
        let known = clan.keeper.view().problem;
        return known.unwrap_or_else(|| {
            ApiProblem::new(
                ErrorCode::TimedOut,
                format!("the controller on this computer did not answer within {} s", limit.as_secs()),
            )
        });
    }
    let mut problem = ApiProblem::new(
        ErrorCode::TimedOut,
        format!("the {who} in the {} did not answer within {} s", clan.record.get().what(), limit.as_secs()),
    );
    if let Ok(console) = logs::tail(&clan.record.paths().console_log(), CONSOLE_LINES)
        && !console.trim().is_empty()
    {
        let lines: Vec<String> = console.lines().map(guest::short).collect();
        problem = problem.why(format!("the end of its console:\n{}", lines.join("\n")));
    }
    problem.hint("a busy computer without hardware acceleration may need another attempt")
}
