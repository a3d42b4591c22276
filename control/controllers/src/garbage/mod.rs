//! The garbage collector: objects whose owners are gone go too, whatever their kind.
//!
//! One watch over the whole store keeps a graph of owners ([`graph`]); what a change touches is judged again, and a few
//! workers carry the verdicts out through the API, with preconditions, so that a stale verdict does nothing.

mod graph;

use std::sync::Arc;
use std::time::Duration;

use coracle_api::server::ApiServer;
use coracle_api::user::UserInfo;
use coracle_store::{Entry, Error as StoreError, EventKind, ListOptions};
use http::{Method, Request};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use parking_lot::RwLock;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::machine::WorkQueue;
use graph::{Graph, Item, ORPHAN, Verdict};

const NAME: &str = "generic-garbage-collector";
/// Verdicts carried out at once.
const WORKERS: usize = 16;
/// Everything that the store holds for the API.
const SCOPE: &str = "/registry/";
/// Kinds of which nothing is ever collected and much is written.
const UNWATCHED: &[&str] = &["/registry/events/"];
/// Pause after a broken watch.
const RETRY: Duration = Duration::from_millis(200);

struct Collector {
    api: Arc<ApiServer>,
    client: Client,
    graph: RwLock<Graph>,
    queue: WorkQueue<Arc<str>>,
}

