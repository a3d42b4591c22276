//! The pods of this node as everything beside the workers sees them: the node's HTTPS API, statistics, eviction.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodSpec};
use parking_lot::RwLock;
use tokio::sync::{Notify, watch};

use crate::names::{ContainerId, PodKey};

/// One incarnation of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incarnation {
    /// Container name in the pod (init, app or ephemeral).
    pub name: String,
    /// Its id.
    pub id: ContainerId,
    /// Restart count at its start; the number in its log's name.
    pub attempt: u32,
    /// Whether its process runs.
    pub running: bool,
}

/// One pod and its containers.
#[derive(Clone, Debug)]
pub struct PodEntry {
    /// UID, namespace, name.
    pub key: PodKey,
    /// The pod with the newest status that this node knows.
    pub pod: Arc<Pod>,
    /// Its sandbox, once there is one.
    pub sandbox: Option<ContainerId>,
    /// Incarnations that are kept: of each container the newest and, if it was restarted, the one before.
    pub containers: Vec<Incarnation>,
}

impl PodEntry {
    /// The newest incarnation of a container, or the one before it.
    pub fn container(&self, name: &str, previous: bool) -> Option<&Incarnation> {
        let mut all: Vec<_> = self.containers.iter().filter(|c| c.name == name).collect();
        all.sort_by_key(|c| std::cmp::Reverse(c.attempt));
        all.get(usize::from(previous)).copied()
    }

    /// The pod's specification.
    pub fn spec(&self) -> Option<&PodSpec> {
        self.pod.spec.as_ref()
    }
}

/// The node's decision that a pod is to fail (eviction, shutdown).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// `status.reason`.
    pub reason: String,
    /// `status.message`.
    pub message: String,
    /// Time to end; `None`: the pod's own.
    pub grace: Option<Duration>,
}

/// A worker as others see it.
#[derive(Debug)]
struct Worker {
    wake: Arc<Notify>,
    verdict: Option<Verdict>,
    /// Whether the verdict is carried out.
    ended: watch::Sender<bool>,
}

/// The table. Cheap to share; readers never wait for a worker.
#[derive(Debug, Default)]
pub struct PodTable {
    by_uid: RwLock<HashMap<String, Arc<PodEntry>>>,
    /// Of pods that have a worker.
    workers: RwLock<HashMap<String, Worker>>,
}

impl PodTable {
    /// All pods, in no order.
    pub fn list(&self) -> Vec<Arc<PodEntry>> {
        self.by_uid.read().values().cloned().collect()
    }

    /// The pod of this UID.
    pub fn by_uid(&self, uid: &str) -> Option<Arc<PodEntry>> {
        self.by_uid.read().get(uid).cloned()
    }

    /// The pod of this name; of two (one still ending) the newer.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<PodEntry>> {
        self.by_uid
            .read()
            .values()
            .filter(|e| e.key.namespace == namespace && e.key.name == name)
            .max_by_key(|e| e.pod.metadata.creation_timestamp.clone())
            .cloned()
    }

    /// Notes a pod's newest state.
    pub fn put(&self, entry: PodEntry) {
        self.by_uid.write().insert(entry.key.uid.clone(), Arc::new(entry));
    }

    /// Forgets a pod.
    pub fn remove(&self, uid: &str) {
        self.by_uid.write().remove(uid);
        self.workers.write().remove(uid);
    }

    /// Notes what wakes a pod's worker.
    pub(super) fn register(&self, uid: &str, wake: Arc<Notify>) {
        let worker = Worker { wake, verdict: None, ended: watch::Sender::new(false) };
        self.workers.write().insert(uid.to_owned(), worker);
    }

    /// Notes a pod that had ended before its worker saw it.
    pub(super) fn was_final(&self, pod: &Arc<Pod>, key: &PodKey) {
        let entry = || Arc::new(PodEntry { key: key.clone(), pod: pod.clone(), sandbox: None, containers: Vec::new() });
        self.by_uid.write().entry(key.uid.clone()).or_insert_with(entry);
    }

    /// Has a pod fail; the first verdict counts.
    pub fn fail(&self, uid: &str, verdict: Verdict) {
        if let Some(worker) = self.workers.write().get_mut(uid) {
            worker.verdict.get_or_insert(verdict);
            worker.wake.notify_one();
        }
    }

    /// Returns when a pod that was to fail has, and its status is written; or when it is gone.
    pub(crate) fn ended(&self, uid: &str) -> impl Future<Output = ()> + use<> {
        let ended = self.workers.read().get(uid).map(|worker| worker.ended.subscribe());
        async move {
            if let Some(mut ended) = ended {
                // An error means that its worker is gone.
                drop(ended.wait_for(|ended| *ended).await);
            }
        }
    }

    /// Tells those who wait for it that a pod which was to fail has.
    pub(super) fn carried_out(&self, uid: &str) {
        if let Some(worker) = self.workers.read().get(uid) {
            worker.ended.send_replace(true);
        }
    }

    /// What was decided about a pod.
    pub(super) fn verdict(&self, uid: &str) -> Option<Verdict> {
        self.workers.read().get(uid)?.verdict.clone()
    }
}
