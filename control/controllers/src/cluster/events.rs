//! Events are news: they go an hour after they last told something (`--event-ttl` of Kubernetes). They are read from the
//! store a page at a time, as a cache of them all would cost more than they are worth.

use std::sync::Arc;
use std::time::Duration;

use coracle_api::server::ApiServer;
use coracle_store::{Error, ListOptions, Precondition, SharedStore};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::Value;

const PREFIX: &str = "/registry/events/";
/// How long an event stays.
const LIFE: SignedDuration = SignedDuration::from_hours(1);
/// Pause between two looks at all events, by which one may outlive its time.
const PAUSE: Duration = Duration::from_secs(120);
/// Events read at once.
const PAGE: usize = 100;

/// Removes events until the future is dropped.
pub(crate) async fn run(api: Arc<ApiServer>) {
    loop {
        match sweep(&api.store, Timestamp::now()).await {
            Ok(0) => {}
            Ok(gone) => tracing::debug!(gone, "removed old events"),
            Err(error) => tracing::warn!(%error, "cannot remove old events; the next look tries again"),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// When an event was made, or told something again.
fn told(event: &Value) -> Option<Timestamp> {
    let members = ["/metadata/creationTimestamp", "/series/lastObservedTime", "/lastTimestamp"];
    members.iter().filter_map(|member| event.pointer(member)?.as_str()?.parse().ok()).max()
}

/// Removes what is too old; says how many.
async fn sweep(store: &SharedStore, now: Timestamp) -> Result<usize, Error> {
    let (mut gone, mut start_after) = (0, None);
    loop {
        let page = store.list(PREFIX, ListOptions { limit: PAGE, start_after, revision: None }).await?;
        for entry in &page.entries {
            let event: Option<Value> = serde_json::from_slice(&entry.value).ok();
            // What cannot be read says nothing to anybody.
            if event.as_ref().and_then(told).is_some_and(|told| now.duration_since(told) < LIFE) {
                continue;
            }
            match store.delete(&entry.key, Precondition::Revision(entry.revision)).await {
                Ok(_) => gone += 1,
                // It has just told something again, or is gone.
                Err(Error::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        start_after = page.entries.last().map(|entry| entry.key.to_string());
        if !page.more {
            return Ok(gone);
        }
    }
}

#[cfg(test)]
mod tests {
    use coracle_store::{Draft, Embedded, EmbeddedOptions};
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn events_go_an_hour_after_they_last_told_something() {
        let folder = tempfile::tempdir().expect("a folder");
        let store: SharedStore = Arc::new(Embedded::open(folder.path(), EmbeddedOptions::default()).expect("a store"));
        let mut expected = Vec::new();
        for index in 0..2 * PAGE + 3 {
            // Every third has told something again lately.
            let key = format!("{PREFIX}n/e{index:05}");
            let mut event = json!({"metadata": {"name": "e", "creationTimestamp": "2026-01-01T00:00:00Z"}});
            if index % 3 == 0 {
                event["series"] = json!({"lastObservedTime": "2026-01-01T00:30:00.123456Z"});
                expected.push(key.clone());
            }
            let draft = Draft::encode(&event).expect("an object");
            store.put(&key, draft, Precondition::Absent).await.expect("stored");
        }
        let now: Timestamp = "2026-01-01T01:10:00Z".parse().expect("a time");
        assert_eq!(sweep(&store, now).await.expect("swept"), 2 * PAGE + 3 - expected.len());
        let left = store.list(PREFIX, ListOptions::default()).await.expect("listed").entries;
        assert_eq!(left.iter().map(|entry| entry.key.to_string()).collect::<Vec<_>>(), expected);
    }
}
