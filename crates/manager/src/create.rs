//! Founding a clan. Each step finds out what an earlier attempt has done, so that a killed manager goes on here.

use std::{error::Error, sync::Arc};

use clan_api::{ApiProblem, CreateClan, ErrorCode, TaskKind, TaskResult};
use clan_ledger::{Applications, AuthorId, Body, KeyProof, Ledger, Title, VmDescription, VmSetup};
use clan_types::{
    AppName, ByteSize, ClanId, ClanName, ControlMode, ImageId, MachineName, NetworkLayer, PersonName, RecoveryPhrase,
    ServiceName,
};
use clan_wire::{
    control::{ControlRequest, ControlResponse, Provision, Redeem},
    image::Manifest,
    peer::JoinRefusal,
};

use crate::{
    boot,
    clan::Clan,
    devices,
    disk::DiskError,
    fetch::blocking,
    guest::{self, GuestError, Identity},
    image, integrated, keeper, link,
    manager::Shared,
    problem,
    record::{ClanRecord, Flavour, PersonLog, Phase, Ports, Staging, random},
    sign,
    tasks::{Task, TaskHandle, now},
};

pub(crate) const DEFAULT_MEMORY: ByteSize = ByteSize::from_mib(512);
pub(crate) const DEFAULT_DISK: ByteSize = ByteSize::from_mib(2048);
/// The controller and its services take some 50 MiB.
const LEAST_CONTAINED: ByteSize = ByteSize::from_mib(128);
pub(crate) const LEAST_DISK: ByteSize = ByteSize::from_mib(64);
/// What the base OS keeps for itself.
const HOST_RESERVE: ByteSize = ByteSize::from_mib(128);
/// Being admitted may take several machines of the clan.
const PROVISION: std::time::Duration = std::time::Duration::from_secs(150);
const PROVISION_ATTEMPTS: u32 = 3;
/// How often a newcomer who waits for approval asks again.
const APPROVAL_INTERVAL: std::time::Duration = std::time::Duration::from_secs(3);
/// The service of the image that a founder's machine offers.
const FIRST_SERVICE: &str = "web";

const STEPS: [&str; 5] = [
    "Prepare the image",
    "Make the data disk",
    "Start the virtual machine",
    "Wait for its controller",
    "Found the clan",
];
const CONTAINER_STEPS: [&str; 5] =
    ["Prepare the image", "Unpack the image", "Start the container", "Wait for its controller", "Found the clan"];
const INTEGRATED_STEPS: [&str; 2] = ["Reach the controller", "Found the clan"];

/// Memory, disk and processors of a new VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) memory: ByteSize,
    pub(crate) disk: ByteSize,
    pub(crate) cpus: u8,
}

/// Checks what a VM needs against what this computer has, before anything long is begun.
pub(crate) fn check_computer(shared: &Shared, size: Size) -> Result<(), ApiProblem> {
    shared.options.qemu.check().map_err(|e| problem::vm(&e))?;
    let too_small = |message: String| Err(ApiProblem::new(ErrorCode::TooSmall, message));
    let host = crate::status::host(&shared.paths);
    if size.memory.as_mib() + HOST_RESERVE.as_mib() > host.memory_total.as_mib() {
        return too_small(format!(
            "the VM shall have {} of memory, this computer has {}",
            size.memory, host.memory_total
        ))
        .map_err(|p| p.hint("give it less: `--memory 256M`"));
    }
    if let Some(budget) = shared.options.vm_memory.filter(|budget| keeper::needed(size.memory) > *budget) {
        return Err(problem::beyond_budget(keeper::needed(size.memory), budget));
    }
    if size.disk < LEAST_DISK {
        return Err(ApiProblem::new(ErrorCode::BadRequest, format!("a data disk of {} is too small", size.disk))
            .hint("give it more: `--disk 1G`"));
    }
    if size.cpus == 0 || u32::from(size.cpus) > host.cpus {
        return Err(ApiProblem::new(
            ErrorCode::BadRequest,
            format!("the VM shall have {} processors, this computer has {}", size.cpus, host.cpus),
        ));
    }
    Ok(())
}

