//! The TLS side: our serving certificate, and clients' certificates checked where they bring one.

use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

/// A TLS configuration from PEM texts: certificate chain, key, and the CA of clients (none: no client certificates).
///
/// # Errors
/// When one of them is malformed or they do not fit.
pub(super) fn config(certificate: &[u8], key: &[u8], client_ca: Option<&[u8]>) -> Result<ServerConfig, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let certificates = |pem: &[u8], what: &str| -> Result<Vec<CertificateDer<'static>>, String> {
        let list = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| format!("{what}: {error}"))?;
        if list.is_empty() { Err(format!("{what} holds no certificate")) } else { Ok(list) }
    };
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let builder = match client_ca {
        Some(pem) => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(pem, "client CA")? {
                roots.add(certificate).map_err(|error| format!("client CA: {error}"))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .allow_unauthenticated()
                .build()
                .map_err(|error| format!("client CA: {error}"))?;
            builder.with_client_cert_verifier(verifier)
        }
        None => builder.with_no_client_auth(),
    };
    // The parser's message could quote the key.
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| "serving key is not a PEM private key".to_owned())?;
    let mut config = builder
        .with_single_cert(certificates(certificate, "serving certificate")?, key)
        .map_err(|error| error.to_string())?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}
