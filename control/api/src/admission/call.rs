//! The way to a webhook: HTTPS to a URL or to a pod behind a service, within a deadline.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::admission::plugin::{look, look_all};
use crate::context::Context;
use crate::kinds::edit::{int, list, text};

/// Largest answer of a webhook, in bytes; it may hold a patch of an object of the largest size.
const ANSWER_MAX_BYTES: usize = 8 << 20;

/// Where a webhook listens.
struct Target {
    /// `https://name.namespace.svc:443/path`, as messages show it.
    url: String,
    /// Name in the certificate.
    server_name: String,
    host: String,
    addresses: Vec<(String, u16)>,
    path: String,
}

/// Sends a review and gives back the answer. The error is a sentence in the words of Go's HTTP client.
pub async fn call(ctx: &Context, config: &Value, review: &Value, timeout_seconds: u64) -> Result<Value, String> {
    let target = target(ctx, config, timeout_seconds).await?;
    let failed = |why: String| format!("failed to call webhook: Post {:?}: {why}", target.url);
    let ca = config.get("caBundle").and_then(Value::as_str).unwrap_or_default();
    let exchange = exchange(&target, ca, review);
    match tokio::time::timeout(Duration::from_secs(timeout_seconds), exchange).await {
        Ok(Ok((200..=299, body))) => serde_json::from_slice(&body)
            .map_err(|e| format!("failed to call webhook: invalid character in the answer: {e}")),
        Ok(Ok((code, _))) => Err(format!(
            "failed to call webhook: the server responded with the status code {code} but did not return details"
        )),
        Ok(Err(why)) => Err(failed(why)),
        Err(_) => Err(failed("context deadline exceeded".to_owned())),
    }
}

async fn target(ctx: &Context, config: &Value, timeout_seconds: u64) -> Result<Target, String> {
    let query = format!("timeout={timeout_seconds}s");
    let join = |path: &str| format!("{path}{}{query}", if path.contains('?') { "&" } else { "?" });
    if let Some(url) = config.get("url").and_then(Value::as_str) {
        let uri: http::Uri = url.parse().map_err(|e| format!("failed to call webhook: parse {url:?}: {e}"))?;
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let port = uri.port_u16().unwrap_or(443);
        let path = join(uri.path_and_query().map_or("/", |p| p.as_str()));
        return Ok(Target {
            url: format!("https://{}{path}", uri.authority().map_or("", |a| a.as_str())),
            server_name: host.clone(),
            addresses: vec![(host.clone(), port)],
            host: uri.authority().map(ToString::to_string).unwrap_or_default(),
            path,
        });
    }
    let service = config.get("service").ok_or("failed to call webhook: no address")?;
    let (namespace, name) = (text(service, "namespace"), text(service, "name"));
    let port = int(service, "port").unwrap_or(443);
    let path = text(service, "path");
    let path = join(&format!("/{}", path.trim_start_matches('/')));
    let server_name = format!("{name}.{namespace}.svc");
    let url = format!("https://{server_name}:{port}{path}");
    let failed = |why: String| format!("failed to call webhook: Post {url:?}: {why}");
    let found = look(ctx, "", "services", namespace, name).await.map_err(|e| failed(e.message))?;
    let Some(found) = found else { return Err(failed(format!("service {name:?} not found"))) };
    let none = Value::Null;
    let spec = found.get("spec").unwrap_or(&none);
    let Some(entry) = list(spec, "ports").iter().find(|p| int(p, "port") == Some(port)) else {
        return Err(failed(format!("no service port {port} found for service {name:?}")));
    };
    // Straight to the pods: this server may run where no service rules are.
    let mut addresses = Vec::new();
    for slice in look_all(ctx, "discovery.k8s.io", "endpointslices", namespace).await.map_err(|e| failed(e.message))? {
        if slice.pointer("/metadata/labels").is_none_or(|l| text(l, "kubernetes.io/service-name") != name) {
            continue;
        }
        let at =
            list(&slice, "ports").iter().find(|p| text(p, "name") == text(entry, "name")).and_then(|p| int(p, "port"));
        let Some(at) = at.and_then(|n| u16::try_from(n).ok()) else { continue };
        for e in list(&slice, "endpoints") {
            if e.pointer("/conditions/ready").and_then(Value::as_bool).unwrap_or(true) {
                addresses.extend(list(e, "addresses").iter().filter_map(Value::as_str).map(|a| (a.to_owned(), at)));
            }
        }
    }
    if addresses.is_empty() {
        return Err(failed(format!("no endpoints available for service {name:?}")));
    }
    let first = rand::random_range(0..addresses.len());
    addresses.rotate_left(first);
    Ok(Target { host: format!("{server_name}:{port}"), url, server_name, addresses, path })
}

async fn exchange(target: &Target, ca: &str, review: &Value) -> Result<(u16, Bytes), String> {
    use base64::Engine as _;
    let pem = base64::engine::general_purpose::STANDARD.decode(ca).map_err(|e| format!("caBundle: {e}"))?;
    let config = crate::tls_client::trusting(&pem, None).map_err(|e| format!("caBundle: {e}"))?;
    let name = ServerName::try_from(target.server_name.clone()).map_err(|e| e.to_string())?;
    let mut stream = Err("no address".to_owned());
    for (host, port) in &target.addresses {
        match TcpStream::connect((host.as_str(), *port)).await {
            Ok(s) => {
                stream = Ok(s);
                break;
            }
            Err(e) => {
                let why = if e.kind() == std::io::ErrorKind::ConnectionRefused {
                    "connect: connection refused".to_owned()
                } else {
                    e.to_string()
                };
                stream = Err(format!("dial tcp {host}:{port}: {why}"));
            }
        }
    }
    let tls = TlsConnector::from(Arc::clone(&config)).connect(name, stream?).await.map_err(|e| format!("tls: {e}"))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(tls)).await.map_err(|e| e.to_string())?;
    // Ends with the exchange, as the sender is dropped then.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection to a webhook");
        }
    });
    let body = serde_json::to_vec(review).map_err(|e| e.to_string())?;
    let request = http::Request::post(target.path.as_str())
        .header(http::header::HOST, target.host.as_str())
        .header(http::header::CONTENT_TYPE, "application/json")
        .header(http::header::ACCEPT, "application/json")
        .header(http::header::USER_AGENT, "kube-apiserver-admission")
        .body(Full::new(Bytes::from(body)))
        .map_err(|e| e.to_string())?;
    let answer = sender.send_request(request).await.map_err(|e| e.to_string())?;
    let code = answer.status().as_u16();
    let body = Limited::new(answer.into_body(), ANSWER_MAX_BYTES).collect().await.map_err(|e| e.to_string())?;
    Ok((code, body.to_bytes()))
}
