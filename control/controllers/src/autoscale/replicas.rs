//! How many replicas a metric asks for. Values to values; amounts are thousandths, as the Kubernetes documentation of the
//! algorithm has them ("Algorithm details" of Horizontal Pod Autoscaling).

use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;

use crate::common::pods;

/// How long after its start the CPU use of a pod counts only if it was measured while the pod was ready.
const CPU_INITIALIZATION: SignedDuration = SignedDuration::from_secs(5 * 60);
/// How long after its start a pod that has never been ready may take to say so.
const INITIAL_READINESS: SignedDuration = SignedDuration::from_secs(30);

/// What was measured of one pod.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) milli: i64,
    pub(super) at: Timestamp,
    pub(super) window: SignedDuration,
}

/// Ratios of use to target that ask for no change.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tolerance {
    pub(super) down: f64,
    pub(super) up: f64,
}

impl Tolerance {
    fn covers(self, ratio: f64) -> bool {
        1.0 - self.down <= ratio && ratio <= 1.0 + self.up
    }
}

/// What the use of the pods is held against.
#[derive(Clone, Debug)]
pub(super) enum Target {
    /// The average of all.
    Average(i64),
    /// Percent of what they request, by pod.
    Utilization { percent: i32, requests: HashMap<String, i64> },
}

/// What a metric asks for, and what its status shows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Proposal {
    pub(super) replicas: i32,
    pub(super) milli: i64,
    pub(super) percent: Option<i32>,
}

/// The pods by how their measurements count: not at all, as nothing when more are wanted, or in full.
#[derive(Debug, Default)]
struct Groups {
    ready: usize,
    unready: Vec<String>,
    missing: Vec<String>,
    gone: Vec<String>,
}

fn group(of: &[Arc<Pod>], samples: &HashMap<String, Sample>, cpu: bool, now: Timestamp) -> Groups {
    let mut groups = Groups::default();
    for pod in of {
        let name = pod.name_any();
        let phase = pods::phase(pod);
        if pod.metadata.deletion_timestamp.is_some() || phase == "Failed" {
            groups.gone.push(name);
            continue;
        }
        if phase == "Pending" {
            groups.unready.push(name);
            continue;
        }
        match samples.get(&name) {
            None => groups.missing.push(name),
            Some(sample) if cpu && !cpu_counts(pod, sample, now) => groups.unready.push(name),
            Some(_) => groups.ready += 1,
        }
    }
    groups
}

/// Whether the CPU use of a pod says something about its load, and not about its start.
fn cpu_counts(pod: &Pod, sample: &Sample, now: Timestamp) -> bool {
    let started = pod.status.as_ref().and_then(|status| status.start_time.as_ref());
    let (Some(ready), Some(started)) = (pods::condition(pod, "Ready"), started) else { return false };
    let changed = ready.last_transition_time.as_ref().map_or(started.0, |time| time.0);
    if now.duration_since(started.0) < CPU_INITIALIZATION {
        ready.status != "False" && sample.at.duration_since(changed) >= sample.window
    } else {
        ready.status != "False" || changed.duration_since(started.0) >= INITIAL_READINESS
    }
}

/// The use of the pods: as a ratio to the target, on average, and in percent of requests.
fn usage(milli: &HashMap<&str, i64>, target: &Target) -> Result<(f64, i64, Option<i32>), String> {
    let total: i64 = milli.values().sum();
    let average = total / i64::try_from(milli.len().max(1)).unwrap_or(i64::MAX);
    match target {
        Target::Average(wanted) => Ok((average as f64 / *wanted as f64, average, None)),
        Target::Utilization { percent, requests } => {
            let known = milli.iter().filter_map(|(pod, milli)| Some((*milli, *requests.get(*pod)?)));
            let (used, requested) = known.fold((0, 0), |sum: (i64, i64), one| (sum.0 + one.0, sum.1 + one.1));
            if requested == 0 {
                return Err("no metrics returned matched known pods".into());
            }
            let current = i32::try_from(used * 100 / requested).unwrap_or(i32::MAX);
            Ok((f64::from(current) / f64::from(*percent), average, Some(current)))
        }
    }
}

fn times(ratio: f64, count: usize) -> i32 {
    // Saturates, as casts of floats do.
    (ratio * count as f64).ceil() as i32
}

