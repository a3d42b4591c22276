//! `metrics.k8s.io/v1beta1`: what nodes and pods use now, as their kubelets say.
//!
//! Nothing is gathered while nobody asks. Source: KEP-117, `k8s.io/metrics/pkg/apis/metrics`.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::context::Context;
use crate::object;
use crate::server::ApiServer;
use crate::status::Status;

/// API group.
pub(crate) const GROUP: &str = "metrics.k8s.io";
/// What a kubelet said is used again within this time.
const FRESH: Duration = Duration::from_secs(10);
/// Nodes whose last answer is kept; the cache is emptied beyond that.
const NODES_KEPT: usize = 10_000;
/// Kubelets that are asked at once.
const PARALLEL: usize = 32;
/// Time for a kubelet to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Largest answer of a kubelet, in bytes.
const ANSWER_BYTES: usize = 16 << 20;
/// Time over which kubelets reckon how much CPU is used.
const WINDOW: &str = "10s";

/// The last answers of kubelets.
#[derive(Default)]
pub(crate) struct Usage(Mutex<HashMap<String, (Instant, Arc<Value>)>>);

/// All NodeMetrics.
pub(crate) async fn nodes(ctx: &Context) -> Result<Vec<Value>, Status> {
    let nodes = objects(ctx, "nodes", "").await?;
    let names: Vec<String> = nodes.iter().map(|node| object::name(node).to_owned()).collect();
    let summaries = summaries(&ctx.api, names).await;
    let of = |node: &Value| {
        let summary = summaries.get(object::name(node))?;
        let usage = usage(&summary["node"])?;
        Some(json!({
            "kind": "NodeMetrics", "apiVersion": "metrics.k8s.io/v1beta1", "metadata": metadata(node, ctx.now),
            "timestamp": summary.pointer("/node/cpu/time"), "window": WINDOW, "usage": usage,
        }))
    };
    Ok(nodes.iter().filter_map(of).collect())
}

/// The PodMetrics of a namespace, or of all.
pub(crate) async fn pods(ctx: &Context) -> Result<Vec<Value>, Status> {
    let pods = objects(ctx, "pods", &ctx.namespace).await?;
    let mut names: Vec<String> = pods.iter().map(|pod| object::text(pod, "/spec/nodeName").to_owned()).collect();
    names.sort();
    names.dedup();
    names.retain(|name| !name.is_empty());
    let summaries = summaries(&ctx.api, names).await;
    let mut by_uid: HashMap<&str, &Value> = HashMap::new();
    for entry in summaries.values().flat_map(|summary| summary["pods"].as_array().into_iter().flatten()) {
        by_uid.insert(object::text(entry, "/podRef/uid"), entry);
    }
    let of = |pod: &Value| {
        let found = by_uid.get(object::uid(pod))?;
        let containers = found["containers"].as_array()?;
        let containers: Option<Vec<Value>> =
            containers.iter().map(|c| Some(json!({"name": c["name"], "usage": usage(c)?}))).collect();
        // A pod of which a part is not known yet would look smaller than it is.
        let containers = containers.filter(|all| !all.is_empty())?;
        let time = found.pointer("/containers/0/cpu/time");
        Some(json!({
            "kind": "PodMetrics", "apiVersion": "metrics.k8s.io/v1beta1", "metadata": metadata(pod, ctx.now),
            "timestamp": time, "window": WINDOW, "containers": containers,
        }))
    };
    Ok(pods.iter().filter(|pod| object::text(pod, "/status/phase") == "Running").filter_map(of).collect())
}

/// What is told of objects, and no more: there may be very many.
async fn objects(ctx: &Context, resource: &str, namespace: &str) -> Result<Vec<Value>, Status> {
    let kind = ctx.api.kind("", "v1", resource).ok_or_else(Status::no_such_resource)?;
    let needed = |object: Value| {
        let mut metadata = json!({});
        for member in ["name", "namespace", "labels", "uid"] {
            object::copy(&mut metadata, &object["metadata"], member);
        }
        json!({"metadata": metadata, "spec": {"nodeName": object["spec"]["nodeName"]}, "status": {"phase": object["status"]["phase"]}})
    };
    ctx.api.each(&kind, namespace).await?.map(|object| object.map(needed)).collect()
}

