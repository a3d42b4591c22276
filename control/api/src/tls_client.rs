//! TLS as a client: to aggregated APIs, webhooks and token issuers with their CA, to pods behind a proxy without one.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;

use crate::pki::Identity;

/// Trusts one CA (PEM), or whom the host trusts when there is none; shows a client certificate when there is one. A server that shows
/// one of the given certificates itself is trusted too, whether that calls itself a CA or not, as Go's clients have it.
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
    let given = CertificateDer::pem_slice_iter(ca_pem).collect::<Result<Vec<_>, _>>().map_err(other)?;
    for cert in &given {
        roots.add(cert.clone()).map_err(other)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let authorities =
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build().map_err(other)?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Given { authorities, given }));
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

/// Authorities, and servers' own certificates among them.
#[derive(Debug)]
struct Given {
    authorities: Arc<WebPkiServerVerifier>,
    given: Vec<CertificateDer<'static>>,
}

impl ServerCertVerifier for Given {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.authorities.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        if verified.is_ok() || !self.given.contains(end_entity) {
            return verified;
        }
        let (_, cert) = X509Certificate::from_der(end_entity).map_err(|_| CertificateError::BadEncoding)?;
        let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        if seconds < cert.validity().not_before.timestamp() {
            return Err(CertificateError::NotValidYet.into());
        }
        if seconds > cert.validity().not_after.timestamp() {
            return Err(CertificateError::Expired.into());
        }
        verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.authorities.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.authorities.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.authorities.supported_verify_schemes()
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_given_certificate_may_be_the_servers_own() {
        let cert = |ca| {
            let key = rcgen::KeyPair::generate().expect("a key");
            let mut params = rcgen::CertificateParams::new(vec!["here".into()]).expect("parameters");
            params.is_ca = ca;
            params.not_before = rcgen::date_time_ymd(2020, 1, 1);
            params.not_after = rcgen::date_time_ymd(2040, 1, 1);
            params.self_signed(&key).expect("a certificate").der().clone()
        };
        let own = cert(rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained));
        let mut roots = rustls::RootCertStore::empty();
        roots.add(own.clone()).expect("a root");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let authorities =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().expect("roots");
        let verifier = Given { authorities, given: vec![own.clone()] };
        let check = |cert: &CertificateDer<'_>, name: &'static str, year: i32| {
            let now = std::time::Duration::from_secs(rcgen::date_time_ymd(year, 6, 1).unix_timestamp().unsigned_abs());
            let name = ServerName::try_from(name).expect("a name");
            verifier.verify_server_cert(cert, &[], &name, &[], UnixTime::since_unix_epoch(now)).map(drop)
        };
        check(&own, "here", 2026).expect("the given certificate");
        check(&own, "there", 2026).expect_err("another name");
        check(&own, "here", 2041).expect_err("too late");
        check(&own, "here", 2019).expect_err("too early");
        check(&cert(rcgen::IsCa::NoCa), "here", 2026).expect_err("another certificate");
    }
}
