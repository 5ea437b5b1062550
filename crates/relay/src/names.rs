//! Names of relays: how the endpoint finds one, and how it knows that it is the right one.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use clan_types::{CertificateHash, Host, RelayAddr};
use data_encoding::{BASE32_NOPAD, Encoding};
use iroh::{
    RelayUrl,
    dns::{BoxIter, DnsError, DnsResolver, FallbackMode, Resolver, TxtRecordData},
    tls::CaTlsConfig,
};
use rustls::{
    CertificateError, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::sync::watch;

/// No DNS ever answers for it (RFC 6761 section 6.4).
const DOMAIN: &str = ".relay.invalid";
const LOOKUP_LIMIT: Duration = Duration::from_secs(3);

/// The name of a relay inside an endpoint: `https://<certificate's hash>.relay.invalid:<port>/`.
pub fn url_of(relay: &RelayAddr) -> Option<RelayUrl> {
    format!("https://{}:{}/", name_of(&relay.certificate), relay.port).parse().ok()
}

/// The hash by which a certificate is known.
pub fn hash_of(der: &CertificateDer<'_>) -> CertificateHash {
    CertificateHash::from_bytes(*blake3::hash(der).as_bytes())
}

fn name_of(certificate: &CertificateHash) -> String {
    format!("{}{DOMAIN}", LABEL.encode(certificate.as_bytes()).to_ascii_lowercase())
}

/// 52 characters for 32 bytes: a DNS label has room for 63.
const LABEL: Encoding = BASE32_NOPAD;

/// The certificate that a relay's name inside an endpoint is made of.
pub fn certificate_of(url: &RelayUrl) -> Option<CertificateHash> {
    certificate_in(url.host_str()?)
}

fn certificate_in(name: &str) -> Option<CertificateHash> {
    let label = name.trim_end_matches('.').to_ascii_uppercase();
    let label = label.strip_suffix(&DOMAIN.to_ascii_uppercase())?;
    let bytes: [u8; 32] = LABEL.decode(label.as_bytes()).ok()?.try_into().ok()?;
    Some(CertificateHash::from_bytes(bytes))
}

/// Where a relay is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// On this machine: its own address may not be reachable from inside.
    Loopback,
    /// On the base network.
    Host(Host),
}

/// Where the names lead. Clones share what they know.
#[derive(Debug, Clone)]
pub struct Names {
    places: Arc<RwLock<BTreeMap<String, Place>>>,
    /// Who is not answered for now; see [`Names::hold_back`].
    held_back: Arc<watch::Sender<BTreeSet<String>>>,
    system: DnsResolver,
}

impl Default for Names {
    fn default() -> Self {
        // INVARIANT: nobody's servers are asked but those that the computer asks anyway.
        let system = DnsResolver::builder().with_system_defaults().with_fallback_mode(FallbackMode::Never).build();
        Self { places: Arc::default(), held_back: Arc::new(watch::Sender::default()), system }
    }
}

impl Names {
    /// Says where a relay is.
    pub fn set(&self, certificate: &CertificateHash, place: Place) {
        self.places.write().unwrap_or_else(PoisonError::into_inner).insert(name_of(certificate), place);
    }

    /// Says which relays are out of reach: whoever asks for one of them waits until it is not, or until their patience ends.
    ///
    /// The endpoint passes the packets for all relays through one queue, which is emptied while it waits for a relay, but not while
    /// it pauses after one that refused it: so a dead relay must not refuse.
    pub fn hold_back(&self, certificates: &[CertificateHash]) {
        let held: BTreeSet<String> = certificates.iter().map(name_of).collect();
        self.held_back.send_if_modified(|old| {
            let changed = *old != held;
            *old = held;
            changed
        });
    }

    async fn wait_for(&self, name: &str) {
        let name = name.trim_end_matches('.');
        // Fails if nobody can say anything any more, which cannot be while this is here.
        let _ = self.held_back.subscribe().wait_for(|held| !held.contains(name)).await;
    }

    /// For the endpoint.
    pub fn resolver(&self) -> DnsResolver {
        DnsResolver::custom(self.clone())
    }

    fn place(&self, name: &str) -> Option<Place> {
        self.places.read().unwrap_or_else(PoisonError::into_inner).get(name.trim_end_matches('.')).cloned()
    }
}

type Answer<T> = std::pin::Pin<Box<dyn Future<Output = Result<BoxIter<T>, DnsError>> + Send>>;

fn answer<T: Send + 'static>(addresses: Vec<T>) -> Result<BoxIter<T>, DnsError> {
    Ok(Box::new(addresses.into_iter()))
}

