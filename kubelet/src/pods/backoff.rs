//! When a container may be started again: CrashLoopBackOff, and the pauses after starts that failed.

use std::collections::HashMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Container;
use tokio::time::Instant;

use super::status::Observed;

/// First pause before a container that ended is started again, and the longest (CrashLoopBackOff).
const FIRST: Duration = Duration::from_secs(10);
const MOST: Duration = Duration::from_secs(300);
/// A container that ran for so long starts anew with the first pause.
const RESET: Duration = Duration::from_secs(600);

/// The pauses of one pod's containers, by name.
#[derive(Default)]
pub(super) struct Backoffs {
    /// Of containers that ended: the incarnation, its pause, and when that is over.
    restarts: HashMap<String, (u32, Duration, Instant)>,
    /// Of containers that could not be started.
    starts: HashMap<String, (Duration, Instant)>,
}

impl Backoffs {
    /// When a container that ended may be started again, and the pause that this makes.
    pub(super) fn restart(&mut self, container: &Container, seen: &Observed) -> (Instant, Duration) {
        let current = seen.current.as_ref();
        let attempt = current.map_or(0, |current| current.attempt);
        if let Some((known, pause, until)) = self.restarts.get(&container.name)
            && *known == attempt
        {
            return (*until, *pause);
        }
        let ran = current
            .map_or(0, |current| current.exit.map_or(0, |exit| exit.finished_at.saturating_sub(current.started_at)));
        let long = Duration::from_nanos(u64::try_from(ran).unwrap_or_default()) >= RESET;
        // The first restart is at once; the pause before the n-th later one follows from n, so a new daemon knows it too.
        let pause = if long || attempt == 0 {
            Duration::ZERO
        } else {
            FIRST.saturating_mul(1 << (attempt - 1).min(10)).min(MOST)
        };
        let until = Instant::now() + pause;
        self.restarts.insert(container.name.clone(), (attempt, pause, until));
        (until, pause)
    }

    /// A start has failed; when the next one is due.
    pub(super) fn failed(&mut self, name: &str, first: Duration) -> Instant {
        let pause = self.starts.get(name).map_or(first, |(before, _)| before.saturating_mul(2).min(MOST));
        let until = Instant::now() + pause;
        self.starts.insert(name.to_owned(), (pause, until));
        until
    }

    /// When a container that could not be started is to be tried again, if that is in the future.
    pub(super) fn waits_to_start(&self, name: &str) -> Option<Instant> {
        self.starts.get(name).map(|(_, until)| *until).filter(|until| *until > Instant::now())
    }

    /// A container has been started.
    pub(super) fn started(&mut self, name: &str) {
        self.starts.remove(name);
    }
}
