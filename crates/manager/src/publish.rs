//! Making an image what newcomers to a clan run.
//!
//! The clan's machine here gives it to them, from the disks it boots from: so it must run it, and be well with it.

use clan_api::{ApiProblem, ErrorCode, Publication, PublishImage, PublishedVm};
use clan_build::StoredImage;
use clan_ledger::{Applications, Body, MAX_APPLICATIONS, State, VmDescription, VmSetup};
use clan_types::{AppName, ByteSize, ControlMode, ImageId, NetworkLayer, Role};
use clan_wire::control::NodeStatus;

use crate::{
    authority::not_allowed,
    clan::Clan,
    create,
    decisions::{decide, own_role},
    fetch::blocking,
    images,
    manager::Shared,
    record::ClanRecord,
};

/// Signs what newcomers run, or finds out what would change, or why it may not.
pub(crate) async fn publish(shared: &Shared, clan: &Clan, request: &PublishImage) -> Result<Publication, ApiProblem> {
    let record = clan.record.get();
    let image = images::find(shared, &request.image)?;
    check_runs(&record, &image)?;
    if !request.dry_run {
        // Nobody would take a damaged one; and it stays here, for the machine runs it.
        let (store, id) = (shared.images.clone(), image.id);
        let verified = blocking(move || store.verify(&id)).await?;
        verified.map_err(|e| images::not_whole(shared, &image.id, &e))?;
    }
    let author = clan.person();
    let offered = offered(&clan.state().await?);
    let decision = decide(clan, request.dry_run, |ledger| {
        let state = ledger.state();
        let role = own_role(state, &author)?;
        if role < Role::Admin {
            return Err(not_allowed(state, role, Role::Admin, "decide what newcomers run", None));
        }
        let before = state.published.as_ref();
        let description = describe(before.map(|p| &p.description), &record, &image, request)?;
        let setup = setup(state, &image.id, request, offered)?;
        let before = before.map(|p| told(&p.description, &p.network, state.suggested_control, &p.applications));
        let after = told(&description, &setup.network, setup.control, &setup.applications);
        let same = before.as_ref() == Some(&after);
        let bodies = if same { Vec::new() } else { vec![Body::PublishVm { description, setup }] };
        Ok((Publication { clan: record.name.clone(), before, after, entries: 0 }, bodies))
    });
    let (mut publication, entries) = decision.await?;
    publication.entries = entries;
    if entries > 0 {
        tracing::info!(clan = %record.name, image = %image.id.short(), "published an image");
    }
    Ok(publication)
}

fn check_runs(record: &ClanRecord, image: &StoredImage) -> Result<(), ApiProblem> {
    if record.is_integrated() {
        return Err(ApiProblem::new(ErrorCode::Conflict, "the clan's machine here has no image to give")
            .why("it is this computer itself, and newcomers get images from machines that run them")
            .hint("publish from a computer on which the clan's machine is a virtual one"));
    }
    if record.image != Some(image.id) {
        return Err(ApiProblem::new(ErrorCode::Conflict, "the clan's machine here does not run this image")
            .why("newcomers get images from machines that run them")
            .hint(format!("give it the image first: `clan vm update --image {}`", image.id.short())));
    }
    if record.trial.is_some() {
        return Err(ApiProblem::new(
            ErrorCode::Conflict,
            "whether the machine here is well with this image is not known yet",
        )
        .hint("wait for the task that updates it: `clan vm list`"));
    }
    Ok(())
}

