//! Who steers this machine: the base OS user, through the control port, or the clan's admins, over QUIC (`clan/helm/1`), as the
//! control mode says. Every change is written down.
//!
//! INVARIANT: whether somebody may is judged here, by the ledger and the mode of that moment: before each deed, and for as long
//! as a log or a terminal is open.

mod kept;
mod order;
mod session;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex as SyncMutex, PoisonError},
    time::Duration,
};

use clan_ledger::{DeviceKind, State};
use clan_os::channel::{Stream, recv_message, send_message};
use clan_store::StoreError;
use clan_types::{ControlMode, DeviceId, MachineId, PersonId, Role};
use clan_wire::{
    control::{ControlResponse, MAX_MESSAGE},
    helm::{
        ALPN_HELM, Actor, Answer, Call, Deed, Ends, Greeting, JournalEntry, MAX_ANSWER, MAX_CALL, Refusal, Report,
        Request,
    },
};
use iroh::{Endpoint, address_lookup::AddrFilter, endpoint::Connection};
use iroh_mdns_address_lookup::MdnsAddressLookup;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy_bidirectional, join},
    process::Command,
    sync::{Semaphore, watch},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

pub(crate) use self::kept::Possible;
use self::{
    kept::Kept,
    order::{Desk, Wanted},
};
use crate::{
    control::Access,
    core::{CoreHandle, View, now},
    host::Host,
    net, relay,
    report::{Journal, Scope, chain},
    state::StateError,
    stats::Sampler,
    streams,
};

/// For a greeting and a call.
const PATIENCE: Duration = Duration::from_secs(20);
/// For taking the last of an answer.
const FAREWELL: Duration = Duration::from_secs(5);
/// Terminals that may be open at once: fewer than the connections that one machine may have.
const MAX_TERMINALS: usize = 4;
/// What is measured is compared with what was so long before.
const MEASURE: Duration = Duration::from_millis(200);

/// How a machine is steered, and by whom.
pub(crate) struct Helm {
    path: PathBuf,
    host: Host,
    dir: PathBuf,
    possible: Possible,
    machine: MachineId,
    kept: watch::Sender<Arc<Kept>>,
    /// Held while something is changed, on disk and here.
    writing: SyncMutex<()>,
    terminals: Arc<Semaphore>,
    desk: Desk,
}

/// Who wants to steer.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Caller {
    /// The base OS user.
    Here,
    /// A person of the clan, by a device and a machine of theirs.
    Member { person: PersonId, device: DeviceId, machine: MachineId },
}

/// What comes after a conversation.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Nothing,
    /// The controller ends: not before whoever asked for it has the answer.
    End,
}

impl Then {
    fn go(self) {
        if self == Self::End
            && let Err(error) = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM)
        {
            tracing::error!(%error, "the controller cannot end itself: `clan vm restart` does it from outside");
        }
    }
}

/// Why nothing was done.
enum Failure {
    Refused(Refusal),
    Failed(String),
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Failed(format!("it cannot be written down: {}", chain(&error)))
    }
}

impl From<Failure> for Answer {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused(refusal) => Self::Refused(refusal),
            Failure::Failed(why) => Self::Failed(why),
        }
    }
}

fn file(dir: &Path) -> PathBuf {
    dir.join("helm.json")
}

/// Puts down who may steer a machine that is about to get its place.
pub(crate) fn begin(dir: &Path, mode: ControlMode) -> Result<(), StateError> {
    Ok(clan_store::write_versioned_json(&file(dir), &Kept::new(mode))?)
}

impl Helm {
    /// As the disk has it. A machine of which nothing is known, or whose file is damaged, is its user's alone.
    pub(crate) fn load(dir: &Path, host: &Host, possible: Possible, machine: MachineId) -> Result<Self, StateError> {
        let path = file(dir);
        let kept = match clan_store::read_versioned_json::<Kept>(&path) {
            Err(error @ StoreError::Corrupt { .. }) => {
                tracing::error!(why = chain(&error), "who may steer this machine is lost: from now on its user alone");
                None
            }
            read => read?,
        };
        let mut kept = kept.unwrap_or_default();
        kept.note_all_ends(now());
        Ok(Self {
            path,
            host: host.clone(),
            dir: dir.to_owned(),
            possible,
            machine,
            kept: watch::Sender::new(Arc::new(kept)),
            writing: SyncMutex::new(()),
            terminals: Arc::new(Semaphore::new(MAX_TERMINALS)),
            desk: Desk::default(),
        })
    }

