//! Clans, joining them, inviting to them.

use std::sync::Arc;

use axum::{
    body::Bytes,
    extract::{Path, State},
    http::StatusCode,
};
use clan_api::{
    ApiProblem, ClanInfo, CreateClan, CreateInvite, CreatedClan, ErrorCode, FindInvitation, FoundInvitation, Invite,
    JoinClan, JoinPreview, MachineInfo, OpenedService, PersonInfo, Pong, PreviewJoin, ServiceInfo, Status, TaskInfo,
};
use clan_types::{ServiceName, service_url_host};
use clan_wire::beacon::ServiceKind;

use super::{
    auth::OPEN,
    problems::{Answer, Json, parse},
};
use crate::{
    create, invite as invites, join as joins, leave as leaves, manager::Shared, problem, status as states, words,
};

pub(super) async fn status(State(shared): State<Arc<Shared>>) -> Json<Status> {
    Json(StatusCode::OK, states::status(&shared).await)
}

pub(super) async fn list(State(shared): State<Arc<Shared>>) -> Json<Vec<ClanInfo>> {
    Json(StatusCode::OK, states::clans(&shared).await)
}

pub(super) async fn create(State(shared): State<Arc<Shared>>, body: Bytes) -> Answer<Json<CreatedClan>> {
    let request: CreateClan = parse(&body)?;
    let (task, phrase) = create::begin(&shared, request).await?;
    let recovery_phrase = phrase.map(|phrase| phrase.words());
    Ok(Json(StatusCode::ACCEPTED, CreatedClan { task: task.info(), recovery_phrase }))
}

pub(super) async fn invitation(body: Bytes) -> Answer<Json<FoundInvitation>> {
    let request: FindInvitation = parse(&body)?;
    Ok(Json(
        StatusCode::OK,
        FoundInvitation { link: words::find(&request.text, request.relay.as_deref()).await?.to_string() },
    ))
}

pub(super) async fn preview(State(shared): State<Arc<Shared>>, body: Bytes) -> Answer<Json<JoinPreview>> {
    let request: PreviewJoin = parse(&body)?;
    Ok(Json(StatusCode::OK, joins::preview(&shared, &request).await?))
}

pub(super) async fn join(State(shared): State<Arc<Shared>>, body: Bytes) -> Answer<Json<TaskInfo>> {
    let request: JoinClan = parse(&body)?;
    Ok(Json(StatusCode::ACCEPTED, joins::begin(&shared, request).await?.info()))
}

pub(super) async fn invite(
    State(shared): State<Arc<Shared>>,
    Path(clan): Path<String>,
    body: Bytes,
) -> Answer<Json<Invite>> {
    let request: CreateInvite = parse(&body)?;
    let clan = shared.find(&clan)?;
    Ok(Json(StatusCode::CREATED, invites::make(&shared, &clan, &request).await?))
}

pub(super) async fn members(
    State(shared): State<Arc<Shared>>,
    Path(clan): Path<String>,
) -> Answer<Json<Vec<PersonInfo>>> {
    Ok(Json(StatusCode::OK, states::clan_info(&*shared.find(&clan)?).await.people))
}

pub(super) async fn machines(
    State(shared): State<Arc<Shared>>,
    Path(clan): Path<String>,
) -> Answer<Json<Vec<MachineInfo>>> {
    Ok(Json(StatusCode::OK, states::clan_info(&*shared.find(&clan)?).await.machines))
}

pub(super) async fn ping(
    State(shared): State<Arc<Shared>>,
    Path((clan, machine)): Path<(String, String)>,
) -> Answer<Json<Pong>> {
    Ok(Json(StatusCode::OK, states::ping(&*shared.find(&clan)?, &machine).await?))
}

pub(super) async fn services(
    State(shared): State<Arc<Shared>>,
    Path(clan): Path<String>,
) -> Answer<Json<Vec<ServiceInfo>>> {
    Ok(Json(StatusCode::OK, states::clan_info(&*shared.find(&clan)?).await.services))
}

pub(super) async fn leave(State(shared): State<Arc<Shared>>, Path(clan): Path<String>) -> Answer<Json<TaskInfo>> {
    let clan = shared.find(&clan)?;
    Ok(Json(StatusCode::ACCEPTED, leaves::begin(&shared, clan)?.info()))
}

pub(super) async fn open(
    State(shared): State<Arc<Shared>>,
    Path((clan, name)): Path<(String, String)>,
) -> Answer<Json<OpenedService>> {
    let clan = shared.find(&clan)?;
    let name: ServiceName = name.parse().map_err(|e| problem::name(&e))?;
    let status = clan.state().await?;
    let offers: Vec<_> = status.services.iter().filter(|s| s.name == name).collect();
    // One that works, if there is one.
    let Some(offer) = offers.iter().find(|s| s.healthy).or(offers.first()) else {
        let names: Vec<String> = status.services.iter().map(|s| s.name.to_string()).collect();
        let problem =
            ApiProblem::new(ErrorCode::NotFound, format!("nobody in the clan offers a service called `{name}`"));
        return Err(
            if names.is_empty() { problem } else { problem.hint(format!("there is: {}", names.join(", "))) }.into()
        );
    };
    if offer.kind != ServiceKind::Http {
        return Err(ApiProblem::new(
            ErrorCode::BadRequest,
            format!("`{name}` is not a web service: a browser cannot open it"),
        )
        .hint(format!("reach it from inside the clan: {name}.{}.clan port {}", clan.name(), offer.port))
        .into());
    }
    let clan_name = clan.name();
    let plain_url = format!("http://{}:{}/", service_url_host(&name, &clan_name), shared.address.port());
    let url = format!("{plain_url}?{OPEN}={}", shared.auth.new_open(&name, &clan_name));
    Ok(Json(StatusCode::CREATED, OpenedService { url, plain_url, machine: offer.machine.clone(), service: name }))
}
