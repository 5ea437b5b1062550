//! Who may come in by the TCP port: every program of every user on this computer can connect to it, and every web page
//! in the user's browser can send to it.
//!
//! - The `Host` must be loopback's own, so that no other name can be made to point here (DNS rebinding).
//! - The API wants the token as a bearer, or a session cookie. A session begins with a one-time token in a URL.
//! - A browser says where a request comes from: whatever comes from another origin is refused.
//! - A service has a host name, and so an origin and a cookie, of its own. It never sees the cookies of ours.
//!
//! Cookies do not tell ports apart: another user of this computer who gets the person to open *their* port on
//! `localhost` is sent the session cookie. That is why services have names of their own, and why the session ends.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    http::{HeaderMap, Method, Request, Uri, header},
};
use clan_api::{ApiProblem, ErrorCode};
use clan_types::{ClanName, ServiceName};
use data_encoding::{BASE32_NOPAD, BASE64URL_NOPAD};
use zeroize::Zeroizing;

use crate::{
    disk::{self, DiskError},
    record::random,
    tasks::now,
};

/// A one-time token works for so long.
pub(crate) const ONE_TIME: Duration = Duration::from_secs(120);
/// A session works for so long.
const SESSION: Duration = Duration::from_secs(14 * 24 * 3600);
/// One-time tokens that wait to be used.
const MAX_WAITING: usize = 256;
const SESSION_COOKIE: &str = "clan_session";
const SERVICE_COOKIE: &str = "clan_service";
/// Cookies that are ours begin like this.
const OURS: &str = "clan_";
/// Parameter of the URL that opens a service.
pub(super) const OPEN: &str = "clan-open";

/// By which way a request came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Door {
    Unix,
    Tcp,
}

/// How the caller showed their right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Caller {
    /// Asks for what anybody may have.
    Anybody,
    /// With the token.
    Token,
    /// With a session.
    Session,
}

/// Which site a request is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Site {
    /// The manager's own.
    Manager,
    /// A service's.
    Service { service: ServiceName, clan: ClanName },
}

/// Tokens and what is derived from them.
pub(crate) struct Auth {
    /// Hashes are compared, so that the time that takes tells nothing.
    token: blake3::Hash,
    key: Zeroizing<[u8; 32]>,
    /// With what the page is to show first.
    logins: OneTime<Option<String>>,
    opens: OneTime<String>,
}

impl Auth {
    /// Reads the token, or makes one.
    pub(crate) fn open(path: &Path) -> Result<Self, DiskError> {
        let text = match disk::read(path)? {
            Some(bytes) => {
                use std::os::unix::fs::PermissionsExt;
                let mode = std::fs::metadata(path).map_or(0, |m| m.permissions().mode() & 0o777);
                if mode & 0o077 != 0 {
                    return Err(DiskError::Exposed { path: path.to_owned(), mode });
                }
                let text = Zeroizing::new(String::from_utf8(bytes).unwrap_or_default().trim().to_owned());
                if text.len() < 32 {
                    return Err(DiskError::DamagedSecret { path: path.to_owned() });
                }
                text
            }
            None => {
                let text = Zeroizing::new(BASE64URL_NOPAD.encode(&*Zeroizing::new(random::<32>(path)?)));
                disk::write_secret(path, format!("{}\n", &*text).as_bytes())?;
                text
            }
        };
        let key = Zeroizing::new(blake3::derive_key("clan 2026-11 manager session key v1", text.as_bytes()));
        Ok(Self { token: blake3::hash(text.as_bytes()), key, logins: OneTime::default(), opens: OneTime::default() })
    }

    /// A one-time token for the web page, which shows `open` first.
    pub(crate) fn new_login(&self, open: Option<String>) -> String {
        self.logins.make(open)
    }

    /// Uses a one-time token up: the cookie of a new session, and what to show first.
    pub(super) fn take_login(&self, token: &str) -> Option<(String, Option<String>)> {
        self.logins.take(token).map(|open| (self.cookie(SESSION_COOKIE, "", "Strict"), open))
    }

