//! What those who steer this computer's machine may have its manager do: give it the image that the clan publishes, or put back the one
//! before.
//!
//! INVARIANT: whether somebody may is judged here, whatever the machine's controller says of it: by the ledger, by the mode that the
//! base OS user has said, and by a signature over a challenge of this manager's, which counts once and for a short time. What a
//! guest that has been taken over can do is to say nothing: to pass no order on, or to keep the latest of the ledger back.

use std::{sync::Arc, time::Duration};

use clan_api::{ApiProblem, ErrorCode, UpdateVm};
use clan_ledger::{DeviceKind, State};
use clan_os::channel::{Channel, MessageError, Stream, recv_message, send_message};
use clan_types::{ControlMode, DeviceId, ImageId, MachineId, PersonId, Role};
use clan_wire::{
    control::{ControlRequest, ControlResponse},
    helm::{Proof, Refusal},
    order::{Asks, MAX_ORDER, Order, Says},
};
use tokio::{
    io::AsyncWriteExt,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    clan::Clan,
    guest::{self, GuestError},
    manager::Shared,
    problem, record, update,
};

/// Before a controller is asked again; one of an earlier version knows no orders.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// How long whoever gives an order may take to sign it, and a controller to write it down.
const PART: Duration = Duration::from_secs(20);

/// Why an order came to nothing.
#[derive(Debug, thiserror::Error)]
enum OrderError {
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error("the conversation broke off")]
    Message(#[from] MessageError),
    #[error("nothing came in time")]
    Late,
    #[error("the controller says something else")]
    Unexpected,
    #[error("no randomness for a challenge")]
    NoRandomness,
    #[error("it is not done: {0}")]
    NotDone(String),
}

/// What this computer knows of its machine, to judge by.
#[derive(Debug, Clone, Copy)]
struct Here {
    /// Whose computer it is.
    person: PersonId,
    /// The device that is this computer.
    device: DeviceId,
    /// Who may steer the machine, as its user said.
    mode: ControlMode,
    /// The image that it had before the present one.
    previous: Option<ImageId>,
}

/// Waits for orders and does them, one after the other, until cancelled.
pub(crate) async fn keep(shared: Arc<Shared>, clan: Arc<Clan>, over: CancellationToken) {
    let work = async {
        let (mut channels, mut pause) = (clan.keeper.watch_control(), RETRY);
        loop {
            let channel = channels.wait_for(Option::is_some).await.ok().and_then(|channel| channel.clone());
            // Its keeper is gone.
            let Some(channel) = channel else { return };
            match attend(&shared, &clan, &channel).await {
                Ok(()) => pause = RETRY,
                Err(error) => {
                    tracing::debug!(clan = %clan.name(), %error, "no order was done");
                    sleep(pause).await;
                    pause = (pause * 2).min(RETRY_MAX);
                }
            }
        }
    };
    tokio::select! {
        () = over.cancelled() => {}
        () = work => {}
    }
}

/// Waits for one order, and does it.
async fn attend(shared: &Arc<Shared>, clan: &Arc<Clan>, channel: &Channel) -> Result<(), OrderError> {
    let (mut stream, answer) = guest::open(channel, &ControlRequest::Orders, guest::PATIENCE).await?;
    if answer != ControlResponse::Connected {
        return Err(OrderError::Unexpected);
    }
    let Asks::Order { image, dry_run } = recv_message(&mut stream, MAX_ORDER).await? else {
        return Err(OrderError::Unexpected);
    };
    let mut challenge = [0; 32];
    getrandom::fill(&mut challenge).map_err(|_| OrderError::NoRandomness)?;
    send_message(&mut stream, &Says::Sign(challenge), MAX_ORDER).await?;
    let Asks::Signed(proof) = part(&mut stream).await? else { return Err(OrderError::Unexpected) };
    let machine = guest::identify(channel).await?.machine;
    let order = Order { clan: clan.id(), machine, image, dry_run, challenge };
    let says = match judge(shared, clan, channel, &order, &proof).await {
        Ok(Some(before)) => Says::Accepted { before },
        Ok(None) => Says::Unchanged,
        Err(refusal) => Says::Refused(refusal),
    };
    send_message(&mut stream, &says, MAX_ORDER).await?;
    if dry_run || !matches!(says, Says::Accepted { .. }) {
        finish(stream).await;
        return Ok(());
    }
    let Asks::Noted = part(&mut stream).await? else { return Err(OrderError::Unexpected) };
    // The user may have taken it back meanwhile.
    let mode = clan.record.get().control;
    if !mode.is_for_admins() && proof.device != clan.author().device() {
        return Err(OrderError::NotDone(format!("the control mode is {mode} now")));
    }
    tracing::info!(clan = %clan.name(), by = %proof.device.short(), image = %image.short(), "the machine is given another image");
    update::obey(shared, clan.clone(), &wish(image)).await.map(drop).map_err(|p| OrderError::NotDone(told(&p)))
}

