//! Steering machines: this computer's own, as its user; and those of other members, as an admin of the clan. Who may is judged
//! by the machine that is steered; here, what it says becomes words.

use std::time::Duration;

use clan_api::{
    ApiProblem, ControlChange, ControlSuggestion, ErrorCode, MachineChange, MachineDeed, MachineEntry, MachineReport,
    MachineSetting, RevertChange, SetControl, StatsPoint, SuggestControl, UnitInfo, UpdateMachine,
};
use clan_ledger::{Body, Ledger};
use clan_os::channel::{MessageError, Stream, recv_message, send_message};
use clan_types::{ControlMode, ImageId, Role};
use clan_wire::{
    control::{ControlRequest, ControlResponse, MachineStatus, NodeStatus},
    helm::{
        Answer, Call, Deed, Ends, Greeting, JournalEntry, MAX_ANSWER, MAX_CALL, MAX_JOURNAL, Proof, Refusal, Request,
    },
    order::Order,
};
use tokio::time::timeout;

use crate::{
    authority::not_allowed,
    clan::Clan,
    decisions::{decide, own_role},
    guest::{self, GuestError, short},
    problem, sign,
    status::{find_machine, point_of},
};

/// For reaching a machine, perhaps through a relay.
const REACH: Duration = Duration::from_secs(30);
/// For an answer; guests are slow under emulation.
const ANSWER: Duration = Duration::from_secs(30);
/// What a remote machine may list.
const MAX_LISTED: usize = 64;

/// An answer, and who gave it.
pub(crate) struct Answered {
    /// What the machine said.
    pub(crate) answer: Answer,
    /// What follows it.
    pub(crate) stream: Stream,
    status: NodeStatus,
    machine: MachineStatus,
}

/// Says who may steer this computer's machine, or what it would change.
pub(crate) async fn set_control(clan: &Clan, request: &SetControl) -> Result<ControlChange, ApiProblem> {
    let status = clan.state().await?;
    let change =
        ControlChange { machine: clan.record.get().machine, before: status.control.into(), mode: request.mode };
    if !request.dry_run {
        let mode: ControlMode = request.mode.into();
        let control = clan.control().map_err(|e| problem::guest(&e))?;
        let before = clan.record.get().control;
        let agreed = |mode: ControlMode| clan.record.update(|r| r.control = mode).map_err(|e| problem::disk(&e));
        // INVARIANT: once others may not steer, this manager takes no order of theirs, whatever the controller makes of it.
        if !mode.is_for_admins() {
            agreed(mode)?;
        }
        if let Err(error) = guest::tell(&control, &ControlRequest::SetControlMode(mode)).await {
            agreed(before)?;
            return Err(problem::guest(&error));
        }
        agreed(mode)?;
        tracing::info!(clan = %clan.name(), %mode, "who may steer the machine here was changed");
    }
    Ok(change)
}

/// Suggests to newcomers who is to steer their machine, or finds out whether that would work.
pub(crate) async fn suggest(clan: &Clan, request: &SuggestControl) -> Result<ControlSuggestion, ApiProblem> {
    let author = clan.person();
    let suggestion = |ledger: &Ledger| {
        let state = ledger.state();
        let role = own_role(state, &author)?;
        if role < Role::Admin {
            return Err(not_allowed(state, role, Role::Admin, "suggest how newcomers' machines are steered", None));
        }
        let (before, control) = (state.suggested_control, request.mode.into());
        let suggestion = ControlSuggestion { before: before.into(), mode: request.mode };
        let body = (before != control).then_some(Body::SuggestControl { control });
        Ok((suggestion, body.into_iter().collect()))
    };
    decide(clan, request.dry_run, suggestion).await.map(|(suggestion, _)| suggestion)
}