/// What was asked for; what was not, as it is in force, or as the machine here has it.
fn describe(
    before: Option<&VmDescription>,
    record: &ClanRecord,
    image: &StoredImage,
    request: &PublishImage,
) -> Result<VmDescription, ApiProblem> {
    let manifest = &image.manifest;
    if manifest.architecture != std::env::consts::ARCH {
        return Err(ApiProblem::new(
            ErrorCode::BadRequest,
            format!("the image is for {} computers", manifest.architecture),
        ));
    }
    let cpus = match request.cpus {
        None => before.map_or(record.cpus, |b| b.cpus),
        Some(n) => u8::try_from(n)
            .ok()
            .filter(|n| *n > 0)
            .ok_or_else(|| ApiProblem::new(ErrorCode::BadRequest, format!("{n} processors no VM can have")))?,
    };
    let memory = request.memory.unwrap_or_else(|| before.map_or(record.memory, |b| b.memory));
    let disk = request.disk.unwrap_or_else(|| before.map_or(record.disk, |b| b.disk));
    let small = |message: String| Err(ApiProblem::new(ErrorCode::TooSmall, message));
    if memory < manifest.memory_min {
        return small(format!("the image needs {} of memory, newcomers would have {memory}", manifest.memory_min))
            .map_err(|p| p.hint("give them more: `--memory`"));
    }
    if record.memory < manifest.memory_min {
        return small(format!(
            "the image needs {} of memory, the machine here has {}",
            manifest.memory_min, record.memory
        ))
        .map_err(|p| p.hint("give it more first: `clan vm resize --memory`"));
    }
    if disk < create::LEAST_DISK {
        return Err(ApiProblem::new(ErrorCode::BadRequest, format!("a data disk of {disk} is too small"))
            .hint("give them more: `--disk 1G`"));
    }
    Ok(VmDescription { image: image.id, title: create::title(manifest)?, memory, cpus, disk })
}

/// What of a description is not the image's: as asked for, or as it is in force.
fn setup(state: &State, image: &ImageId, request: &PublishImage, offered: Vec<AppName>) -> Result<VmSetup, ApiProblem> {
    let before = state.published.as_ref();
    let network = request.network_layer.clone().or_else(|| before.map(|p| p.network.clone())).unwrap_or_default();
    // Nor is one kept in force that the machine here does not know.
    check_network(&network).map_err(|p| p.hint(format!("newcomers have: `--network {}`", NetworkLayer::MESH)))?;
    let control = request.control_mode.map_or(state.suggested_control, Into::into);
    let many = |e: clan_ledger::TooManyApplications| ApiProblem::new(ErrorCode::BadRequest, e.to_string());
    let applications = match (&request.applications, before) {
        (Some(named), _) => Applications::new(named.iter().cloned()).map_err(many)?,
        (None, Some(before)) if before.description.image == *image => before.applications.clone(),
        (None, _) => Applications::new(offered.into_iter().take(MAX_APPLICATIONS)).map_err(many)?,
    };
    Ok(VmSetup { network, control, applications })
}

/// The services that the machine here offers, which are applications of its image.
fn offered(status: &NodeStatus) -> Vec<AppName> {
    let own = status.machines.iter().find(|machine| machine.this).map(|machine| &machine.name);
    let services = status.services.iter().filter(|service| Some(&service.machine) == own);
    services.filter_map(|service| service.name.as_str().parse().ok()).collect()
}

/// Whether this version of Clan can carry packets as a description wants it.
///
/// INVARIANT: nothing is fetched, put on disk or run for one that it cannot.
pub(crate) fn check_network(network: &NetworkLayer) -> Result<(), ApiProblem> {
    if network.is_known() {
        return Ok(());
    }
    Err(ApiProblem::new(ErrorCode::Conflict, format!("the clan's machines speak the network layer `{network}`"))
        .why(format!("this version of Clan knows `{}` only", NetworkLayer::MESH))
        .hint("update Clan on this computer, then try again"))
}

fn told(
    description: &VmDescription,
    network: &NetworkLayer,
    control: ControlMode,
    applications: &Applications,
) -> PublishedVm {
    PublishedVm {
        network_layer: network.clone(),
        control_mode: control.into(),
        applications: applications.iter().cloned().collect(),
        image: description.image,
        title: description.title.to_string(),
        memory: description.memory,
        cpus: u32::from(description.cpus),
        disk: description.disk,
    }
}

/// Whether a description can be followed here at all, whatever else the person says.
pub(crate) fn check_disk(disk: ByteSize, free: ByteSize) -> Result<(), ApiProblem> {
    if disk > free {
        return Err(ApiProblem::new(
            ErrorCode::TooSmall,
            format!("the VM's disk may grow to {disk}, {free} are free here"),
        )
        .hint("give it less: `--disk 1G`, or free some space"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
