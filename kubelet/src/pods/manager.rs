//! Which pods this node has, and one worker for each.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, ResourceExt};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;

use super::context::Context;
use super::worker::{Wanted, Worker};
use super::{mirror, resolved, status};
use crate::cri::ContainerEvent;
use crate::names::PodKey;

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
    /// Static pods by UID, as their manifests have them.
    fixed: HashMap<String, Arc<Pod>>,
}

impl PodManager {
    /// No pods yet.
    pub fn new(context: Arc<Context>) -> Self {
        Self { context, workers: HashMap::new(), running: JoinSet::new(), fixed: HashMap::new() }
    }

    /// Follows the pods bound to this node until the future is dropped; containers keep running then.
    pub async fn run(mut self) {
        let api: Api<Pod> = Api::all(self.context.client.clone());
        let ours = watcher::Config::default().fields(&format!("spec.nodeName={}", self.context.config.node_name));
        let mut pods = watcher(api, ours).default_backoff().boxed();
        let mut events = self.context.runtime.events();
        let mut listed: HashSet<String> = HashSet::new();
        let mut manifests = None;
        if let Some(folder) = &self.context.config.static_pod_path {
            match mirror::follow(folder.clone(), self.context.config.node_name.clone()) {
                Ok(mut found) => {
                    // Known before anything that the API does not list is ended.
                    if let Some(pods) = found.recv().await {
                        self.settle_fixed(pods);
                    }
                    manifests = Some(found);
                }
                Err(error) => tracing::error!(folder = %folder.display(), %error, "static pods are not run"),
            }
        }
        let next = async |manifests: &mut Option<mpsc::Receiver<Vec<Pod>>>| match manifests {
            Some(found) => found.recv().await,
            None => std::future::pending().await,
        };
        loop {
            tokio::select! {
                found = next(&mut manifests) => match found {
                    Some(pods) => self.settle_fixed(pods),
                    None => manifests = None,
                },
                event = pods.try_next() => match event {
                    Ok(Some(watcher::Event::Init)) => listed.clear(),
                    Ok(Some(watcher::Event::InitApply(pod))) => {
                        listed.insert(pod.uid().unwrap_or_default());
                        self.apply(pod);
                    }
                    Ok(Some(watcher::Event::InitDone)) => self.settle(&listed).await,
                    Ok(Some(watcher::Event::Apply(pod))) => self.apply(pod),
                    Ok(Some(watcher::Event::Delete(pod))) if mirror::is_mirror(&pod) => self.mirror_gone(&pod),
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
        if mirror::is_mirror(&pod) {
            return self.mirror_seen(&pod);
        }
        self.take(Arc::new(pod));
    }

    /// The manifests as they are now: what is new starts, what is gone ends.
    fn settle_fixed(&mut self, pods: Vec<Pod>) {
        let pods: HashMap<_, _> = pods.into_iter().map(|pod| (pod.uid().unwrap_or_default(), Arc::new(pod))).collect();
        let now = || k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(k8s_openapi::jiff::Timestamp::now());
        for (uid, pod) in &self.fixed {
            if !pods.contains_key(uid) {
                let mut ended = (**pod).clone();
                ended.metadata.deletion_timestamp = Some(now());
                if let Some(handle) = self.workers.get(uid) {
                    handle.wanted.send_replace(Wanted::Pod(Arc::new(ended)));
                }
            }
        }
        let new: Vec<_> =
            pods.iter().filter(|(uid, _)| !self.fixed.contains_key(*uid)).map(|(_, pod)| pod.clone()).collect();
        self.fixed = pods;
        for pod in new {
            self.take(pod);
        }
    }

    fn fixed_of(&self, mirror: &Pod) -> Option<Arc<Pod>> {
        let same = |pod: &&Arc<Pod>| {
            pod.metadata.name == mirror.metadata.name && pod.metadata.namespace == mirror.metadata.namespace
        };
        self.fixed.values().find(same).cloned()
    }

    /// A mirror of nothing, or one that somebody wants to be rid of, is removed; the latter comes again.
    fn mirror_seen(&self, pod: &Pod) {
        if self.fixed_of(pod).is_some() && pod.metadata.deletion_timestamp.is_none() {
            return;
        }
        let api: Api<Pod> = Api::namespaced(self.context.client.clone(), &pod.namespace().unwrap_or_default());
        let name = pod.name_any();
        tokio::spawn(async move {
            if let Err(error) = mirror::remove(&api, &name).await {
                tracing::warn!(pod = name, %error, "a mirror without a static pod is not removed");
            }
        });
    }

    fn mirror_gone(&self, mirror: &Pod) {
        let Some(pod) = self.fixed_of(mirror) else { return };
        if let Some(handle) = self.workers.get(&pod.uid().unwrap_or_default()) {
            // The version tells the worker that what it wrote is gone.
            let mut again = (*pod).clone();
            again.metadata.resource_version = mirror.metadata.resource_version.clone();
            handle.wanted.send_replace(Wanted::Pod(Arc::new(again)));
        }
    }

    fn take(&mut self, pod: Arc<Pod>) {
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
                        || status::is_final(held) != status::is_final(&pod)
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
        self.context.table.register(&uid, wake.clone());
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
        let vanished: Vec<_> = self
            .workers
            .keys()
            .filter(|uid| !listed.contains(*uid) && !self.fixed.contains_key(*uid))
            .cloned()
            .collect();
        for uid in vanished {
            self.gone(&uid);
        }
        self.context.devices.retain(|uid| self.workers.contains_key(uid));
        let sandboxes = self.context.runtime.list_pod_sandboxes().await.unwrap_or_default();
        let of_sandboxes = sandboxes.into_iter().filter_map(|sandbox| sandbox.config.pod);
        // Of some pods nothing is left but volumes and devices, whose drivers may not be there yet.
        let uids = self.context.volumes.known_pods().unwrap_or_default().into_iter().chain(self.context.dra.pods());
        let of_drivers = uids.map(|uid| PodKey { uid, namespace: String::new(), name: String::new() });
        for pod in of_sandboxes.chain(of_drivers) {
            if !self.workers.contains_key(&pod.uid) {
                let mut orphan = Pod::default();
                orphan.metadata.name = Some(pod.name);
                orphan.metadata.namespace = Some(pod.namespace);
                orphan.metadata.uid = Some(pod.uid);
                self.spawn(Wanted::Gone(Arc::new(orphan)));
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
