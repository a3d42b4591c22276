//! ConfigMaps and Secrets that pods of this node use, each watched by name while somebody uses it.
//!
//! A node may read only what its pods refer to, so there is one watch per object rather than one per kind.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use super::error::VolumeError;
use crate::images::registry::Keyring;

/// Objects watched at once.
const MAX_OBJECTS: usize = 20_000;
/// How long the first answer may take before the pod is told so; the worker tries again.
const FIRST_ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// The two kinds that volumes and environments are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ObjectKind {
    /// v1 ConfigMap
    ConfigMap,
    /// v1 Secret
    Secret,
}

impl ObjectKind {
    /// As messages name it.
    pub fn word(self) -> &'static str {
        match self {
            Self::ConfigMap => "configmap",
            Self::Secret => "secret",
        }
    }
}

/// Which object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Its kind.
    pub kind: ObjectKind,
    /// `metadata.namespace`
    pub namespace: String,
    /// `metadata.name`
    pub name: String,
}

/// What an object holds.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ObjectData {
    /// `data` and `binaryData`.
    pub data: BTreeMap<String, Vec<u8>>,
    /// `type` of a secret.
    pub secret_type: String,
}

impl std::fmt::Debug for ObjectData {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "ObjectData({} keys)", self.data.len())
    }
}

#[derive(Clone, Debug)]
enum State {
    Unknown,
    Failed(String),
    Absent,
    Present(Arc<ObjectData>),
}

/// A use of an object; the watch goes on while there is one.
#[derive(Clone, Debug)]
pub struct ObjectUse(Arc<Watched>);

#[derive(Debug)]
struct Watched {
    key: ObjectKey,
    state: watch::Receiver<State>,
    task: tokio::task::AbortHandle,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The watched objects. Cheap to clone.
#[derive(Clone)]
pub struct ObjectCache {
    client: Client,
    watched: Arc<Mutex<HashMap<ObjectKey, Weak<Watched>>>>,
    changed: Arc<Changes>,
}

/// Objects that changed since somebody looked. A set, so it is bounded by the number of objects.
#[derive(Default)]
pub(super) struct Changes {
    keys: Mutex<std::collections::BTreeSet<ObjectKey>>,
    notify: Notify,
}

impl Changes {
    fn note(&self, key: &ObjectKey) {
        self.keys.lock().insert(key.clone());
        self.notify.notify_one();
    }

    /// Waits for changes and takes them.
    pub(super) async fn next(&self) -> Vec<ObjectKey> {
        loop {
            let notified = self.notify.notified();
            let keys = std::mem::take(&mut *self.keys.lock());
            if !keys.is_empty() {
                return keys.into_iter().collect();
            }
            notified.await;
        }
    }
}

impl ObjectCache {
    /// A cache that asks through `client`.
    pub fn new(client: Client) -> Self {
        Self { client, watched: Arc::default(), changed: Arc::default() }
    }

    /// The client it asks through.
    pub fn client(&self) -> &Client {
        &self.client
    }

    pub(super) fn changes(&self) -> Arc<Changes> {
        self.changed.clone()
    }

    /// Begins (or joins) the watch of an object.
    ///
    /// # Errors
    /// When too many objects are watched.
    pub fn watch(&self, key: &ObjectKey) -> Result<ObjectUse, VolumeError> {
        let mut watched = self.watched.lock();
        if let Some(known) = watched.get(key).and_then(Weak::upgrade) {
            return Ok(ObjectUse(known));
        }
        if watched.len() >= MAX_OBJECTS {
            watched.retain(|_, known| known.strong_count() > 0);
            if watched.len() >= MAX_OBJECTS {
                return Err(VolumeError::TooMany { what: "number of watched objects", limit: MAX_OBJECTS });
            }
        }
        let (sender, state) = watch::channel(State::Unknown);
        let (client, changed, wanted) = (self.client.clone(), self.changed.clone(), key.clone());
        let task = match key.kind {
            ObjectKind::ConfigMap => {
                tokio::spawn(follow::<ConfigMap>(client, wanted, sender, changed, |object| ObjectData {
                    data: object
                        .data
                        .unwrap_or_default()
                        .into_iter()
                        .map(|(key, text)| (key, text.into_bytes()))
                        .chain(object.binary_data.unwrap_or_default().into_iter().map(|(key, bytes)| (key, bytes.0)))
                        .collect(),
                    secret_type: String::new(),
                }))
            }
            ObjectKind::Secret => {
                tokio::spawn(follow::<Secret>(client, wanted, sender, changed, |object| ObjectData {
                    data: object.data.unwrap_or_default().into_iter().map(|(key, bytes)| (key, bytes.0)).collect(),
                    secret_type: object.type_.unwrap_or_default(),
                }))
            }
        };
        let known = Arc::new(Watched { key: key.clone(), state, task: task.abort_handle() });
        watched.insert(key.clone(), Arc::downgrade(&known));
        Ok(ObjectUse(known))
    }

