//! The loop around the engine: changes of objects in, writes out, many at a time.

mod bind;
mod devices;
mod report;
mod turn;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::{Cached, Delta, Deltas, Informer};
use coracle_api::server::ApiServer;
use coracle_api::user::UserInfo;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use k8s_openapi::api::resource::v1::ResourceClaim;
use kube::Client;
use kube::runtime::events::{Recorder, Reporter};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use self::turn::Turns;
use crate::config::Config;
use crate::engine::{Action, Bind, Engine};
use crate::update::Update;

/// Bindings and reports under way at once: enough to fill the store's group commits.
const MAX_WRITES: usize = 512;
/// Events under way at once; more of them are dropped, as they are news and no state.
const MAX_EVENTS: usize = 1024;
/// Changes that may wait for the loop; behind them they gather in the feeds, one an object.
const MAX_UPDATES: usize = 1024;
/// Changes taken in before the next pod is looked at.
const UPDATES_AT_ONCE: usize = 256;
/// Sleep when nothing is due; only a bound, every change wakes the loop.
const IDLE: Duration = Duration::from_secs(3600);

/// What a task of the loop came to.
enum Outcome {
    /// A binding ended, well or not.
    Bound(Box<Bind>, bool),
    /// A report ended; whether all victims were told to leave.
    Reported(Arc<str>, bool),
}

/// What tasks write with.
#[derive(Clone)]
struct Writer {
    client: Client,
    /// Recorders of events, by profile.
    recorders: Arc<HashMap<String, Recorder>>,
    pods: Arc<Informer<Pod>>,
    claims: Arc<Informer<PersistentVolumeClaim>>,
    resource_claims: Arc<Informer<ResourceClaim>>,
    /// Wakes whoever waits for a claim.
    storage: watch::Sender<()>,
    writes: Arc<Semaphore>,
    events: Arc<Semaphore>,
    turns: Turns,
    outcomes: mpsc::UnboundedSender<Outcome>,
}

/// Feeds of all kinds, each of which goes on in a task of its own once its first objects are taken in.
struct Feeds {
    updates: mpsc::Sender<Update>,
    tasks: JoinSet<()>,
}

impl Feeds {
    async fn open<K: Cached>(&mut self, informer: &Informer<K>, engine: &mut Engine, update: fn(Delta<K>) -> Update) {
        informer.synced().await;
        let mut deltas: Deltas<K> = informer.subscribe();
        while let Some(delta) = deltas.try_next() {
            engine.update(&update(delta), Instant::now());
        }
        let updates = self.updates.clone();
        self.tasks.spawn(async move {
            while let Some(delta) = deltas.next().await {
                if updates.send(update(delta)).await.is_err() {
                    return;
                }
            }
        });
    }
}

/// Schedules pods until the future is dropped. At most one process of a cluster may do so at a time.
pub async fn run(api: Arc<ApiServer>, config: Config) {
    let client = api.client(UserInfo::new("system:kube-scheduler", &[]));
    let recorder = |name: &str| Recorder::new(client.clone(), Reporter { controller: name.to_owned(), instance: None });
    let recorders = config.profiles.iter().map(|profile| (profile.name.clone(), recorder(&profile.name))).collect();
    // As many messages at most as writes under way, which the semaphore bounds, and bindings of volumes.
    let (outcomes, mut ended) = mpsc::unbounded_channel();
    let writer = Writer {
        recorders: Arc::new(recorders),
        pods: api.informer(),
        claims: api.informer(),
        resource_claims: api.informer(),
        storage: watch::Sender::new(()),
        writes: Arc::new(Semaphore::new(MAX_WRITES)),
        events: Arc::new(Semaphore::new(MAX_EVENTS)),
        client,
        turns: Turns::default(),
        outcomes,
    };
    let (updates, mut changes) = mpsc::channel(MAX_UPDATES);
    let mut feeds = Feeds { updates, tasks: JoinSet::new() };
    let mut engine = Engine::new(config, rand::random());
    macro_rules! open {
        ($($variant:ident),*) => { $(feeds.open(&api.informer(), &mut engine, Update::$variant).await;)* };
    }
    // Nodes and pods on them last, so that no pod is looked at before what it refers to.
    open!(Namespace, Service, ReplicationController, ReplicaSet, StatefulSet, Budget, StorageClass, CsiNode, CsiDriver);
    open!(Capacity, Attachment, Volume, Claim, DeviceClass, ResourceSlice, ResourceClaim, Node, Pod);
    loop {
        for _ in 0..UPDATES_AT_ONCE {
            let Ok(change) = changes.try_recv() else { break };
            take(&mut engine, &writer, &change);
        }
        while let Ok(outcome) = ended.try_recv() {
            finish(&mut engine, outcome);
        }
        let permit = writer.writes.clone().try_acquire_owned().ok();
        let has_room = permit.is_some();
        if let Some(permit) = permit
            && let Some(action) = engine.step(Instant::now())
        {
            match action {
                Action::Bind(bind) => drop(tokio::spawn(bind::run(writer.clone(), bind, permit))),
                Action::Report(report) => {
                    let turns = report::turns(&writer, &report);
                    drop(tokio::spawn(report::run(writer.clone(), report, turns, permit)));
                }
            }
            tokio::task::yield_now().await;
            continue;
        }
        let due = engine.next_due().unwrap_or_else(|| Instant::now() + IDLE);
        tokio::select! {
            Some(change) = changes.recv() => take(&mut engine, &writer, &change),
            Some(outcome) = ended.recv() => finish(&mut engine, outcome),
            // Without room for another write nothing is due: the end of one makes room.
            () = tokio::time::sleep_until(due), if has_room => {}
        }
    }
}

fn take(engine: &mut Engine, writer: &Writer, change: &Update) {
    engine.update(change, Instant::now());
    if matches!(change, Update::Claim(_) | Update::ResourceClaim(_)) {
        writer.storage.send_replace(());
    }
}

fn finish(engine: &mut Engine, outcome: Outcome) {
    match outcome {
        Outcome::Bound(bind, succeeded) => engine.bound(&bind, succeeded, Instant::now()),
        Outcome::Reported(uid, true) => drop(uid),
        Outcome::Reported(uid, false) => engine.retry(&uid, Instant::now()),
    }
}
