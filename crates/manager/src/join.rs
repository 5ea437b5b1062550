//! Joining a clan: what a link leads to, and going there. Each step finds out what an earlier attempt has done.

use std::sync::{Arc, PoisonError};

use clan_api::{
    ApiProblem, ContainerPlan, ErrorCode, IntegratedPlan, JoinClan, JoinPreview, PreviewJoin, TaskKind, TaskResult,
    Transfer, VmPlan,
};
use clan_ledger::{Body, State, VmDescription};
use clan_types::{ByteSize, DEVICE_LINK_LIFETIME, InviteLink, MachineName, PersonName, Purpose, Role, Timestamp};
use clan_wire::{
    control::Redeem,
    image::{FileRole, Manifest},
    peer::InviteProof,
};
use ed25519_dalek::SigningKey;

use crate::{
    boot,
    clan::{Clan, fingerprint},
    create::{self, Home, Size},
    devices,
    disk::{self, DiskError},
    fetch::{Fetcher, Found, blocking},
    guest, integrated,
    manager::Shared,
    problem, publish,
    record::{ClanRecord, Flavour, PersonLog, Phase, Staging},
    sign,
    tasks::{Task, TaskHandle, now},
};

const STEPS: [&str; 6] = [
    "Ask the clan",
    "Get the image",
    "Make the data disk",
    "Start the virtual machine",
    "Wait for its controller",
    "Be admitted to the clan",
];
const CONTAINER_STEPS: [&str; 6] = [
    "Ask the clan",
    "Get the image",
    "Unpack the image",
    "Start the container",
    "Wait for its controller",
    "Be admitted to the clan",
];
const INTEGRATED_STEPS: [&str; 3] = ["Ask the clan", "Reach the controller", "Be admitted to the clan"];

/// How much larger an image is when it is unpacked, about.
const UNPACKED: u64 = 2;
/// What a container is not.
const CONTAINER_WARNING: &str = "A container shares this computer's kernel: it keeps less apart than a virtual machine. \
     A fault in the kernel that the clan's machine makes use of opens this computer to it, with your rights at least, and \
     nothing bounds the memory, the disk and the processors that it takes. Choose it for clans whose admins you trust.";

fn parse(shared: &Shared, link: &str) -> Result<InviteLink, ApiProblem> {
    let link: InviteLink = link.parse().map_err(|e| problem::link(&e))?;
    if let Some(clan) = shared.get(&link.clan) {
        return Err(ApiProblem::new(
            ErrorCode::AlreadyJoined,
            format!("this computer is in the clan `{}` already", clan.name()),
        )
        .hint("see it with `clan status`"));
    }
    Ok(link)
}

/// `own` is the key to ask with instead of the link's.
async fn open(shared: &Shared, link: InviteLink, own: Option<SigningKey>) -> Result<Fetcher, ApiProblem> {
    let first = *shared.answered.lock().unwrap_or_else(PoisonError::into_inner);
    match own {
        Some(key) => Fetcher::open_with(link, key, first).await,
        None => Fetcher::open(link, first).await,
    }
}

fn close(shared: &Shared, fetcher: Fetcher) {
    *shared.answered.lock().unwrap_or_else(PoisonError::into_inner) = fetcher.answered();
    shared.closing.spawn(fetcher.close());
}

/// Fetches and checks what a link leads to.
pub(crate) async fn preview(shared: &Shared, question: &PreviewJoin) -> Result<JoinPreview, ApiProblem> {
    let link = parse(shared, &question.link)?;
    if let Some(socket) = &question.integrate {
        integrated::socket_path(socket)?;
        if question.container {
            return Err(create::one_or_the_other());
        }
    }
    let fetcher = open(shared, link, None).await?;
    let outcome = look(shared, &fetcher, question).await;
    close(shared, fetcher);
    outcome
}