    /// Who may steer.
    pub(crate) fn mode(&self) -> ControlMode {
        self.kept.borrow().mode
    }

    /// Whether the local network is told that this machine is there.
    pub(crate) fn announces(&self) -> bool {
        self.kept.borrow().settings.announce
    }

    /// The services that are to run.
    pub(crate) fn services(&self) -> Vec<clan_types::ServiceName> {
        self.kept.borrow().services(&self.possible)
    }

    /// Wakes when something was changed.
    pub(crate) fn watch(&self) -> watch::Receiver<Arc<Kept>> {
        self.kept.subscribe()
    }

    /// Changes who may steer: the base OS user's to say, always.
    pub(crate) fn set_mode(&self, mode: ControlMode, core: &CoreHandle) -> Result<(), String> {
        let actor = self.actor(&Caller::Here, &core.view());
        let changed = self.write(|kept| Ok(kept.set_mode(mode, actor, now())));
        changed.map(drop).map_err(|failure| match failure {
            Failure::Refused(refusal) => refusal.to_string(),
            Failure::Failed(why) => why,
        })
    }

    /// Answers a machine of the clan; a stranger's connection is closed before anything is read from it.
    pub(crate) async fn serve(self: Arc<Self>, connection: Connection, core: CoreHandle) {
        let from = net::machine_of(&connection);
        if core.view().state.machine_in_good_standing(&from).is_none() {
            connection.close(2u32.into(), b"unknown machine");
            return;
        }
        let mut challenge = [0; 32];
        if getrandom::fill(&mut challenge).is_err() {
            return;
        }
        let called = timeout(PATIENCE, async {
            let (mut send, mut recv) = connection.open_bi().await.ok()?;
            send_message(&mut send, &Greeting::Challenge(challenge), MAX_CALL).await.ok()?;
            let call = recv_message::<Call, _>(&mut recv, MAX_CALL).await.ok()?;
            Some((send, recv, call))
        });
        let Ok(Some((mut send, mut recv, call))) = called.await else { return };
        let ends = Ends { clan: core.view().clan, from, to: self.machine, challenge };
        let then = match recognise(&core.view().state, &ends, &call) {
            Ok(caller) => self.converse(&caller, call.request, &mut send, &mut recv, &core).await,
            Err(refusal) => refuse(&mut send, refusal).await,
        };
        let _ = send.finish();
        // The caller closes once it has read the answer.
        let _ = timeout(FAREWELL, connection.closed()).await;
        then.go();
    }

    /// Answers the base OS user.
    pub(crate) async fn serve_user(&self, mut stream: Stream, access: &Access) {
        let called = timeout(PATIENCE, async {
            send_message(&mut stream, &ControlResponse::Connected, MAX_MESSAGE).await.ok()?;
            send_message(&mut stream, &Greeting::Here, MAX_CALL).await.ok()?;
            recv_message::<Call, _>(&mut stream, MAX_CALL).await.ok()
        });
        let Ok(Some(call)) = called.await else { return };
        let (mut recv, mut send) = tokio::io::split(stream);
        let then = tokio::select! {
            () = access.over.cancelled() => Then::Nothing,
            then = self.converse(&Caller::Here, call.request, &mut send, &mut recv, &access.core) => then,
        };
        streams::finish(recv.unsplit(send)).await;
        then.go();
    }

