//! How an endpoint finds, recognises and uses a clan's relays.
//!
//! A relay shows a self-signed certificate. Inside an endpoint it has a name that is made of the certificate's hash and
//! that no DNS knows ([`url_of`]): whoever connects to the name checks the certificate against it ([`verifier`]), and
//! [`Names`] says where the name leads. A machine of the clan proves who it is by its key alone; a newcomer also shows a
//! [`token`] made of their invite, or comes for [`words`].

mod names;
pub mod words;

use std::sync::Arc;

use clan_types::{Channel, RelayAddr};
use clan_wire::peer::InviteProof;
use data_encoding::BASE64URL_NOPAD;
use iroh::{
    Endpoint, NetReportConfig, RelayConfig, RelayMap, RelayMode, RelayUrl,
    endpoint::{Builder, PortmapperConfig},
};
use iroh_relay::RelayQuicConfig;

pub use names::{Names, Place, certificate_of, hash_of, url_of, verifier};

/// INVARIANT: an endpoint uses no more relays than this.
pub const MAX_RELAYS: usize = 8;
/// INVARIANT: a longer token is not decoded.
const MAX_TOKEN: usize = 256;

/// Makes the endpoint one that can use relays of a clan, and asks nobody else anything: no public relay, name server or
/// router.
pub fn prepare(builder: Builder, names: &Names) -> Builder {
    let mut measure = NetReportConfig::default();
    measure.captive_portal_check = false;
    builder
        .relay_mode(RelayMode::Custom(RelayMap::empty()))
        .dns_resolver(names.resolver())
        .ca_tls_config(verifier())
        .net_report_config(measure)
        .portmapper_config(PortmapperConfig::Disabled)
}

/// Makes the endpoint use `relays`, showing them `proof` where it is not a machine of the clan. Gives their names, for
/// dialling others through them.
pub async fn introduce(
    endpoint: &Endpoint,
    names: &Names,
    relays: &[RelayAddr],
    proof: Option<&InviteProof>,
) -> Vec<RelayUrl> {
    let mut urls = Vec::new();
    for relay in relays.iter().take(MAX_RELAYS) {
        let Some(url) = url_of(relay) else { continue };
        names.set(&relay.certificate, Place::Host(relay.host.clone()));
        insert(endpoint, url.clone(), relay, false, proof.and_then(token)).await;
        urls.push(url);
    }
    urls
}

/// Makes the endpoint of a newcomer who was told words use a relay, for finding whoever waits for them. Gives the relay's name.
pub async fn introduce_for_words(
    endpoint: &Endpoint,
    names: &Names,
    relay: &RelayAddr,
    channel: Channel,
) -> Option<RelayUrl> {
    let url = url_of(relay)?;
    names.set(&relay.certificate, Place::Host(relay.host.clone()));
    insert(endpoint, url.clone(), relay, false, Some(words::pass(channel))).await;
    Some(url)
}

/// Makes the endpoint use one relay, or use it otherwise than before; `own` is that of this machine. A newcomer shows a token.
pub async fn insert(endpoint: &Endpoint, url: RelayUrl, relay: &RelayAddr, own: bool, token: Option<String>) {
    // A machine's own relay would tell it that it is at the loopback address.
    let discovery = (!own).then(|| RelayQuicConfig::new(relay.port));
    let config = RelayConfig::new(url.clone(), discovery);
    let config = match token {
        Some(token) => config.with_auth_token(token),
        None => config,
    };
    endpoint.insert_relay(url, Arc::new(config)).await;
}

/// What a newcomer shows to a relay.
pub fn token(proof: &InviteProof) -> Option<String> {
    postcard::to_allocvec(proof).ok().map(|bytes| BASE64URL_NOPAD.encode(&bytes))
}

/// The proof in a token.
pub fn proof_in(token: &str) -> Option<InviteProof> {
    let token = Some(token).filter(|token| token.len() <= MAX_TOKEN)?;
    postcard::from_bytes(&BASE64URL_NOPAD.decode(token.as_bytes()).ok()?).ok()
}