    /// An object's content once; `None` if it does not exist.
    ///
    /// # Errors
    /// When the API server cannot be asked.
    pub async fn get(&self, key: &ObjectKey) -> Result<Option<Arc<ObjectData>>, VolumeError> {
        self.watch(key)?.get().await
    }
}

impl ObjectCache {
    /// The credentials of a pod's `imagePullSecrets`. A secret that does not exist or is malformed is passed over with a
    /// warning, as the pull may work without it.
    ///
    /// # Errors
    /// When the API server cannot be asked.
    pub async fn pull_secrets(&self, pod: &Pod) -> Result<Keyring, VolumeError> {
        let mut keyring = Keyring::default();
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let secrets = pod.spec.as_ref().and_then(|spec| spec.image_pull_secrets.as_deref()).unwrap_or_default();
        for secret in secrets {
            let key =
                ObjectKey { kind: ObjectKind::Secret, namespace: namespace.to_owned(), name: secret.name.clone() };
            let Some(data) = self.get(&key).await? else {
                tracing::warn!(namespace, secret = %secret.name, "image pull secret not found");
                continue;
            };
            if let Err(error) = keyring.add_secret(&data.secret_type, &data.data) {
                tracing::warn!(namespace, secret = %secret.name, %error, "image pull secret is malformed");
            }
        }
        Ok(keyring)
    }
}

impl ObjectUse {
    /// Which object.
    pub fn key(&self) -> &ObjectKey {
        &self.0.key
    }

    /// The newest content; waits for the first. `None` if the object does not exist.
    ///
    /// # Errors
    /// When the API server could not be asked in time.
    pub async fn get(&self) -> Result<Option<Arc<ObjectData>>, VolumeError> {
        let mut state = self.0.state.clone();
        let known =
            tokio::time::timeout(FIRST_ANSWER_TIMEOUT, state.wait_for(|state| !matches!(state, State::Unknown)));
        let error =
            |reason: String| VolumeError::Api { kind: self.0.key.kind.word(), name: self.0.key.name.clone(), reason };
        match known.await {
            Ok(Ok(state)) => match &*state {
                State::Present(data) => Ok(Some(data.clone())),
                State::Absent => Ok(None),
                State::Failed(reason) => Err(error(reason.clone())),
                State::Unknown => Err(error("no answer yet".into())),
            },
            Ok(Err(_)) => Err(error("its watch ended".into())),
            Err(_) => Err(error(format!("no answer within {} s", FIRST_ANSWER_TIMEOUT.as_secs()))),
        }
    }
}

/// Follows one object for as long as somebody uses it.
async fn follow<K>(
    client: Client,
    key: ObjectKey,
    sender: watch::Sender<State>,
    changed: Arc<Changes>,
    convert: fn(K) -> ObjectData,
) where
    K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned
        + Send
        + 'static,
{
    let api: Api<K> = Api::namespaced(client, &key.namespace);
    let config = watcher::Config::default().fields(&format!("metadata.name={}", key.name));
    let mut events = watcher(api, config).default_backoff().boxed();
    let mut seen_in_list = None;
    loop {
        let next = match events.try_next().await {
            Ok(Some(watcher::Event::Init)) => {
                seen_in_list = None;
                continue;
            }
            Ok(Some(watcher::Event::InitApply(object))) => {
                seen_in_list = Some(object);
                continue;
            }
            Ok(Some(watcher::Event::InitDone)) => match seen_in_list.take() {
                Some(object) => State::Present(Arc::new(convert(object))),
                None => State::Absent,
            },
            Ok(Some(watcher::Event::Apply(object))) => State::Present(Arc::new(convert(object))),
            Ok(Some(watcher::Event::Delete(_))) => State::Absent,
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(kind = key.kind.word(), namespace = %key.namespace, name = %key.name, %error, "watch broke");
                // What was known stays known: a server that is away does not take volumes away.
                if matches!(*sender.borrow(), State::Unknown | State::Failed(_)) {
                    sender.send_replace(State::Failed(error.to_string()));
                }
                continue;
            }
        };
        let fresh = sender.send_if_modified(|state| {
            let same = match (&*state, &next) {
                (State::Present(old), State::Present(new)) => old == new,
                (State::Absent, State::Absent) => true,
                _ => false,
            };
            *state = next;
            !same
        });
        if fresh {
            changed.note(&key);
        }
    }
}