async fn part(stream: &mut Stream) -> Result<Asks, OrderError> {
    Ok(timeout(PART, recv_message(stream, MAX_ORDER)).await.map_err(|_| OrderError::Late)??)
}

/// Lets the controller read what was said last: of a stream that is dropped, nothing more arrives.
async fn finish(mut stream: Stream) {
    let _ = stream.shutdown().await;
    let _ = timeout(PART, tokio::io::copy(&mut stream, &mut tokio::io::sink())).await;
}

fn wish(image: ImageId) -> UpdateVm {
    UpdateVm { image: Some(image.to_string()), build: false }
}

/// The image that the machine would give up; `None` if it has the one that is wanted.
async fn judge(
    shared: &Shared,
    clan: &Clan,
    channel: &Channel,
    order: &Order,
    proof: &Proof,
) -> Result<Option<ImageId>, Refusal> {
    let not_now = |why: String| Refusal::NotNow { why: guest::short(&why) };
    let known = clan.record.memory().refresh(channel).await;
    let known = known.map_err(|error| not_now(problem::with_sources(&error)))?;
    let record = clan.record.get();
    let here =
        Here { person: clan.person(), device: clan.author().device(), mode: record.control, previous: record.previous };
    may(known.ledger.state(), &here, order, proof)?;
    if matches!(record.flavour, record::Flavour::Integrated { .. }) {
        return Err(Refusal::NoImage);
    }
    let before = record.image.ok_or_else(|| not_now("it has no image yet".to_owned()))?;
    if before == order.image {
        return Ok(None);
    }
    shared.check_idle(clan).map_err(|problem| not_now(told(&problem)))?;
    update::check(shared, clan, &wish(order.image)).await.map_err(|problem| not_now(told(&problem)))?;
    Ok(Some(before))
}

/// Whether whoever signed an order may give it.
fn may(state: &State, here: &Here, order: &Order, proof: &Proof) -> Result<(), Refusal> {
    let owns = |machine: &MachineId| state.machine_in_good_standing(machine).is_some_and(|m| m.owner == here.person);
    // INVARIANT: a guest that calls itself another's machine is given no order of that one.
    if !order.is_signed(proof) || !owns(&order.machine) {
        return Err(Refusal::Stranger);
    }
    let device = state.device_in_good_standing(&proof.device).filter(|device| device.kind == DeviceKind::Device);
    let giver = device.ok_or(Refusal::Stranger)?.owner;
    if proof.device == here.device {
        if !here.mode.is_for_user() {
            return Err(Refusal::Remote);
        }
    } else if state.role_of(&giver) < Some(Role::Admin) {
        return Err(Refusal::NotAdmin);
    } else if !here.mode.is_for_admins() {
        return Err(Refusal::Local);
    }
    let published = state.published.as_ref().map(|published| published.description.image);
    if [published, here.previous].contains(&Some(order.image)) {
        Ok(())
    } else {
        Err(Refusal::NotPublished { image: order.image })
    }
}

fn told(problem: &ApiProblem) -> String {
    match &problem.why {
        Some(why) if problem.code != ErrorCode::Internal => format!("{}: {why}", problem.message),
        _ => problem.message.clone(),
    }
}

#[cfg(test)]
mod tests {
    use clan_ledger::{Body, Ledger, VmDescription};
    use clan_types::ByteSize;

    use super::*;
    use crate::authority::tests::{clan, key, machine, person, say};

    const IMAGE: ImageId = ImageId::from_bytes([7; 32]);
    const OLD: ImageId = ImageId::from_bytes([6; 32]);

    /// A clan that publishes an image: anna is its owner, ben an admin, dora and emil are members.
    fn publishing() -> Ledger {
        let mut ledger = clan();
        let size = ByteSize::from_mib(512);
        let description =
            VmDescription { image: IMAGE, title: "Debian".parse().unwrap(), memory: size, cpus: 1, disk: size };
        say(&mut ledger, &key(1), Body::Publish { description });
        ledger
    }

