//! ResourceQuotas: what a namespace holds is counted into `status.used`. Admission charges what is made; this loop counts
//! anew when something is made or goes, so that what admission charged for a request that failed is given back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use coracle_api::admission::quota::{Usage, in_scope, usage};
use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use coracle_store::EventKind;
use k8s_openapi::api::core::v1::{ResourceQuota, ResourceQuotaStatus};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::Api;

use crate::machine::{Controller, Error, Host, Key, Outcome, Sources, WorkQueue, own};

/// All objects in the store.
const EVERYTHING: &str = "/registry/";
/// Objects that may count for more or less after a change.
const RESIZED: [&str; 2] = ["/registry/services/", "/registry/persistentvolumeclaims/"];
/// How often everything is counted anew, whatever happened.
const RESYNC: Duration = Duration::from_secs(300);
/// Pause before a lost watch is taken up again.
const RETRY: Duration = Duration::from_millis(500);

pub(crate) struct Quotas {
    api: Arc<ApiServer>,
    host: Host,
    quotas: Arc<Informer<ResourceQuota>>,
}

impl Quotas {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        Self { api: api.clone(), quotas: host.informer(), host }
    }

    /// Follows all objects: a quota is looked at when something in its namespace comes, goes or ends.
    async fn follow(&self, queue: &WorkQueue<Key>) -> Result<(), coracle_store::Error> {
        let from = self.api.store.revision().await?;
        let mut watch = self.api.store.watch(EVERYTHING, from).await?;
        // Whatever was missed before is counted now.
        for quota in self.quotas.list() {
            queue.add(Key::of(&*quota));
        }
        loop {
            let batch = watch.next().await?;
            for event in &batch.events {
                let counts = match event.kind {
                    EventKind::Delete => true,
                    EventKind::Put => {
                        event.entry.create_revision == event.entry.revision
                            || RESIZED.iter().any(|prefix| event.entry.key.starts_with(prefix))
                            || pod_ended(&event.entry.key, &event.entry.value)
                    }
                };
                if let (true, Some(namespace)) = (counts, namespace_of(&event.entry.key)) {
                    for quota in self.quotas.list_ns(namespace) {
                        queue.add(Key::of(&*quota));
                    }
                }
            }
        }
    }

    /// What the quota's namespace holds of each name that the quota counts.
    async fn count(&self, quota: &ResourceQuota, namespace: &str) -> Result<BTreeMap<String, Quantity>, Error> {
        let hard = quota.spec.as_ref().and_then(|s| s.hard.clone()).unwrap_or_default();
        let scopes = serde_json::to_value(quota).map_err(|e| Error::Invalid(format!("encode the quota: {e}")))?;
        let mut sums = Usage::new();
        for (group, resource) in hard.keys().map(|name| counted(name)).collect::<BTreeSet<_>>() {
            let Some(kind) = self.api.registry.find_stored(&group, &resource) else { continue };
            let failed = |e| Error::Invalid(format!("list {resource} of {namespace}: {e}"));
            for object in self.api.each(&kind, namespace).await.map_err(failed)? {
                let object = object.map_err(failed)?;
                if !in_scope(&scopes, &group, &resource, &object) {
                    continue;
                }
                for (name, amount) in usage(&group, &resource, &object) {
                    let slot = sums.entry(name).or_insert(amount.minus(amount));
                    *slot = slot.plus(amount);
                }
            }
        }
        let used = |name: &String| Quantity(sums.get(name).map_or_else(|| "0".to_owned(), ToString::to_string));
        Ok(hard.keys().map(|name| (name.clone(), used(name))).collect())
    }
}

/// Group and resource of the objects that a quota's name is about.
fn counted(name: &str) -> (String, String) {
    if let Some(counted) = name.strip_prefix("count/") {
        let (resource, group) = counted.split_once('.').unwrap_or((counted, ""));
        return (group.to_owned(), resource.to_owned());
    }
    let resource = match name {
        "configmaps" | "secrets" | "replicationcontrollers" | "resourcequotas" | "persistentvolumeclaims" => name,
        "requests.storage" => "persistentvolumeclaims",
        _ if name.contains(".storageclass.storage.k8s.io/") => "persistentvolumeclaims",
        _ if name.starts_with("services") => "services",
        _ => "pods",
    };
    (String::new(), resource.to_owned())
}

/// The namespace in a key such as `/registry/pods/default/web` or `/registry/apps/deployments/default/web`.
fn namespace_of(key: &str) -> Option<&str> {
    key.rsplit('/').nth(1)
}

fn pod_ended(key: &str, value: &[u8]) -> bool {
    const ENDS: [&[u8]; 2] = [b"\"phase\":\"Succeeded\"", b"\"phase\":\"Failed\""];
    key.starts_with("/registry/pods/") && ENDS.iter().any(|end| value.windows(end.len()).any(|w| w == *end))
}

impl Controller for Quotas {
    const NAME: &'static str = "resourcequota-controller";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        // Not when admission charges: what it charges for is not written yet, and would be taken back.
        sources.watch(&self.quotas, |me, delta, queue| {
            let spec = |quota: &Option<Arc<ResourceQuota>>| quota.as_ref().map(|quota| quota.spec.clone());
            if spec(&delta.old) != spec(&delta.new) {
                own(me, delta, queue);
            }
        });
        let (me, queue) = (self.clone(), sources.queue.clone());
        sources.spawn(async move {
            loop {
                if let Err(error) = me.follow(&queue).await {
                    tracing::debug!(%error, "quotas take their watch up again");
                }
                tokio::time::sleep(RETRY).await;
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(quota) = self.quotas.get(&key.namespace, &key.name) else { return Ok(Outcome::Done) };
        if quota.metadata.deletion_timestamp.is_some() {
            return Ok(Outcome::Done);
        }
        let status = ResourceQuotaStatus {
            hard: quota.spec.as_ref().and_then(|s| s.hard.clone()),
            used: Some(self.count(&quota, &key.namespace).await?),
        };
        if quota.status.as_ref() != Some(&status) {
            let api: Api<ResourceQuota> = Api::namespaced(self.host.client.clone(), &key.namespace);
            self.host.replace_status(&api, &ResourceQuota { status: Some(status), ..(*quota).clone() }).await?;
        }
        Ok(Outcome::After(RESYNC))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_to_objects() {
        for (name, group, resource) in [
            ("pods", "", "pods"),
            ("requests.cpu", "", "pods"),
            ("services.nodeports", "", "services"),
            ("count/deployments.apps", "apps", "deployments"),
            ("count/configmaps", "", "configmaps"),
            ("gold.storageclass.storage.k8s.io/requests.storage", "", "persistentvolumeclaims"),
        ] {
            assert_eq!(counted(name), (group.to_owned(), resource.to_owned()), "{name}");
        }
        assert_eq!(namespace_of("/registry/apps/deployments/default/web"), Some("default"));
        assert!(pod_ended("/registry/pods/a/b", br#"{"status":{"phase":"Failed"}}"#));
    }
}