/// Asks a machine. A refusal is an error, in words.
pub(crate) async fn ask(clan: &Clan, machine: &str, request: Request) -> Result<Answered, ApiProblem> {
    if !request.is_bounded() {
        return Err(ApiProblem::new(
            ErrorCode::BadRequest,
            "that is too long for a machine, or has characters that it cannot take",
        ));
    }
    let status = clan.state().await?;
    let machine = find_machine(&status, machine)?.clone();
    if let Some(front) = &machine.behind {
        let front = status.machines.iter().find(|m| m.id == *front).map(|m| m.name.to_string());
        return Err(ApiProblem::new(ErrorCode::Conflict, format!("{} has no controller to steer", machine.name)).why(
            format!("it speaks standard WireGuard, behind {}", front.unwrap_or_else(|| "another machine".into())),
        ));
    }
    let control = clan.control().map_err(|e| problem::guest(&e))?;
    let asked = guest::open(&control, &ControlRequest::Steer { machine: machine.id }, REACH).await;
    let mut stream = match asked {
        Ok((stream, ControlResponse::Connected)) => stream,
        Ok(_) => return Err(problem::guest(&GuestError::Unexpected { what: "call the machine" })),
        Err(GuestError::Failed { why, .. }) => return Err(unreachable(&machine, &why)),
        Err(error) => return Err(problem::guest(&error)),
    };
    let conversed = timeout(ANSWER, converse(clan, &status, &machine, &mut stream, request)).await;
    let answer = conversed
        .map_err(|_| unreachable(&machine, &format!("no answer within {} s", ANSWER.as_secs())))?
        .map_err(|e| unreachable(&machine, &problem::with_sources(&e)))?;
    match answer {
        Answer::Refused(refusal) => Err(refused(&refusal, &status, &machine, clan)),
        Answer::Failed(why) => {
            Err(ApiProblem::new(ErrorCode::Conflict, format!("{} could not do it", machine.name)).why(short(&why)))
        }
        answer => Ok(Answered { answer, stream, status, machine }),
    }
}

async fn converse(
    clan: &Clan,
    status: &NodeStatus,
    machine: &MachineStatus,
    stream: &mut Stream,
    request: Request,
) -> Result<Answer, MessageError> {
    let proof = match recv_message(stream, MAX_CALL).await? {
        Greeting::Here => None,
        Greeting::Challenge(challenge) => {
            let ends = Ends { clan: clan.id(), from: status.machine, to: machine.id, challenge };
            Some(Proof::new(&clan.key, &ends, &request))
        }
    };
    let call = Call { proof, request };
    send_message(stream, &call, MAX_CALL).await?;
    let answer = recv_message(stream, MAX_ANSWER).await?;
    let Answer::Sign { image, challenge } = answer else { return Ok(answer) };
    let dry_run = match call.request {
        Request::Update { image: wanted, dry_run } if wanted == image => dry_run,
        // Which image was there before, the machine knows; its manager takes none but that, or what is published.
        Request::Revert { dry_run, .. } => dry_run,
        // INVARIANT: nothing is signed but what the person asked for.
        _ => return Ok(Answer::Failed("it asked for another signature than for what was wanted".to_owned())),
    };
    let order = Order { clan: clan.id(), machine: machine.id, image, dry_run, challenge };
    send_message(stream, &order.sign(&clan.key), MAX_CALL).await?;
    recv_message(stream, MAX_ANSWER).await
}

/// The image that a machine is to run: the one that is named, or what the clan publishes.
pub(crate) async fn update(clan: &Clan, machine: &str, request: &UpdateMachine) -> Result<Answered, ApiProblem> {
    let image = match &request.image {
        Some(text) => text.trim().to_ascii_lowercase().parse::<ImageId>().map_err(|_| {
            ApiProblem::new(ErrorCode::BadRequest, "an image of others is named by its whole id")
                .hint("without `--image` it is what the clan publishes")
        })?,
        None => {
            let ledger = sign::ledger(clan).await?;
            let published = ledger.state().published.as_ref().map(|published| published.description.image);
            published.ok_or_else(|| {
                ApiProblem::new(ErrorCode::NotFound, "the clan publishes no image")
                    .hint("publish one that a machine here runs: `clan image publish`")
            })?
        }
    };
    ask(clan, machine, Request::Update { image, dry_run: request.dry_run }).await
}

/// Takes back what an entry of a machine's journal tells.
pub(crate) async fn revert(clan: &Clan, machine: &str, request: &RevertChange) -> Result<Answered, ApiProblem> {
    let &RevertChange { number, dry_run } = request;
    let status = clan.state().await?;
    // INVARIANT: whom the user lets in, they say themselves ([`set_control`]), and a journal that the machine keeps does not.
    if find_machine(&status, machine)?.this
        && let Answer::Journal(entries) = ask(clan, machine, Request::Journal).await?.answer
        && let Some(mode) = lets_in(&entries, number)
    {
        let problem = ApiProblem::new(ErrorCode::Conflict, "whom you let in is said anew, not taken back");
        return Err(problem
            .why(format!("before entry {number} the control mode was {mode}"))
            .hint(format!("agree to it again: `clan vm control {mode}`")));
    }
    ask(clan, machine, Request::Revert { number, dry_run }).await
}

/// The mode that there would be again without an entry, if others steer in it.
fn lets_in(entries: &[JournalEntry], number: u64) -> Option<ControlMode> {
    match entries.iter().find(|entry| entry.number == number)?.what {
        Deed::Mode { before, .. } => Some(before).filter(|mode| mode.is_for_admins()),
        _ => None,
    }
}

