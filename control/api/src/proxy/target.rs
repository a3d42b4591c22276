//! What the name in `pods/proxy`, `services/proxy` and `nodes/proxy` means: `[scheme:]name[:port]`.

use std::sync::Arc;

use http::header::{HeaderMap, HeaderName, HeaderValue, LOCATION};
use rand::RngExt as _;
use serde_json::Value;

use super::{Way, forward};
use crate::http::{ReqBody, ResourceRoute, Response, empty};
use crate::kinds::Kind;
use crate::object;
use crate::server::ApiServer;
use crate::status::Status;

/// Port of kubelets.
const KUBELET_PORT: u16 = 10250;

struct Name<'a> {
    scheme: &'a str,
    name: &'a str,
    port: &'a str,
}

fn split(name: &str) -> Option<Name<'_>> {
    let parts: Vec<&str> = name.split(':').collect();
    match parts.as_slice() {
        [name] => Some(Name { scheme: "http", name, port: "" }),
        [name, port] if *name != "https" && *name != "http" => Some(Name { scheme: "http", name, port }),
        [scheme @ ("http" | "https" | ""), name, port] => {
            Some(Name { scheme: if *scheme == "https" { "https" } else { "http" }, name, port })
        }
        _ => None,
    }
}

/// Passes a request on to a node's kubelet, a pod or a pod of a service.
pub(super) async fn proxy(
    api: &Arc<ApiServer>,
    kind: &Kind,
    route: &ResourceRoute,
    parts: http::request::Parts,
    body: ReqBody,
) -> Result<Response, Status> {
    let wanted = split(&route.name)
        .ok_or_else(|| Status::bad_request(format!("invalid {} request {:?}", kind.singular, route.name)))?;
    let upgrade = parts.headers.contains_key(http::header::UPGRADE);
    // An empty path is one with a slash: relative links of the answer must stay below it.
    if route.rest.is_empty() && !upgrade && matches!(parts.method, http::Method::GET | http::Method::HEAD) {
        let query = parts.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
        let mut response = http::Response::new(empty());
        *response.status_mut() = http::StatusCode::MOVED_PERMANENTLY;
        if let Ok(location) = HeaderValue::from_str(&format!("{}/{query}", parts.uri.path())) {
            response.headers_mut().insert(LOCATION, location);
        }
        return Ok(response);
    }
    let rest = if route.rest.is_empty() { "/" } else { &route.rest };
    let path = match parts.uri.query() {
        Some(query) => format!("{rest}?{query}"),
        None => rest.to_owned(),
    };
    let base = parts.uri.path().strip_suffix(&route.rest).unwrap_or(parts.uri.path()).to_owned();
    let mut headers = HeaderMap::new();
    let forwarded = [
        ("x-forwarded-uri", parts.uri.path().to_owned()),
        (
            "x-forwarded-host",
            parts.headers.get(http::header::HOST).and_then(|h| h.to_str().ok()).unwrap_or_default().to_owned(),
        ),
        ("x-forwarded-proto", "https".to_owned()),
    ];
    for (name, value) in forwarded {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(HeaderName::from_static(name), value);
        }
    }
    let (stream, host) = if kind.resource == "nodes" {
        let node = api.get(kind, "", wanted.name).await?.ok_or_else(|| Status::not_found(kind, wanted.name))?;
        let kubelet = node
            .pointer("/status/daemonEndpoints/kubeletEndpoint/Port")
            .and_then(Value::as_u64)
            .and_then(|port| u16::try_from(port).ok())
            .unwrap_or(KUBELET_PORT);
        match wanted.port.parse::<u16>() {
            Ok(port) if port != kubelet => {
                let address = node
                    .pointer("/status/addresses")
                    .and_then(Value::as_array)
                    .into_iter()
                    .flatten()
                    .find(|a| object::text(a, "/type") == "InternalIP")
                    .map(|a| object::text(a, "/address").to_owned())
                    .ok_or_else(|| Status::unavailable(format!("node {} has no address", wanted.name)))?;
                dial(api, &address, port, wanted.scheme).await?
            }
            _ => (api.config.nodes.connect(wanted.name).await?, wanted.name.to_owned()),
        }
    } else {
        let (address, port) = match kind.resource.as_str() {
            "pods" => pod(api, kind, route, &wanted).await?,
            _ => endpoint(api, &route.namespace, wanted.name, wanted.port).await?,
        };
        dial(api, &address, port, wanted.scheme).await?
    };
    forward(stream, Way { path, host, headers, base: Some(base) }, parts, body).await
}

