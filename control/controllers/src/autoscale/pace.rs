//! How fast a number of replicas may follow what the metrics ask for: stabilisation windows, policies, bounds. Values to
//! values, over a history of what was asked for and done.

use std::collections::VecDeque;

use k8s_openapi::api::autoscaling::v2::{HPAScalingPolicy, HPAScalingRules, HorizontalPodAutoscalerBehavior};
use k8s_openapi::jiff::{SignedDuration, Timestamp};

/// Window over which a number is not lowered when the autoscaler does not say.
const STABILIZE_DOWN: i32 = 300;
/// Longest stabilisation window that the API takes.
const LONGEST_WINDOW: SignedDuration = SignedDuration::from_secs(3600);
/// Longest period of a policy that the API takes.
const LONGEST_PERIOD: SignedDuration = SignedDuration::from_secs(1800);
/// Entries kept of each kind, which is one every second of the longest window.
const KEPT: usize = 3600;

/// What was asked for and done lately, of one autoscaler.
#[derive(Debug, Default)]
pub(super) struct History {
    wanted: VecDeque<(Timestamp, i32)>,
    /// Changes of the number.
    done: VecDeque<(Timestamp, i32)>,
}

fn keep(entries: &mut VecDeque<(Timestamp, i32)>, longest: SignedDuration, now: Timestamp) {
    entries.retain(|(at, _)| now.duration_since(*at) <= longest);
    while entries.len() >= KEPT {
        entries.pop_front();
    }
}

impl History {
    /// Notes a number that was asked for.
    fn ask(&mut self, replicas: i32, now: Timestamp) {
        keep(&mut self.wanted, LONGEST_WINDOW, now);
        self.wanted.push_back((now, replicas));
    }

    /// Starts with the number that is there, so that a restart of this program lowers nothing at once.
    pub(super) fn start(&mut self, current: i32, now: Timestamp) {
        if self.wanted.is_empty() {
            self.ask(current, now);
        }
    }

    /// Notes that the number was changed.
    pub(super) fn changed(&mut self, from: i32, to: i32, now: Timestamp) {
        keep(&mut self.done, LONGEST_PERIOD, now);
        self.done.push_back((now, to - from));
    }

    /// What was asked for within this many seconds.
    fn asked(&self, seconds: i32, now: Timestamp) -> impl Iterator<Item = i32> {
        let window = SignedDuration::from_secs(seconds.into());
        self.wanted.iter().filter(move |(at, _)| now.duration_since(*at) < window).map(|(_, replicas)| *replicas)
    }

    /// The number at the start of a period that ends with `current`.
    fn before(&self, current: i32, seconds: i32, now: Timestamp) -> i32 {
        let period = SignedDuration::from_secs(seconds.into());
        let changes = self.done.iter().filter(|(at, _)| now.duration_since(*at) < period);
        current - changes.map(|(_, change)| change).sum::<i32>()
    }
}

/// A reason and what it says, as conditions show them.
pub(super) type Why = (&'static str, &'static str);

/// What may be done now.
#[derive(Debug, PartialEq)]
pub(super) struct Pace {
    pub(super) replicas: i32,
    /// Of the condition AbleToScale.
    pub(super) able: Why,
    /// Of the condition ScalingLimited, and whether it holds.
    pub(super) limited: (bool, Why),
}

