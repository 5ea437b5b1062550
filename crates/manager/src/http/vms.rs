//! VMs: start, stop, pause, snapshots, size, delete, logs, console, statistics.

use std::sync::Arc;

use axum::{
    body::{Body, Bytes},
    extract::{Path, Query, State, rejection::QueryRejection},
    http::{HeaderValue, Request, Response, StatusCode, header},
    response::IntoResponse,
};
use clan_api::{
    ApiProblem, CONSOLE_UPGRADE, ChangePassphrase, DeleteQuery, ErrorCode, LogQuery, LogSource, MakeSnapshot, ResizeVm,
    SnapshotInfo, TaskInfo, UnlockVm, UpdatePlan, UpdateVm, VmInfo, VmSize, VmStats,
};
use clan_wire::control::{ControlRequest, ControlResponse};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional};
use tokio_util::io::ReaderStream;

use super::{
    problems::{Answer, Json, parse},
    streamed,
};
use crate::{
    clan::Clan,
    guest::{self, GuestError},
    leave, lock, logs, machine,
    manager::Shared,
    problem, snapshots, status, update,
};

/// The most lines that are given out.
pub(super) const MAX_LINES: u32 = 100_000;

pub(super) async fn list(State(shared): State<Arc<Shared>>) -> Json<Vec<VmInfo>> {
    Json(StatusCode::OK, shared.clans().iter().map(|c| status::vm_info(&shared, c, c.keeper.told().as_ref())).collect())
}

pub(super) async fn start(State(shared): State<Arc<Shared>>, Path(vm): Path<String>) -> Answer<Json<TaskInfo>> {
    let clan = shared.find(&vm)?;
    Ok(Json(StatusCode::ACCEPTED, leave::start_task(&shared, clan)?.info()))
}

pub(super) async fn stop(State(shared): State<Arc<Shared>>, Path(vm): Path<String>) -> Answer<Json<TaskInfo>> {
    let clan = shared.find(&vm)?;
    Ok(Json(StatusCode::ACCEPTED, leave::stop_task(&shared, clan)?.info()))
}

pub(super) async fn pause(State(shared): State<Arc<Shared>>, Path(vm): Path<String>) -> Answer<Json<TaskInfo>> {
    let clan = shared.find(&vm)?;
    Ok(Json(StatusCode::ACCEPTED, machine::pause_task(&shared, clan)?.info()))
}

pub(super) async fn resume(State(shared): State<Arc<Shared>>, Path(vm): Path<String>) -> Answer<Json<TaskInfo>> {
    let clan = shared.find(&vm)?;
    Ok(Json(StatusCode::ACCEPTED, machine::resume_task(&shared, clan)?.info()))
}

pub(super) async fn restart(State(shared): State<Arc<Shared>>, Path(vm): Path<String>) -> Answer<Json<TaskInfo>> {
    let clan = shared.find(&vm)?;
    Ok(Json(StatusCode::ACCEPTED, machine::restart_task(&shared, clan)?.info()))
}

pub(super) async fn update(
    State(shared): State<Arc<Shared>>,
    Path(vm): Path<String>,
    body: Bytes,
) -> Answer<Json<TaskInfo>> {
    let request: UpdateVm = parse(&body)?;
    let clan = shared.find(&vm)?;
    Ok(Json(StatusCode::ACCEPTED, update::task(&shared, clan, &request).await?.info()))
}

pub(super) async fn preview_update(
    State(shared): State<Arc<Shared>>,
    Path(vm): Path<String>,
    body: Bytes,
) -> Answer<Json<UpdatePlan>> {
    let request: UpdateVm = parse(&body)?;
    let clan = shared.find(&vm)?;
    Ok(Json(StatusCode::OK, update::preview(&shared, &clan, &request).await?))
}

pub(super) async fn resize(
    State(shared): State<Arc<Shared>>,
    Path(vm): Path<String>,
    body: Bytes,
) -> Answer<Json<VmSize>> {
    let request: ResizeVm = parse(&body)?;
    let clan = shared.find(&vm)?;
    Ok(Json(StatusCode::OK, machine::resize(&shared, &clan, &request).await?))
}

