//! A running relay: one port, over TCP for packets (a TLS connection that is upgraded to a WebSocket, as web pages do) and
//! over UDP for telling machines the address that others see them at.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use clan_relay::words;
use hyper::{Request, body::Incoming, header, service::Service};
use iroh_relay::{
    KeyCache,
    http::RELAY_PROBE_PATH,
    server::{
        Metrics, QuicConfig, Server as Discovery, ServerConfig,
        http_server::{BytesBody, Handlers, RelayService, RelayServiceWithNotify},
        streams::MaybeTlsStream,
    },
};
use rustix::net::Shutdown;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::Notify,
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    access::Door,
    certificate::Certificate,
    lobby::{Lobby, TooMany},
};
use crate::core::CoreHandle;

/// How long a connection may take until its other end has said who it is.
const GREETING: Duration = Duration::from_secs(10);
/// Connections on their way to there, from everywhere and from one address (of IPv6: one /64). One newcomer without UDP, who
/// measures the way here again and again, was seen to make more than sixteen within the time of a greeting.
const MAX_GREETING: usize = 256;
const MAX_GREETING_EACH: usize = 64;
/// How often it is looked whether those inside may stay, beside when the ledger changes.
const REVIEW: Duration = Duration::from_secs(30);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const BACKLOG: u32 = 128;

/// A running relay.
pub(crate) struct Server {
    service: RelayService,
    discovery: Discovery,
    cancel: CancellationToken,
    task: JoinHandle<()>,
}

/// Why a relay cannot start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("the certificate is not usable: {0}")]
    Certificate(#[from] rustls::Error),
    #[error("TCP: {0}")]
    Tcp(#[source] io::Error),
    #[error("UDP: {0}")]
    Udp(String),
}

impl Server {
    /// Listens on all addresses.
    pub(crate) async fn start(
        port: u16,
        certificate: &Certificate,
        lobby: Arc<Lobby>,
        core: CoreHandle,
    ) -> Result<Self, StartError> {
        let tls = certificate.tls()?;
        let (listener, address) = listen(port).map_err(StartError::Tcp)?;
        let mut config = ServerConfig::default();
        let mut quic = QuicConfig::new(address);
        quic.server_config = Some(tls.clone());
        config.quic = Some(quic);
        let discovery = Discovery::spawn(config).await.map_err(|e| StartError::Udp(format!("{e:#}")))?;

        let door = Arc::new(Door::new(core.clone(), lobby.clone()));
        let mut handlers = Handlers::default();
        // Where UDP is blocked, machines measure their way here by this.
        handlers.insert(
            (hyper::Method::GET, RELAY_PROBE_PATH),
            Box::new(|_, response| {
                let nothing: BytesBody = Box::new(http_body_util::Empty::new());
                Ok(response.header(header::CONNECTION, "close").body(nothing)?)
            }),
        );
        let asked = core.clone();
        handlers.insert(
            (hyper::Method::GET, words::PATH),
            Box::new(move |request, response| {
                let found = words::channel_in(request.uri().query()).map(|channel| lobby.find(channel, &asked.view()));
                let (status, text) = match found {
                    Some(Ok(machines)) => (hyper::StatusCode::OK, words::answer(&machines)),
                    Some(Err(TooMany)) => (hyper::StatusCode::TOO_MANY_REQUESTS, String::new()),
                    None => (hyper::StatusCode::BAD_REQUEST, String::new()),
                };
                let body: BytesBody = Box::new(http_body_util::Full::from(text));
                Ok(response.status(status).header(header::CONNECTION, "close").body(body)?)
            }),
        );
        let service = RelayService::new(
            handlers,
            Default::default(),
            None,
            KeyCache::new(1024),
            door.clone(),
            Arc::new(Metrics::default()),
        );
        let cancel = CancellationToken::new();
        let serving = run(listener, TlsAcceptor::from(Arc::new(tls)), service.clone(), door, core, cancel.clone());
        Ok(Self { service, discovery, cancel, task: tokio::spawn(serving) })
    }

    /// Closes the port and every connection.
    pub(crate) async fn stop(self) {
        self.cancel.cancel();
        let _ = self.task.await;
        self.service.shutdown().await;
        if let Err(error) = self.discovery.shutdown().await {
            tracing::debug!(%error, "address discovery did not end well");
        }
    }
}

/// For IPv6 and IPv4 alike; for IPv4 alone where there is no IPv6.
fn listen(port: u16) -> io::Result<(TcpListener, SocketAddr)> {
    let all = [SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)), SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))];
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in all {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
        let bound = socket.and_then(|socket| {
            socket.set_reuseaddr(true)?;
            socket.bind(address)?;
            socket.listen(BACKLOG)
        });
        match bound {
            Ok(listener) => return Ok((listener, address)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Err(error),
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn run(
    listener: TcpListener,
    tls: TlsAcceptor,
    service: RelayService,
    door: Arc<Door>,
    core: CoreHandle,
    cancel: CancellationToken,
) {
    let greeting = Arc::new(Greeting::default());
    let connections = TaskTracker::new();
    let mut review = tokio::time::interval(REVIEW);
    let mut views = core.watch();
    loop {
        let accepted = tokio::select! {
            () = cancel.cancelled() => break,
            _ = review.tick() => {
                door.review(service.clients());
                continue;
            }
            changed = views.changed() => {
                if changed.is_err() {
                    break;
                }
                door.review(service.clients());
                continue;
            }
            accepted = listener.accept() => accepted,
        };
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "the relay cannot accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // INVARIANT: strangers hold no more than their share; who is refused is not queued.
        let Some(place) = greeting.enter(from.ip()) else { continue };
        let (service, tls, cancel) = (service.clone(), tls.clone(), cancel.clone());
        connections.spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = greet(stream, tls, service) => {}
            }
            drop(place);
        });
    }
    connections.close();
    connections.wait().await;
}