/// What a metric of single pods asks for. Pods of which nothing is known, or which are starting, are taken to be such that
/// the number changes less.
pub(super) fn of_pods(
    current: i32,
    pods: &[Arc<Pod>],
    samples: &HashMap<String, Sample>,
    target: &Target,
    cpu: bool,
    tolerance: Tolerance,
    now: Timestamp,
) -> Result<Proposal, String> {
    if pods.is_empty() {
        return Err("no pods returned by selector while calculating replica count".into());
    }
    let groups = group(pods, samples, cpu, now);
    let mut milli: HashMap<&str, i64> = samples.iter().map(|(pod, sample)| (pod.as_str(), sample.milli)).collect();
    for pod in groups.gone.iter().chain(&groups.unready) {
        milli.remove(pod.as_str());
    }
    if milli.is_empty() {
        return Err("did not receive metrics for targeted pods (pods might be unready)".into());
    }
    let (ratio, average, percent) = usage(&milli, target)?;
    let propose = |replicas| Ok(Proposal { replicas, milli: average, percent });
    let starting = !groups.unready.is_empty() && ratio > 1.0;
    if !starting && groups.missing.is_empty() {
        return propose(if tolerance.covers(ratio) { current } else { times(ratio, groups.ready) });
    }
    for pod in &groups.missing {
        let taken = if ratio >= 1.0 {
            0
        } else {
            match target {
                Target::Average(wanted) => *wanted,
                Target::Utilization { percent, requests } => {
                    requests.get(pod).copied().unwrap_or_default() * i64::from((*percent).max(100)) / 100
                }
            }
        };
        milli.insert(pod, taken);
    }
    if starting {
        milli.extend(groups.unready.iter().map(|pod| (pod.as_str(), 0)));
    }
    let (careful, ..) = usage(&milli, target)?;
    let turned = (ratio < 1.0 && careful > 1.0) || (ratio > 1.0 && careful < 1.0);
    let replicas = times(careful, milli.len());
    let against = (careful < 1.0 && replicas > current) || (careful > 1.0 && replicas < current);
    propose(if tolerance.covers(careful) || turned || against { current } else { replicas })
}

/// What a metric with one value for all pods asks for: `ready` are the pods that share it now.
pub(super) fn of_value(current: i32, ready: usize, milli: i64, wanted: i64, tolerance: Tolerance) -> Proposal {
    let ratio = milli as f64 / wanted as f64;
    let replicas = match current {
        // From nothing there is no share to start from.
        0 => times(ratio, 1),
        _ if tolerance.covers(ratio) => current,
        _ => times(ratio, ready),
    };
    Proposal { replicas, milli, percent: None }
}