async fn look(shared: &Shared, fetcher: &Fetcher, question: &PreviewJoin) -> Result<JoinPreview, ApiProblem> {
    let found = fetcher.preview().await?;
    let state = found.ledger.state();
    let (Some(offer), Some(clan_name)) = (Offer::of(fetcher, state), &state.clan_name) else {
        return Err(problem::refusal(&clan_wire::peer::JoinRefusal::UnknownInvite));
    };
    let mut warnings = Vec::new();
    if shared.find_named(clan_name).is_some() {
        warnings
            .push(format!("This computer is in another clan that is called `{clan_name}`, too: leave that one first."));
    }
    let mut container = None;
    let (vm, integrated) = match (question.integrate.as_deref(), &found.description) {
        (Some(socket), _) => (None, Some(integrated_plan(shared, socket, &mut warnings).await)),
        (None, Some(description)) if question.container => {
            container = Some(container_plan(shared, fetcher, state, description, &mut warnings).await?);
            (None, None)
        }
        (None, Some(description)) => (Some(vm_plan(shared, fetcher, state, description, &mut warnings).await?), None),
        (None, None) => {
            warnings.push(
                "This clan names no image for virtual machines: join with this computer itself, `--integrate`.".into(),
            );
            (None, None)
        }
    };
    Ok(JoinPreview {
        clan: found.ledger.clan(),
        clan_name: clan_name.clone(),
        fingerprint: fingerprint(&found.ledger.clan()),
        device_of: (fetcher.purpose() == Purpose::Device).then(|| offer.by.clone()),
        inviter: offer.by,
        role: offer.role,
        expires: offer.expires,
        people: state.people.keys().filter_map(|id| state.person(id)).map(|p| p.name.clone()).collect(),
        machines: state.good_machines().map(|(_, m)| m.name.clone()).collect(),
        vm,
        container,
        integrated,
        control_mode: state.suggested_control.into(),
        warnings,
    })
}

/// What a link offers.
struct Offer {
    by: PersonName,
    role: Role,
    expires: Timestamp,
}

impl Offer {
    fn of(fetcher: &Fetcher, state: &State) -> Option<Self> {
        match fetcher.purpose() {
            Purpose::Join => {
                let invite = state.invites.get(&fetcher.invite())?;
                let by = state.people.get(&invite.by)?.name.clone();
                Some(Self { by, role: invite.role, expires: invite.expires })
            }
            Purpose::Device => {
                let device = state.device_in_good_standing(&fetcher.device())?;
                let person = state.person(&device.owner)?;
                // A phrase does not expire: what it opened here has the time of a link.
                let began = if device.is_link() { device.since } else { now() };
                let expires = began.plus(DEVICE_LINK_LIFETIME);
                Some(Self { by: person.name.clone(), role: person.role, expires })
            }
        }
    }
}

async fn integrated_plan(shared: &Shared, socket: &str, warnings: &mut Vec<String>) -> IntegratedPlan {
    warnings.push(
        "Machines of the clan will reach this computer as the clan's rules say: at first its published services, and admins its SSH port."
            .into(),
    );
    let problem = Home::integrated(shared, socket, false).await.err();
    IntegratedPlan { socket: socket.to_owned(), problem }
}

async fn vm_plan(
    shared: &Shared,
    fetcher: &Fetcher,
    state: &State,
    description: &VmDescription,
    warnings: &mut Vec<String>,
) -> Result<VmPlan, ApiProblem> {
    let manifest = manifest(shared, fetcher, state, description).await?;
    let size = size(shared, description, None, None, None)?;
    let accelerator = crate::status::accelerator(shared).await;
    let download = Transfer { total: manifest.total_size(), missing: missing(shared, &manifest) };
    let host = crate::status::host(&shared.paths);
    if host.memory_available < size.memory {
        warnings.push(format!("The VM may take {} of memory; {} are free now.", size.memory, host.memory_available));
    }
    let disk_needed = ByteSize::from_bytes(download.missing.as_bytes().saturating_add(size.disk.as_bytes()));
    if host.disk_available < disk_needed {
        warnings.push(format!("The VM may take up to {disk_needed} of disk; {} are free now.", host.disk_available));
    }
    if accelerator.kind == clan_api::AcceleratorKind::Tcg {
        warnings.push(format!("The VM will be slow. {}", accelerator.reason));
    }
    if let Some(exposure) = clan_vm::network::exposure() {
        warnings.push(format!("{} {}", exposure.why, exposure.remedy));
    }
    Ok(VmPlan {
        image: description.image,
        image_title: description.title.to_string(),
        download,
        memory: size.memory,
        disk: size.disk,
        cpus: u32::from(size.cpus),
        accelerator,
    })
}

