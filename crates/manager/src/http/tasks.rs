//! Tasks.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    extract::{Path, State},
    http::StatusCode,
    response::sse::{Event, KeepAlive, Sse},
};
use clan_api::{ApiProblem, ErrorCode, TaskEvent, TaskId, TaskInfo};
use futures_util::Stream;

use super::problems::{Answer, Json};
use crate::{manager::Shared, tasks::Task};

/// Updates come no faster.
const PACE: Duration = Duration::from_millis(150);

pub(super) async fn list(State(shared): State<Arc<Shared>>) -> Json<Vec<TaskInfo>> {
    Json(StatusCode::OK, shared.tasks.list())
}

fn find(shared: &Shared, id: &str) -> Result<Arc<Task>, ApiProblem> {
    let id: TaskId =
        id.parse().map_err(|e: clan_api::TaskIdError| ApiProblem::new(ErrorCode::BadRequest, e.to_string()))?;
    shared
        .tasks
        .get(id)
        .ok_or_else(|| ApiProblem::new(ErrorCode::NotFound, "there is no such task").hint("the latest forty are kept"))
}

pub(super) async fn one(State(shared): State<Arc<Shared>>, Path(id): Path<String>) -> Answer<Json<TaskInfo>> {
    Ok(Json(StatusCode::OK, find(&shared, &id)?.info_with_log()))
}

pub(super) async fn cancel(State(shared): State<Arc<Shared>>, Path(id): Path<String>) -> Answer<Json<TaskInfo>> {
    let task = find(&shared, &id)?;
    task.cancel();
    Ok(Json(StatusCode::OK, task.info()))
}

pub(super) async fn events(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
) -> Answer<Sse<impl Stream<Item = Result<Event, Infallible>> + use<>>> {
    let task = find(&shared, &id)?;
    Ok(Sse::new(watch(task)).keep_alive(KeepAlive::default()))
}

/// A task's events: how it stands, then every change with the new log lines, until it ends.
fn watch(task: Arc<Task>) -> impl Stream<Item = Result<Event, Infallible>> {
    let changes = task.watch();
    let start = (task, changes, 0u64, true);
    let batches = futures_util::stream::unfold(Some(start), |state| async move {
        let (task, mut changes, seen, first) = state?;
        if !first {
            // The sender lives in the task, which is held here.
            let _ = changes.changed().await;
            tokio::time::sleep(PACE).await;
        }
        changes.mark_unchanged();
        // In this order: what the last update tells is complete.
        let info = task.info();
        let (lines, seen) = task.log_since(seen);
        let ended = info.state.is_final();
        let mut events: Vec<TaskEvent> = lines.into_iter().map(|line| TaskEvent::Log { line }).collect();
        let update = TaskEvent::Update { task: Box::new(info) };
        if first {
            events.insert(0, update)
        } else {
            events.push(update)
        }
        Some((events, (!ended).then_some((task, changes, seen, false))))
    });
    use futures_util::StreamExt;
    batches.flat_map(|events| {
        futures_util::stream::iter(
            events.into_iter().filter_map(|event| Event::default().json_data(event).ok()).map(Ok),
        )
    })
}
