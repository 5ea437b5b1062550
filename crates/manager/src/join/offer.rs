//! What a link offers, and whether this computer can take it: found out before anything is put on disk.

use std::sync::PoisonError;

use clan_api::{ApiProblem, ContainerPlan, ErrorCode, IntegratedPlan, JoinPreview, PreviewJoin, Transfer, VmPlan};
use clan_ledger::{State, VmDescription};
use clan_types::{ByteSize, DEVICE_LINK_LIFETIME, PersonName, Purpose, Role, Timestamp};
use clan_wire::image::{FileRole, Manifest};

use super::{close, open, parse};
use crate::{
    clan::fingerprint,
    create::{self, Home, Size},
    fetch::Fetcher,
    integrated,
    manager::Shared,
    problem, publish,
    tasks::now,
};

/// How much larger an image is when it is unpacked, about.
const UNPACKED: u64 = 2;
/// What a container is not.
const CONTAINER_WARNING: &str = "A container shares this computer's kernel: it keeps less apart than a virtual machine. \
     A fault in the kernel that the clan's machine makes use of opens this computer to it, with your rights at least, and \
     nothing bounds the disk that it takes. Choose it for clans whose admins you trust.";

/// The size that a person asks for, instead of what the clan recommends.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Asked {
    pub(super) memory: Option<ByteSize>,
    pub(super) disk: Option<ByteSize>,
    pub(super) cpus: Option<u32>,
}

impl Asked {
    pub(super) fn anything(self) -> bool {
        self.memory.is_some() || self.disk.is_some() || self.cpus.is_some()
    }
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
    let asked = Asked { memory: question.memory, disk: question.disk, cpus: question.cpus };
    let fetcher = open(shared, link, None).await?;
    let outcome = look(shared, &fetcher, question, asked).await;
    close(shared, fetcher);
    outcome
}