    async fn converse<W, R>(
        &self,
        caller: &Caller,
        request: Request,
        send: &mut W,
        recv: &mut R,
        core: &CoreHandle,
    ) -> Then
    where
        W: AsyncWrite + Unpin + Send,
        R: AsyncRead + Unpin + Send,
    {
        if !request.is_bounded() {
            return refuse(send, Refusal::Malformed).await;
        }
        if let Err(refusal) = self.may(caller, &core.view(), &request) {
            tracing::info!(?caller, %refusal, "somebody may not steer this machine");
            return refuse(send, refusal).await;
        }
        let restarts = matches!(request, Request::Restart);
        let answer = match request {
            Request::Report => Ok(self.report().await),
            Request::Journal => Ok(Answer::Journal(self.kept.borrow().journal().to_vec())),
            Request::Log { lines, follow } => {
                self.log(caller, lines, follow, send, recv, core).await;
                return Then::Nothing;
            }
            Request::Terminal(open) => {
                self.terminal(caller, open, send, recv, core).await;
                return Then::Nothing;
            }
            Request::Set { ref name, ref value, dry_run } => {
                self.change(caller, &request, dry_run, core, |kept, by| {
                    kept.set(name, value, &self.possible, by, now())
                })
            }
            Request::Update { image, dry_run } => {
                let wanted = Wanted { image, reverts: None, dry_run };
                self.order(caller, &request, wanted, send, recv, core).await
            }
            Request::Revert { number, dry_run } => match self.image_before(number) {
                Some((before, after)) => {
                    let wanted = Wanted { image: before, reverts: Some((number, after)), dry_run };
                    self.order(caller, &request, wanted, send, recv, core).await
                }
                None => self
                    .change(caller, &request, dry_run, core, |kept, by| kept.revert(number, &self.possible, by, now())),
            },
            Request::Restart => self.restart(caller, core).await,
        };
        // The manager starts a container again whose controller has ended.
        let ends = matches!((restarts, &answer, &self.host), (true, Ok(_), Host::Container(_)));
        let _ = timeout(PATIENCE, send_message(send, &answer.unwrap_or_else(Answer::from), MAX_ANSWER)).await;
        if ends { Then::End } else { Then::Nothing }
    }

    /// Whether somebody may do something now.
    fn may(&self, caller: &Caller, view: &View, request: &Request) -> Result<(), Refusal> {
        may(self.mode(), caller, &view.state, request)
    }

    /// Returns once somebody may not go on.
    async fn lapsed(&self, caller: &Caller, request: &Request, core: &CoreHandle) -> Refusal {
        let (mut views, mut kept) = (core.watch(), self.watch());
        loop {
            if let Err(refusal) = self.may(caller, &core.view(), request) {
                return refusal;
            }
            tokio::select! {
                // Without its core the machine knows nobody.
                changed = views.changed() => if changed.is_err() { return Refusal::Stranger },
                _ = kept.changed() => {}
            }
        }
    }

    fn actor(&self, caller: &Caller, view: &View) -> Actor {
        let (person, machine) = match caller {
            Caller::Here => (view.state.machines.get(&self.machine).map(|machine| machine.owner), self.machine),
            Caller::Member { person, machine, .. } => (Some(*person), *machine),
        };
        Actor {
            person,
            name: person.and_then(|id| view.state.people.get(&id)).map(|person| person.name.clone()),
            machine,
            machine_name: view.state.machines.get(&machine).map(|machine| machine.name.clone()),
            here: *caller == Caller::Here,
        }
    }

    fn change(
        &self,
        caller: &Caller,
        request: &Request,
        dry_run: bool,
        core: &CoreHandle,
        change: impl FnOnce(&mut Kept, Actor) -> Result<Option<JournalEntry>, Refusal>,
    ) -> Result<Answer, Failure> {
        let view = core.view();
        let by = self.actor(caller, &view);
        let checked = |kept: &mut Kept| {
            // INVARIANT: judged by the mode that is in force while it is done.
            may(kept.mode, caller, &view.state, request)?;
            change(kept, by)
        };
        let entry = if dry_run { checked(&mut Kept::clone(&self.kept.borrow()))? } else { self.write(checked)? };
        Ok(entry.map_or(Answer::Unchanged, Answer::Done))
    }

