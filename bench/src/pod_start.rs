//! From nothing to a Ready node, and from a pod's creation to its readiness.

use std::collections::HashSet;
use std::path::Path;
use std::pin::pin;
use std::time::{Duration, Instant};

use anyhow::Context;
use coracle_testkit::Image;
use futures::future::try_join_all;
use futures::{Stream, TryStreamExt};
use k8s_openapi::api::core::v1::{Node, Pod, ServiceAccount};
use kube::api::PostParams;
use kube::runtime::wait::await_condition;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::report::Figure;
use crate::server::{NODE, Server};

/// Time for any one thing to come about.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) const IMAGE: &str = "docker.io/library/bench:1";

pub(crate) async fn measure(coracle: &Path, pods: usize, burst: usize) -> anyhow::Result<Vec<Figure>> {
    let server = Server::start(coracle, &[]).await?;
    let measured = on(&server, pods, burst).await;
    server.stop().await.context("take the server down")?;
    measured
}

async fn on(server: &Server, pods: usize, burst: usize) -> anyhow::Result<Vec<Figure>> {
    let client = server.client().await?;
    settle(&client).await?;
    let node_s = server.started.elapsed().as_secs_f64();
    server.import(&Image::busybox(IMAGE)).await.context("import the image")?;
    let idle_mib = server.rss_mib()?;

    let api: Api<Pod> = Api::default_namespaced(client.clone());
    let mut changes = pin!(watcher(api, watcher::Config::default()).applied_objects());
    let mut one_by_one_ms = Vec::new();
    for index in 0..pods {
        let name = format!("one-{index}");
        let started = Instant::now();
        create(&client, &name).await?;
        all_ready(&mut changes, HashSet::from([name])).await?;
        one_by_one_ms.push(started.elapsed().as_secs_f64() * 1e3);
    }
    let names: HashSet<_> = (0..burst).map(|index| format!("burst-{index}")).collect();
    let started = Instant::now();
    try_join_all(names.iter().map(|name| create(&client, name))).await?;
    all_ready(&mut changes, names).await?;
    let burst_s = started.elapsed().as_secs_f64();
    let full_mib = server.rss_mib()?;
    Ok(vec![
        Figure::ours("server start to Ready node", "s", vec![node_s]),
        Figure::ours("pod create to Ready, one after the other", "ms", one_by_one_ms),
        Figure::ours(format!("{burst} pods at once, all Ready"), "s", vec![burst_s]),
        Figure::ours("RSS of all our processes, idle", "MiB", vec![idle_mib]),
        Figure::ours(format!("RSS of all our processes, {} pods", pods + burst), "MiB", vec![full_mib]),
    ])
}

/// Returns when pods can be made.
pub(crate) async fn settle(client: &Client) -> anyhow::Result<()> {
    timeout(PATIENCE, await_condition(Api::all(client.clone()), NODE, node_ready)).await.context("no Ready node")??;
    let exists = |account: Option<&ServiceAccount>| account.is_some();
    let accounts = Api::default_namespaced(client.clone());
    timeout(PATIENCE, await_condition(accounts, "default", exists)).await.context("no default account")??;
    Ok(())
}

/// The specification of a pod that does nothing, with other fields over it.
pub(crate) fn spec(more: Value) -> Value {
    let mut spec = json!({
        "automountServiceAccountToken": false,
        "terminationGracePeriodSeconds": 0,
        "containers": [{
            "name": "main", "image": IMAGE, "imagePullPolicy": "Never", "command": ["/bin/sleep", "100000"],
        }],
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    spec
}

async fn create(client: &Client, name: &str) -> anyhow::Result<()> {
    let pod: Pod = serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec(json!({}))}))?;
    Api::default_namespaced(client.clone()).create(&PostParams::default(), &pod).await.context("create a pod")?;
    Ok(())
}

/// Reads changes until each of these pods was seen Ready.
pub(crate) async fn all_ready<S>(changes: &mut S, mut waiting: HashSet<String>) -> anyhow::Result<()>
where
    S: Stream<Item = Result<Pod, watcher::Error>> + Unpin,
{
    let seen = async {
        while !waiting.is_empty() {
            let pod = changes.try_next().await?.context("the watch ended")?;
            if pod_ready(&pod) {
                waiting.remove(pod.metadata.name.as_deref().unwrap_or_default());
            }
        }
        anyhow::Ok(())
    };
    timeout(PATIENCE, seen).await.context("pods do not become Ready")?
}

fn pod_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

pub(crate) fn node_ready(node: Option<&Node>) -> bool {
    let status = node.and_then(|node| node.status.as_ref());
    let conditions = status.and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}
