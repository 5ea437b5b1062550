mod clans;
mod helm;
mod mesh;
mod streams;
mod vms;

use std::path::{Path, PathBuf};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

pub use self::streams::{ByteStream, Console, EventStream};
use crate::{ApiProblem, BASE, Login, MakeLogin, Status, TaskId, TaskInfo};

/// Largest answer that is read into memory.
const MAX_ANSWER: usize = 64 << 20;

/// Why a request got no answer, or a bad one.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No manager listens on the socket.
    #[error("the manager is not running: nothing listens on {}", path.display())]
    ManagerNotRunning {
        /// The socket.
        path: PathBuf,
    },
    /// The socket is there, but cannot be used.
    #[error("cannot connect to the manager at {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The manager says why not.
    #[error(transparent)]
    Problem(Box<ApiProblem>),
    /// The answer is none of this API's.
    #[error("unexpected answer of the manager: {what}")]
    Protocol {
        /// What was unexpected.
        what: String,
    },
}

/// Talks to the manager over its Unix socket. Cheap to clone; every request is a connection of its own.
#[derive(Debug, Clone)]
pub struct ManagerClient {
    socket: PathBuf,
}

impl ManagerClient {
    /// A client for the manager that listens on this socket: `<data>/run/manager.sock`. Connects at the first request.
    pub fn unix(path: impl Into<PathBuf>) -> Self {
        Self { socket: path.into() }
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Everything in one.
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.get("/status").await
    }

    /// Running and recent tasks, newest first.
    pub async fn tasks(&self) -> Result<Vec<TaskInfo>, ClientError> {
        self.get("/tasks").await
    }

    /// One task, with its log lines.
    pub async fn task(&self, id: TaskId) -> Result<TaskInfo, ClientError> {
        self.get(&format!("/tasks/{id}")).await
    }

    /// A task's events, from now on until it ends.
    pub async fn task_events(&self, id: TaskId) -> Result<EventStream, ClientError> {
        let body = self.send(Method::GET, &format!("/tasks/{id}/events"), None).await?.into_body();
        Ok(EventStream::new(body))
    }

    /// Cancels a task. What it did so far is undone.
    pub async fn cancel_task(&self, id: TaskId) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/tasks/{id}/cancel"), &serde_json::json!({})).await
    }

    /// Turns a connection into something else.
    async fn upgrade(&self, path: &str, token: &str) -> Result<Console, ClientError> {
        let request = Request::builder()
            .method(Method::GET)
            .uri(format!("{BASE}{path}"))
            .header(header::HOST, "localhost")
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, token)
            .body(Full::default())
            .map_err(protocol)?;
        let response = self.exchange(request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refusal(response).await);
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(protocol)?;
        Ok(Console::new(upgraded))
    }

    /// A URL that opens the web page, signed in.
    pub async fn login(&self, request: &MakeLogin) -> Result<Login, ClientError> {
        self.post("/logins", request).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, None).await
    }

    async fn post<B: Serialize, T: DeserializeOwned>(&self, path: &str, body: &B) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(protocol)?;
        self.call(Method::POST, path, Some(body)).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<T, ClientError> {
        let response = self.send(method, path, body).await?;
        let bytes = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(protocol)?.to_bytes();
        serde_json::from_slice(&bytes).map_err(protocol)
    }

    /// Sends a request; an answer other than 2xx is an error.
    async fn send(&self, method: Method, path: &str, body: Option<Vec<u8>>) -> Result<Response<Incoming>, ClientError> {
        let mut request =
            Request::builder().method(method).uri(format!("{BASE}{path}")).header(header::HOST, "localhost");
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::from(body.unwrap_or_default())).map_err(protocol)?;
        let response = self.exchange(request).await?;
        if response.status().is_success() { Ok(response) } else { Err(refusal(response).await) }
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, ClientError> {
        use std::io::ErrorKind::{ConnectionRefused, NotFound};
        let stream = UnixStream::connect(&self.socket).await.map_err(|source| match source.kind() {
            NotFound | ConnectionRefused => ClientError::ManagerNotRunning { path: self.socket.clone() },
            _ => ClientError::Connect { path: self.socket.clone(), source },
        })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(protocol)?;
        // The connection ends with the answer's body, or with the upgraded stream.
        tokio::spawn(connection.with_upgrades());
        sender.send_request(request).await.map_err(protocol)
    }
}