    /// Changes what is kept, on disk and then here. Blocks on the disk, for a file of some ten pages.
    fn write<T>(&self, change: impl FnOnce(&mut Kept) -> Result<T, Refusal>) -> Result<T, Failure> {
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.kept.borrow().clone();
        let mut kept = Kept::clone(&before);
        let outcome = change(&mut kept)?;
        if kept != *before {
            clan_store::write_versioned_json(&self.path, &kept)?;
            self.kept.send_replace(Arc::new(kept));
        }
        Ok(outcome)
    }

    async fn report(&self) -> Answer {
        let mut sampler = Sampler::new(self.host.measured(&self.dir));
        // The share of busy time is that between two samples.
        sampler.sample().await;
        tokio::time::sleep(MEASURE).await;
        let stats = sampler.sample().await;
        let kept = self.kept.borrow().clone();
        Answer::Report(Box::new(Report { mode: kept.mode, stats, settings: kept.settings(&self.possible) }))
    }

    async fn log<W, R>(&self, caller: &Caller, lines: u32, follow: bool, send: &mut W, recv: &mut R, core: &CoreHandle)
    where
        W: AsyncWrite + Unpin + Send,
        R: AsyncRead + Unpin + Send,
    {
        let scope = if self.host.is_guest() { Scope::Everything } else { Scope::Own };
        let journal = match Journal::open(&scope, lines, follow) {
            Ok(journal) => journal,
            Err(why) => {
                let _ = timeout(PATIENCE, send_message(send, &Answer::Failed(why), MAX_ANSWER)).await;
                return;
            }
        };
        if send_message(send, &Answer::Raw, MAX_ANSWER).await.is_ok() {
            let request = Request::Log { lines, follow };
            tokio::select! {
                _ = self.lapsed(caller, &request, core) => {}
                () = journal.pass_between(recv, send, follow) => {}
            }
        }
    }