pub(super) async fn unlock(
    State(shared): State<Arc<Shared>>,
    Path(vm): Path<String>,
    body: Bytes,
) -> Answer<Json<VmInfo>> {
    let UnlockVm { passphrase } = parse(&body)?;
    let clan = shared.find(&vm)?;
    lock::unlock(&clan, passphrase).await?;
    Ok(Json(StatusCode::OK, status::vm_info(&shared, &clan, clan.keeper.told().as_ref())))
}

pub(super) async fn lock(State(shared): State<Arc<Shared>>, Path(vm): Path<String>) -> Answer<Json<VmInfo>> {
    let clan = shared.find(&vm)?;
    lock::lock(&shared, &clan).await?;
    Ok(Json(StatusCode::OK, status::vm_info(&shared, &clan, clan.keeper.told().as_ref())))
}

pub(super) async fn change_passphrase(
    State(shared): State<Arc<Shared>>,
    Path(vm): Path<String>,
    body: Bytes,
) -> Answer<Json<TaskInfo>> {
    let ChangePassphrase { old, new } = parse(&body)?;
    let clan = shared.find(&vm)?;
    Ok(Json(StatusCode::ACCEPTED, lock::change_task(&shared, clan, old, new)?.info()))
}

pub(super) async fn snapshots(
    State(shared): State<Arc<Shared>>,
    Path(vm): Path<String>,
) -> Answer<Json<Vec<SnapshotInfo>>> {
    let clan = shared.find(&vm)?;
    Ok(Json(StatusCode::OK, crate::fetch::blocking(move || snapshots::list(&clan)).await?))
}

pub(super) async fn make_snapshot(
    State(shared): State<Arc<Shared>>,
    Path(vm): Path<String>,
    body: Bytes,
) -> Answer<Json<TaskInfo>> {
    let request: MakeSnapshot = parse(&body)?;
    let clan = shared.find(&vm)?;
    Ok(Json(StatusCode::ACCEPTED, snapshots::make_task(&shared, clan, request.name)?.info()))
}

pub(super) async fn restore_snapshot(
    State(shared): State<Arc<Shared>>,
    Path((vm, name)): Path<(String, String)>,
) -> Answer<Json<TaskInfo>> {
    let clan = shared.find(&vm)?;
    Ok(Json(StatusCode::ACCEPTED, snapshots::restore_task(&shared, clan, &name)?.info()))
}

pub(super) async fn discard_snapshot(
    State(shared): State<Arc<Shared>>,
    Path((vm, name)): Path<(String, String)>,
) -> Answer<Json<TaskInfo>> {
    let clan = shared.find(&vm)?;
    Ok(Json(StatusCode::ACCEPTED, snapshots::discard_task(&shared, clan, &name)?.info()))
}

pub(super) async fn delete(
    State(shared): State<Arc<Shared>>,
    Path(vm): Path<String>,
    query: Result<Query<DeleteQuery>, QueryRejection>,
) -> Answer<Json<TaskInfo>> {
    let query = understood(query)?;
    let clan = shared.find(&vm)?;
    Ok(Json(StatusCode::ACCEPTED, leave::delete_task(&shared, clan, query.force)?.info()))
}

pub(super) async fn stats(State(shared): State<Arc<Shared>>, Path(vm): Path<String>) -> Answer<Json<VmStats>> {
    Ok(Json(StatusCode::OK, status::vm_stats(&*shared.find(&vm)?)))
}

pub(super) fn understood<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, ApiProblem> {
    query
        .map(|Query(q)| q)
        .map_err(|e| ApiProblem::new(ErrorCode::BadRequest, "the request is not understood").why(e.body_text()))
}

/// What an integrated machine does not have.
fn no_console() -> ApiProblem {
    ApiProblem::new(ErrorCode::Conflict, "there is no console")
        .why("this computer itself is the clan's machine: there is no virtual one")
        .hint("its controller's log: `clan vm logs`")
}

