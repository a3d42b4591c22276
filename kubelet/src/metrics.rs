//! What the node agent counts and times of its own work, by the names that dashboards made for a kubelet ask for.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::server::metrics::labels;

/// Upper bounds of histograms, in seconds.
const BOUNDS: [f64; 16] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0];

/// Something that takes time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Timed {
    /// A container verb; labelled with its name.
    RuntimeOperation,
    /// One look of a pod's worker; labelled with what it was for.
    PodWorker,
    /// From a pod's arrival on the node until its containers run.
    PodStart,
    /// From a pod's creation until its containers run.
    PodStartTotal,
    /// The pull of an image.
    ImagePull,
}

impl Timed {
    /// Name, help, and the name of the label if there is one.
    fn family(self) -> (&'static str, &'static str, Option<&'static str>) {
        match self {
            Self::RuntimeOperation => (
                "kubelet_runtime_operations_duration_seconds",
                "Duration in seconds of runtime operations. Broken down by operation type.",
                Some("operation_type"),
            ),
            Self::PodWorker => (
                "kubelet_pod_worker_duration_seconds",
                "Duration in seconds to sync a single pod. Broken down by operation type.",
                Some("operation_type"),
            ),
            Self::PodStart => (
                "kubelet_pod_start_duration_seconds",
                "Duration in seconds from kubelet seeing a pod for the first time to the pod starting to run",
                None,
            ),
            Self::PodStartTotal => (
                "kubelet_pod_start_total_duration_seconds",
                "Duration in seconds to start a pod since creation, including time to pull images and run init containers",
                None,
            ),
            Self::ImagePull => ("kubelet_image_pull_duration_seconds", "Duration in seconds to pull an image.", None),
        }
    }
}

/// Something that is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Counted {
    /// Container verbs; labelled with their names.
    RuntimeOperations,
    /// Those of them that failed.
    RuntimeErrors,
    /// Pods whose containers ran for the first time.
    StartedPods,
    /// Starts of containers; labelled with their kind.
    StartedContainers,
    /// Evictions; labelled with what ran short.
    Evictions,
}

impl Counted {
    fn family(self) -> (&'static str, &'static str, Option<&'static str>) {
        match self {
            Self::RuntimeOperations => (
                "kubelet_runtime_operations_total",
                "Cumulative number of runtime operations by operation type.",
                Some("operation_type"),
            ),
            Self::RuntimeErrors => (
                "kubelet_runtime_operations_errors_total",
                "Cumulative number of runtime operation errors by operation type.",
                Some("operation_type"),
            ),
            Self::StartedPods => ("kubelet_started_pods_total", "Cumulative number of pods started", None),
            Self::StartedContainers => {
                ("kubelet_started_containers_total", "Cumulative number of containers started", Some("container_type"))
            }
            Self::Evictions => {
                ("kubelet_evictions", "Cumulative number of pod evictions by eviction signal", Some("eviction_signal"))
            }
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Histogram {
    /// By bound, and beyond the last one.
    counts: [u64; BOUNDS.len() + 1],
    sum: f64,
}

/// The figures. Labels are words of the program, so their number is bounded.
#[derive(Debug, Default)]
pub struct Metrics {
    histograms: Mutex<BTreeMap<(Timed, &'static str), Histogram>>,
    counters: Mutex<BTreeMap<(Counted, &'static str), u64>>,
}

impl Metrics {
    /// Notes how long something took; `label` is empty where there is none.
    pub fn observe(&self, what: Timed, label: &'static str, time: Duration) {
        let seconds = time.as_secs_f64();
        let mut histograms = self.histograms.lock();
        let histogram = histograms.entry((what, label)).or_default();
        histogram.counts[BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len())] += 1;
        histogram.sum += seconds;
    }

    /// Counts one; `label` is empty where there is none.
    pub fn count(&self, what: Counted, label: &'static str) {
        *self.counters.lock().entry((what, label)).or_default() += 1;
    }

    /// Times and counts a container verb.
    ///
    /// # Errors
    /// The verb's own.
    pub async fn operation<T, E>(&self, name: &'static str, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let started = Instant::now();
        let outcome = work.await;
        self.observe(Timed::RuntimeOperation, name, started.elapsed());
        self.count(Counted::RuntimeOperations, name);
        if outcome.is_err() {
            self.count(Counted::RuntimeErrors, name);
        }
        outcome
    }

    /// In Prometheus' text form.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut last = "";
        for ((what, label), count) in self.counters.lock().iter() {
            let (name, help, of) = what.family();
            head(&mut text, &mut last, name, help, "counter");
            let labels = labels(of.map(|of| (of, *label)).as_slice());
            // Writing to a String cannot fail.
            let _written = writeln!(text, "{name}{labels} {count}");
        }
        for ((what, label), histogram) in self.histograms.lock().iter() {
            let (name, help, of) = what.family();
            head(&mut text, &mut last, name, help, "histogram");
            let own: Vec<(&str, &str)> = of.map(|of| (of, *label)).into_iter().collect();
            let mut total = 0;
            for (index, count) in histogram.counts.iter().enumerate() {
                total += count;
                let bound = BOUNDS.get(index).map_or_else(|| "+Inf".to_owned(), f64::to_string);
                let labels = labels(&[&own[..], &[("le", &bound)]].concat());
                let _written = writeln!(text, "{name}_bucket{labels} {total}");
            }
            let labels = labels(&own);
            let _written = writeln!(text, "{name}_sum{labels} {}\n{name}_count{labels} {total}", histogram.sum);
        }
        text
    }
}

/// The lines before the first sample of a family.
fn head(text: &mut String, last: &mut &'static str, name: &'static str, help: &str, kind: &str) {
    if *last != name {
        let _written = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        *last = name;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn verbs_are_timed_and_counted() {
        let metrics = Metrics::default();
        metrics.operation("exec_sync", async { Ok::<_, ()>(()) }).await.expect("done");
        metrics.operation("exec_sync", async { Err::<(), _>(()) }).await.expect_err("failed");
        metrics.observe(Timed::PodStart, "", Duration::from_millis(40));
        metrics.observe(Timed::PodStart, "", Duration::from_secs(1000));
        let text = metrics.text();
        for line in [
            r#"kubelet_runtime_operations_total{operation_type="exec_sync"} 2"#,
            r#"kubelet_runtime_operations_errors_total{operation_type="exec_sync"} 1"#,
            r#"kubelet_runtime_operations_duration_seconds_bucket{operation_type="exec_sync",le="0.005"} 2"#,
            "# TYPE kubelet_pod_start_duration_seconds histogram",
            r#"kubelet_pod_start_duration_seconds_bucket{le="0.025"} 0"#,
            r#"kubelet_pod_start_duration_seconds_bucket{le="0.05"} 1"#,
            r#"kubelet_pod_start_duration_seconds_bucket{le="600"} 1"#,
            r#"kubelet_pod_start_duration_seconds_bucket{le="+Inf"} 2"#,
            "kubelet_pod_start_duration_seconds_sum 1000.04",
            "kubelet_pod_start_duration_seconds_count 2",
        ] {
            assert!(text.lines().any(|known| known == line), "{line} is not in\n{text}");
        }
        assert_eq!(text.matches("# TYPE kubelet_runtime_operations_duration_seconds ").count(), 1);
    }
}
