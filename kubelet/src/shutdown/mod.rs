//! Graceful node shutdown: before the host goes down, pods get their time to end, the less important ones first; meanwhile the
//! node is not ready and takes no pods (KEP-2000, KEP-2712).

mod logind;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use k8s_openapi::api::core::v1::{NodeCondition, Pod};
use kube::runtime::events::EventType;

use crate::node::status::condition;
use crate::pods::Context;
use crate::pods::table::{PodEntry, Verdict};
use logind::Word;

/// How long pods of this priority and above, up to the next, get.
pub type Period = (i32, Duration);

/// Pods of this priority and above are critical.
const CRITICAL_PRIORITY: i32 = 2_000_000_000;
const MESSAGE: &str = "Pod was terminated in response to imminent node shutdown.";
const EVENT: &str = "NodeShutdown";

/// The periods that a time for all pods amounts to, of which critical pods have the last part to themselves.
pub fn periods(all: Duration, critical: Duration) -> Vec<Period> {
    if all.is_zero() { Vec::new() } else { vec![(0, all.saturating_sub(critical)), (CRITICAL_PRIORITY, critical)] }
}

/// Whether the host is going down.
#[derive(Debug, Default)]
pub struct Shutdown(AtomicBool);

impl Shutdown {
    /// Why no pod may start now, as status reason and message.
    pub(crate) fn refusal(&self) -> Result<(), (String, String)> {
        if self.0.load(Ordering::Relaxed) {
            return Err((EVENT.into(), "Pod was rejected as the node is shutting down.".into()));
        }
        Ok(())
    }

    /// What stands for the node's readiness now.
    pub(crate) fn condition(&self) -> Option<NodeCondition> {
        let ending = self.0.load(Ordering::Relaxed);
        ending.then(|| condition("Ready", "False", "KubeletNotReady", "node is shutting down"))
    }
}

/// Follows the host's end until the future is dropped.
pub async fn run(context: Arc<Context>) {
    let periods = &context.config.shutdown_periods;
    let needed: Duration = periods.iter().map(|(_, time)| *time).sum();
    if needed.is_zero() {
        return std::future::pending().await;
    }
    let mut words = match logind::follow(needed) {
        Ok(words) => words,
        Err(error) => {
            tracing::error!(%error, "pods get no time to end when the host goes down");
            return std::future::pending().await;
        }
    };
    let mut lock = None;
    let mut told = false;
    while let Some(word) = words.recv().await {
        match word {
            Word::Held(held) => {
                lock = Some(held);
                told = false;
            }
            Word::Lost(error) => {
                if !std::mem::replace(&mut told, true) {
                    let note = format!("pods get no time to end when the host goes down: {error}");
                    tracing::warn!("{note}");
                    context.event_of_node(EventType::Warning, "NoGracefulShutdown", note);
                }
            }
            Word::Ending(ending) => {
                context.shutdown.0.store(ending, Ordering::Relaxed);
                let what = if ending { "event" } else { "cancellation" };
                context.event_of_node(EventType::Normal, EVENT, format!("Shutdown manager detected shutdown {what}"));
                context.news.notify_one();
                if ending {
                    end_pods(&context, periods).await;
                    drop(lock.take());
                    tracing::info!("the pods have ended: the host may go down");
                }
            }
        }
    }
}

/// Ends all pods, group by group; a group that takes longer than its period does not hold up the next.
async fn end_pods(context: &Context, periods: &[Period]) {
    let running = context.table.list().into_iter().filter(|entry| !crate::pods::is_final(&entry.pod));
    for ((priority, time), pods) in groups(periods, running) {
        let ends = pods.iter().map(|entry| {
            let grace = own_grace(&entry.pod).map_or(time, |own| own.min(time));
            let verdict = Verdict { reason: "Terminated".into(), message: MESSAGE.into(), grace: Some(grace) };
            context.table.fail(&entry.key.uid, verdict);
            context.table.ended(&entry.key.uid)
        });
        if tokio::time::timeout(time, futures::future::join_all(ends)).await.is_err() {
            tracing::warn!(
                priority,
                seconds = time.as_secs(),
                "pods took longer to end than the host's shutdown gives"
            );
        }
    }
}

fn own_grace(pod: &Pod) -> Option<Duration> {
    let seconds = pod.spec.as_ref()?.termination_grace_period_seconds?;
    u64::try_from(seconds).ok().map(Duration::from_secs)
}

/// Pods by the period that is theirs, from the least important on. Those below all periods have the first.
fn groups(periods: &[Period], pods: impl Iterator<Item = Arc<PodEntry>>) -> BTreeMap<Period, Vec<Arc<PodEntry>>> {
    let mut groups: BTreeMap<Period, Vec<_>> = BTreeMap::new();
    for entry in pods {
        let priority = entry.spec().and_then(|spec| spec.priority).unwrap_or_default();
        let own = periods.iter().filter(|(from, _)| *from <= priority).max().or_else(|| periods.iter().min());
        if let Some(period) = own {
            groups.entry(*period).or_default().push(entry);
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_have_the_period_of_their_priority() {
        let entry = |priority: Option<i32>| {
            let pod = serde_json::json!({"metadata": {"name": "p", "uid": "u"}, "spec": {"priority": priority, "containers": []}});
            let pod: Pod = serde_json::from_value(pod).expect("a pod");
            let key = crate::names::PodKey { uid: "u".into(), namespace: "n".into(), name: "p".into() };
            Arc::new(PodEntry { key, pod: Arc::new(pod), sandbox: None, containers: Vec::new() })
        };
        let seconds = Duration::from_secs;
        let periods = [(100, seconds(3)), (10, seconds(2)), (1000, seconds(4))];
        let of = |priority| {
            let groups = groups(&periods, std::iter::once(entry(priority)));
            groups.into_keys().next().expect("a group").0
        };
        let expected =
            [(None, 10), (Some(-5), 10), (Some(10), 10), (Some(99), 10), (Some(100), 100), (Some(i32::MAX), 1000)];
        for (priority, period) in expected {
            assert_eq!(of(priority), period, "{priority:?}");
        }
        assert_eq!(super::periods(seconds(30), seconds(10)), [(0, seconds(20)), (CRITICAL_PRIORITY, seconds(10))]);
        assert!(super::periods(Duration::ZERO, Duration::ZERO).is_empty());
    }
}
