//! The loop around the cycle: caches in, bindings out.

use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::Delta;
use coracle_api::server::ApiServer;
use coracle_api::user::UserInfo;
use k8s_openapi::api::core::v1::{Binding, Node, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource, ResourceExt};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;

use crate::cycle::{Unschedulable, choose};
use crate::queue::Queue;
use crate::state::{Cache, PodState, takes_room};

/// The `schedulerName` that is ours.
const PROFILE: &str = "default-scheduler";
/// Bindings under way at once.
const MAX_BINDING: usize = 64;
/// Sleep when nothing is due; only a bound, every change wakes the loop.
const IDLE: Duration = Duration::from_secs(3600);

/// How a binding ended.
struct Bound {
    pod: Arc<Pod>,
    error: Option<kube::Error>,
}

struct Scheduler {
    client: Client,
    recorder: Recorder,
    cache: Cache,
    queue: Queue,
    binding: Arc<Semaphore>,
    bound: mpsc::UnboundedSender<Bound>,
    random: rand::rngs::SmallRng,
}

/// Schedules pods until the future is dropped. At most one process of a cluster may do so at a time.
pub async fn run(api: Arc<ApiServer>) {
    let client = api.client(UserInfo::new("system:kube-scheduler", &[]));
    let recorder = Recorder::new(client.clone(), Reporter { controller: PROFILE.into(), instance: None });
    let (nodes, pods) = (api.informer::<Node>(), api.informer::<Pod>());
    nodes.synced().await;
    pods.synced().await;
    let (mut node_deltas, mut pod_deltas) = (nodes.subscribe(), pods.subscribe());
    // As many messages at most as bindings under way, which the semaphore bounds.
    let (bound, mut ended) = mpsc::unbounded_channel();
    let mut scheduler = Scheduler {
        client,
        recorder,
        cache: Cache::default(),
        queue: Queue::default(),
        binding: Arc::new(Semaphore::new(MAX_BINDING)),
        bound,
        random: rand::make_rng(),
    };
    loop {
        while let Some(delta) = node_deltas.try_next() {
            scheduler.node_changed(&delta);
        }
        while let Some(delta) = pod_deltas.try_next() {
            scheduler.pod_changed(&delta);
        }
        while let Ok(outcome) = ended.try_recv() {
            scheduler.binding_ended(outcome);
        }
        if let Some(pod) = scheduler.queue.pop(Instant::now()) {
            scheduler.schedule(&pod).await;
            continue;
        }
        let due = scheduler.queue.next_due().unwrap_or_else(|| Instant::now() + IDLE);
        tokio::select! {
            Some(delta) = node_deltas.next() => scheduler.node_changed(&delta),
            Some(delta) = pod_deltas.next() => scheduler.pod_changed(&delta),
            Some(outcome) = ended.recv() => scheduler.binding_ended(outcome),
            () = tokio::time::sleep_until(due) => {}
        }
    }
}

impl Scheduler {
    fn node_changed(&mut self, delta: &Delta<Node>) {
        match (&delta.old, &delta.new) {
            (_, Some(node)) => {
                self.cache.set_node(node);
                let status = |node: &Node| {
                    node.status.as_ref().map(|status| (status.allocatable.clone(), status.declared_features.clone()))
                };
                let news = delta.old.as_ref().is_none_or(|old| {
                    old.spec != node.spec || old.metadata.labels != node.metadata.labels || status(old) != status(node)
                });
                if news {
                    self.queue.event(Instant::now());
                }
            }
            (Some(gone), None) => self.cache.remove_node(&gone.name_any()),
            (None, None) => {}
        }
    }

    fn pod_changed(&mut self, delta: &Delta<Pod>) {
        let Some(pod) = delta.new.as_ref().or(delta.old.as_ref()) else {
            return;
        };
        let uid = pod.uid().unwrap_or_default();
        // A name that was deleted and made again in one delta is two pods.
        if let Some(old) = delta.old.as_ref().and_then(|old| old.uid()).filter(|old| *old != uid) {
            self.forget(&old);
        }
        if delta.new.is_none() || !takes_room(pod) {
            self.forget(&uid);
            return;
        }
        let spec = pod.spec.clone().unwrap_or_default();
        match spec.node_name.filter(|name| !name.is_empty()) {
            Some(node) => {
                self.queue.remove(&uid);
                self.cache.place(Arc::new(PodState::new(pod.clone())), &node);
            }
            None => {
                let ours = spec.scheduler_name.as_deref().unwrap_or(PROFILE) == PROFILE;
                let gated = spec.scheduling_gates.is_some_and(|gates| !gates.is_empty());
                if ours && !gated && pod.metadata.deletion_timestamp.is_none() && !self.cache.is_placed(&uid) {
                    self.queue.add(pod);
                } else if gated || pod.metadata.deletion_timestamp.is_some() {
                    self.queue.remove(&uid);
                }
            }
        }
    }

