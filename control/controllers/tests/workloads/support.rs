//! A whole control plane in process, with every controller, and a stand-in for the nodes: pods come up, or do what a test
//! says, and go when they are deleted.

use std::sync::Arc;

use coracle_api::ApiServer;
use coracle_api::node::{NodeConnector, NodeStream};
use coracle_api::status::Status;
use coracle_store::SharedStore;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::{conditions, wait::await_condition};
use kube::{Api, Client, ResourceExt};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinHandle;

use crate::control_plane;
pub(crate) use crate::control_plane::made;

/// Namespace of every test.
pub(crate) const NS: &str = "t";

/// Kubelets that tell what pods use, and nothing else.
#[derive(Default)]
struct Kubelets(Arc<Mutex<Value>>);

#[async_trait::async_trait]
impl NodeConnector for Kubelets {
    async fn connect(&self, _: &str) -> Result<Box<dyn NodeStream>, Status> {
        let (ours, mut theirs) = tokio::io::duplex(1 << 16);
        let summary = json!({"node": {}, "pods": *self.0.lock()}).to_string();
        tokio::spawn(async move {
            let mut asked = [0; 4096];
            // The one request there is fits into one read.
            if theirs.read(&mut asked).await.is_ok_and(|bytes| bytes > 0) {
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", summary.len());
                let _ = theirs.write_all((head + &summary).as_bytes()).await;
            }
        });
        Ok(Box::new(ours))
    }
}

/// What a node makes of a pod: its next status, or nothing for now.
pub(crate) type Behaviour = dyn Fn(&Pod) -> Option<Value> + Send + Sync;

pub(crate) struct Cluster {
    pub(crate) client: Client,
    usage: Arc<Mutex<Value>>,
    behaviour: Arc<Mutex<Arc<Behaviour>>>,
    nodes: JoinHandle<()>,
    plane: control_plane::Cluster,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.nodes.abort();
    }
}

/// A pod that runs and is ready.
pub(crate) fn running(pod: &Pod) -> Option<Value> {
    (phase(pod) == "Pending").then(ready)
}

pub(crate) fn ready() -> Value {
    let now = k8s_openapi::jiff::Timestamp::now().to_string();
    json!({"phase": "Running", "podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": now}]})
}

/// The status of a pod that ended with these codes.
pub(crate) fn ended(phase: &str, exit_code: i32) -> Value {
    let now = k8s_openapi::jiff::Timestamp::now().to_string();
    let state = json!({"terminated": {"exitCode": exit_code, "finishedAt": now, "startedAt": now, "reason": "Error"}});
    json!({"phase": phase, "conditions": [{"type": "Ready", "status": "False", "lastTransitionTime": now}],
        "containerStatuses": [{"name": "c", "image": "i", "imageID": "", "ready": false, "restartCount": 0, "state": state}]})
}

