//! HTTPS requests that this server makes: webhooks and aggregated APIs, reached by URL or as a service of the cluster.

use std::sync::Arc;

use base64::Engine as _;
use bytes::Bytes;
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
}

impl Endpoint {
    /// From `clientConfig` of a webhook or conversion: `url` or `service`, and `caBundle`.
    pub(crate) async fn of(api: &Arc<ApiServer>, config: &Value) -> Result<Self, String> {
        let ca_pem = base64::engine::general_purpose::STANDARD
            .decode(object::text(config, "/caBundle"))
            .map_err(|error| format!("the CA bundle is not base64: {error}"))?;
        let url = object::text(config, "/url");
        if !url.is_empty() {
            let uri: http::Uri = url.parse().map_err(|error| format!("invalid URL {url:?}: {error}"))?;
            let host = uri.host().ok_or_else(|| format!("invalid URL {url:?}: no host"))?;
            let name = host.trim_matches(['[', ']']).to_owned();
            let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str).to_owned();
            return Ok(Self { address: name.clone(), name, port: uri.port_u16().unwrap_or(443), path, ca_pem });
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
        Ok(Self { name: format!("{name}.{namespace}.svc"), address, port, path, ca_pem })
    }

    /// A connection with TLS done; `verify` is off for APIServices that say so.
    pub(crate) async fn connect(&self, api: &ApiServer, verify: bool) -> Result<Box<dyn NodeStream>, String> {
        let stream = api.config.nodes.dial(&self.address, self.port).await.map_err(|status| status.message)?;
        let identity = api.proxy_identity().map_err(|error| error.to_string())?;
        let tls = if verify {
            crate::tls_client::trusting(&self.ca_pem, Some(&identity)).map_err(|error| error.to_string())?
        } else {
            crate::tls_client::unverified().map_err(|error| error.to_string())?
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
    let stream = endpoint.connect(api, true).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection to a webhook");
        }
    });
    let request = http::Request::post(&endpoint.path)
        .header(http::header::HOST, format!("{}:{}", endpoint.name, endpoint.port))
        .header(http::header::CONTENT_TYPE, "application/json")
        .header(http::header::ACCEPT, "application/json")
        .body(Full::new(Bytes::from(body.to_string())))
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