fn metadata(of: &Value, now: Timestamp) -> Value {
    let mut metadata = json!({"name": object::name(of), "creationTimestamp": crate::time::seconds(now)});
    for member in ["namespace", "labels"] {
        object::copy(&mut metadata, &of["metadata"], member);
    }
    metadata
}

/// CPU and memory of an entry of the kubelet's summary.
fn usage(entry: &Value) -> Option<Value> {
    let cpu = entry.pointer("/cpu/usageNanoCores")?.as_u64()?;
    let memory = entry.pointer("/memory/workingSetBytes")?.as_u64()?;
    Some(json!({"cpu": format!("{cpu}n"), "memory": format!("{}Ki", memory / 1024)}))
}

/// The summaries of these nodes; a node that does not answer is left out.
async fn summaries(api: &Arc<ApiServer>, nodes: Vec<String>) -> BTreeMap<String, Arc<Value>> {
    let asked = nodes.into_iter().map(|node| async move {
        let summary = summary(api, &node).await;
        if let Err(why) = &summary {
            tracing::info!(node, why, "what a node uses is not known");
        }
        summary.ok().map(|summary| (node, summary))
    });
    futures::stream::iter(asked).buffer_unordered(PARALLEL).filter_map(std::future::ready).collect().await
}

async fn summary(api: &Arc<ApiServer>, node: &str) -> Result<Arc<Value>, String> {
    let known = api.usage.0.lock().get(node).filter(|(at, _)| at.elapsed() < FRESH).map(|(_, known)| known.clone());
    if let Some(known) = known {
        return Ok(known);
    }
    let asked = tokio::time::timeout(PATIENCE, ask(api, node)).await;
    let summary = Arc::new(asked.unwrap_or_else(|_| Err("the kubelet does not answer in time".into()))?);
    let mut all = api.usage.0.lock();
    if all.len() >= NODES_KEPT {
        all.clear();
    }
    all.insert(node.to_owned(), (Instant::now(), summary.clone()));
    Ok(summary)
}

async fn ask(api: &ApiServer, node: &str) -> Result<Value, String> {
    let stream = api.config.nodes.connect(node).await.map_err(|status| status.message)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection to a kubelet");
        }
    });
    let request = http::Request::get("/stats/summary").header(http::header::HOST, node);
    let request = request.body(Empty::<bytes::Bytes>::new()).map_err(|error| error.to_string())?;
    let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
    if !response.status().is_success() {
        return Err(format!("the kubelet answered {}", response.status()));
    }
    let body = Limited::new(response.into_body(), ANSWER_BYTES).collect().await.map_err(|error| error.to_string())?;
    serde_json::from_slice(&body.to_bytes()).map_err(|error| error.to_string())
}

/// OpenAPI schema of a kind of this group.
pub(crate) fn open_api_schema(kind: &str) -> &'static Value {
    static SCHEMAS: LazyLock<(Value, Value)> = LazyLock::new(|| {
        let amounts = json!({"type": "object", "additionalProperties": {"x-kubernetes-int-or-string": true},
            "description": "What is used, by resource: cpu and memory."});
        let time = json!({"type": "string", "format": "date-time", "description": "When it was measured."});
        let window = json!({"type": "string", "description": "Time over which it was measured, before the timestamp."});
        let container = json!({"type": "object", "properties": {"name": {"type": "string"}, "usage": amounts}});
        let of = |name: &str, more: Value| json!({"type": "object", "properties": {"timestamp": time, "window": window, name: more}});
        (of("usage", amounts.clone()), of("containers", json!({"type": "array", "items": container})))
    });
    if kind == "NodeMetrics" { &SCHEMAS.0 } else { &SCHEMAS.1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_has_units() {
        let entry = json!({"cpu": {"usageNanoCores": 1_500_000}, "memory": {"workingSetBytes": 3 << 20}});
        assert_eq!(usage(&entry), Some(json!({"cpu": "1500000n", "memory": "3072Ki"})));
        assert_eq!(usage(&json!({"cpu": {}})), None);
    }
}
