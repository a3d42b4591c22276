//! Scalars with a text form of their own: times, durations, quantities, base64.

use jiff::Timestamp;
use jiff::tz::Offset;

use crate::gofmt;

/// RFC 3339 to seconds in UTC, as `metav1.Time` is written; the error is Go's.
pub fn time(text: &str) -> Result<String, String> {
    Ok(format_time(parse_time(text, "2006-01-02T15:04:05Z07:00")?))
}

/// RFC 3339 to microseconds in UTC, as `metav1.MicroTime` is written; the error is Go's.
pub fn micro_time(text: &str) -> Result<String, String> {
    Ok(format_micro_time(parse_time(text, "2006-01-02T15:04:05.000000Z07:00")?))
}

/// `2006-01-02T15:04:05Z`
pub fn format_time(at: Timestamp) -> String {
    Offset::UTC.to_datetime(at).strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// `2006-01-02T15:04:05.000000Z`
pub fn format_micro_time(at: Timestamp) -> String {
    Offset::UTC.to_datetime(at).strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}

/// Parses RFC 3339 as strictly as Go does; `layout` stands in the error.
pub fn parse_time(text: &str, layout: &str) -> Result<Timestamp, String> {
    let bytes = text.as_bytes();
    let shape = [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':')];
    let shaped = bytes.len() >= 20 && shape.iter().all(|(at, byte)| bytes[*at] == *byte);
    let parsed = if shaped { text.parse::<Timestamp>().ok() } else { None };
    parsed.ok_or_else(|| {
        let (rest, part) = first_mismatch(bytes, text);
        let text = gofmt::quote(text);
        format!(
            "parsing time {text} as {}: cannot parse {} as {}",
            gofmt::quote(layout),
            gofmt::quote(rest),
            gofmt::quote(part)
        )
    })
}

/// Where Go's parser stops and what it wanted there.
fn first_mismatch<'a>(bytes: &[u8], text: &'a str) -> (&'a str, &'static str) {
    let parts: [(usize, usize, &str); 11] = [
        (0, 4, "2006"),
        (4, 5, "-"),
        (5, 7, "01"),
        (7, 8, "-"),
        (8, 10, "02"),
        (10, 11, "T"),
        (11, 13, "15"),
        (13, 14, ":"),
        (14, 16, "04"),
        (16, 17, ":"),
        (17, 19, "05"),
    ];
    for (from, to, want) in parts {
        let fits = bytes.get(from..to).is_some_and(|have| {
            if want.len() == 1 { have == want.as_bytes() } else { have.iter().all(u8::is_ascii_digit) }
        });
        if !fits {
            return (text.get(from..).unwrap_or(""), want);
        }
    }
    (text.get(19..).unwrap_or(""), "Z07:00")
}

/// A Go duration (`1h30m`, `1.5s`, `-2ms`) in nanoseconds.
pub fn duration(text: &str) -> Result<i64, String> {
    let bad = || format!("time: invalid duration {}", gofmt::quote(text));
    let (negative, mut rest) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    if rest == "0" {
        return Ok(0);
    }
    if rest.is_empty() {
        return Err(bad());
    }
    let mut total: i128 = 0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, tail) = rest.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || whole.len() > 19 {
            return Err(bad());
        }
        let end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let unit: i128 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            "" => {
                return Err(format!("time: missing unit in duration {}", gofmt::quote(text)));
            }
            other => {
                let (other, text) = (gofmt::quote(other), gofmt::quote(text));
                return Err(format!("time: unknown unit {other} in duration {text}"));
            }
        };
        total += whole.parse::<i128>().unwrap_or(0) * unit;
        let mut scale = unit;
        for digit in fraction.bytes().take(18) {
            scale /= 10;
            total += i128::from(digit - b'0') * scale;
        }
        rest = tail;
    }
    i64::try_from(if negative { -total } else { total }).map_err(|_| bad())
}

/// Nanoseconds as Go prints a duration: `1h30m0s`, `1.5s`, `100ms`.
pub fn format_duration(nanos: i64) -> String {
    if nanos == 0 {
        return "0s".into();
    }
    let sign = if nanos < 0 { "-" } else { "" };
    let size = nanos.unsigned_abs();
    let (unit, name) = match size {
        0..1_000 => (1, "ns"),
        1_000..1_000_000 => (1_000, "µs"),
        1_000_000..1_000_000_000 => (1_000_000, "ms"),
        _ => (1_000_000_000, "s"),
    };
    let mut whole = size / unit;
    let digits = unit.ilog10() as usize;
    let fraction = format!("{:0digits$}", size % unit);
    let fraction = if digits == 0 { "" } else { fraction.trim_end_matches('0') };
    let dot = if fraction.is_empty() { "" } else { "." };
    let mut text = sign.to_owned();
    if name == "s" {
        if whole >= 3_600 {
            text.push_str(&format!("{}h", whole / 3_600));
        }
        if whole >= 60 {
            text.push_str(&format!("{}m", whole % 3_600 / 60));
        }
        whole %= 60;
    }
    text.push_str(&format!("{whole}{dot}{fraction}{name}"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_durations() {
        assert_eq!(time("2026-01-02T03:04:05+02:00"), Ok("2026-01-02T01:04:05Z".into()));
        assert_eq!(micro_time("2026-01-02T03:04:05.1234567Z"), Ok("2026-01-02T03:04:05.123456Z".into()));
        assert_eq!(
            time("x"),
            Err(r#"parsing time "x" as "2006-01-02T15:04:05Z07:00": cannot parse "x" as "2006""#.into())
        );
        for (given, want) in
            [("1h30m", "1h30m0s"), ("90s", "1m30s"), ("1.5s", "1.5s"), ("100ms", "100ms"), ("-2us", "-2µs")]
        {
            assert_eq!(duration(given).map(format_duration), Ok(want.into()));
        }
        assert_eq!(duration("5"), Err("time: missing unit in duration \"5\"".into()));
        assert_eq!(duration("x"), Err("time: invalid duration \"x\"".into()));
    }
}