async fn dial(
    api: &ApiServer,
    address: &str,
    port: u16,
    scheme: &str,
) -> Result<(Box<dyn crate::node::NodeStream>, String), Status> {
    let stream = api.config.nodes.dial(address, port).await?;
    let host = if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") };
    if scheme != "https" {
        return Ok((stream, host));
    }
    // The certificates of pods are their own affair: the request came over a proxy that was asked for.
    let tls = crate::tls_client::unverified(None).map_err(Status::internal)?;
    let name = rustls_pki_types::ServerName::try_from(address.to_owned()).map_err(Status::internal)?;
    let stream = tokio_rustls::TlsConnector::from(tls)
        .connect(name, stream)
        .await
        .map_err(|error| Status::unavailable(format!("TLS to {host}: {error}")))?;
    Ok((Box::new(stream), host))
}

async fn pod(
    api: &Arc<ApiServer>,
    kind: &Kind,
    route: &ResourceRoute,
    wanted: &Name<'_>,
) -> Result<(String, u16), Status> {
    let pod =
        api.get(kind, &route.namespace, wanted.name).await?.ok_or_else(|| Status::not_found(kind, wanted.name))?;
    let ip = object::text(&pod, "/status/podIP");
    if ip.is_empty() {
        return Err(Status::bad_request(format!("address not allowed: pod {} has no address", wanted.name)));
    }
    let containers = pod.pointer("/spec/containers").and_then(Value::as_array);
    let mut ports = containers.into_iter().flatten().flat_map(|c| c["ports"].as_array().into_iter().flatten());
    let port = match wanted.port {
        "" => ports.next().and_then(|port| port["containerPort"].as_u64()),
        text => match text.parse::<u64>() {
            Ok(number) => Some(number),
            Err(_) => {
                ports.find(|port| object::text(port, "/name") == text).and_then(|port| port["containerPort"].as_u64())
            }
        },
    };
    let port = port.unwrap_or(80);
    Ok((ip.to_owned(), u16::try_from(port).map_err(|_| Status::bad_request(format!("invalid port {port}")))?))
}

/// One ready endpoint of a service, at random; `wanted` is a port's name or number, empty for the only one.
pub(crate) async fn endpoint(
    api: &Arc<ApiServer>,
    namespace: &str,
    of: &str,
    wanted: &str,
) -> Result<(String, u16), Status> {
    let kind = api.kind("", "v1", "services").ok_or_else(Status::no_such_resource)?;
    let service = api.get(&kind, namespace, of).await?.ok_or_else(|| Status::not_found(&kind, of))?;
    let ports = service.pointer("/spec/ports").and_then(Value::as_array).cloned().unwrap_or_default();
    let chosen = match wanted {
        "" if ports.len() == 1 => ports.first(),
        "" => ports.iter().find(|port| object::text(port, "/name").is_empty()),
        text => ports.iter().find(|port| {
            object::text(port, "/name") == text || port["port"].as_u64().is_some_and(|n| n.to_string() == text)
        }),
    };
    let unavailable = || Status::unavailable(format!("no endpoints available for service {of:?}"));
    let chosen =
        chosen.ok_or_else(|| Status::unavailable(format!("no service port {wanted:?} found for service {of:?}")))?;
    let name = object::text(chosen, "/name");
    if object::text(&service, "/spec/type") == "ExternalName" {
        let port = chosen["port"].as_u64().and_then(|p| u16::try_from(p).ok()).ok_or_else(unavailable)?;
        return Ok((object::text(&service, "/spec/externalName").to_owned(), port));
    }
    let slices = api.kind("discovery.k8s.io", "v1", "endpointslices").ok_or_else(unavailable)?;
    let mut found = Vec::new();
    for slice in api.list(&slices, namespace).await? {
        let owner =
            slice.pointer("/metadata/labels").and_then(|l| l.get("kubernetes.io/service-name")).and_then(Value::as_str);
        if owner != Some(of) {
            continue;
        }
        let port = slice["ports"].as_array().into_iter().flatten().find(|port| object::text(port, "/name") == name);
        let Some(port) = port.and_then(|port| port["port"].as_u64()).and_then(|p| u16::try_from(p).ok()) else {
            continue;
        };
        for endpoint in slice["endpoints"].as_array().into_iter().flatten() {
            if endpoint.pointer("/conditions/ready").and_then(Value::as_bool) != Some(false) {
                found.extend(
                    endpoint.pointer("/addresses/0").and_then(Value::as_str).map(|address| (address.to_owned(), port)),
                );
            }
        }
    }
    if found.is_empty() {
        return Err(unavailable());
    }
    Ok(found.swap_remove(rand::rng().random_range(0..found.len())))
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn names_have_parts() {
        let parts = |name| split(name).map(|n| (n.scheme, n.name, n.port));
        assert_eq!(parts("web"), Some(("http", "web", "")));
        assert_eq!(parts("web:80"), Some(("http", "web", "80")));
        assert_eq!(parts("https:web:tls"), Some(("https", "web", "tls")));
        assert_eq!(parts("https:web:"), Some(("https", "web", "")));
        assert_eq!(parts("a:b:c:d"), None);
    }
}
