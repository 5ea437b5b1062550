//! Another image for a VM or a container, whose disk stays: one that is here, what the clan publishes and its machines give, or a
//! new one. What was so before must be so again afterwards: its controller answers, it reaches others, its services are in
//! good health. If not, it gets its previous image back by itself.

use std::{sync::Arc, time::Duration};

use clan_api::{ApiProblem, ErrorCode, Flavour, ImageSource, TaskKind, Transfer, UpdatePlan, UpdateVm};
use clan_build::StoredImage;
use clan_ledger::{State, VmDescription};
use clan_types::{ByteSize, ControlMode, ImageId, ServiceName};
use clan_wire::{
    control::{ControlRequest, NodeStatus},
    image::Manifest,
};
use tokio::time::{Instant, sleep};

use crate::{
    clan::Clan,
    fetch::{Fetcher, blocking},
    guest, image, images, invite, join,
    leave::{is_kept, start, vm_task},
    lock, machine,
    manager::Shared,
    problem, publish,
    record::{self, ClanRecord, Phase, Trial},
    sign,
    tasks::{Task, TaskHandle},
};

/// How long others and services may take to be there again once the controller answers.
const WELL: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(500);
const ANSWER: Duration = Duration::from_secs(5);

/// Which image a VM is to get.
enum Choice {
    /// That of this version of Clan.
    Build,
    Here(Box<StoredImage>),
    /// What the clan publishes, which is not here.
    Published(Box<(State, VmDescription)>),
}

/// An image that a machine is to get, and what the clan wants beside it.
struct Chosen {
    choice: Choice,
    /// What the clan's description wants that the machine is not, if it is the image of that: a sentence each.
    ///
    /// INVARIANT: an update changes none of it. What the person agreed to stays until they say otherwise themselves.
    stays: Vec<String>,
}

async fn choose(shared: &Shared, clan: &Clan, request: &UpdateVm) -> Result<Chosen, ApiProblem> {
    is_kept(clan, "restart")?;
    let what = clan.record.get().what();
    if clan.record.get().phase != Phase::Ready {
        return Err(ApiProblem::new(ErrorCode::Conflict, format!("the {what} is being made or removed"))
            .hint("wait for that task"));
    }
    if request.build {
        return match request.image {
            Some(_) => Err(ApiProblem::new(ErrorCode::BadRequest, "an image is named or built, not both")
                .hint("leave out `--image` or `--build`")),
            None => Ok(Chosen { choice: Choice::Build, stays: Vec::new() }),
        };
    }
    let named = request.image.as_deref().map(|text| (text, images::find(shared, text)));
    let published = sign::ledger(clan).await.map(|ledger| ledger.state().clone());
    if let Some((_, Ok(image))) = named {
        let described =
            published.ok().filter(|s| s.published.as_ref().is_some_and(|p| p.description.image == image.id));
        let stays = described.map(|state| wanted(clan, &state)).transpose()?.unwrap_or_default();
        return Ok(Chosen { choice: Choice::Here(Box::new(image)), stays });
    }
    let described = |state: &State| state.published.as_ref().map(|published| published.description.clone());
    match (named, published) {
        (Some((text, Err(unknown))), state) => match state.ok().and_then(|s| Some((described(&s)?, s))) {
            Some((description, state)) if description.image.to_string() == text.to_ascii_lowercase() => {
                let stays = wanted(clan, &state)?;
                Ok(Chosen { choice: Choice::Published(Box::new((state, description))), stays })
            }
            _ => Err(unknown.hint("without `--image` it is what the clan publishes")),
        },
        (_, Err(problem)) => {
            Err(problem.hint("what the clan publishes is known to its machine here; name an image instead: `--image`"))
        }
        (_, Ok(state)) => {
            let description = described(&state).ok_or_else(|| {
                ApiProblem::new(ErrorCode::NotFound, "the clan publishes no image")
                    .hint("name one that is here, `--image`, or build that of this version of Clan, `--build`")
            })?;
            let stays = wanted(clan, &state)?;
            let choice = match shared.images.get(&description.image) {
                Some(image) => Choice::Here(Box::new(image)),
                None => Choice::Published(Box::new((state, description))),
            };
            Ok(Chosen { choice, stays })
        }
    }
}