    /// A one-time token for a service.
    pub(super) fn new_open(&self, service: &ServiceName, clan: &ClanName) -> String {
        self.opens.make(format!("{service}.{clan}"))
    }

    /// Uses a one-time token up: the cookie of a session with this service. A browser comes from another site when it
    /// follows the link on the page, hence `Lax`.
    pub(super) fn take_open(&self, token: &str, service: &ServiceName, clan: &ClanName) -> Option<String> {
        let site = format!("{service}.{clan}");
        self.opens.take(token).filter(|s| *s == site).map(|_| self.cookie(SERVICE_COOKIE, &site, "Lax"))
    }

    fn cookie(&self, name: &str, site: &str, same_site: &str) -> String {
        let issued = now().as_millis();
        let mac = self.mac(name, site, issued);
        format!("{name}={issued:x}.{mac}; Path=/; HttpOnly; SameSite={same_site}; Max-Age={}", SESSION.as_secs())
    }

    fn mac(&self, name: &str, site: &str, issued: u64) -> String {
        let hash = blake3::keyed_hash(&self.key, format!("{name}|{site}|{issued:x}").as_bytes());
        BASE32_NOPAD.encode(hash.as_bytes()).to_ascii_lowercase()
    }

    fn has_session(&self, headers: &HeaderMap, name: &str, site: &str) -> bool {
        cookies(headers).any(|(n, value)| {
            let Some((issued, mac)) = value.split_once('.') else { return false };
            let Ok(issued) = u64::from_str_radix(issued, 16) else { return false };
            let age = now().as_millis().checked_sub(issued);
            n == name
                && blake3::hash(mac.as_bytes()) == blake3::hash(self.mac(name, site, issued).as_bytes())
                && age.is_some_and(|age| u128::from(age) <= SESSION.as_millis())
        })
    }

    /// Whether the browser has a session with this service.
    pub(super) fn has_service_session(&self, headers: &HeaderMap, service: &ServiceName, clan: &ClanName) -> bool {
        self.has_session(headers, SERVICE_COOKIE, &format!("{service}.{clan}"))
    }

    fn has_token(&self, headers: &HeaderMap) -> bool {
        let bearer =
            headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()).and_then(|v| v.strip_prefix("Bearer "));
        bearer.is_some_and(|b| blake3::hash(b.trim().as_bytes()) == self.token)
    }
}

/// Tokens that work once.
struct OneTime<T> {
    waiting: Mutex<HashMap<blake3::Hash, (T, Instant)>>,
}

impl<T> Default for OneTime<T> {
    fn default() -> Self {
        Self { waiting: Mutex::default() }
    }
}

impl<T> OneTime<T> {
    fn make(&self, what: T) -> String {
        let mut bytes = Zeroizing::new([0; 32]);
        if getrandom::fill(bytes.as_mut_slice()).is_err() {
            // Without randomness there is no token: this one is never stored.
            return String::new();
        }
        let token = BASE64URL_NOPAD.encode(&*bytes);
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|_, (_, made)| made.elapsed() < ONE_TIME);
        if waiting.len() >= MAX_WAITING
            && let Some(oldest) = waiting.iter().min_by_key(|(_, (_, made))| *made).map(|(hash, _)| *hash)
        {
            waiting.remove(&oldest);
        }
        waiting.insert(blake3::hash(token.as_bytes()), (what, Instant::now()));
        token
    }

    fn take(&self, token: &str) -> Option<T> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting
            .remove(&blake3::hash(token.as_bytes()))
            .filter(|(_, made)| made.elapsed() < ONE_TIME)
            .map(|(what, _)| what)
    }
}

fn foreign(message: &str) -> ApiProblem {
    ApiProblem::new(ErrorCode::ForeignOrigin, message)
}

