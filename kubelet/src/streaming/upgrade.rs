//! Exec and attach: from an HTTP request to a running session.

use std::future::Future;
use std::time::Duration;

use axum::body::Body;
use axum::extract::FromRequestParts;
use axum::extract::ws::WebSocketUpgrade;
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;

use super::session::{self, Input, Job, MESSAGES_BUFFERED, Output, Remote, Size};
use super::spdy::{Connection, Incoming, StreamHandle};
use super::{status, websocket};

/// What a client has to open its streams after the connection was upgraded.
const STREAMS_TIMEOUT: Duration = Duration::from_secs(30);
/// What a client has to close the connection after the session ended.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);
/// The SPDY sub-protocols, best first.
const SPDY_PROTOCOLS: [&str; 4] = ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];
/// Names a SPDY sub-protocol.
const PROTOCOL_HEADER: &str = "x-stream-protocol-version";

/// How a client wants to talk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    WebSocket,
    Spdy,
}

impl Kind {
    /// By the request's headers; `None` if it is a plain request.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let wanted = headers.get(header::UPGRADE)?.to_str().ok()?;
        if wanted.eq_ignore_ascii_case("websocket") {
            Some(Self::WebSocket)
        } else if wanted.to_ascii_lowercase().starts_with("spdy/3.1") {
            Some(Self::Spdy)
        } else {
            None
        }
    }
}

/// Which streams a client asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) stdin: bool,
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
    pub(crate) tty: bool,
}

/// Upgrades the connection, then starts the job and joins the two. A job that cannot be started is told on the error
/// channel, as the connection has changed its language by then.
pub(crate) async fn serve<F>(request: axum::extract::Request, wanted: Request, start: F) -> Response
where
    F: Future<Output = Result<Job, String>> + Send + 'static,
{
    match Kind::of(request.headers()) {
        Some(Kind::WebSocket) => {
            let (mut parts, _) = request.into_parts();
            let upgrade = match WebSocketUpgrade::from_request_parts(&mut parts, &()).await {
                Ok(upgrade) => upgrade.protocols(websocket::PROTOCOLS),
                Err(refused) => return refused.into_response(),
            };
            let chosen = upgrade.selected_protocol().and_then(|name| name.to_str().ok()).unwrap_or_default().to_owned();
            if chosen.is_empty() && parts.headers.contains_key(header::SEC_WEBSOCKET_PROTOCOL) {
                return (StatusCode::FORBIDDEN, "unable to negotiate a WebSocket subprotocol\n").into_response();
            }
            upgrade.on_upgrade(move |socket| async move {
                let greeting = websocket::greeting(wanted.stdout, wanted.stderr);
                let (remote, carrying) = websocket::remote(socket, websocket::Protocol::of(&chosen), greeting);
                drive(start, remote).await;
                // The last messages are on their way; a client that does not take them is not waited for.
                if tokio::time::timeout(CLOSE_TIMEOUT, carrying).await.is_err() {
                    tracing::debug!("WebSocket client did not take the end of its session");
                }
            })
        }
        Some(Kind::Spdy) => serve_spdy(request, wanted, start),
        None => {
            (StatusCode::BAD_REQUEST, "you must specify an Upgrade header: WebSocket or SPDY/3.1\n").into_response()
        }
    }
}

async fn drive(start: impl Future<Output = Result<Job, String>>, remote: Remote) {
    match start.await {
        Ok(job) => session::run(job, remote).await,
        Err(message) => {
            let told = remote.output.send(Output::Status(status::failed(&message))).await;
            tracing::debug!(%message, told = told.is_ok(), "session could not be started");
        }
    }
}