/// What the clan's description wants that the machine here is not: more than was agreed to when it was made, which its user can
/// give it, and which an update does not take. One that cannot be followed here at all is refused.
fn wanted(clan: &Clan, state: &State) -> Result<Vec<String>, ApiProblem> {
    let Some(published) = &state.published else { return Ok(Vec::new()) };
    publish::check_network(&published.network)?;
    Ok(differs(&clan.record.get(), &published.description, state.suggested_control))
}

fn differs(record: &ClanRecord, description: &VmDescription, control: ControlMode) -> Vec<String> {
    let mut stays = Vec::new();
    if record.flavour == record::Flavour::Vm {
        let sizes = [("memory", record.memory, description.memory), ("disk", record.disk, description.disk)];
        for (what, has, wanted) in sizes.into_iter().filter(|(_, has, wanted)| wanted > has) {
            let give = exact(wanted);
            stays.push(format!(
                "The clan's description asks for {wanted} of {what}: yours keeps its {has}. `clan vm resize --{what} {give}` gives it more."
            ));
        }
        if description.cpus > record.cpus {
            stays.push(format!(
                "The clan's description asks for {}: yours keeps its {}. `clan vm resize --cpus {}` gives it more.",
                processors(description.cpus),
                record.cpus,
                description.cpus
            ));
        }
    }
    if control != record.control {
        stays.push(format!(
            "The clan suggests that such a machine is steered by: {control}. Yours stays with: {}. `clan vm control {control}` changes it.",
            record.control
        ));
    }
    stays
}

/// What an update would do, and how much would have to come for it.
pub(crate) async fn preview(shared: &Shared, clan: &Clan, request: &UpdateVm) -> Result<UpdatePlan, ApiProblem> {
    let record = clan.record.get();
    let nothing = ByteSize::from_bytes(0);
    let plan = UpdatePlan {
        clan: record.name.clone(),
        flavour: if record.is_container() { Flavour::Container } else { Flavour::Vm },
        before: record.image,
        image: None,
        image_title: None,
        source: ImageSource::Build,
        download: Transfer { total: nothing, missing: nothing },
        stays: Vec::new(),
    };
    let Chosen { choice, stays } = choose(shared, clan, request).await?;
    let of = |image: ImageId, manifest: &Manifest, source: ImageSource| -> Result<UpdatePlan, ApiProblem> {
        let download = fits(shared, clan, manifest)?;
        let title = manifest.title.chars().filter(|c| !c.is_control()).take(100).collect();
        let (image, image_title, stays) = (Some(image), Some(title), stays.clone());
        Ok(UpdatePlan { image, image_title, source, download, stays, ..plan.clone() })
    };
    match choice {
        Choice::Build => Ok(plan),
        Choice::Here(image) => of(image.id, &image.manifest, ImageSource::Here),
        Choice::Published(published) => {
            let (state, description) = *published;
            let fetcher = members(clan).await?;
            let manifest = join::manifest(shared, &fetcher, &state, &description).await;
            shared.closing.spawn(fetcher.close());
            of(description.image, &manifest?, ImageSource::Members)
        }
    }
}

/// What of an image has yet to come, if the machine here can run it as it is.
fn fits(shared: &Shared, clan: &Clan, manifest: &Manifest) -> Result<Transfer, ApiProblem> {
    let record = clan.record.get();
    let memory = (!record.is_container()).then_some(record.memory);
    if let Some(memory) = memory.filter(|memory| *memory < manifest.memory_min) {
        let (least, give) = (manifest.memory_min, exact(manifest.memory_min));
        return Err(ApiProblem::new(
            ErrorCode::TooSmall,
            format!("the image needs {least} of memory, the VM has {memory}"),
        )
        .why("an update gives a machine no more than its user has agreed to")
        .hint(format!("if you agree, give it more first: `clan vm resize --memory {give}`")));
    }
    join::check_image(shared, manifest, memory)
}