async fn container_plan(
    shared: &Shared,
    fetcher: &Fetcher,
    state: &State,
    description: &VmDescription,
    warnings: &mut Vec<String>,
) -> Result<ContainerPlan, ApiProblem> {
    let manifest = manifest(shared, fetcher, state, description).await?;
    let download = Transfer { total: manifest.total_size(), missing: missing(shared, &manifest) };
    let host = crate::status::host(&shared.paths);
    // It is kept as it came, and unpacked beside.
    let unpacked = manifest.files.iter().filter(|f| matches!(f.role, FileRole::Root | FileRole::Layer));
    let unpacked = unpacked.map(|f| f.size.as_bytes()).fold(0, u64::saturating_add).saturating_mul(UNPACKED);
    let disk_needed = ByteSize::from_bytes(download.missing.as_bytes().saturating_add(unpacked));
    if host.disk_available < disk_needed {
        warnings.push(format!("The container takes some {disk_needed} of disk; {} are free now.", host.disk_available));
    }
    warnings.push(CONTAINER_WARNING.into());
    let problem = Home::container(shared, false).err();
    Ok(ContainerPlan { image: description.image, image_title: description.title.to_string(), download, problem })
}

async fn manifest(
    shared: &Shared,
    fetcher: &Fetcher,
    state: &State,
    description: &VmDescription,
) -> Result<Manifest, ApiProblem> {
    match shared.images.get(&description.image) {
        Some(stored) => Ok(stored.manifest),
        None => fetcher.manifest(state, &description.image).await,
    }
}

/// Bytes of an image that no image here has.
fn missing(shared: &Shared, manifest: &Manifest) -> ByteSize {
    let here = shared.images.list();
    let has = |hash| here.iter().any(|image| image.manifest.files.iter().any(|f| f.hash == hash));
    ByteSize::from_bytes(
        manifest.files.iter().filter(|f| !has(f.hash)).map(|f| f.size.as_bytes()).fold(0, u64::saturating_add),
    )
}

/// The size that the clan recommends, unless the person says otherwise, fitted to this computer.
fn size(
    shared: &Shared,
    description: &VmDescription,
    memory: Option<ByteSize>,
    disk: Option<ByteSize>,
    cpus: Option<u32>,
) -> Result<Size, ApiProblem> {
    let cpus = match cpus {
        None => description.cpus.clamp(1, create::default_cpus(shared)),
        Some(n) => u8::try_from(n)
            .map_err(|_| ApiProblem::new(ErrorCode::BadRequest, "that many processors no VM can have"))?,
    };
    let size = Size { memory: memory.unwrap_or(description.memory), disk: disk.unwrap_or(description.disk), cpus };
    create::check_computer(shared, size)?;
    Ok(size)
}

/// Starts joining. The link is checked again; only then anything is put on disk.
pub(crate) async fn begin(shared: &Arc<Shared>, request: JoinClan) -> Result<Arc<Task>, ApiProblem> {
    let link = parse(shared, &request.link)?;
    let fetcher = open(shared, link.clone(), None).await?;
    let outcome = begin_by(shared, request, link, &fetcher).await;
    close(shared, fetcher);
    outcome
}

async fn begin_by(
    shared: &Arc<Shared>,
    request: JoinClan,
    link: InviteLink,
    fetcher: &Fetcher,
) -> Result<Arc<Task>, ApiProblem> {
    let found = fetcher.preview().await?;
    let home = match (&request.integrate, &found.description) {
        (Some(_), _) if request.container => return Err(create::one_or_the_other()),
        (Some(socket), _) => {
            let sized = request.memory.is_some() || request.disk.is_some() || request.cpus.is_some();
            Home::integrated(shared, socket, sized).await?
        }
        (None, Some(_)) if request.container => {
            let sized = request.memory.is_some() || request.disk.is_some() || request.cpus.is_some();
            Home::container(shared, sized)?
        }
        (None, Some(description)) => {
            let size = size(shared, description, request.memory, request.disk, request.cpus)?;
            publish::check_disk(size.disk, crate::status::host(&shared.paths).disk_available)?;
            Home::vm(shared, size)?
        }
        (None, None) => return Err(no_image()),
    };
    let home = home.steered(request.control);
    check_names(&found, (link.purpose == Purpose::Join).then_some(&request.person), &request.machine)?;
    let _one = shared.admission.lock().await;
    // Another request may have been faster.
    parse(shared, &request.link)?;
    if let Some(name) = &found.ledger.state().clan_name {
        shared.check_name_free(name)?;
    }
    home.check_free(shared)?;
    let paths = shared.paths.clone();
    let record = match link.purpose {
        Purpose::Join => blocking(move || put(&paths, &request, &link, &found, &home)).await??,
        Purpose::Device => devices::arrive(paths, &request, &link, fetcher, found, &home).await?,
    };
    let clan = shared.adopt(record).map_err(|e| problem::disk(&e))?;
    Ok(spawn(shared, clan))
}

