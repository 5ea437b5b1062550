//! Invites that were made, putting out, and the log.

use std::sync::Arc;

use axum::{
    body::Bytes,
    extract::{Path, Query, State, rejection::QueryRejection},
    http::StatusCode,
};
use clan_api::{ClanLog, ClanLogQuery, InviteInfo, Revocation, Revoke};

use super::{
    problems::{Answer, Json, parse},
    vms::understood,
};
use crate::{audit, authority, manager::Shared};

pub(super) async fn invites(
    State(shared): State<Arc<Shared>>,
    Path(clan): Path<String>,
) -> Answer<Json<Vec<InviteInfo>>> {
    Ok(Json(StatusCode::OK, authority::invites(&*shared.find(&clan)?).await?))
}

pub(super) async fn revoke(
    State(shared): State<Arc<Shared>>,
    Path(clan): Path<String>,
    body: Bytes,
) -> Answer<Json<Revocation>> {
    let request: Revoke = parse(&body)?;
    let clan = shared.find(&clan)?;
    let revocation = authority::revoke(&clan, &request).await?;
    let status = if revocation.entries > 0 { StatusCode::CREATED } else { StatusCode::OK };
    Ok(Json(status, revocation))
}

pub(super) async fn log(
    State(shared): State<Arc<Shared>>,
    Path(clan): Path<String>,
    query: Result<Query<ClanLogQuery>, QueryRejection>,
) -> Answer<Json<ClanLog>> {
    let query = understood(query)?;
    Ok(Json(StatusCode::OK, audit::log(&*shared.find(&clan)?, query.limit).await?))
}
