//! Which pods this node has, and one worker for each.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, ResourceExt};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::context::Context;
use super::resolved;
use super::worker::{Wanted, Worker};
use crate::cri::ContainerEvent;

struct Handle {
    wanted: watch::Sender<Wanted>,
    wake: Arc<Notify>,
}

/// The pods of the node.
pub struct PodManager {
    context: Arc<Context>,
    /// By UID; bounded by the API's own count of pods on this node.
    workers: HashMap<String, Handle>,
    running: JoinSet<String>,
}

impl PodManager {
    /// No pods yet.
    pub fn new(context: Arc<Context>) -> Self {
        Self { context, workers: HashMap::new(), running: JoinSet::new() }
    }

    /// Follows the pods bound to this node until the future is dropped; containers keep running then.
    pub async fn run(mut self) {
        let api: Api<Pod> = Api::all(self.context.client.clone());
        let ours = watcher::Config::default().fields(&format!("spec.nodeName={}", self.context.config.node_name));
        let mut pods = watcher(api, ours).default_backoff().boxed();
        let mut events = self.context.runtime.events();
        let mut listed: HashSet<String> = HashSet::new();
        loop {
            tokio::select! {
                event = pods.try_next() => match event {
                    Ok(Some(watcher::Event::Init)) => listed.clear(),
                    Ok(Some(watcher::Event::InitApply(pod))) => {
                        listed.insert(pod.uid().unwrap_or_default());
                        self.apply(pod);
                    }
                    Ok(Some(watcher::Event::InitDone)) => self.settle(&listed).await,
                    Ok(Some(watcher::Event::Apply(pod))) => self.apply(pod),
                    Ok(Some(watcher::Event::Delete(pod))) => self.gone(&pod.uid().unwrap_or_default()),
                    Ok(None) => return,
                    Err(error) => tracing::debug!(%error, "watching pods again"),
                },
                event = events.recv() => match event {
                    Ok(ContainerEvent::Stopped { pod, .. } | ContainerEvent::Oom { pod, .. }) => self.wake(&pod.uid),
                    Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => self.workers.values().for_each(|handle| handle.wake.notify_one()),
                    Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
                },
                Some(ended) = self.running.join_next() => match ended {
                    Ok(uid) => drop(self.workers.remove(&uid)),
                    Err(error) => tracing::error!(%error, "a pod worker ended"),
                },
            }
        }
    }

    fn wake(&self, uid: &str) {
        if let Some(handle) = self.workers.get(uid) {
            handle.wake.notify_one();
        }
    }

    fn apply(&mut self, pod: Pod) {
        let pod = Arc::new(pod);
        let uid = pod.uid().unwrap_or_default();
        self.context.volumes.update(&pod);
        if let Some(handle) = self.workers.get(&uid) {
            // What only repeats our own report is no news.
            let news = match &*handle.wanted.borrow() {
                Wanted::Pod(held) => {
                    held.metadata.generation != pod.metadata.generation
                        || held.metadata.labels != pod.metadata.labels
                        || held.metadata.annotations != pod.metadata.annotations
                        || held.metadata.deletion_timestamp != pod.metadata.deletion_timestamp
                        || held.metadata.deletion_grace_period_seconds != pod.metadata.deletion_grace_period_seconds
                        || held.spec != pod.spec
                        || gates(held) != gates(&pod)
                }
                Wanted::Gone(_) => false,
            };
            if news {
                handle.wanted.send_replace(Wanted::Pod(pod));
            }
            return;
        }
        self.spawn(Wanted::Pod(pod));
    }

    fn spawn(&mut self, wanted: Wanted) {
        let (Wanted::Pod(pod) | Wanted::Gone(pod)) = &wanted;
        let key = resolved::key(pod);
        let uid = key.uid.clone();
        let (sender, receiver) = watch::channel(wanted);
        let wake = Arc::new(Notify::new());
        let worker = Worker::new(self.context.clone(), key, receiver, wake.clone());
        self.workers.insert(uid.clone(), Handle { wanted: sender, wake });
        self.running.spawn(async move {
            worker.run().await;
            uid
        });
    }

    fn gone(&mut self, uid: &str) {
        if let Some(handle) = self.workers.get(uid) {
            handle.wanted.send_modify(|wanted| {
                let (Wanted::Pod(pod) | Wanted::Gone(pod)) = wanted;
                *wanted = Wanted::Gone(pod.clone());
            });
        }
    }

    /// After a full list: what this node holds and the list does not name is ended, also what an earlier daemon left.
    async fn settle(&mut self, listed: &HashSet<String>) {
        let vanished: Vec<_> = self.workers.keys().filter(|uid| !listed.contains(*uid)).cloned().collect();
        for uid in vanished {
            self.gone(&uid);
        }
        let sandboxes = self.context.runtime.list_pod_sandboxes().await.unwrap_or_default();
        for pod in sandboxes.into_iter().filter_map(|sandbox| sandbox.config.pod) {
            if !self.workers.contains_key(&pod.uid) {
                let orphan = Pod {
                    metadata: k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta {
                        name: Some(pod.name),
                        namespace: Some(pod.namespace),
                        uid: Some(pod.uid),
                        ..Default::default()
                    },
                    ..Pod::default()
                };
                self.spawn(Wanted::Gone(Arc::new(orphan)));
            }
        }
        for uid in self.context.volumes.known_pods().unwrap_or_default() {
            if !self.workers.contains_key(&uid)
                && let Err(error) = self.context.volumes.teardown(&uid).await
            {
                tracing::warn!(uid, %error, "volumes of a pod that is gone are not removed");
            }
        }
    }
}

/// Conditions that others write and readiness gates read.
fn gates(pod: &Pod) -> Vec<(String, String)> {
    let gates =
        pod.spec.iter().flat_map(|spec| spec.readiness_gates.iter().flatten()).map(|gate| gate.condition_type.clone());
    let conditions =
        pod.status.iter().flat_map(|status| status.conditions.iter().flatten()).cloned().collect::<Vec<_>>();
    gates
        .map(|type_| {
            let status =
                conditions.iter().find(|condition| condition.type_ == type_).map(|condition| condition.status.clone());
            (type_, status.unwrap_or_default())
        })
        .collect()
}
