//! How probes were answered, counted for `/metrics/probes`.

use std::collections::BTreeMap;
use std::fmt::Write;

use parking_lot::Mutex;

use super::{Answer, ProbeKind};
use crate::names::PodKey;
use crate::server::metrics::labels;

/// Which answers: container, probe, result.
type Which = (String, &'static str, &'static str);
type OfPod = (PodKey, BTreeMap<Which, u64>);

/// Answers by pod, for as long as the pod is here.
#[derive(Debug, Default)]
pub struct Counts(Mutex<BTreeMap<String, OfPod>>);

impl Counts {
    /// Counts an answer.
    pub fn add(&self, pod: &PodKey, container: &str, kind: ProbeKind, answer: &Answer) {
        let result = match answer {
            Answer::Success(_) => "successful",
            Answer::Failure(_) => "failed",
            Answer::Unknown(_) => "unknown",
        };
        let mut all = self.0.lock();
        let (_, counts) = all.entry(pod.uid.clone()).or_insert_with(|| (pod.clone(), BTreeMap::new()));
        *counts.entry((container.to_owned(), kind.word(), result)).or_default() += 1;
    }

    /// Forgets a pod.
    pub fn forget(&self, uid: &str) {
        self.0.lock().remove(uid);
    }

    /// In Prometheus' text form.
    pub fn text(&self) -> String {
        let name = "prober_probe_total";
        let help = "Cumulative number of a liveness, readiness or startup probe for a container by result.";
        let mut text = format!("# HELP {name} {help}\n# TYPE {name} counter\n");
        for (pod, counts) in self.0.lock().values() {
            for ((container, kind, result), count) in counts {
                let labels = labels(&[
                    ("container", container),
                    ("namespace", &pod.namespace),
                    ("pod", &pod.name),
                    ("pod_uid", &pod.uid),
                    ("probe_type", kind),
                    ("result", result),
                ]);
                // Writing to a String cannot fail.
                let _written = writeln!(text, "{name}{labels} {count}");
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_counted_until_the_pod_is_gone() {
        let pod = PodKey { uid: "u".into(), namespace: "n".into(), name: "p".into() };
        let counts = Counts::default();
        counts.add(&pod, "c", ProbeKind::Liveness, &Answer::Success(String::new()));
        counts.add(&pod, "c", ProbeKind::Liveness, &Answer::Success(String::new()));
        let labels = r#"container="c",namespace="n",pod="p",pod_uid="u",probe_type="Liveness",result="successful""#;
        assert!(counts.text().contains(&format!("prober_probe_total{{{labels}}} 2\n")));
        counts.forget("u");
        assert!(!counts.text().contains("container="));
    }
}
