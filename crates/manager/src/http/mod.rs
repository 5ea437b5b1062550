//! HTTP: one router behind two doors. The Unix socket asks for nothing but the right user; the TCP port on loopback is
//! within reach of every user and every web page, and checks host, origin and token.

pub(crate) mod auth;
mod authority;
mod clans;
mod devices;
mod helm;
mod images;
mod mesh;
mod problems;
mod proxy;
mod relays;
mod tasks;
mod vms;
mod web;

use std::{
    convert::Infallible,
    net::SocketAddr,
    os::fd::{FromRawFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{DefaultBodyLimit, State},
    http::{Method, Request, Response, StatusCode, header},
    response::IntoResponse,
    routing::{delete, get, post},
};
use bytes::Bytes;
use clan_api::{ApiProblem, ErrorCode, Login, MakeLogin};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener, UnixStream},
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt;

use crate::{
    disk::{self, DiskError},
    manager::{ManagerError, Shared},
    paths::Paths,
    tasks::now,
};
use auth::{Caller, Door};
use problems::{Answer, Json, Refusal};

const MAX_BODY: usize = 256 << 10;
/// Longest link that the desktop hands over.
const MAX_OPENED: usize = 16 << 10;
/// INVARIANT: the doors do not share their room: whoever fills the TCP port, which every user of the computer may, does
/// not keep its owner from the Unix socket.
const MAX_LOCAL: usize = 128;
const MAX_REMOTE: usize = 512;
/// How long a browser may take to send the head of a request.
const HEAD: Duration = Duration::from_secs(30);
/// How long connections get to end when the manager stops.
const GRACE: Duration = Duration::from_secs(2);
/// The first descriptor of socket activation, and how many there may be.
const FIRST_FD: i32 = 3;
const MAX_HANDED: u32 = 2;

/// The two doors.
pub(crate) struct Listeners {
    tcp: TcpListener,
    unix: UnixListener,
    address: SocketAddr,
    /// The Unix socket's file, to be removed in the end.
    own_file: Option<PathBuf>,
}

