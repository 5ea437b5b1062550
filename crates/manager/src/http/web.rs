//! The web page's files, and small pages of our own.

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header},
    response::IntoResponse,
};
use clan_api::{ApiProblem, ErrorCode};

use super::problems::Refusal;

const FILES: [(&str, &str, &str); 6] = [
    ("/", "text/html; charset=utf-8", include_str!("../../web/index.html")),
    ("/index.html", "text/html; charset=utf-8", include_str!("../../web/index.html")),
    ("/app.js", "text/javascript; charset=utf-8", include_str!("../../web/app.js")),
    ("/journal.js", "text/javascript; charset=utf-8", include_str!("../../web/journal.js")),
    ("/lock.js", "text/javascript; charset=utf-8", include_str!("../../web/lock.js")),
    ("/style.css", "text/css; charset=utf-8", include_str!("../../web/style.css")),
];
const POLICY: &str =
    "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'; object-src 'none'";
const MESSAGE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'";

/// A file of the web page.
pub(super) async fn asset(request: Request<Body>) -> Response<Body> {
    let path = request.uri().path();
    let Some((_, media_type, content)) = FILES.iter().find(|(p, _, _)| *p == path) else {
        return Refusal(ApiProblem::new(ErrorCode::NotFound, "there is no such page")).into_response();
    };
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return Refusal(ApiProblem::new(ErrorCode::BadRequest, "a page can only be read")).into_response();
    }
    let tag = format!("\"{}\"", &blake3::hash(content.as_bytes()).to_hex()[..32]);
    let mut headers = safe(POLICY);
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    // Asked for anew each time, sent only when another version of the manager runs.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    if let Ok(value) = HeaderValue::from_str(&tag) {
        headers.insert(header::ETAG, value);
    }
    if request.headers().get(header::IF_NONE_MATCH).is_some_and(|v| v.as_bytes() == tag.as_bytes()) {
        return (StatusCode::NOT_MODIFIED, headers).into_response();
    }
    (StatusCode::OK, headers, *content).into_response()
}

fn safe(policy: &'static str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers
}

/// A page that says one thing.
pub(super) fn message(status: StatusCode, title: &str, text: &str) -> Response<Body> {
    let (title, text) = (escape(title), escape(text));
    let page = format!(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\"><title>{title}</title>\
         <style>:root{{color-scheme:light dark}}body{{font:1.1rem/1.5 system-ui,sans-serif;max-width:36rem;margin:20vh auto;padding:0 1rem}}</style>\
         <h1>{title}</h1><p>{text}</p>"
    );
    let mut headers = safe(MESSAGE_POLICY);
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    (status, headers, page).into_response()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn get(path: &str) -> Response<Body> {
        asset(Request::builder().uri(path).body(Body::empty()).unwrap()).await
    }

    #[tokio::test]
    async fn files_have_types_and_a_strict_policy() {
        for (path, media_type) in [
            ("/", "text/html"),
            ("/app.js", "text/javascript"),
            ("/journal.js", "text/javascript"),
            ("/lock.js", "text/javascript"),
            ("/style.css", "text/css"),
        ] {
            let response = get(path).await;
            assert_eq!(response.status(), StatusCode::OK);
            assert!(response.headers()[header::CONTENT_TYPE].to_str().unwrap().starts_with(media_type), "{path}");
            assert!(
                response.headers()[header::CONTENT_SECURITY_POLICY].to_str().unwrap().starts_with("default-src 'self'")
            );
        }
        assert_eq!(get("/../token").await.status(), StatusCode::NOT_FOUND);
    }

    #[test]
    fn the_page_needs_nothing_that_its_policy_forbids() {
        let page = FILES[0].2;
        assert!(
            !page.contains("<style") && !page.contains(" style=") && !page.contains("onclick="),
            "inline code and styles are not allowed"
        );
    }

    #[test]
    fn text_is_shown_not_interpreted() {
        assert_eq!(escape("<script>\"&\""), "&lt;script&gt;&quot;&amp;&quot;");
    }
}