fn no_image() -> ApiProblem {
    ApiProblem::new(ErrorCode::Conflict, "the clan does not say what a virtual machine in it is to run")
        .why("its machines are integrated ones: it has no image yet")
        .hint("join with this computer itself: `clan join LINK --integrate`")
}

fn check_names(found: &Found, person: Option<&PersonName>, machine: &MachineName) -> Result<(), ApiProblem> {
    let taken = |what: &str, name: &str, flag: &str| {
        Err(ApiProblem::new(ErrorCode::NameTaken, format!("the clan has a {what} called `{name}` already"))
            .hint(format!("choose another with `{flag}`")))
    };
    let state = found.ledger.state();
    if let Some(person) = person.filter(|person| state.person_named(person).is_some()) {
        return taken("person", person.as_str(), "--person");
    }
    if state.machine_named(machine).is_some() {
        return taken("machine", machine.as_str(), "--machine");
    }
    Ok(())
}

fn put(
    paths: &crate::Paths,
    request: &JoinClan,
    link: &InviteLink,
    found: &Found,
    home: &Home,
) -> Result<ClanRecord, ApiProblem> {
    let on_disk = |e: DiskError| problem::disk(&e);
    let name = found
        .ledger
        .state()
        .clan_name
        .clone()
        .ok_or_else(|| ApiProblem::new(ErrorCode::Untrusted, "the clan has no name"))?;
    let staging = Staging::begin(paths).map_err(on_disk)?;
    let invite_key = SigningKey::from_bytes(link.secret.expose());
    let person = clan_types::PersonId::from_bytes(staging.key.verifying_key().to_bytes());
    let body = Body::admission(&invite_key, &link.clan, &person, request.person.clone());
    let entry = found.ledger.author(&staging.key, body, now());
    let entry =
        entry.map_err(|e| ApiProblem::new(ErrorCode::Internal, "the admission cannot be signed").why(e.to_string()))?;
    let mut log = PersonLog::default();
    log.push(entry.encode());
    let record = home.record(link.clan, name, request.person.clone(), request.machine.clone(), Phase::Joining);
    staging.commit(paths, &record, &log, Some(&link.to_string())).map_err(on_disk)?;
    Ok(record)
}

/// Starts, or goes on with, joining.
pub(crate) fn spawn(shared: &Arc<Shared>, clan: Arc<Clan>) -> Arc<Task> {
    let name = clan.name();
    let shared_ = shared.clone();
    let steps: &[&str] = match clan.record.get().flavour {
        Flavour::Vm => &STEPS,
        Flavour::Container => &CONTAINER_STEPS,
        Flavour::Integrated { .. } => &INTEGRATED_STEPS,
    };
    shared.tasks.spawn(TaskKind::JoinClan, format!("Join the clan {name}"), Some(name), steps, move |task| async move {
        let outcome = task.unless_cancelled(run(&shared_, &clan, &task)).await;
        shared_.settle(&clan, outcome).await
    })
}