/// A size as it can be typed.
fn exact(size: ByteSize) -> String {
    let bytes = size.as_bytes();
    let unit =
        [(30, "G"), (20, "M"), (10, "K")].into_iter().find(|(shift, _)| bytes > 0 && bytes.trailing_zeros() >= *shift);
    unit.map_or_else(|| bytes.to_string(), |(shift, letter)| format!("{}{letter}", bytes >> shift))
}

fn processors(count: u8) -> String {
    if count == 1 { "one processor".to_owned() } else { format!("{count} processors") }
}

/// The way to the clan's other machines, as one of its people.
async fn members(clan: &Clan) -> Result<Fetcher, ApiProblem> {
    let control = clan.control().map_err(|e| problem::guest(&e))?;
    let peers = invite::members(&control).await;
    if peers.is_empty() {
        return Err(ApiProblem::new(ErrorCode::Unreachable, "no other machine of the clan is there to give the image")
            .hint("try again when one is: `clan machines`"));
    }
    let status = guest::status(&control, guest::PATIENCE).await.map_err(|e| problem::guest(&e))?;
    Fetcher::of_member(clan.id(), clan.key.clone(), peers, status.relays).await
}

/// Gets what the clan publishes from its machines.
async fn fetch(
    shared: &Shared,
    clan: &Clan,
    task: &TaskHandle,
    (state, description): (State, VmDescription),
) -> Result<StoredImage, ApiProblem> {
    let fetcher = members(clan).await?;
    let fetched = async {
        let manifest = join::manifest(shared, &fetcher, &state, &description).await?;
        fits(shared, clan, &manifest)?;
        let _one = shared.building.lock().await;
        match shared.images.get(&description.image) {
            Some(image) => Ok(image),
            None => fetcher.image(&shared.images, &state, &manifest, task).await,
        }
    };
    let fetched = task.unless_cancelled(fetched).await;
    shared.closing.spawn(fetcher.close());
    fetched
}

fn steps(clan: &Clan) -> [String; 4] {
    let what = match clan.record.get().flavour {
        record::Flavour::Container => "container",
        _ => "virtual machine",
    };
    [
        "Get the image".into(),
        format!("Stop the {what}"),
        "Start it with the new image".into(),
        "See whether all is well".into(),
    ]
}

/// Whether an update could begin, without asking anybody else.
pub(crate) async fn check(shared: &Shared, clan: &Clan, request: &UpdateVm) -> Result<(), ApiProblem> {
    lock::check_unlocked(clan)?;
    choose(shared, clan, request).await.map(drop)
}

/// Switches a VM to another image, as a task: its user says so.
pub(crate) async fn task(shared: &Arc<Shared>, clan: Arc<Clan>, request: &UpdateVm) -> Result<Arc<Task>, ApiProblem> {
    begin(shared, clan, request, true).await
}

/// The same by an order, which the machine's journal tells of already.
pub(crate) async fn obey(shared: &Arc<Shared>, clan: Arc<Clan>, request: &UpdateVm) -> Result<Arc<Task>, ApiProblem> {
    begin(shared, clan, request, false).await
}

async fn begin(shared: &Arc<Shared>, clan: Arc<Clan>, request: &UpdateVm, note: bool) -> Result<Arc<Task>, ApiProblem> {
    lock::check_unlocked(&clan)?;
    let Chosen { choice, stays } = choose(shared, &clan, request).await?;
    let shared_ = shared.clone();
    let steps = steps(&clan);
    let steps: Vec<&str> = steps.iter().map(String::as_str).collect();
    vm_task(shared, clan, TaskKind::UpdateVm, "Update", &steps, move |clan, task| async move {
        stays.iter().for_each(|line| task.log(line.as_str()));
        let image = match choice {
            Choice::Here(image) => *image,
            Choice::Build => task.unless_cancelled(image::default_image(&shared_, &task)).await?,
            Choice::Published(published) => fetch(&shared_, &clan, &task, *published).await?,
        };
        switch(&shared_, &clan, &task, image, note).await
    })
}

