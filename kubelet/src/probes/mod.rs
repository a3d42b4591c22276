//! Probes: how a container is asked whether it has started, lives and serves.
//!
//! [`check`](check::check) asks once; [`Tracker`] counts answers against the thresholds; [`run`] does both on the probe's
//! schedule until it is dropped.

mod check;
mod counts;
mod grpc;
mod http;
mod tracker;

use std::time::Duration;

use k8s_openapi::api::core::v1::Probe;

pub use check::{Answer, Target, check as ask};
pub use counts::Counts;
pub use tracker::{Standing, Tracker};

/// What a probe decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProbeKind {
    /// Holds the other two back until it has succeeded once; its failure restarts the container.
    Startup,
    /// Its failure restarts the container.
    Liveness,
    /// Decides whether the container serves.
    Readiness,
}

impl ProbeKind {
    /// As events name it: `Startup`, `Liveness`, `Readiness`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        }
    }
}

/// A probe's schedule and thresholds with the API's defaults filled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// `initialDelaySeconds`, after the container has started.
    pub delay: Duration,
    /// `periodSeconds`, at least 1 s.
    pub period: Duration,
    /// `timeoutSeconds`, at least 1 s.
    pub timeout: Duration,
    /// `successThreshold`.
    pub successes: u32,
    /// `failureThreshold`.
    pub failures: u32,
}

impl Schedule {
    /// The schedule of a probe.
    pub fn of(probe: &Probe) -> Self {
        let count = |field: Option<i32>, default: u32| {
            field.and_then(|value| u32::try_from(value).ok()).filter(|value| *value > 0).unwrap_or(default)
        };
        let seconds = |field, default| Duration::from_secs(count(field, default).into());
        Self {
            delay: Duration::from_secs(
                u64::try_from(probe.initial_delay_seconds.unwrap_or_default()).unwrap_or_default(),
            ),
            period: seconds(probe.period_seconds, 10),
            timeout: seconds(probe.timeout_seconds, 1),
            successes: count(probe.success_threshold, 1),
            failures: count(probe.failure_threshold, 3),
        }
    }
}

/// Asks on schedule for as long as the future lives and tells each answer and each change of the standing.
///
/// The first question comes as soon as the delay since the container's start has passed: a pod is ready as early as it says
/// so. After a failed first answer of a startup or readiness probe the next questions come sooner than the period, at
/// doubling distances, since most containers start faster than their period is long.
pub async fn run(
    kind: ProbeKind,
    probe: &Probe,
    target: &Target,
    started_for: Duration,
    mut tell: impl FnMut(&Answer, Option<Standing>) + Send,
) {
    let schedule = Schedule::of(probe);
    tokio::time::sleep(schedule.delay.saturating_sub(started_for)).await;
    let mut tracker = Tracker::new(schedule);
    let mut warm_up = if kind == ProbeKind::Liveness { schedule.period } else { WARM_UP_FIRST };
    loop {
        let asked = tokio::time::Instant::now();
        let answer = check::check(probe, target, schedule.timeout).await;
        // A question that came early for the sake of an early success does not count as a failure.
        let early = warm_up < schedule.period && !matches!(answer, Answer::Success(_));
        let change = if early { None } else { tracker.observe(&answer) };
        tell(&answer, change);
        let pause = if early { warm_up } else { schedule.period };
        if early {
            warm_up = warm_up.saturating_mul(2);
        } else {
            warm_up = schedule.period;
        }
        tokio::time::sleep_until(asked + pause).await;
    }
}

/// Distance between the first two questions of a probe that waits for a start.
const WARM_UP_FIRST: Duration = Duration::from_millis(10);
