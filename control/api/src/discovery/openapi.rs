//! OpenAPI documents, made when first asked for.

use std::sync::Arc;

use coracle_schema::openapi::{Resource, Source, Subresource, gnostic};
use http::header::{ACCEPT, HeaderMap};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::groups;
use crate::http::{Query, Response, json_response};
use crate::kinds::Kind;
use crate::registry::Rows;
use crate::server::ApiServer;
use crate::status::Status;

/// `/openapi/v2`, as JSON or in the protobuf form that client-go asks for.
pub(super) fn v2(api: &Arc<ApiServer>, rows: &Rows, generation: u64, headers: &HeaderMap) -> Result<Response, Status> {
    let protobuf = v2_as_protobuf(headers)?;
    let name = if protobuf { "openapi v2 protobuf" } else { "openapi v2" };
    let document = api.documents.get(generation, name, || {
        let mut document = coracle_schema::openapi::v2(&resources(rows, |_| true), crate::KUBERNETES_VERSION);
        crate::aggregate::merge_v2(api, &mut document);
        if protobuf { Ok(gnostic::encode(&document)) } else { serde_json::to_vec(&document).map_err(Status::internal) }
    })?;
    Ok(document.answer(headers, if protobuf { gnostic::MEDIA_TYPES[1] } else { "application/json" }))
}

/// The first clause of `Accept` that can be satisfied decides.
fn v2_as_protobuf(headers: &HeaderMap) -> Result<bool, Status> {
    let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or("*/*");
    let asked = accept.split(',').map(|clause| clause.split(';').next().unwrap_or_default().trim());
    asked
        .filter_map(|media| match media {
            "" | "application/json" | "application/*" | "*/*" => Some(false),
            other => gnostic::MEDIA_TYPES.contains(&other).then_some(true),
        })
        .next()
        .ok_or_else(|| Status::not_acceptable(&["application/json", gnostic::MEDIA_TYPES[0], gnostic::MEDIA_TYPES[1]]))
}

/// `/openapi/v3`: where the documents of the groups are.
pub(super) fn v3_index(api: &ApiServer, rows: &Rows) -> Response {
    let mut paths = serde_json::Map::new();
    for (group, versions) in groups::versions(rows) {
        for version in versions {
            let name = if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") };
            let hash = content_hash(rows, &group, &version);
            paths.insert(name.clone(), json!({"serverRelativeURL": format!("/openapi/v3/{name}?hash={hash}")}));
        }
    }
    for (name, url) in crate::aggregate::v3_urls(api) {
        paths.insert(name, json!({"serverRelativeURL": url}));
    }
    json_response(200, &json!({"paths": paths}))
}

/// `/openapi/v3/apis/<group>/<version>`.
pub(super) async fn v3(
    api: &Arc<ApiServer>,
    rows: &Rows,
    generation: u64,
    name: &str,
    headers: &HeaderMap,
    _query: &Query,
) -> Result<Response, Status> {
    let parts: Vec<&str> = name.split('/').collect();
    let (group, version) = match parts.as_slice() {
        ["api", version] => ("", *version),
        ["apis", group, version] => (*group, *version),
        _ => return Err(Status::no_such_resource()),
    };
    if !rows.all.iter().any(|kind| kind.served && kind.group == group && kind.version == version) {
        return Err(Status::no_such_resource());
    }
    let document = api.documents.get(generation, name, || {
        serde_json::to_vec(&{
            let of = |kind: &Kind| kind.group == group && kind.version == version;
            coracle_schema::openapi::v3(&resources(rows, of), crate::KUBERNETES_VERSION)
        })
        .map_err(Status::internal)
    })?;
    Ok(document.answer(headers, "application/json"))
}

/// The rows as the schema engine describes them.
fn resources(rows: &Rows, wanted: impl Fn(&Kind) -> bool) -> Vec<Resource<'_>> {
    rows.all
        .iter()
        .filter(|kind| kind.served && wanted(kind))
        .map(|kind| Resource {
            group: &kind.group,
            version: &kind.version,
            plural: &kind.resource,
            kind: &kind.kind,
            list_kind: &kind.list_kind,
            namespaced: kind.namespaced(),
            verbs: kind.verbs.iter().map(String::as_str).collect(),
            subresources: kind
                .subresources
                .iter()
                .map(|sub| Subresource {
                    name: &sub.name,
                    group: &sub.group,
                    version: &sub.version,
                    kind: &sub.kind,
                    verbs: sub.verbs.iter().map(String::as_str).collect(),
                })
                .collect(),
            source: match &kind.crd {
                None if kind.group == crate::usage::GROUP => {
                    Source::Custom(Some(crate::usage::open_api_schema(&kind.kind)))
                }
                None => Source::Builtin,
                Some(_) => Source::Custom(crate::crd::open_api_schema(kind)),
            },
        })
        .collect()
}

/// Stands for the content of a document: the same table gives the same after a restart.
fn content_hash(rows: &Rows, group: &str, version: &str) -> String {
    let mut hash = Sha256::new();
    hash.update(crate::git_version());
    for kind in rows.all.iter().filter(|kind| kind.served && kind.group == group && kind.version == version) {
        hash.update(&kind.resource);
        if let Some(schema) = crate::crd::open_api_schema(kind) {
            hash.update(schema.to_string());
        }
    }
    super::hex(&hash.finalize())
}
