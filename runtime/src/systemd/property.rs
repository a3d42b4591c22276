//! Resources and annotations of a container as properties of a unit (systemd.resource-control(5), org.freedesktop.systemd1(5)).

use std::collections::HashMap;

use super::bus::Value;
use crate::cgroup::Setting;
use crate::error::{Error, Result};

/// Annotations that name properties begin so, as with runc and crun.
const ANNOTATION: &str = "org.systemd.property.";
/// systemd keeps quotas in whole percent of a processor: this many microseconds of a second.
const QUOTA_STEP_US: u64 = 10_000;
const SECOND_US: u64 = 1_000_000;
/// Highest processor or memory node of a mask.
const MAX_BIT: usize = 1 << 16;

/// Files of a cgroup that are one number, and the properties that systemd keeps them in.
const NUMBERS: [(&str, &str); 8] = [
    ("cpu.weight", "CPUWeight"),
    ("io.weight", "IOWeight"),
    ("memory.high", "MemoryHigh"),
    ("memory.low", "MemoryLow"),
    ("memory.max", "MemoryMax"),
    ("memory.min", "MemoryMin"),
    ("memory.swap.max", "MemorySwapMax"),
    ("pids.max", "TasksMax"),
];
const MASKS: [(&str, &str); 2] = [("cpuset.cpus", "AllowedCPUs"), ("cpuset.mems", "AllowedMemoryNodes")];

/// The properties for what will be written to a cgroup: systemd writes its own values again whenever its configuration is
/// loaded anew, so it has to know ours. What it has no property for it leaves alone.
pub(super) fn of_settings(settings: &[Setting]) -> Vec<(String, Value)> {
    let mut properties = Vec::new();
    for setting in settings {
        let known = |table: &[(&str, &'static str)]| {
            table.iter().find(|(file, _)| *file == setting.file).map(|(_, property)| *property)
        };
        if let (Some(property), Some(value)) = (known(&NUMBERS), number(&setting.value)) {
            properties.push((property.into(), Value::U64(value)));
        } else if let (Some(property), Some(mask)) = (known(&MASKS), mask(&setting.value)) {
            properties.push((property.into(), Value::Bytes(mask)));
        } else if let ("cpu.max", Some((quota, period))) = (setting.file.as_str(), setting.value.split_once(' ')) {
            let (quota, period) = (number(quota).unwrap_or(u64::MAX), number(period).unwrap_or_default().max(1));
            let share = quota
                .checked_mul(SECOND_US)
                .map_or(u64::MAX, |product| (product / period).max(1).next_multiple_of(QUOTA_STEP_US));
            properties.push(("CPUQuotaPerSecUSec".into(), Value::U64(share)));
            properties.push(("CPUQuotaPeriodUSec".into(), Value::U64(period)));
        }
    }
    properties
}

fn number(text: &str) -> Option<u64> {
    match text.trim_start_matches("default ") {
        "max" => Some(u64::MAX),
        digits => digits.parse().ok(),
    }
}

/// A list such as `0-2,7` as a bit mask, lowest byte first.
fn mask(list: &str) -> Option<Vec<u8>> {
    let mut mask = Vec::new();
    for part in list.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        for bit in first.parse::<usize>().ok()?..=last.parse().ok().filter(|last| *last < MAX_BIT)? {
            if mask.len() <= bit / 8 {
                mask.resize(bit / 8 + 1, 0);
            }
            mask[bit / 8] |= 1 << (bit % 8);
        }
    }
    Some(mask)
}

/// The properties that annotations name.
pub(super) fn of_annotations(annotations: Option<&HashMap<String, String>>) -> Result<Vec<(String, Value)>> {
    let mut properties = Vec::new();
    for (key, text) in annotations.into_iter().flatten() {
        let Some(name) = key.strip_prefix(ANNOTATION) else { continue };
        let wrong = || Error::config(format!("annotations.{key}"), format!("{text:?} is not a property's value"));
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(wrong());
        }
        let value = parse(text.trim()).ok_or_else(wrong)?;
        properties.push(match (name.strip_suffix("Sec").filter(|stem| !stem.ends_with('U')), value) {
            // Units are written in seconds, the bus has microseconds.
            (Some(stem), Value::I32(seconds)) => {
                let seconds = u64::try_from(seconds).map_err(|_| wrong())?;
                (format!("{stem}USec"), Value::U64(seconds * SECOND_US))
            }
            (_, value) => (name.to_owned(), value),
        });
    }
    properties.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(properties)
}

/// A value in the text form of GVariant, as far as properties of units need it.
fn parse(text: &str) -> Option<Value> {
    if let Some((kind, digits)) = text.split_once(' ') {
        match kind {
            "uint32" => return digits.trim().parse().ok().map(Value::U32),
            "int32" => return digits.trim().parse().ok().map(Value::I32),
            "uint64" => return digits.trim().parse().ok().map(Value::U64),
            "int64" => return digits.trim().parse().ok().map(Value::I64),
            _ => {}
        }
    }
    match text {
        "true" => Some(Value::Bool(true)),
        "false" => Some(Value::Bool(false)),
        _ => {
            if let Some(list) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                return list.split(',').map(|item| quoted(item.trim())).collect::<Option<_>>().map(Value::Texts);
            }
            quoted(text).map(Value::Text).or_else(|| text.parse().ok().map(Value::I32))
        }
    }
}

fn quoted(text: &str) -> Option<String> {
    let quote = text.chars().next().filter(|quote| matches!(quote, '\'' | '"'))?;
    let inner = text.strip_prefix(quote)?.strip_suffix(quote)?;
    (!inner.contains([quote, '\\'])).then(|| inner.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_become_properties_that_systemd_keeps() {
        let resources = serde_json::from_value(serde_json::json!({
            "memory": {"limit": 100, "swap": 150}, "pids": {"limit": -1},
            "cpu": {"shares": 1024, "quota": 12345, "period": 100000, "cpus": "0-1,9", "burst": 5},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4}],
        }))
        .expect("resources");
        let settings = crate::cgroup::settings(&resources, |_| true).expect("settings");
        let expected = [
            ("AllowedCPUs", Value::Bytes(vec![3, 2])),
            ("CPUWeight", Value::U64(100)),
            // 12.345 % is rounded up.
            ("CPUQuotaPerSecUSec", Value::U64(130_000)),
            ("CPUQuotaPeriodUSec", Value::U64(100_000)),
            ("MemorySwapMax", Value::U64(50)),
            ("MemoryMax", Value::U64(100)),
            ("TasksMax", Value::U64(u64::MAX)),
        ];
        assert_eq!(of_settings(&settings), expected.map(|(name, value)| (name.to_owned(), value)));
    }

    #[test]
    fn annotations_are_values_of_any_type() {
        let of = |text: &str| {
            let key = format!("{ANNOTATION}TimeoutStopSec");
            of_annotations(Some(&HashMap::from([(key, text.to_owned()), ("other".into(), "x".into())])))
        };
        assert_eq!(of("5").expect("known"), [("TimeoutStopUSec".into(), Value::U64(5_000_000))]);
        for (text, value) in [
            ("uint64 5", Value::U64(5)),
            ("'a b'", Value::Text("a b".into())),
            ("['a', \"b\"]", Value::Texts(vec!["a".into(), "b".into()])),
            ("true", Value::Bool(true)),
        ] {
            assert_eq!(of(text).expect("known"), [("TimeoutStopSec".into(), value)]);
        }
        for text in ["", "uint64 x", "'", "{}", "-5"] {
            assert!(of(text).is_err(), "{text:?}");
        }
    }
}