/// The number to set: `wanted` as far as windows, policies and bounds let it.
pub(super) fn pace(
    history: &mut History,
    behavior: Option<&HorizontalPodAutoscalerBehavior>,
    current: i32,
    wanted: i32,
    (least, most): (i32, i32),
    now: Timestamp,
) -> Pace {
    let none = HPAScalingRules::default();
    let up = behavior.and_then(|behavior| behavior.scale_up.as_ref()).unwrap_or(&none);
    let down = behavior.and_then(|behavior| behavior.scale_down.as_ref()).unwrap_or(&none);
    let floor = history.asked(up.stabilization_window_seconds.unwrap_or(0), now).fold(wanted, i32::min);
    let window = down.stabilization_window_seconds.unwrap_or(STABILIZE_DOWN);
    let ceiling = history.asked(window, now).fold(wanted, i32::max);
    let steady = current.max(floor).min(ceiling);
    history.ask(wanted, now);
    let able = if steady == wanted {
        ("ReadyForNewScale", "recommended size matches current size")
    } else if wanted >= current {
        (
            "ScaleUpStabilized",
            "recent recommendations were lower than current one, applying the lowest recent recommendation",
        )
    } else {
        (
            "ScaleDownStabilized",
            "recent recommendations were higher than current one, applying the highest recent recommendation",
        )
    };
    let rise = match behavior {
        // Without any wishes the pace of old: doubled, or four from little.
        None => current.saturating_mul(2).max(4),
        Some(_) => limit(up, true, history, current, now).max(current),
    };
    let fall = match behavior {
        None => i32::MIN,
        Some(_) => limit(down, false, history, current, now).min(current),
    };
    let (bound, why) = match (steady > current, rise < most, fall > least) {
        (true, true, _) => {
            (rise, ("ScaleUpLimit", "the desired replica count is increasing faster than the maximum scale rate"))
        }
        (true, false, _) => {
            (most, ("TooManyReplicas", "the desired replica count is more than the maximum replica count"))
        }
        (false, _, true) => {
            (fall, ("ScaleDownLimit", "the desired replica count is decreasing faster than the maximum scale rate"))
        }
        (false, _, false) => {
            (least, ("TooFewReplicas", "the desired replica count is less than the minimum replica count"))
        }
    };
    let within = if steady > current { steady <= bound } else { steady >= bound };
    if within {
        let why = ("DesiredWithinRange", "the desired count is within the acceptable range");
        return Pace { replicas: steady, able, limited: (false, why) };
    }
    Pace { replicas: bound, able, limited: (true, why) }
}