    /// Drops a pod; the room it had may be what others wait for.
    fn forget(&mut self, uid: &str) {
        self.queue.remove(uid);
        if self.cache.is_placed(uid) {
            self.cache.remove_pod(uid);
            self.queue.event(Instant::now());
        }
    }

    async fn schedule(&mut self, pod: &Arc<Pod>) {
        let uid = pod.uid().unwrap_or_default();
        let state = Arc::new(PodState::new(pod.clone()));
        let tie = rand::Rng::next_u64(&mut self.random);
        let chosen = choose(&state, self.cache.nodes.values(), tie).map(|node| node.name().to_owned());
        match chosen {
            Ok(node) => {
                self.cache.place(state, &node);
                self.queue.remove(&uid);
                self.bind(pod.clone(), node).await;
            }
            Err(reason) => {
                self.queue.failed(&uid, true, Instant::now());
                self.report(pod.clone(), reason);
            }
        }
    }

    /// Binds without waiting for the answer; waits only while too many bindings are under way.
    async fn bind(&self, pod: Arc<Pod>, node: String) {
        let Ok(permit) = self.binding.clone().acquire_owned().await else {
            return;
        };
        let (client, recorder, bound) = (self.client.clone(), self.recorder.clone(), self.bound.clone());
        tokio::spawn(async move {
            let namespace = pod.namespace().unwrap_or_default();
            let binding = Binding {
                metadata: ObjectMeta {
                    name: pod.metadata.name.clone(),
                    namespace: pod.metadata.namespace.clone(),
                    uid: pod.uid(),
                    ..ObjectMeta::default()
                },
                target: ObjectReference {
                    api_version: Some("v1".into()),
                    kind: Some("Node".into()),
                    name: Some(node.clone()),
                    ..ObjectReference::default()
                },
            };
            let result = bind(&client, &namespace, &pod.name_any(), &binding).await;
            if result.is_ok() {
                let note = format!("Successfully assigned {namespace}/{} to {node}", pod.name_any());
                publish(&recorder, &pod, EventType::Normal, "Scheduled", "Binding", note).await;
            }
            drop(permit);
            // The loop ends only with the process.
            let _ = bound.send(Bound { pod, error: result.err() });
        });
    }

    fn binding_ended(&mut self, Bound { pod, error }: Bound) {
        let Some(error) = error else { return };
        let uid = pod.uid().unwrap_or_default();
        self.cache.remove_pod(&uid);
        let gone = matches!(&error, kube::Error::Api(status) if status.code == 404);
        if gone {
            return;
        }
        tracing::warn!(pod = %pod.name_any(), %error, "binding failed, trying again");
        self.queue.add(&pod);
        self.queue.failed(&uid, false, Instant::now());
    }

    /// Says in the pod's condition and in an event why it cannot be placed.
    fn report(&self, pod: Arc<Pod>, reason: Unschedulable) {
        let message = reason.to_string();
        let known = pod.status.iter().flat_map(|status| status.conditions.iter().flatten()).any(|condition| {
            condition.type_ == "PodScheduled"
                && condition.status == "False"
                && condition.message.as_ref() == Some(&message)
        });
        let (client, recorder) = (self.client.clone(), self.recorder.clone());
        tokio::spawn(async move {
            if !known {
                let now = Timestamp::now();
                let condition = serde_json::json!({
                    "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message,
                    "lastTransitionTime": Timestamp::from_second(now.as_second()).unwrap_or(now),
                    "observedGeneration": pod.metadata.generation,
                });
                let patch = serde_json::json!({"metadata": {"uid": pod.uid()}, "status": {"conditions": [condition]}});
                let api: Api<Pod> = Api::namespaced(client, &pod.namespace().unwrap_or_default());
                let parameters = PatchParams { field_manager: Some("kube-scheduler".into()), ..PatchParams::default() };
                if let Err(error) = api.patch_status(&pod.name_any(), &parameters, &Patch::Strategic(patch)).await {
                    tracing::debug!(pod = %pod.name_any(), %error, "condition not written");
                }
            }
            publish(&recorder, &pod, EventType::Warning, "FailedScheduling", "Scheduling", message).await;
        });
    }
}

async fn bind(client: &Client, namespace: &str, name: &str, binding: &Binding) -> Result<(), kube::Error> {
    let body = serde_json::to_vec(binding).map_err(kube::Error::SerdeError)?;
    let request = http::Request::post(format!("/api/v1/namespaces/{namespace}/pods/{name}/binding"))
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(body)
        .map_err(kube::Error::HttpError)?;
    client.request::<serde_json::Value>(request).await.map(drop)
}

/// Events are news, not state: one that cannot be written is logged.
async fn publish(recorder: &Recorder, pod: &Pod, type_: EventType, reason: &str, action: &str, note: String) {
    let event = Event { type_, reason: reason.into(), note: Some(note), action: action.into(), secondary: None };
    if let Err(error) = recorder.publish(&event, &pod.object_ref(&())).await {
        tracing::debug!(reason, %error, "event not written");
    }
}
