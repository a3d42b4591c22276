//! When a schedule is due: five fields, one of the `@` words, or `@every` and a duration, in a time zone.

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use k8s_openapi::jiff::tz::TimeZone;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

/// Times that are looked for one by one; with more of them missed the schedule is stepped through in larger strides.
const MISSED_MOST: usize = 100;

pub(super) enum Schedule {
    Fields(Box<Cron>),
    Every(SignedDuration),
}

/// The times of a schedule that have passed since it was last followed.
#[derive(Debug, Default, Eq, PartialEq)]
pub(super) struct Missed {
    /// The latest.
    pub(super) latest: Option<Timestamp>,
    /// There were more than anybody counts: somebody's clock or deadline is off.
    pub(super) too_many: bool,
}

impl Schedule {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        if let Some(period) = text.strip_prefix("@every ") {
            let period: SignedDuration = period.trim().parse().map_err(|error| format!("{text}: {error}"))?;
            if period < SignedDuration::from_secs(1) {
                return Err(format!("{text}: shorter than a second"));
            }
            return Ok(Self::Every(SignedDuration::from_secs(period.as_secs())));
        }
        let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        parser.parse(text).map(|cron| Self::Fields(Box::new(cron))).map_err(|error| error.to_string())
    }

    /// The first time after one; `None` when there is none any more (30 February).
    pub(super) fn after(&self, time: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        match self {
            Self::Every(period) => {
                let whole = Timestamp::from_second(time.as_second()).ok()?;
                whole.checked_add(*period).ok()
            }
            Self::Fields(cron) => {
                cron.find_next_occurrence(&time.to_zoned(zone.clone()), false).ok().map(|next| next.timestamp())
            }
        }
    }

    /// What was missed after one time and up to another.
    pub(super) fn missed(&self, after: Timestamp, now: Timestamp, zone: &TimeZone) -> Missed {
        let mut missed = Missed::default();
        let mut time = after;
        let mut count = 0;
        while let Some(next) = self.after(time, zone).filter(|next| *next <= now) {
            missed.latest = Some(next);
            time = next;
            count += 1;
            if count > MISSED_MOST {
                missed.too_many = true;
                missed.latest = self.latest(next, now, zone);
                break;
            }
        }
        missed
    }

    /// The latest time in a long stretch, found by halving it: some time of the schedule is known to be in it.
    fn latest(&self, known: Timestamp, now: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let (mut known, mut bound) = (known, now);
        while bound.duration_since(known) > SignedDuration::from_secs(1) {
            let middle = known.checked_add(bound.duration_since(known) / 2).ok()?;
            match self.after(middle, zone).filter(|next| *next <= now) {
                Some(next) => known = next,
                None => bound = middle,
            }
        }
        Some(known)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    #[test]
    fn fields_words_and_periods_are_followed() {
        for (schedule, after, next) in [
            ("*/5 * * * *", "2026-01-01T00:02:00Z", Some("2026-01-01T00:05:00Z")),
            ("*/5 * * * *", "2026-01-01T00:05:00Z", Some("2026-01-01T00:10:00Z")),
            ("0 0 13 * 5", "2026-01-01T00:00:00Z", Some("2026-01-02T00:00:00Z")),
            ("@hourly", "2026-01-01T00:02:00Z", Some("2026-01-01T01:00:00Z")),
            ("@every 90s", "2026-01-01T00:00:00.5Z", Some("2026-01-01T00:01:30Z")),
            ("0 0 30 2 *", "2026-01-01T00:00:00Z", None),
        ] {
            let parsed = Schedule::parse(schedule).expect(schedule);
            assert_eq!(parsed.after(at(after), &TimeZone::UTC), next.map(at), "{schedule}");
        }
        for bad in ["* * * *", "0 * * * * *", "@every 1ms", "@every x", "61 * * * *"] {
            assert!(Schedule::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn time_zones_shift_the_hours() {
        let zone = TimeZone::get("Asia/Kolkata").expect("known");
        let schedule = Schedule::parse("0 9 * * *").expect("well formed");
        assert_eq!(schedule.after(at("2026-01-01T00:00:00Z"), &zone), Some(at("2026-01-01T03:30:00Z")));
    }

    proptest! {
        #[test]
        fn the_latest_missed_time_is_that_of_counting_them_all(minutes in 1_i64..5000, step in 1_u32..60, start in 0_i64..10_000_000) {
            let schedule = Schedule::parse(&format!("*/{step} * * * *")).expect("well formed");
            let after = Timestamp::from_second(1_700_000_000 + start).expect("in range");
            let now = after + SignedDuration::from_mins(minutes);
            let all: Vec<_> = std::iter::successors(schedule.after(after, &TimeZone::UTC), |t| schedule.after(*t, &TimeZone::UTC))
                .take_while(|t| *t <= now)
                .collect();
            let missed = schedule.missed(after, now, &TimeZone::UTC);
            prop_assert_eq!(missed.latest, all.last().copied());
            prop_assert_eq!(missed.too_many, all.len() > MISSED_MOST);
        }
    }
}
