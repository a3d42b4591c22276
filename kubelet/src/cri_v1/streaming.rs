//! The HTTP server behind `Exec`, `Attach` and `PortForward`: each of these calls gets a URL that is good for one session.

use std::collections::HashMap;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Path, RawQuery, State};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use http::StatusCode;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tonic::Status;

use crate::cri::{ContainerRuntime, ContainerStatus};
use crate::names::ContainerId;
use crate::streaming::{self, Kind, Request, forward_spdy, forward_websocket};

/// How long a URL waits for its client.
const TOKEN_LIFETIME: Duration = Duration::from_secs(60);
/// URLs that wait at once.
const MAX_TOKENS: usize = 1000;
/// Sessions at once.
const MAX_SESSIONS: usize = 4096;
/// Random bytes of a token.
const TOKEN_BYTES: usize = 24;

/// What a URL stands for.
pub(super) enum Session {
    Exec {
        id: ContainerId,
        command: Vec<String>,
        wanted: Request,
    },
    Attach {
        status: Box<ContainerStatus>,
        wanted: Request,
    },
    /// Into a network namespace, or the node's own; the ports may also stand in the client's query.
    PortForward {
        namespace: Option<PathBuf>,
        ports: Vec<u16>,
    },
}

impl Session {
    fn word(&self) -> &'static str {
        match self {
            Self::Exec { .. } => "exec",
            Self::Attach { .. } => "attach",
            Self::PortForward { .. } => "portforward",
        }
    }
}

/// The server; cheap to clone.
#[derive(Clone)]
pub(super) struct Streaming {
    inner: Arc<Inner>,
}

struct Inner {
    runtime: Arc<dyn ContainerRuntime>,
    address: SocketAddr,
    waiting: Mutex<HashMap<String, (Instant, Session)>>,
}

impl Streaming {
    /// Listens at `address`; [`Self::serve`] with the listener answers.
    pub(super) async fn bind(
        address: SocketAddr,
        runtime: Arc<dyn ContainerRuntime>,
    ) -> io::Result<(Self, TcpListener)> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        Ok((Self { inner: Arc::new(Inner { runtime, address, waiting: Mutex::default() }) }, listener))
    }

    /// A URL for a session.
    pub(super) fn url(&self, session: Session) -> Result<String, Status> {
        let mut bytes = [0; TOKEN_BYTES];
        std::fs::File::open("/dev/urandom")
            .and_then(|mut source| source.read_exact(&mut bytes))
            .map_err(|error| Status::internal(format!("no random bytes: {error}")))?;
        let token = hex::encode(bytes);
        let mut waiting = self.inner.waiting.lock();
        waiting.retain(|_, (since, _)| since.elapsed() < TOKEN_LIFETIME);
        if waiting.len() >= MAX_TOKENS {
            return Err(Status::resource_exhausted("too many sessions are asked for and not begun"));
        }
        let url = format!("http://{}/{}/{token}", self.inner.address, session.word());
        waiting.insert(token, (Instant::now(), session));
        Ok(url)
    }

    /// Serves until dropped.
    pub(super) async fn serve(self, listener: TcpListener) -> io::Result<()> {
        let router = Router::new().route("/{kind}/{token}", any(session)).with_state(self);
        let sessions = Arc::new(Semaphore::new(MAX_SESSIONS));
        loop {
            let Ok(permit) = sessions.clone().acquire_owned().await else { return Ok(()) };
            let (socket, _) = match listener.accept().await {
                // The client was gone before we looked.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                other => other?,
            };
            let service = TowerToHyperService::new(router.clone());
            tokio::spawn(async move {
                let _permit = permit;
                let connection = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(socket), service)
                    .with_upgrades();
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "streaming connection ended");
                }
            });
        }
    }
}

async fn session(
    State(server): State<Streaming>,
    Path((kind, token)): Path<(String, String)>,
    RawQuery(query): RawQuery,
    request: axum::extract::Request,
) -> Response {
    let found = {
        let mut waiting = server.inner.waiting.lock();
        let fits = waiting.get(&token).is_some_and(|(since, s)| since.elapsed() < TOKEN_LIFETIME && s.word() == kind);
        if fits { waiting.remove(&token) } else { None }
    };
    let Some((_, session)) = found else {
        return (StatusCode::NOT_FOUND, "this URL is unknown, used already, or too old\n").into_response();
    };
    let runtime = server.inner.runtime.clone();
    match session {
        Session::Exec { id, command, wanted } => {
            streaming::serve(request, wanted, streaming::exec(runtime, id, command, wanted)).await
        }
        Session::Attach { status, wanted } => {
            streaming::serve(request, wanted, streaming::attach(runtime, *status, wanted)).await
        }
        Session::PortForward { namespace, mut ports } => match Kind::of(request.headers()) {
            Some(Kind::Spdy) => forward_spdy(request, namespace),
            Some(Kind::WebSocket) => {
                if ports.is_empty() {
                    ports = ports_of(query.as_deref().unwrap_or_default());
                }
                forward_websocket(request, namespace, ports).await
            }
            None => {
                (StatusCode::BAD_REQUEST, "you must specify an Upgrade header: WebSocket or SPDY/3.1\n").into_response()
            }
        },
    }
}

/// The ports of a query `port=80&port=81,82`.
fn ports_of(query: &str) -> Vec<u16> {
    query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .filter(|(key, _)| matches!(*key, "port" | "ports"))
        .flat_map(|(_, value)| value.split(','))
        .filter_map(|port| port.parse().ok().filter(|port| *port > 0))
        .collect()
}
