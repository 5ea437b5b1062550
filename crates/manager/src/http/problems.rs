//! Answers and refusals in JSON.

use axum::{
    body::Body,
    http::{HeaderValue, Response, StatusCode, header},
    response::IntoResponse,
};
use clan_api::{ApiProblem, ErrorCode, PROBLEM_TYPE};
use serde::{Serialize, de::DeserializeOwned};

/// A problem as an answer.
#[derive(Debug)]
pub(super) struct Refusal(pub(super) ApiProblem);

/// What a handler gives.
pub(super) type Answer<T> = Result<T, Refusal>;

/// A status and a value in JSON.
pub(super) struct Json<T>(pub(super) StatusCode, pub(super) T);

impl From<ApiProblem> for Refusal {
    fn from(problem: ApiProblem) -> Self {
        Self(problem)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response<Body> {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        with_type(status, &self.0, PROBLEM_TYPE)
    }
}

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response<Body> {
        with_type(self.0, &self.1, "application/json")
    }
}

fn with_type<T: Serialize>(status: StatusCode, value: &T, media_type: &'static str) -> Response<Body> {
    let (status, body) = match serde_json::to_vec(value) {
        Ok(body) => (status, body),
        Err(error) => {
            tracing::error!(%error, "an answer could not be written");
            (StatusCode::INTERNAL_SERVER_ERROR, Vec::new())
        }
    };
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// The value in a request's body.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiProblem> {
    // A request without a body asks for the defaults.
    let body = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(body)
        .map_err(|e| ApiProblem::new(ErrorCode::BadRequest, "the request is not understood").why(e.to_string()))
}
