//! gzip of large answers, as a real server compresses them: from 128 KiB, level 1.

use std::io::Write as _;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderValue, VARY};
use http_body_util::BodyExt as _;
use hyper::body::Body as _;

use crate::http::{BoxError, ResBody, Response};

/// Answers below this size are sent as they are.
const SMALLEST_BYTES: u64 = 128 << 10;

/// Whether the client takes gzip.
pub(super) fn accepted(headers: &HeaderMap) -> bool {
    headers
        .get(ACCEPT_ENCODING)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|list| list.split(',').any(|one| matches!(one.trim().split(';').next(), Some("gzip"))))
}

/// Compresses an answer that is large enough; streams (watches, logs) pass.
pub(super) fn compress(response: Response) -> Response {
    let json = response
        .headers()
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|kind| kind.starts_with("application/"));
    let large = response.body().size_hint().exact().is_some_and(|size| size >= SMALLEST_BYTES);
    if !json || !large || response.headers().contains_key(CONTENT_ENCODING) {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    parts.headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    parts.headers.insert(VARY, HeaderValue::from_static("Accept-Encoding"));
    http::Response::from_parts(parts, gzip(body))
}

fn gzip(body: ResBody) -> ResBody {
    let encoder = GzEncoder::new(Vec::new(), Compression::fast());
    let chunks = futures::stream::unfold(Some((body, encoder)), |state| async move {
        let (mut body, mut encoder) = state?;
        loop {
            let frame = match body.frame().await {
                None => {
                    let rest = encoder.finish().map(Bytes::from).map_err(BoxError::from);
                    return Some((rest, None));
                }
                Some(Err(error)) => return Some((Err(error), None)),
                Some(Ok(frame)) => frame,
            };
            let Ok(data) = frame.into_data() else { continue };
            if let Err(error) = encoder.write_all(&data) {
                return Some((Err(error.into()), None));
            }
            if encoder.get_ref().len() >= 16 << 10 {
                let chunk = Bytes::from(std::mem::take(encoder.get_mut()));
                return Some((Ok(chunk), Some((body, encoder))));
            }
        }
    });
    crate::http::stream(chunks)
}