/// What a metric with one value asks for of which each pod should have a share of `wanted`; `running` as the scale says.
pub(super) fn of_share(running: i32, milli: i64, wanted: i64, tolerance: Tolerance) -> Proposal {
    let ratio = milli as f64 / (wanted as f64 * f64::from(running));
    let replicas = if tolerance.covers(ratio) { running } else { times(milli as f64 / wanted as f64, 1) };
    let share = if running == 0 { milli } else { (milli as f64 / f64::from(running)).ceil() as i64 };
    Proposal { replicas, milli: share, percent: None }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const TENTH: Tolerance = Tolerance { down: 0.1, up: 0.1 };

    fn now() -> Timestamp {
        "2026-01-01T01:00:00Z".parse().expect("a time")
    }

    fn pod(index: usize, phase: &str, ready: bool) -> Arc<Pod> {
        let ready = json!([{"type": "Ready", "status": if ready { "True" } else { "False" }, "lastTransitionTime": "2026-01-01T00:00:05Z"}]);
        Arc::new(
            serde_json::from_value(json!({"metadata": {"name": format!("p{index}")},
                "status": {"phase": phase, "startTime": "2026-01-01T00:00:00Z", "conditions": ready}}))
            .expect("a pod"),
        )
    }

    fn samples(milli: &[i64]) -> HashMap<String, Sample> {
        let sample = |milli| Sample { milli, at: now(), window: SignedDuration::from_secs(10) };
        milli.iter().enumerate().map(|(i, milli)| (format!("p{i}"), sample(*milli))).collect()
    }

    fn running(count: usize) -> Vec<Arc<Pod>> {
        (0..count).map(|index| pod(index, "Running", true)).collect()
    }

    fn utilization(percent: i32, requests: &[i64]) -> Target {
        let requests = requests.iter().enumerate().map(|(i, milli)| (format!("p{i}"), *milli)).collect();
        Target::Utilization { percent, requests }
    }

    #[test]
    fn utilization_is_of_requests() {
        let target = utilization(50, &[1000; 3]);
        let found = of_pods(3, &running(3), &samples(&[300, 500, 700]), &target, true, TENTH, now());
        assert_eq!(found, Ok(Proposal { replicas: 3, milli: 500, percent: Some(50) }));
        let found = of_pods(3, &running(3), &samples(&[800, 800, 800]), &target, true, TENTH, now());
        assert_eq!(found.map(|found| (found.replicas, found.percent)), Ok((5, Some(80))));
    }

    #[test]
    fn pods_that_start_do_not_count_as_load() {
        let mut pods = running(2);
        pods.push(pod(2, "Pending", false));
        // Two use twice what they should; the third is taken to use nothing: 2 * 2 / 3 * 3.
        let found = of_pods(3, &pods, &samples(&[200, 200]), &Target::Average(100), false, TENTH, now());
        assert_eq!(found.map(|found| found.replicas), Ok(4));
        // One that was never ready burns CPU to start: it counts as nothing too.
        pods[2] = pod(2, "Running", false);
        let found = of_pods(3, &pods, &samples(&[200, 200, 900]), &Target::Average(100), true, TENTH, now());
        assert_eq!(found.map(|found| (found.replicas, found.milli)), Ok((4, 200)));
    }

    #[test]
    fn pods_without_measurement_hold_the_number() {
        let pods = running(4);
        let found = of_pods(4, &pods, &samples(&[10, 10]), &Target::Average(100), false, TENTH, now());
        // Two idle, two taken to be at their target: 220 / 4 of 100, of four.
        assert_eq!(found.map(|found| found.replicas), Ok(3));
        let found = of_pods(4, &pods, &samples(&[150, 150]), &Target::Average(100), false, TENTH, now());
        assert_eq!(found.map(|found| found.replicas), Ok(4), "a rise that the missing would turn is no rise");
    }

    #[test]
    fn what_cannot_be_said_is_not_guessed() {
        let none = of_pods(1, &[], &HashMap::new(), &Target::Average(1), false, TENTH, now());
        assert!(none.unwrap_err().contains("no pods returned"));
        let blind = of_pods(1, &running(1), &HashMap::new(), &Target::Average(1), false, TENTH, now());
        assert!(blind.unwrap_err().contains("did not receive metrics"));
        let alien = of_pods(1, &running(1), &samples(&[1]), &utilization(50, &[]), false, TENTH, now());
        assert!(alien.unwrap_err().contains("no metrics returned matched"));
    }

    #[test]
    fn single_values_scale_from_nothing_too() {
        assert_eq!(of_value(0, 0, 2500, 1000, TENTH).replicas, 3);
        assert_eq!(of_value(4, 4, 1050, 1000, TENTH).replicas, 4);
        assert_eq!(of_value(4, 3, 2000, 1000, TENTH).replicas, 6);
        assert_eq!(of_share(0, 2500, 1000, TENTH).replicas, 3);
        assert_eq!(of_share(3, 3200, 1000, TENTH), Proposal { replicas: 3, milli: 1067, percent: None });
        assert_eq!(of_share(3, 9000, 1000, TENTH).replicas, 9);
    }

    proptest! {
        /// With all pods measured the answer is the rule of the documentation: ceil(count * use / target), or no change.
        #[test]
        fn measured_pods_follow_the_rule(milli in prop::collection::vec(0..5000_i64, 1..20), target in 1..3000_i64) {
            let count = milli.len();
            let current = i32::try_from(count).expect("few");
            let found = of_pods(current, &running(count), &samples(&milli), &Target::Average(target), false, TENTH, now())
                .expect("a number");
            let average = milli.iter().sum::<i64>() / current as i64;
            let ratio = average as f64 / target as f64;
            let wanted = if (0.9..=1.1).contains(&ratio) { current } else { (ratio * count as f64).ceil() as i32 };
            prop_assert_eq!(found.replicas, wanted);
        }

        /// Not knowing pods never turns the direction and never makes the change larger.
        #[test]
        fn not_knowing_is_careful(milli in prop::collection::vec(0..3000_i64, 1..10), unknown in 0..10_usize, pending in 0..10_usize) {
            let mut pods = running(milli.len() + unknown);
            let measurable = pods.len();
            pods.extend((0..pending).map(|index| pod(measurable + index, "Pending", false)));
            let current = i32::try_from(pods.len()).expect("few");
            let found = of_pods(current, &pods, &samples(&milli), &Target::Average(1000), false, TENTH, now())
                .expect("a number").replicas;
            let average = milli.iter().sum::<i64>() / milli.len() as i64;
            if average > 1000 {
                prop_assert!(found >= current);
                prop_assert!(found <= times(average as f64 / 1000.0, pods.len()));
            } else {
                prop_assert!(found <= current);
            }
        }
    }
}