impl Listeners {
    pub(crate) fn bind(paths: &Paths, listen: SocketAddr) -> Result<Self, ManagerError> {
        let handed = activated()?;
        let tcp = match handed.tcp {
            Some(listener) => listener,
            None => bind_tcp(listen)?,
        };
        let failed = |on: String| move |source| ManagerError::Listen { on, source };
        let address = tcp.local_addr().map_err(failed("the TCP socket".into()))?;
        if !address.ip().is_loopback() {
            return Err(ManagerError::NotLoopback { addr: address });
        }
        tcp.set_nonblocking(true).map_err(failed(address.to_string()))?;
        let tcp = TcpListener::from_std(tcp).map_err(failed(address.to_string()))?;
        let path = paths.socket();
        let on = || path.display().to_string();
        if let Some(listener) = handed.unix {
            let bound = listener.local_addr().ok();
            if bound.as_ref().and_then(|bound| bound.as_pathname()) != Some(path.as_path()) {
                return Err(bad_activation(&format!("the Unix socket is not at {}", on())));
            }
            listener.set_nonblocking(true).map_err(failed(on()))?;
            // Whoever handed it in keeps the file, for the next manager.
            let unix = UnixListener::from_std(listener).map_err(failed(on()))?;
            return Ok(Self { tcp, unix, address, own_file: None });
        }
        // INVARIANT: this manager holds the directory's lock, so a socket that is there belongs to nobody.
        disk::remove_file(&path)?;
        let unix = UnixListener::bind(&path).map_err(failed(on()))?;
        clan_store::SecretFile::restrict(&path)?;
        Ok(Self { tcp, unix, address, own_file: Some(path) })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves both doors until cancelled.
    pub(crate) async fn serve(self, shared: Arc<Shared>, cancel: CancellationToken) {
        let connections = TaskTracker::new();
        let (local_room, remote_room) = (Arc::new(Semaphore::new(MAX_LOCAL)), Arc::new(Semaphore::new(MAX_REMOTE)));
        let (local, remote) = (router(shared.clone(), Door::Unix), router(shared.clone(), Door::Tcp));
        let closing = CancellationToken::new();
        loop {
            let by_unix = async {
                let permit = local_room.clone().acquire_owned().await;
                (permit, self.unix.accept().await)
            };
            let by_tcp = async {
                let permit = remote_room.clone().acquire_owned().await;
                (permit, self.tcp.accept().await)
            };
            tokio::select! {
                biased;
                () = cancel.cancelled() => break,
                (permit, accepted) = by_unix => match accepted {
                    Ok((stream, _)) if is_same_user(&stream) => {
                        let connection = serve_connection(stream, local.clone(), closing.clone());
                        connections.spawn(async move { connection.await; drop(permit); });
                    }
                    Ok(_) => tracing::warn!("another user tried to use the manager's socket"),
                    Err(error) => pause(&error).await,
                },
                (permit, accepted) = by_tcp => match accepted {
                    Ok((stream, _)) => {
                        let _ = stream.set_nodelay(true);
                        let gate = Router::new().fallback(enter).with_state(Gate { shared: shared.clone(), router: remote.clone() });
                        let connection = serve_connection(stream, gate, closing.clone());
                        connections.spawn(async move { connection.await; drop(permit); });
                    }
                    Err(error) => pause(&error).await,
                },
            }
        }
        if let Some(path) = &self.own_file {
            // A leftover would be replaced by the next manager.
            let _ = std::fs::remove_file(path);
        }
        closing.cancel();
        connections.close();
        if tokio::time::timeout(GRACE, connections.wait()).await.is_err() {
            tracing::debug!("connections were cut");
        }
    }
}

/// Out of descriptors, mostly: trying again at once would only burn time.
async fn pause(error: &std::io::Error) {
    tracing::debug!(%error, "a connection was not accepted");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

fn bind_tcp(listen: SocketAddr) -> Result<std::net::TcpListener, ManagerError> {
    if !listen.ip().is_loopback() {
        return Err(ManagerError::NotLoopback { addr: listen });
    }
    std::net::TcpListener::bind(listen).map_err(|source| match source.kind() {
        std::io::ErrorKind::AddrInUse => ManagerError::PortBusy { addr: listen },
        _ => ManagerError::Listen { on: listen.to_string(), source },
    })
}

/// What socket activation handed in.
#[derive(Default)]
struct Handed {
    tcp: Option<std::net::TcpListener>,
    unix: Option<std::os::unix::net::UnixListener>,
}

/// The listeners that socket activation hands in, if it does (sd_listen_fds(3)): one of each kind at most.
fn activated() -> Result<Handed, ManagerError> {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u32>().ok());
    let count = number("LISTEN_FDS").filter(|_| number("LISTEN_PID") == Some(std::process::id())).unwrap_or(0);
    if count > MAX_HANDED {
        return Err(bad_activation("there are more than two"));
    }
    let mut handed = Handed::default();
    for fd in (FIRST_FD..).take(count as usize) {
        // SAFETY: whoever started us says so in LISTEN_FDS, for this very process: the descriptor is open and ours.
        let listener = unsafe { OwnedFd::from_raw_fd(fd) };
        // What this process starts must not inherit it.
        rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::CLOEXEC)
            .map_err(|_| bad_activation(&format!("descriptor {fd} is not open")))?;
        if !rustix::net::sockopt::socket_acceptconn(&listener).unwrap_or(false) {
            return Err(bad_activation(&format!("descriptor {fd} is not a listening socket")));
        }
        let is_unix =
            rustix::net::sockopt::socket_domain(&listener).is_ok_and(|d| d == rustix::net::AddressFamily::UNIX);
        let taken = if is_unix {
            handed.unix.replace(listener.into()).is_some()
        } else {
            handed.tcp.replace(listener.into()).is_some()
        };
        if taken {
            return Err(bad_activation("there are two of a kind"));
        }
    }
    Ok(handed)
}

fn bad_activation(why: &str) -> ManagerError {
    ManagerError::BadActivation { why: why.to_owned() }
}

/// The socket's directory keeps others out; this is the second bolt.
fn is_same_user(stream: &UnixStream) -> bool {
    stream.peer_cred().is_ok_and(|peer| peer.uid() == rustix::process::getuid().as_raw())
}

async fn serve_connection<I: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    io: I,
    router: Router,
    closing: CancellationToken,
) {
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .serve_connection(TokioIo::new(io), TowerToHyperService::new(router))
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = closing.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout(GRACE, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection broke");
    }
}