impl Resolver for Names {
    fn lookup_ipv4(&self, host: String) -> Answer<Ipv4Addr> {
        let this = self.clone();
        Box::pin(async move {
            this.wait_for(&host).await;
            let all = match this.place(&host) {
                Some(Place::Loopback) => vec![Ipv4Addr::LOCALHOST.into()],
                Some(Place::Host(host)) => match host.ip() {
                    Some(ip) => vec![ip],
                    None => this.system.lookup_ipv4(host.as_str(), LOOKUP_LIMIT).await?.collect(),
                },
                None => Vec::new(),
            };
            answer(all.into_iter().filter_map(|ip| if let IpAddr::V4(ip) = ip { Some(ip) } else { None }).collect())
        })
    }

    fn lookup_ipv6(&self, host: String) -> Answer<Ipv6Addr> {
        let this = self.clone();
        Box::pin(async move {
            this.wait_for(&host).await;
            let all = match this.place(&host) {
                Some(Place::Host(host)) => match host.ip() {
                    Some(ip) => vec![ip],
                    None => this.system.lookup_ipv6(host.as_str(), LOOKUP_LIMIT).await?.collect(),
                },
                Some(Place::Loopback) | None => Vec::new(),
            };
            answer(all.into_iter().filter_map(|ip| if let IpAddr::V6(ip) = ip { Some(ip) } else { None }).collect())
        })
    }

    fn lookup_txt(&self, _host: String) -> Answer<TxtRecordData> {
        Box::pin(async { answer(Vec::new()) })
    }

    fn clear_cache(&self) {
        self.system.clear_cache();
    }

    fn reset(&self) -> Box<dyn Resolver> {
        self.system.reset();
        Box::new(self.clone())
    }
}

/// How the endpoint knows relays: by nothing but the hash in their name.
pub fn verifier() -> CaTlsConfig {
    CaTlsConfig::custom_server_cert_verifier(Arc::new(|provider| {
        Ok::<Arc<dyn ServerCertVerifier>, io::Error>(Arc::new(Verifier { provider, taken: Taken::Named }))
    }))
}

/// Whom to take for the relay that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    /// INVARIANT: whoever holds the key of the certificate whose hash is its name.
    Named,
    /// Whoever holds the key of any certificate: nothing depends on it but that the endpoint meets the same one again.
    Whoever,
}

/// Has whoever answers prove that they hold their certificate's key; which one it may be is what differs.
#[derive(Debug)]
pub(crate) struct Verifier {
    pub(crate) provider: Arc<CryptoProvider>,
    pub(crate) taken: Taken,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let is_it = match self.taken {
            Taken::Named => certificate_in(&server_name.to_str()) == Some(hash_of(end_entity)),
            Taken::Whoever => true,
        };
        if is_it {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_which_certificate_is_right() {
        let hash = CertificateHash::from_bytes([7; 32]);
        let url = url_of(&RelayAddr { host: "nas".parse().unwrap(), port: 4443, certificate: hash }).unwrap();
        assert_eq!(certificate_in(url.host_str().unwrap()), Some(hash));
        assert_eq!(url.port(), Some(4443));
        for other in ["relay.invalid", "example.org", "", "aaaa.relay.invalid", "203.0.113.1"] {
            assert_eq!(certificate_in(other), None, "{other}");
        }
    }

    #[tokio::test]
    async fn names_lead_where_they_were_said_to_and_nowhere_else() {
        let names = Names::default();
        let [here, there, unknown] = [1, 2, 3].map(|n| CertificateHash::from_bytes([n; 32]));
        names.set(&here, Place::Loopback);
        names.set(&there, Place::Host("2001:db8::7".parse().unwrap()));
        let resolver = names.resolver();
        let ask = async |hash| {
            let found = resolver.lookup_ipv4_ipv6(name_of(&hash), LOOKUP_LIMIT).await;
            found.map(|all| all.collect::<Vec<_>>()).unwrap_or_default()
        };
        assert_eq!(ask(here).await, [IpAddr::V4(Ipv4Addr::LOCALHOST)]);
        assert_eq!(ask(there).await, ["2001:db8::7".parse::<IpAddr>().unwrap()]);
        assert!(ask(unknown).await.is_empty());

        names.hold_back(&[there]);
        let (asked, ()) = tokio::join!(ask(there), async {
            tokio::task::yield_now().await;
            names.hold_back(&[]);
        });
        assert_eq!(asked, ["2001:db8::7".parse::<IpAddr>().unwrap()]);
    }
}
