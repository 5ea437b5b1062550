//! Four words at a relay: how a newcomer who was told where the relay is, and nothing else, finds the machine that waits for
//! them, and is passed on to it.
//!
//! Nothing that the relay says is believed. It is not recognised by anything, and whoever it names gets one guess at the
//! words, as whoever answers for their first word on a LAN does.

use std::{io, sync::Arc, time::Duration};

use clan_types::{Channel, Host, MachineId, RelayAddr};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, body::Bytes};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

use crate::names::{Taken, Verifier, hash_of};

/// Where a relay answers who waits: `GET /clan/words?channel=77`.
pub const PATH: &str = "/clan/words";
/// INVARIANT: no more machines are named, or heard of.
pub const MAX_MACHINES: usize = 4;
const PARAMETER: &str = "channel=";
const TOKEN: &str = "words-";
const LIMIT: Duration = Duration::from_secs(8);
/// An id takes 52 characters and the end of its line.
const MAX_ANSWER: usize = MAX_MACHINES * 64;

/// Why a relay does not say who waits.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No answer.
    #[error("no relay answers at {place}: {why}")]
    Unreachable {
        /// Host and port.
        place: String,
        /// What went wrong.
        why: String,
    },
    /// It has been asked too often lately, by whomever.
    #[error("the relay has been asked for too many words lately")]
    Busy,
    /// Something else than a relay, or an older one.
    #[error("{0} is no relay that knows of words")]
    NoRelay(String),
}

/// Asks a relay which machines wait for words that begin so. Gives how the relay is recognised from then on, too.
///
/// # Errors
/// [`AskError`]; that nobody waits is none.
pub async fn ask(host: &Host, port: u16, channel: Channel) -> Result<(RelayAddr, Vec<MachineId>), AskError> {
    let place = || format!("{host}, port {port}");
    let unreachable = |why: String| AskError::Unreachable { place: place(), why };
    let asked = timeout(LIMIT, converse(host, port, channel)).await;
    let (relay, status, body) = asked
        .map_err(|_| unreachable(format!("nothing was said within {} s", LIMIT.as_secs())))?
        .map_err(|error| unreachable(error.to_string()))?;
    match status {
        StatusCode::OK => Ok((relay, machines_in(&body).ok_or_else(|| AskError::NoRelay(place()))?)),
        StatusCode::TOO_MANY_REQUESTS => Err(AskError::Busy),
        _ => Err(AskError::NoRelay(place())),
    }
}

async fn converse(host: &Host, port: u16, channel: Channel) -> io::Result<(RelayAddr, StatusCode, Bytes)> {
    let other = |error: &dyn std::fmt::Display| io::Error::other(error.to_string());
    let stream = TcpStream::connect((host.as_str(), port)).await?;
    let name = ServerName::try_from("relay.invalid").map_err(|e| other(&e))?;
    let stream = TlsConnector::from(Arc::new(tls().map_err(|e| other(&e))?)).connect(name, stream).await?;
    let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let certificate = hash_of(shown.ok_or_else(|| io::Error::other("it shows no certificate"))?);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| other(&e))?;
    let asked = async move {
        let request = Request::get(format!("{PATH}?{PARAMETER}{}", channel.number()))
            .header("host", "relay.invalid")
            .body(Empty::<Bytes>::new())
            .map_err(|e| other(&e))?;
        let response = sender.send_request(request).await.map_err(|e| other(&e))?;
        let status = response.status();
        // INVARIANT: whatever answers fills no memory.
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|e| other(&e))?;
        Ok::<_, io::Error>((status, body.to_bytes()))
    };
    // The connection ends once there is nobody to ask.
    let (answer, _) = tokio::join!(asked, connection);
    let (status, body) = answer?;
    Ok((RelayAddr { host: host.clone(), port, certificate }, status, body))
}

/// The channel that is asked for.
pub fn channel_in(query: Option<&str>) -> Option<Channel> {
    Channel::from_number(query?.strip_prefix(PARAMETER)?.parse().ok()?)
}

/// The answer: the machines that wait.
pub fn answer(machines: &[MachineId]) -> String {
    machines.iter().take(MAX_MACHINES).map(|machine| format!("{machine}\n")).collect()
}

/// `None` if it is no such answer.
fn machines_in(body: &[u8]) -> Option<Vec<MachineId>> {
    let lines = std::str::from_utf8(body).ok()?.lines().take(MAX_MACHINES);
    lines.map(|line| line.parse().ok()).collect()
}

/// What whoever comes for words shows to the relay.
pub fn pass(channel: Channel) -> String {
    format!("{TOKEN}{}", channel.number())
}

/// The channel in such a pass.
pub fn pass_in(token: &str) -> Option<Channel> {
    Channel::from_number(token.strip_prefix(TOKEN)?.parse().ok()?)
}

fn tls() -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder =
        ClientConfig::builder_with_provider(provider.clone()).with_protocol_versions(&[&rustls::version::TLS13])?;
    let verifier = Arc::new(Verifier { provider, taken: Taken::Whoever });
    Ok(builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_answers_and_passes_are_read_as_they_were_written() {
        for number in [0, 77, 2047] {
            let channel = Channel::from_number(number).unwrap();
            assert_eq!(channel_in(Some(&format!("channel={number}"))), Some(channel));
            assert_eq!(pass_in(&pass(channel)), Some(channel));
        }
        let machines: Vec<MachineId> = (0..9).map(|n| MachineId::from_bytes([n; 32])).collect();
        assert_eq!(machines_in(answer(&machines).as_bytes()).unwrap(), machines[..MAX_MACHINES]);
        assert!(answer(&machines).len() <= MAX_ANSWER);
        assert_eq!(machines_in(b""), Some(Vec::new()));
    }

    #[test]
    fn anything_else_is_none() {
        for query in [None, Some(""), Some("channel="), Some("channel=2048"), Some("channel=-1"), Some("channel=1&x=2")]
        {
            assert_eq!(channel_in(query), None, "{query:?}");
        }
        for token in ["", "words-", "words-2048", "word-1", "words-1 "] {
            assert_eq!(pass_in(token), None, "{token}");
        }
        assert_eq!(machines_in(b"<html>hello</html>"), None);
        assert_eq!(machines_in(&[0xff; 40]), None);
    }
}
