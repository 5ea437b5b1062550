//! Relays.

use std::sync::Arc;

use axum::{
    body::Bytes,
    extract::{Path, State},
    http::StatusCode,
};
use clan_api::{RelayChange, RelayInfo, SetRelay};

use super::problems::{Answer, Json, parse};
use crate::{manager::Shared, relay};

pub(super) async fn list(State(shared): State<Arc<Shared>>, Path(clan): Path<String>) -> Answer<Json<Vec<RelayInfo>>> {
    Ok(Json(StatusCode::OK, relay::list(&*shared.find(&clan)?).await?))
}

pub(super) async fn set(
    State(shared): State<Arc<Shared>>,
    Path(clan): Path<String>,
    body: Bytes,
) -> Answer<Json<RelayChange>> {
    let request: SetRelay = parse(&body)?;
    Ok(Json(StatusCode::OK, relay::set(&*shared.find(&clan)?, &request).await?))
}
