//! Another image for a VM, whose disk stays. What was so before must be so again afterwards: its controller answers, it
//! reaches others, its services are in good health. If not, it gets its previous image back by itself.

use std::{sync::Arc, time::Duration};

use clan_api::{ApiProblem, ErrorCode, TaskKind, UpdateVm};
use clan_build::StoredImage;
use clan_types::{ImageId, ServiceName};
use clan_wire::control::NodeStatus;
use tokio::time::{Instant, sleep};

use crate::{
    clan::Clan,
    fetch::blocking,
    guest, image, images,
    leave::{is_vm, start, vm_task},
    machine,
    manager::Shared,
    problem,
    record::{Phase, Trial},
    tasks::{Task, TaskHandle},
};

const STEPS: [&str; 4] =
    ["Get the image", "Stop the virtual machine", "Start it with the new image", "See whether all is well"];
/// How long others and services may take to be there again once the controller answers.
const WELL: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(500);
const ANSWER: Duration = Duration::from_secs(5);

/// Switches a VM to another image, as a task.
pub(crate) fn task(shared: &Arc<Shared>, clan: Arc<Clan>, request: &UpdateVm) -> Result<Arc<Task>, ApiProblem> {
    is_vm(&clan, "restart")?;
    if clan.record.get().phase != Phase::Ready {
        return Err(ApiProblem::new(ErrorCode::Conflict, "the VM is being made or removed").hint("wait for that task"));
    }
    let named = request.image.as_deref().map(|text| images::find(shared, text)).transpose()?;
    let shared_ = shared.clone();
    vm_task(shared, clan, TaskKind::UpdateVm, "Update", &STEPS, move |clan, task| async move {
        let image = match named {
            Some(image) => image,
            None => task.unless_cancelled(image::default_image(&shared_, &task)).await?,
        };
        switch(&shared_, &clan, &task, image).await
    })
}

/// Goes on with what an earlier manager began, as a task.
pub(crate) fn go_on(shared: &Arc<Shared>, clan: Arc<Clan>) {
    let shared_ = shared.clone();
    let steps = &STEPS[3..];
    let begun = vm_task(shared, clan, TaskKind::UpdateVm, "Update", steps, move |clan, task| async move {
        judge(&shared_, &clan, &task).await
    });
    if let Err(problem) = begun {
        tracing::warn!(problem = problem.message, "a VM's new image is not judged yet");
    }
}

async fn switch(shared: &Shared, clan: &Clan, task: &TaskHandle, image: StoredImage) -> Result<(), ApiProblem> {
    let record = clan.record.get();
    let Some(previous) = record.image.filter(|previous| *previous != image.id) else {
        task.log("the VM has this image already");
        return Ok(());
    };
    if record.memory < image.manifest.memory_min {
        let least = image.manifest.memory_min;
        return Err(ApiProblem::new(ErrorCode::TooSmall, format!("the image needs {least} of memory"))
            .hint(format!("give the VM more: `clan vm resize --memory {least}`")));
    }
    let (store, id) = (shared.images.clone(), image.id);
    task.unless_cancelled(blocking(move || store.verify(&id))).await?.map_err(|e| problem::store(&e))?;
    let trial = was(clan, previous).await;
    task.log(format!("from the image {} to {}", previous.short(), image.id.short()));
    task.begin(1);
    let held = task.unless_cancelled(machine::hold(clan)).await;
    if held.is_ok() {
        // INVARIANT: one write says both which image is next and which is gone back to.
        let chosen = clan.record.update(|r| (r.image, r.trial, r.fresh) = (Some(image.id), Some(trial), None));
        chosen.map_err(|e| problem::disk(&e))?;
    }
    let runs = machine::release(clan).await?;
    held?;
    if !runs {
        task.log("it is judged when the VM is started");
        return Ok(());
    }
    task.begin(2);
    judge(shared, clan, task).await
}

/// What is so while the VM runs its present image.
async fn was(clan: &Clan, previous: ImageId) -> Trial {
    let status = match clan.control() {
        Ok(control) => guest::status(&control, ANSWER).await.ok(),
        Err(_) => None,
    };
    let status = status.as_ref();
    Trial {
        previous,
        met: status.is_some_and(meets),
        services: status.map(|s| healthy(s).cloned().collect()).unwrap_or_default(),
    }
}

fn meets(status: &NodeStatus) -> bool {
    status.machines.iter().any(|machine| !machine.this && machine.path.is_some())
}

fn healthy(status: &NodeStatus) -> impl Iterator<Item = &ServiceName> {
    let own = status.machines.iter().find(|machine| machine.this).map(|machine| &machine.name);
    status.services.iter().filter(move |s| s.healthy && Some(&s.machine) == own).map(|s| &s.name)
}

