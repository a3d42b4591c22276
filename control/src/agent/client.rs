//! The node as a client of the API: TLS that trusts the cluster's authority alone, and shows the node's certificate.

use std::sync::Arc;

use anyhow::Context;
use coracle_kubelet::certificates::NodeCertificate;
use http::Uri;
use hyper_rustls::{FixedServerNameResolver, HttpsConnectorBuilder};
use hyper_util::rt::TokioExecutor;
use kube::Client;
use kube::client::ConfigExt;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tower::ServiceBuilder;

/// The name that every server's certificate has. It is checked in place of the address, which may be a forwarded one: only
/// servers get it from the cluster's authority.
pub(super) fn server_name() -> ServerName<'static> {
    ServerName::try_from("kubernetes").expect("it is a name")
}

/// TLS to servers of the authority, with the certificate that the node has at the time, if any.
pub(super) fn tls(authority_pem: &str, certificate: Arc<NodeCertificate>) -> anyhow::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(authority_pem.as_bytes()) {
        roots.add(certificate.context("read the authority's certificate")?).context("trust the authority")?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(Arc::new(builder.with_root_certificates(roots).with_client_cert_resolver(certificate)))
}

/// A client of the API behind `url`; `token` is shown where the node has no certificate yet.
pub(super) fn client(url: &Uri, tls: &ClientConfig, token: Option<&str>) -> anyhow::Result<Client> {
    let mut config = kube::Config::new(url.clone());
    config.auth_info.token = token.map(Into::into);
    let connector = HttpsConnectorBuilder::new()
        .with_tls_config(tls.clone())
        .https_only()
        .with_server_name_resolver(FixedServerNameResolver::new(server_name()))
        .enable_http1()
        .build();
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .map_err(tower::BoxError::from)
        .service(hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build(connector));
    Ok(Client::new(service, config.default_namespace))
}