/// Picks our best protocol among those offered. `Err` if something was offered and nothing fits.
pub(super) fn negotiate(headers: &HeaderMap, ours: &[&'static str]) -> Result<Option<&'static str>, ()> {
    let offered: Vec<&str> = headers
        .get_all(PROTOCOL_HEADER)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .collect();
    match ours.iter().find(|name| offered.contains(*name)) {
        Some(name) => Ok(Some(name)),
        None if offered.is_empty() => Ok(None),
        None => Err(()),
    }
}

/// `101 Switching Protocols` to SPDY.
pub(super) fn switching(protocol: Option<&'static str>) -> Response {
    let mut response = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "SPDY/3.1");
    if let Some(protocol) = protocol {
        response = response.header(PROTOCOL_HEADER, protocol);
    }
    response.body(Body::empty()).unwrap_or_else(|_| StatusCode::INTERNAL_SERVER_ERROR.into_response())
}

/// Refuses a client whose protocols are all unknown.
pub(super) fn no_protocol(ours: &[&'static str]) -> Response {
    let accepted = [("x-accepted-stream-protocol-versions", ours.join(","))];
    (StatusCode::FORBIDDEN, accepted, "unable to upgrade: unable to negotiate protocol\n").into_response()
}

fn serve_spdy<F>(mut request: axum::extract::Request, wanted: Request, start: F) -> Response
where
    F: Future<Output = Result<Job, String>> + Send + 'static,
{
    let Ok(protocol) = negotiate(request.headers(), &SPDY_PROTOCOLS) else { return no_protocol(&SPDY_PROTOCOLS) };
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let upgraded = match upgrade.await {
            Ok(upgraded) => TokioIo::new(upgraded),
            Err(error) => {
                tracing::debug!(%error, "cannot upgrade to SPDY");
                return;
            }
        };
        let mut connection = Connection::new(upgraded);
        let version = protocol.unwrap_or("channel.k8s.io");
        let opening = collect(&mut connection, wanted, version);
        let streams = match tokio::time::timeout(STREAMS_TIMEOUT, opening).await {
            Ok(Some(streams)) => streams,
            Ok(None) => return,
            Err(_) => {
                tracing::debug!("client did not open its streams in time");
                return;
            }
        };
        let (input_sender, input) = mpsc::channel(MESSAGES_BUFFERED);
        let (output, output_receiver) = mpsc::channel(MESSAGES_BUFFERED);
        let status_as_json = version.starts_with("v4.");
        let Streams { error, stdin, stdout, stderr, resize } = streams;
        let mut handles = vec![error.handle.clone()];
        if let Some(stdin) = stdin {
            handles.push(stdin.handle.clone());
            tokio::spawn(pump_stdin(stdin, input_sender.clone()));
        }
        if let Some(resize) = resize {
            handles.push(resize.handle.clone());
            tokio::spawn(pump_resize(resize, input_sender.clone()));
        }
        let (stdout, stderr) = (stdout.map(|stream| stream.handle), stderr.map(|stream| stream.handle));
        handles.extend(stdout.clone());
        handles.extend(stderr.clone());
        let writing = tokio::spawn(pump_output(output_receiver, error.handle, stdout, stderr, handles, status_as_json));
        // As long as the client is there it could open streams; when it goes, input ends.
        let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
        let watching = tokio::spawn(async move {
            loop {
                tokio::select! {
                    stream = connection.accept() => match stream {
                        Some(stream) => drop(stream),
                        None => break,
                    },
                    _ = &mut stopped => break,
                }
            }
            drop(input_sender);
            connection
        });
        drive(start, Remote { input, output }).await;
        // Told or dropped, it is the end.
        let _told = stop.send(());
        if let Err(error) = writing.await {
            tracing::warn!(%error, "writer of a session died");
        }
        if let Ok(connection) = watching.await {
            connection.finish(CLOSE_TIMEOUT).await;
        }
    });
    switching(protocol)
}

/// The streams of one session.
struct Streams {
    error: Incoming,
    stdin: Option<Incoming>,
    stdout: Option<Incoming>,
    stderr: Option<Incoming>,
    resize: Option<Incoming>,
}

/// Waits for every stream that the client must open. `None` when it goes away.
async fn collect(connection: &mut Connection, wanted: Request, version: &str) -> Option<Streams> {
    let resizes = wanted.tty && (version.starts_with("v3.") || version.starts_with("v4."));
    let expected = [
        ("error", true),
        ("stdin", wanted.stdin),
        ("stdout", wanted.stdout),
        ("stderr", wanted.stderr && !wanted.tty),
        ("resize", resizes),
    ];
    let mut found: [Option<Incoming>; 5] = Default::default();
    while expected.iter().zip(&found).any(|((_, needed), stream)| *needed && stream.is_none()) {
        let stream = connection.accept().await?;
        let kind = stream.header("streamtype").unwrap_or_default();
        if let Some(index) = expected.iter().position(|(name, _)| *name == kind) {
            found[index] = Some(stream);
        }
    }
    let [error, stdin, stdout, stderr, resize] = found;
    Some(Streams { error: error?, stdin, stdout, stderr, resize })
}

async fn pump_stdin(mut stream: Incoming, input: mpsc::Sender<Input>) {
    while let Some(bytes) = stream.data.recv().await {
        if input.send(Input::Stdin(bytes)).await.is_err() {
            return;
        }
    }
    // The session may be over, then nobody needs to know.
    let _told = input.send(Input::StdinClosed).await;
}

/// Sizes come as JSON objects one after the other, however cut.
async fn pump_resize(mut stream: Incoming, input: mpsc::Sender<Input>) {
    /// A size is some thirty bytes; a client that sends more without an end sends something else.
    const MAX_PENDING_BYTES: usize = 4096;
    let mut pending = BytesMut::new();
    while let Some(bytes) = stream.data.recv().await {
        pending.extend_from_slice(&bytes);
        let mut sizes = serde_json::Deserializer::from_slice(&pending).into_iter::<Size>();
        let mut latest = None;
        let mut used = 0;
        while let Some(Ok(size)) = sizes.next() {
            latest = Some(size);
            used = sizes.byte_offset();
        }
        drop(pending.split_to(used));
        if pending.len() > MAX_PENDING_BYTES {
            return;
        }
        if let Some(size) = latest
            && input.send(Input::Resize(size)).await.is_err()
        {
            return;
        }
    }
}

async fn pump_output(
    mut output: mpsc::Receiver<Output>,
    error: StreamHandle,
    stdout: Option<StreamHandle>,
    stderr: Option<StreamHandle>,
    all: Vec<StreamHandle>,
    status_as_json: bool,
) {
    while let Some(message) = output.recv().await {
        let sent = match message {
            Output::Stdout(bytes) => match &stdout {
                Some(stream) => stream.send(bytes).await,
                None => Ok(()),
            },
            Output::Stderr(bytes) => match &stderr {
                Some(stream) => stream.send(bytes).await,
                None => Ok(()),
            },
            Output::Status(status) => {
                let text = if status_as_json { status.to_string() } else { status::plain(&status) };
                error.send(Bytes::from(text)).await
            }
        };
        if sent.is_err() {
            return;
        }
    }
    for stream in all {
        if stream.close().await.is_err() {
            return;
        }
    }
}
