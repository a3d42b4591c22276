//! The tunnel that lets a server reach this host where it cannot connect by itself (NAT, firewall): a connection that the
//! agent opens to every server, on which the server then is the one that asks. HTTP/2 the other way round, one CONNECT a stream.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use coracle_api::node::{TUNNEL_PATH, TUNNEL_PROTOCOL};
use http::header::{CONNECTION, HOST, UPGRADE};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Empty;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use ipnet::IpNet;
use rustls::ClientConfig;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use super::balancer;
use super::client::server_name;

/// Pause before a tunnel is opened again.
const RETRY: Duration = Duration::from_secs(2);
/// How often each end asks whether the other is there, and how long an answer may take.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Streams of one tunnel at once.
const STREAMS: u32 = 1024;
/// Bytes under way of one stream and of all.
const WINDOW_BYTES: u32 = 1 << 20;
/// Time for a connection on this host.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Keeps a tunnel to each server until dropped. Servers reach what `allowed` holds: this node and its pods.
pub(super) async fn keep(mut servers: watch::Receiver<Vec<String>>, tls: Arc<ClientConfig>, allowed: Vec<IpNet>) {
    let allowed: Arc<[IpNet]> = allowed.into();
    loop {
        let mut tunnels = JoinSet::new();
        for server in servers.borrow_and_update().clone() {
            tunnels.spawn(hold(server, tls.clone(), allowed.clone()));
        }
        // A change cuts the tunnels to all servers for a moment; connections without one are direct meanwhile.
        if servers.changed().await.is_err() {
            return;
        }
    }
}

async fn hold(server: String, tls: Arc<ClientConfig>, allowed: Arc<[IpNet]>) {
    loop {
        match serve(&server, tls.clone(), allowed.clone()).await {
            Ok(()) => tracing::debug!(%server, "the tunnel was closed"),
            Err(error) => tracing::debug!(%server, error = format!("{error:#}"), "no tunnel to the server"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn serve(server: &str, tls: Arc<ClientConfig>, allowed: Arc<[IpNet]>) -> anyhow::Result<()> {
    let stream = balancer::connect(server).await.context("connect")?;
    let stream = TlsConnector::from(tls).connect(server_name(), stream).await.context("TLS")?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection.with_upgrades());
    let request = Request::get(TUNNEL_PATH)
        .header(HOST, "kubernetes")
        .header(CONNECTION, "Upgrade")
        .header(UPGRADE, TUNNEL_PROTOCOL)
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        driver.abort();
        bail!("the server answers {}", response.status());
    }
    let stream = hyper::upgrade::on(response).await.context("take the connection over")?;
    let service = hyper::service::service_fn(move |request| {
        let allowed = allowed.clone();
        async move { Ok::<_, Infallible>(answer(request, &allowed).await) }
    });
    tracing::info!(server, "the server can reach this node through a tunnel");
    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .max_concurrent_streams(STREAMS)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .serve_connection(stream, service)
        .await?;
    Ok(())
}

/// Connects to what the server asks for.
async fn answer(mut request: Request<hyper::body::Incoming>, allowed: &[IpNet]) -> Response<Empty<Bytes>> {
    let status = |status: StatusCode| {
        let mut response = Response::new(Empty::new());
        *response.status_mut() = status;
        response
    };
    let target = request.uri().authority().and_then(|target| target.as_str().parse::<SocketAddr>().ok());
    let target = target.filter(|target| allowed.iter().any(|range| range.contains(&target.ip())));
    let (Some(target), &Method::CONNECT) = (target, request.method()) else { return status(StatusCode::FORBIDDEN) };
    let mut near = match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(target)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(%target, %error, "a connection through the tunnel");
            return status(StatusCode::BAD_GATEWAY);
        }
        Err(_) => return status(StatusCode::GATEWAY_TIMEOUT),
    };
    let far = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let far = match far.await {
            Ok(far) => far,
            Err(error) => return tracing::debug!(%error, "a stream of the tunnel"),
        };
        if let Err(error) = near.set_nodelay(true) {
            tracing::debug!(%error, "set nodelay");
        }
        if let Err(error) = tokio::io::copy_bidirectional(&mut near, &mut TokioIo::new(far)).await {
            tracing::debug!(%target, %error, "a connection through the tunnel ended");
        }
    });
    status(StatusCode::OK)
}