/// Checks what a container is to have at most. More memory than there is does no harm: nothing is set aside for it.
fn check_contained(size: Size, cpus: u32) -> Result<(), ApiProblem> {
    let bad = |message: String| ApiProblem::new(ErrorCode::BadRequest, message);
    if size.memory < LEAST_CONTAINED {
        return Err(bad(format!("{} are too little for a container", size.memory))
            .hint(format!("give it at least {LEAST_CONTAINED}")));
    }
    if size.cpus == 0 || u32::from(size.cpus) > cpus {
        return Err(bad(format!("the container shall have {} processors, this computer has {cpus}", size.cpus)));
    }
    Ok(())
}

/// As many processors as a person asks for.
pub(crate) fn processors(asked: u32) -> Result<u8, ApiProblem> {
    u8::try_from(asked).map_err(|_| ApiProblem::new(ErrorCode::BadRequest, "that many processors no machine can have"))
}

/// As many processors as a VM gets unless told otherwise.
pub(crate) fn default_cpus(shared: &Shared) -> u8 {
    u8::try_from(crate::status::host(&shared.paths).cpus.clamp(1, 2)).unwrap_or(1)
}

/// Puts a new clan on disk and starts founding it.
///
/// The owner's recovery phrase comes back if it was asked for, and is kept nowhere.
pub(crate) async fn begin(
    shared: &Arc<Shared>,
    mut request: CreateClan,
) -> Result<(Arc<Task>, Option<RecoveryPhrase>), ApiProblem> {
    let sizes = [request.memory.is_some(), request.disk.is_some(), request.cpus.is_some()];
    let home = match &request.integrate {
        Some(_) if request.container => return Err(one_or_the_other()),
        Some(socket) => Home::integrated(shared, socket, sizes.contains(&true)).await?,
        None if request.container => {
            let cpus = request.cpus.map_or_else(|| Ok(default_cpus(shared)), processors)?;
            let (memory, disk) = (request.memory.unwrap_or(DEFAULT_MEMORY), DEFAULT_DISK);
            Home::container(shared, Size { memory, disk, cpus }, request.disk.is_some())?
        }
        None => {
            let cpus = request.cpus.map_or_else(|| Ok(default_cpus(shared)), processors)?;
            let (memory, disk) = (request.memory.unwrap_or(DEFAULT_MEMORY), request.disk.unwrap_or(DEFAULT_DISK));
            Home::vm(shared, Size { memory, disk, cpus })?
        }
    };
    let passphrase = request.passphrase.take();
    let home = home.steered(request.control).encrypted(passphrase.is_some())?;
    let _one = shared.admission.lock().await;
    shared.check_name_free(&request.name)?;
    home.check_free(shared)?;
    let paths = shared.paths.clone();
    let (record, phrase) = blocking(move || found(&paths, &request, &home)).await??;
    let clan = shared.adopt(record).map_err(|e| problem::disk(&e))?;
    clan.record.set_passphrase(passphrase);
    Ok((spawn(shared, clan), phrase))
}

/// What a clan's machine will be on this computer, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Home {
    pub(crate) flavour: Flavour,
    pub(crate) size: Size,
    pub(crate) ports: Ports,
    /// Who may steer it.
    pub(crate) control: ControlMode,
    /// The image that its user agreed to; `None` where it is not chosen yet, or there is none.
    pub(crate) image: Option<ImageId>,
    /// Whether its data disk is encrypted.
    pub(crate) encrypted: bool,
}

impl Home {
    fn of(flavour: Flavour, size: Size, ports: Ports) -> Self {
        Self { flavour, size, ports, control: ControlMode::Local, image: None, encrypted: false }
    }

    /// The same, to run an image.
    #[must_use]
    pub(crate) fn running(self, image: Option<ImageId>) -> Self {
        Self { image, ..self }
    }

    /// The same, steered by whom its user agreed to.
    #[must_use]
    pub(crate) fn steered(self, control: Option<clan_api::ControlMode>) -> Self {
        Self { control: control.map_or_else(ControlMode::default, Into::into), ..self }
    }

    /// The same, with an encrypted data disk if that was asked for.
    pub(crate) fn encrypted(self, encrypted: bool) -> Result<Self, ApiProblem> {
        if encrypted && self.flavour != Flavour::Vm {
            return Err(ApiProblem::new(ErrorCode::BadRequest, "only a VM has a disk of its own to encrypt")
                .hint("encrypt this computer's disk instead, or take a VM"));
        }
        Ok(Self { encrypted, ..self })
    }