/// Goes on with what an earlier manager began, as a task.
pub(crate) fn go_on(shared: &Arc<Shared>, clan: Arc<Clan>) {
    let shared_ = shared.clone();
    let steps = steps(&clan);
    let begun = vm_task(shared, clan, TaskKind::UpdateVm, "Update", &[&steps[3]], move |clan, task| async move {
        judge(&shared_, &clan, &task).await
    });
    if let Err(problem) = begun {
        tracing::warn!(problem = problem.message, "a machine's new image is not judged yet");
    }
}

async fn switch(
    shared: &Shared,
    clan: &Clan,
    task: &TaskHandle,
    image: StoredImage,
    note: bool,
) -> Result<(), ApiProblem> {
    let record = clan.record.get();
    let Some(previous) = record.image.filter(|previous| *previous != image.id) else {
        task.log(format!("the {} has this image already", record.what()));
        return Ok(());
    };
    fits(shared, clan, &image.manifest)?;
    let (store, id) = (shared.images.clone(), image.id);
    task.unless_cancelled(blocking(move || store.verify(&id))).await?.map_err(|e| problem::store(&e))?;
    let trial = was(clan, previous).await;
    if note {
        tell_journal(clan, previous, image.id).await;
    }
    task.log(format!("from the image {} to {}", previous.short(), image.id.short()));
    task.begin(1);
    let switched = machine::while_held(clan, task.unless_cancelled(machine::hold(clan)), async {
        // INVARIANT: one write says both which image is next and which is gone back to.
        let chosen = clan.record.update(|r| (r.image, r.trial, r.fresh) = (Some(image.id), Some(trial), None));
        chosen.map_err(|e| problem::disk(&e))
    });
    let ((), runs) = switched.await?;
    if !runs {
        task.log("it is judged when it is started");
        return Ok(());
    }
    task.begin(2);
    judge(shared, clan, task).await
}

