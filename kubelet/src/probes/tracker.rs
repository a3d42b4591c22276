//! Answers counted against thresholds: a value that answers change.

use super::{Answer, Schedule};

/// What a probe has found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// As many successes in a row as asked for.
    Passed,
    /// As many failures in a row as allowed.
    Failed,
}

/// Counts answers of one kind in a row.
#[derive(Clone, Debug)]
pub struct Tracker {
    schedule: Schedule,
    standing: Option<Standing>,
    last: Option<Standing>,
    row: u32,
}

impl Tracker {
    /// A tracker that has seen nothing.
    pub fn new(schedule: Schedule) -> Self {
        Self { schedule, standing: None, last: None, row: 0 }
    }

    /// Takes an answer in; the new standing when this answer changed it. An answer that could not be had changes nothing.
    pub fn observe(&mut self, answer: &Answer) -> Option<Standing> {
        let now = match answer {
            Answer::Success(_) => Standing::Passed,
            Answer::Failure(_) => Standing::Failed,
            Answer::Unknown(_) => return None,
        };
        self.row = if self.last == Some(now) { self.row.saturating_add(1) } else { 1 };
        self.last = Some(now);
        let threshold = if now == Standing::Passed { self.schedule.successes } else { self.schedule.failures };
        if self.row < threshold || self.standing == Some(now) {
            return None;
        }
        self.standing = Some(now);
        Some(now)
    }

    /// What has been found out so far.
    pub fn standing(&self) -> Option<Standing> {
        self.standing
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn schedule(successes: u32, failures: u32) -> Schedule {
        let second = Duration::from_secs(1);
        Schedule { delay: Duration::ZERO, period: second, timeout: second, successes, failures }
    }

    fn answer(good: bool) -> Answer {
        if good { Answer::Success(String::new()) } else { Answer::Failure(String::new()) }
    }

    proptest! {
        /// The standing is that of the last run of equal answers that reached its threshold.
        #[test]
        fn runs_decide(answers in prop::collection::vec(any::<bool>(), 0..40), successes in 1..4_u32, failures in 1..4_u32) {
            let mut tracker = Tracker::new(schedule(successes, failures));
            let mut wanted = None;
            for end in 1..=answers.len() {
                let good = answers[end - 1];
                let run = answers[..end].iter().rev().take_while(|answer| **answer == good).count() as u32;
                if run >= if good { successes } else { failures } {
                    wanted = Some(if good { Standing::Passed } else { Standing::Failed });
                }
                let before = tracker.standing();
                let change = tracker.observe(&answer(good));
                prop_assert_eq!(tracker.standing(), wanted);
                prop_assert_eq!(change.is_some(), before != wanted);
            }
        }
    }

    #[test]
    fn no_answer_changes_nothing() {
        let mut tracker = Tracker::new(schedule(1, 2));
        assert_eq!(tracker.observe(&answer(false)), None);
        assert_eq!(tracker.observe(&Answer::Unknown("no runtime".into())), None);
        assert_eq!(tracker.observe(&answer(false)), Some(Standing::Failed));
    }
}
