//! Images: list, build, verify, publish, remove.

use std::sync::Arc;

use axum::{
    body::Bytes,
    extract::{Path, Query, State, rejection::QueryRejection},
    http::StatusCode,
};
use clan_api::{ImageGc, ImageGcQuery, ImageInfo, Publication, PublishImage, TaskInfo};

use super::{
    authority::created,
    problems::{Answer, Json, parse},
    vms::understood,
};
use crate::{images, manager::Shared, publish};

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

pub(super) async fn publish(
    State(shared): State<Arc<Shared>>,
    Path(clan): Path<String>,
    body: Bytes,
) -> Answer<Json<Publication>> {
    let request: PublishImage = parse(&body)?;
    let publication = publish::publish(&shared, &*shared.find(&clan)?, &request).await?;
    Ok(Json(created(publication.entries), publication))
}
