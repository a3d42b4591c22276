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
    /// The incarnation from which on pauses are counted: the last one that ran for long.
    counted_from: HashMap<String, u32>,
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
        if long {
            self.counted_from.insert(container.name.clone(), attempt);
        }
        // The first restart is at once; the pause before the n-th later one follows from n, so a new daemon knows it too.
        let later = attempt.saturating_sub(self.counted_from.get(&container.name).copied().unwrap_or_default());
        let pause = match later.checked_sub(1) {
            None => Duration::ZERO,
            Some(doublings) => FIRST.saturating_mul(1 << doublings.min(10)).min(MOST),
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

#[cfg(test)]
mod tests {
    use super::super::status::Incarnation;
    use super::*;
    use crate::cri::{ContainerState, ExitStatus};
    use crate::names::ContainerId;

    /// A container whose incarnation of this number has ended after so many seconds.
    fn ended(attempt: u32, seconds: i64) -> Observed {
        let exit = ExitStatus { code: 1, signal: None, oom_killed: false, finished_at: 1 + seconds * 1_000_000_000 };
        let current = Incarnation {
            id: ContainerId::derive("u", "c", attempt),
            sandbox: None,
            attempt,
            state: ContainerState::Exited,
            started_at: 1,
            exit: Some(exit),
            message: String::new(),
        };
        Observed { current: Some(current), ..Observed::default() }
    }

    #[test]
    fn restarts_pause_twice_as_long_each_time_until_one_runs_for_ten_minutes() {
        let container = Container { name: "c".into(), ..Container::default() };
        let mut backoffs = Backoffs::default();
        let mut pause = |attempt, seconds| backoffs.restart(&container, &ended(attempt, seconds)).1.as_secs();
        assert_eq!([0, 1, 2, 3, 4, 5, 6, 7].map(|attempt| pause(attempt, 1)), [0, 10, 20, 40, 80, 160, 300, 300]);
        assert_eq!((pause(8, 599), pause(9, 600)), (300, 0));
        assert_eq!([10, 11, 12].map(|attempt| pause(attempt, 1)), [10, 20, 40]);
        // Asked again about the same incarnation it does not begin anew.
        let first = backoffs.restart(&container, &ended(12, 1)).0;
        assert_eq!(backoffs.restart(&container, &ended(12, 1)).0, first);
    }

    #[tokio::test(start_paused = true)]
    async fn starts_that_fail_pause_twice_as_long_each_time_until_one_succeeds() {
        let mut backoffs = Backoffs::default();
        let mut pause = || (backoffs.failed("c", FIRST) - Instant::now()).as_secs();
        assert_eq!([pause(), pause(), pause()], [10, 20, 40]);
        assert!(backoffs.waits_to_start("c").is_some());
        backoffs.started("c");
        assert!(backoffs.waits_to_start("c").is_none());
    }
}