/// Whoever else may steer the machine finds in its journal what its user did. One that does not run is told nothing.
async fn tell_journal(clan: &Clan, before: ImageId, after: ImageId) {
    let Ok(control) = clan.control() else { return };
    if let Err(error) = guest::tell(&control, &ControlRequest::NoteImage { before, after }).await {
        tracing::warn!(%error, "the machine's journal does not tell of its new image");
    }
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
        // A locked one says nothing of its image.
        lock::unlocked(clan, task).await;
        start(clan, task).await?;
        well(clan, &trial).await
    };
    let problem = match task.unless_cancelled(tried).await {
        Ok(()) => {
            let previous = Some(trial.previous);
            clan.record.update(|r| (r.trial, r.previous) = (None, previous)).map_err(|e| problem::disk(&e))?;
            if clan.record.get().is_container() {
                // What only the previous image needed unpacked.
                shared.keep_trees().await;
            }
            return Ok(());
        }
        // The next manager judges; or the next start, if nobody unlocked it.
        Err(problem) if shared.is_stopping() || clan.record.is_locked() => return Err(problem),
        Err(problem) => problem,
    };
    task.log(format!("not well: {}; back to the image {}", problem.message, trial.previous.short()));
    let what = clan.record.get().what();
    let mut held = Ok(());
    let hold = async {
        // Its record goes back even if it does not stop: it has the previous image when it next starts.
        held = machine::hold(clan).await;
        Ok(())
    };
    let back = machine::while_held(clan, hold, async {
        let back = clan.record.update(|r| (r.image, r.trial) = (Some(trial.previous), None));
        back.map_err(|e| problem::disk(&e))
    });
    let ((), runs) = back.await.map_err(|stuck| {
        let neither = format!("the {what} is not well with the new image, and its previous one cannot be put back");
        let both = format!("{}; then {}", problem.message, stuck.message);
        stuck.hints.into_iter().fold(ApiProblem::new(stuck.code, neither).why(both), ApiProblem::hint)
    })?;
    held?;
    let back = format!("the {what} is not well with the new image, and has its previous one again");
    if runs {
        start(clan, task).await.map_err(|again| {
            let neither = format!("the {what} is not well with the new image, nor with its previous one");
            ApiProblem::new(ErrorCode::VmFailed, neither)
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
    use proptest::prelude::*;

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
            control: None,
            image: None,
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
    fn what_the_clan_wants_beyond_what_was_agreed_to_is_said_and_smaller_sizes_are_not() {
        let mine = record::tests::record(1, Phase::Ready);
        let record = ClanRecord {
            memory: ByteSize::from_mib(512),
            disk: ByteSize::from_mib(2048),
            cpus: 1,
            control: ControlMode::Local,
            ..mine
        };
        let description = |memory, disk, cpus| VmDescription {
            image: ImageId::from_bytes([4; 32]),
            title: "new".parse().unwrap(),
            memory: ByteSize::from_mib(memory),
            cpus,
            disk: ByteSize::from_mib(disk),
        };
        assert_eq!(differs(&record, &description(512, 2048, 1), ControlMode::Local), Vec::<String>::new());
        assert_eq!(differs(&record, &description(128, 64, 0), ControlMode::Local), Vec::<String>::new());
        let all = differs(&record, &description(1536, 4096, 4), ControlMode::Remote);
        insta::assert_snapshot!(all.join("\n"), @r"
        The clan's description asks for 1.5 GiB of memory: yours keeps its 512 MiB. `clan vm resize --memory 1536M` gives it more.
        The clan's description asks for 4 GiB of disk: yours keeps its 2 GiB. `clan vm resize --disk 4G` gives it more.
        The clan's description asks for 4 processors: yours keeps its 1. `clan vm resize --cpus 4` gives it more.
        The clan suggests that such a machine is steered by: remote. Yours stays with: local. `clan vm control remote` changes it.
        ");
        // What runs without bounds has none to be raised.
        let container = ClanRecord { flavour: record::Flavour::Container, ..record };
        assert_eq!(differs(&container, &description(1536, 4096, 4), ControlMode::Remote).len(), 1);
    }

    proptest! {
        #[test]
        fn a_size_is_written_so_that_it_can_be_typed(bytes in 0..1u64 << 44, shift in 0u32..20) {
            let size = ByteSize::from_bytes(bytes << shift);
            prop_assert_eq!(exact(size).parse::<ByteSize>().unwrap(), size, "{}", exact(size));
        }

        #[test]
        fn nothing_is_wanted_of_what_is_there_and_all_else_is_said(
            (has, wants) in (prop::array::uniform3(1u8..5), prop::array::uniform3(1u8..5)),
            (mine, theirs) in (0usize..3, 0usize..3),
        ) {
            let modes = [ControlMode::Local, ControlMode::Shared, ControlMode::Remote];
            let mib = |n: u8| ByteSize::from_mib(u64::from(n));
            let [memory, disk, cpus] = has;
            let (memory, disk, control) = (mib(memory), mib(disk), modes[mine]);
            let record = ClanRecord { memory, disk, cpus, control, ..record::tests::record(1, Phase::Ready) };
            let [memory, disk, cpus] = wants;
            let (image, title) = (ImageId::from_bytes([4; 32]), "new".parse().unwrap());
            let description = VmDescription { image, title, memory: mib(memory), cpus, disk: mib(disk) };
            let more = has.iter().zip(&wants).filter(|(has, wants)| wants > has).count();
            let said = differs(&record, &description, modes[theirs]);
            prop_assert_eq!(said.len(), more + usize::from(mine != theirs), "{:?}", said);
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
