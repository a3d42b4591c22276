//! Serving gRPC on a unix socket.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use futures::Stream;
use futures::future::BoxFuture;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tonic::body::Body;
use tonic::server::Grpc;
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use super::MESSAGE_LIMIT_BYTES;

/// Connections at once on one socket; further ones wait.
const MAX_CONNECTIONS: usize = 4096;

type Handler = Arc<dyn Fn(http::Request<Incoming>) -> BoxFuture<'static, http::Response<Body>> + Send + Sync>;

/// Which function answers which call.
#[derive(Clone, Default)]
pub struct Router {
    methods: HashMap<&'static str, Handler>,
}

fn grpc<Q, A>() -> Grpc<ProstCodec<A, Q>>
where
    Q: Message + Default + Send + 'static,
    A: Message + Send + 'static,
{
    Grpc::new(ProstCodec::<A, Q>::default())
        .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
        .max_encoding_message_size(MESSAGE_LIMIT_BYTES)
}

impl Router {
    /// Adds a call with one question and one answer; `path` is `/package.Service/Method`.
    #[must_use]
    pub fn unary<Q, A, F, R>(mut self, path: &'static str, answer: F) -> Self
    where
        Q: Message + Default + Send + 'static,
        A: Message + Send + 'static,
        F: Fn(Q) -> R + Clone + Send + Sync + 'static,
        R: Future<Output = Result<A, Status>> + Send + 'static,
    {
        let handler = move |request| -> BoxFuture<'static, _> {
            let answer = answer.clone();
            let service = tower::service_fn(move |request: Request<Q>| {
                let answer = answer(request.into_inner());
                async move { answer.await.map(Response::new) }
            });
            Box::pin(async move { grpc::<Q, A>().unary(service, request).await })
        };
        self.methods.insert(path, Arc::new(handler));
        self
    }

    /// Adds a call with one question and a stream of answers.
    #[must_use]
    pub fn streaming<Q, A, S, F, R>(mut self, path: &'static str, answer: F) -> Self
    where
        Q: Message + Default + Send + 'static,
        A: Message + Send + 'static,
        S: Stream<Item = Result<A, Status>> + Send + 'static,
        F: Fn(Q) -> R + Clone + Send + Sync + 'static,
        R: Future<Output = Result<S, Status>> + Send + 'static,
    {
        let handler = move |request| -> BoxFuture<'static, _> {
            let answer = answer.clone();
            let service = tower::service_fn(move |request: Request<Q>| {
                let answer = answer(request.into_inner());
                async move { answer.await.map(Response::new) }
            });
            Box::pin(async move { grpc::<Q, A>().server_streaming(service, request).await })
        };
        self.methods.insert(path, Arc::new(handler));
        self
    }

    async fn answer(self: Arc<Self>, request: http::Request<Incoming>) -> Result<http::Response<Body>, Infallible> {
        match self.methods.get(request.uri().path()) {
            Some(handler) => Ok(handler(request).await),
            None => Ok(Status::unimplemented(format!("unknown method {}", request.uri().path())).into_http::<Body>()),
        }
    }
}

/// Listens at `path` with mode 0600. What a dead server left there is replaced; a living one is not.
///
/// # Errors
/// When somebody listens there already, or the socket cannot be made.
pub async fn bind(path: &Path) -> io::Result<UnixListener> {
    if tokio::net::UnixStream::connect(path).await.is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there"));
    }
    // Under a name of its own until nobody else may connect any more.
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = Path::new(&new);
    match fs::remove_file(new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(new)?;
    fs::set_permissions(new, fs::Permissions::from_mode(0o600))?;
    fs::rename(new, path)?;
    Ok(listener)
}

/// Serves connections until dropped.
///
/// # Errors
/// When the listener breaks.
pub async fn serve(listener: UnixListener, router: Router) -> io::Result<()> {
    let router = Arc::new(router);
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = connections.clone().acquire_owned().await else { return Ok(()) };
        let (socket, _) = listener.accept().await?;
        let router = router.clone();
        tokio::spawn(async move {
            let _permit = permit;
            let service = hyper::service::service_fn(move |request| router.clone().answer(request));
            let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(socket), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "gRPC connection ended");
            }
        });
    }
}
