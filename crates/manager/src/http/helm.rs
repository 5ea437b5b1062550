//! Steering machines: reports, logs, settings, journals, terminals.

use std::sync::Arc;

use axum::{
    body::{Body, Bytes},
    extract::{Path, Query, State, rejection::QueryRejection},
    http::{HeaderValue, Request, Response, StatusCode, header},
    response::IntoResponse,
};
use clan_api::{
    ApiProblem, ChangeSetting, ControlChange, ControlSuggestion, ErrorCode, LogQuery, MachineChange, MachineEntry,
    MachineReport, RevertChange, SetControl, SuggestControl, TERMINAL_UPGRADE, TerminalQuery, UpdateMachine,
};
use clan_wire::helm::{Answer as Said, OpenTerminal, Request as Asked, Size};
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;
use tokio_util::io::ReaderStream;

use super::{
    problems::{Answer, Json, parse},
    streamed,
    vms::{MAX_LINES, understood},
};
use crate::{helm, manager::Shared};

type Clans = State<Arc<Shared>>;
type Machine = Path<(String, String)>;

pub(super) async fn set_control(
    State(shared): Clans,
    Path(vm): Path<String>,
    body: Bytes,
) -> Answer<Json<ControlChange>> {
    let request: SetControl = parse(&body)?;
    Ok(Json(StatusCode::OK, helm::set_control(&*shared.find(&vm)?, &request).await?))
}

pub(super) async fn suggest(
    State(shared): Clans,
    Path(clan): Path<String>,
    body: Bytes,
) -> Answer<Json<ControlSuggestion>> {
    let request: SuggestControl = parse(&body)?;
    let suggestion = helm::suggest(&*shared.find(&clan)?, &request).await?;
    let done = suggestion.before != suggestion.mode && !request.dry_run;
    Ok(Json(if done { StatusCode::CREATED } else { StatusCode::OK }, suggestion))
}

pub(super) async fn report(State(shared): Clans, Path((clan, machine)): Machine) -> Answer<Json<MachineReport>> {
    let answered = helm::ask(&*shared.find(&clan)?, &machine, Asked::Report).await?;
    Ok(Json(StatusCode::OK, answered.report()?))
}

pub(super) async fn journal(State(shared): Clans, Path((clan, machine)): Machine) -> Answer<Json<Vec<MachineEntry>>> {
    let answered = helm::ask(&*shared.find(&clan)?, &machine, Asked::Journal).await?;
    Ok(Json(StatusCode::OK, answered.journal()?))
}

pub(super) async fn change(
    State(shared): Clans,
    Path((clan, machine)): Machine,
    body: Bytes,
) -> Answer<Json<MachineChange>> {
    let ChangeSetting { name, value, dry_run } = parse(&body)?;
    changed(&shared, &clan, &machine, Asked::Set { name, value, dry_run }, dry_run).await
}

pub(super) async fn revert(
    State(shared): Clans,
    Path((clan, machine)): Machine,
    body: Bytes,
) -> Answer<Json<MachineChange>> {
    let (request, clan): (RevertChange, _) = (parse(&body)?, shared.find(&clan)?);
    answered(helm::revert(&clan, &machine, &request).await?.change(&clan)?, StatusCode::CREATED, request.dry_run)
}

pub(super) async fn restart(State(shared): Clans, Path((clan, machine)): Machine) -> Answer<Json<MachineChange>> {
    changed(&shared, &clan, &machine, Asked::Restart, false).await
}

pub(super) async fn update(
    State(shared): Clans,
    Path((clan, machine)): Machine,
    body: Bytes,
) -> Answer<Json<MachineChange>> {
    let (request, clan): (UpdateMachine, _) = (parse(&body)?, shared.find(&clan)?);
    answered(helm::update(&clan, &machine, &request).await?.change(&clan)?, StatusCode::ACCEPTED, request.dry_run)
}

async fn changed(
    shared: &Shared,
    clan: &str,
    machine: &str,
    request: Asked,
    dry_run: bool,
) -> Answer<Json<MachineChange>> {
    let clan = shared.find(clan)?;
    answered(helm::ask(&clan, machine, request).await?.change(&clan)?, StatusCode::CREATED, dry_run)
}

fn answered(change: MachineChange, done: StatusCode, dry_run: bool) -> Answer<Json<MachineChange>> {
    let changes = change.entry.is_some() && !dry_run;
    Ok(Json(if changes { done } else { StatusCode::OK }, change))
}

pub(super) async fn log(
    State(shared): Clans,
    Path((clan, machine)): Machine,
    query: Result<Query<LogQuery>, QueryRejection>,
) -> Answer<Response<Body>> {
    let query = understood(query)?;
    let request = Asked::Log { lines: query.lines.min(MAX_LINES), follow: query.follow };
    let answered = helm::ask(&*shared.find(&clan)?, &machine, request).await?;
    if answered.answer != Said::Raw {
        return Err(answered.unexpected().into());
    }
    let mut response = Response::new(streamed(ReaderStream::new(answered.stream)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // A machine of somebody else writes these: no browser shall find markup in them.
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    Ok(response)
}

pub(super) async fn terminal(
    State(shared): Clans,
    Path((clan, machine)): Machine,
    query: Result<Query<TerminalQuery>, QueryRejection>,
    mut request: Request<Body>,
) -> Answer<Response<Body>> {
    let open = open(&understood(query)?)?;
    let wanted = request.headers().get(header::UPGRADE);
    if !wanted.is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(TERMINAL_UPGRADE.as_bytes())) {
        let problem =
            ApiProblem::new(ErrorCode::BadRequest, format!("a terminal needs an upgrade to `{TERMINAL_UPGRADE}`"));
        return Err(problem.into());
    }
    let mut answered = helm::ask(&*shared.find(&clan)?, &machine, Asked::Terminal(open)).await?;
    if answered.answer != Said::Terminal {
        return Err(answered.unexpected().into());
    }
    let (upgrade, cancel) = (hyper::upgrade::on(&mut request), shared.stop_token());
    tokio::spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        let mut person = TokioIo::new(upgraded);
        tokio::select! {
            () = cancel.cancelled() => {}
            // Either side may just hang up.
            _ = copy_bidirectional(&mut person, &mut answered.stream) => {}
        }
    });
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, TERMINAL_UPGRADE)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

fn open(query: &TerminalQuery) -> Result<OpenTerminal, ApiProblem> {
    let bad = |why: &str| ApiProblem::new(ErrorCode::BadRequest, "the request is not understood").why(why);
    let command = match &query.command {
        Some(text) => serde_json::from_str(text).map_err(|_| bad("`command` is a JSON array of texts"))?,
        None => Vec::new(),
    };
    let screen = match (query.rows, query.columns) {
        (Some(rows), Some(columns)) => {
            Some((Size { rows, columns }, query.term.clone().unwrap_or_else(|| "xterm-256color".into())))
        }
        (None, None) => None,
        _ => return Err(bad("a terminal has rows and columns")),
    };
    Ok(OpenTerminal { command, screen })
}