/// The host that a request names, without its port.
fn host_name(headers: &HeaderMap, uri: &Uri) -> Option<String> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return None };
    let host = host.to_str().ok()?.to_ascii_lowercase();
    // A request line with a whole URL must not say something else.
    if uri.authority().is_some_and(|a| a.as_str().to_ascii_lowercase() != host) {
        return None;
    }
    let authority: axum::http::uri::Authority = host.parse().ok()?;
    (!host.contains('@')).then(|| authority.host().trim_end_matches('.').to_owned())
}

/// Which site a request is for, by its `Host`.
pub(super) fn site(headers: &HeaderMap, uri: &Uri) -> Result<Site, ApiProblem> {
    let host = host_name(headers, uri).ok_or_else(|| foreign("the request names no host, or more than one"))?;
    if matches!(host.as_str(), "localhost" | "127.0.0.1" | "[::1]") {
        return Ok(Site::Manager);
    }
    let labels = host.strip_suffix(".localhost").and_then(|l| l.split_once('.'));
    if let Some((service, clan)) = labels
        && let (Ok(service), Ok(clan)) = (service.parse(), clan.parse())
    {
        return Ok(Site::Service { service, clan });
    }
    Err(foreign("the request is for another host").hint("use http://localhost"))
}

/// Whether a request can change something, or opens a connection that can.
pub(super) fn is_effective(request: &Request<Body>) -> bool {
    !matches!(*request.method(), Method::GET | Method::HEAD) || request.headers().contains_key(header::UPGRADE)
}

/// What a browser says about where a request comes from: `None` if it says nothing.
pub(super) fn is_same_origin(headers: &HeaderMap) -> Option<bool> {
    let text =
        |name| headers.get(name).map(|v: &axum::http::HeaderValue| v.to_str().unwrap_or("").to_ascii_lowercase());
    let host = text(header::HOST)?;
    if let Some(origin) = text(header::ORIGIN) {
        return Some(origin == format!("http://{host}"));
    }
    let site = headers.get("sec-fetch-site").map(|v| v.to_str().unwrap_or("").to_owned())?;
    // `none`: the person typed it, or followed a link from outside the browser.
    Some(matches!(site.as_str(), "same-origin" | "none"))
}

/// Whether a request to the manager's own site may pass, and as whom.
pub(super) fn admit(auth: &Auth, request: &Request<Body>) -> Result<Caller, ApiProblem> {
    let headers = request.headers();
    let same_origin = is_same_origin(headers);
    let private = request.uri().path().starts_with("/api/");
    if same_origin == Some(false) && (private || is_effective(request)) {
        return Err(foreign("the request comes from another web site"));
    }
    if auth.has_token(headers) {
        return Ok(Caller::Token);
    }
    if auth.has_session(headers, SESSION_COOKIE, "") {
        if is_effective(request) && same_origin.is_none() {
            return Err(foreign("the request does not say which web site it comes from"));
        }
        return Ok(Caller::Session);
    }
    if private || is_effective(request) {
        return Err(
            ApiProblem::new(ErrorCode::Unauthorized, "you are not signed in").hint("type `clan web` in a terminal")
        );
    }
    Ok(Caller::Anybody)
}

/// A parameter of a URL, percent-decoded as far as our own tokens need it: not at all.
pub(super) fn query_value(uri: &Uri, name: &str) -> Option<String> {
    uri.query()?
        .split('&')
        .find_map(|pair| pair.split_once('=').filter(|(n, _)| *n == name))
        .map(|(_, value)| value.to_owned())
}

fn cookies(headers: &HeaderMap) -> impl Iterator<Item = (&str, &str)> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
}

/// The cookies of a request without ours.
pub(super) fn foreign_cookies(headers: &HeaderMap) -> Option<String> {
    let kept: Vec<String> =
        cookies(headers).filter(|(name, _)| !name.starts_with(OURS)).map(|(n, v)| format!("{n}={v}")).collect();
    (!kept.is_empty()).then(|| kept.join("; "))
}

