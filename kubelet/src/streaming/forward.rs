//! Port-forward: connections of a client to ports inside a pod's network namespace.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};

use super::spdy::{Connection, Incoming};
use super::{tunnel, upgrade};

/// A connection to a port of the same machine stands at once or not at all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Between the two streams of a pair.
const PAIR_TIMEOUT: Duration = Duration::from_secs(30);
/// Half-made pairs at once.
const MAX_HALF_PAIRS: usize = 256;
/// Ports of one WebSocket without a tunnel.
const MAX_PORTS: usize = 64;
/// Copy buffer.
const COPY_BYTES: usize = 32 << 10;
/// Messages on their way.
const MESSAGES_BUFFERED: usize = 16;

const SPDY_PROTOCOLS: [&str; 1] = ["portforward.k8s.io"];
/// The tunnel that kubectl uses, then the channel protocols.
const WEBSOCKET_PROTOCOLS: [&str; 3] = ["SPDY/3.1+portforward.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io"];

/// Connects to a port on the loopback address of a network namespace (`None`: the node's own).
///
/// # Errors
/// When the namespace cannot be entered or nobody listens.
pub async fn connect_in(namespace: Option<&Path>, port: u16) -> io::Result<TcpStream> {
    let namespace = namespace.map(Path::to_owned);
    let (sender, receiver) = oneshot::channel();
    // A thread of its own: it changes its network namespace and must not be used for anything else afterwards. A socket
    // stays in the namespace in which it was made.
    std::thread::Builder::new().name("connect".into()).spawn(move || {
        // Nobody waits any more: the client is gone, and so may the connection be.
        let _told = sender.send(connect(namespace, port));
    })?;
    let stream = receiver.await.map_err(io::Error::other)??;
    stream.set_nonblocking(true)?;
    TcpStream::from_std(stream)
}

fn connect(namespace: Option<PathBuf>, port: u16) -> io::Result<std::net::TcpStream> {
    if let Some(path) = namespace {
        let handle = File::open(path)?;
        nix::sched::setns(&handle, nix::sched::CloneFlags::CLONE_NEWNET)?;
    }
    let four = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let six = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    std::net::TcpStream::connect_timeout(&four, CONNECT_TIMEOUT)
        .or_else(|error| std::net::TcpStream::connect_timeout(&six, CONNECT_TIMEOUT).map_err(|_| error))
}

/// Serves a request that wants SPDY.
pub(crate) fn serve_spdy(mut request: axum::extract::Request, namespace: Option<PathBuf>) -> Response {
    let Ok(protocol) = upgrade::negotiate(request.headers(), &SPDY_PROTOCOLS) else {
        return upgrade::no_protocol(&SPDY_PROTOCOLS);
    };
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgrade.await {
            Ok(upgraded) => carry_spdy(TokioIo::new(upgraded), namespace).await,
            Err(error) => tracing::debug!(%error, "cannot upgrade to SPDY"),
        }
    });
    upgrade::switching(protocol)
}

/// Serves a request that wants WebSocket: SPDY in a tunnel, or the ports of the query as channels.
pub(crate) async fn serve_websocket(
    request: axum::extract::Request,
    namespace: Option<PathBuf>,
    ports: Vec<u16>,
) -> Response {
    let (mut parts, _) = request.into_parts();
    let upgrade = match WebSocketUpgrade::from_request_parts(&mut parts, &()).await {
        Ok(upgrade) => upgrade.protocols(WEBSOCKET_PROTOCOLS),
        Err(refused) => return refused.into_response(),
    };
    let chosen = upgrade.selected_protocol().and_then(|name| name.to_str().ok()).unwrap_or_default().to_owned();
    if chosen.starts_with("SPDY/3.1+") {
        return upgrade.on_upgrade(move |socket| carry_spdy(tunnel::open(socket), namespace));
    }
    if ports.is_empty() || ports.len() > MAX_PORTS {
        return (
            http::StatusCode::BAD_REQUEST,
            format!("query parameter \"port\" is required, at most {MAX_PORTS} times\n"),
        )
            .into_response();
    }
    upgrade.on_upgrade(move |socket| carry_channels(socket, chosen.contains("base64"), namespace, ports))
}

/// Streams come in pairs with the same request ID: one for data, one for errors.
async fn carry_spdy(io: impl AsyncRead + AsyncWrite + Send + 'static, namespace: Option<PathBuf>) {
    let mut connection = Connection::new(io);
    let mut halves: HashMap<String, (Incoming, tokio::time::Instant)> = HashMap::new();
    let mut pairs = tokio::task::JoinSet::new();
    loop {
        let stream = tokio::select! {
            stream = connection.accept() => stream,
            Some(_) = pairs.join_next() => continue,
        };
        let Some(stream) = stream else { break };
        let now = tokio::time::Instant::now();
        halves.retain(|_, (_, since)| now - *since < PAIR_TIMEOUT);
        // Elder clients send no request ID, but a port only once at a time.
        let key = stream.header("requestid").or_else(|| stream.header("port")).unwrap_or_default().to_owned();
        match halves.remove(&key) {
            None => {
                if halves.len() < MAX_HALF_PAIRS {
                    halves.insert(key, (stream, now));
                } else if stream.handle.reset().await.is_err() {
                    break;
                }
            }
            Some((other, _)) => {
                let (data, error) =
                    if stream.header("streamtype") == Some("data") { (stream, other) } else { (other, stream) };
                pairs.spawn(carry_pair(data, error, namespace.clone()));
            }
        }
    }
}

