//! What the server serves: `/api`, `/apis` (legacy and aggregated), `/openapi/v2`, `/openapi/v3`, the list of paths.

mod groups;
mod openapi;

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE, ETAG, HeaderMap, HeaderValue, IF_NONE_MATCH, VARY};
use parking_lot::Mutex;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::http::{Query, Response, bytes_response, empty, json_response};
use crate::server::ApiServer;
use crate::status::Status;
use crate::user::UserInfo;

/// Content type of aggregated discovery.
const AGGREGATED: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
/// Documents that are kept made.
const CACHED: usize = 128;

/// Documents that were made for a generation of the table of kinds.
#[derive(Default)]
pub(crate) struct Documents(Mutex<(u64, Vec<(String, Document)>)>);

/// Bytes with their ETag.
#[derive(Clone)]
struct Document {
    bytes: Bytes,
    etag: String,
}

impl Documents {
    fn get(
        &self,
        generation: u64,
        name: &str,
        make: impl FnOnce() -> Result<Vec<u8>, Status>,
    ) -> Result<Document, Status> {
        {
            let mut kept = self.0.lock();
            if kept.0 != generation {
                *kept = (generation, Vec::new());
            }
            if let Some((_, document)) = kept.1.iter().find(|(known, _)| known == name) {
                return Ok(document.clone());
            }
        }
        let bytes = make()?;
        let etag = hex(&Sha256::digest(&bytes));
        let document = Document { bytes: bytes.into(), etag };
        let mut kept = self.0.lock();
        if kept.0 == generation && kept.1.len() < CACHED {
            kept.1.push((name.to_owned(), document.clone()));
        }
        Ok(document)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02X}")).collect()
}

impl Document {
    fn answer(&self, headers: &HeaderMap, content_type: &'static str) -> Response {
        let quoted = format!("\"{}\"", self.etag);
        let known = headers.get(IF_NONE_MATCH).and_then(|value| value.to_str().ok());
        let mut response = if known.is_some_and(|known| known.split(',').any(|one| one.trim() == quoted)) {
            let mut response = http::Response::new(empty());
            *response.status_mut() = http::StatusCode::NOT_MODIFIED;
            response
        } else {
            bytes_response(200, content_type, self.bytes.clone())
        };
        if let Ok(etag) = HeaderValue::from_str(&quoted) {
            response.headers_mut().insert(ETAG, etag);
        }
        response.headers_mut().insert(VARY, HeaderValue::from_static("Accept"));
        response
    }
}

/// Answers paths of discovery; 404 for what nobody knows.
pub(crate) async fn answer(
    api: &Arc<ApiServer>,
    _user: &UserInfo,
    path: &str,
    headers: &HeaderMap,
    query: &Query,
) -> Result<Response, Status> {
    let rows = api.registry.rows();
    let generation = rows.generation + crate::aggregate::generation(api);
    let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let aggregated = accept.split(',').any(|clause| {
        clause.contains("as=APIGroupDiscoveryList") && clause.contains("v=v2") && !clause.contains("v=v2beta1")
    });
    let trimmed = path.trim_end_matches('/');
    let parts: Vec<&str> = trimmed.split('/').skip(1).collect();
    let json = |value: Value| Ok(json_response(200, &value));
    match parts.as_slice() {
        [root @ ("api" | "apis")] if aggregated => {
            let core = *root == "api";
            let document = api.documents.get(generation, &format!("aggregated {root}"), || {
                serde_json::to_vec(&groups::aggregated(api, &rows, core)).map_err(Status::internal)
            })?;
            Ok(document.answer(headers, AGGREGATED))
        }
        ["api"] => json(json!({
            "kind": "APIVersions", "versions": ["v1"],
            "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": api.config.advertise.to_string()}],
        })),
        ["apis"] => json(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups::all(api, &rows)})),
        ["api", version] => resources(&rows, "", version),
        ["apis", group] => groups::all(api, &rows)
            .into_iter()
            .find(|one| one["name"] == *group)
            .map(|mut one| {
                one["kind"] = "APIGroup".into();
                one["apiVersion"] = "v1".into();
                json_response(200, &one)
            })
            .ok_or_else(Status::no_such_resource),
        ["apis", group, version] => resources(&rows, group, version),
        ["openapi", "v2"] => openapi::v2(api, &rows, generation, headers),
        ["openapi", "v3"] => Ok(openapi::v3_index(api, &rows)),
        ["openapi", "v3", rest @ ..] => openapi::v3(api, &rows, generation, &rest.join("/"), headers, query).await,
        [] | [""] => json(json!({"paths": paths(api, &rows)})),
        _ => Err(Status::no_such_resource()),
    }
}

fn resources(rows: &crate::registry::Rows, group: &str, version: &str) -> Result<Response, Status> {
    groups::resources(rows, group, version).map(|list| json_response(200, &list)).ok_or_else(Status::no_such_resource)
}

fn paths(api: &ApiServer, rows: &crate::registry::Rows) -> Vec<String> {
    let mut paths: Vec<String> = [
        "/api",
        "/api/v1",
        "/apis",
        "/healthz",
        "/livez",
        "/metrics",
        "/openapi/v2",
        "/openapi/v3",
        "/openid/v1/jwks",
        "/readyz",
        "/version",
        "/.well-known/openid-configuration",
    ]
    .map(str::to_owned)
    .into();
    for (group, versions) in groups::versions(rows) {
        if !group.is_empty() {
            paths.push(format!("/apis/{group}"));
            paths.extend(versions.iter().map(|version| format!("/apis/{group}/{version}")));
        }
    }
    for (group, version) in crate::aggregate::groups(api) {
        paths.extend([format!("/apis/{group}"), format!("/apis/{group}/{version}")]);
    }
    paths.sort();
    paths.dedup();
    paths
}

/// Replaces the content type of an answer.
pub(crate) fn content_type(response: &mut Response, value: &'static str) {
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(value));
}
