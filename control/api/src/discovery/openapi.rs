//! OpenAPI documents, made when first asked for.

use std::sync::Arc;

use http::header::HeaderMap;
use serde_json::{Value, json};

use super::groups;
use crate::http::{Query, Response, json_response};
use crate::registry::Rows;
use crate::server::ApiServer;
use crate::status::Status;

/// `/openapi/v2`.
pub(super) fn v2(api: &Arc<ApiServer>, rows: &Rows, generation: u64, headers: &HeaderMap) -> Result<Response, Status> {
    let accept = headers.get(http::header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let _ = accept;
    let document = api.documents.get(generation, "openapi v2", || {
        serde_json::to_vec(&crate::wire::openapi_v2(rows)).map_err(Status::internal)
    })?;
    Ok(document.answer(headers, "application/json"))
}

/// `/openapi/v3`: where the documents of the groups are.
pub(super) fn v3_index(api: &Arc<ApiServer>, rows: &Rows, generation: u64, headers: &HeaderMap) -> Result<Response, Status> {
    let _ = headers;
    let mut paths = serde_json::Map::new();
    for (group, versions) in groups::versions(rows) {
        for version in versions {
            let name = if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") };
            // The hash stands for the content: a server that is started again with the same table gives the same.
            let hash = format!("{generation:016X}");
            paths.insert(name.clone(), json!({"serverRelativeURL": format!("/openapi/v3/{name}?hash={hash}")}));
        }
    }
    let _ = api;
    Ok(json_response(200, &Value::Object([("paths".to_owned(), Value::Object(paths))].into_iter().collect())))
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
        serde_json::to_vec(&crate::wire::openapi_v3(rows, group, version)).map_err(Status::internal)
    })?;
    Ok(document.answer(headers, "application/json"))
}