    /// A VM.
    pub(crate) fn vm(shared: &Shared, size: Size) -> Result<Self, ApiProblem> {
        check_computer(shared, size)?;
        Ok(Self::of(Flavour::Vm, size, free_ports()?))
    }

    /// A container. Its memory and processors are the most that it takes, where that can be bounded; its disk is what others are
    /// told that a VM of the clan should have, and bounds nothing.
    pub(crate) fn container(shared: &Shared, size: Size, disk_asked: bool) -> Result<Self, ApiProblem> {
        if disk_asked {
            return Err(ApiProblem::new(ErrorCode::BadRequest, "the size of a disk is for a VM")
                .why("a container's files are in a folder of this computer's, and nothing bounds them"));
        }
        check_contained(size, crate::status::host(&shared.paths).cpus)?;
        clan_vm::container::check().map_err(|missing| problem::vm(&clan_vm::VmError::Missing(missing)))?;
        Ok(Self::of(Flavour::Container, size, free_ports()?))
    }

    /// The computer itself, by a controller that runs, obeys us and is free.
    pub(crate) async fn integrated(shared: &Shared, socket: &str, sized: bool) -> Result<Self, ApiProblem> {
        if sized {
            return Err(ApiProblem::new(ErrorCode::BadRequest, "memory, disk and processors are for a VM")
                .why("an integrated machine is this computer itself"));
        }
        let socket = integrated::socket_path(socket)?;
        integrated::look(&socket).await?;
        let nothing = ByteSize::from_bytes(0);
        let (size, ports) = (Size { memory: nothing, disk: nothing, cpus: 0 }, Ports { quic: 0, wireguard: 0 });
        let home = Self::of(Flavour::Integrated { socket }, size, ports);
        home.check_free(shared)?;
        Ok(home)
    }

    /// The record of a clan that begins now, with its machine here.
    pub(crate) fn record(
        &self,
        id: ClanId,
        name: ClanName,
        person: PersonName,
        machine: MachineName,
        phase: Phase,
    ) -> ClanRecord {
        ClanRecord {
            id,
            name,
            person,
            owner: None,
            machine,
            phase,
            flavour: self.flavour.clone(),
            encrypted: self.encrypted,
            wanted: false,
            held: false,
            paused: false,
            restored: false,
            fresh: None,
            image: self.image,
            trial: None,
            previous: None,
            memory: self.size.memory,
            disk: self.size.disk,
            cpus: self.size.cpus,
            ports: self.ports,
            made: now(),
            control: self.control,
        }
    }

    /// No clan here, however far it has come, uses the same controller.
    pub(crate) fn check_free(&self, shared: &Shared) -> Result<(), ApiProblem> {
        let other = shared.clans().into_iter().find(|c| {
            let record = c.record.get();
            record.is_integrated() && record.flavour == self.flavour
        });
        match other {
            None => Ok(()),
            Some(other) => Err(ApiProblem::new(ErrorCode::Conflict, "a clan uses this controller already")
                .why(format!("{}; a controller serves one clan", other.name()))
                .hint(
                    "run another: `sudo clan controller --install --name NAME`, and name its socket with `--socket`",
                )),
        }
    }
}

/// A machine is a container or the computer itself.
pub(crate) fn one_or_the_other() -> ApiProblem {
    ApiProblem::new(ErrorCode::BadRequest, "a machine is a container or the computer itself, not both")
        .hint("leave out `--container` or `--integrate`")
}

fn free_ports() -> Result<Ports, ApiProblem> {
    keeper::free_ports()
        .map_err(|e| ApiProblem::new(ErrorCode::PortBusy, "no free UDP port was found").why(e.to_string()))
}

