//! Invites that were made, putting out, and the log.

use std::sync::Arc;

use axum::{
    body::Bytes,
    extract::{Path, Query, State, rejection::QueryRejection},
    http::StatusCode,
};
use clan_api::{
    AdmissionDecision, ClanLog, ClanLogQuery, DecideAdmission, InviteInfo, Rename, Renamed, Revocation, Revoke,
    RoleChange, SetRole,
};

use super::{
    problems::{Answer, Json, parse},
    vms::understood,
};
use crate::{audit, authority, decisions, manager::Shared};

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
    Ok(Json(created(revocation.entries), revocation))
}

pub(super) async fn set_role(
    State(shared): State<Arc<Shared>>,
    Path(clan): Path<String>,
    body: Bytes,
) -> Answer<Json<RoleChange>> {
    let request: SetRole = parse(&body)?;
    let change = decisions::set_role(&*shared.find(&clan)?, &request).await?;
    Ok(Json(created(change.entries), change))
}

pub(super) async fn rename(
    State(shared): State<Arc<Shared>>,
    Path(clan): Path<String>,
    body: Bytes,
) -> Answer<Json<Renamed>> {
    let request: Rename = parse(&body)?;
    let renamed = decisions::rename(&*shared.find(&clan)?, &request).await?;
    Ok(Json(created(renamed.entries), renamed))
}

pub(super) async fn decide_admission(
    State(shared): State<Arc<Shared>>,
    Path(clan): Path<String>,
    body: Bytes,
) -> Answer<Json<AdmissionDecision>> {
    let request: DecideAdmission = parse(&body)?;
    let decision = decisions::decide_admission(&*shared.find(&clan)?, &request).await?;
    Ok(Json(created(decision.entries), decision))
}

pub(super) fn created(entries: u32) -> StatusCode {
    if entries > 0 { StatusCode::CREATED } else { StatusCode::OK }
}

pub(super) async fn log(
    State(shared): State<Arc<Shared>>,
    Path(clan): Path<String>,
    query: Result<Query<ClanLogQuery>, QueryRejection>,
) -> Answer<Json<ClanLog>> {
    let query = understood(query)?;
    Ok(Json(StatusCode::OK, audit::log(&*shared.find(&clan)?, query.limit).await?))
}