/// Starts a VM whose image is new to it, and keeps it if all is well; else the VM gets its previous image back.
pub(crate) async fn judge(shared: &Shared, clan: &Clan, task: &TaskHandle) -> Result<(), ApiProblem> {
    let Some(trial) = clan.record.get().trial else { return Ok(()) };
    let tried = async {
        start(clan, task).await?;
        well(clan, &trial).await
    };
    let problem = match task.unless_cancelled(tried).await {
        Ok(()) => return clan.record.update(|r| r.trial = None).map_err(|e| problem::disk(&e)),
        // The next manager judges.
        Err(problem) if shared.is_stopping() => return Err(problem),
        Err(problem) => problem,
    };
    task.log(format!("not well: {}; back to the image {}", problem.message, trial.previous.short()));
    let held = machine::hold(clan).await;
    clan.record.update(|r| (r.image, r.trial) = (Some(trial.previous), None)).map_err(|e| problem::disk(&e))?;
    let runs = machine::release(clan).await?;
    held?;
    let back = "the VM is not well with the new image, and has its previous one again";
    if runs {
        start(clan, task).await.map_err(|again| {
            ApiProblem::new(ErrorCode::VmFailed, "the VM is not well with the new image, nor with its previous one")
                .why(format!("{}; then {}", problem.message, again.message))
                .hint("look at its console: `clan vm logs --console`")
        })?;
    }
    let why = match &problem.why {
        Some(why) => format!("{}: {why}", problem.message),
        None => problem.message.clone(),
    };
    Err(ApiProblem::new(ErrorCode::VmFailed, back).why(why))
}

/// Waits until everything is as it was.
async fn well(clan: &Clan, trial: &Trial) -> Result<(), ApiProblem> {
    let deadline = Instant::now() + WELL;
    loop {
        let seen = match clan.control() {
            Ok(control) => guest::status(&control, ANSWER).await,
            Err(error) => Err(error),
        };
        let missing = match seen {
            Ok(status) => missing(trial, &status),
            Err(error) => Some(problem::guest(&error)),
        };
        match missing {
            None => return Ok(()),
            Some(problem) if Instant::now() > deadline => return Err(problem),
            Some(_) => sleep(LOOK_AGAIN).await,
        }
    }
}

/// The first thing that was so, and is not.
fn missing(trial: &Trial, status: &NodeStatus) -> Option<ApiProblem> {
    if trial.met && !meets(status) {
        return Some(ApiProblem::new(ErrorCode::VmFailed, "it reaches no other machine of the clan any more"));
    }
    let lost = trial.services.iter().find(|name| !healthy(status).any(|there| there == *name))?;
    Some(ApiProblem::new(ErrorCode::VmFailed, format!("its service {lost} is not in good health any more")))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clan_types::{ClanId, MachineId, MachineName, PersonId};
    use clan_wire::{
        beacon::ServiceKind,
        control::{MachineStatus, PathKind, PathStatus, ServiceStatus},
    };

    use super::*;

    fn machine(n: u8, name: &str, this: bool, met: bool) -> MachineStatus {
        let path = PathStatus { kind: PathKind::Direct, remote: None, rtt_us: None, why: String::new() };
        MachineStatus {
            id: MachineId::from_bytes([n; 32]),
            name: name.parse::<MachineName>().unwrap(),
            owner: PersonId::from_bytes([n; 32]),
            address: std::net::Ipv6Addr::LOCALHOST,
            this,
            path: met.then_some(path),
            last_seen: None,
            version: None,
            certificate: None,
            relay: None,
            wireguard: Vec::new(),
            behind: None,
        }
    }

    fn service(name: &str, machine: &str, healthy: bool) -> ServiceStatus {
        ServiceStatus {
            name: name.parse().unwrap(),
            title: String::new(),
            kind: ServiceKind::Http,
            machine: machine.parse().unwrap(),
            port: 80,
            healthy,
        }
    }

    fn status(met: bool, services: Vec<ServiceStatus>) -> NodeStatus {
        NodeStatus {
            clan: ClanId::from_bytes([1; 32]),
            clan_name: "family".parse().unwrap(),
            machine: MachineId::from_bytes([1; 32]),
            control: clan_types::ControlMode::Local,
            quic: Vec::new(),
            relays: Vec::new(),
            people: Vec::new(),
            pending: Vec::new(),
            machines: vec![machine(1, "laptop", true, false), machine(2, "nas", false, met)],
            services,
            entries: 3,
            problems: Vec::new(),
        }
    }

    #[test]
    fn what_was_so_must_be_so_again_and_nothing_else() {
        let web = BTreeSet::from(["web".parse::<ServiceName>().unwrap()]);
        let previous = ImageId::from_bytes([3; 32]);
        let both = Trial { previous, met: true, services: web };
        let nothing = Trial { previous, met: false, services: BTreeSet::new() };
        let good = status(true, vec![service("web", "laptop", true)]);
        assert!(missing(&both, &good).is_none());
        let alone = status(false, vec![service("web", "laptop", true)]);
        assert_eq!(missing(&both, &alone).unwrap().message, "it reaches no other machine of the clan any more");
        let ill = status(true, vec![service("web", "laptop", false), service("web", "nas", true)]);
        assert_eq!(missing(&both, &ill).unwrap().message, "its service web is not in good health any more");
        assert!(missing(&nothing, &status(false, Vec::new())).is_none(), "it was alone, and offered nothing");
    }
}
