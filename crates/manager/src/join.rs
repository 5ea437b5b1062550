//! Joining a clan: what a link leads to, and going there. Each step finds out what an earlier attempt has done.

use std::sync::{Arc, PoisonError};

use clan_api::{Agreed, ApiProblem, ErrorCode, JoinClan, TaskKind, TaskResult};
use clan_ledger::Body;
use clan_types::{InviteLink, MachineName, PersonName, Purpose};
use clan_wire::{control::Redeem, peer::InviteProof};
use ed25519_dalek::SigningKey;

use self::offer::Asked;
use crate::{
    boot,
    clan::Clan,
    create::{self, Home},
    devices,
    disk::{self, DiskError},
    fetch::{Fetcher, Found, blocking},
    guest,
    manager::Shared,
    problem,
    record::{ClanRecord, Flavour, PersonLog, Phase, Staging},
    sign,
    tasks::{Task, TaskHandle, now},
};

mod offer;

pub(crate) use offer::{check_image, manifest, preview};

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

fn parse(shared: &Shared, link: &str) -> Result<InviteLink, ApiProblem> {
    let link: InviteLink = link.parse().map_err(|e| problem::link(&e))?;
    if let Some(clan) = shared.get(&link.clan) {
        let name = clan.name();
        let problem = |message: String| ApiProblem::new(ErrorCode::AlreadyJoined, message);
        return Err(match clan.record.get().phase {
            Phase::Joining => problem(format!("this computer is joining the clan `{name}` just now"))
                .hint("see how far it is with `clan status`"),
            Phase::Leaving | Phase::Removing => problem(format!("this computer is leaving the clan `{name}` just now"))
                .hint("try again when it has left: `clan status`"),
            Phase::Ready | Phase::Creating => problem(format!("this computer is in the clan `{name}` already"))
                .hint(format!("see it with `clan status`; to join anew, leave it first: `clan leave {name}`")),
        });
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
    mut request: JoinClan,
    link: InviteLink,
    fetcher: &Fetcher,
) -> Result<Arc<Task>, ApiProblem> {
    let found = fetcher.preview().await?;
    let asked = Asked { memory: request.memory, disk: request.disk, cpus: request.cpus };
    let home = match (&request.integrate, found.description()) {
        (Some(_), _) if request.container => return Err(create::one_or_the_other()),
        (Some(socket), _) => Home::integrated(shared, socket, asked.anything()).await?,
        (None, Some(description)) if request.container => offer::contained(shared, description, asked)?,
        (None, Some(description)) => Home::vm(shared, offer::size(shared, description, asked)?)?,
        (None, None) => return Err(no_image()),
    };
    if let (None, Some(agreed)) = (&request.integrate, &request.agreed) {
        check_agreed(&found, agreed)?;
    }
    if let (None, Some(description)) = (&request.integrate, found.description()) {
        // INVARIANT: nothing is on disk of a clan whose image cannot run here.
        let manifest = offer::manifest(shared, fetcher, found.ledger.state(), description).await?;
        check_image(shared, &manifest, (!request.container).then_some(home.size.memory))?;
    }
    let image = found.description().filter(|_| request.integrate.is_none()).map(|d| d.image);
    let passphrase = request.passphrase.take();
    let home = home.steered(request.control).running(image).encrypted(passphrase.is_some())?;
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
    clan.record.set_passphrase(passphrase);
    Ok(spawn(shared, clan))
}

/// What an admin has published while the person read is not what they agreed to.
fn check_agreed(found: &Found, agreed: &Agreed) -> Result<(), ApiProblem> {
    let now = found.published.as_ref().map(|published| Agreed {
        image: published.description.image,
        network_layer: published.network.clone(),
        applications: published.applications.iter().cloned().collect(),
    });
    if now.as_ref() == Some(agreed) { Ok(()) } else { Err(published_meanwhile()) }
}

fn published_meanwhile() -> ApiProblem {
    ApiProblem::new(ErrorCode::Conflict, "the clan has published another machine than the one that you agreed to")
        .why("an admin of the clan did so after it was shown to you")
        .hint("look at the new one: `clan join` shows it, and asks again")
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
        let description = found.description().ok_or_else(no_image)?;
        let image = description.image;
        // INVARIANT: what runs is what the person agreed to, however long ago that was.
        let image = match record.image {
            // One that may be in already goes on with what it ran.
            Some(agreed) if agreed != image && !(machine_may_be_in && shared.images.get(&agreed).is_some()) => {
                return Err(published_meanwhile());
            }
            agreed => agreed.unwrap_or(image),
        };
        task.begin(1);
        if shared.images.get(&image).is_some() {
            task.skip();
        } else {
            let manifest = offer::manifest(shared, fetcher, found.ledger.state(), description).await?;
            check_image(shared, &manifest, (!record.is_container()).then_some(record.memory))?;
            let _one = shared.building.lock().await;
            if shared.images.get(&image).is_none() {
                fetcher.image(&shared.images, found.ledger.state(), &manifest, task).await?;
            }
        }
        clan.record.update(|r| r.image = Some(image)).map_err(|e| problem::disk(&e))?;
    }
    Ok(found.ledger.entries().map(clan_ledger::Entry::encode).collect())
}
