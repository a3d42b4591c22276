//! The JSON paths of printer columns: `.spec.replicas`, `.status.conditions[?(@.type=="Ready")].status`, `.spec.ports[*].port`,
//! `.metadata.labels.app\.kubernetes\.io/name`, `['a']`.

use std::borrow::Cow;

use serde_json::Value;

/// The values that a path leads to.
pub(super) fn find<'a>(object: &'a Value, path: &str) -> Vec<&'a Value> {
    let mut here = vec![object];
    let text = path.trim().trim_start_matches('{').trim_end_matches('}');
    let mut rest = text.strip_prefix('$').unwrap_or(text);
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix('[') {
            let Some(end) = closing(after) else { return Vec::new() };
            here = index(&here, after[..end].trim());
            rest = &after[end + 1..];
            continue;
        }
        let after = rest.strip_prefix('.').unwrap_or(rest);
        let (name, length) = field(after);
        if length == 0 {
            rest = after;
            if after.starts_with('[') {
                continue;
            }
            return here;
        }
        here = match name.as_str() {
            "*" => here.into_iter().flat_map(children).collect(),
            name => here.into_iter().filter_map(|value| value.get(name)).collect(),
        };
        rest = &after[length..];
    }
    here
}

/// A field's name with its escapes undone, and how many bytes it took.
fn field(text: &str) -> (String, usize) {
    let mut name = String::new();
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            '\\' if !escaped => escaped = true,
            '.' | '[' if !escaped => return (name, at),
            c => {
                name.push(c);
                escaped = false;
            }
        }
    }
    (name, text.len())
}

fn closing(text: &str) -> Option<usize> {
    let mut quote = None;
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match (c, quote) {
            ('\'' | '"', None) => quote = Some(c),
            (c, Some(open)) if c == open => quote = None,
            ('[', None) => depth += 1,
            (']', None) if depth == 0 => return Some(at),
            (']', None) => depth -= 1,
            _ => {}
        }
    }
    None
}

fn children(value: &Value) -> Vec<&Value> {
    match value {
        Value::Array(list) => list.iter().collect(),
        Value::Object(map) => map.values().collect(),
        _ => Vec::new(),
    }
}

fn index<'a>(here: &[&'a Value], inner: &str) -> Vec<&'a Value> {
    if inner == "*" {
        return here.iter().flat_map(|value| children(value)).collect();
    }
    if let Some(filter) = inner.strip_prefix("?(").and_then(|rest| rest.strip_suffix(')')) {
        return here.iter().flat_map(|value| children(value)).filter(|item| passes(item, filter)).collect();
    }
    if let Some(name) = quoted(inner) {
        return here.iter().filter_map(|value| value.get(name)).collect();
    }
    let at = |list: &'a Vec<Value>, n: i64| {
        let n = if n < 0 { n + i64::try_from(list.len()).ok()? } else { n };
        list.get(usize::try_from(n).ok()?)
    };
    let Ok(n) = inner.parse() else { return Vec::new() };
    here.iter().filter_map(|value| at(value.as_array()?, n)).collect()
}

fn quoted(text: &str) -> Option<&str> {
    ['\'', '"'].into_iter().find_map(|quote| text.strip_prefix(quote)?.strip_suffix(quote))
}

/// `@.type=="Ready"` and its relatives.
fn passes(item: &Value, filter: &str) -> bool {
    for operator in ["==", "!=", ">=", "<=", ">", "<"] {
        let Some((left, right)) = filter.split_once(operator) else { continue };
        let left = left.trim().strip_prefix('@').map(|path| find(item, path)).unwrap_or_default();
        let right = right.trim();
        let text = quoted(right).unwrap_or(right);
        let Some(found) = left.first() else { return false };
        let shown: Cow<'_, str> = match found {
            Value::String(value) => value.into(),
            other => other.to_string().into(),
        };
        let equal = shown == text;
        let compare = || Some(found.as_f64()?.total_cmp(&text.parse().ok()?));
        return match operator {
            "==" => equal,
            "!=" => !equal,
            ">=" => compare().is_some_and(std::cmp::Ordering::is_ge),
            "<=" => compare().is_some_and(std::cmp::Ordering::is_le),
            ">" => compare().is_some_and(std::cmp::Ordering::is_gt),
            _ => compare().is_some_and(std::cmp::Ordering::is_lt),
        };
    }
    filter.trim().strip_prefix('@').is_some_and(|path| !find(item, path).is_empty())
}

#[cfg(test)]
mod tests {
    use super::find;
    use serde_json::json;

    #[test]
    fn paths_lead_to_values() {
        let object = json!({
            "metadata": {"labels": {"a.b/c": "x"}},
            "spec": {"ports": [{"port": 1}, {"port": 2}]},
            "status": {"conditions": [{"type": "Ready", "status": "True"}, {"type": "Other", "status": "False"}]},
        });
        for (path, expected) in [
            (".spec.ports[*].port", json!([1, 2])),
            (".spec.ports[1].port", json!([2])),
            (".spec.ports[-1].port", json!([2])),
            (".status.conditions[?(@.type==\"Ready\")].status", json!(["True"])),
            (".status.conditions[?(@.type!='Ready')].status", json!(["False"])),
            (".metadata.labels.a\\.b/c", json!(["x"])),
            (".metadata.labels['a.b/c']", json!(["x"])),
            (".nothing.here", json!([])),
        ] {
            assert_eq!(json!(find(&object, path)), expected, "{path}");
        }
    }
}
