mod helm;

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf, Bytes};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};

use crate::{
    AddDevice, AddWireguard, AdmissionDecision, ApiProblem, BASE, CONSOLE_UPGRADE, ClanInfo, ClanLog, ClanLogQuery,
    CreateClan, CreateInvite, CreatedClan, DecideAdmission, DeleteQuery, DeviceInfo, DeviceOffer, FindInvitation,
    FindRecovery, FoundInvitation, GroupInfo, ImageGc, ImageInfo, Invite, InviteInfo, JoinClan, JoinPreview, LogQuery,
    LogSource, Login, MachineInfo, MakeLogin, MakeSnapshot, OpenedService, PersonInfo, Pong, PreviewJoin, Publication,
    PublishImage, RelayChange, RelayInfo, RemoveDeviceQuery, RemoveNamed, RemovedDevice, Rename, Renamed, ResizeVm,
    Revocation, Revoke, RoleChange, RuleInfo, ServiceInfo, SetGroup, SetRelay, SetRole, SetRule, SnapshotInfo, Status,
    TaskEvent, TaskId, TaskInfo, UpdateVm, VmInfo, VmSize, VmStats, WireguardMachine,
};

/// Largest answer that is read into memory.
const MAX_ANSWER: usize = 64 << 20;
/// Longest line of an event stream.
const MAX_LINE: usize = 4 << 20;

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

    /// Founds a clan.
    pub async fn create_clan(&self, request: &CreateClan) -> Result<CreatedClan, ClientError> {
        self.post("/clans", request).await
    }

    /// The link in a pasted text, or the one that four words stand for, which may take as long as a search of the LAN or at a relay.
    pub async fn find_invitation(&self, request: &FindInvitation) -> Result<FoundInvitation, ClientError> {
        self.post("/joins/invitation", request).await
    }

    /// A device link for this computer, by right of a recovery phrase.
    pub async fn find_recovery(&self, request: &FindRecovery) -> Result<FoundInvitation, ClientError> {
        self.post("/joins/recovery", request).await
    }

    /// The devices of this person.
    pub async fn devices(&self, clan: &str) -> Result<Vec<DeviceInfo>, ClientError> {
        self.get(&format!("/clans/{}/devices", segment(clan))).await
    }

    /// A link for another device, or a new recovery phrase.
    pub async fn add_device(&self, clan: &str, request: &AddDevice) -> Result<DeviceOffer, ClientError> {
        self.post(&format!("/clans/{}/devices", segment(clan)), request).await
    }

    /// Puts a device out, by its name or the beginning of its id.
    pub async fn remove_device(
        &self,
        clan: &str,
        device: &str,
        query: RemoveDeviceQuery,
    ) -> Result<RemovedDevice, ClientError> {
        let path = format!("/clans/{}/devices/{}?dry_run={}", segment(clan), segment(device), query.dry_run);
        self.call(Method::DELETE, &path, None).await
    }

    /// What a link leads to. Asks machines of the clan, and may take as long as they do.
    pub async fn preview_join(&self, request: &PreviewJoin) -> Result<JoinPreview, ClientError> {
        self.post("/joins/preview", request).await
    }

    /// Joins a clan.
    pub async fn join(&self, request: &JoinClan) -> Result<TaskInfo, ClientError> {
        self.post("/joins", request).await
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
        Ok(EventStream { body: ByteStream { body }, buffer: Vec::new(), ready: VecDeque::new() })
    }

    /// Cancels a task. What it did so far is undone.
    pub async fn cancel_task(&self, id: TaskId) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/tasks/{id}/cancel"), &serde_json::json!({})).await
    }

    /// The clans that this computer is in.
    pub async fn clans(&self) -> Result<Vec<ClanInfo>, ClientError> {
        self.get("/clans").await
    }

    /// Makes an invite. `clan` is a name, an id or a unique beginning of an id, here as in the following.
    pub async fn invite(&self, clan: &str, request: &CreateInvite) -> Result<Invite, ClientError> {
        self.post(&format!("/clans/{}/invites", segment(clan)), request).await
    }

    /// The invites that were made in a clan, oldest first.
    pub async fn invites(&self, clan: &str) -> Result<Vec<InviteInfo>, ClientError> {
        self.get(&format!("/clans/{}/invites", segment(clan))).await
    }

    /// Puts a person or a machine out, or withdraws an invite.
    pub async fn revoke(&self, clan: &str, request: &Revoke) -> Result<Revocation, ClientError> {
        self.post(&format!("/clans/{}/revocations", segment(clan)), request).await
    }

    /// The relays of a clan.
    pub async fn relays(&self, clan: &str) -> Result<Vec<RelayInfo>, ClientError> {
        self.get(&format!("/clans/{}/relays", segment(clan))).await
    }

    /// Makes a machine a relay, or makes it one no more.
    pub async fn set_relay(&self, clan: &str, request: &SetRelay) -> Result<RelayChange, ClientError> {
        self.post(&format!("/clans/{}/relays", segment(clan)), request).await
    }

    /// Admits a standard WireGuard machine, and says what it has to be told.
    pub async fn add_wireguard(&self, clan: &str, request: &AddWireguard) -> Result<WireguardMachine, ClientError> {
        self.post(&format!("/clans/{}/wireguard", segment(clan)), request).await
    }

    /// Takes a standard WireGuard machine out.
    pub async fn remove_wireguard(&self, clan: &str, request: &RemoveNamed) -> Result<RemoveNamed, ClientError> {
        self.post(&format!("/clans/{}/wireguard/removals", segment(clan)), request).await
    }

    /// The access rules in force.
    pub async fn rules(&self, clan: &str) -> Result<Vec<RuleInfo>, ClientError> {
        self.get(&format!("/clans/{}/rules", segment(clan))).await
    }

    /// Makes or replaces an access rule.
    pub async fn set_rule(&self, clan: &str, request: &SetRule) -> Result<RuleInfo, ClientError> {
        self.post(&format!("/clans/{}/rules", segment(clan)), request).await
    }

    /// Takes an access rule away.
    pub async fn drop_rule(&self, clan: &str, request: &RemoveNamed) -> Result<RemoveNamed, ClientError> {
        self.post(&format!("/clans/{}/rules/removals", segment(clan)), request).await
    }

    /// The groups.
    pub async fn groups(&self, clan: &str) -> Result<Vec<GroupInfo>, ClientError> {
        self.get(&format!("/clans/{}/groups", segment(clan))).await
    }

    /// Makes a group, or replaces its members.
    pub async fn set_group(&self, clan: &str, request: &SetGroup) -> Result<GroupInfo, ClientError> {
        self.post(&format!("/clans/{}/groups", segment(clan)), request).await
    }

    /// Takes a group away.
    pub async fn drop_group(&self, clan: &str, request: &RemoveNamed) -> Result<RemoveNamed, ClientError> {
        self.post(&format!("/clans/{}/groups/removals", segment(clan)), request).await
    }

    /// Gives a person another role, or finds out whether that would work.
    pub async fn set_role(&self, clan: &str, request: &SetRole) -> Result<RoleChange, ClientError> {
        self.post(&format!("/clans/{}/roles", segment(clan)), request).await
    }

    /// Gives a person or a machine another name, or finds out whether that would work.
    pub async fn rename(&self, clan: &str, request: &Rename) -> Result<Renamed, ClientError> {
        self.post(&format!("/clans/{}/names", segment(clan)), request).await
    }

    /// Lets a newcomer in who waits for it or refuses them, or finds out whether that would work.
    pub async fn decide_admission(
        &self,
        clan: &str,
        request: &DecideAdmission,
    ) -> Result<AdmissionDecision, ClientError> {
        self.post(&format!("/clans/{}/admissions", segment(clan)), request).await
    }

    /// What was decided in a clan.
    pub async fn clan_log(&self, clan: &str, query: ClanLogQuery) -> Result<ClanLog, ClientError> {
        self.get(&format!("/clans/{}/log?limit={}", segment(clan), query.limit)).await
    }

    /// The people of a clan.
    pub async fn members(&self, clan: &str) -> Result<Vec<PersonInfo>, ClientError> {
        self.get(&format!("/clans/{}/members", segment(clan))).await
    }

    /// Sends one echo to a machine, named, over the clan's network.
    pub async fn ping(&self, clan: &str, machine: &str) -> Result<Pong, ClientError> {
        let path = format!("/clans/{}/machines/{}/ping", segment(clan), segment(machine));
        self.call(Method::POST, &path, None).await
    }

    /// The machines of a clan.
    pub async fn machines(&self, clan: &str) -> Result<Vec<MachineInfo>, ClientError> {
        self.get(&format!("/clans/{}/machines", segment(clan))).await
    }

    /// The services of a clan.
    pub async fn services(&self, clan: &str) -> Result<Vec<ServiceInfo>, ClientError> {
        self.get(&format!("/clans/{}/services", segment(clan))).await
    }

    /// Leaves a clan.
    pub async fn leave(&self, clan: &str) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/clans/{}/leave", segment(clan)), &serde_json::json!({})).await
    }

    /// A URL that opens a service in a browser.
    pub async fn open_service(&self, clan: &str, service: &str) -> Result<OpenedService, ClientError> {
        self.post(&format!("/clans/{}/services/{}/open", segment(clan), segment(service)), &serde_json::json!({})).await
    }

    /// The VMs on this computer.
    pub async fn vms(&self) -> Result<Vec<VmInfo>, ClientError> {
        self.get("/vms").await
    }

    /// Starts a VM. `vm` is the name or id of its clan, here as in the following.
    pub async fn start_vm(&self, vm: &str) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/vms/{}/start", segment(vm)), &serde_json::json!({})).await
    }

    /// Stops a VM in good order.
    pub async fn stop_vm(&self, vm: &str) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/vms/{}/stop", segment(vm)), &serde_json::json!({})).await
    }

    /// Halts a VM's processors.
    pub async fn pause_vm(&self, vm: &str) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/vms/{}/pause", segment(vm)), &serde_json::json!({})).await
    }

    /// Lets a paused VM go on.
    pub async fn resume_vm(&self, vm: &str) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/vms/{}/resume", segment(vm)), &serde_json::json!({})).await
    }

    /// Stops a VM in good order and starts it again.
    pub async fn restart_vm(&self, vm: &str) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/vms/{}/restart", segment(vm)), &serde_json::json!({})).await
    }

    /// Gives a VM another image.
    pub async fn update_vm(&self, vm: &str, request: &UpdateVm) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/vms/{}/update", segment(vm)), request).await
    }

    /// Gives a VM another size, or finds out what it would be.
    pub async fn resize_vm(&self, vm: &str, request: &ResizeVm) -> Result<VmSize, ClientError> {
        self.post(&format!("/vms/{}/size", segment(vm)), request).await
    }

    /// The snapshots of a VM's disk.
    pub async fn snapshots(&self, vm: &str) -> Result<Vec<SnapshotInfo>, ClientError> {
        self.get(&format!("/vms/{}/snapshots", segment(vm))).await
    }

    /// Makes a snapshot of a VM's disk.
    pub async fn make_snapshot(&self, vm: &str, request: &MakeSnapshot) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/vms/{}/snapshots", segment(vm)), request).await
    }

    /// Puts a snapshot in the place of a VM's disk.
    pub async fn restore_snapshot(&self, vm: &str, name: &str) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/vms/{}/snapshots/{}/restore", segment(vm), segment(name)), &serde_json::json!({})).await
    }

    /// Removes a snapshot.
    pub async fn discard_snapshot(&self, vm: &str, name: &str) -> Result<TaskInfo, ClientError> {
        self.call(Method::DELETE, &format!("/vms/{}/snapshots/{}", segment(vm), segment(name)), None).await
    }

    /// Deletes a VM and its disk.
    pub async fn delete_vm(&self, vm: &str, query: DeleteQuery) -> Result<TaskInfo, ClientError> {
        self.call(Method::DELETE, &format!("/vms/{}?force={}", segment(vm), query.force), None).await
    }

    /// A VM's log lines, as text.
    pub async fn vm_logs(&self, vm: &str, query: LogQuery) -> Result<ByteStream, ClientError> {
        let source = match query.source {
            LogSource::Journal => "journal",
            LogSource::Console => "console",
        };
        let path = format!("/vms/{}/logs?lines={}&follow={}&source={source}", segment(vm), query.lines, query.follow);
        Ok(ByteStream { body: self.send(Method::GET, &path, None).await?.into_body() })
    }

    /// A VM's statistics.
    pub async fn vm_stats(&self, vm: &str) -> Result<VmStats, ClientError> {
        self.get(&format!("/vms/{}/stats", segment(vm))).await
    }

    /// A VM's console: raw bytes both ways.
    pub async fn vm_console(&self, vm: &str) -> Result<Console, ClientError> {
        self.upgrade(&format!("/vms/{}/console", segment(vm)), CONSOLE_UPGRADE).await
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
        Ok(Console { io: TokioIo::new(upgraded) })
    }

    /// The images on this computer.
    pub async fn images(&self) -> Result<Vec<ImageInfo>, ClientError> {
        self.get("/images").await
    }

    /// Builds the image that a clan founded now would run.
    pub async fn build_image(&self) -> Result<TaskInfo, ClientError> {
        self.post("/images", &serde_json::json!({})).await
    }

    /// Compares an image with its name, which is an id or a unique beginning of one.
    pub async fn verify_image(&self, image: &str) -> Result<TaskInfo, ClientError> {
        self.post(&format!("/images/{}/verify", segment(image)), &serde_json::json!({})).await
    }

    /// Makes an image what newcomers to a clan run, or finds out what would change.
    pub async fn publish_image(&self, clan: &str, request: &PublishImage) -> Result<Publication, ClientError> {
        self.post(&format!("/clans/{}/image", segment(clan)), request).await
    }

    /// Removes the images that no VM here runs, or finds out which.
    pub async fn gc_images(&self, dry_run: bool) -> Result<ImageGc, ClientError> {
        self.call(Method::DELETE, &format!("/images?dry_run={dry_run}"), None).await
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

/// Bytes of an answer, as they arrive.
#[derive(Debug)]
pub struct ByteStream {
    body: Incoming,
}

impl ByteStream {
    /// The next bytes; `None` at the end.
    pub async fn next(&mut self) -> Option<Result<Bytes, ClientError>> {
        loop {
            match self.body.frame().await? {
                Ok(frame) => match frame.into_data() {
                    Ok(data) => return Some(Ok(data)),
                    Err(_trailers) => {}
                },
                Err(error) => return Some(Err(protocol(error))),
            }
        }
    }
}

/// A task's events, as they arrive.
#[derive(Debug)]
pub struct EventStream {
    body: ByteStream,
    buffer: Vec<u8>,
    ready: VecDeque<TaskEvent>,
}

impl EventStream {
    /// The next event; `None` after the one that tells of the task's end.
    pub async fn next(&mut self) -> Option<Result<TaskEvent, ClientError>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            match self.body.next().await? {
                Ok(bytes) => {
                    self.buffer.extend_from_slice(bytes.chunk());
                    if let Err(error) = self.take_lines() {
                        return Some(Err(error));
                    }
                }
                Err(error) => return Some(Err(error)),
            }
        }
    }

    /// Server-sent events: only `data:` lines matter here, each holds one event whole.
    fn take_lines(&mut self) -> Result<(), ClientError> {
        while let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = self.buffer.drain(..=end).collect();
            if let Some(data) = line.strip_prefix(b"data:") {
                self.ready.push_back(serde_json::from_slice(data).map_err(protocol)?);
            }
        }
        if self.buffer.len() > MAX_LINE { Err(protocol("an event without end")) } else { Ok(()) }
    }
}

/// A connection that was turned into something else, such as a VM's console: raw bytes both ways.
#[derive(Debug)]
pub struct Console {
    io: TokioIo<hyper::upgrade::Upgraded>,
}

impl AsyncRead for Console {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Console {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixListener,
    };

    use super::*;
    use crate::ErrorCode;

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
        let question = PreviewJoin { link: "clan://join/x".into(), integrate: None, container: false };
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
