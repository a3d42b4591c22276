//! What an aggregated API says of itself: its resources, and its OpenAPI.

use std::sync::Arc;

use http::header::HeaderMap;
use serde_json::{Map, Value, json};

use super::backend::Backend;
use crate::object;
use crate::outbound::{self, Endpoint};
use crate::server::ApiServer;

/// The documents of one group version.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Documents {
    /// Resources, as aggregated discovery has them.
    pub(super) resources: Value,
    /// `paths` and `definitions` of OpenAPI v2 that belong to the group version.
    v2: Option<(Map<String, Value>, Map<String, Value>)>,
    /// Hash of its OpenAPI v3 document.
    v3_hash: Option<String>,
}

/// Asks for everything beside the list of resources, which is there already.
pub(super) async fn fetch(
    api: &Arc<ApiServer>,
    endpoint: &mut Endpoint,
    headers: &HeaderMap,
    backend: &Backend,
    list: &Value,
) -> Documents {
    let at = format!("apis/{}/{}", backend.group, backend.version);
    endpoint.path = "/openapi/v2".into();
    let v2 = outbound::fetch_json(api, endpoint, headers).await.ok().map(|document| part(document, &format!("/{at}/")));
    endpoint.path = "/openapi/v3".into();
    let index = outbound::fetch_json(api, endpoint, headers).await.unwrap_or_default();
    let url = object::text(&index["paths"][&at], "/serverRelativeURL");
    let v3_hash = url.split_once("hash=").map(|(_, hash)| hash.to_owned());
    Documents { resources: discovery(backend, list), v2, v3_hash }
}

/// The paths below `prefix`, and all definitions.
fn part(mut document: Value, prefix: &str) -> (Map<String, Value>, Map<String, Value>) {
    let mut take = |member: &str| match document.get_mut(member).map(Value::take) {
        Some(Value::Object(map)) => map,
        _ => Map::new(),
    };
    let mut paths = take("paths");
    paths.retain(|path, _| format!("{path}/").starts_with(prefix));
    (paths, take("definitions"))
}

/// `metav1.APIResourceList` as the `resources` of `apidiscovery.k8s.io/v2`.
fn discovery(backend: &Backend, list: &Value) -> Value {
    let mut resources: Vec<Value> = Vec::new();
    let all = || list["resources"].as_array().into_iter().flatten();
    let kind_of = |one: &Value| {
        let or = |member: &str, usual: &str| match object::text(one, member) {
            "" => usual.to_owned(),
            text => text.to_owned(),
        };
        json!({"group": or("/group", &backend.group), "version": or("/version", &backend.version), "kind": one["kind"]})
    };
    for one in all().filter(|one| !object::text(one, "/name").contains('/')) {
        let name = object::text(one, "/name");
        let mut entry = json!({
            "resource": name, "responseKind": kind_of(one), "verbs": one["verbs"], "singularResource": one["singularName"],
            "scope": if one["namespaced"].as_bool() == Some(true) { "Namespaced" } else { "Cluster" },
        });
        for member in ["shortNames", "categories"] {
            object::copy(&mut entry, one, member);
        }
        let below = all().filter_map(|sub| {
            let of = object::text(sub, "/name").strip_prefix(name)?.strip_prefix('/')?;
            Some(json!({"subresource": of, "responseKind": kind_of(sub), "verbs": sub["verbs"]}))
        });
        let below: Vec<Value> = below.collect();
        if !below.is_empty() {
            entry["subresources"] = below.into();
        }
        resources.push(entry);
    }
    resources.into()
}

/// Adds what aggregated APIs say to our own OpenAPI v2 document. A definition that we have, too, is ours.
pub(crate) fn merge_v2(api: &ApiServer, document: &mut Value) {
    for backend in api.aggregated.all().iter() {
        let Some((paths, definitions)) = &backend.documents.v2 else { continue };
        for (member, theirs) in [("paths", paths), ("definitions", definitions)] {
            let ours = object::members(object::members(document).entry(member).or_insert_with(|| json!({})));
            for (name, value) in theirs {
                ours.entry(name.as_str()).or_insert_with(|| value.clone());
            }
        }
    }
}

/// Names and URLs of the OpenAPI v3 documents of aggregated APIs.
pub(crate) fn v3_urls(api: &ApiServer) -> Vec<(String, String)> {
    let all = api.aggregated.all();
    let known = all.iter().filter_map(|one| Some((one, one.documents.v3_hash.as_ref()?)));
    known
        .map(|(one, hash)| {
            let name = format!("apis/{}/{}", one.group, one.version);
            let url = format!("/openapi/v3/{name}?hash={hash}");
            (name, url)
        })
        .collect()
}
