//! Calling gRPC services on unix sockets.

use std::path::Path;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::net::UnixStream;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};
use tonic_prost::ProstCodec;

use super::MESSAGE_LIMIT_BYTES;

/// For a socket that somebody listens at to take a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection to a service; cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    channel: Channel,
}

impl Client {
    /// Connects to the socket at `path`; the connection is made anew when it breaks.
    ///
    /// # Errors
    /// When nobody listens there.
    pub async fn connect(path: &Path) -> Result<Self, Status> {
        let socket = path.to_owned();
        let connector = tower::service_fn(move |_: http::Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://localhost").connect_timeout(CONNECT_TIMEOUT);
        let channel = endpoint.connect_with_connector(connector).await.map_err(|error| {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
            Status::unavailable(format!("connect to {}: {error}{cause}", path.display()))
        })?;
        Ok(Self { channel })
    }

    async fn ready(&self) -> Result<Grpc<Channel>, Status> {
        let mut grpc = Grpc::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
            .max_encoding_message_size(MESSAGE_LIMIT_BYTES);
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(grpc)
    }

    /// One question, one answer, within `limit`.
    ///
    /// # Errors
    /// What the service answers, or `DeadlineExceeded`.
    pub async fn call<Q, A>(&self, method: &'static str, question: Q, limit: Duration) -> Result<A, Status>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let mut request = Request::new(question);
        request.set_timeout(limit);
        let call = async {
            let path = PathAndQuery::from_static(method);
            let mut grpc = self.ready().await?;
            grpc.unary(request, path, ProstCodec::<Q, A>::default()).await.map(tonic::Response::into_inner)
        };
        let late = |_| Status::deadline_exceeded(format!("no answer to {method} within {limit:?}"));
        tokio::time::timeout(limit, call).await.map_err(late)?
    }

    /// One question, a stream of answers.
    ///
    /// # Errors
    /// What the service answers.
    pub async fn stream<Q, A>(&self, method: &'static str, question: Q) -> Result<Streaming<A>, Status>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let path = PathAndQuery::from_static(method);
        let mut grpc = self.ready().await?;
        let answer = grpc.server_streaming(Request::new(question), path, ProstCodec::<Q, A>::default()).await?;
        Ok(answer.into_inner())
    }
}
