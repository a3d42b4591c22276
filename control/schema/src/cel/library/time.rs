//! Timestamps and durations.

use cel::common::ast::operators as op;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, Zoned};

use super::{Outcome, fail};
use crate::cel::value::Val;
use crate::decode::scalar;

pub(super) fn call<'a>(name: &str, args: &[Val<'a>]) -> Option<Outcome<'a>> {
    Some(match (name, args) {
        ("timestamp", [Val::Text(text)]) => {
            scalar::parse_time(text, "2006-01-02T15:04:05Z07:00").map_or_else(fail, |at| Ok(Val::Timestamp(at)))
        }
        ("timestamp", [Val::Int(seconds)]) => Timestamp::from_second(*seconds)
            .map_or_else(|_| fail("timestamp out of range"), |at| Ok(Val::Timestamp(at))),
        ("timestamp", [value @ Val::Timestamp(_)]) | ("duration", [value @ Val::Duration(_)]) => Ok(value.clone()),
        ("duration", [Val::Text(text)]) => scalar::duration(text).map_or_else(fail, |nanos| Ok(Val::Duration(nanos))),
        (op::ADD, [Val::Duration(a), Val::Duration(b)]) => nanos(a.checked_add(*b)),
        (op::SUBSTRACT, [Val::Duration(a), Val::Duration(b)]) => nanos(a.checked_sub(*b)),
        (op::ADD, [Val::Timestamp(at), Val::Duration(by)]) | (op::ADD, [Val::Duration(by), Val::Timestamp(at)]) => {
            shifted(*at, *by)
        }
        (op::SUBSTRACT, [Val::Timestamp(at), Val::Duration(by)]) => shifted(*at, by.saturating_neg()),
        (op::SUBSTRACT, [Val::Timestamp(a), Val::Timestamp(b)]) => {
            nanos(i64::try_from(a.as_nanosecond() - b.as_nanosecond()).ok())
        }
        (op::NEGATE, [Val::Duration(by)]) => nanos(by.checked_neg()),
        (_, [Val::Duration(nanos)]) => Ok(Val::Int(match name {
            "getHours" => nanos / 3_600_000_000_000,
            "getMinutes" => nanos / 60_000_000_000,
            "getSeconds" => nanos / 1_000_000_000,
            "getMilliseconds" => nanos / 1_000_000,
            _ => return None,
        })),
        (_, [Val::Timestamp(at), rest @ ..]) => {
            let zone = match rest {
                [] => TimeZone::UTC,
                [Val::Text(name)] => match zone(name) {
                    Some(zone) => zone,
                    None => return Some(fail(format!("unknown time zone {name}"))),
                },
                _ => return None,
            };
            Ok(Val::Int(part(name, &at.to_zoned(zone))?))
        }
        _ => return None,
    })
}

fn nanos<'a>(value: Option<i64>) -> Outcome<'a> {
    value.map_or_else(|| fail("duration overflow"), |nanos| Ok(Val::Duration(nanos)))
}

fn shifted<'a>(at: Timestamp, by: i64) -> Outcome<'a> {
    at.checked_add(SignedDuration::from_nanos(by))
        .map_or_else(|_| fail("timestamp overflow"), |at| Ok(Val::Timestamp(at)))
}

/// An IANA name or an offset such as `-08:00`.
fn zone(name: &str) -> Option<TimeZone> {
    if let Ok(zone) = TimeZone::get(name) {
        return Some(zone);
    }
    let (sign, rest) = name.strip_prefix('-').map_or((1, name.strip_prefix('+').unwrap_or(name)), |rest| (-1, rest));
    let (hours, minutes) = rest.split_once(':')?;
    let seconds =
        hours.parse::<i32>().ok()?.checked_mul(3_600)?.checked_add(minutes.parse::<i32>().ok()?.checked_mul(60)?)?;
    jiff::tz::Offset::from_seconds(sign * seconds).ok().map(TimeZone::fixed)
}

fn part(name: &str, at: &Zoned) -> Option<i64> {
    Some(match name {
        "getFullYear" => at.year().into(),
        "getMonth" => i64::from(at.month()) - 1,
        "getDate" => at.day().into(),
        "getDayOfMonth" => i64::from(at.day()) - 1,
        "getDayOfYear" => i64::from(at.day_of_year()) - 1,
        "getDayOfWeek" => at.weekday().to_sunday_zero_offset().into(),
        "getHours" => at.hour().into(),
        "getMinutes" => at.minute().into(),
        "getSeconds" => at.second().into(),
        "getMilliseconds" => at.millisecond().into(),
        _ => return None,
    })
}
