//! A person's devices: further keys whose entries count as theirs. Adding one by a link or a recovery phrase, listing,
//! removing.
//!
//! A device link holds a passing key that the ledger knows as a device of the kind that can add and revoke devices, and
//! nothing else. The other computer makes a key of its own, has it added by the passing one, and revokes that. Machines give
//! nothing for a passing key after ten minutes, and the manager that made it revokes it then. A recovery phrase is such a
//! key that stays.

use std::{collections::HashSet, sync::Arc, time::Duration};

use clan_api::{
    AddDevice, ApiProblem, DeviceInfo, DeviceKind as Kind, DeviceOffer, ErrorCode, JoinClan, RemovedDevice, TaskKind,
    TaskResult,
};
use clan_ledger::{AuthorId, Body, DeviceKind, Ledger, Standing, State};
use clan_types::{
    DEVICE_LINK, DEVICE_LINK_LIFETIME, DeviceId, DeviceName, InviteLink, InviteSecret, MachineId, PersonId, Purpose,
    RecoveryPhrase,
};
use ed25519_dalek::SigningKey;
use zeroize::Zeroizing;

use crate::{
    Paths,
    clan::{Clan, fingerprint},
    create::Home,
    fetch::{Fetcher, Found, blocking},
    invite,
    manager::Shared,
    problem,
    record::{ClanRecord, PersonLog, Phase, Staging},
    sign,
    tasks::now,
    words,
};

/// How often it is looked whether the other computer has come.
const LOOK: Duration = Duration::from_secs(3);

/// A fresh recovery phrase, and what enrols its key.
pub(crate) fn new_phrase(ledger: &Ledger, by: &AuthorId) -> Result<(RecoveryPhrase, Body), ApiProblem> {
    let phrase = RecoveryPhrase::from_entropy(*random::<16>()?);
    let key = SigningKey::from_bytes(&Zeroizing::new(phrase.key_seed()));
    let owner = ledger.state().person_of(by).unwrap_or_else(|| by.person());
    let name = free_name(ledger.state(), &owner, "recovery")?;
    Ok((phrase, Body::add_device(&key, &ledger.clan(), by, name, DeviceKind::Recovery)))
}

fn random<const N: usize>() -> Result<Zeroizing<[u8; N]>, ApiProblem> {
    let mut bytes = Zeroizing::new([0; N]);
    getrandom::fill(bytes.as_mut_slice()).map_err(|e| {
        ApiProblem::new(ErrorCode::Internal, "the operating system gives no randomness").why(e.to_string())
    })?;
    Ok(bytes)
}

/// The name, with a number behind it if another device of the person has it.
fn free_name(state: &State, owner: &PersonId, wanted: &str) -> Result<DeviceName, ApiProblem> {
    let taken: HashSet<&str> = state
        .devices_of(owner)
        .filter(|(_, device)| device.standing == Standing::Good)
        .filter_map(|(_, device)| device.name.as_ref().map(DeviceName::as_str))
        .collect();
    let wanted: String = wanted.chars().take(56).collect();
    let free = (1u32..).map(|n| if n == 1 { wanted.clone() } else { format!("{wanted}-{n}") });
    let name = free.into_iter().find(|name| !taken.contains(name.as_str())).unwrap_or(wanted.clone());
    name.parse().map_err(|e| problem::name(&e))
}

/// Makes a link that makes another computer a device of this person; or a new recovery phrase.
pub(crate) async fn add(shared: &Arc<Shared>, clan: Arc<Clan>, request: &AddDevice) -> Result<DeviceOffer, ApiProblem> {
    let mut offer = DeviceOffer {
        clan_name: clan.name(),
        fingerprint: fingerprint(&clan.id()),
        link: None,
        expires: None,
        words: None,
        recovery_phrase: None,
        words_relay: None,
        task: None,
    };
    if request.recovery {
        let mut phrase = None;
        let body = |ledger: &Ledger| {
            let (made, body) = new_phrase(ledger, &clan.author())?;
            phrase = Some(made);
            Ok(body)
        };
        sign::decide(&clan, body).await?;
        tracing::info!(clan = %offer.clan_name, "made a recovery phrase");
        offer.recovery_phrase = phrase.map(|phrase| phrase.words());
        return Ok(offer);
    }
    let secret = random::<32>()?;
    let key = SigningKey::from_bytes(&secret);
    let passing = AuthorId::of(&key).device();
    let name = format!("{DEVICE_LINK}{}", passing.short()).parse().map_err(|e| problem::name(&e))?;
    let control = clan.control().map_err(|e| problem::guest(&e))?;
    let (peers, relays) = invite::ways(shared, &clan, &control).await?;
    let body = Body::add_device(&key, &clan.id(), &clan.author(), name, DeviceKind::Recovery);
    sign::decide(&clan, |_| Ok(body)).await?;
    let secret = InviteSecret::from_bytes(*secret);
    let link = InviteLink { purpose: Purpose::Device, clan: clan.id(), secret, peers, relays };
    offer.words = words::open(&control, &link).await.map(|(words, _)| words.to_string());
    offer.words_relay = link.relays.first().filter(|_| offer.words.is_some()).map(words::place);
    offer.link = Some(link.to_string());
    offer.expires = Some(now().plus(DEVICE_LINK_LIFETIME));
    offer.task = Some(wait(shared, clan, passing));
    tracing::info!(clan = %offer.clan_name, device = %passing.short(), "made a device link");
    Ok(offer)
}

