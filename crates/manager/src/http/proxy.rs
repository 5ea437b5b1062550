//! The clan's services, each under a host name of its own: `http://<service>.<clan>.localhost:<port>/`.
//!
//! A request becomes a stream to the guest's controller, which connects it to the service through the mesh. What passes
//! is plain HTTP/1.1, upgrades (WebSocket) included; the service sees its own name, and neither our cookies nor our port.

use axum::{
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, header},
    response::IntoResponse,
};
use clan_api::{ApiProblem, ErrorCode};
use clan_os::channel::Channel;
use clan_types::{ClanName, ServiceName};
use clan_wire::control::{ControlRequest, ControlResponse};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;

use super::{
    auth::{self, OPEN},
    web,
};
use crate::{
    guest::{self, GuestError},
    manager::Shared,
    problem,
};

/// Headers that concern one connection only (RFC 9110, section 7.6.1).
const HOP_BY_HOP: [HeaderName; 7] = [
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// A request to a service's own site.
pub(super) async fn serve(
    shared: &Shared,
    service: &ServiceName,
    clan: &ClanName,
    request: Request<Body>,
) -> Response<Body> {
    if let Some(token) = auth::query_value(request.uri(), OPEN) {
        return match shared.auth.take_open(&token, service, clan) {
            Some(cookie) if request.method() == Method::GET => enter(cookie),
            _ => locked(service, clan, "This link does not work any more"),
        };
    }
    if !shared.auth.has_service_session(request.headers(), service, clan) {
        return locked(service, clan, "This page is locked");
    }
    if auth::is_effective(&request) && auth::is_same_origin(request.headers()) == Some(false) {
        return web::message(StatusCode::FORBIDDEN, "Refused", "The request comes from another web site.");
    }
    let channel = match shared.find_named(clan).map(|c| c.control()) {
        Some(Ok(channel)) => channel,
        Some(Err(error)) => return failed(&problem::guest(&error)),
        None => {
            return failed(&ApiProblem::new(
                ErrorCode::NotFound,
                format!("this computer is not in a clan called `{clan}`"),
            ));
        }
    };
    match forward(&channel, service, clan, request).await {
        Ok(response) => response,
        Err(problem) => failed(&problem),
    }
}

/// Trades a one-time token for a session with the service.
fn enter(cookie: String) -> Response<Body> {
    let headers = [
        (header::SET_COOKIE, cookie),
        (header::LOCATION, "/".into()),
        (header::CACHE_CONTROL, "no-store".into()),
        (header::REFERRER_POLICY, "no-referrer".into()),
    ];
    (StatusCode::SEE_OTHER, headers).into_response()
}

fn locked(service: &ServiceName, clan: &ClanName, title: &str) -> Response<Body> {
    let text = format!(
        "Open it from the page of your clans, or type `clan service open {service} --clan {clan}` in a terminal."
    );
    web::message(StatusCode::UNAUTHORIZED, title, &text)
}

fn failed(problem: &ApiProblem) -> Response<Body> {
    let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::BAD_GATEWAY);
    let mut text = problem.why.clone().unwrap_or_default();
    for hint in &problem.hints {
        text.push_str(&format!(" {hint}."));
    }
    web::message(status, &problem.message, text.trim())
}