/// The problem that an answer other than 2xx tells.
async fn refusal(response: Response<Incoming>) -> ClientError {
    let status = response.status();
    match Limited::new(response.into_body(), MAX_ANSWER).collect().await {
        Ok(body) => match serde_json::from_slice(&body.to_bytes()) {
            Ok(problem) => ClientError::Problem(Box::new(problem)),
            Err(_) => ClientError::Protocol { what: format!("status {status} without a problem report") },
        },
        Err(error) => protocol(error),
    }
}

fn protocol(error: impl std::fmt::Display) -> ClientError {
    ClientError::Protocol { what: error.to_string() }
}

/// Percent-encodes one segment of a path.
fn segment(text: &str) -> String {
    use std::fmt::Write as _;
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'~') {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixListener,
    };

    use super::*;
    use crate::{ErrorCode, PreviewJoin, TaskEvent};

    /// A client whose manager gives one canned answer; also what the client asked.
    async fn answered(answer: &'static str) -> (ManagerClient, tokio::task::JoinHandle<String>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("manager.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = vec![0; 4096];
            let length = stream.read(&mut asked).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
            stream.shutdown().await.unwrap();
            String::from_utf8_lossy(&asked[..length]).into_owned()
        });
        (ManagerClient::unix(path), server, dir)
    }

    #[tokio::test]
    async fn no_manager_is_told_apart_from_other_failures() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("manager.sock");
        let error = ManagerClient::unix(&path).status().await.unwrap_err();
        assert!(matches!(error, ClientError::ManagerNotRunning { path: p } if p == path));
        // A socket file that a killed manager left behind.
        drop(UnixListener::bind(&path).unwrap());
        let error = ManagerClient::unix(&path).status().await.unwrap_err();
        assert!(matches!(error, ClientError::ManagerNotRunning { .. }));
    }

    #[tokio::test]
    async fn a_problem_report_becomes_a_typed_error() {
        let (client, server, _dir) = answered(concat!(
            "HTTP/1.1 410 Gone\r\ncontent-type: application/problem+json\r\nconnection: close\r\n\r\n",
            r#"{"type":"urn:clan:problem:invite_used","code":"invite_used","message":"this invite has been used already","hints":["ask for a new one"],"status":410}"#
        ))
        .await;
        let question = PreviewJoin {
            link: "clan://join/x".into(),
            integrate: None,
            container: false,
            memory: None,
            disk: None,
            cpus: None,
        };
        let Err(ClientError::Problem(problem)) = client.preview_join(&question).await else {
            panic!("a problem was expected")
        };
        assert_eq!(problem.code, ErrorCode::InviteUsed);
        assert_eq!(problem.hints, ["ask for a new one"]);
        assert!(server.await.unwrap().starts_with("POST /api/v1/joins/preview HTTP/1.1\r\n"));
    }

    #[tokio::test]
    async fn an_answer_that_is_not_ours_is_a_protocol_error() {
        let (client, _server, _dir) = answered("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n<html>").await;
        assert!(matches!(client.status().await, Err(ClientError::Protocol { .. })));
        let (client, _server, _dir) = answered("HTTP/1.1 500 Oops\r\nconnection: close\r\n\r\noops").await;
        assert!(matches!(client.status().await, Err(ClientError::Protocol { .. })));
    }

    #[tokio::test]
    async fn events_arrive_one_by_one_and_end_with_the_stream() {
        let (client, _server, _dir) = answered(concat!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n",
            "data: {\"event\":\"log\",\"line\":\"one\"}\n\n: keep-alive\n\ndata: {\"event\":\"log\",\"line\":\"two\"}\n\n"
        ))
        .await;
        let mut events = client.task_events(TaskId::from_u64(1)).await.unwrap();
        for expected in ["one", "two"] {
            assert_eq!(events.next().await.unwrap().unwrap(), TaskEvent::Log { line: expected.into() });
        }
        assert!(events.next().await.is_none());
    }

    #[tokio::test]
    async fn a_name_cannot_reach_another_path() {
        let (client, server, _dir) = answered("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n[]").await;
        client.members("../vms?x").await.unwrap();
        assert!(server.await.unwrap().starts_with("GET /api/v1/clans/%2E%2E%2Fvms%3Fx/members HTTP/1.1\r\n"));
    }
}