async fn run(shared: &Shared, clan: &Clan, task: &TaskHandle) -> Result<TaskResult, ApiProblem> {
    let text = disk::read(&clan.record.paths().link()).map_err(|e| problem::disk(&e))?;
    let text = text
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .ok_or_else(|| problem::disk(&disk::missing(&clan.record.paths().link())))?;
    let link: InviteLink = text.parse().map_err(|e| problem::link(&e))?;
    task.begin(0);
    // As a device we are known by our own key: a link's, or a phrase's, is not kept.
    let right = match link.purpose {
        Purpose::Join => SigningKey::from_bytes(link.secret.expose()),
        Purpose::Device => clan.key.clone(),
    };
    let fetcher = open(shared, link, Some(right.clone())).await?;
    let outcome = prepare(shared, clan, task, &fetcher).await;
    let (peers, relays) = (fetcher.peers().await, fetcher.relays());
    close(shared, fetcher);
    let theirs = outcome?;
    let (control, identity) = if clan.record.get().is_integrated() {
        let guest = boot::bring_up(clan, task, 1).await?;
        task.begin(2);
        guest
    } else {
        task.begin(2);
        boot::data_disk(shared, clan, task).await?;
        task.begin(3);
        let guest = boot::bring_up(clan, task, 4).await?;
        task.begin(5);
        guest
    };
    if identity.clan == Some(clan.id()) {
        // An earlier attempt was admitted, and could not write it down.
        return create::finish(clan);
    }
    let consent = guest::consent(&control, clan).await.map_err(|e| problem::guest(&e))?;
    let mine: Vec<Vec<u8>> = {
        let mut log = clan.log.lock().await;
        let mut ledger = sign::fold(clan.id(), theirs.iter().map(Vec::as_slice).chain(log.entries()));
        create::enrol(clan, &mut log, &mut ledger, &identity, consent)?;
        log.entries().map(<[u8]>::to_vec).collect()
    };
    let proof = Some(InviteProof::new(&right, &clan.id(), &identity.machine));
    let redeem = Redeem { entries: mine, peers, relays, proof };
    create::provision(shared, clan, theirs, Some(redeem), Vec::new(), task).await?;
    create::finish(clan)
}

/// Asks the clan, and fetches the image. Gives the clan's entries.
async fn prepare(
    shared: &Shared,
    clan: &Clan,
    task: &TaskHandle,
    fetcher: &Fetcher,
) -> Result<Vec<Vec<u8>>, ApiProblem> {
    let record = clan.record.get();
    let paths = clan.record.paths();
    let has_run = if record.is_container() { paths.data() } else { paths.data_disk() };
    let machine_may_be_in = record.is_integrated() || (record.image.is_some() && has_run.exists());
    let found = match fetcher.preview().await {
        Ok(found) => found,
        // After a restart: the invite may be used, by us.
        Err(problem) if problem.code == ErrorCode::InviteUsed && machine_may_be_in => {
            task.log("the invite has been used, perhaps by this computer: asking the machine here");
            return Ok(Vec::new());
        }
        Err(problem) => return Err(problem),
    };
    if !record.is_integrated() {
        let image = found.description.as_ref().ok_or_else(no_image)?.image;
        task.begin(1);
        if shared.images.get(&image).is_some() {
            task.skip();
        } else {
            let manifest = fetcher.manifest(found.ledger.state(), &image).await?;
            check_image(&manifest, missing(shared, &manifest), clan)?;
            let _one = shared.building.lock().await;
            if shared.images.get(&image).is_none() {
                fetcher.image(&shared.images, found.ledger.state(), &manifest, task).await?;
            }
        }
        clan.record.update(|r| r.image = Some(image)).map_err(|e| problem::disk(&e))?;
    }
    Ok(found.ledger.entries().map(clan_ledger::Entry::encode).collect())
}

/// `missing` is what of the image has yet to come.
fn check_image(manifest: &Manifest, missing: ByteSize, clan: &Clan) -> Result<(), ApiProblem> {
    let record = clan.record.get();
    if manifest.architecture != std::env::consts::ARCH {
        return Err(ApiProblem::new(
            ErrorCode::TooSmall,
            format!("the image is for {} computers, this one is {}", manifest.architecture, std::env::consts::ARCH),
        ));
    }
    if !record.is_container() && record.memory < manifest.memory_min {
        return Err(ApiProblem::new(ErrorCode::TooSmall, format!("the image needs {} of memory", manifest.memory_min))
            .hint("give the VM more with `--memory`"));
    }
    // Kernel and initramfs are there twice: on the boot disk, too.
    let boot = [FileRole::Kernel, FileRole::Initramfs].into_iter().filter_map(|role| manifest.file(role).ok());
    let needed = boot.map(|f| f.size.as_bytes()).fold(missing.as_bytes(), u64::saturating_add);
    match problem::available(&record_dir(clan)) {
        Some(free) if free.as_bytes() < needed => {
            Err(ApiProblem::new(ErrorCode::DiskFull, "there is no room for the image")
                .why(format!("it takes {} more, {free} are free", ByteSize::from_bytes(needed)))
                .hint("free some space, or use another data folder with `--data`"))
        }
        _ => Ok(()),
    }
}

fn record_dir(clan: &Clan) -> std::path::PathBuf {
    clan.record.paths().dir.clone()
}