    fn device(n: u8) -> DeviceId {
        DeviceId::from_bytes(key(n).verifying_key().to_bytes())
    }

    /// Dora's computer.
    fn doras(mode: ControlMode) -> Here {
        Here { person: person(4), device: device(4), mode, previous: Some(OLD) }
    }

    fn order(ledger: &Ledger) -> Order {
        Order { clan: ledger.clan(), machine: machine(4), image: IMAGE, dry_run: false, challenge: [1; 32] }
    }

    #[test]
    fn each_mode_lets_order_whom_it_says() {
        let ledger = publishing();
        let (state, order) = (ledger.state(), order(&ledger));
        for (mode, admin, user) in [
            (ControlMode::Local, Err(Refusal::Local), Ok(())),
            (ControlMode::Shared, Ok(()), Ok(())),
            (ControlMode::Remote, Ok(()), Err(Refusal::Remote)),
        ] {
            assert_eq!(may(state, &doras(mode), &order, &order.sign(&key(2))), admin, "{mode}: an admin");
            assert_eq!(may(state, &doras(mode), &order, &order.sign(&key(4))), user, "{mode}: its user");
            assert_eq!(may(state, &doras(mode), &order, &order.sign(&key(5))), Err(Refusal::NotAdmin), "{mode}");
            assert_eq!(may(state, &doras(mode), &order, &order.sign(&key(77))), Err(Refusal::Stranger), "{mode}");
        }
    }

    #[test]
    fn what_the_clan_does_not_publish_nobody_orders_but_the_image_before() {
        let ledger = publishing();
        let here = doras(ControlMode::Shared);
        let of = |image| Order { image, ..order(&ledger) };
        let other = ImageId::from_bytes([9; 32]);
        for n in [1, 2, 4] {
            let judged = |image| may(ledger.state(), &here, &of(image), &of(image).sign(&key(n)));
            assert_eq!(judged(IMAGE), Ok(()), "{n}");
            assert_eq!(judged(OLD), Ok(()), "{n}");
            assert_eq!(judged(other), Err(Refusal::NotPublished { image: other }), "{n}");
        }
        // A clan that publishes nothing.
        let quiet = clan();
        let first = Here { previous: None, ..here };
        assert!(matches!(
            may(quiet.state(), &first, &of(IMAGE), &of(IMAGE).sign(&key(1))),
            Err(Refusal::NotPublished { .. })
        ));
    }

    #[test]
    fn an_order_is_not_repeated_nor_taken_for_another_machines() {
        let ledger = publishing();
        let (state, here, order) = (ledger.state(), doras(ControlMode::Shared), order(&ledger));
        let proof = order.sign(&key(2));
        assert_eq!(may(state, &here, &order, &proof), Ok(()));
        let next = Order { challenge: [2; 32], ..order };
        assert_eq!(may(state, &here, &next, &proof), Err(Refusal::Stranger), "the manager's next challenge");
        let done = Order { dry_run: true, ..order };
        assert_eq!(may(state, &here, &done, &proof), Err(Refusal::Stranger), "looking is not doing");
        // Dora's guest calls itself emil's machine, for which there is an order.
        let emils = Order { machine: machine(5), ..order };
        assert_eq!(may(state, &here, &emils, &emils.sign(&key(2))), Err(Refusal::Stranger));
    }

    #[test]
    fn whoever_is_no_admin_any_more_orders_nothing() {
        let mut ledger = publishing();
        let here = doras(ControlMode::Shared);
        let order = order(&ledger);
        let demotion = ledger.role_change(&person(2), Role::Member);
        say(&mut ledger, &key(1), demotion);
        assert_eq!(may(ledger.state(), &here, &order, &order.sign(&key(2))), Err(Refusal::NotAdmin));
        for body in ledger.revocation_of_person(&person(3)) {
            say(&mut ledger, &key(1), body);
        }
        assert_eq!(may(ledger.state(), &here, &order, &order.sign(&key(3))), Err(Refusal::Stranger));
        for body in ledger.revocation_of_person(&person(4)) {
            say(&mut ledger, &key(1), body);
        }
        assert_eq!(may(ledger.state(), &here, &order, &order.sign(&key(1))), Err(Refusal::Stranger), "dora is out");
    }
}
