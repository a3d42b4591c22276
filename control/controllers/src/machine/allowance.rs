//! How many events a controller may publish about one object (client-go's `EventSourceObjectSpamFilter`): a ReplicaSet that makes
//! thousands of pods would otherwise write an event with each of them.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Events about one object that may come at once.
const BURST: u32 = 25;
/// Time after which one more may.
const REFILL: Duration = Duration::from_secs(300);
/// Objects that are remembered; all begin anew when there are more.
const OBJECTS_MOST: usize = 4096;

/// What is left of the burst, as of a time.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    left: u32,
    since: Instant,
}

impl Bucket {
    fn refilled(self, now: Instant) -> Self {
        let periods = now.duration_since(self.since).as_secs() / REFILL.as_secs();
        let gained = u32::try_from(periods).unwrap_or(BURST).min(BURST);
        let left = (self.left + gained).min(BURST);
        Self { left, since: if left == BURST { now } else { self.since + REFILL * gained } }
    }
}

/// The events left for each object, by UID.
#[derive(Debug, Default)]
pub(super) struct Allowance {
    buckets: Mutex<HashMap<String, Bucket>>,
}

impl Allowance {
    /// Takes one event about an object; `false` if none is left.
    pub(super) fn take(&self, uid: &str) -> bool {
        let now = Instant::now();
        let mut buckets = self.buckets.lock();
        if buckets.len() >= OBJECTS_MOST && !buckets.contains_key(uid) {
            buckets.retain(|_, bucket| bucket.refilled(now).left < BURST);
            if buckets.len() >= OBJECTS_MOST {
                buckets.clear();
            }
        }
        let bucket = buckets.entry(uid.to_owned()).or_insert(Bucket { left: BURST, since: now });
        *bucket = bucket.refilled(now);
        let taken = bucket.left > 0;
        bucket.left -= u32::from(taken);
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_burst_about_each_object_and_then_one_in_five_minutes() {
        let allowance = Allowance::default();
        let burst = |uid: &str| (0..100).filter(|_| allowance.take(uid)).count();
        assert_eq!((burst("a"), burst("b")), (25, 25));
        tokio::time::advance(REFILL / 2).await;
        assert_eq!(burst("a"), 0);
        tokio::time::advance(REFILL / 2).await;
        assert_eq!(burst("a"), 1);
        tokio::time::advance(REFILL * 3).await;
        assert_eq!(burst("a"), 3);
        tokio::time::advance(REFILL * 100).await;
        assert_eq!(burst("a"), 25);
    }

    #[tokio::test(start_paused = true)]
    async fn memory_is_bounded() {
        let allowance = Allowance::default();
        for index in 0..2 * OBJECTS_MOST {
            assert!(allowance.take(&index.to_string()));
            assert!(allowance.buckets.lock().len() <= OBJECTS_MOST);
        }
    }
}
