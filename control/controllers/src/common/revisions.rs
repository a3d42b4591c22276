//! ControllerRevisions: the templates that a StatefulSet or DaemonSet has had, kept so that it can be rolled back.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::runtime::RawExtension;
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

use super::hash;
use super::owned::Owner;
use crate::machine::{Error, Host, controller_reference};

/// Label of pods (its value is the revision) and, for DaemonSets, of revisions.
pub(crate) const HASH_LABEL: &str = "controller-revision-hash";
/// Tries to find a free name for a revision within one reconciliation.
const COLLISIONS: i32 = 20;

/// Which revision is the template of now, and which were.
pub(crate) struct History {
    pub(crate) current: Arc<ControllerRevision>,
    /// Oldest first.
    pub(crate) old: Vec<Arc<ControllerRevision>>,
    /// `status.collisionCount` after this.
    pub(crate) collisions: Option<i32>,
}

/// How a kind names and labels its revisions.
pub(crate) struct Naming {
    /// The label that holds the hash of the revision.
    pub(crate) hash_label: &'static str,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) annotations: BTreeMap<String, String>,
}

/// The patch that brings an object back to a template; `kubectl rollout undo` applies it.
pub(crate) fn data(template: &PodTemplateSpec) -> Result<Value, Error> {
    let encode = |error: serde_json::Error| Error::Invalid(format!("encode the template: {error}"));
    let mut template = serde_json::to_value(template).map_err(encode)?;
    template["$patch"] = "replace".into();
    Ok(json!({"spec": {"template": template}}))
}

/// The template that a revision holds.
pub(crate) fn template(revision: &ControllerRevision) -> Result<PodTemplateSpec, Error> {
    let data = revision.data.as_ref().map(|RawExtension(data)| data);
    let template = data.and_then(|data| data.pointer("/spec/template")).cloned().unwrap_or_default();
    serde_json::from_value(template)
        .map_err(|error| Error::Invalid(format!("revision {} holds no template: {error}", revision.name_any())))
}

/// Finds or makes the revision of the template. `known` are the revisions that the owner controls.
pub(crate) async fn ensure<O: Owner>(
    host: &Host,
    owner: &O,
    known: Vec<Arc<ControllerRevision>>,
    of: &PodTemplateSpec,
    collisions: Option<i32>,
    naming: Naming,
) -> Result<History, Error> {
    let api: Api<ControllerRevision> = Api::namespaced(host.client.clone(), &owner.namespace().unwrap_or_default());
    let wanted = data(of)?;
    let newest = known.iter().map(|revision| revision.revision).max().unwrap_or_default();
    let (mut equal, mut old): (Vec<_>, Vec<_>) =
        known.into_iter().partition(|revision| template(revision).is_ok_and(|template| &template == of));
    equal.sort_by_key(|revision| Reverse((revision.revision, revision.name_any())));
    old.sort_by_key(|revision| (revision.revision, revision.name_any()));
    let mut equal = equal.into_iter();
    let Some(current) = equal.next() else {
        let (current, collisions) = make(host, owner, &api, wanted, newest + 1, collisions, naming).await?;
        return Ok(History { current, old, collisions });
    };
    // A template that comes back becomes the newest revision again.
    let mut current = current;
    if current.revision < newest {
        let patch = json!({"revision": newest + 1, "metadata": {"uid": current.uid()}});
        current = Arc::new(host.patch(&api, &current.name_any(), patch).await?);
    }
    old.extend(equal);
    Ok(History { current, old, collisions })
}

async fn make<O: Owner>(
    host: &Host,
    owner: &O,
    api: &Api<ControllerRevision>,
    data: Value,
    number: i64,
    collisions: Option<i32>,
    naming: Naming,
) -> Result<(Arc<ControllerRevision>, Option<i32>), Error> {
    let mut count = collisions;
    for _ in 0..COLLISIONS {
        let hash =
            hash::of_revision(&data, count).map_err(|error| Error::Invalid(format!("hash the template: {error}")))?;
        let mut labels = naming.labels.clone();
        labels.insert(naming.hash_label.into(), hash.clone());
        let revision = ControllerRevision {
            metadata: ObjectMeta {
                name: Some(format!("{}-{hash}", owner.name_any())),
                namespace: owner.namespace(),
                labels: Some(labels),
                annotations: Some(naming.annotations.clone()),
                owner_references: Some(vec![controller_reference(owner)]),
                ..ObjectMeta::default()
            },
            data: Some(RawExtension(data.clone())),
            revision: number,
        };
        match host.create(api, &revision).await {
            Ok(made) => return Ok((Arc::new(made), count)),
            Err(error) if error.is_already_exists() => {
                let there = api.get(&revision.name_any()).await.map_err(Error::at("get the revision"))?;
                let ours = crate::machine::is_controlled_by(&there.metadata, &owner.uid().unwrap_or_default());
                if ours && there.data == revision.data {
                    return Ok((Arc::new(there), count));
                }
                // Another template with the same hash, or somebody else's revision: take another name.
                count = Some(count.unwrap_or_default() + 1);
            }
            Err(error) => return Err(error),
        }
    }
    Err(Error::Invalid(format!("no free name for a revision of {} after {COLLISIONS} tries", owner.name_any())))
}

/// Removes old revisions beyond the limit, oldest first, but none that a pod still has.
pub(crate) async fn truncate<O: Owner>(
    host: &Host,
    owner: &O,
    old: &[Arc<ControllerRevision>],
    live: &BTreeSet<String>,
    limit: Option<i32>,
    hash_of: impl Fn(&ControllerRevision) -> String,
) -> Result<(), Error> {
    let keep = usize::try_from(limit.unwrap_or(10)).unwrap_or_default();
    let idle: Vec<_> = old.iter().filter(|revision| !live.contains(&hash_of(revision))).collect();
    let api: Api<ControllerRevision> = Api::namespaced(host.client.clone(), &owner.namespace().unwrap_or_default());
    for revision in idle.iter().take(idle.len().saturating_sub(keep)) {
        host.delete(&api, &***revision).await?;
    }
    Ok(())
}