/// How far the policies of one direction let the number go now.
fn limit(rules: &HPAScalingRules, up: bool, history: &History, current: i32, now: Timestamp) -> i32 {
    let policy = |type_: &str, value| HPAScalingPolicy { type_: type_.into(), value, period_seconds: 15 };
    let usual = if up { vec![policy("Pods", 4), policy("Percent", 100)] } else { vec![policy("Percent", 100)] };
    let proposals = rules.policies.as_ref().unwrap_or(&usual).iter().map(|policy| {
        let start = history.before(current, policy.period_seconds, now);
        match (policy.type_.as_str(), up) {
            ("Percent", true) => (f64::from(start) * (1.0 + f64::from(policy.value) / 100.0)).ceil() as i32,
            ("Percent", false) => (f64::from(start) * (1.0 - f64::from(policy.value) / 100.0)) as i32,
            (_, true) => start.saturating_add(policy.value),
            (_, false) => start.saturating_sub(policy.value),
        }
    });
    // `Max` is the largest change, whichever way it goes.
    let chosen = match rules.select_policy.as_deref() {
        Some("Disabled") => None,
        select if up == (select == Some("Min")) => proposals.min(),
        _ => proposals.max(),
    };
    chosen.unwrap_or(current)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).expect("a time")
    }

    fn behavior(value: Value) -> HorizontalPodAutoscalerBehavior {
        serde_json::from_value(value).expect("a behaviour")
    }

    #[test]
    fn numbers_go_down_only_after_the_window() {
        let mut history = History::default();
        history.start(10, at(0));
        let first = pace(&mut history, None, 10, 2, (1, 20), at(15));
        assert_eq!((first.replicas, first.able.0), (10, "ScaleDownStabilized"));
        let later = pace(&mut history, None, 10, 2, (1, 20), at(301));
        assert_eq!((later.replicas, later.able.0, later.limited.0), (2, "ReadyForNewScale", false));
        let low = pace(&mut History::default(), None, 10, 0, (3, 20), at(0));
        assert_eq!((low.replicas, low.limited.0, low.limited.1.0), (3, true, "TooFewReplicas"));
    }

    #[test]
    fn without_wishes_numbers_double_or_go_to_four() {
        for (current, wanted, most, got, why) in [
            (1, 30, 50, 4, "ScaleUpLimit"),
            (5, 30, 50, 10, "ScaleUpLimit"),
            (5, 9, 50, 9, "DesiredWithinRange"),
            (5, 30, 8, 8, "TooManyReplicas"),
        ] {
            let found = pace(&mut History::default(), None, current, wanted, (1, most), at(0));
            assert_eq!((found.replicas, found.limited.1.0), (got, why));
        }
    }

    #[test]
    fn policies_count_what_was_done_in_their_period() {
        let wishes = behavior(json!({
            "scaleUp": {"stabilizationWindowSeconds": 0, "policies": [{"type": "Pods", "value": 2, "periodSeconds": 60}, {"type": "Percent", "value": 50, "periodSeconds": 60}]},
            "scaleDown": {"stabilizationWindowSeconds": 0, "selectPolicy": "Min", "policies": [{"type": "Pods", "value": 3, "periodSeconds": 60}, {"type": "Percent", "value": 10, "periodSeconds": 60}]}}));
        let mut history = History::default();
        let mut go = |current, wanted, second| {
            let found = pace(&mut history, Some(&wishes), current, wanted, (1, 100), at(second));
            if found.replicas != current {
                history.changed(current, found.replicas, at(second));
            }
            found.replicas
        };
        assert_eq!(go(10, 50, 0), 15, "half as many more");
        assert_eq!(go(15, 50, 15), 15, "the minute is used up");
        assert_eq!(go(15, 50, 61), 23);
        assert_eq!(go(23, 1, 200), 20, "Min: 10 % of 23, not 3 pods: 20.7");
        let never = behavior(json!({"scaleDown": {"stabilizationWindowSeconds": 0, "selectPolicy": "Disabled"}}));
        assert_eq!(pace(&mut History::default(), Some(&never), 9, 1, (1, 100), at(0)).replicas, 9);
    }

    #[test]
    fn a_window_upwards_takes_the_lowest() {
        let wishes = behavior(json!({"scaleUp": {"stabilizationWindowSeconds": 60}}));
        let mut history = History::default();
        history.start(3, at(0));
        let found = pace(&mut history, Some(&wishes), 3, 6, (1, 10), at(30));
        assert_eq!((found.replicas, found.able.0), (3, "ScaleUpStabilized"));
        assert_eq!(pace(&mut history, Some(&wishes), 3, 6, (1, 10), at(61)).replicas, 6);
    }

    proptest! {
        /// Whatever is asked for, the bounds and the direction hold, no step is faster than the policies, and what is asked
        /// for long enough comes.
        #[test]
        fn any_demand_is_followed_within_bounds(
            demand in prop::collection::vec(0..60_i32, 1..60), window in 0..120_i32, pods in 1..10_i32, least in 1..5_i32, most in 5..50_i32,
        ) {
            let rules = json!({"stabilizationWindowSeconds": window, "policies": [{"type": "Pods", "value": pods, "periodSeconds": 15}]});
            let wishes = behavior(json!({"scaleUp": rules, "scaleDown": rules}));
            let mut history = History::default();
            let mut current = least;
            let last = *demand.last().expect("one");
            for (step, wanted) in demand.iter().copied().chain(std::iter::repeat_n(last, 80)).enumerate() {
                let now = at(15 * i64::try_from(step).expect("small"));
                history.start(current, now);
                let next = pace(&mut history, Some(&wishes), current, wanted, (least, most), now).replicas;
                prop_assert!((least..=most).contains(&next));
                prop_assert!((next - current).abs() <= pods, "{current} to {next}");
                if next != current {
                    history.changed(current, next, now);
                }
                current = next;
            }
            prop_assert_eq!(current, last.clamp(least, most));
        }
    }
}