pub(crate) fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        Self::start_on(|store| store).await
    }

    /// A cluster with something between the API and its store.
    pub(crate) async fn start_on(between: impl FnOnce(SharedStore) -> SharedStore) -> Self {
        let kubelets = Kubelets::default();
        let usage = kubelets.0.clone();
        let mut plane = control_plane::Cluster::idle_on(Arc::new(kubelets), between).await;
        plane.control().await;
        let client = plane.client.clone();
        let behaviour: Arc<Mutex<Arc<Behaviour>>> = Arc::new(Mutex::new(Arc::new(running)));
        let nodes = tokio::spawn(nodes(plane.api.clone(), client.clone(), behaviour.clone()));
        let cluster = Self { client, usage, behaviour, nodes, plane };
        let namespaces = Api::<Namespace>::all(cluster.client.clone());
        let new = PostParams::default();
        namespaces.create(&new, &made(json!({"metadata": {"name": NS}}))).await.expect("a namespace");
        let accounts: Api<k8s_openapi::api::core::v1::ServiceAccount> = cluster.of();
        coracle_testkit::assert_eventually_async!(
            30,
            accounts.get_opt("default").await.expect("asked").is_some(),
            "pods can be made"
        );
        cluster
    }

    /// The controllers crash, wherever they are, and start anew.
    pub(crate) async fn crash(&mut self) {
        self.plane.control().await;
    }

    /// Other controllers take over while these still go on for a moment.
    pub(crate) async fn take_over(&mut self, moment: std::time::Duration) {
        self.plane.take_over(moment).await;
    }

    /// The API server itself.
    pub(crate) fn api(&self) -> &Arc<ApiServer> {
        &self.plane.api
    }

    /// Objects of a kind in the test's namespace.
    pub(crate) fn of<K>(&self) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), NS)
    }

    /// Makes an object in the test's namespace.
    pub(crate) async fn make<K>(&self, object: Value) -> K
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + DeserializeOwned
            + serde::Serialize,
    {
        self.of::<K>().create(&PostParams::default(), &made(object)).await.expect("made")
    }

    /// Merge-patches an object in the test's namespace.
    pub(crate) async fn patch<K>(&self, name: &str, patch: Value) -> K
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + DeserializeOwned,
    {
        self.of::<K>().patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.expect("patched")
    }

    pub(crate) async fn node(&self, name: &str, spec: Value) {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let node = made(json!({"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}, "spec": spec}));
        nodes.create(&PostParams::default(), &node).await.expect("a node");
        // What node life cycle puts on a node that is not heard of is not what these tests are about.
    }

    /// What kubelets say from now on: each of these pods uses this much CPU, in thousandths.
    pub(crate) fn use_cpu(&self, pods: &[Pod], milli: u64) {
        let now = k8s_openapi::jiff::Timestamp::now().to_string();
        let pods = pods.iter().map(|pod| {
            let cpu = json!({"time": now, "usageNanoCores": milli * 1_000_000});
            json!({"podRef": {"name": pod.name_any(), "namespace": NS, "uid": pod.uid()},
                "containers": [{"name": "c", "cpu": cpu, "memory": {"workingSetBytes": 1 << 20}}]})
        });
        *self.usage.lock() = pods.collect();
    }

    /// What nodes make of pods from now on.
    pub(crate) fn behave(&self, behaviour: impl Fn(&Pod) -> Option<Value> + Send + Sync + 'static) {
        *self.behaviour.lock() = Arc::new(behaviour);
    }

    pub(crate) async fn pods(&self, selector: &str) -> Vec<Pod> {
        let list = kube::api::ListParams::default().labels(selector);
        let mut pods = self.of::<Pod>().list(&list).await.expect("listed").items;
        pods.sort_by_key(ResourceExt::name_any);
        pods
    }

    pub(crate) async fn names(&self, selector: &str) -> Vec<String> {
        self.pods(selector).await.iter().map(ResourceExt::name_any).collect()
    }

    pub(crate) async fn set_status(&self, pod: &str, status: Value) {
        let patch = Patch::Merge(json!({"status": status}));
        self.of::<Pod>().patch_status(pod, &PatchParams::default(), &patch).await.expect("a status");
    }

    /// Reasons of the events about an object.
    pub(crate) async fn reasons(&self, name: &str) -> Vec<String> {
        let events = self.of::<k8s_openapi::api::core::v1::Event>();
        let list = kube::api::ListParams::default().fields(&format!("involvedObject.name={name}"));
        events.list(&list).await.expect("listed").items.into_iter().filter_map(|event| event.reason).collect()
    }
}

/// How often pods are looked at again whose behaviour depends on more than themselves.
const TICK: std::time::Duration = std::time::Duration::from_millis(50);

async fn nodes(api: Arc<ApiServer>, client: Client, behaviour: Arc<Mutex<Arc<Behaviour>>>) {
    let pods = api.informer::<Pod>();
    pods.synced().await;
    let mut deltas = pods.subscribe();
    loop {
        let _ = tokio::time::timeout(TICK, deltas.next()).await;
        for pod in pods.list() {
            let of: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
            let name = pod.name_any();
            if pod.metadata.deletion_timestamp.is_some() {
                if !matches!(phase(&pod), "Succeeded" | "Failed") && !pod.finalizers().is_empty() {
                    let patch = Patch::Merge(json!({"status": {"phase": "Failed"}}));
                    let _ = of.patch_status(&name, &PatchParams::default(), &patch).await;
                }
                let _ = of.delete(&name, &DeleteParams::default().grace_period(0)).await;
                continue;
            }
            let next = behaviour.lock().clone()(&pod);
            if let Some(status) = next {
                let patch = Patch::Merge(json!({"status": status}));
                // One that has gone meanwhile has no status.
                let _ = of.patch_status(&name, &PatchParams::default(), &patch).await;
            }
        }
    }
}

/// A template of one container with this label `app`.
pub(crate) fn template(app: &str, image: &str) -> Value {
    json!({"metadata": {"labels": {"app": app}}, "spec": {"terminationGracePeriodSeconds": 1, "containers": [{"name": "c", "image": image}]}})
}

/// A kind of a definition that takes anything.
pub(crate) async fn define(
    cluster: &Cluster,
    group: &str,
    version: &str,
    plural: &str,
    kind: &str,
    scale: Option<Value>,
) -> Api<DynamicObject> {
    let name = format!("{plural}.{group}");
    let mut of = json!({"name": version, "served": true, "storage": true,
        "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}});
    if let Some(scale) = scale {
        of["subresources"] = json!({"status": {}, "scale": scale});
    }
    let definition = json!({"metadata": {"name": name, "annotations": {"api-approved.kubernetes.io": "unapproved, for a test"}}, "spec": {"group": group, "scope": "Namespaced",
        "names": {"plural": plural, "singular": kind.to_lowercase(), "kind": kind, "listKind": format!("{kind}List")}, "versions": [of]}});
    let definitions: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
    definitions.create(&PostParams::default(), &made(definition)).await.expect("defined");
    await_condition(definitions, &name, conditions::is_crd_established()).await.expect("established");
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural);
    Api::namespaced_with(cluster.client.clone(), NS, &resource)
}