/// What the TCP door needs.
#[derive(Clone)]
struct Gate {
    shared: Arc<Shared>,
    router: Router,
}

/// The TCP door: which site is asked for, and whether the caller may.
async fn enter(State(gate): State<Gate>, request: Request<Body>) -> Response<Body> {
    let site = auth::site(request.headers(), request.uri());
    match site {
        Ok(auth::Site::Manager) => {
            if request.method() == Method::GET && request.uri().path() == "/login" {
                return login(&gate.shared, &request);
            }
            match auth::admit(&gate.shared.auth, &request) {
                Ok(caller) => run(gate.router, request, caller).await,
                Err(problem) => Refusal(problem).into_response(),
            }
        }
        Ok(auth::Site::Service { service, clan }) => proxy::serve(&gate.shared, &service, &clan, request).await,
        Err(problem) => Refusal(problem).into_response(),
    }
}

async fn run(router: Router, mut request: Request<Body>, caller: Caller) -> Response<Body> {
    request.extensions_mut().insert(caller);
    let Ok(response) = router.oneshot(request).await.map_err(|never: Infallible| match never {});
    response
}

/// Trades a one-time token for a session.
fn login(shared: &Shared, request: &Request<Body>) -> Response<Body> {
    let token = auth::query_value(request.uri(), "token").unwrap_or_default();
    match shared.auth.take_login(&token) {
        Some((cookie, open)) => {
            // INVARIANT: what is opened, a secret perhaps, is behind the `#`: browsers send it nowhere.
            let page = open.map_or("/".to_owned(), |open| format!("/#/open/{}", escaped(&open)));
            let headers =
                [(header::SET_COOKIE, cookie), (header::LOCATION, page), (header::CACHE_CONTROL, "no-store".into())];
            (StatusCode::SEE_OTHER, headers).into_response()
        }
        None => web::message(
            StatusCode::UNAUTHORIZED,
            "This link does not work any more",
            "It works once, and for two minutes. Type `clan web` in a terminal for a new one.",
        ),
    }
}

/// A URL that opens the web page, signed in, where `open` is shown first.
pub(crate) fn login_url(shared: &Shared, open: Option<String>) -> String {
    format!("http://localhost:{}/login?token={}", shared.address.port(), shared.auth.new_login(open))
}

