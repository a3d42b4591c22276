//! A controller's connection to the API: shared caches to read, a client with the controller's identity to write, and
//! the memory of what it wrote.

use std::any::TypeId;
use std::fmt::Debug;
use std::sync::Arc;

use coracle_api::informer::{Cached, Informer};
use coracle_api::server::ApiServer;
use coracle_api::user::UserInfo;
use futures::future::BoxFuture;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource, ResourceExt};
use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::allowance::Allowance;
use super::{Error, Key};

tokio::task_local! {
    /// What the reconciliation under way has written.
    pub(super) static WRITES: Mutex<Vec<Write>>;
}

/// A write that the cache of its kind will show.
#[derive(Clone, Debug)]
pub(crate) struct Write {
    kind: TypeId,
    what: What,
}

#[derive(Clone, Debug)]
enum What {
    /// It has this revision.
    Put(u64),
    /// This object, by key and UID, is gone or on its way.
    Deleted(Key, String),
}

/// An informer without its type: what waiting for it needs.
trait Reach: Send + Sync {
    fn kind(&self) -> TypeId;
    fn synced(&self) -> BoxFuture<'_, ()>;
    fn shows<'a>(&'a self, what: &'a What) -> BoxFuture<'a, ()>;
}

impl<K: Cached> Reach for Informer<K> {
    fn kind(&self) -> TypeId {
        TypeId::of::<K>()
    }
    fn synced(&self) -> BoxFuture<'_, ()> {
        Box::pin(Informer::synced(self))
    }
    fn shows<'a>(&'a self, what: &'a What) -> BoxFuture<'a, ()> {
        match what {
            What::Put(revision) => Box::pin(self.reached(*revision)),
            What::Deleted(key, uid) => Box::pin(self.deleted(&key.namespace, &key.name, uid)),
        }
    }
}

/// The type of a kind that is stored, cached and written.
pub(crate) trait Kind:
    Resource<DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned + Send + Sync + 'static
{
}
impl<K> Kind for K where
    K: Resource<DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned + Send + Sync + 'static
{
}

/// One controller's way to the API.
pub(crate) struct Host {
    api: Arc<ApiServer>,
    pub(crate) client: Client,
    name: &'static str,
    recorder: Recorder,
    allowance: Allowance,
    used: Vec<Arc<dyn Reach>>,
}

impl Host {
    /// A connection with the identity of the controller `name`.
    pub(crate) fn new(api: &Arc<ApiServer>, name: &'static str) -> Self {
        let client = api.client(UserInfo::controller(name));
        let recorder = Recorder::new(client.clone(), Reporter { controller: name.into(), instance: None });
        Self { api: api.clone(), client, name, recorder, allowance: Allowance::default(), used: Vec::new() }
    }

    /// The shared cache of a kind, which the machine then waits for.
    pub(crate) fn informer<K: Cached>(&mut self) -> Arc<Informer<K>> {
        let informer = self.api.informer::<K>();
        self.used.push(informer.clone());
        informer
    }

    pub(crate) async fn synced(&self) {
        for informer in &self.used {
            informer.synced().await;
        }
    }

    /// Waits until the cache shows a write; at once for kinds that this controller does not read.
    pub(super) async fn reached(&self, write: &Write) {
        if let Some(informer) = self.used.iter().find(|informer| informer.kind() == write.kind) {
            informer.shows(&write.what).await;
        }
    }

    fn wrote<K: Kind>(&self, object: &K) {
        let Some(revision) = object.resource_version().and_then(|version| version.parse().ok()) else {
            return;
        };
        self.note::<K>(What::Put(revision));
    }

    fn note<K: Kind>(&self, what: What) {
        // Outside a reconciliation nobody asks for the writes.
        let _ = WRITES.try_with(|writes| writes.lock().push(Write { kind: TypeId::of::<K>(), what }));
    }

    /// Creates an object.
    pub(crate) async fn create<K: Kind>(&self, api: &Api<K>, object: &K) -> Result<K, Error> {
        let parameters = PostParams { field_manager: Some(self.name.into()), ..PostParams::default() };
        let created = api.create(&parameters, object).await.map_err(Error::at("create"))?;
        self.wrote(&created);
        Ok(created)
    }

