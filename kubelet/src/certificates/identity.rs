//! A certificate and its key, exchanged while TLS goes on.

use std::sync::Arc;

use parking_lot::RwLock;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

/// What is shown to clients or to servers; connections made from now on see the latest. Without one, a server refuses the
/// handshake and a client shows none.
#[derive(Debug, Default)]
pub struct NodeCertificate(RwLock<Option<Arc<CertifiedKey>>>);

impl NodeCertificate {
    /// A certificate chain and key, PEM.
    ///
    /// # Errors
    /// When one is malformed or they do not belong together.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Arc<Self>, String> {
        let this = Self::default();
        this.set(chain, key)?;
        Ok(Arc::new(this))
    }

    /// Exchanges certificate and key.
    ///
    /// # Errors
    /// As [`Self::from_pem`]; what was there stays.
    pub fn set(&self, chain: &[u8], key: &[u8]) -> Result<(), String> {
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(chain)
            .collect::<Result<_, _>>()
            .map_err(|error| format!("serving certificate: {error}"))?;
        if certificates.is_empty() {
            return Err("serving certificate holds no certificate".into());
        }
        // The parser's message could quote the key.
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| "serving key is not a PEM private key".to_owned())?;
        let provider = rustls::crypto::ring::default_provider();
        let pair = CertifiedKey::from_der(certificates, key, &provider).map_err(|error| error.to_string())?;
        *self.0.write() = Some(Arc::new(pair));
        Ok(())
    }

    /// Whether there is one.
    pub fn is_set(&self) -> bool {
        self.0.read().is_some()
    }
}

impl ResolvesServerCert for NodeCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.read().clone()
    }
}

impl ResolvesClientCert for NodeCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.read().clone()
    }

    fn has_certs(&self) -> bool {
        self.is_set()
    }
}