/// Waits until the other computer has come, and withdraws the link if it has not in time.
fn wait(shared: &Arc<Shared>, clan: Arc<Clan>, passing: DeviceId) -> clan_api::TaskId {
    let name = clan.name();
    let steps = &["Wait for the other computer"];
    let title = format!("Add a device to {name}");
    let task = shared.tasks.spawn(TaskKind::AddDevice, title, Some(name), steps, move |task| async move {
        task.begin(0);
        let came = async {
            loop {
                tokio::time::sleep(LOOK).await;
                // A machine that does not answer now does later.
                if let Ok(ledger) = sign::ledger(&clan).await
                    && ledger.state().device_in_good_standing(&passing).is_none()
                {
                    return Ok(());
                }
            }
        };
        let waited = async {
            tokio::time::timeout(DEVICE_LINK_LIFETIME, came).await.unwrap_or_else(|_| {
                Err(ApiProblem::new(ErrorCode::TimedOut, "no other computer came within ten minutes")
                    .hint("make a new link: `clan device add`"))
            })
        };
        match task.unless_cancelled(waited).await {
            Ok(()) => Ok(TaskResult::Nothing),
            Err(problem) => {
                withdraw(&clan, &passing).await?;
                Err(problem)
            }
        }
    });
    task.info().id
}

async fn withdraw(clan: &Clan, passing: &DeviceId) -> Result<(), ApiProblem> {
    let bodies = |ledger: &Ledger| {
        let open = ledger.state().device_in_good_standing(passing).is_some();
        Ok(((), if open { vec![ledger.revocation_of_device(passing)] } else { Vec::new() }))
    };
    sign::decide_all(clan, bodies).await.map(drop)
}

/// The person's devices, past ones included, oldest first. Links that nobody used in time are withdrawn.
pub(crate) async fn list(clan: &Clan) -> Result<Vec<DeviceInfo>, ApiProblem> {
    let ledger = sign::ledger(clan).await?;
    let (state, this) = (ledger.state(), clan.author().device());
    let mut devices: Vec<DeviceInfo> = state
        .devices_of(&clan.person())
        .map(|(id, device)| DeviceInfo {
            id: *id,
            name: device.name.clone(),
            kind: match device.kind {
                _ if device.is_link() => Kind::Link,
                DeviceKind::Recovery => Kind::Recovery,
                DeviceKind::Device => Kind::Device,
            },
            since: device.since,
            this: *id == this,
            good: device.standing == Standing::Good,
        })
        .collect();
    devices.sort_by_key(|device| device.since);
    for device in &devices {
        if device.kind == Kind::Link && device.good && now().since(device.since) > DEVICE_LINK_LIFETIME {
            withdraw(clan, &device.id).await?;
        }
    }
    Ok(devices)
}

