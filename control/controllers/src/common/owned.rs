//! What an object controls: found by index, adopted when it matches and has no controller, released when it matches no
//! longer.

use std::collections::BTreeMap;
use std::sync::Arc;

use coracle_api::informer::{Cached, Delta, Index, Informer, Objects};
use coracle_api::server::ApiServer;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Api, Resource, ResourceExt};
use serde_json::{Value, json};

use crate::machine::{Error, Host, Key, Kind, WorkQueue, controller_of, controller_reference, is_controlled_by};

/// A cached kind whose objects live in namespaces, as owners of workloads do.
pub(crate) trait Owner: Kind + Cached + Resource<Scope = NamespaceResourceScope> {}
impl<K: Kind + Cached + Resource<Scope = NamespaceResourceScope>> Owner for K {}

/// Objects of one kind by who controls them, shared by all controllers that own such objects.
pub(crate) struct Owned<K> {
    index: Index<K>,
}

/// The index value of an object that nothing controls.
pub(super) fn orphans(namespace: &str) -> String {
    format!("/{namespace}")
}

/// The index value of an object: who controls it.
pub(super) fn owner_of(meta: &ObjectMeta) -> String {
    let owner = controller_of(meta).map(|owner| owner.uid.clone());
    owner.unwrap_or_else(|| orphans(meta.namespace.as_deref().unwrap_or_default()))
}

impl<K: Cached> Owned<K> {
    /// An index over the shared cache of the kind.
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let informer: Arc<Informer<K>> = api.informer();
        Self { index: informer.index(|object: &K| vec![owner_of(object.meta())]) }
    }

    /// What the object with this UID controls.
    pub(crate) fn of(&self, uid: &str) -> Objects<K> {
        self.index.get(uid)
    }

    /// What the owner controls, and what nothing controls in its namespace.
    pub(crate) fn candidates(&self, owner: &impl Resource) -> std::iter::Chain<Objects<K>, Objects<K>> {
        let meta = owner.meta();
        let owned = self.index.get(meta.uid.as_deref().unwrap_or_default());
        owned.chain(self.index.get(&orphans(meta.namespace.as_deref().unwrap_or_default())))
    }
}

/// Of the candidates those that the owner controls, after adopting what it selects and has no controller, and letting go
/// of what it selects no longer. An adopted object gets the finalizer, a released one loses it.
pub(crate) async fn claim<O: Owner, K: Owner>(
    host: &Host,
    owner: &O,
    candidates: impl IntoIterator<Item = Arc<K>>,
    finalizer: Option<&str>,
    selects: impl Fn(&K) -> bool,
) -> Result<Vec<Arc<K>>, Error> {
    let uid = owner.uid().unwrap_or_default();
    let namespace = owner.namespace().unwrap_or_default();
    let api: Api<K> = Api::namespaced(host.client.clone(), &namespace);
    let mut claimed = Vec::new();
    let mut may_adopt = None;
    for object in candidates {
        let (ours, matching) = (is_controlled_by(object.meta(), &uid), selects(&object));
        if ours && matching {
            claimed.push(object);
        } else if owner.meta().deletion_timestamp.is_some() {
            // An owner on its way out neither adopts nor releases.
        } else if ours {
            let patch = release(object.meta(), &uid, finalizer);
            match host.patch(&api, &object.name_any(), patch).await {
                Ok(_) => {}
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        } else if matching && controller_of(object.meta()).is_none() && object.meta().deletion_timestamp.is_none() {
            // The cache may lag behind the deletion of the owner: ask before taking anything.
            if may_adopt.is_none() {
                let live = Api::<O>::namespaced(host.client.clone(), &namespace).get_opt(&owner.name_any()).await;
                let live = live.map_err(Error::at("get the owner"))?;
                may_adopt = Some(live.is_some_and(|live| {
                    live.uid().as_deref() == Some(&uid) && live.meta().deletion_timestamp.is_none()
                }));
            }
            if may_adopt == Some(true) {
                let patch = adopt(object.meta(), owner, finalizer);
                match host.patch(&api, &object.name_any(), patch).await {
                    Ok(adopted) => claimed.push(Arc::new(adopted)),
                    Err(error) if error.is_not_found() => {}
                    Err(error) => return Err(error),
                }
            }
        }
    }
    Ok(claimed)
}

fn adopt<O: Owner>(meta: &ObjectMeta, owner: &O, finalizer: Option<&str>) -> Value {
    let mut owners = meta.owner_references.clone().unwrap_or_default();
    owners.retain(|reference| Some(&reference.uid) != owner.meta().uid.as_ref());
    owners.push(controller_reference(owner));
    let mut patch = json!({"metadata": {"uid": meta.uid, "ownerReferences": owners}});
    if let Some(finalizer) = finalizer {
        let mut all: Vec<&str> = meta.finalizers.iter().flatten().map(String::as_str).collect();
        if !all.contains(&finalizer) {
            all.push(finalizer);
        }
        patch["metadata"]["finalizers"] = json!(all);
    }
    patch
}

fn release(meta: &ObjectMeta, uid: &str, finalizer: Option<&str>) -> Value {
    let owners: Vec<_> = meta.owner_references.iter().flatten().filter(|owner| owner.uid != uid).collect();
    let mut patch = json!({"metadata": {"uid": meta.uid, "ownerReferences": owners}});
    if let Some(finalizer) = finalizer {
        patch["metadata"]["finalizers"] = without(meta, finalizer);
    }
    patch
}

/// The finalizers of an object but this one, for a merge patch.
pub(crate) fn without(meta: &ObjectMeta, finalizer: &str) -> Value {
    json!(meta.finalizers.iter().flatten().filter(|one| *one != finalizer).collect::<Vec<_>>())
}

/// Queues whoever a change concerns: the controller of the object before and after, or all that might adopt an orphan.
pub(crate) fn enqueue<O: Owner, K: Cached>(
    delta: &Delta<K>,
    owners: &Informer<O>,
    queue: &WorkQueue<Key>,
    selects: impl Fn(&O, Option<&BTreeMap<String, String>>) -> bool,
) {
    for object in [&delta.old, &delta.new].into_iter().flatten() {
        let meta = object.meta();
        let namespace = meta.namespace.as_deref().unwrap_or_default();
        match controller_of(meta) {
            Some(owner) if owner.kind == O::kind(&()) && owner.api_version == O::api_version(&()) => {
                queue.add(Key::new(namespace, &owner.name));
            }
            Some(_) => {}
            None => {
                for owner in owners.list_ns(namespace) {
                    if selects(&owner, meta.labels.as_ref()) {
                        queue.add(Key::of(&*owner));
                    }
                }
            }
        }
    }
}
