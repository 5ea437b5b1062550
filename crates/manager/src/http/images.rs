//! Images: list, build, verify, remove.

use std::sync::Arc;

use axum::{
    extract::{Path, Query, State, rejection::QueryRejection},
    http::StatusCode,
};
use clan_api::{ImageGc, ImageGcQuery, ImageInfo, TaskInfo};

use super::{
    problems::{Answer, Json},
    vms::understood,
};
use crate::{images, manager::Shared};

pub(super) async fn list(State(shared): State<Arc<Shared>>) -> Answer<Json<Vec<ImageInfo>>> {
    Ok(Json(StatusCode::OK, images::list(&shared).await?))
}

pub(super) async fn build(State(shared): State<Arc<Shared>>) -> Json<TaskInfo> {
    Json(StatusCode::ACCEPTED, images::build_task(&shared).info())
}

pub(super) async fn verify(State(shared): State<Arc<Shared>>, Path(image): Path<String>) -> Answer<Json<TaskInfo>> {
    Ok(Json(StatusCode::ACCEPTED, images::verify_task(&shared, &image)?.info()))
}

pub(super) async fn gc(
    State(shared): State<Arc<Shared>>,
    query: Result<Query<ImageGcQuery>, QueryRejection>,
) -> Answer<Json<ImageGc>> {
    let query = understood(query)?;
    Ok(Json(StatusCode::OK, images::gc(&shared, query.dry_run).await?))
}