fn found(
    paths: &crate::Paths,
    request: &CreateClan,
    home: &Home,
) -> Result<(ClanRecord, Option<RecoveryPhrase>), ApiProblem> {
    let on_disk = |e: DiskError| problem::disk(&e);
    let staging = Staging::begin(paths).map_err(on_disk)?;
    let nonce = random(&paths.clans()).map_err(on_disk)?;
    let unfounded =
        |e: &dyn Error| ApiProblem::new(ErrorCode::Internal, "the clan cannot be founded").why(e.to_string());
    let (mut ledger, entry) = Ledger::found(&staging.key, request.name.clone(), request.person.clone(), nonce, now())
        .map_err(|e| unfounded(&e))?;
    let mut log = PersonLog::default();
    log.push(entry.encode());
    let phrase = if request.recovery {
        let (phrase, body) = devices::new_phrase(&ledger, &AuthorId::of(&staging.key))?;
        let entry = ledger.author(&staging.key, body, now()).map_err(|e| unfounded(&e))?;
        ledger.insert(entry.clone()).map_err(|e| unfounded(&e))?;
        log.push(entry.encode());
        Some(phrase)
    } else {
        None
    };
    let (name, person) = (request.name.clone(), request.person.clone());
    let record = home.record(ledger.clan(), name, person, request.machine.clone(), Phase::Creating);
    staging.commit(paths, &record, &log, None).map_err(on_disk)?;
    Ok((record, phrase))
}

/// Starts, or goes on with, founding.
pub(crate) fn spawn(shared: &Arc<Shared>, clan: Arc<Clan>) -> Arc<Task> {
    let name = clan.name();
    let shared_ = shared.clone();
    let record = clan.record.get();
    let integrated = record.is_integrated();
    let steps: &[&str] = match record.flavour {
        Flavour::Vm => &STEPS,
        Flavour::Container => &CONTAINER_STEPS,
        Flavour::Integrated { .. } => &INTEGRATED_STEPS,
    };
    shared.tasks.spawn(
        TaskKind::CreateClan,
        format!("Create the clan {name}"),
        Some(name),
        steps,
        move |task| async move {
            let outcome = if integrated {
                task.unless_cancelled(run_integrated(&shared_, &clan, &task)).await
            } else {
                task.unless_cancelled(run(&shared_, &clan, &task)).await
            };
            shared_.settle(&clan, outcome).await
        },
    )
}

/// With this computer itself as the first machine. There is no image, and so none is put in force: who joins with a VM
/// needs one that an admin publishes.
async fn run_integrated(shared: &Shared, clan: &Clan, task: &TaskHandle) -> Result<TaskResult, ApiProblem> {
    let (control, identity) = boot::bring_up(clan, task, 0).await?;
    task.begin(1);
    let proof = guest::consent(&control, clan).await.map_err(|e| problem::guest(&e))?;
    let entries = {
        let mut log = clan.log.lock().await;
        let mut ledger = sign::fold(clan.id(), log.entries());
        enrol(clan, &mut log, &mut ledger, &identity, proof)?;
        log.entries().map(<[u8]>::to_vec).collect()
    };
    provision(shared, clan, entries, None, Vec::new(), task).await?;
    finish(clan)
}

async fn run(shared: &Shared, clan: &Clan, task: &TaskHandle) -> Result<TaskResult, ApiProblem> {
    let on_disk = |e: DiskError| problem::disk(&e);
    task.begin(0);
    let known = clan.record.get().image.and_then(|id| shared.images.get(&id));
    let image = match known {
        Some(image) => {
            task.skip();
            image
        }
        None => image::default_image(shared, task).await?,
    };
    if !clan.record.get().is_container() && clan.record.get().memory < image.manifest.memory_min {
        return Err(ApiProblem::new(
            ErrorCode::TooSmall,
            format!("the image needs {} of memory", image.manifest.memory_min),
        )
        .hint("give the VM more with `--memory`"));
    }
    clan.record.update(|r| r.image = Some(image.id)).map_err(on_disk)?;
    task.begin(1);
    boot::data_disk(shared, clan, task).await?;
    task.begin(2);
    let (control, identity) = boot::bring_up(clan, task, 3).await?;
    task.begin(4);
    let proof = guest::consent(&control, clan).await.map_err(|e| problem::guest(&e))?;
    let entries = {
        let mut log = clan.log.lock().await;
        let mut ledger = sign::fold(clan.id(), log.entries());
        enrol(clan, &mut log, &mut ledger, &identity, proof)?;
        if ledger.state().published.is_none() {
            let description = describe(&clan.record.get(), image.id, &image.manifest)?;
            let body = Body::PublishVm { description, setup: first_setup() };
            sign::sign(clan.record.paths(), &clan.key, &mut log, &mut ledger, body)?;
        }
        log.entries().map(<[u8]>::to_vec).collect()
    };
    let offers = FIRST_SERVICE.parse::<ServiceName>().into_iter().collect();
    provision(shared, clan, entries, None, offers, task).await?;
    finish(clan)
}