/// Brings a connection to where its other end has proved who it is and may be here, or ends it.
async fn greet(stream: TcpStream, tls: TlsAcceptor, service: RelayService) {
    // The service lets an upgraded connection take its time to prove anything, so the way to end it is kept.
    let Ok(handle) = stream.as_fd().try_clone_to_owned() else { return };
    let _ = stream.set_nodelay(true);
    let established = Arc::new(Notify::new());
    let mut waiting = Box::pin(established.notified());
    waiting.as_mut().enable();
    let greeted = timeout(GREETING, async {
        let stream = tls.accept(stream).await.ok()?;
        let io = hyper_util::rt::TokioIo::new(MaybeTlsStream::Tls(stream));
        let upgrade = Arc::new(AtomicBool::new(false));
        let service =
            Watched { service: RelayServiceWithNotify::new(service, established.clone()), upgrade: upgrade.clone() };
        hyper::server::conn::http1::Builder::new().serve_connection(io, service).with_upgrades().await.ok()?;
        if upgrade.load(Ordering::Relaxed) {
            waiting.await;
        }
        Some(())
    });
    if !matches!(greeted.await, Ok(Some(()))) {
        let _ = rustix::net::shutdown(&handle, Shutdown::Both);
    }
}

/// The relay's service, which remembers whether an upgrade was asked for: of a mere question nothing stays to be waited for.
struct Watched {
    service: RelayServiceWithNotify,
    upgrade: Arc<AtomicBool>,
}

impl Service<Request<Incoming>> for Watched {
    type Response = <RelayServiceWithNotify as Service<Request<Incoming>>>::Response;
    type Error = <RelayServiceWithNotify as Service<Request<Incoming>>>::Error;
    type Future = <RelayServiceWithNotify as Service<Request<Incoming>>>::Future;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        if request.headers().contains_key(header::UPGRADE) {
            self.upgrade.store(true, Ordering::Relaxed);
        }
        self.service.call(request)
    }
}

/// Connections whose other ends have not said yet who they are.
#[derive(Default)]
struct Greeting(Mutex<BTreeMap<IpAddr, usize>>);

struct Entered {
    greeting: Arc<Greeting>,
    from: IpAddr,
}

impl Greeting {
    fn enter(self: &Arc<Self>, from: IpAddr) -> Option<Entered> {
        let from = neighbourhood(from);
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (total, here) = (all.values().sum::<usize>(), all.get(&from).copied().unwrap_or_default());
        if total >= MAX_GREETING || here >= MAX_GREETING_EACH {
            return None;
        }
        all.insert(from, here + 1);
        Some(Entered { greeting: self.clone(), from })
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut all = self.greeting.0.lock().unwrap_or_else(PoisonError::into_inner);
        match all.get_mut(&self.from) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(all.remove(&self.from)),
        }
    }
}

fn neighbourhood(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX))),
        ip => ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_takes_all_the_room() {
        let greeting = Arc::new(Greeting::default());
        let from = |n: u8| IpAddr::from([192, 0, 2, n]);
        let mut held: Vec<_> = (0..MAX_GREETING_EACH).map(|_| greeting.enter(from(1)).unwrap()).collect();
        assert!(greeting.enter(from(1)).is_none());
        assert!(greeting.enter("::ffff:192.0.2.1".parse().unwrap()).is_none(), "the same in other clothes");
        held.extend(
            (2..=4).flat_map(|n| std::iter::repeat_n(n, MAX_GREETING_EACH)).map(|n| greeting.enter(from(n)).unwrap()),
        );
        assert!(greeting.enter(from(99)).is_none());
        held.pop();
        assert!(greeting.enter(from(99)).is_some());
        held.clear();
        assert!(greeting.0.lock().unwrap().is_empty());
    }

    #[test]
    fn an_ipv6_network_counts_once() {
        let of = |text: &str| neighbourhood(text.parse().unwrap());
        assert_eq!(of("2001:db8:1:2:3::4"), of("2001:db8:1:2:9::9"));
        assert_ne!(of("2001:db8:1:2::"), of("2001:db8:1:3::"));
    }
}
