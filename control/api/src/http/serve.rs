//! Connections: accept, TLS, HTTP/1.1 and HTTP/2, one task each.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use rustls::server::WebPkiClientVerifier;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::ReqBody;
use crate::pki::{Identity, certificate_user};
use crate::server::{ApiServer, Caller};

/// Most connections at once; more wait in the kernel's queue.
const CONNECTIONS: usize = 20_000;
/// Time for a TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Time for the head of a request over HTTP/1 (slow clients). It runs while a connection is idle, too: no shorter than clients
/// keep connections for their next request.
const HEADER_READ: Duration = Duration::from_secs(90);
/// Time between signs of life of the other end of an HTTP/2 connection.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// Largest head of a request, in bytes.
const HEADER_BYTES: usize = 64 << 10;
/// Time that open requests get when the server stops.
const DRAIN: Duration = Duration::from_secs(5);
/// Streams of one HTTP/2 connection.
const STREAMS: u32 = 250;

/// TLS settings of the listener: our certificate, and clients may show one of our CA.
pub(crate) fn tls(identity: &Identity, ca_pem: &str) -> Result<rustls::ServerConfig, io::Error> {
    use rustls_pki_types::CertificateDer;
    use rustls_pki_types::pem::PemObject as _;
    fn other(error: impl Into<super::BoxError>) -> io::Error {
        io::Error::other(error)
    }
    let mut roots = rustls::RootCertStore::empty();
    for cert in CertificateDer::pem_slice_iter(ca_pem.as_bytes()) {
        roots.add(cert.map_err(other)?).map_err(other)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()
        .map_err(other)?;
    let (certs, key) = identity.rustls().map_err(other)?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(other)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certs, key)
        .map_err(other)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// Accepts until the token is cancelled, then lets open requests end.
pub(crate) async fn serve(
    api: Arc<ApiServer>,
    listener: TcpListener,
    config: rustls::ServerConfig,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let graceful = GracefulShutdown::new();
    loop {
        let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, or the peer is gone already: the next accept tells.
                    tracing::warn!(%error, "accept");
                    tokio::task::yield_now().await;
                    continue;
                }
            },
            () = shutdown.cancelled() => break,
        };
        let (api, acceptor, watcher) = (api.clone(), acceptor.clone(), graceful.watcher());
        tokio::spawn(async move {
            connection(api, acceptor, stream, watcher).await;
            drop(place);
        });
    }
    if tokio::time::timeout(DRAIN, graceful.shutdown()).await.is_err() {
        tracing::info!("requests still open after the time to drain are cut");
    }
    Ok(())
}

async fn connection(
    api: Arc<ApiServer>,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    watcher: hyper_util::server::graceful::Watcher,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "set nodelay");
    }
    let peer = stream.peer_addr().ok();
    let stream = match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%error, ?peer, "TLS handshake"),
        Err(_) => return tracing::debug!(?peer, "TLS handshake took too long"),
    };
    let certificate = stream.get_ref().1.peer_certificates().and_then(|certs| certs.first());
    let caller = Caller::Remote { certificate: certificate.and_then(|der| certificate_user(der)).map(Arc::new), peer };
    let service = service_fn(move |request: http::Request<hyper::body::Incoming>| {
        let (api, caller) = (api.clone(), caller.clone());
        async move { Ok::<_, std::convert::Infallible>(api.respond(caller, request.map(ReqBody::Incoming)).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_READ).max_buf_size(HEADER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(u32::try_from(HEADER_BYTES).expect("a small constant"))
        .keep_alive_interval(Some(KEEP_ALIVE));
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(%error, ?peer, "connection");
    }
}
