//! Priority and fairness: which requests wait for which, as FlowSchemas and PriorityLevelConfigurations say.
//!
//! Source: KEP-1040, `k8s.io/apiserver/pkg/util/flowcontrol`. Every request costs one seat.

mod rules;
mod seats;

mod conditions;

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use http::header::HeaderName;
use k8s_openapi::api::flowcontrol::v1::{FlowSchema, PriorityLevelConfiguration};
use parking_lot::RwLock;

use crate::http::Route;
use crate::informer::Informer;
use crate::metrics;
use crate::server::ApiServer;
use crate::status::Status;
use crate::user::UserInfo;
pub(crate) use rules::Schema;
use rules::Schemas;
use seats::{Entry, Seats};
pub(crate) use seats::{Level, Seat};

/// Requests of limited levels in flight (`--max-requests-inflight` and `--max-mutating-requests-inflight` together).
const SEATS: usize = 600;
/// How long a request waits for a seat before it is turned away.
const PATIENCE: Duration = Duration::from_secs(15);
/// Pause after built-in rules could not be written.
const KEEP_AGAIN: Duration = Duration::from_secs(1);
/// When to try again, in seconds.
const RETRY_AFTER_SECONDS: u32 = 1;

/// The rules in force and the seats that are taken.
#[derive(Default)]
pub(crate) struct Flow {
    schemas: RwLock<Arc<Schemas>>,
    seats: Arc<Seats>,
}

/// Takes the configuration in now, and each change of it from now on.
pub(crate) async fn follow(api: &Arc<ApiServer>) {
    let (schemas, levels) = (api.informer::<FlowSchema>(), api.informer::<PriorityLevelConfiguration>());
    let (mut changed_schemas, mut changed_levels) = (schemas.subscribe(), levels.subscribe());
    schemas.synced().await;
    levels.synced().await;
    api.flow.configure(&schemas, &levels);
    let told = conditions::write(api, &schemas, &levels).await;
    let (weak, shutdown) = (Arc::downgrade(api), api.shutdown.clone());
    tokio::spawn(async move {
        // What changed while no server ran was looked at when this one started.
        let mut again = told.is_err();
        loop {
            tokio::select! {
                delta = changed_schemas.next() => if delta.is_none() { return },
                delta = changed_levels.next() => if delta.is_none() { return },
                () = tokio::time::sleep(KEEP_AGAIN), if again => {}
                () = shutdown.cancelled() => return,
            }
            // One look at the caches covers all that has come.
            while changed_schemas.try_next().is_some() {}
            while changed_levels.try_next().is_some() {}
            let Some(api) = weak.upgrade() else { return };
            let mut kept = crate::bootstrap::keep_flow_control(&api).await;
            if kept.is_ok() {
                kept = conditions::write(&api, &schemas, &levels).await;
            }
            again = kept.is_err();
            if let Err(status) = kept {
                tracing::warn!(
                    why = status.message,
                    "rules of priority and fairness are not as they should be, trying again"
                );
            }
            api.flow.configure(&schemas, &levels);
        }
    });
}

impl Flow {
    fn configure(&self, schemas: &Informer<FlowSchema>, levels: &Informer<PriorityLevelConfiguration>) {
        let (schemas, levels): (Vec<_>, Vec<_>) = (schemas.list().collect(), levels.list().collect());
        let levels = self.seats.configure(&levels);
        *self.schemas.write() = Arc::new(Schemas::new(&schemas, &levels));
    }

    /// The schema of a request; `None` before there are any.
    pub(crate) fn classify(&self, user: &UserInfo, route: &Route) -> Option<Arc<Schema>> {
        let schemas = Arc::clone(&self.schemas.read());
        schemas.find(user, route)
    }

    /// Waits for a seat; 429 when there is none in time or too many wait already.
    pub(crate) async fn enter(&self, schema: &Schema, user: &UserInfo, route: &Route) -> Result<Seat, Status> {
        let mut flow = DefaultHasher::new();
        (&schema.name, schema.distinguisher(user, route)).hash(&mut flow);
        let outcome = match self.seats.enter(&schema.level, flow.finish()) {
            Entry::Seat(seat) => Ok(seat),
            Entry::Full(reason) => Err(reason),
            Entry::Wait(called) => match tokio::time::timeout(PATIENCE, called).await {
                Ok(Ok(seat)) => Ok(seat),
                Ok(Err(_)) => Err("cancelled"),
                Err(_) => Err("time-out"),
            },
        };
        let reason = match outcome {
            Ok(seat) => {
                metrics::dispatched(&schema.name, &schema.level);
                return Ok(seat);
            }
            Err(reason) => reason,
        };
        metrics::rejected(&schema.name, &schema.level, reason);
        Err(Status::too_many_requests("Too many requests, please try again later.", RETRY_AFTER_SECONDS))
    }

    /// How busy each level is.
    pub(crate) fn levels(&self) -> Vec<Level> {
        self.seats.levels()
    }
}

/// Tells in the answer how the request was classified.
pub(crate) fn mark(schema: &Schema, headers: &mut HeaderMap) {
    for (name, value) in
        [("x-kubernetes-pf-flowschema-uid", &schema.uid), ("x-kubernetes-pf-prioritylevel-uid", &schema.level_uid)]
    {
        headers.insert(HeaderName::from_static(name), value.clone());
    }
}
