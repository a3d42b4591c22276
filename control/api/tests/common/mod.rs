//! A server of its own for each test: embedded store in a temporary folder, TLS on loopback.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;

use coracle_api::node::{NodeConnector, NodeStream};
use coracle_api::status::Status;
use coracle_api::{ApiServer, Config};
use coracle_store::{Embedded, EmbeddedOptions};
use hyper_util::rt::TokioIo;
use tokio_util::sync::{CancellationToken, DropGuard};

#[allow(dead_code, reason = "not every test needs all of it")]
pub(crate) struct Server {
    pub api: Arc<ApiServer>,
    pub url: String,
    pub kubeconfig: PathBuf,
    _stop: DropGuard,
    _folder: tempfile::TempDir,
}

/// A kubelet that tells which path it was asked for, and echoes what comes over an upgraded connection.
struct EchoNode;

#[async_trait::async_trait]
impl NodeConnector for EchoNode {
    async fn connect(&self, _node: &str) -> Result<Box<dyn NodeStream>, Status> {
        let (ours, theirs) = tokio::io::duplex(4096);
        tokio::spawn(async move {
            let service = hyper::service::service_fn(|mut request: http::Request<hyper::body::Incoming>| async move {
                let path = request.uri().to_string();
                if path == "/stats/summary" {
                    return Ok(http::Response::new(summary()));
                }
                if !request.headers().contains_key("upgrade") {
                    return Ok::<_, std::convert::Infallible>(http::Response::new(path));
                }
                let upgraded = hyper::upgrade::on(&mut request);
                tokio::spawn(async move {
                    let stream = TokioIo::new(upgraded.await.expect("upgraded"));
                    let (mut read, mut write) = tokio::io::split(stream);
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                });
                let mut response = http::Response::new(String::new());
                *response.status_mut() = http::StatusCode::SWITCHING_PROTOCOLS;
                response.headers_mut().insert("upgrade", http::HeaderValue::from_static("SPDY/3.1"));
                response.headers_mut().insert("connection", http::HeaderValue::from_static("Upgrade"));
                Ok(response)
            });
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(theirs), service);
            let _ = connection.with_upgrades().await;
        });
        Ok(Box::new(ours))
    }
}

/// Names and uids of pods that the kubelet knows of.
pub(crate) static USAGE_UIDS: std::sync::Mutex<Vec<(String, String)>> = std::sync::Mutex::new(Vec::new());

/// What the kubelet says about usage.
fn summary() -> String {
    let usage = |cpu: u64, memory: u64| {
        serde_json::json!({"name": "c", "cpu": {"time": "2026-01-01T00:00:00Z", "usageNanoCores": cpu},
            "memory": {"workingSetBytes": memory}})
    };
    let known = USAGE_UIDS.lock().expect("no panic");
    let pods = known.iter().map(|(name, uid)| {
        serde_json::json!({"podRef": {"name": name, "namespace": "default", "uid": uid}, "containers": [usage(1_000_000, 1 << 20)]})
    });
    serde_json::json!({"node": usage(250_000_000, 2 << 20), "pods": pods.collect::<Vec<_>>()}).to_string()
}

impl Server {
    #[allow(dead_code, reason = "some tests change the settings")]
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub(crate) async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let store = Embedded::open(folder.path().join("store"), EmbeddedOptions::default()).expect("a store");
        let mut config = Config {
            tls_dir: folder.path().join("tls"),
            tls_sans: Vec::new(),
            service_cidr: "10.43.0.0/16".into(),
            cluster_cidr: "10.42.0.0/16".into(),
            node_ports: (30000, 32767),
            cluster_domain: "cluster.local".into(),
            dns_ips: vec![Ipv4Addr::new(10, 43, 0, 10).into()],
            advertise: address,
            shared_store: false,
            nodes: Arc::new(EchoNode),
            authn: Default::default(),
            // There are no controllers here that would make the service accounts.
            disabled_admission: vec!["ServiceAccount".into()],
        };
        change(&mut config);
        let stop = CancellationToken::new();
        let api = ApiServer::new(config, Arc::new(store), stop.clone()).await.expect("a server");
        let url = format!("https://{address}");
        let kubeconfig = folder.path().join("kubeconfig");
        api.write_admin_kubeconfig(&kubeconfig, &url).expect("a kubeconfig");
        let serving = api.clone();
        tokio::spawn(async move { serving.serve_tls(listener).await });
        Self { api, url, kubeconfig, _stop: stop.drop_guard(), _folder: folder }
    }

    /// A client over TLS with the administrator's certificate.
    #[allow(dead_code, reason = "kubectl needs the kubeconfig alone")]
    pub(crate) async fn client(&self) -> kube::Client {
        self.client_with(|_| {}).await
    }

    #[allow(dead_code, reason = "kubectl needs the kubeconfig alone")]
    pub(crate) async fn client_with(&self, change: impl FnOnce(&mut kube::Config)) -> kube::Client {
        let text = kube::config::Kubeconfig::read_from(&self.kubeconfig).expect("a kubeconfig");
        let mut config = kube::Config::from_custom_kubeconfig(text, &Default::default()).await.expect("a config");
        // What the server answers is what a test wants to see.
        config.default_retry = false;
        change(&mut config);
        kube::Client::try_from(config).expect("a client")
    }
}

/// An HTTPS server on loopback with a certificate for these names; it asks clients for a certificate of `client_ca` when
/// there is one. `answer` makes JSON out of the server's URL and the request. Its URL and its CA.
#[allow(dead_code, reason = "not every test has one")]
pub(crate) async fn https(
    names: &[&str],
    client_ca: Option<&str>,
    answer: impl Fn(&str, &http::request::Parts) -> serde_json::Value + Send + Sync + 'static,
) -> (String, String) {
    use rustls_pki_types::pem::PemObject as _;
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let signed = rcgen::generate_simple_self_signed(names).expect("a certificate");
    let key = rustls_pki_types::PrivateKeyDer::try_from(signed.signing_key.serialize_der()).expect("a key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("versions");
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(pem) => {
            let mut roots = rustls::RootCertStore::empty();
            roots
                .add(rustls_pki_types::CertificateDer::from_pem_slice(pem.as_bytes()).expect("a certificate"))
                .expect("a CA");
            let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            builder.with_client_cert_verifier(verifier.build().expect("a verifier"))
        }
    };
    let config = builder.with_single_cert(vec![signed.cert.der().clone()], key).expect("a configuration");
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    let url = format!("https://{}", listener.local_addr().expect("an address"));
    let (answer, base) = (Arc::new(answer), url.clone());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, answer, base) = (acceptor.clone(), answer.clone(), base.clone());
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let service = hyper::service::service_fn(|request: http::Request<hyper::body::Incoming>| {
                    let value = answer(&base, &request.into_parts().0);
                    let mut response = http::Response::new(value.to_string());
                    if value.is_null() {
                        *response.status_mut() = http::StatusCode::NOT_FOUND;
                    }
                    async move { Ok::<_, std::convert::Infallible>(response) }
                });
                let _ =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    (url, signed.cert.pem())
}