/// INVARIANT: of a guest whose disk is encrypted, nothing is written down in the clear.
fn console_not_kept() -> ApiProblem {
    ApiProblem::new(ErrorCode::Conflict, "what this VM writes to its console is not kept, as its disk is encrypted")
        .hint("watch it: `clan vm console`; its journal: `clan vm logs`")
}

async fn console_log(clan: &Clan, lines: u32, follow: bool) -> Answer<Body> {
    let (path, lines) = (clan.record.paths().console_log(), usize::try_from(lines).unwrap_or(usize::MAX));
    if follow {
        return Ok(streamed(logs::follow(path, lines)));
    }
    let text = crate::fetch::blocking(move || logs::tail(&path, lines)).await?;
    let unread =
        |e: std::io::Error| ApiProblem::new(ErrorCode::Internal, "the console's log cannot be read").why(e.to_string());
    Ok(Body::from(text.map_err(unread)?))
}

pub(super) async fn logs(
    State(shared): State<Arc<Shared>>,
    Path(vm): Path<String>,
    query: Result<Query<LogQuery>, QueryRejection>,
) -> Answer<Response<Body>> {
    let query = understood(query)?;
    let lines = query.lines.min(MAX_LINES);
    let clan = shared.find(&vm)?;
    let body = match query.source {
        LogSource::Console if clan.record.get().is_integrated() => return Err(no_console().into()),
        LogSource::Console if clan.record.get().encrypted => return Err(console_not_kept().into()),
        // In a container everything is in one log.
        _ if clan.record.get().is_container() => console_log(&clan, lines, query.follow).await?,
        LogSource::Console => console_log(&clan, lines, query.follow).await?,
        LogSource::Journal => {
            let integrated = clan.record.get().is_integrated();
            let hint = |e: GuestError| match problem::guest(&e) {
                problem if integrated => problem,
                problem => problem.hint("the console is there even when the guest is not: `--console`"),
            };
            let control = clan.control().map_err(hint)?;
            let request = ControlRequest::Journal { lines, follow: query.follow };
            match guest::open(&control, &request, guest::PATIENCE).await.map_err(hint)? {
                (stream, ControlResponse::Raw) => streamed(ReaderStream::new(stream)),
                _ => return Err(hint(GuestError::Unexpected { what: "give its journal" }).into()),
            }
        }
    };
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // A guest writes these: no browser shall find markup in them.
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    Ok(response)
}

/// What a console is of.
trait Terminal: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Terminal for T {}

pub(super) async fn console(
    State(shared): State<Arc<Shared>>,
    Path(vm): Path<String>,
    mut request: Request<Body>,
) -> Answer<Response<Body>> {
    let wants = request
        .headers()
        .get(header::UPGRADE)
        .is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(CONSOLE_UPGRADE.as_bytes()));
    if !wants {
        return Err(ApiProblem::new(
            ErrorCode::BadRequest,
            format!("the console needs an upgrade to `{CONSOLE_UPGRADE}`"),
        )
        .into());
    }
    let clan = shared.find(&vm)?;
    if clan.record.get().is_integrated() {
        return Err(no_console().into());
    }
    let not_running = || {
        let message = format!("the {} does not run", clan.record.get().what());
        ApiProblem::new(ErrorCode::VmNotReady, message).hint("start it: `clan vm start`")
    };
    let mut port: Box<dyn Terminal> = if clan.record.get().is_container() {
        let running = clan.keeper.container().ok_or_else(not_running)?;
        Box::new(running.shell(&shared.options.clan_executable).map_err(|e| problem::vm(&e))?)
    } else {
        let running = clan.keeper.vm().ok_or_else(not_running)?;
        let port = running.connect_console().await;
        Box::new(port.map_err(|e| problem::vm(&e).hint("only one console can be open at a time"))?)
    };
    let upgrade = hyper::upgrade::on(&mut request);
    let cancel = shared.stop_token();
    tokio::spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        let mut terminal = TokioIo::new(upgraded);
        tokio::select! {
            () = cancel.cancelled() => {}
            // Either side may just hang up.
            _ = copy_bidirectional(&mut terminal, &mut *port) => {}
        }
    });
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, CONSOLE_UPGRADE)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}