async fn look(
    shared: &Shared,
    fetcher: &Fetcher,
    question: &PreviewJoin,
    asked: Asked,
) -> Result<JoinPreview, ApiProblem> {
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
    let (vm, integrated) = match (question.integrate.as_deref(), found.description()) {
        (Some(socket), _) => (None, Some(integrated_plan(shared, socket, asked, &mut warnings).await)),
        (None, Some(description)) if question.container => {
            container = Some(container_plan(shared, fetcher, state, description, asked, &mut warnings).await?);
            (None, None)
        }
        (None, Some(description)) => {
            (Some(vm_plan(shared, fetcher, state, description, asked, &mut warnings).await?), None)
        }
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
        network_layer: found.published.as_ref().map(|p| p.network.clone()).unwrap_or_default(),
        applications: found.published.iter().flat_map(|p| p.applications.iter()).cloned().collect(),
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

async fn integrated_plan(shared: &Shared, socket: &str, asked: Asked, warnings: &mut Vec<String>) -> IntegratedPlan {
    warnings.push(
        "Machines of the clan will reach this computer as the clan's rules say: at first its published services, and admins its SSH port."
            .into(),
    );
    let problem = Home::integrated(shared, socket, asked.anything()).await.err();
    IntegratedPlan { socket: socket.to_owned(), problem }
}

async fn vm_plan(
    shared: &Shared,
    fetcher: &Fetcher,
    state: &State,
    description: &VmDescription,
    asked: Asked,
    warnings: &mut Vec<String>,
) -> Result<VmPlan, ApiProblem> {
    // INVARIANT: what does not fit here is refused before anything is fetched.
    let size = size(shared, description, asked)?;
    let manifest = manifest(shared, fetcher, state, description).await?;
    let download = check_image(shared, &manifest, Some(size.memory))?;
    let accelerator = crate::status::accelerator(shared).await;
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
    asked: Asked,
    warnings: &mut Vec<String>,
) -> Result<ContainerPlan, ApiProblem> {
    let manifest = manifest(shared, fetcher, state, description).await?;
    let download = check_image(shared, &manifest, None)?;
    warnings.push(CONTAINER_WARNING.into());
    if let Err(why) = clan_vm::limits::check() {
        warnings.push(format!("Nothing will bound the memory and the processors that the container takes: {why}."));
    }
    let size = wished(shared, description, asked)?;
    Ok(ContainerPlan {
        image: description.image,
        image_title: description.title.to_string(),
        download,
        unpacked: unpacked(&manifest, |_| true),
        memory: size.memory,
        cpus: u32::from(size.cpus),
        problem: Home::container(shared, size, asked.disk.is_some()).err(),
    })
}

/// The manifest of what a clan describes: from the store, as it was shown last, or from a machine of the link.
pub(crate) async fn manifest(
    shared: &Shared,
    fetcher: &Fetcher,
    state: &State,
    description: &VmDescription,
) -> Result<Manifest, ApiProblem> {
    if let Some(stored) = shared.images.get(&description.image) {
        return Ok(stored.manifest);
    }
    let offered = shared.offered.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some((_, manifest)) = offered.filter(|(image, _)| *image == description.image) {
        return Ok(manifest);
    }
    let manifest = fetcher.manifest(state, &description.image).await?;
    *shared.offered.lock().unwrap_or_else(PoisonError::into_inner) = Some((description.image, manifest.clone()));
    Ok(manifest)
}

/// What of an image has yet to come, if it can run here and there is room for it. `memory` is what a VM has; a container has
/// what this computer has, and unpacks the image.
pub(crate) fn check_image(
    shared: &Shared,
    manifest: &Manifest,
    memory: Option<ByteSize>,
) -> Result<Transfer, ApiProblem> {
    if manifest.architecture != std::env::consts::ARCH {
        let theirs: String = manifest.architecture.chars().filter(|c| !c.is_control()).take(40).collect();
        return Err(ApiProblem::new(
            ErrorCode::TooSmall,
            format!("the image is for {theirs} computers, this one is {}", std::env::consts::ARCH),
        ));
    }
    match memory {
        Some(memory) if memory < manifest.memory_min => {
            return Err(ApiProblem::new(
                ErrorCode::TooSmall,
                format!("the image needs {} of memory, the VM would have {memory}", manifest.memory_min),
            )
            .hint("give the VM more with `--memory`"));
        }
        _ => {}
    }
    let download =
        Transfer { total: manifest.total_size(), missing: ByteSize::from_bytes(shared.images.missing(manifest)) };
    // Kernel and initramfs are there twice: on the boot disk, too.
    let boot = [FileRole::Kernel, FileRole::Initramfs].into_iter().filter_map(|role| manifest.file(role).ok());
    let boot = match download.missing.as_bytes() {
        0 => 0,
        _ => boot.map(|f| f.size.as_bytes()).fold(0, u64::saturating_add),
    };
    let beside = match memory {
        Some(_) => 0,
        None => unpacked(manifest, |hash| !shared.trees.has(hash)).as_bytes(),
    };
    let needed = download.missing.as_bytes().saturating_add(boot).saturating_add(beside);
    match problem::available(shared.paths.root()) {
        Some(free) if free.as_bytes() < needed => {
            Err(ApiProblem::new(ErrorCode::DiskFull, "there is no room for the image")
                .why(format!("it takes {} more, {free} are free", ByteSize::from_bytes(needed)))
                .hint("free some space, or use another data folder with `--data`"))
        }
        _ => Ok(download),
    }
}

/// What those files of an image take that are unpacked for containers, about.
fn unpacked(manifest: &Manifest, counts: impl Fn(&clan_types::FileHash) -> bool) -> ByteSize {
    let files = manifest.files.iter().filter(|f| matches!(f.role, FileRole::Root | FileRole::Layer) && counts(&f.hash));
    ByteSize::from_bytes(files.map(|f| f.size.as_bytes()).fold(0, u64::saturating_add).saturating_mul(UNPACKED))
}

/// A container of the size that the clan recommends for a VM, unless the person says otherwise.
pub(super) fn contained(shared: &Shared, description: &VmDescription, asked: Asked) -> Result<Home, ApiProblem> {
    Home::container(shared, wished(shared, description, asked)?, asked.disk.is_some())
}

fn wished(shared: &Shared, description: &VmDescription, asked: Asked) -> Result<Size, ApiProblem> {
    let recommended = || Ok(description.cpus.clamp(1, create::default_cpus(shared)));
    let cpus = asked.cpus.map_or_else(recommended, create::processors)?;
    let (memory, disk) = (asked.memory.unwrap_or(description.memory), asked.disk.unwrap_or(description.disk));
    Ok(Size { memory, disk, cpus })
}

/// The size that the clan recommends, unless the person says otherwise, fitted to this computer.
pub(super) fn size(shared: &Shared, description: &VmDescription, asked: Asked) -> Result<Size, ApiProblem> {
    let size = wished(shared, description, asked)?;
    create::check_computer(shared, size)?;
    publish::check_disk(size.disk, crate::status::host(&shared.paths).disk_available)?;
    Ok(size)
}

#[cfg(test)]
mod tests;
