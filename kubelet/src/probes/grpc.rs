//! gRPC probes: one call of `grpc.health.v1.Health/Check` over plain HTTP/2. Request and response have one field each, so
//! they are written and read here rather than by generated code.

use std::net::SocketAddr;

use bytes::{BufMut, Bytes, BytesMut};
use http::Request;
use http::header::{CONTENT_TYPE, TE};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use super::Answer;

/// Bytes of an answer that are read.
const ANSWER_LIMIT_BYTES: usize = 64 << 10;
/// Bytes before a gRPC message: a flag and its length.
const FRAME_BYTES: usize = 5;
/// `HealthCheckResponse.ServingStatus.SERVING`.
const SERVING: u8 = 1;

/// Asks the health service at an address about a service.
pub(super) async fn check(address: SocketAddr, service: &str) -> Answer {
    match call(address, service).await {
        Ok((status, _)) if !matches!(status.as_deref(), None | Some("0")) => {
            Answer::Failure(format!("error: health rpc failed with status code {}", status.unwrap_or_default()))
        }
        Ok((_, SERVING)) => Answer::Success("service healthy".into()),
        Ok((_, other)) => Answer::Failure(format!("service unhealthy (responded with status {other})")),
        Err(error) => Answer::Failure(format!("error: failed to connect service \"{address}\": {error}")),
    }
}

/// The gRPC status and the serving status.
async fn call(
    address: SocketAddr,
    service: &str,
) -> Result<(Option<String>, u8), Box<dyn std::error::Error + Send + Sync>> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let _stop = AbortOnDrop(driver.abort_handle());
    let request = Request::post(format!("http://{address}/grpc.health.v1.Health/Check"))
        .header(CONTENT_TYPE, "application/grpc")
        .header(TE, "trailers")
        .body(Full::new(message(service)))?;
    let response = sender.send_request(request).await?;
    let (head, body) = response.into_parts();
    let body = Limited::new(body, ANSWER_LIMIT_BYTES).collect().await?;
    let status =
        |headers: &http::HeaderMap| headers.get("grpc-status").and_then(|code| code.to_str().ok()).map(str::to_owned);
    let code = body.trailers().and_then(status).or_else(|| status(&head.headers));
    Ok((code, serving(&body.to_bytes())))
}

/// Ends the connection's task with the call.
struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A framed `HealthCheckRequest { service = 1 }`.
fn message(service: &str) -> Bytes {
    let mut body = BytesMut::new();
    if !service.is_empty() {
        body.put_u8(0x0a);
        let mut length = service.len();
        while length >= 0x80 {
            body.put_u8((length & 0x7f) as u8 | 0x80);
            length >>= 7;
        }
        body.put_u8(length as u8);
        body.put_slice(service.as_bytes());
    }
    let mut framed = BytesMut::with_capacity(FRAME_BYTES + body.len());
    framed.put_u8(0);
    framed.put_u32(u32::try_from(body.len()).unwrap_or(u32::MAX));
    framed.put_slice(&body);
    framed.freeze()
}

/// The field `status = 1` of a framed `HealthCheckResponse`; 0 (unknown) when it is absent.
fn serving(framed: &[u8]) -> u8 {
    match framed.get(FRAME_BYTES..) {
        Some([0x08, status, ..]) => *status,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_framed() {
        assert_eq!(&message("")[..], [0, 0, 0, 0, 0]);
        assert_eq!(&message("ab")[..], [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        assert_eq!(serving(&[0, 0, 0, 0, 2, 0x08, 1]), SERVING);
        assert_eq!(serving(&[0, 0, 0, 0, 0]), 0);
    }
}
