//! Nodes that are nothing but their objects: they register, renew their Leases, and say of each pod bound to them that it runs.
//!
//! One watch over all bound pods stands for the watches of all nodes, and nothing is remembered of a pod, so that memory does
//! not grow with pods.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::Context;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};

/// Time between two renewals of a node's Lease (a kubelet's default).
const RENEW: Duration = Duration::from_secs(10);
/// Requests under way at once, for each of registration, Leases and pods.
const PARALLEL: usize = 64;
const LEASES: &str = "kube-node-lease";

/// A set of nodes `hollow-0`, `hollow-1`, …
pub(crate) struct Nodes {
    client: Client,
    count: usize,
    next_ip: AtomicU32,
}

fn name(index: usize) -> String {
    format!("hollow-{index}")
}

fn now() -> String {
    format!("{:.6}", Timestamp::now())
}

/// Whether an answer only says that the work was done before.
fn settled<T>(result: Result<T, kube::Error>) -> Result<(), kube::Error> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(()),
        other => other.map(drop),
    }
}

impl Nodes {
    pub(crate) fn new(client: Client, count: usize) -> Self {
        Self { client, count, next_ip: AtomicU32::new(u32::from_be_bytes([10, 128, 0, 1])) }
    }

    /// Makes the Node objects and Leases; those that are there already are taken over.
    pub(crate) async fn register(&self) -> anyhow::Result<()> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), LEASES);
        stream::iter((0..self.count).map(Ok::<_, kube::Error>))
            .try_for_each_concurrent(PARALLEL, async |index| {
                let name = name(index);
                settled(leases.create(&PostParams::default(), &lease(&name)?).await)?;
                settled(nodes.create(&PostParams::default(), &node(&name)?).await)?;
                let status = Patch::Merge(json!({"status": status(index)}));
                nodes.patch_status(&name, &PatchParams::default(), &status).await.map(drop)
            })
            .await
            .context("register the nodes")
    }

    /// Renews Leases and runs pods until the future is dropped, or a request fails.
    pub(crate) async fn run(&self) -> anyhow::Result<()> {
        tokio::try_join!(self.renew(), self.pods()).map(drop)
    }

    /// Renews each Lease once an interval, evenly spread over it, as those of independent nodes are.
    async fn renew(&self) -> anyhow::Result<()> {
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), LEASES);
        let pause = RENEW / u32::try_from(self.count.max(1)).context("so many nodes")?;
        let turns = stream::unfold((0_usize, tokio::time::interval(pause)), async |(turn, mut ticks)| {
            ticks.tick().await;
            Some((turn, (turn + 1, ticks)))
        });
        turns
            .map(Ok)
            .try_for_each_concurrent(PARALLEL, async |turn| {
                let renewal = Patch::Merge(json!({"spec": {"renewTime": now()}}));
                leases.patch(&name(turn % self.count), &PatchParams::default(), &renewal).await.map(drop)
            })
            .await
            .context("renew a Lease")
    }

    async fn pods(&self) -> anyhow::Result<()> {
        let bound = watcher::Config::default().fields("spec.nodeName!=").page_size(500);
        let pods: Api<Pod> = Api::all(self.client.clone());
        watcher(pods, bound)
            .default_backoff()
            .applied_objects()
            .try_for_each_concurrent(PARALLEL, async |pod| {
                // A failed request is tried again with the pod's next change; the watch goes on.
                if let Err(error) = self.act(&pod).await {
                    eprintln!("pod {}: {error}", pod.name_any());
                }
                Ok(())
            })
            .await
            .context("watch the pods")
    }

    /// What a node does about a pod: ends it when it is deleted, says that it runs when it is new.
    async fn act(&self, pod: &Pod) -> Result<(), kube::Error> {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default();
        if !node.starts_with("hollow-") {
            return Ok(());
        }
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default());
        if pod.metadata.deletion_timestamp.is_some() {
            return settled(api.delete(&pod.name_any(), &DeleteParams::default().grace_period(0)).await);
        }
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default();
        if phase != "Pending" {
            return Ok(());
        }
        let ip = std::net::Ipv4Addr::from(self.next_ip.fetch_add(1, Ordering::Relaxed));
        let patch = json!({"metadata": {"uid": pod.uid()}, "status": running(pod, &ip.to_string())});
        settled(api.patch_status(&pod.name_any(), &PatchParams::default(), &Patch::Strategic(patch)).await)
    }
}

fn lease(name: &str) -> Result<Lease, kube::Error> {
    object(json!({
        "metadata": {"name": name, "namespace": LEASES},
        "spec": {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": now()},
    }))
}

fn node(name: &str) -> Result<Node, kube::Error> {
    object(json!({"metadata": {"name": name, "labels": {
        "kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64", "coracle.io/hollow": "true"}}}))
}

fn status(index: usize) -> Value {
    let amounts = json!({"cpu": "32", "memory": "128Gi", "pods": "250", "ephemeral-storage": "500Gi"});
    let at = format!("{:.0}", Timestamp::now());
    let ip = std::net::Ipv4Addr::from(u32::from_be_bytes([10, 0, 0, 1]) + u32::try_from(index).unwrap_or_default());
    let condition = |type_: &str, status: &str| {
        json!({"type": type_, "status": status, "reason": "Hollow", "message": "a node of a measurement",
            "lastHeartbeatTime": at, "lastTransitionTime": at})
    };
    json!({
        "capacity": amounts, "allocatable": amounts,
        "addresses": [{"type": "InternalIP", "address": ip.to_string()}, {"type": "Hostname", "address": name(index)}],
        "conditions": [condition("Ready", "True"), condition("MemoryPressure", "False"), condition("DiskPressure", "False"), condition("PIDPressure", "False")],
        "nodeInfo": {"kubeletVersion": "v1.36.0+hollow", "operatingSystem": "linux", "architecture": "amd64", "bootID": "", "containerRuntimeVersion": "hollow://1",
            "kernelVersion": "", "kubeProxyVersion": "", "machineID": "", "osImage": "", "systemUUID": ""},
    })
}

fn running(pod: &Pod, ip: &str) -> Value {
    let at = format!("{:.0}", Timestamp::now());
    let condition = |type_: &str| json!({"type": type_, "status": "True", "lastTransitionTime": at});
    let conditions = ["Initialized", "Ready", "ContainersReady", "PodReadyToStartContainers"].map(condition);
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers).map(|container| {
        json!({"name": container.name, "image": container.image, "imageID": "hollow", "ready": true, "started": true,
            "restartCount": 0, "containerID": format!("hollow://{}", pod.uid().unwrap_or_default()), "state": {"running": {"startedAt": at}}})
    });
    json!({
        "phase": "Running", "startTime": at, "podIP": ip, "podIPs": [{"ip": ip}],
        "conditions": conditions,
        "containerStatuses": containers.collect::<Vec<_>>(),
    })
}

fn object<K: serde::de::DeserializeOwned>(json: Value) -> Result<K, kube::Error> {
    serde_json::from_value(json).map_err(kube::Error::SerdeError)
}