/// Signs the enrolment of the machine here, unless an earlier attempt has.
pub(crate) fn enrol(
    clan: &Clan,
    log: &mut PersonLog,
    ledger: &mut Ledger,
    identity: &Identity,
    proof: KeyProof,
) -> Result<(), ApiProblem> {
    let is = |body: &Body| matches!(body, Body::Enrol { machine, .. } if *machine == identity.machine);
    if ledger.entries().any(|e| e.author() == clan.author() && is(e.body())) {
        return Ok(());
    }
    let Identity { machine, wireguard: wg, .. } = *identity;
    let body = Body::Enrol { machine, name: clan.record.get().machine, wg, proof };
    sign::sign(clan.record.paths(), &clan.key, log, ledger, body).map(drop)
}

/// The image that a clan begins with has the first service in it. Its control mode is nobody's but its user's to begin with.
fn first_setup() -> VmSetup {
    let applications = Applications::new(FIRST_SERVICE.parse::<AppName>()).unwrap_or_default();
    VmSetup { network: NetworkLayer::default(), control: ControlMode::default(), applications }
}

fn describe(record: &ClanRecord, image: clan_types::ImageId, manifest: &Manifest) -> Result<VmDescription, ApiProblem> {
    let title = title(manifest)?;
    Ok(VmDescription { image, title, memory: record.memory, cpus: record.cpus, disk: record.disk })
}

/// What an image is called in the ledger.
pub(crate) fn title(manifest: &Manifest) -> Result<Title, ApiProblem> {
    let line: String = manifest.title.chars().filter(|c| !c.is_control()).take(100).collect();
    line.parse().map_err(|e: clan_ledger::TitleError| {
        ApiProblem::new(ErrorCode::Internal, "the image has no usable title").why(e.to_string())
    })
}

/// Gives the machine its place. Safe to repeat, so that a controller that restarts meanwhile does no harm.
pub(crate) async fn provision(
    shared: &Shared,
    clan: &Clan,
    entries: Vec<Vec<u8>>,
    redeem: Option<Redeem>,
    offers: Vec<ServiceName>,
    task: &TaskHandle,
) -> Result<(), ApiProblem> {
    let record = clan.record.get();
    let environment = link::environment(&record, &shared.images).await;
    let control = record.control;
    let request = Provision { clan: record.id, name: record.machine, redeem, offers, environment, control };
    let request = ControlRequest::Provision(Box::new(request));
    let (mut attempt, mut waits) = (1, false);
    loop {
        let control = boot::wait(clan, clan.keeper.watch_control(), "controller", PROVISION, task).await?;
        match guest::provision(&control, &request, &entries, PROVISION).await {
            Ok(ControlResponse::Provisioned) => return Ok(()),
            Ok(_) => return Err(problem::guest(&GuestError::Unexpected { what: "take its place in the clan" })),
            Err(GuestError::Refused(JoinRefusal::Pending)) => {
                if !std::mem::replace(&mut waits, true) {
                    task.log("waiting for approval: an admin of the clan lets you in with `clan approve`, or not");
                }
                tokio::time::sleep(APPROVAL_INTERVAL).await;
            }
            Err(error @ (GuestError::TimedOut { .. } | GuestError::Channel(_) | GuestError::Message { .. }))
                if attempt < PROVISION_ATTEMPTS =>
            {
                task.log(format!("{error}: trying again"));
                attempt += 1;
                tokio::time::sleep(std::time::Duration::from_secs(2)).await;
            }
            Err(error) => return Err(problem::guest(&error)),
        }
    }
}

/// From here on this computer is in the clan.
pub(crate) fn finish(clan: &Clan) -> Result<TaskResult, ApiProblem> {
    clan.record.update(|r| r.phase = Phase::Ready).map_err(|e| problem::disk(&e))?;
    // The right to join is used up; a leftover does no harm.
    if let Err(error) = crate::disk::remove_file(&clan.record.paths().link()) {
        tracing::debug!(%error, "the used link stays on disk");
    }
    let record = clan.record.get();
    Ok(TaskResult::Clan { id: record.id, name: record.name })
}
