//! Small edits of objects, used by defaulting and preparation. No edit panics, whatever the shape of the value.

use serde_json::{Map, Value};

use crate::kinds::quantity::Quantity;

/// True for what Go calls the zero value of a string, number, list or map, and for nothing at all.
pub fn zero(v: Option<&Value>) -> bool {
    match v {
        None | Some(Value::Null) => true,
        Some(Value::String(s)) => s.is_empty(),
        Some(Value::Number(n)) => n.as_i64() == Some(0),
        Some(Value::Array(a)) => a.is_empty(),
        Some(Value::Object(o)) => o.is_empty(),
        Some(Value::Bool(_)) => false,
    }
}

/// Sets a member that is absent or null (a nil pointer).
pub fn unset(v: &mut Value, field: &str, default: impl Into<Value>) {
    if let Value::Object(o) = v
        && o.get(field).is_none_or(Value::is_null)
    {
        o.insert(field.to_owned(), default.into());
    }
}

/// Sets a member that holds its zero value (an empty string, 0).
pub fn empty(v: &mut Value, field: &str, default: impl Into<Value>) {
    if let Value::Object(o) = v
        && zero(o.get(field))
    {
        o.insert(field.to_owned(), default.into());
    }
}

/// Sets a member.
pub fn put(v: &mut Value, field: &str, value: impl Into<Value>) {
    if let Value::Object(o) = v {
        o.insert(field.to_owned(), value.into());
    }
}

/// Takes a member away.
pub fn drop(v: &mut Value, field: &str) {
    if let Value::Object(o) = v {
        o.remove(field);
    }
}

/// Runs `f` on a member that is an object.
pub fn each_field(v: &mut Value, field: &str, f: impl FnOnce(&mut Value)) {
    if let Some(x) = v.get_mut(field).filter(|x| x.is_object()) {
        f(x);
    }
}

/// Runs `f` on every element of a list member that is an object.
pub fn each(v: &mut Value, field: &str, mut f: impl FnMut(&mut Value)) {
    for x in v.get_mut(field).and_then(Value::as_array_mut).into_iter().flatten().filter(|x| x.is_object()) {
        f(x);
    }
}

/// A member that is made an object when it is absent or anything else.
pub fn child<'a>(v: &'a mut Value, field: &str) -> &'a mut Value {
    if !v.is_object() {
        *v = Value::Object(Map::new());
    }
    let slot = &mut v[field];
    if !slot.is_object() {
        *slot = Value::Object(Map::new());
    }
    slot
}

/// A string member, empty when absent.
pub fn text<'a>(v: &'a Value, field: &str) -> &'a str {
    v.get(field).and_then(Value::as_str).unwrap_or_default()
}

/// An integer member.
pub fn int(v: &Value, field: &str) -> Option<i64> {
    v.get(field).and_then(Value::as_i64)
}

/// A boolean member, false when absent.
pub fn flag(v: &Value, field: &str) -> bool {
    v.get(field).and_then(Value::as_bool).unwrap_or_default()
}

/// The elements of a list member.
pub fn list<'a>(v: &'a Value, field: &str) -> &'a [Value] {
    v.get(field).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// Writes each quantity of a map in its canonical form, rounded up to thousandths.
pub fn quantities(v: &mut Value, field: &str) {
    if let Some(Value::Object(o)) = v.get_mut(field) {
        for q in o.values_mut() {
            canonical(q, true);
        }
    }
}

/// Writes one quantity member in its canonical form.
pub fn quantity(v: &mut Value, field: &str) {
    if let Some(q) = v.get_mut(field) {
        canonical(q, false);
    }
}

fn canonical(v: &mut Value, round: bool) {
    if let Some(q) = Quantity::from_value(v) {
        *v = Value::String(if round { q.round_up_milli() } else { q }.to_string());
    }
}

/// Takes away nulls everywhere, which mean nothing in a stored object.
pub fn drop_nulls(v: &mut Value) {
    match v {
        Value::Object(o) => {
            o.retain(|_, x| !x.is_null());
            o.values_mut().for_each(drop_nulls);
        }
        Value::Array(a) => a.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}