/// Percent-encoded (RFC 3986), all but what needs it nowhere.
fn escaped(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

fn router(shared: Arc<Shared>, door: Door) -> Router {
    let mut api = Router::new()
        .route("/status", get(clans::status))
        .route("/clans", get(clans::list).post(clans::create))
        .route("/joins/invitation", post(clans::invitation))
        .route("/joins/recovery", post(devices::recovery))
        .route("/clans/{clan}/devices", get(devices::list).post(devices::add))
        .route("/clans/{clan}/devices/{device}", delete(devices::remove))
        .route("/joins/preview", post(clans::preview))
        .route("/joins", post(clans::join))
        .route("/tasks", get(tasks::list))
        .route("/tasks/{id}", get(tasks::one))
        .route("/tasks/{id}/events", get(tasks::events))
        .route("/tasks/{id}/cancel", post(tasks::cancel))
        .route("/clans/{clan}/invites", get(authority::invites).post(clans::invite))
        .route("/clans/{clan}/revocations", post(authority::revoke))
        .route("/clans/{clan}/relays", get(relays::list).post(relays::set))
        .route("/clans/{clan}/roles", post(authority::set_role))
        .route("/clans/{clan}/names", post(authority::rename))
        .route("/clans/{clan}/admissions", post(authority::decide_admission))
        .route("/clans/{clan}/log", get(authority::log))
        .route("/clans/{clan}/wireguard", post(mesh::add_wireguard))
        .route("/clans/{clan}/wireguard/removals", post(mesh::remove_wireguard))
        .route("/clans/{clan}/rules", get(mesh::rules).post(mesh::set_rule))
        .route("/clans/{clan}/rules/removals", post(mesh::drop_rule))
        .route("/clans/{clan}/groups", get(mesh::groups).post(mesh::set_group))
        .route("/clans/{clan}/groups/removals", post(mesh::drop_group))
        .route("/clans/{clan}/members", get(clans::members))
        .route("/clans/{clan}/machines", get(clans::machines))
        .route("/clans/{clan}/machines/{machine}/ping", post(clans::ping))
        .route("/clans/{clan}/machines/{machine}/report", get(helm::report))
        .route("/clans/{clan}/machines/{machine}/log", get(helm::log))
        .route("/clans/{clan}/machines/{machine}/journal", get(helm::journal))
        .route("/clans/{clan}/machines/{machine}/settings", post(helm::change))
        .route("/clans/{clan}/machines/{machine}/reverts", post(helm::revert))
        .route("/clans/{clan}/machines/{machine}/restart", post(helm::restart))
        .route("/clans/{clan}/machines/{machine}/update", post(helm::update))
        .route("/clans/{clan}/machines/{machine}/terminal", get(helm::terminal))
        .route("/clans/{clan}/control", post(helm::suggest))
        .route("/clans/{clan}/services", get(clans::services))
        .route("/clans/{clan}/leave", post(clans::leave))
        .route("/clans/{clan}/services/{name}/open", post(clans::open))
        .route("/clans/{clan}/image", post(images::publish))
        .route("/images", get(images::list).post(images::build).delete(images::gc))
        .route("/images/{image}/verify", post(images::verify))
        .route("/vms", get(vms::list))
        .route("/vms/{vm}/start", post(vms::start))
        .route("/vms/{vm}/stop", post(vms::stop))
        .route("/vms/{vm}/pause", post(vms::pause))
        .route("/vms/{vm}/resume", post(vms::resume))
        .route("/vms/{vm}/restart", post(vms::restart))
        .route("/vms/{vm}/update", post(vms::update))
        .route("/vms/{vm}/update/preview", post(vms::preview_update))
        .route("/vms/{vm}/size", post(vms::resize))
        .route("/vms/{vm}/unlock", post(vms::unlock))
        .route("/vms/{vm}/lock", post(vms::lock))
        .route("/vms/{vm}/passphrase", post(vms::change_passphrase))
        .route("/vms/{vm}/control", post(helm::set_control))
        .route("/vms/{vm}/snapshots", get(vms::snapshots).post(vms::make_snapshot))
        .route("/vms/{vm}/snapshots/{name}/restore", post(vms::restore_snapshot))
        .route("/vms/{vm}/snapshots/{name}", delete(vms::discard_snapshot))
        .route("/vms/{vm}", delete(vms::delete))
        .route("/vms/{vm}/logs", get(vms::logs))
        .route("/vms/{vm}/console", get(vms::console))
        .route("/vms/{vm}/stats", get(vms::stats));
    if door == Door::Unix {
        api = api.route("/logins", post(make_login));
    }
    let api = api
        .fallback(|| async {
            Refusal(ApiProblem::new(ErrorCode::NotFound, "there is no such path in this API").hint("see /openapi.json"))
        })
        .method_not_allowed_fallback(|| async {
            Refusal(
                ApiProblem::new(ErrorCode::BadRequest, "this path does not take this method").hint("see /openapi.json"),
            )
        })
        .layer(DefaultBodyLimit::max(MAX_BODY));
    Router::new()
        .nest(clan_api::BASE, api)
        .route("/openapi.json", get(|| async { Json(StatusCode::OK, clan_api::openapi()) }))
        .fallback(web::asset)
        .with_state(shared)
}

async fn make_login(State(shared): State<Arc<Shared>>, body: Bytes) -> Answer<Json<Login>> {
    let MakeLogin { open } = problems::parse(&body)?;
    if open.as_ref().is_some_and(|open| open.len() > MAX_OPENED) {
        return Err(Refusal(ApiProblem::new(ErrorCode::LinkInvalid, "this is no link: it is too long")));
    }
    Ok(Json(StatusCode::CREATED, Login { url: login_url(&shared, open), expires: now().plus(auth::ONE_TIME) }))
}

/// A body that this process may stream from elsewhere.
fn streamed<S, E>(stream: S) -> Body
where
    S: futures_util::Stream<Item = Result<bytes::Bytes, E>> + Send + 'static,
    E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
{
    Body::from_stream(stream)
}

impl From<DiskError> for Refusal {
    fn from(error: DiskError) -> Self {
        Self(crate::problem::disk(&error))
    }
}
