//! The certificate that a machine shows as a relay.

use std::{path::Path, sync::Arc};

use clan_relay::hash_of;
use clan_types::CertificateHash;
use rcgen::{CertificateParams, KeyPair, SerialNumber, date_time_ymd};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

use crate::NodeError;

/// DER of an Ed25519 private key up to the key itself (RFC 8410 section 7).
const PKCS8: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

/// A self-signed certificate and its key. Nothing in it varies but the key, so the key alone is kept.
pub(crate) struct Certificate {
    der: CertificateDer<'static>,
    key: Zeroizing<Vec<u8>>,
}

impl Certificate {
    /// The certificate of the key in `dir`, which is made at the first time.
    pub(crate) fn load_or_create(dir: &Path) -> Result<Self, NodeError> {
        let seed = clan_store::SecretFile::load_or_create(&dir.join("relay.key"))?;
        Self::of(seed.expose()).map_err(|e| NodeError::network("the relay's certificate", e))
    }

    fn of(seed: &[u8; 32]) -> Result<Self, rcgen::Error> {
        let key = Zeroizing::new([PKCS8.as_slice(), seed].concat());
        let pair =
            KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(key.as_slice()), &rcgen::PKCS_ED25519)?;
        let mut params = CertificateParams::new(vec!["relay.invalid".to_owned()])?;
        params.serial_number = Some(SerialNumber::from(1u64));
        params.distinguished_name = rcgen::DistinguishedName::new();
        // Its hash is what is trusted, and only while the ledger says so.
        params.not_before = date_time_ymd(2026, 1, 1);
        params.not_after = date_time_ymd(2126, 1, 1);
        Ok(Self { der: params.self_signed(&pair)?.der().clone(), key })
    }

    /// What others know it by.
    pub(crate) fn hash(&self) -> CertificateHash {
        hash_of(&self.der)
    }

    /// TLS as a relay speaks it.
    pub(crate) fn tls(&self) -> Result<rustls::ServerConfig, rustls::Error> {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.to_vec()));
        rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(vec![self.der.clone()], key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_one_certificate() {
        let of = |n| Certificate::of(&[n; 32]).unwrap();
        assert_eq!(of(1).hash(), of(1).hash());
        assert_ne!(of(1).hash(), of(2).hash());
        of(1).tls().unwrap();
    }

    #[test]
    fn the_key_outlives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let first = Certificate::load_or_create(dir.path()).unwrap().hash();
        assert_eq!(Certificate::load_or_create(dir.path()).unwrap().hash(), first);
    }
}