impl Answered {
    /// Of [`Request::Report`].
    pub(crate) fn report(self) -> Result<MachineReport, ApiProblem> {
        let Answer::Report(report) = self.answer else { return Err(self.unexpected()) };
        let units = report.stats.units.iter().take(MAX_LISTED);
        let settings = report.settings.iter().take(MAX_LISTED);
        Ok(MachineReport {
            machine: self.machine.name,
            control_mode: report.mode.into(),
            stats: StatsPoint { at: report.stats.at, ..point_of(&report.stats) },
            units: units.map(|u| UnitInfo { name: short(&u.name), state: short(&u.state) }).collect(),
            settings: settings
                .map(|s| MachineSetting { name: short(&s.name), value: short(&s.value), about: short(&s.about) })
                .collect(),
        })
    }

    /// Of [`Request::Journal`].
    pub(crate) fn journal(self) -> Result<Vec<MachineEntry>, ApiProblem> {
        let Answer::Journal(journal) = self.answer else { return Err(self.unexpected()) };
        Ok(journal.into_iter().take(MAX_JOURNAL).map(entry).collect())
    }

    /// Of a change.
    pub(crate) fn change(self, clan: &Clan) -> Result<MachineChange, ApiProblem> {
        // What the user takes back here is said here too: see `revert`.
        if let Answer::Done(JournalEntry { what: Deed::Mode { after, .. }, .. }) = &self.answer
            && self.machine.this
            && !after.is_for_admins()
        {
            clan.record.update(|r| r.control = *after).map_err(|e| problem::disk(&e))?;
        }
        match self.answer {
            Answer::Done(done) => Ok(MachineChange { entry: Some(entry(done)) }),
            Answer::Unchanged => Ok(MachineChange { entry: None }),
            _ => Err(self.unexpected()),
        }
    }

    pub(crate) fn unexpected(&self) -> ApiProblem {
        let clan = &self.status.clan_name;
        ApiProblem::new(
            ErrorCode::Unreachable,
            format!("{} of {clan} gave an answer to another question", self.machine.name),
        )
        .hint("it may run another version of Clan: see `clan machines --json`")
    }
}

fn entry(entry: JournalEntry) -> MachineEntry {
    let (deed, setting, before, after, reverts, ended) = match entry.what {
        Deed::Mode { before, after, reverts } => {
            (MachineDeed::ControlMode, None, Some(before.to_string()), Some(after.to_string()), reverts, None)
        }
        Deed::Set { name, before, after, reverts } => {
            (MachineDeed::Setting, Some(short(&name)), Some(short(&before)), Some(short(&after)), reverts, None)
        }
        Deed::Restart => (MachineDeed::Restart, None, None, None, None, None),
        Deed::Terminal { ended } => (MachineDeed::Terminal, None, None, None, None, ended),
        Deed::Image { before, after, reverts } => {
            (MachineDeed::Image, None, Some(before.to_string()), Some(after.to_string()), reverts, None)
        }
    };
    MachineEntry {
        number: entry.number,
        at: entry.at,
        person: entry.by.person,
        person_name: entry.by.name,
        from: entry.by.machine,
        from_name: entry.by.machine_name,
        here: entry.by.here,
        deed,
        setting,
        before,
        after,
        reverts,
        ended,
    }
}

fn unreachable(machine: &MachineStatus, why: &str) -> ApiProblem {
    ApiProblem::new(ErrorCode::Unreachable, format!("{} does not answer who would steer it", machine.name))
        .why(short(why))
        .hint(format!("see whether it is there: `clan ping {}`", machine.name))
        .hint("a machine with an earlier version of Clan cannot be steered by others")
}