    async fn restart(&self, caller: &Caller, core: &CoreHandle) -> Result<Answer, Failure> {
        if !self.host.is_guest() {
            // INVARIANT: the clan does not switch a computer off that has other business.
            return Err(Refusal::UserOnly { what: "starting this computer anew".to_owned() }.into());
        }
        let done = self
            .change(caller, &Request::Restart, false, core, |kept, by| Ok(Some(kept.note(by, Deed::Restart, now()))))?;
        if let Host::Container(_) = self.host {
            return Ok(done);
        }
        let asked = Command::new("systemctl").args(["reboot", "--no-block"]).output().await;
        match asked {
            Ok(output) if output.status.success() => Ok(done),
            Ok(output) => Err(Failure::Failed(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
            Err(error) => Err(Failure::Failed(format!("systemctl cannot be run: {error}"))),
        }
    }
}

fn may(mode: ControlMode, caller: &Caller, state: &State, request: &Request) -> Result<(), Refusal> {
    // What is there to see of a person's own computer they may see, whoever steers it.
    let looks = matches!(request, Request::Report | Request::Journal | Request::Log { .. });
    match caller {
        Caller::Here if mode.is_for_user() || looks => Ok(()),
        Caller::Here => Err(Refusal::Remote),
        Caller::Member { person, device, machine } => {
            let known = state.device_in_good_standing(device);
            let own = state.machine_in_good_standing(machine).is_some_and(|machine| machine.owner == *person);
            if !own || !known.is_some_and(|known| known.owner == *person && known.kind == DeviceKind::Device) {
                return Err(Refusal::Stranger);
            }
            // Before the mode: who may not anyhow learns nothing of it.
            if state.role_of(person) < Some(Role::Admin) {
                return Err(Refusal::NotAdmin);
            }
            if mode.is_for_admins() { Ok(()) } else { Err(Refusal::Local) }
        }
    }
}

/// Who it is that calls.
fn recognise(state: &State, ends: &Ends, call: &Call) -> Result<Caller, Refusal> {
    let proof = call.proof.as_ref().filter(|proof| proof.is_valid(ends, &call.request)).ok_or(Refusal::Stranger)?;
    let device = state.device_in_good_standing(&proof.device).ok_or(Refusal::Stranger)?;
    Ok(Caller::Member { person: device.owner, device: proof.device, machine: ends.from })
}

async fn refuse<W: AsyncWrite + Unpin>(send: &mut W, refusal: Refusal) -> Then {
    let _ = timeout(PATIENCE, send_message(send, &Answer::Refused(refusal), MAX_ANSWER)).await;
    Then::Nothing
}

/// Opens a conversation with a machine of the clan for our manager, and passes on what both say.
pub(crate) async fn steer(mut stream: Stream, access: &Access, machine: MachineId) {
    let view = access.core.view();
    if machine == view.machine {
        return access.helm.serve_user(stream, access).await;
    }
    match timeout(PATIENCE, connect(&access.endpoint, &view, machine)).await {
        Ok(Ok((connection, mut remote))) => {
            if send_message(&mut stream, &ControlResponse::Connected, MAX_MESSAGE).await.is_ok() {
                tokio::select! {
                    () = access.over.cancelled() => {}
                    // Either side may just hang up.
                    _ = copy_bidirectional(&mut stream, &mut remote) => {}
                }
            }
            let _ = stream.shutdown().await;
            connection.close(0u32.into(), b"done");
        }
        outcome => {
            let why = outcome
                .map_or_else(|_| format!("no answer within {} s", PATIENCE.as_secs()), |o| o.err().unwrap_or_default());
            let _ = send_message(&mut stream, &ControlResponse::Failed(why), MAX_MESSAGE).await;
            streams::finish(stream).await;
        }
    }
}

type Remote = tokio::io::Join<iroh::endpoint::RecvStream, iroh::endpoint::SendStream>;

async fn connect(endpoint: &Endpoint, view: &View, machine: MachineId) -> Result<(Connection, Remote), String> {
    // INVARIANT: machines of the clan are steered, and nobody else is called.
    if view.state.machine_in_good_standing(&machine).is_none() {
        return Err("there is no such machine in the clan".to_owned());
    }
    let addr = net::endpoint_addr(&view.addresses_of(&machine), &relay::urls(view));
    let addr = addr.ok_or_else(|| "the machine's key is none".to_owned())?;
    let connection = endpoint.connect(addr, ALPN_HELM).await.map_err(|e| chain(&e))?;
    // It begins; where it does not, it has closed the connection, or is of an earlier version.
    let (send, recv) = connection.accept_bi().await.map_err(|e| chain(&e))?;
    Ok((connection, join(recv, send)))
}

/// Has the endpoint announce the machine on the local network, or not, as it is set, until cancelled. `announced` is as the
/// endpoint was made; `None` where it knows nothing of the local network yet.
pub(crate) async fn keep_announcing(
    helm: Arc<Helm>,
    endpoint: Endpoint,
    mut announced: Option<bool>,
    cancel: CancellationToken,
) {
    let mut changed = helm.watch();
    loop {
        let wanted = helm.announces();
        if announced != Some(wanted) {
            announced = Some(wanted);
            let lookup = lookup(wanted).build(endpoint.id());
            match (endpoint.address_lookup(), lookup) {
                (Ok(services), Ok(lookup)) => {
                    services.clear();
                    services.add(lookup);
                }
                (_, Err(error)) => tracing::warn!(%error, "the local network cannot be asked"),
                (Err(_), _) => return,
            }
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = changed.changed() => {}
        }
    }
}

/// Has the machine say who may steer it, until cancelled.
pub(crate) async fn keep_telling(helm: Arc<Helm>, core: CoreHandle, cancel: CancellationToken) {
    let mut changed = helm.watch();
    loop {
        let mode = changed.borrow_and_update().mode;
        core.change_own(move |own| own.control = mode).await;
        tokio::select! {
            () = cancel.cancelled() => return,
            ended = changed.changed() => if ended.is_err() { return },
        }
    }
}

/// How machines on the local network are found, and whether this one is.
pub(crate) fn lookup(announce: bool) -> iroh_mdns_address_lookup::MdnsAddressLookupBuilder {
    let outside = AddrFilter::new(net::outside);
    MdnsAddressLookup::builder().advertise(announce).discovery_cadence(net::DISCOVERY).addr_filter(outside)
}

#[cfg(test)]
mod tests;
