//! What cells are made of: ages, lists of images, selectors, conditions.

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::kinds::{Column, Kind};
use crate::object;

pub(super) const NONE: &str = "<none>";
pub(super) const UNKNOWN: &str = "<unknown>";
pub(super) const UNSET: &str = "<unset>";

/// An object that is being printed.
pub(super) struct View<'a> {
    pub(super) object: &'a Value,
    pub(super) now: Timestamp,
}

impl View<'_> {
    pub(super) fn text(&self, pointer: &str) -> &str {
        object::text(self.object, pointer)
    }

    pub(super) fn name(&self) -> Value {
        object::name(self.object).into()
    }

    /// Text, or `<none>`.
    pub(super) fn or_none(&self, pointer: &str) -> Value {
        or(self.text(pointer), NONE)
    }

    pub(super) fn int(&self, pointer: &str) -> i64 {
        self.object.pointer(pointer).and_then(Value::as_i64).unwrap_or(0)
    }

    pub(super) fn list(&self, pointer: &str) -> &[Value] {
        list(self.object, pointer)
    }

    pub(super) fn count(&self, pointer: &str) -> usize {
        match self.object.pointer(pointer) {
            Some(Value::Array(list)) => list.len(),
            Some(Value::Object(map)) => map.len(),
            _ => 0,
        }
    }

    /// Time since the object was made.
    pub(super) fn age(&self) -> Value {
        self.since("/metadata/creationTimestamp").into()
    }

    pub(super) fn since(&self, pointer: &str) -> String {
        since(self.text(pointer), self.now)
    }

    pub(super) fn created(&self) -> Value {
        self.text("/metadata/creationTimestamp").into()
    }

    /// Names or images of containers below a pod spec.
    pub(super) fn containers(&self, pod_spec: &str, member: &str) -> Value {
        let names: Vec<&str> = self
            .list(&format!("{pod_spec}/containers"))
            .iter()
            .map(|c| object::text(c, &format!("/{member}")))
            .collect();
        names.join(",").into()
    }

    /// A label selector as text, `<none>` when it is empty.
    pub(super) fn selector(&self, pointer: &str) -> Value {
        let text = self.object.pointer(pointer).map(crate::handlers::selector_text).unwrap_or_default();
        or(&text, NONE)
    }

    /// The status of a condition.
    pub(super) fn condition(&self, name: &str) -> Option<&str> {
        let found = self.list("/status/conditions").iter().find(|c| object::text(c, "/type") == name)?;
        Some(object::text(found, "/status"))
    }

    /// A number or percentage, or a word when it is not set.
    pub(super) fn int_or_text(&self, pointer: &str, unset: &str) -> Value {
        match self.object.pointer(pointer) {
            Some(Value::String(text)) => text.as_str().into(),
            Some(Value::Number(number)) => number.to_string().into(),
            _ => unset.into(),
        }
    }

    /// Quantities as `name: used/hard`, or a map as `a=b`.
    pub(super) fn labels(&self, pointer: &str) -> Value {
        let map = self.object.pointer(pointer).and_then(Value::as_object);
        let terms: Vec<String> = map
            .into_iter()
            .flatten()
            .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
            .collect();
        or(&terms.join(","), NONE)
    }
}

pub(super) fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

pub(super) fn or(text: &str, empty: &str) -> Value {
    if text.is_empty() { empty.into() } else { text.into() }
}

/// Time since a moment, `<unknown>` when there is none.
pub(super) fn since(text: &str, now: Timestamp) -> String {
    match text.parse::<Timestamp>() {
        Ok(then) => human(now.as_second() - then.as_second()),
        Err(_) => UNKNOWN.into(),
    }
}

/// A duration as `kubectl` shows it (`k8s.io/apimachinery/pkg/util/duration.HumanDuration`).
pub(super) fn human(seconds: i64) -> String {
    const MINUTE: i64 = 60;
    const HOUR: i64 = 60 * MINUTE;
    const DAY: i64 = 24 * HOUR;
    const YEAR: i64 = 365 * DAY;
    let two = |big: i64, unit: char, small: i64, small_unit: char| {
        if small == 0 { format!("{big}{unit}") } else { format!("{big}{unit}{small}{small_unit}") }
    };
    match seconds {
        ..-1 => "<invalid>".into(),
        -1..0 => "0s".into(),
        s if s < 2 * MINUTE => format!("{s}s"),
        s if s < 10 * MINUTE => two(s / MINUTE, 'm', s % MINUTE, 's'),
        s if s < 3 * HOUR => format!("{}m", s / MINUTE),
        s if s < 8 * HOUR => two(s / HOUR, 'h', s % HOUR / MINUTE, 'm'),
        s if s < 2 * DAY => format!("{}h", s / HOUR),
        s if s < 8 * DAY => two(s / DAY, 'd', s % DAY / HOUR, 'h'),
        s if s < 2 * YEAR => format!("{}d", s / DAY),
        s if s < 8 * YEAR => two(s / YEAR, 'y', s % YEAR / DAY, 'd'),
        s => format!("{}y", s / YEAR),
    }
}

/// A cell of a custom resource's column.
pub(super) fn custom(view: &View<'_>, column: &Column, found: &[&Value]) -> Value {
    let Some(first) = found.first().filter(|value| !value.is_null()) else { return Value::Null };
    match (column.type_.as_str(), first) {
        ("integer", Value::Number(number)) => number.as_i64().or_else(|| number.as_f64().map(|f| f as i64)).into(),
        ("integer", Value::String(text)) => text.parse::<i64>().ok().into(),
        ("number", Value::Number(_)) | ("boolean", Value::Bool(_)) => (*first).clone(),
        ("integer" | "number" | "boolean", _) => Value::Null,
        ("date", Value::String(text)) => match text.parse::<Timestamp>() {
            Ok(_) => since(text, view.now).into(),
            Err(_) => "<invalid>".into(),
        },
        _ => {
            let texts: Vec<String> = found
                .iter()
                .map(|value| match value {
                    Value::String(text) => text.clone(),
                    other => other.to_string(),
                })
                .collect();
            texts.join(" ").into()
        }
    }
}

/// Conditions of a row: `Completed` for pods and jobs that have ended.
pub(super) fn row_conditions(kind: &Kind, item: &Value) -> Vec<Value> {
    let phase = object::text(item, "/status/phase");
    let (done, reason, message) = match (kind.is("", "pods"), phase) {
        (true, "Succeeded") => (true, "Succeeded", "The pod has completed successfully."),
        (true, "Failed") => (true, "Failed", "The pod failed."),
        _ => (false, "", ""),
    };
    if done {
        vec![json!({"type": "Completed", "status": "True", "reason": reason, "message": message})]
    } else {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::human;

    #[test]
    fn durations_are_short() {
        for (seconds, expected) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (125, "2m5s"),
            (600, "10m"),
            (3 * 3600, "3h"),
            (3 * 3600 + 60, "3h1m"),
            (9 * 3600, "9h"),
            (49 * 3600, "2d1h"),
            (9 * 86400, "9d"),
            (3 * 365 * 86400, "3y"),
        ] {
            assert_eq!(human(seconds), expected);
        }
    }
}