/// A refusal in the person's words: who may, and how that can be changed.
fn refused(refusal: &Refusal, status: &NodeStatus, machine: &MachineStatus, clan: &Clan) -> ApiProblem {
    let name = &machine.name;
    let person = status.people.iter().find(|p| p.id == machine.owner);
    let owner = person.map_or_else(|| "its owner".to_owned(), |p| p.name.to_string());
    let not_allowed = |message: String| ApiProblem::new(ErrorCode::NotAllowed, message);
    let bad = |message: String| ApiProblem::new(ErrorCode::BadRequest, message);
    let conflict = |message: String| ApiProblem::new(ErrorCode::Conflict, message);
    match refusal {
        Refusal::Stranger => not_allowed(format!("{name} does not know you as somebody of the clan"))
            .why("you were put out, or it has not heard yet that you came in")
            .hint("see what this computer knows: `clan status`"),
        Refusal::NotAdmin => {
            let role = status.people.iter().find(|p| p.id == clan.person()).map(|p| p.role);
            let admins = status.people.iter().filter(|p| p.role >= Role::Admin).map(|p| p.name.to_string());
            let admins: Vec<String> = admins.take(12).collect();
            let problem =
                not_allowed(format!("the machines of others are steered by admins and owners: {name} is {owner}'s"));
            let problem = match role {
                Some(role) => problem.why(format!("you are {role}")),
                None => problem,
            };
            problem.hint(format!("ask one of them: {}", admins.join(", ")))
        }
        Refusal::Local => not_allowed(format!("only {owner} steers {name}, at its own computer"))
            .why("its control mode is local")
            .hint(format!("{owner} can let the clan's admins do it, there: `clan vm control shared`")),
        Refusal::Remote => not_allowed(format!("the clan's admins steer {name}, and not you"))
            .why("its control mode is remote, as was agreed on this computer")
            .hint("take it back: `clan vm control shared`, or `clan vm control local`"),
        Refusal::UserOnly { what } => {
            let there = match what.as_str() {
                "memory" | "disk" | "cpus" => "`clan vm resize`",
                "control" | "the control mode" => "`clan vm control`",
                "power" => "`clan vm stop`",
                "snapshots" => "`clan vm snapshot`",
                _ => "`clan vm`",
            };
            not_allowed(format!("{} is {owner}'s to change, at the computer of {name}", short(what)))
                .why("the clan's admins steer what runs in a machine, not the computer that it runs on")
                .hint(format!("{owner} can, there: {there}"))
        }
        Refusal::NoSetting { name: setting, known } => {
            let known: Vec<String> = known.iter().take(MAX_LISTED).map(|k| short(k)).collect();
            let problem = bad(format!("{name} has no setting `{}`", short(setting)));
            problem.hint(format!("it has: {}", known.join(", ")))
        }
        Refusal::BadValue { name: setting, value, why } => {
            bad(format!("`{}` is no value for `{}`", short(value), short(setting))).why(short(why))
        }
        Refusal::NoEntry { number } => {
            ApiProblem::new(ErrorCode::NotFound, format!("the journal of {name} has no entry {number}"))
                .why(format!("it keeps the last {MAX_JOURNAL}"))
                .hint(format!("see it: `clan machine journal {name}`"))
        }
        Refusal::NotRevertible { number } => conflict(format!("what entry {number} tells cannot be taken back"))
            .why("only changes of settings, of the image and of the control mode can"),
        Refusal::Stale { number, now } => conflict(format!("entry {number} is not the last word on it any more"))
            .why(format!("it has been changed since, and is `{}` now", short(now)))
            .hint(format!("take the last change back first: `clan machine journal {name}`")),
        Refusal::Busy => {
            conflict(format!("{name} has as many terminals open as it may have")).hint("close another first")
        }
        Refusal::NoImage => conflict(format!("{name} runs no image: it is {owner}'s computer itself"))
            .why("its programs are updated there, as all of the computer are"),
        Refusal::NotPublished { image } => conflict(format!("{name} does not take the image {}", image.short()))
            .why("others have it run what the clan publishes, or what it ran before")
            .hint("publish it first: `clan image publish`; a machine that was off has to hear of it"),
        Refusal::NotNow { why } => {
            conflict(format!("{owner}'s computer does not do it now")).why(short(why)).hint("try again later")
        }
        Refusal::Malformed => bad(format!("{name} does not understand the request"))
            .hint("it may run another version of Clan: see `clan machines --json`"),
    }
}

#[cfg(test)]
mod tests {
    use clan_types::{MachineId, Timestamp};
    use clan_wire::helm::Actor;

    use super::*;

    #[test]
    fn only_what_shuts_others_out_is_taken_back_of_the_mode() {
        let by =
            Actor { person: None, name: None, machine: MachineId::from_bytes([1; 32]), machine_name: None, here: true };
        let entry = |number, what| JournalEntry { number, at: Timestamp::from_millis(0), by: by.clone(), what };
        let mode = |before, after| Deed::Mode { before, after, reverts: None };
        let entries = [
            entry(1, mode(ControlMode::Local, ControlMode::Shared)),
            entry(2, mode(ControlMode::Shared, ControlMode::Remote)),
            entry(3, mode(ControlMode::Remote, ControlMode::Local)),
            entry(4, Deed::Restart),
        ];
        let judged = [1, 2, 3, 4, 5].map(|number| lets_in(&entries, number));
        assert_eq!(judged, [None, Some(ControlMode::Shared), Some(ControlMode::Remote), None, None]);
    }
}
