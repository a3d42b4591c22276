//! Small accessors on objects as JSON values.

use serde_json::{Map, Value};

/// A string at a JSON pointer, empty when absent.
pub fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// `metadata.name`.
pub fn name(object: &Value) -> &str {
    text(object, "/metadata/name")
}

/// `metadata.namespace`, empty for cluster-scoped objects.
pub fn namespace(object: &Value) -> &str {
    text(object, "/metadata/namespace")
}

/// `metadata.uid`.
pub fn uid(object: &Value) -> &str {
    text(object, "/metadata/uid")
}

/// The members of an object; an object is made of anything else.
pub fn members(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => map,
        _ => unreachable!("made an object above"),
    }
}

/// `metadata`, made when absent.
pub fn metadata(object: &mut Value) -> &mut Map<String, Value> {
    members(members(object).entry("metadata").or_insert_with(|| Value::Object(Map::new())))
}

/// Removes a top-level member.
pub fn remove(object: &mut Value, member: &str) {
    if let Some(map) = object.as_object_mut() {
        map.remove(member);
    }
}

/// Gives `new` the top-level member of `old`, or takes it away when `old` has none.
pub fn copy(new: &mut Value, old: &Value, member: &str) {
    match old.get(member) {
        Some(value) => {
            members(new).insert(member.into(), value.clone());
        }
        None => remove(new, member),
    }
}

/// Keeps everything of `old` but `status` (and the managed fields and resource version, which the handlers look after).
pub fn keep_all_but_status(new: &mut Value, old: &Value) {
    let status = new.get("status").cloned();
    let managed = new.pointer("/metadata/managedFields").cloned();
    let version = new.pointer("/metadata/resourceVersion").cloned();
    *new = old.clone();
    match status {
        Some(status) => {
            members(new).insert("status".into(), status);
        }
        None => remove(new, "status"),
    }
    for (member, value) in [("managedFields", managed), ("resourceVersion", version)] {
        match value {
            Some(value) => {
                metadata(new).insert(member.into(), value);
            }
            None => {
                metadata(new).remove(member);
            }
        }
    }
}

/// Whether two objects differ in any top-level member that is not in `ignored`.
pub fn differs_outside(new: &Value, old: &Value, ignored: &[&str]) -> bool {
    let none = Map::new();
    let (new, old) = (new.as_object().unwrap_or(&none), old.as_object().unwrap_or(&none));
    let counts = |member: &&String| !ignored.contains(&member.as_str());
    new.keys().chain(old.keys()).filter(counts).any(|member| new.get(member) != old.get(member))
}