/// Puts a device of the person's out, with the machines that it added; or finds out whether that would work.
pub(crate) async fn remove(clan: &Clan, text: &str, dry_run: bool) -> Result<RemovedDevice, ApiProblem> {
    let (person, this) = (clan.person(), clan.author().device());
    let decision = |ledger: &Ledger| {
        let state = ledger.state();
        let device = find(state, &person, text)?;
        if device == this {
            return Err(ApiProblem::new(ErrorCode::Conflict, "this is the device that you are using")
                .hint(format!("to give the clan up on this computer: `clan leave {}`", clan.name()))
                .hint("to put this device out, do so from another one of yours"));
        }
        let machines: Vec<MachineId> = ledger
            .entries()
            .filter(|entry| entry.author().device() == device)
            .filter_map(|entry| match entry.body() {
                Body::Enrol { machine, .. } => Some(*machine),
                _ => None,
            })
            .filter(|machine| state.machine_in_good_standing(machine).is_some_and(|m| m.owner == person))
            .collect();
        let named = |id: &MachineId| state.machine_in_good_standing(id).map(|machine| machine.name.clone());
        let name = state.devices.get(&device).and_then(|device| device.name.clone());
        let removed = RemovedDevice { id: device, name, machines: machines.iter().filter_map(named).collect() };
        let mut bodies: Vec<Body> = machines.iter().map(|machine| ledger.revocation_of_machine(machine)).collect();
        bodies.push(ledger.revocation_of_device(&device));
        Ok((removed, bodies))
    };
    if dry_run {
        return decision(&sign::ledger(clan).await?).map(|(removed, _)| removed);
    }
    let (removed, _) = sign::decide_all(clan, decision).await?;
    tracing::info!(clan = %clan.name(), device = %removed.id.short(), "put a device out");
    Ok(removed)
}

fn find(state: &State, person: &PersonId, text: &str) -> Result<DeviceId, ApiProblem> {
    let text = text.trim().to_ascii_lowercase();
    let good = || state.devices_of(person).filter(|(_, device)| device.standing == Standing::Good);
    if let Some((id, _)) = good().find(|(_, device)| device.name.as_ref().is_some_and(|name| name.as_str() == text)) {
        return Ok(*id);
    }
    let by_id: Vec<DeviceId> =
        good().map(|(id, _)| *id).filter(|id| text.len() >= 6 && id.to_string().starts_with(&text)).collect();
    match by_id.as_slice() {
        [only] => Ok(*only),
        [] => Err(ApiProblem::new(ErrorCode::NotFound, format!("you have no device called `{text}`"))
            .hint("see which there are: `clan device list`")),
        _ => Err(ApiProblem::new(ErrorCode::Ambiguous, format!("several devices' ids begin with `{text}`"))),
    }
}

/// Becomes a device of whoever made the link: the key in it adds ours, before anything is on disk here.
pub(crate) async fn arrive(
    paths: Paths,
    request: &JoinClan,
    link: &InviteLink,
    fetcher: &Fetcher,
    found: Found,
    home: &Home,
) -> Result<ClanRecord, ApiProblem> {
    let passing = SigningKey::from_bytes(link.secret.expose());
    let by = AuthorId::of(&passing);
    let state = found.ledger.state();
    let gone = || problem::refusal(&clan_wire::peer::JoinRefusal::Revoked);
    let owner = state.person_of(&by).ok_or_else(gone)?;
    let person = state.person(&owner).ok_or_else(gone)?.name.clone();
    let is_link = state.device_in_good_standing(&by.device()).ok_or_else(gone)?.is_link();
    let untrusted = |why: &str| ApiProblem::new(ErrorCode::Untrusted, "the clan did not take this device").why(why);
    let name = state.clan_name.clone().ok_or_else(|| untrusted("it has no name"))?;
    let device_name = free_name(state, &owner, request.machine.as_str())?;

    let staged = paths.clone();
    let staging = blocking(move || Staging::begin(&staged)).await?.map_err(|e| problem::disk(&e))?;
    let internal = |e: clan_ledger::EntryError| {
        ApiProblem::new(ErrorCode::Internal, "the device cannot be signed for").why(e.to_string())
    };
    let body = Body::add_device(&staging.key, &link.clan, &by, device_name, DeviceKind::Device);
    let entry = found.ledger.author(&passing, body, now()).map_err(internal)?;
    let ledger = fetcher.admit(vec![entry.encode()]).await?;
    let ours = AuthorId::of(&staging.key);
    if ledger.state().device_in_good_standing(&ours.device()).is_none_or(|device| device.owner != owner) {
        return Err(untrusted("its ledger does not name this computer's key"));
    }
    let mut log = PersonLog::default();
    if is_link {
        // A link works once.
        let body = ledger.revocation_of_device(&by.device());
        log.push(ledger.author(&staging.key, body, now()).map_err(internal)?.encode());
    }
    let machine = request.machine.clone();
    let record = ClanRecord { owner: Some(owner), ..home.record(link.clan, name, person, machine, Phase::Joining) };
    // INVARIANT: the key of a link or of a recovery phrase is not written down here: our own does from now on.
    let kept = InviteLink { secret: InviteSecret::from_bytes([0; 32]), ..link.clone() }.to_string();
    blocking(move || staging.commit(&paths, &record, &log, Some(&kept)).map(|()| record))
        .await?
        .map_err(|e| problem::disk(&e))
}
