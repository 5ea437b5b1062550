//! Standard WireGuard machines, access rules, groups.

use std::sync::Arc;

use axum::{
    body::Bytes,
    extract::{Path, State},
    http::StatusCode,
};
use clan_api::{AddWireguard, GroupInfo, RemoveNamed, RuleInfo, SetGroup, SetRule, WireguardMachine};

use super::problems::{Answer, Json, parse};
use crate::{manager::Shared, mesh};

type Clans = State<Arc<Shared>>;

/// 201: done; 200: what would be done.
fn status(dry_run: bool) -> StatusCode {
    if dry_run { StatusCode::OK } else { StatusCode::CREATED }
}

pub(super) async fn add_wireguard(
    State(shared): Clans,
    Path(clan): Path<String>,
    body: Bytes,
) -> Answer<Json<WireguardMachine>> {
    let request: AddWireguard = parse(&body)?;
    let clan = shared.find(&clan)?;
    Ok(Json(status(request.dry_run), mesh::add_wireguard(&clan, &request).await?))
}

pub(super) async fn remove_wireguard(
    State(shared): Clans,
    Path(clan): Path<String>,
    body: Bytes,
) -> Answer<Json<RemoveNamed>> {
    let request: RemoveNamed = parse(&body)?;
    mesh::remove_wireguard(&*shared.find(&clan)?, &request).await?;
    Ok(Json(status(request.dry_run), request))
}

pub(super) async fn rules(State(shared): Clans, Path(clan): Path<String>) -> Answer<Json<Vec<RuleInfo>>> {
    Ok(Json(StatusCode::OK, mesh::rules(&*shared.find(&clan)?).await?))
}

pub(super) async fn set_rule(State(shared): Clans, Path(clan): Path<String>, body: Bytes) -> Answer<Json<RuleInfo>> {
    let request: SetRule = parse(&body)?;
    let clan = shared.find(&clan)?;
    Ok(Json(status(request.dry_run), mesh::set_rule(&clan, &request).await?))
}

pub(super) async fn drop_rule(
    State(shared): Clans,
    Path(clan): Path<String>,
    body: Bytes,
) -> Answer<Json<RemoveNamed>> {
    let request: RemoveNamed = parse(&body)?;
    mesh::drop_rule(&*shared.find(&clan)?, &request).await?;
    Ok(Json(status(request.dry_run), request))
}

pub(super) async fn groups(State(shared): Clans, Path(clan): Path<String>) -> Answer<Json<Vec<GroupInfo>>> {
    Ok(Json(StatusCode::OK, mesh::groups(&*shared.find(&clan)?).await?))
}

pub(super) async fn set_group(State(shared): Clans, Path(clan): Path<String>, body: Bytes) -> Answer<Json<GroupInfo>> {
    let request: SetGroup = parse(&body)?;
    let clan = shared.find(&clan)?;
    Ok(Json(status(request.dry_run), mesh::set_group(&clan, &request).await?))
}

pub(super) async fn drop_group(
    State(shared): Clans,
    Path(clan): Path<String>,
    body: Bytes,
) -> Answer<Json<RemoveNamed>> {
    let request: RemoveNamed = parse(&body)?;
    mesh::drop_group(&*shared.find(&clan)?, &request).await?;
    Ok(Json(status(request.dry_run), request))
}