/// Collects garbage until the future is dropped.
pub(crate) async fn run(api: Arc<ApiServer>) {
    let client = api.client(UserInfo::controller(NAME));
    let collector = Arc::new(Collector { api, client, graph: RwLock::default(), queue: WorkQueue::default() });
    let mut tasks = JoinSet::new();
    for _ in 0..WORKERS {
        let collector = collector.clone();
        tasks.spawn(async move {
            loop {
                let key = collector.queue.next().await;
                match collector.carry_out(&key).await {
                    Ok(()) => collector.queue.forget(&key),
                    Err(error) => {
                        let delay = collector.queue.retry(key.clone());
                        tracing::debug!(%key, %error, ?delay, "garbage not collected, trying again");
                    }
                }
                collector.queue.done(&key);
            }
        });
    }
    loop {
        match collector.follow().await {
            StoreError::Closed => return,
            error => tracing::debug!(%error, "listing again"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

fn is_watched(key: &str) -> bool {
    !UNWATCHED.iter().any(|prefix| key.starts_with(prefix))
}

/// What the graph holds of a stored object; objects that are none have no owners.
fn item(entry: &Entry) -> Option<Item> {
    serde_json::from_slice(&entry.value).ok()
}

impl Collector {
    async fn follow(&self) -> StoreError {
        let listing = match self.api.store.list(SCOPE, ListOptions::default()).await {
            Ok(listing) => listing,
            Err(error) => return error,
        };
        let mut watch = match self.api.store.watch(SCOPE, listing.revision).await {
            Ok(watch) => watch,
            Err(error) => return error,
        };
        {
            let mut graph = Graph::default();
            for entry in listing.entries.iter().filter(|entry| is_watched(&entry.key)) {
                graph.change(&entry.key, item(entry));
            }
            // Only a complete graph may judge.
            for key in graph.keys() {
                self.queue.add(key);
            }
            *self.graph.write() = graph;
        }
        loop {
            let batch = match watch.next().await {
                Ok(batch) => batch,
                Err(error) => return error,
            };
            for event in batch.events.iter().filter(|event| is_watched(&event.entry.key)) {
                let new = if event.kind == EventKind::Put { item(&event.entry) } else { None };
                for key in self.graph.write().change(&event.entry.key, new) {
                    self.queue.add(key);
                }
            }
        }
    }

    async fn carry_out(&self, key: &Arc<str>) -> Result<(), kube::Error> {
        let (verdict, item) = {
            let graph = self.graph.read();
            (graph.judge(key), graph.get(key))
        };
        let Some(item) = item else { return Ok(()) };
        match verdict {
            Verdict::Keep => Ok(()),
            Verdict::Delete { foreground, unblock } => {
                if self.may_not_have_such_owners(&item).await? {
                    return Ok(());
                }
                if self.graph.read().refers_astray(&item) {
                    self.report_astray(&item).await;
                }
                if unblock {
                    self.unblock(&item).await?;
                }
                // What an earlier deletion asked for its own dependents is kept.
                let policy = match item.metadata.finalizers.iter().any(|held| held == ORPHAN) {
                    true => "Orphan",
                    false if foreground => "Foreground",
                    false => "Background",
                };
                let body = json!({
                    "apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": policy,
                    "preconditions": {"uid": item.metadata.uid},
                });
                self.call(Method::DELETE, &item, &body).await
            }
            Verdict::Disown(gone) => self.disown(&item, &gone).await,
            Verdict::Orphan(dependents) => {
                for dependent in dependents {
                    let dependent = self.graph.read().get(&dependent);
                    if let Some(dependent) = dependent {
                        self.disown(&dependent, std::slice::from_ref(&item.metadata.uid)).await?;
                    }
                }
                self.release(&item, ORPHAN).await
            }
            Verdict::Release(finalizer) => self.release(&item, finalizer).await,
        }
    }

    /// Whether an object without a namespace names an owner of a kind that lives in one. Nobody can say whether such an owner
    /// is gone, so the object stays.
    async fn may_not_have_such_owners(&self, item: &Item) -> Result<bool, kube::Error> {
        if !item.metadata.namespace.is_empty() {
            return Ok(false);
        }
        let Some(path) = self.path(item) else { return Ok(true) };
        let request = Request::get(path).body(Vec::new()).map_err(kube::Error::HttpError)?;
        let current: Value = match self.client.request(request).await {
            Err(kube::Error::Api(status)) if status.code == 404 => return Ok(true),
            other => other?,
        };
        let references = current["metadata"]["ownerReferences"].as_array().cloned().unwrap_or_default();
        let namespaced = references.iter().any(|reference| {
            let text = |field: &str| reference[field].as_str().unwrap_or_default();
            let (group, version) = text("apiVersion").split_once('/').unwrap_or(("", text("apiVersion")));
            self.api.registry.find_kind(group, version, text("kind")).is_some_and(|kind| kind.namespaced())
        });
        if namespaced {
            self.report_astray(item).await;
        }
        Ok(namespaced)
    }

    /// Tells in an event that an object names an owner where it may have none.
    async fn report_astray(&self, item: &Item) {
        let reporter = Reporter { controller: "garbage-collector-controller".into(), instance: None };
        let about = ObjectReference {
            api_version: Some(item.api_version.clone()),
            kind: Some(item.kind.clone()),
            name: Some(item.metadata.name.clone()),
            namespace: Some(item.metadata.namespace.clone()).filter(|namespace| !namespace.is_empty()),
            uid: Some(item.metadata.uid.to_string()),
            ..ObjectReference::default()
        };
        let event = Event {
            type_: EventType::Warning,
            reason: "OwnerRefInvalidNamespace".into(),
            note: Some(format!(
                "an ownerReference of {} {} leads into another namespace",
                item.kind, item.metadata.name
            )),
            action: "Collect".into(),
            secondary: None,
        };
        if let Err(error) = Recorder::new(self.client.clone(), reporter).publish(&event, &about).await {
            tracing::warn!(%error, name = %item.metadata.name, "event not written");
        }
    }

    /// Lets an object hold up its owners no longer.
    async fn unblock(&self, item: &Item) -> Result<(), kube::Error> {
        self.edit(
            item,
            |metadata| {
                for reference in metadata["ownerReferences"].as_array_mut().into_iter().flatten() {
                    reference["blockOwnerDeletion"] = false.into();
                }
                metadata["ownerReferences"].clone()
            },
            "ownerReferences",
        )
        .await
    }

    /// Takes the references to owners from an object.
    async fn disown(&self, item: &Item, owners: &[Arc<str>]) -> Result<(), kube::Error> {
        self.edit(
            item,
            |metadata| {
                if let Some(references) = metadata["ownerReferences"].as_array_mut() {
                    references.retain(|reference| !owners.iter().any(|owner| reference["uid"] == **owner));
                }
                metadata["ownerReferences"].clone()
            },
            "ownerReferences",
        )
        .await
    }

    /// Takes a finalizer from an object.
    async fn release(&self, item: &Item, finalizer: &str) -> Result<(), kube::Error> {
        self.edit(
            item,
            |metadata| {
                if let Some(finalizers) = metadata["finalizers"].as_array_mut() {
                    finalizers.retain(|held| held != finalizer);
                }
                metadata["finalizers"].clone()
            },
            "finalizers",
        )
        .await
    }

    /// Rewrites one field of an object's metadata, as it is now, if it is still the same object.
    async fn edit(
        &self,
        item: &Item,
        change: impl FnOnce(&mut Value) -> Value,
        field: &str,
    ) -> Result<(), kube::Error> {
        let Some(path) = self.path(item) else { return Ok(()) };
        let request = Request::get(path).body(Vec::new()).map_err(kube::Error::HttpError)?;
        let mut current: Value = match self.client.request(request).await {
            Err(kube::Error::Api(status)) if status.code == 404 => return Ok(()),
            other => other?,
        };
        if current["metadata"]["uid"] != *item.metadata.uid {
            return Ok(());
        }
        let revision = current["metadata"]["resourceVersion"].clone();
        let value = change(&mut current["metadata"]);
        let body = json!({"metadata": {"uid": item.metadata.uid, "resourceVersion": revision, field: value}});
        self.call(Method::PATCH, item, &body).await
    }

    /// A call on an object; one that is gone or another already needs nothing.
    async fn call(&self, method: Method, item: &Item, body: &Value) -> Result<(), kube::Error> {
        let Some(path) = self.path(item) else { return Ok(()) };
        let type_ = if method == Method::PATCH { "application/merge-patch+json" } else { "application/json" };
        let body = serde_json::to_vec(body).map_err(kube::Error::SerdeError)?;
        let request = Request::builder()
            .method(method.clone())
            .uri(path)
            .header(http::header::CONTENT_TYPE, type_)
            .body(body)
            .map_err(kube::Error::HttpError)?;
        match self.client.request::<Value>(request).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 409 && method == Method::DELETE => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Where the API serves an object; `None` for kinds that are no longer served.
    fn path(&self, item: &Item) -> Option<String> {
        let (group, version) = item.api_version.split_once('/').unwrap_or(("", &item.api_version));
        let kind = self.api.registry.find_kind(group, version, &item.kind)?;
        let root = if group.is_empty() { format!("/api/{version}") } else { format!("/apis/{group}/{version}") };
        let name = &item.metadata.name;
        Some(if kind.namespaced() {
            format!("{root}/namespaces/{}/{}/{name}", item.metadata.namespace, kind.resource)
        } else {
            format!("{root}/{}/{name}", kind.resource)
        })
    }
}
