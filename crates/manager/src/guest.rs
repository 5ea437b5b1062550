//! Questions to the agent and the controller in a guest. Nothing they answer is trusted further than its type.

use std::time::Duration;

use clan_ledger::{Intake, KeyProof, Ledger, Vector};
use clan_os::channel::{
    Channel, ChannelError, MessageError, Stream, recv_message, recv_page, send_message, send_pages,
};
use clan_types::{ClanId, MachineId, WgPublicKey};
use clan_wire::{
    agent::{self, AgentRequest, AgentResponse},
    control::{self, ControlRequest, ControlResponse, NodeStatus},
    peer::{EncodedEntry, JoinRefusal},
};
use tokio::{io::AsyncRead, time::timeout};

use crate::{clan::Clan, problem};

/// How long most questions may take; guests are slow under emulation.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// The same for taking a whole ledger to disk.
const REMINDING: Duration = Duration::from_secs(120);

/// Why a guest did not answer as hoped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestError {
    /// No channel.
    #[error("the {who} of this computer's machine does not answer yet")]
    NotConnected { who: &'static str },
    /// No answer in time.
    #[error("this computer's machine did not answer within {} s: {what}", limit.as_secs())]
    TimedOut { what: &'static str, limit: Duration },
    /// The channel went away.
    #[error("the channel to this computer's machine is gone")]
    Channel(#[from] ChannelError),
    /// The stream went away, or what came makes no sense.
    #[error("this computer's machine broke off: {what}")]
    Message { what: &'static str, source: MessageError },
    /// It says why not.
    #[error("this computer's machine could not {what}: {why}")]
    Failed { what: &'static str, why: String },
    /// The clan does not admit this machine.
    #[error("the clan refused: {0}")]
    Refused(JoinRefusal),
    /// An answer to another question.
    #[error("this computer's machine gave a wrong answer: {what}")]
    Unexpected { what: &'static str },
}

/// Who a guest's machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) machine: MachineId,
    pub(crate) wireguard: WgPublicKey,
    pub(crate) clan: Option<ClanId>,
}

/// Asks the agent.
pub(crate) async fn ask_agent(
    channel: &Channel,
    request: &AgentRequest,
    limit: Duration,
) -> Result<AgentResponse, GuestError> {
    let what = "agent";
    let answer = timeout(limit, async {
        let mut stream = channel.open().await?;
        let broken = |source| GuestError::Message { what, source };
        send_message(&mut stream, request, agent::MAX_MESSAGE).await.map_err(broken)?;
        recv_message(&mut stream, agent::MAX_MESSAGE).await.map_err(broken)
    });
    match answer.await.map_err(|_| GuestError::TimedOut { what, limit })?? {
        AgentResponse::Failed(why) => Err(GuestError::Failed { what: "do as its agent was told", why: short(&why) }),
        answer => Ok(answer),
    }
}

/// Asks the controller; the stream that the answer came on, for more.
pub(crate) async fn open(
    channel: &Channel,
    request: &ControlRequest,
    limit: Duration,
) -> Result<(Stream, ControlResponse), GuestError> {
    let what = name(request);
    let answer = timeout(limit, async {
        let mut stream = channel.open().await?;
        let broken = |source| GuestError::Message { what, source };
        send_message(&mut stream, request, control::MAX_MESSAGE).await.map_err(broken)?;
        let answer = recv_message(&mut stream, control::MAX_MESSAGE).await.map_err(broken)?;
        Ok::<_, GuestError>((stream, answer))
    });
    let (stream, answer) = answer.await.map_err(|_| GuestError::TimedOut { what, limit })??;
    Ok((stream, judge(what, answer)?))
}

/// Asks the controller for something that is answered by `Done`.
pub(crate) async fn tell(channel: &Channel, request: &ControlRequest) -> Result<(), GuestError> {
    match open(channel, request, PATIENCE).await?.1 {
        ControlResponse::Done => Ok(()),
        _ => Err(GuestError::Unexpected { what: name(request) }),
    }
}

/// Says that the machine leaves. Whether another machine of the clan has heard it.
pub(crate) async fn farewell(channel: &Channel, entry: Vec<u8>) -> Result<bool, GuestError> {
    let request = ControlRequest::Farewell { entry };
    match open(channel, &request, PATIENCE).await?.1 {
        ControlResponse::Done => Ok(true),
        ControlResponse::Unheard => Ok(false),
        _ => Err(GuestError::Unexpected { what: name(&request) }),
    }
}

/// Who the guest's machine is.
pub(crate) async fn identify(channel: &Channel) -> Result<Identity, GuestError> {
    match open(channel, &ControlRequest::Identify, PATIENCE).await?.1 {
        ControlResponse::Identity { machine, wireguard, clan, .. } => Ok(Identity { machine, wireguard, clan }),
        _ => Err(GuestError::Unexpected { what: "say who it is" }),
    }
}

/// The machine's consent to be this person's in this clan.
pub(crate) async fn consent(channel: &Channel, clan: &Clan) -> Result<KeyProof, GuestError> {
    let request = ControlRequest::Consent { clan: clan.id(), device: clan.author().device() };
    match open(channel, &request, PATIENCE).await?.1 {
        ControlResponse::Consent(halves) => Ok(KeyProof::from_halves(halves)),
        _ => Err(GuestError::Unexpected { what: name(&request) }),
    }
}

/// The state of the clan as the guest has it.
pub(crate) async fn status(channel: &Channel, limit: Duration) -> Result<NodeStatus, GuestError> {
    match open(channel, &ControlRequest::Status, limit).await?.1 {
        ControlResponse::Status(status) => Ok(*status),
        _ => Err(GuestError::Unexpected { what: "give its state" }),
    }
}

/// The ledger with what the guest has beside it, and what that is.
pub(crate) async fn entries_since(channel: &Channel, known: Ledger) -> Result<(Ledger, Vector), GuestError> {
    let what = "give the ledger";
    let (mut stream, answer) = open(channel, &ControlRequest::Entries(known.vector()), PATIENCE).await?;
    let ControlResponse::Entries(has) = answer else { return Err(GuestError::Unexpected { what }) };
    let why = |why: String| GuestError::Failed { what, why };
    let ledger = take_ledger(&mut stream, Intake::new(known), PATIENCE).await.map_err(|(_, broken)| why(broken))?;
    Ok((ledger, has))
}

/// Tells the guest what it lacks of what is remembered, and whether its disk was put back. Whether it is sure now of what
/// it has signed.
pub(crate) async fn remember(channel: &Channel, restored: bool, lacks: &[EncodedEntry]) -> Result<bool, GuestError> {
    let request = ControlRequest::Remember { restored };
    match provision(channel, &request, lacks, REMINDING).await? {
        ControlResponse::Remembered { sure } => Ok(sure),
        _ => Err(GuestError::Unexpected { what: name(&request) }),
    }
}

/// Takes the pages of a ledger; each may take so long. On failure what came so far, and why.
pub(crate) async fn take_ledger<R>(
    stream: &mut R,
    mut intake: Intake,
    limit: Duration,
) -> Result<Ledger, (Option<Ledger>, String)>
where
    R: AsyncRead + Unpin + ?Sized,
{
    loop {
        let page = match timeout(limit, recv_page(stream)).await {
            Ok(Ok(page)) => page,
            Ok(Err(error)) => return Err((Some(intake.into_ledger()), problem::with_sources(&error))),
            Err(_) => return Err((Some(intake.into_ledger()), format!("no answer within {} s", limit.as_secs()))),
        };
        let last = !page.more;
        // Thousands of signatures are checked.
        let taken = tokio::task::spawn_blocking(move || {
            let outcome = intake.take(page.entries.iter().map(Vec::as_slice), last);
            (intake, outcome)
        });
        let (back, outcome) = taken.await.map_err(|error| (None, error.to_string()))?;
        // What was taken from somebody who goes on for ever is not kept.
        outcome.map_err(|error| (None, format!("its ledger is not taken: {error}")))?;
        intake = back;
        if last {
            return Ok(intake.into_ledger());
        }
    }
}

/// Tells the machine something that entries follow, such as its place in the clan with the ledger as it is known here.
pub(crate) async fn provision(
    channel: &Channel,
    request: &ControlRequest,
    entries: &[EncodedEntry],
    limit: Duration,
) -> Result<ControlResponse, GuestError> {
    let what = name(request);
    let answer = timeout(limit, async {
        let mut stream = channel.open().await?;
        let broken = |source| GuestError::Message { what, source };
        send_message(&mut stream, request, control::MAX_MESSAGE).await.map_err(broken)?;
        send_pages(&mut stream, entries).await.map_err(broken)?;
        recv_message(&mut stream, control::MAX_MESSAGE).await.map_err(broken)
    });
    judge(what, answer.await.map_err(|_| GuestError::TimedOut { what, limit })??)
}

fn judge(what: &'static str, answer: ControlResponse) -> Result<ControlResponse, GuestError> {
    match answer {
        ControlResponse::Failed(why) => Err(GuestError::Failed { what, why: short(&why) }),
        ControlResponse::Refused(refusal) => Err(GuestError::Refused(refusal)),
        answer => Ok(answer),
    }
}

fn name(request: &ControlRequest) -> &'static str {
    match request {
        ControlRequest::Identify => "say who it is",
        ControlRequest::Provision(_) => "take its place in the clan",
        ControlRequest::SetEnvironment(_) => "take note of its addresses",
        ControlRequest::Append(_) => "store an entry of the ledger",
        ControlRequest::Entries(_) => "give the ledger",
        ControlRequest::Remember { .. } => "take what is remembered of its ledger",
        ControlRequest::Status => "give its state",
        ControlRequest::Watch => "report its state",
        ControlRequest::Connect { .. } => "connect to the service",
        ControlRequest::Journal { .. } => "give its journal",
        ControlRequest::Farewell { .. } => "say farewell",
        ControlRequest::Forget => "forget the clan",
        ControlRequest::Stop => "stop",
        ControlRequest::OpenWords { .. } => "wait for the words of an invitation",
        ControlRequest::Ping { .. } => "send an echo",
        ControlRequest::Consent { .. } => "agree to be added to the clan",
        ControlRequest::Peers => "name other machines",
        ControlRequest::SetControlMode(_) => "change who may steer it",
        ControlRequest::Steer { .. } => "call the machine",
        ControlRequest::Orders => "pass on orders",
        ControlRequest::NoteImage { .. } => "note its new image",
    }
}

/// Text from a guest, for one line.
pub(crate) fn short(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(400).collect()
}
