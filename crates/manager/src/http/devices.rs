//! A person's devices.

use std::sync::Arc;

use axum::{
    body::Bytes,
    extract::{Path, Query, State},
    http::StatusCode,
};
use clan_api::{AddDevice, DeviceInfo, DeviceOffer, FindRecovery, FoundInvitation, RemoveDeviceQuery, RemovedDevice};

use super::problems::{Answer, Json, parse};
use crate::{devices, manager::Shared, recover};

pub(super) async fn list(State(shared): State<Arc<Shared>>, Path(clan): Path<String>) -> Answer<Json<Vec<DeviceInfo>>> {
    Ok(Json(StatusCode::OK, devices::list(&*shared.find(&clan)?).await?))
}

pub(super) async fn add(
    State(shared): State<Arc<Shared>>,
    Path(clan): Path<String>,
    body: Bytes,
) -> Answer<Json<DeviceOffer>> {
    let request: AddDevice = parse(&body)?;
    let clan = shared.find(&clan)?;
    Ok(Json(StatusCode::CREATED, devices::add(&shared, clan, &request).await?))
}

pub(super) async fn remove(
    State(shared): State<Arc<Shared>>,
    Path((clan, device)): Path<(String, String)>,
    Query(query): Query<RemoveDeviceQuery>,
) -> Answer<Json<RemovedDevice>> {
    let clan = shared.find(&clan)?;
    Ok(Json(StatusCode::OK, devices::remove(&clan, &device, query.dry_run).await?))
}

pub(super) async fn recovery(body: Bytes) -> Answer<Json<FoundInvitation>> {
    let request: FindRecovery = parse(&body)?;
    Ok(Json(StatusCode::OK, FoundInvitation { link: recover::find(&request).await?.to_string() }))
}
