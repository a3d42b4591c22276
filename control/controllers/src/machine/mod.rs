//! The machine that every controller runs on: deltas of informers become keys, keys are reconciled by a bounded number of
//! workers, failures back off. A controller sees its own writes: a key is not handed out again before the caches have
//! reached the last revision that its reconciliation wrote, so none needs expectations.

mod allowance;
mod host;
mod owners;
mod queue;

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::Instant;

pub(crate) use host::{Host, Kind, Write};
pub(crate) use owners::{controller_of, controller_reference, is_controlled_by};
pub use queue::WorkQueue;

/// Name of an object: namespace (empty for cluster-scoped kinds) and name.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct Key {
    /// Namespace, empty for cluster-scoped kinds.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl Key {
    /// The key of an object in a namespace.
    pub(crate) fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    /// The key of an object by its metadata.
    pub(crate) fn of<K: kube::Resource>(object: &K) -> Self {
        let meta = object.meta();
        Self::new(meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() { f.write_str(&self.name) } else { write!(f, "{}/{}", self.namespace, self.name) }
    }
}

/// A race that is lost again and again until the back-off has grown to this is worth a warning.
const NEWS: Duration = Duration::from_secs(2);

/// What a reconciliation asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Outcome {
    /// Nothing until something changes.
    Done,
    /// Another look after this time at the latest.
    After(Duration),
}

/// Why a reconciliation ended early; it is tried again with back-off.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{step}: {source}")]
    Api { step: &'static str, source: kube::Error },
    #[error("{0}")]
    Invalid(String),
}

impl Error {
    /// For `map_err` of an API call: says which step failed.
    pub(crate) fn at(step: &'static str) -> impl FnOnce(kube::Error) -> Self {
        move |source| Self::Api { step, source }
    }

    /// Whether another writer was faster, or what this is about is gone or going: the next look sees that.
    fn is_race(&self) -> bool {
        let crossed = |code: u16| matches!(code, 404 | 409);
        matches!(self, Self::Api { source: kube::Error::Api(status), .. } if crossed(status.code))
            || self.in_terminating_namespace()
    }

    /// Whether the object is not there (any more).
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Api { source: kube::Error::Api(status), .. } if status.code == 404)
    }

    /// Whether the name is taken.
    pub(crate) fn is_already_exists(&self) -> bool {
        matches!(self, Self::Api { source: kube::Error::Api(status), .. } if status.reason == "AlreadyExists")
    }

    /// Whether nothing can be made because the namespace is being deleted.
    pub(crate) fn in_terminating_namespace(&self) -> bool {
        let Self::Api { source: kube::Error::Api(status), .. } = self else { return false };
        let causes = status.details.iter().flat_map(|details| &details.causes);
        causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating")
    }

    /// What users read in events and conditions: the server's own words where it answered.
    pub(crate) fn message(&self) -> String {
        match self {
            Self::Api { source: kube::Error::Api(status), .. } => status.message.clone(),
            other => other.to_string(),
        }
    }
}

/// A loop that moves what is towards what is wanted, one key at a time.
pub(crate) trait Controller: Send + Sync + Sized + 'static {
    /// Name of its service account in `kube-system`, whose RBAC rules it writes with.
    const NAME: &'static str;
    /// How many keys are reconciled at once.
    const WORKERS: usize = 4;

    /// Least time between the beginnings of two looks at a key. What takes long to look at and changes all the time is looked
    /// at less often, and sees more changes at once.
    fn pace(&self, _key: &Key) -> Duration {
        Duration::ZERO
    }

    /// Tells which changes concern which keys.
    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>);

    /// Looks at what is and does what is missing. May be ended at any await and called again.
    fn reconcile(&self, key: &Key) -> impl Future<Output = Result<Outcome, Error>> + Send;

    /// Its connection to the API.
    fn host(&self) -> &Host;
}

/// The tasks that feed a controller's queue.
pub(crate) struct Sources<C> {
    pub(crate) queue: Arc<WorkQueue<Key>>,
    tasks: JoinSet<()>,
    controller: Arc<C>,
}

impl<C: Controller> Sources<C> {
    /// Maps each delta of an informer, first those of what exists already, to keys.
    pub(crate) fn watch<K, F>(&mut self, informer: &Arc<coracle_api::informer::Informer<K>>, mut map: F)
    where
        K: coracle_api::informer::Cached,
        F: FnMut(&C, &coracle_api::informer::Delta<K>, &WorkQueue<Key>) + Send + 'static,
    {
        let (queue, controller, informer) = (self.queue.clone(), self.controller.clone(), informer.clone());
        self.tasks.spawn(async move {
            let mut deltas = informer.subscribe();
            while let Some(delta) = deltas.next().await {
                map(&controller, &delta, &queue);
            }
        });
    }

    /// Runs a source of another kind until the controller ends.
    pub(crate) fn spawn(&mut self, source: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(source);
    }
}

/// Queues the object itself that was made, changed or removed: what most controllers do with their own kind.
pub(crate) fn own<C, K: coracle_api::informer::Cached>(
    _: &C,
    delta: &coracle_api::informer::Delta<K>,
    queue: &WorkQueue<Key>,
) {
    if let Some(object) = delta.new.as_ref().or(delta.old.as_ref()) {
        queue.add(Key::of(&**object));
    }
}

/// Runs a controller until the future is dropped.
pub(crate) async fn run<C: Controller>(controller: C) {
    let controller = Arc::new(controller);
    let queue = Arc::new(WorkQueue::default());
    let mut sources = Sources { queue: queue.clone(), tasks: JoinSet::new(), controller: controller.clone() };
    controller.sources(&mut sources);
    controller.host().synced().await;
    let mut workers = sources.tasks;
    let written: Arc<Mutex<HashMap<Key, Vec<Write>>>> = Arc::default();
    for _ in 0..C::WORKERS {
        let (controller, queue, written) = (controller.clone(), queue.clone(), written.clone());
        workers.spawn(async move {
            loop {
                let key = queue.next().await;
                let began = Instant::now();
                work(&*controller, &queue, &written, &key).await;
                let rest = controller.pace(&key).saturating_sub(began.elapsed());
                queue.done_after(key, rest);
            }
        });
    }
    while let Some(ended) = workers.join_next().await {
        if let Err(error) = ended {
            tracing::error!(controller = C::NAME, %error, "a task of the controller ended");
        }
    }
}

async fn work<C: Controller>(
    controller: &C,
    queue: &WorkQueue<Key>,
    written: &Mutex<HashMap<Key, Vec<Write>>>,
    key: &Key,
) {
    let before = written.lock().remove(key);
    for write in before.into_iter().flatten() {
        controller.host().reached(&write).await;
    }
    let (result, writes) = host::WRITES
        .scope(Mutex::default(), async {
            let result = controller.reconcile(key).await;
            (result, host::WRITES.with(|writes| std::mem::take(&mut *writes.lock())))
        })
        .await;
    if !writes.is_empty() {
        written.lock().insert(key.clone(), writes);
    }
    match result {
        Ok(outcome) => {
            queue.forget(key);
            if let Outcome::After(delay) = outcome {
                queue.add_after(key.clone(), delay);
            }
        }
        Err(error) => {
            let delay = queue.retry(key.clone());
            if error.is_race() && delay < NEWS {
                tracing::debug!(controller = C::NAME, %key, %error, ?delay, "trying again");
            } else {
                tracing::warn!(controller = C::NAME, %key, %error, ?delay, "reconciliation failed, trying again");
            }
        }
    }
}
