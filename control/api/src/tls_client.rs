//! TLS as a client: to aggregated APIs, webhooks and token issuers with their CA, to pods behind a proxy without one.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};

use crate::pki::Identity;

/// Trusts one CA (PEM), or whom the host trusts when there is none; shows a client certificate when there is one.
pub(crate) fn trusting(ca_pem: &[u8], identity: Option<&Identity>) -> Result<Arc<ClientConfig>, std::io::Error> {
    use rustls_pki_types::pem::PemObject as _;
    fn other(error: impl Into<crate::http::BoxError>) -> std::io::Error {
        std::io::Error::other(error)
    }
    let mut roots = rustls::RootCertStore::empty();
    if ca_pem.is_empty() {
        // A host may trust some certificates that cannot be read here; the others count.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    }
    for cert in CertificateDer::pem_slice_iter(ca_pem) {
        roots.add(cert.map_err(other)?).map_err(other)?;
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(other)?
        .with_root_certificates(roots);
    with_identity(builder, identity)
}

/// Checks nobody: for backends whose certificates the API does not know, as `proxy` has always had it.
pub fn unverified(identity: Option<&Identity>) -> Result<Arc<ClientConfig>, std::io::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(std::io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider)));
    with_identity(builder, identity)
}

fn with_identity(
    builder: rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>,
    identity: Option<&Identity>,
) -> Result<Arc<ClientConfig>, std::io::Error> {
    let Some(identity) = identity else { return Ok(Arc::new(builder.with_no_client_auth())) };
    let (certs, key) = identity.rustls().map_err(std::io::Error::other)?;
    Ok(Arc::new(builder.with_client_auth_cert(certs, key).map_err(std::io::Error::other)?))
}

#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