    /// Replaces an object that has not changed since it was read.
    pub(crate) async fn replace<K: Kind>(&self, api: &Api<K>, object: &K) -> Result<K, Error> {
        let parameters = PostParams { field_manager: Some(self.name.into()), ..PostParams::default() };
        let replaced = api.replace(&object.name_any(), &parameters, object).await.map_err(Error::at("update"))?;
        self.wrote(&replaced);
        Ok(replaced)
    }

    /// Replaces the status of an object that has not changed since it was read.
    pub(crate) async fn replace_status<K: Kind>(&self, api: &Api<K>, object: &K) -> Result<K, Error> {
        let parameters = PostParams { field_manager: Some(self.name.into()), ..PostParams::default() };
        let replaced =
            api.replace_status(&object.name_any(), &parameters, object).await.map_err(Error::at("update status"))?;
        self.wrote(&replaced);
        Ok(replaced)
    }

    /// Merge-patches an object.
    pub(crate) async fn patch<K: Kind>(&self, api: &Api<K>, name: &str, patch: serde_json::Value) -> Result<K, Error> {
        let parameters = PatchParams { field_manager: Some(self.name.into()), ..PatchParams::default() };
        let patched = api.patch(name, &parameters, &Patch::Merge(patch)).await.map_err(Error::at("patch"))?;
        self.wrote(&patched);
        Ok(patched)
    }

    /// Merge-patches an object's status.
    pub(crate) async fn patch_status<K: Kind>(
        &self,
        api: &Api<K>,
        name: &str,
        patch: serde_json::Value,
    ) -> Result<K, Error> {
        let parameters = PatchParams { field_manager: Some(self.name.into()), ..PatchParams::default() };
        let patch = Patch::Merge(patch);
        let patched = api.patch_status(name, &parameters, &patch).await.map_err(Error::at("patch status"))?;
        self.wrote(&patched);
        Ok(patched)
    }

    /// Deletes an object if it is still the one with this UID; one that is gone already is no error.
    pub(crate) async fn delete<K: Kind>(&self, api: &Api<K>, object: &K) -> Result<(), Error> {
        self.delete_with(api, object, DeleteParams::background()).await
    }

    /// Deletes an object as [`Host::delete`] does, without a grace period.
    pub(crate) async fn delete_now<K: Kind>(&self, api: &Api<K>, object: &K) -> Result<(), Error> {
        self.delete_with(api, object, DeleteParams::background().grace_period(0)).await
    }

    /// Deletes an object as [`Host::delete`] does, after what depends on it.
    pub(crate) async fn delete_foreground<K: Kind>(&self, api: &Api<K>, object: &K) -> Result<(), Error> {
        self.delete_with(api, object, DeleteParams::foreground()).await
    }

    async fn delete_with<K: Kind>(&self, api: &Api<K>, object: &K, mut parameters: DeleteParams) -> Result<(), Error> {
        parameters.preconditions =
            object.uid().map(|uid| kube::api::Preconditions { uid: Some(uid), resource_version: None });
        match api.delete(&object.name_any(), &parameters).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => {}
            Err(error) => return Err(Error::at("delete")(error)),
        }
        self.note::<K>(What::Deleted(Key::of(object), object.uid().unwrap_or_default()));
        Ok(())
    }

    /// Publishes an event about an object, unless there were many about it. Events are news, not state: one that cannot be
    /// written is logged.
    pub(crate) async fn event<K: Kind>(&self, about: &K, type_: EventType, reason: &str, action: &str, note: String) {
        if !self.allowance.take(about.meta().uid.as_deref().unwrap_or_default()) {
            return;
        }
        let event = Event { type_, reason: reason.into(), note: Some(note), action: action.into(), secondary: None };
        if let Err(error) = self.recorder.publish(&event, &about.object_ref(&())).await {
            tracing::warn!(controller = self.name, reason, %error, "event not written");
        }
    }
}