async fn carry_pair(data: Incoming, error: Incoming, namespace: Option<PathBuf>) {
    let port = data.header("port").and_then(|port| port.parse::<u16>().ok()).filter(|port| *port > 0);
    let outcome = match port {
        Some(port) => match connect_in(namespace.as_deref(), port).await {
            Ok(socket) => {
                carry(socket, data).await;
                Ok(())
            }
            Err(reason) => Err(format!("failed to connect to localhost:{port} inside the pod: {reason}")),
        },
        None => Err("the stream names no port".to_owned()),
    };
    let told = match outcome {
        Ok(()) => error.handle.close().await,
        Err(message) => match error.handle.send(Bytes::from(message)).await {
            Ok(()) => error.handle.close().await,
            gone => gone,
        },
    };
    if told.is_err() {
        tracing::debug!("client of a port-forward is gone");
    }
}

async fn carry(socket: TcpStream, mut data: Incoming) {
    let (mut reader, mut writer) = socket.into_split();
    let handle = data.handle.clone();
    let to_pod = async {
        while let Some(bytes) = data.data.recv().await {
            writer.write_all(&bytes).await?;
        }
        writer.shutdown().await
    };
    let to_client = async {
        let mut buffer = BytesMut::with_capacity(COPY_BYTES);
        while reader.read_buf(&mut buffer).await? > 0 {
            handle.send(buffer.split().freeze()).await?;
            buffer.reserve(COPY_BYTES);
        }
        handle.close().await
    };
    // Each direction ends by itself; an error in one ends both, as the connection is broken.
    if let Err(error) = tokio::try_join!(to_pod, to_client) {
        tracing::debug!(%error, "forwarded connection broke");
        if handle.reset().await.is_err() {
            tracing::debug!("client of a port-forward is gone");
        }
    }
}

/// Two channels for each port, data and error, each of which begins with the port in two bytes.
async fn carry_channels(socket: WebSocket, base64: bool, namespace: Option<PathBuf>, ports: Vec<u16>) {
    let (mut sink, mut source) = socket.split();
    let (out, mut outgoing) = mpsc::channel::<(u8, Bytes)>(MESSAGES_BUFFERED);
    let mut inputs = Vec::new();
    let mut tasks = tokio::task::JoinSet::new();
    for (index, port) in ports.into_iter().enumerate() {
        let channel = u8::try_from(index * 2).unwrap_or(u8::MAX);
        let (input, received) = mpsc::channel(MESSAGES_BUFFERED);
        inputs.push(input);
        tasks.spawn(carry_port(channel, port, namespace.clone(), received, out.clone()));
    }
    drop(out);
    let writing = async {
        while let Some((channel, bytes)) = outgoing.recv().await {
            let message = if base64 {
                Message::Text(format!("{channel}{}", STANDARD.encode(&bytes)).into())
            } else {
                let mut message = BytesMut::with_capacity(bytes.len() + 1);
                message.put_u8(channel);
                message.put_slice(&bytes);
                Message::Binary(message.freeze())
            };
            sink.send(message).await?;
        }
        sink.send(Message::Close(None)).await
    };
    let reading = async {
        while let Some(Ok(message)) = source.next().await {
            let bytes = match message {
                Message::Binary(bytes) => bytes,
                Message::Text(text) => Bytes::copy_from_slice(text.as_bytes()),
                Message::Close(_) => break,
                Message::Ping(_) | Message::Pong(_) => continue,
            };
            let Some((first, rest)) = bytes.split_first() else { continue };
            let (channel, content) = if base64 {
                let Ok(content) = STANDARD.decode(rest) else { break };
                (first.wrapping_sub(b'0'), Bytes::from(content))
            } else {
                (*first, bytes.slice(1..))
            };
            // Nothing comes on error channels.
            if channel % 2 == 0
                && let Some(input) = inputs.get(usize::from(channel / 2))
                && input.send(content).await.is_err()
            {
                tracing::debug!(channel, "data for a forwarded connection that has ended");
            }
        }
    };
    tokio::select! {
        written = writing => if let Err(error) = written {
            tracing::debug!(%error, "client of a port-forward is gone");
        },
        () = reading => {}
    }
}

async fn carry_port(
    channel: u8,
    port: u16,
    namespace: Option<PathBuf>,
    mut input: mpsc::Receiver<Bytes>,
    out: mpsc::Sender<(u8, Bytes)>,
) -> Result<(), mpsc::error::SendError<(u8, Bytes)>> {
    for channel in [channel, channel + 1] {
        out.send((channel, Bytes::copy_from_slice(&port.to_le_bytes()))).await?;
    }
    let socket = match connect_in(namespace.as_deref(), port).await {
        Ok(socket) => socket,
        Err(reason) => {
            let message = format!("failed to connect to localhost:{port} inside the pod: {reason}");
            return out.send((channel + 1, Bytes::from(message))).await;
        }
    };
    let (mut reader, mut writer) = socket.into_split();
    let to_pod = async {
        while let Some(bytes) = input.recv().await {
            writer.write_all(&bytes).await?;
        }
        writer.shutdown().await
    };
    let to_client = async {
        let mut buffer = BytesMut::with_capacity(COPY_BYTES);
        while reader.read_buf(&mut buffer).await? > 0 {
            out.send((channel, buffer.split().freeze())).await.map_err(io::Error::other)?;
            buffer.reserve(COPY_BYTES);
        }
        Ok(())
    };
    // This protocol cannot say that one direction has ended, so the end of the pod's side is the end.
    let ended = tokio::select! {
        ended = to_client => ended,
        Err(error) = to_pod => Err(error),
    };
    match ended {
        Ok(()) => Ok(()),
        Err(error) => out.send((channel + 1, Bytes::from(error.to_string()))).await,
    }
}