/// Whether a service tries to set a cookie of ours.
pub(super) fn sets_our_cookie(set_cookie: &str) -> bool {
    set_cookie.trim_start().starts_with(OURS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "0123456789abcdef0123456789abcdef0123456789a";

    fn auth() -> (tempfile::TempDir, Auth) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        disk::write_secret(&path, TOKEN.as_bytes()).unwrap();
        let auth = Auth::open(&path).unwrap();
        (dir, auth)
    }

    fn request(method: &str, path: &str, headers: &[(&str, &str)]) -> Request<Body> {
        let mut builder = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(Body::empty()).unwrap()
    }

    fn site_of(host: &str) -> Result<Site, ApiProblem> {
        let request = request("GET", "/", &[("host", host)]);
        site(request.headers(), request.uri())
    }

    fn session(auth: &Auth) -> String {
        let cookie = auth.take_login(&auth.new_login(None)).unwrap().0;
        cookie.split(';').next().unwrap().to_owned()
    }

    #[test]
    fn only_names_of_loopback_are_served() {
        for host in ["localhost", "localhost:7420", "127.0.0.1:7420", "[::1]:7420", "LOCALHOST:7420", "localhost.:1"] {
            assert_eq!(site_of(host).ok(), Some(Site::Manager), "{host}");
        }
        let service = Site::Service { service: "web".parse().unwrap(), clan: "family".parse().unwrap() };
        assert_eq!(site_of("web.family.localhost:7420").ok(), Some(service));
        for host in [
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "a.b.c.localhost",
            "family.localhost",
            "0.0.0.0",
            "user@localhost",
            "",
        ] {
            assert_eq!(site_of(host).unwrap_err().code, ErrorCode::ForeignOrigin, "{host}");
        }
        let two = request("GET", "/", &[("host", "localhost"), ("host", "evil.example")]);
        assert!(site(two.headers(), two.uri()).is_err());
        let disagreeing = request("GET", "http://evil.example/", &[("host", "localhost")]);
        assert!(site(disagreeing.headers(), disagreeing.uri()).is_err());
    }

    #[test]
    fn the_api_wants_the_token_or_a_session() {
        let (_dir, auth) = auth();
        let with =
            |headers: &[(&str, &str)]| admit(&auth, &request("GET", "/api/v1/status", headers)).map_err(|p| p.code);
        let host = ("host", "localhost:7420");
        assert_eq!(with(&[host]), Err(ErrorCode::Unauthorized));
        assert_eq!(with(&[host, ("authorization", "Bearer wrong")]), Err(ErrorCode::Unauthorized));
        assert_eq!(with(&[host, ("authorization", &format!("Bearer {TOKEN}"))]), Ok(Caller::Token));
        let cookie = session(&auth);
        assert_eq!(with(&[host, ("cookie", &format!("other=1; {cookie}"))]), Ok(Caller::Session));
        let forged = cookie.replace('.', ".a");
        assert_eq!(with(&[host, ("cookie", &forged)]), Err(ErrorCode::Unauthorized));
    }

    #[test]
    fn the_page_itself_is_for_anybody() {
        let (_dir, auth) = auth();
        assert_eq!(admit(&auth, &request("GET", "/app.js", &[("host", "localhost:7420")])).unwrap(), Caller::Anybody);
    }

    #[test]
    fn another_web_site_gets_nothing_done() {
        let (_dir, auth) = auth();
        let cookie = session(&auth);
        let base = [("host", "localhost:7420"), ("cookie", cookie.as_str())];
        let code = |method: &str, more: &[(&str, &str)]| {
            let headers: Vec<_> = base.iter().chain(more).copied().collect();
            admit(&auth, &request(method, "/api/v1/clans", &headers)).map_err(|p| p.code)
        };
        assert_eq!(code("POST", &[("origin", "http://localhost:7420")]), Ok(Caller::Session));
        for origin in [
            "http://evil.example",
            "https://localhost:7420",
            "http://localhost:9999",
            "http://web.family.localhost:7420",
            "null",
        ] {
            assert_eq!(code("POST", &[("origin", origin)]), Err(ErrorCode::ForeignOrigin), "{origin}");
            assert_eq!(code("GET", &[("origin", origin)]), Err(ErrorCode::ForeignOrigin), "{origin}");
            assert_eq!(
                code("GET", &[("upgrade", "websocket"), ("origin", origin)]),
                Err(ErrorCode::ForeignOrigin),
                "{origin}"
            );
        }
        assert_eq!(code("POST", &[]), Err(ErrorCode::ForeignOrigin), "a browser says where a change comes from");
        assert_eq!(code("GET", &[("upgrade", "clan-console")]), Err(ErrorCode::ForeignOrigin));
        assert_eq!(code("GET", &[("sec-fetch-site", "cross-site")]), Err(ErrorCode::ForeignOrigin));
        assert_eq!(code("GET", &[("sec-fetch-site", "same-origin")]), Ok(Caller::Session));
    }

    #[test]
    fn a_login_token_works_once_and_is_not_the_permanent_one() {
        let (_dir, auth) = auth();
        let token = auth.new_login(Some("clan://join/x".into()));
        assert!(auth.take_login(TOKEN).is_none());
        assert!(auth.take_login("").is_none());
        let (cookie, open) = auth.take_login(&token).unwrap();
        assert_eq!(open.as_deref(), Some("clan://join/x"));
        assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict") && !cookie.contains(TOKEN));
        assert!(auth.take_login(&token).is_none());
    }

    #[test]
    fn a_session_survives_a_restart_of_the_manager() {
        let (dir, auth) = auth();
        let cookie = session(&auth);
        let again = Auth::open(&dir.path().join("token")).unwrap();
        let request = request("GET", "/api/v1/status", &[("host", "localhost"), ("cookie", &cookie)]);
        assert_eq!(admit(&again, &request).unwrap(), Caller::Session);
    }

    #[test]
    fn a_service_session_is_for_that_service_only() {
        let (_dir, auth) = auth();
        let (web, wiki, clan): (ServiceName, ServiceName, ClanName) =
            ("web".parse().unwrap(), "wiki".parse().unwrap(), "family".parse().unwrap());
        let token = auth.new_open(&web, &clan);
        assert!(auth.take_open(&token, &wiki, &clan).is_none(), "and the token is used up");
        let cookie = auth.take_open(&auth.new_open(&web, &clan), &web, &clan).unwrap();
        let pair = cookie.split(';').next().unwrap();
        let request = request("GET", "/", &[("host", "web.family.localhost"), ("cookie", pair)]);
        assert!(auth.has_service_session(request.headers(), &web, &clan));
        assert!(!auth.has_service_session(request.headers(), &wiki, &clan));
        assert!(!auth.has_service_session(request.headers(), &web, &"work".parse().unwrap()));
        assert!(!auth.has_session(request.headers(), SESSION_COOKIE, ""), "and never one for the manager");
    }

    #[test]
    fn a_service_never_sees_our_cookies() {
        let request = request("GET", "/", &[("host", "x"), ("cookie", "a=1; clan_service=x.y; b=2; clan_session=z")]);
        assert_eq!(foreign_cookies(request.headers()).as_deref(), Some("a=1; b=2"));
        assert!(sets_our_cookie(" clan_session=evil; Path=/") && !sets_our_cookie("clean=1"));
    }

    #[test]
    fn a_token_that_others_can_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let (dir, _auth) = auth();
        let path = dir.path().join("token");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Auth::open(&path), Err(DiskError::Exposed { .. })));
    }

    #[test]
    fn a_new_token_is_private_and_stays_the_same() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let first = Auth::open(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(first.token, Auth::open(&path).unwrap().token);
    }
}
