//! How many requests may be in flight.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::http::{Route, Verb};
use crate::status::Status;
use crate::user::{SYSTEM_MASTERS, UserInfo};

/// Reading requests in flight (`--max-requests-inflight`).
const READING: usize = 400;
/// Writing requests in flight (`--max-mutating-requests-inflight`).
const WRITING: usize = 200;
/// Requests of the cluster's own parts and its administrators in flight: they are not held up by others.
const PRIVILEGED: usize = 600;
/// How long a request waits for a place before it is turned away.
const PATIENCE: Duration = Duration::from_secs(15);

/// Places for requests in flight; watches leave theirs once they have begun.
pub(crate) struct Limits {
    reading: Arc<Semaphore>,
    writing: Arc<Semaphore>,
    privileged: Arc<Semaphore>,
}

/// A place, given back when dropped.
pub(crate) type Place = OwnedSemaphorePermit;

impl Default for Limits {
    fn default() -> Self {
        let places = |n| Arc::new(Semaphore::new(n));
        Self { reading: places(READING), writing: places(WRITING), privileged: places(PRIVILEGED) }
    }
}

impl Limits {
    /// Waits for a place; 429 when there is none in time.
    pub(super) async fn enter(&self, user: &UserInfo, route: &Route) -> Result<Place, Status> {
        let privileged = user.is_in(SYSTEM_MASTERS)
            || user.is_in("system:nodes")
            || user.is_in("system:serviceaccounts:kube-system");
        let reads = route.resource.as_ref().is_none_or(|r| matches!(r.verb, Verb::Get | Verb::List | Verb::Watch));
        let places = match (privileged, reads) {
            (true, _) => &self.privileged,
            (false, true) => &self.reading,
            (false, false) => &self.writing,
        };
        if let Ok(place) = places.clone().try_acquire_owned() {
            return Ok(place);
        }
        match tokio::time::timeout(PATIENCE, places.clone().acquire_owned()).await {
            Ok(Ok(place)) => Ok(place),
            _ => Err(Status::too_many_requests("too many requests, please try again later", 1)),
        }
    }
}

impl Limits {
    /// Requests in flight, as a real server names the metric.
    pub(crate) fn metrics(&self) -> String {
        let mut text = String::from(
            "# HELP apiserver_current_inflight_requests Requests in flight.\n# TYPE apiserver_current_inflight_requests gauge\n",
        );
        for (kind, places, all) in [
            ("readOnly", &self.reading, READING),
            ("mutating", &self.writing, WRITING),
            ("privileged", &self.privileged, PRIVILEGED),
        ] {
            let busy = all - places.available_permits();
            text.push_str(&format!("apiserver_current_inflight_requests{{request_kind=\"{kind}\"}} {busy}\n"));
        }
        text
    }
}
