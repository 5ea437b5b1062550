//! The way from the lab's internet to the package archive: an HTTP proxy whose ear is inside the lab and whose mouth is
//! outside, so that the image builder can run in a network that has no other way out.

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr},
    process::Command,
    thread,
    time::Duration,
};

use http_body_util::{Either, Full};
use hyper::{
    Method, Request, Response, StatusCode, Uri,
    body::{Bytes, Incoming},
    client::conn::http1 as client,
    header::{self, HeaderValue},
    server::conn::http1 as server,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};

use crate::{
    LabError,
    net::{INTERNET_ADDRESS, Namespace, PROXY_PORT},
};

const CONNECT_LIMIT: Duration = Duration::from_secs(15);
const HEADER_LIMIT: Duration = Duration::from_secs(30);
const HOP_BY_HOP: [header::HeaderName; 5] =
    [header::CONNECTION, header::PROXY_AUTHENTICATE, header::PROXY_AUTHORIZATION, header::TE, header::UPGRADE];

type Answer = Response<Either<Incoming, Full<Bytes>>>;

/// A running proxy; ends when dropped.
#[derive(Debug)]
pub(crate) struct Proxy {
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Proxy {
    /// Listens inside `internet`; connects from the network of the caller.
    pub(crate) fn start(internet: &Namespace) -> Result<Self, LabError> {
        let listener = internet.enter(|| {
            let listener = std::net::TcpListener::bind((INTERNET_ADDRESS, PROXY_PORT))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        })?;
        let complain = || LabError::io("start the lab's proxy");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(complain())?;
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let upstream = host_proxy();
        let serve = move || {
            runtime.block_on(async move {
                tokio::select! {
                    _ = stopped => {}
                    _ = accept(listener, upstream) => {}
                }
            });
            runtime.shutdown_timeout(Duration::from_millis(200));
        };
        let thread = thread::Builder::new().name("lab-proxy".into()).spawn(serve).map_err(complain())?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn accept(listener: std::net::TcpListener, upstream: Option<Uri>) -> io::Result<Infallible> {
    let listener = TcpListener::from_std(listener)?;
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of file descriptors, most likely: let others finish.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let upstream = upstream.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| answer(request, upstream.as_ref()));
            // Whoever asked went away: their business.
            let _ = server::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_LIMIT)
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn answer(request: Request<Incoming>, upstream: Option<&Uri>) -> Result<Answer, Infallible> {
    let refused = |status, why: &str| {
        let mut response = Response::new(Either::Right(Full::from(format!("{why}\n"))));
        *response.status_mut() = status;
        response
    };
    if !matches!(*request.method(), Method::GET | Method::HEAD) || request.uri().scheme_str() != Some("http") {
        return Ok(refused(StatusCode::METHOD_NOT_ALLOWED, "this proxy only gets http:// addresses"));
    }
    Ok(forward(request, upstream).await.unwrap_or_else(|why| refused(StatusCode::BAD_GATEWAY, &why.to_string())))
}

async fn forward(
    request: Request<Incoming>,
    upstream: Option<&Uri>,
) -> Result<Answer, Box<dyn std::error::Error + Send + Sync>> {
    let (head, _) = request.into_parts();
    let next = upstream.unwrap_or(&head.uri);
    let host = next.host().ok_or("the address names no host")?.trim_matches(['[', ']']);
    let stream = connect(host, next.port_u16().unwrap_or(80), upstream.is_some()).await?;
    let (mut sender, connection) = client::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let mut onward = Request::new(Full::<Bytes>::default());
    *onward.method_mut() = head.method;
    *onward.headers_mut() = head.headers;
    for name in HOP_BY_HOP.iter().chain([&header::TRANSFER_ENCODING, &header::CONTENT_LENGTH]) {
        onward.headers_mut().remove(name);
    }
    onward.headers_mut().remove("proxy-connection");
    if let Some(authority) = head.uri.authority() {
        onward.headers_mut().insert(header::HOST, HeaderValue::from_str(authority.as_str())?);
    }
    *onward.uri_mut() = match (upstream, head.uri.path_and_query()) {
        (None, Some(path)) => path.as_str().parse()?,
        (None, None) => Uri::from_static("/"),
        (Some(_), _) => head.uri,
    };
    let mut response = sender.send_request(onward).await?;
    for name in &HOP_BY_HOP {
        response.headers_mut().remove(name);
    }
    Ok(response.map(Either::Left))
}

/// INVARIANT: a guest never reaches this machine's own services through the proxy; only the proxy that this machine's
/// owner configured may be one of them.
async fn connect(host: &str, port: u16, trusted: bool) -> io::Result<TcpStream> {
    let addresses: Vec<SocketAddr> =
        tokio::net::lookup_host((host, port)).await?.filter(|at| trusted || is_elsewhere(at.ip())).collect();
    if addresses.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::AddrNotAvailable,
            format!("{host} has no address outside of this machine"),
        ));
    }
    tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect(&*addresses))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

fn is_elsewhere(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => !(v4.is_loopback() || v4.is_unspecified() || v4.is_link_local() || v4.is_multicast()),
        IpAddr::V6(v6) => !(v6.is_loopback() || v6.is_unspecified() || v6.is_unicast_link_local() || v6.is_multicast()),
    }
}

/// The proxy that this machine itself uses for packages, if any.
fn host_proxy() -> Option<Uri> {
    let apt = || {
        let output = Command::new("apt-config").args(["shell", "proxy", "Acquire::http::Proxy"]).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        Some(text.trim().strip_prefix("proxy='")?.strip_suffix('\'')?.to_owned())
    };
    let text = apt().or_else(|| std::env::var("http_proxy").ok())?;
    if text.is_empty() || text == "DIRECT" {
        return None;
    }
    text.parse::<Uri>().ok().filter(|uri| uri.host().is_some() && matches!(uri.scheme_str(), None | Some("http")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machines_own_addresses_are_not_elsewhere() {
        for own in ["127.0.0.1", "127.9.9.9", "0.0.0.0", "::1", "::ffff:127.0.0.1", "169.254.169.254", "fe80::1"] {
            assert!(!is_elsewhere(own.parse().unwrap()), "{own}");
        }
        assert!(is_elsewhere("192.0.2.1".parse().unwrap()));
    }
}