/// Passes a request on to a service, and its answer back.
async fn forward(
    channel: &Channel,
    service: &ServiceName,
    clan: &ClanName,
    mut request: Request<Body>,
) -> Result<Response<Body>, ApiProblem> {
    let down = |why: String| {
        ApiProblem::new(ErrorCode::ServiceDown, format!("the service `{service}` does not answer")).why(why)
    };
    let connect = ControlRequest::Connect { service: service.clone(), machine: None };
    let stream = match guest::open(channel, &connect, guest::PATIENCE).await {
        Ok((stream, ControlResponse::Connected)) => stream,
        Ok(_) => return Err(problem::guest(&GuestError::Unexpected { what: "connect to the service" })),
        Err(GuestError::Failed { why, .. }) => return Err(down(why)),
        Err(error) => return Err(problem::guest(&error)),
    };
    let (mut sender, connection) =
        http1::handshake::<_, Body>(TokioIo::new(stream)).await.map_err(|e| down(e.to_string()))?;
    // Ends with the answer's body, or with the upgraded stream.
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "a connection to a service broke");
        }
    });
    let site = Names::of(request.headers(), service, clan);
    let upgrade = request.headers().get(header::UPGRADE).cloned();
    let browser = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
    rewrite_request(&mut request, &site, upgrade.as_ref())
        .ok_or_else(|| ApiProblem::new(ErrorCode::BadRequest, "the request cannot be passed on"))?;
    let mut response = sender.send_request(request).await.map_err(|e| down(e.to_string()))?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let Some(browser) = browser else { return Err(down("it changed the protocol unasked".into())) };
        let served = hyper::upgrade::on(&mut response);
        tokio::spawn(async move {
            let (Ok(browser), Ok(served)) = tokio::join!(browser, served) else { return };
            // Either side may just hang up.
            let _ = copy_bidirectional(&mut TokioIo::new(browser), &mut TokioIo::new(served)).await;
        });
    }
    let (mut parts, body) = response.into_parts();
    rewrite_answer(&mut parts.headers, &site, parts.status == StatusCode::SWITCHING_PROTOCOLS);
    Ok(Response::from_parts(parts, Body::new(body)))
}

/// How a service is called on this side and on the other.
struct Names {
    /// As the browser calls it, port included.
    here: String,
    /// As it is called in the mesh.
    there: String,
}

impl Names {
    fn of(headers: &HeaderMap, service: &ServiceName, clan: &ClanName) -> Self {
        let host = headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or_default();
        Self { here: host.to_ascii_lowercase(), there: format!("{service}.{clan}.clan") }
    }

    /// A URL that names one side, naming the other.
    fn translate(url: &str, from: &str, to: &str) -> Option<HeaderValue> {
        let rest = url.strip_prefix("http://")?.strip_prefix(from)?;
        // Not a longer name that begins alike.
        (rest.is_empty() || rest.starts_with('/') || rest.starts_with('?'))
            .then(|| HeaderValue::from_str(&format!("http://{to}{rest}")).ok())?
    }
}

fn rewrite_request(request: &mut Request<Body>, site: &Names, upgrade: Option<&HeaderValue>) -> Option<()> {
    // To the service, a request line with a path; the host is in its header.
    let path = request.uri().path_and_query().map_or("/", |p| p.as_str()).to_owned();
    *request.uri_mut() = path.parse::<Uri>().ok()?;
    let headers = request.headers_mut();
    let cookies = auth::foreign_cookies(headers);
    strip(headers);
    headers.remove(header::COOKIE);
    if let Some(cookies) = cookies {
        headers.insert(header::COOKIE, HeaderValue::from_str(&cookies).ok()?);
    }
    headers.insert(header::HOST, HeaderValue::from_str(&site.there).ok()?);
    for name in [header::ORIGIN, header::REFERER] {
        let url = headers.get(&name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        if let Some(value) = url.and_then(|url| Names::translate(&url, &site.here, &site.there)) {
            headers.insert(name, value);
        }
    }
    for name in ["x-forwarded-for", "x-real-ip", "forwarded"] {
        headers.remove(name);
    }
    headers.insert("x-forwarded-host", HeaderValue::from_str(&site.here).ok()?);
    headers.insert("x-forwarded-proto", HeaderValue::from_static("http"));
    if let Some(upgrade) = upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, upgrade.clone());
    }
    Some(())
}

