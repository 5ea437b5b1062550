//! As much of a browser as the story needs: GET over plain HTTP/1.1, redirects, cookies, `*.localhost`.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream},
    time::Duration,
};

use crate::LabError;

const LIMIT: Duration = Duration::from_secs(20);
const MAX_PAGE: u64 = 8 << 20;
const MAX_REDIRECTS: usize = 5;

/// What a URL answered, after redirects.
#[derive(Debug, Clone)]
pub struct Page {
    /// HTTP status.
    pub status: u16,
    /// Where it was found.
    pub url: String,
    /// Header fields, names in lower case.
    pub headers: Vec<(String, String)>,
    /// Content.
    pub body: String,
}

/// Keeps cookies, per host and port.
#[derive(Debug, Default)]
pub struct Browser {
    cookies: Vec<(String, String, String)>,
}

impl Browser {
    /// Opens a page as somebody at this machine would.
    ///
    /// # Errors
    /// When nothing listens there, or what does speaks no HTTP.
    pub fn get(&mut self, url: &str) -> Result<Page, LabError> {
        let mut url = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let page = self.get_once(&url)?;
            match page.header("location") {
                Some(target) if (300..400).contains(&page.status) => url = resolve(&url, target)?,
                _ => return Ok(page),
            }
        }
        Err(LabError::Promise(format!("{} redirects in a circle", hide_query(&url))))
    }

    fn get_once(&mut self, url: &str) -> Result<Page, LabError> {
        let (authority, path) = split(url)?;
        let (host, port) = authority
            .rsplit_once(':')
            .and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)))
            .unwrap_or((authority, 80));
        // RFC 6761: localhost and names below it are this machine.
        let target = if host == "localhost" || host.ends_with(".localhost") {
            Ipv4Addr::LOCALHOST.to_string()
        } else {
            host.to_owned()
        };
        let complain = || LabError::io(format!("open {}", hide_query(url)));
        let mut stream = TcpStream::connect((target.as_str(), port)).map_err(complain())?;
        stream.set_read_timeout(Some(LIMIT)).map_err(complain())?;
        stream.set_write_timeout(Some(LIMIT)).map_err(complain())?;
        let cookies: Vec<String> = self
            .cookies
            .iter()
            .filter(|(at, ..)| at == authority)
            .map(|(_, name, value)| format!("{name}={value}"))
            .collect();
        let cookies = if cookies.is_empty() { String::new() } else { format!("Cookie: {}\r\n", cookies.join("; ")) };
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\nAccept: text/html, */*\r\n{cookies}\r\n"
        );
        stream.write_all(request.as_bytes()).map_err(complain())?;
        let mut bytes = Vec::new();
        stream.take(MAX_PAGE).read_to_end(&mut bytes).map_err(complain())?;
        let page = parse(url, &bytes)
            .ok_or_else(|| LabError::Promise(format!("{} answers something else than HTTP", hide_query(url))))?;
        for (_, cookie) in page.headers.iter().filter(|(name, _)| name == "set-cookie") {
            if let Some((name, value)) = cookie.split(';').next().and_then(|pair| pair.split_once('=')) {
                self.cookies.retain(|(at, known, _)| at != authority || known != name.trim());
                self.cookies.push((authority.to_owned(), name.trim().to_owned(), value.trim().to_owned()));
            }
        }
        Ok(page)
    }
}

impl Page {
    /// The first header field of that name (lower case).
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// A URL without what may be a token.
pub(crate) fn hide_query(url: &str) -> &str {
    url.split(['?', '#']).next().unwrap_or(url)
}

fn split(url: &str) -> Result<(&str, &str), LabError> {
    let rest = url
        .strip_prefix("http://")
        .ok_or_else(|| LabError::Promise(format!("{} is no http:// address", hide_query(url))))?;
    let rest = rest.split('#').next().unwrap_or(rest);
    Ok(match rest.find(['/', '?']) {
        Some(at) if rest.as_bytes()[at] == b'/' => rest.split_at(at),
        // "http://host?query" has no path of its own; nothing of ours makes one.
        Some(at) => (&rest[..at], "/"),
        None => (rest, "/"),
    })
}

fn resolve(base: &str, target: &str) -> Result<String, LabError> {
    if target.starts_with("http://") {
        return Ok(target.to_owned());
    }
    let (authority, path) = split(base)?;
    if target.starts_with('/') {
        return Ok(format!("http://{authority}{target}"));
    }
    let folder = path.split('?').next().and_then(|path| path.rsplit_once('/')).map_or("", |(folder, _)| folder);
    Ok(format!("http://{authority}{folder}/{target}"))
}

fn parse(url: &str, bytes: &[u8]) -> Option<Page> {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&bytes[..end]).ok()?;
    let mut lines = head.split("\r\n");
    let status = lines.next()?.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(n, v)| (n.trim().to_ascii_lowercase(), v.trim().to_owned()))
        .collect();
    let body = &bytes[end + 4..];
    let chunked =
        headers.iter().any(|(name, value)| name == "transfer-encoding" && value.eq_ignore_ascii_case("chunked"));
    let body = if chunked { dechunk(body)? } else { body.to_vec() };
    Some(Page { status, url: url.to_owned(), headers, body: String::from_utf8_lossy(&body).into_owned() })
}

fn dechunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|w| w == b"\r\n")?;
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).ok()?.split(';').next()?.trim(), 16).ok()?;
        rest = &rest[end + 2..];
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(..size)?);
        rest = rest.get(size + 2..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunked_page_is_put_together() {
        let page = parse(
            "http://a/",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nwiki\r\n2;x=y\r\n!!\r\n0\r\n\r\n",
        )
        .unwrap();
        assert_eq!((page.status, page.body.as_str()), (200, "wiki!!"));
        assert!(parse("http://a/", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nwi").is_none());
    }

    #[test]
    fn redirects_are_relative_to_where_they_came_from() {
        assert_eq!(resolve("http://a:1/b/c?d", "/e").unwrap(), "http://a:1/e");
        assert_eq!(resolve("http://a:1/b/c?d", "e").unwrap(), "http://a:1/b/e");
        assert_eq!(resolve("http://a:1/b", "http://x/").unwrap(), "http://x/");
    }

    #[test]
    fn a_fragment_is_not_sent() {
        assert_eq!(split("http://a:1/b?c#d").unwrap(), ("a:1", "/b?c"));
        assert_eq!(split("http://a:1").unwrap(), ("a:1", "/"));
    }

    #[test]
    fn cookies_go_back_to_where_they_came_from() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = std::thread::spawn(move || {
            let mut requests = Vec::new();
            for answer in ["302 Found\r\nLocation: /in\r\nSet-Cookie: session=abc; HttpOnly", "200 OK"] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut buffer = [0; 4096];
                let n = stream.read(&mut buffer).unwrap();
                requests.push(String::from_utf8_lossy(&buffer[..n]).into_owned());
                stream.write_all(format!("HTTP/1.1 {answer}\r\nContent-Length: 2\r\n\r\nhi").as_bytes()).unwrap();
            }
            requests
        });
        let page = Browser::default().get(&format!("http://web.family.localhost:{port}/?token=t")).unwrap();
        let requests = server.join().unwrap();
        assert_eq!((page.status, page.body.as_str()), (200, "hi"));
        assert!(
            requests[0].contains(&format!("Host: web.family.localhost:{port}\r\n")) && !requests[0].contains("Cookie"),
            "{}",
            requests[0]
        );
        assert!(
            requests[1].starts_with("GET /in ") && requests[1].contains("Cookie: session=abc\r\n"),
            "{}",
            requests[1]
        );
    }
}
