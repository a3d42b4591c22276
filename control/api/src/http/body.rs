//! Bodies of requests and answers.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::Stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, LengthLimitError, Limited, StreamBody};
use hyper::body::{Body as _, Frame, Incoming, SizeHint};

use super::BODY_LIMIT_BYTES;
use crate::status::Status;

/// Error of a body stream.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Body of an answer.
pub type ResBody = UnsyncBoxBody<Bytes, BoxError>;

/// Body of a request: from a socket, from an in-process client, or already read.
pub enum ReqBody {
    /// From a connection.
    Incoming(Incoming),
    /// From an in-process client.
    Client(kube::client::Body),
    /// Read already.
    Whole(Bytes),
}

impl ReqBody {
    /// The whole body, up to the limit.
    pub async fn read(self) -> Result<Bytes, Status> {
        match self {
            Self::Incoming(body) => {
                if body.is_end_stream() {
                    return Ok(Bytes::new());
                }
                collect(body).await
            }
            Self::Client(body) => collect(body).await,
            Self::Whole(bytes) => Ok(bytes),
        }
    }

    /// The body as a stream, for requests that are passed on.
    pub fn into_stream_body(self) -> ResBody {
        match self {
            Self::Incoming(body) => body.map_err(Into::into).boxed_unsync(),
            Self::Client(body) => body.map_err(Into::into).boxed_unsync(),
            Self::Whole(bytes) => full(bytes),
        }
    }
}

async fn collect<B>(body: B) -> Result<Bytes, Status>
where
    B: hyper::body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    match Limited::new(body, BODY_LIMIT_BYTES).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(Status::too_large(BODY_LIMIT_BYTES)),
        Err(error) => Err(Status::bad_request(format!("read the request body: {error}"))),
    }
}

/// A body of known bytes.
pub(crate) fn full(bytes: impl Into<Bytes>) -> ResBody {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// No body.
pub(crate) fn empty() -> ResBody {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// A body that is made as it is read.
pub(crate) fn stream(chunks: impl Stream<Item = Result<Bytes, BoxError>> + Send + 'static) -> ResBody {
    use futures::TryStreamExt as _;
    StreamBody::new(chunks.map_ok(Frame::data)).boxed_unsync()
}

/// A body that something else lives as long as.
pub(crate) fn holding(held: impl Send + 'static, body: ResBody) -> ResBody {
    body.map_frame(move |frame| {
        let _ = &held;
        frame
    })
    .boxed_unsync()
}

/// Pieces of an answer whose length is known before they are made.
struct Pieces<I> {
    pieces: I,
    left: u64,
}

impl<I: Iterator<Item = Bytes> + Unpin> hyper::body::Body for Pieces<I> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let next = self.pieces.find(|piece| !piece.is_empty());
        if let Some(piece) = &next {
            self.left = self.left.saturating_sub(piece.len() as u64);
        }
        Poll::Ready(next.map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// A body of so many bytes, made as it is read.
pub(crate) fn pieces(pieces: impl Iterator<Item = Bytes> + Send + Unpin + 'static, length: usize) -> ResBody {
    Pieces { pieces, left: length as u64 }.boxed_unsync()
}