fn rewrite_answer(headers: &mut HeaderMap, site: &Names, upgraded: bool) {
    let upgrade = headers.get(header::UPGRADE).cloned();
    strip(headers);
    if let Some(upgrade) = upgrade.filter(|_| upgraded) {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, upgrade);
    }
    let location = headers.get(header::LOCATION).and_then(|v| v.to_str().ok()).map(str::to_owned);
    if let Some(value) = location.and_then(|url| Names::translate(&url, &site.there, &site.here)) {
        headers.insert(header::LOCATION, value);
    }
    let cookies: Vec<HeaderValue> = headers
        .get_all(header::SET_COOKIE)
        .iter()
        .filter(|v| v.to_str().is_ok_and(|text| !auth::sets_our_cookie(text)))
        .cloned()
        .collect();
    headers.remove(header::SET_COOKIE);
    for cookie in cookies {
        headers.append(header::SET_COOKIE, cookie);
    }
}

fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
    headers.remove("keep-alive");
    headers.remove("proxy-connection");
}

#[cfg(test)]
mod tests {
    use clan_os::channel::{recv_message, send_message};
    use clan_wire::control::MAX_MESSAGE;
    use http_body_util::BodyExt;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
    };
    use tokio_util::sync::CancellationToken;

    use super::*;

    /// A guest whose controller connects the service `web`, and nothing else, to a port of this computer.
    fn guest(port: u16) -> (Channel, CancellationToken) {
        let cancel = CancellationToken::new();
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let (channel, driver) = Channel::host(ours, "test", cancel.clone());
        let (guest, mut incoming, guest_driver) = Channel::guest(theirs, "test", cancel.clone());
        tokio::spawn(driver);
        tokio::spawn(guest_driver);
        tokio::spawn(async move {
            let _guest = guest;
            while let Some(mut stream) = incoming.accept().await {
                tokio::spawn(async move {
                    let request: ControlRequest = recv_message(&mut stream, MAX_MESSAGE).await.unwrap();
                    let ControlRequest::Connect { service, .. } = request else { panic!("{request:?}") };
                    if service.as_str() != "web" {
                        let answer = ControlResponse::Failed("nobody offers it".into());
                        send_message(&mut stream, &answer, MAX_MESSAGE).await.unwrap();
                        let _ = stream.shutdown().await;
                        // The other side reads the answer, then drops the stream.
                        let _ = stream.read(&mut [0]).await;
                        return;
                    }
                    send_message(&mut stream, &ControlResponse::Connected, MAX_MESSAGE).await.unwrap();
                    let mut tcp = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                    let _ = copy_bidirectional(&mut stream, &mut tcp).await;
                });
            }
        });
        (channel, cancel)
    }

    /// A service that takes one connection: reads a request's head, answers `answer`; gives the head.
    async fn service(answer: &'static str, then_echo: bool) -> (u16, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let served = tokio::spawn(async move {
            let (mut tcp, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(tcp.read_u8().await.unwrap());
            }
            tcp.write_all(answer.as_bytes()).await.unwrap();
            if then_echo {
                let (mut read, mut write) = tcp.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            }
            String::from_utf8(head).unwrap()
        });
        (port, served)
    }

    fn names() -> (ServiceName, ClanName) {
        ("web".parse().unwrap(), "family".parse().unwrap())
    }

    fn request(path: &str) -> Request<Body> {
        Request::builder()
            .uri(path)
            .header("host", "web.family.localhost:7420")
            .header("origin", "http://web.family.localhost:7420")
            .header("cookie", "clan_service=secret.mac; theme=dark")
            .header("connection", "keep-alive, x-hop")
            .header("x-hop", "1")
            .body(Body::empty())
            .unwrap()
    }

    #[tokio::test]
    async fn a_request_reaches_the_service_under_its_own_name_without_our_cookies() {
        let (port, served) = service(
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\nset-cookie: a=1\r\nset-cookie: clan_session=evil\r\nlocation: http://web.family.clan/next\r\n\r\nhello",
            false,
        )
        .await;
        let (channel, _cancel) = guest(port);
        let (web, family) = names();
        let response = forward(&channel, &web, &family, request("/page?x=1")).await.unwrap();
        assert_eq!(response.headers()[header::LOCATION], "http://web.family.localhost:7420/next");
        let cookies: Vec<_> = response.headers().get_all(header::SET_COOKIE).iter().collect();
        assert_eq!(cookies, ["a=1"]);
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "hello");
        let head = served.await.unwrap().to_ascii_lowercase();
        assert!(head.starts_with("get /page?x=1 http/1.1\r\n"), "{head}");
        assert!(
            head.contains("\r\nhost: web.family.clan\r\n") && head.contains("\r\norigin: http://web.family.clan\r\n"),
            "{head}"
        );
        assert!(
            head.contains("\r\ncookie: theme=dark\r\n") && !head.contains("secret") && !head.contains("x-hop"),
            "{head}"
        );
    }

    #[tokio::test]
    async fn a_service_that_is_not_there_is_told_with_the_guests_reason() {
        let (channel, _cancel) = guest(1);
        let problem = forward(&channel, &"wiki".parse().unwrap(), &names().1, request("/")).await.unwrap_err();
        assert_eq!(problem.code, ErrorCode::ServiceDown);
        assert_eq!(problem.why.as_deref(), Some("nobody offers it"));
    }

    #[tokio::test]
    async fn without_a_session_a_service_is_locked_and_a_link_opens_it_once() {
        let dir = tempfile::tempdir().unwrap();
        let shared = Shared::for_tests(dir.path());
        let (web, family) = names();
        let locked = serve(&shared, &web, &family, request("/")).await;
        assert_eq!(locked.status(), StatusCode::UNAUTHORIZED);
        let token = shared.auth.new_open(&web, &family);
        let path = format!("/?{OPEN}={token}");
        let opened = serve(&shared, &web, &family, request(&path)).await;
        assert_eq!(opened.status(), StatusCode::SEE_OTHER);
        assert_eq!(opened.headers()[header::LOCATION], "/");
        let cookie = opened.headers()[header::SET_COOKIE].to_str().unwrap().to_owned();
        assert!(!cookie.to_ascii_lowercase().contains("domain"), "for this host only: {cookie}");
        assert_eq!(serve(&shared, &web, &family, request(&path)).await.status(), StatusCode::UNAUTHORIZED);
        let mut with_cookie = request("/");
        with_cookie.headers_mut().insert(header::COOKIE, cookie.split(';').next().unwrap().parse().unwrap());
        // Past the lock: what is missing now is the clan.
        assert_eq!(serve(&shared, &web, &family, with_cookie).await.status(), StatusCode::NOT_FOUND);
    }

    #[tokio::test]
    async fn an_upgrade_becomes_raw_bytes_both_ways() {
        let (port, _served) =
            service("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n", true)
                .await;
        let (channel, _cancel) = guest(port);
        let (web, family) = names();
        // A browser's connection to a server of ours that forwards.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (tcp, _) = listener.accept().await.unwrap();
            let router = axum::Router::new().fallback(move |request: Request<Body>| async move {
                forward(&channel, &web, &family, request).await.unwrap()
            });
            super::super::serve_connection(tcp, router, CancellationToken::new()).await;
        });
        let mut browser = TcpStream::connect(address).await.unwrap();
        browser
            .write_all(b"GET /live HTTP/1.1\r\nhost: web.family.localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
            .await
            .unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(browser.read_u8().await.unwrap());
        }
        assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
        browser.write_all(b"both ways").await.unwrap();
        let mut echoed = [0; 9];
        browser.read_exact(&mut echoed).await.unwrap();
        assert_eq!(&echoed, b"both ways");
    }

    #[test]
    fn only_the_services_own_urls_are_translated() {
        let there = |url| {
            Names::translate(url, "web.family.clan", "web.family.localhost:7420")
                .map(|v| v.to_str().unwrap().to_owned())
        };
        assert_eq!(there("http://web.family.clan").as_deref(), Some("http://web.family.localhost:7420"));
        assert_eq!(there("http://web.family.clan/a?b").as_deref(), Some("http://web.family.localhost:7420/a?b"));
        for other in ["http://web.family.clan.evil.example/", "https://web.family.clan/", "http://other.clan/", "/a"] {
            assert_eq!(there(other), None, "{other}");
        }
    }
}
