//! HTTPS requests that this server makes: webhooks and aggregated APIs, reached by URL or as a service of the cluster.

use std::sync::Arc;

use base64::Engine as _;
use bytes::Bytes;
use http::header::HeaderMap;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use serde_json::Value;

use crate::http::BODY_LIMIT_BYTES;
use crate::node::NodeStream;
use crate::object;
use crate::server::ApiServer;

/// A place to send requests to.
pub(crate) struct Endpoint {
    /// Name in the certificate.
    pub(crate) name: String,
    /// Address to dial.
    pub(crate) address: String,
    /// Port to dial.
    pub(crate) port: u16,
    /// Path of the URL.
    pub(crate) path: String,
    /// CA that the certificate must come from, PEM.
    pub(crate) ca_pem: Vec<u8>,
    /// Whether the certificate is checked; off for APIServices that say so.
    pub(crate) verify: bool,
}

impl Endpoint {
    /// From `clientConfig` of a webhook or conversion: `url` or `service`, and `caBundle`.
    pub(crate) async fn of(api: &Arc<ApiServer>, config: &Value) -> Result<Self, String> {
        let ca_pem = base64::engine::general_purpose::STANDARD
            .decode(object::text(config, "/caBundle"))
            .map_err(|error| format!("the CA bundle is not base64: {error}"))?;
        let url = object::text(config, "/url");
        if !url.is_empty() {
            return Self::url(url, ca_pem);
        }
        let service = &config["service"];
        let (namespace, name) = (object::text(service, "/namespace"), object::text(service, "/name"));
        let port = service["port"].as_u64().unwrap_or(443);
        let (address, port) =
            crate::proxy::endpoint(api, namespace, name, &port.to_string()).await.map_err(|s| s.message)?;
        let path = match object::text(service, "/path") {
            "" => "/".to_owned(),
            path => path.to_owned(),
        };
        Ok(Self { name: format!("{name}.{namespace}.svc"), address, port, path, ca_pem, verify: true })
    }

    /// From a URL.
    fn url(url: &str, ca_pem: Vec<u8>) -> Result<Self, String> {
        let uri: http::Uri = url.parse().map_err(|error| format!("invalid URL {url:?}: {error}"))?;
        let host = uri.host().ok_or_else(|| format!("invalid URL {url:?}: no host"))?;
        let name = host.trim_matches(['[', ']']).to_owned();
        let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str).to_owned();
        Ok(Self { address: name.clone(), name, port: uri.port_u16().unwrap_or(443), path, ca_pem, verify: true })
    }

    /// A connection with TLS done.
    pub(crate) async fn connect(&self, api: &ApiServer) -> Result<Box<dyn NodeStream>, String> {
        let stream = api.config.nodes.dial(&self.address, self.port).await.map_err(|status| status.message)?;
        let identity = api.proxy_identity().map_err(|error| error.to_string())?;
        let tls = if self.verify {
            crate::tls_client::trusting(&self.ca_pem, Some(&identity)).map_err(|error| error.to_string())?
        } else {
            crate::tls_client::unverified(Some(&identity)).map_err(|error| error.to_string())?
        };
        let name = rustls_pki_types::ServerName::try_from(self.name.clone()).map_err(|error| error.to_string())?;
        let stream = tokio_rustls::TlsConnector::from(tls)
            .connect(name, stream)
            .await
            .map_err(|error| format!("tls: failed to verify certificate: {error}"))?;
        Ok(Box::new(stream))
    }
}

/// POSTs JSON and reads the JSON answer. The caller sets the time limit.
pub(crate) async fn post_json(api: &Arc<ApiServer>, client_config: &Value, body: &Value) -> Result<Value, String> {
    let endpoint = Endpoint::of(api, client_config).await?;
    let request = http::Request::post(&endpoint.path).header(http::header::CONTENT_TYPE, "application/json");
    exchange(api, &endpoint, request, Bytes::from(body.to_string())).await
}

/// GETs a JSON document by URL; `ca_pem` may be empty for the host's own trust. The caller sets the time limit.
pub(crate) async fn get_json(api: &Arc<ApiServer>, url: &str, ca_pem: &[u8]) -> Result<Value, String> {
    fetch_json(api, &Endpoint::url(url, ca_pem.to_vec())?, &HeaderMap::new()).await
}

/// The same of an endpoint, with headers.
pub(crate) async fn fetch_json(
    api: &Arc<ApiServer>,
    endpoint: &Endpoint,
    headers: &HeaderMap,
) -> Result<Value, String> {
    let mut request = http::Request::get(&endpoint.path);
    for (name, value) in headers {
        request = request.header(name, value);
    }
    exchange(api, endpoint, request, Bytes::new()).await
}

async fn exchange(
    api: &ApiServer,
    endpoint: &Endpoint,
    request: http::request::Builder,
    body: Bytes,
) -> Result<Value, String> {
    let stream = endpoint.connect(api).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection to a webhook");
        }
    });
    let request = request
        .header(http::header::HOST, format!("{}:{}", endpoint.name, endpoint.port))
        .header(http::header::ACCEPT, "application/json")
        .body(Full::new(body))
        .map_err(|error| error.to_string())?;
    let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
    let code = response.status();
    let body = Limited::new(response.into_body(), BODY_LIMIT_BYTES)
        .collect()
        .await
        .map_err(|error| error.to_string())?
        .to_bytes();
    if !code.is_success() {
        return Err(format!(
            "the server responded with {code}: {}",
            String::from_utf8_lossy(&body[..body.len().min(200)])
        ));
    }
    serde_json::from_slice(&body).map_err(|error| format!("the answer is not JSON: {error}"))
}
