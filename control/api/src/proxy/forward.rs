//! One request over one stream, upgrades included.

use std::sync::{Arc, OnceLock};

use futures::TryStreamExt as _;
use http::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap,
    HeaderName, HeaderValue, LOCATION, TRANSFER_ENCODING, UPGRADE,
};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::TokioIo;

use super::links::Links;
use crate::http::{ReqBody, Response, empty, holding};
use crate::metrics::LongRunning;
use crate::node::NodeStream;
use crate::status::Status;

/// Where a request goes.
#[derive(Default)]
pub(crate) struct Way {
    /// Path and query at the other end.
    pub(crate) path: String,
    /// `Host` header.
    pub(crate) host: String,
    /// Headers to set.
    pub(crate) headers: HeaderMap,
    /// Path of this server below which the other end's paths appear (`…/proxy`), for `Location` and the links of pages.
    pub(crate) base: Option<String>,
}

/// Comes with the answer that switches protocols: what is put in here lives as long as the connection behind it.
#[derive(Clone, Default)]
pub(crate) struct Open(pub(crate) Arc<OnceLock<LongRunning>>);

/// Headers that concern one connection only.
const HOP_BY_HOP: [HeaderName; 6] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("te"),
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Sends the request over the stream and answers with what comes back.
pub(crate) async fn forward(
    stream: Box<dyn NodeStream>,
    way: Way,
    parts: http::request::Parts,
    body: ReqBody,
) -> Result<Response, Status> {
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        Status::new(503, "ServiceUnavailable", format!("error trying to reach service: {what}: {error}"))
    };
    let asked = parts.headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default().to_owned();
    let upgrade = parts.headers.get(UPGRADE).cloned();
    let mut inbound = http::Request::from_parts(parts, ());
    let on_client = upgrade.is_some().then(|| hyper::upgrade::on(&mut inbound));
    let mut request = http::Request::new(body.into_stream_body());
    *request.method_mut() = inbound.method().clone();
    *request.uri_mut() = way.path.parse().map_err(|_| Status::bad_request(format!("invalid path {:?}", way.path)))?;
    *request.headers_mut() = outbound_headers(inbound.headers(), &way, upgrade.as_ref());

    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .preserve_header_case(true)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| failed("handshake", &error))?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "connection to a backend");
        }
    });
    let mut response = sender.send_request(request).await.map_err(|error| failed("request", &error))?;
    if response.status() == http::StatusCode::SWITCHING_PROTOCOLS {
        let Some(on_client) = on_client else {
            return Err(failed("upgrade", &"the other end switched protocols unasked"));
        };
        let on_backend = hyper::upgrade::on(&mut response);
        let open = Open::default();
        let held = open.clone();
        tokio::spawn(async move {
            match tokio::try_join!(on_client, on_backend) {
                Ok((client, backend)) => {
                    let (mut client, mut backend) = (TokioIo::new(client), TokioIo::new(backend));
                    if let Err(error) = tokio::io::copy_bidirectional(&mut client, &mut backend).await {
                        tracing::debug!(%error, "upgraded connection");
                    }
                }
                Err(error) => tracing::debug!(%error, "upgrade"),
            }
            drop(held);
        });
        let (mut parts, _) = response.into_parts();
        parts.extensions.insert(open);
        return Ok(http::Response::from_parts(parts, empty()));
    }
    for name in &HOP_BY_HOP {
        response.headers_mut().remove(name);
    }
    let Some(base) = way.base else { return Ok(response.map(|body| body.map_err(Into::into).boxed_unsync())) };
    let links = Links { base, backend: way.host, asked };
    let headers = response.headers_mut();
    if let Some(location) = headers.get(LOCATION).and_then(|value| links.moved(value.to_str().ok()?)) {
        headers.insert(LOCATION, HeaderValue::from_str(&location).map_err(|error| failed("Location", &error))?);
    } else if is_plain_page(headers) && !headers.contains_key(LOCATION) {
        headers.remove(CONTENT_LENGTH);
        return Ok(response.map(|body| {
            let page = links.page(body.into_data_stream().map_err(Into::into));
            BodyExt::boxed_unsync(StreamBody::new(page.map_ok(Frame::data)))
        }));
    }
    Ok(response.map(|body| body.map_err(Into::into).boxed_unsync()))
}

/// Counts a request as open until its answer, or the connection behind it, has ended.
pub(crate) fn hold(running: LongRunning, response: Response) -> Response {
    match response.extensions().get::<Open>().cloned() {
        Some(open) => {
            open.0.get_or_init(|| running);
            response
        }
        None => response.map(|body| holding(running, body)),
    }
}

fn outbound_headers(inbound: &HeaderMap, way: &Way, upgrade: Option<&HeaderValue>) -> HeaderMap {
    let mut headers = inbound.clone();
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
    if way.base.is_some() {
        // Pages must come plain for their links to be read.
        headers.remove(ACCEPT_ENCODING);
    }
    // Credentials are for this server only.
    headers.remove(AUTHORIZATION);
    let secret: Vec<HeaderName> = headers.keys().filter(|name| is_identity(name.as_str())).cloned().collect();
    for name in secret {
        headers.remove(name);
    }
    if let Some(upgrade) = upgrade {
        headers.insert(UPGRADE, upgrade.clone());
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    }
    if let Ok(host) = HeaderValue::from_str(&way.host) {
        headers.insert(HOST, host);
    }
    for name in way.headers.keys() {
        headers.remove(name);
    }
    for (name, value) in &way.headers {
        headers.append(name, value.clone());
    }
    headers
}

/// Headers that say who somebody is: only this server may set them.
fn is_identity(name: &str) -> bool {
    name.starts_with("impersonate-") || name.starts_with("x-remote-")
}

/// An HTML page whose links can be read.
fn is_plain_page(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()?.split(';').next());
    kind.map(str::trim) == Some("text/html") && !headers.contains_key(CONTENT_ENCODING)
}
