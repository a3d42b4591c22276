//! Answers.

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::{HeaderMap, StatusCode};
use serde_json::Value;

use super::body::{ResBody, full, pieces};
use crate::status::Status;

/// An answer.
pub(crate) type Response = http::Response<ResBody>;

/// An answer of known bytes.
pub(crate) fn bytes_response(code: u16, content_type: &'static str, bytes: impl Into<Bytes>) -> Response {
    let mut response = http::Response::new(full(bytes));
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    no_cache(response.headers_mut());
    response
}

/// An answer of so many bytes, made as it is sent.
pub(crate) fn pieces_response(
    content_type: &'static str,
    made: impl Iterator<Item = Bytes> + Send + Unpin + 'static,
    length: usize,
) -> Response {
    let mut response = http::Response::new(pieces(made, length));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    no_cache(response.headers_mut());
    response
}

/// Objects are never cached by anyone between.
pub(crate) fn no_cache(headers: &mut HeaderMap) {
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
}

/// Plain text.
pub(crate) fn text_response(code: u16, text: impl Into<String>) -> Response {
    bytes_response(code, "text/plain; charset=utf-8", text.into())
}

/// A JSON value.
pub(crate) fn json_response(code: u16, value: &Value) -> Response {
    bytes_response(code, "application/json", value.to_string())
}

/// A `Status`, always as JSON.
pub(crate) fn status_response(status: &Status) -> Response {
    let mut response = json_response(status.code, &status.to_value());
    if let Some(seconds) = status.details.as_ref().map(|d| d.retry_after_seconds).filter(|&s| s > 0) {
        response.headers_mut().insert(RETRY_AFTER, seconds.into());
    }
    response
}
