//! Strategic merge patch: a merge patch that knows each field's merge key and strategy, with directives.
//!
//! Directives: `$patch: replace|delete`, `$retainKeys`, `$deleteFromPrimitiveList/<field>`, `$setElementOrder/<field>`.
//! Source: the API's "strategic merge patch" contributor document; the texts of errors are the server's.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value};

use super::PatchError;
use crate::gofmt;
use crate::schema::{Field, Schema, SchemaRef};

const PATCH: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_FROM_LIST: &str = "$deleteFromPrimitiveList";
const SET_ORDER: &str = "$setElementOrder";

type Object = Map<String, Value>;

/// Applies `patch` to `object` (both JSON objects) by the rules of `schema`.
pub fn apply(object: &mut Value, patch: Value, schema: &Schema) -> Result<(), PatchError> {
    let Value::Object(patch) = patch else {
        return Err(PatchError::Malformed("invalid JSON document".into()));
    };
    let original = match object.take() {
        Value::Object(original) => original,
        _ => Object::new(),
    };
    *object = Value::Object(merge_map(original, patch, Some(schema))?);
    Ok(())
}

fn failed<T>(text: impl Into<String>) -> Result<T, PatchError> {
    Err(PatchError::Failed(text.into()))
}

/// What the schema says about the field `name` of an object.
struct Meta<'a> {
    /// The schema of the field's object, or of its list's items.
    schema: Option<&'a Schema>,
    merge: bool,
    replace: bool,
    merge_key: &'static str,
}

fn meta<'a>(schema: Option<&'a Schema>, name: &str) -> Meta<'a> {
    let field: Option<&Field> = schema.and_then(|schema| schema.field(name));
    let child = schema.and_then(|schema| schema.child(name));
    let inner = child.map(|child| child.items.as_ref().map_or(child, SchemaRef::get));
    let patch = field.map(|field| field.patch).unwrap_or_default();
    Meta { schema: inner, merge: patch.merge, replace: patch.replace, merge_key: patch.merge_key }
}

fn merge_map(mut original: Object, mut patch: Object, schema: Option<&Schema>) -> Result<Object, PatchError> {
    if let Some(directive) = patch.remove(PATCH) {
        return match directive.as_str() {
            Some("replace") => Ok(patch),
            Some("delete") => Ok(Object::new()),
            _ => failed(format!("unknown patch type: {} in map: {}", show(&directive), show_map(&patch))),
        };
    }
    if let Some(keys) = patch.remove(RETAIN_KEYS) {
        retain_keys(&mut original, &patch, &keys)?;
    }
    apply_orders(&mut original, &mut patch, schema)?;
    for (key, value) in patch {
        let (name, deletes) = match key.strip_prefix(DELETE_FROM_LIST) {
            Some(rest) => match rest.strip_prefix('/') {
                Some(name) => (name, true),
                None => return failed("invalid patch format of primitive list"),
            },
            None => (key.as_str(), false),
        };
        if value.is_null() {
            original.remove(name);
            continue;
        }
        let Some(current) = original.get_mut(name) else {
            if !deletes {
                take_new(&mut original, name, value);
            }
            continue;
        };
        match (current.take(), value) {
            (Value::Object(old), Value::Object(new)) => {
                let meta = meta(schema, name);
                *current = Value::Object(if meta.replace { new } else { merge_map(old, new, meta.schema)? });
            }
            (Value::Array(old), Value::Array(new)) => {
                let meta = meta(schema, name);
                *current = Value::Array(merge_list_field(old, new, &meta, deletes)?);
            }
            (old, new) => {
                if deletes {
                    *current = old;
                } else {
                    take_new(&mut original, name, new);
                }
            }
        }
    }
    Ok(original)
}

/// A field that the original lacks (or has with another type): the patch's value without nulls and directives.
fn take_new(original: &mut Object, name: &str, mut value: Value) {
    drop_nulls(&mut value);
    match without_directives(value) {
        Some(value) => {
            original.insert(name.to_owned(), value);
        }
        None => {
            original.remove(name);
        }
    }
}

/// Removes what the directive's list does not name; every field in the patch must be in it.
fn retain_keys(original: &mut Object, patch: &Object, keys: &Value) -> Result<(), PatchError> {
    const BAD: &str = "invalid patch format of retainKeys";
    let Value::Array(keys) = keys else {
        return failed(BAD);
    };
    let kept = |name: &str| keys.iter().any(|key| key.as_str() == Some(name));
    for (name, value) in patch {
        let directive = name.starts_with(DELETE_FROM_LIST) || name.starts_with(SET_ORDER);
        if !value.is_null() && !directive && !kept(name) {
            return failed(BAD);
        }
    }
    original.retain(|name, _| kept(name));
    Ok(())
}

/// Handles `$setElementOrder/<field>`: merges that field's list and puts its items in the wanted order.
fn apply_orders(original: &mut Object, patch: &mut Object, schema: Option<&Schema>) -> Result<(), PatchError> {
    let directives: Vec<String> = patch.keys().filter(|key| key.starts_with(SET_ORDER)).cloned().collect();
    for directive in directives {
        let Some(order) = patch.remove(&directive) else {
            continue;
        };
        let Value::Array(order) = order else {
            return bad_type("[]interface {}", &order);
        };
        let Some(name) = directive.strip_prefix(SET_ORDER).and_then(|rest| rest.strip_prefix('/')) else {
            return failed("invalid patch format of setElementOrder list");
        };
        let meta = meta(schema, name);
        let new = match patch.remove(name) {
            None => None,
            Some(Value::Array(items)) => Some(items),
            Some(Value::Null) => {
                // A removed list has no order.
                original.remove(name);
                continue;
            }
            Some(other) => return bad_type("[]interface {}", &other),
        };
        if let Some(new) = &new {
            check_order(new, &order, meta.merge_key)?;
        }
        let old = match original.get(name) {
            None => None,
            Some(Value::Array(items)) => Some(items.clone()),
            Some(other) => return bad_type("[]interface {}", other),
        };
        let merged = match (old.clone(), new) {
            (None, None) => continue,
            (Some(old), None) => old,
            (None, Some(new)) => new.into_iter().filter_map(without_directives).collect(),
            (Some(old), Some(new)) => merge_list_field(old, new, &meta, false)?,
        };
        let sorted = in_order(merged, &order, old.as_deref().unwrap_or(&[]), meta.merge_key)?;
        original.insert(name.to_owned(), Value::Array(sorted));
    }
    Ok(())
}

/// The items of a patch list must stand in the order of the directive's list and be among its items.
fn check_order(items: &[Value], order: &[Value], merge_key: &str) -> Result<(), PatchError> {
    if order.is_empty() {
        return Ok(());
    }
    let mut rest = order.iter();
    for item in items.iter().filter(|item| item.get(PATCH).is_none()) {
        let wanted = identity(item, merge_key)?;
        let mut found = false;
        for candidate in rest.by_ref() {
            if identity(candidate, merge_key)? == wanted {
                found = true;
                break;
            }
        }
        if !found {
            return failed(format!(
                "The order in patch list:\n{}\n doesn't match {SET_ORDER} list:\n{}\n",
                show_list(items),
                show_list(order)
            ));
        }
    }
    Ok(())
}

fn merge_list_field(
    old: Vec<Value>,
    new: Vec<Value>,
    meta: &Meta<'_>,
    deletes: bool,
) -> Result<Vec<Value>, PatchError> {
    if !meta.merge && !deletes {
        return Ok(new);
    }
    if old.is_empty() && new.is_empty() {
        return Ok(old);
    }
    check_items(&old, &new)?;
    let scalars = !old.iter().chain(&new).any(Value::is_object);
    if scalars {
        if deletes {
            let gone: HashSet<&Value> = new.iter().collect();
            return Ok(old.into_iter().filter(|item| !gone.contains(item)).collect());
        }
        let mut seen = HashSet::new();
        let merged = old.iter().chain(&new).filter(|item| seen.insert(*item)).cloned().collect();
        return in_order(merged, &new, &old, "");
    }
    if meta.merge_key.is_empty() {
        let name = meta.schema.map_or("", |schema| schema.name.rsplit('.').next().unwrap_or(""));
        return failed(format!("cannot merge lists without merge key for {name}"));
    }
    merge_items(old, new, meta)
}

/// Merges two lists of objects by their merge key.
fn merge_items(mut old: Vec<Value>, new: Vec<Value>, meta: &Meta<'_>) -> Result<Vec<Value>, PatchError> {
    let key = meta.merge_key;
    let mut plain = Vec::with_capacity(new.len());
    let mut gone = HashSet::new();
    let mut replace = false;
    for item in new {
        match item.get(PATCH) {
            None => plain.push(item),
            Some(Value::String(word)) if word == "delete" => {
                gone.insert(identity(&item, key)?.clone());
            }
            Some(Value::String(word)) if word == "replace" => replace = true,
            Some(Value::String(word)) if word == "merge" => {
                return failed("merging lists cannot yet be specified in the patch");
            }
            Some(other) => {
                return failed(format!("unknown patch type: {} in map: {}", show(other), show(&item)));
            }
        }
    }
    if replace {
        for item in &plain {
            identity(item, key)?;
        }
        return Ok(plain);
    }
    old.retain(|item| item.get(key).is_none_or(|value| !gone.contains(value)));
    let mut merged = old.clone();
    let mut places = HashMap::new();
    for (at, item) in old.iter().enumerate() {
        if let Some(value) = item.get(key) {
            places.entry(value).or_insert(at);
        }
    }
    for item in &plain {
        let at = *places.entry(identity(item, key)?).or_insert(merged.len());
        match (merged.get_mut(at).map(Value::take), item) {
            (Some(Value::Object(current)), Value::Object(patch)) => {
                merged[at] = Value::Object(merge_map(current, patch.clone(), meta.schema)?);
            }
            _ => merged.push(item.clone()),
        }
    }
    in_order(merged, &plain, &old, key)
}

/// Sorts `items`: those named by `patch` take its relative order, the others keep the server's, and the two are woven together
/// by the server's order. The result never moves an item past another of its own group.
fn in_order(items: Vec<Value>, patch: &[Value], server: &[Value], key: &str) -> Result<Vec<Value>, PatchError> {
    let patch_order = places(patch, key);
    let server_order = places(server, key);
    let mut named = Vec::new();
    let mut others = Vec::new();
    for item in items {
        let wanted = identity(&item, key)?;
        let at_server = server_order.get(wanted).copied();
        match patch_order.get(wanted) {
            Some(at) => named.push((*at, at_server, item)),
            None => others.push((at_server.unwrap_or(usize::MAX), item)),
        }
    }
    named.sort_by_key(|(at, ..)| *at);
    others.sort_by_key(|(at, _)| *at);
    let mut woven = Vec::with_capacity(named.len() + others.len());
    let mut left = others.into_iter().peekable();
    for (_, right_at, item) in named {
        while let Some((_, other)) = left.next_if(|(left_at, _)| right_at.is_some_and(|right_at| *left_at < right_at)) {
            woven.push(other);
        }
        woven.push(item);
    }
    woven.extend(left.map(|(_, item)| item));
    Ok(woven)
}

/// The first position of each item, by its identity.
fn places<'a>(list: &'a [Value], key: &str) -> HashMap<&'a Value, usize> {
    let mut places = HashMap::with_capacity(list.len());
    for (at, item) in list.iter().enumerate() {
        let identity = if key.is_empty() { Some(item) } else { item.get(key) };
        if let Some(identity) = identity {
            places.entry(identity).or_insert(at);
        }
    }
    places
}

/// What tells a list item from the others: the value under the merge key, or the scalar itself.
fn identity<'a>(item: &'a Value, key: &str) -> Result<&'a Value, PatchError> {
    if key.is_empty() {
        return Ok(item);
    }
    match item {
        Value::Object(map) => match map.get(key) {
            Some(value) => Ok(value),
            None => failed(format!("map: {} does not contain declared merge key: {key}", show_map(map))),
        },
        other => bad_type("map[string]interface {}", other),
    }
}

/// All items of both lists are of one type, and not lists.
fn check_items(old: &[Value], new: &[Value]) -> Result<(), PatchError> {
    let mut seen: Option<&Value> = None;
    for item in old.iter().chain(new) {
        if item.is_array() {
            return failed("lists of lists are not supported");
        }
        if let Some(first) = seen
            && std::mem::discriminant(first) != std::mem::discriminant(item)
        {
            let lists = format!("[{} {}]", show_list(old), show_list(new));
            return failed(format!("list element types are not identical: {lists}"));
        }
        seen = Some(item);
    }
    Ok(())
}

fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// The value without directives; `None` if it is itself one.
fn without_directives(value: Value) -> Option<Value> {
    match value {
        Value::Object(map) if map.contains_key(PATCH) => None,
        Value::Object(map) => {
            Some(map.into_iter().filter_map(|(key, value)| Some((key, without_directives(value)?))).collect())
        }
        Value::Array(items) => Some(items.into_iter().filter_map(without_directives).collect()),
        other => Some(other),
    }
}

fn bad_type<T>(expected: &str, actual: &Value) -> Result<T, PatchError> {
    failed(format!("expected a {expected}, but received a {}", go_type(actual)))
}

const fn go_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "%!s(<nil>)",
        Value::Bool(_) => "bool",
        Value::Number(_) => "int64",
        Value::String(_) => "string",
        Value::Array(_) => "[]interface {}",
        Value::Object(_) => "map[string]interface {}",
    }
}

/// A value as Go's `%v` prints it.
fn show(value: &Value) -> String {
    match value {
        Value::Object(map) => show_map(map),
        Value::Array(items) => show_list(items),
        Value::String(text) => text.clone(),
        Value::Null => "<nil>".into(),
        other => gofmt::json(other),
    }
}

fn show_map(map: &Object) -> String {
    let mut pairs: Vec<_> = map.iter().collect();
    pairs.sort_by_key(|(key, _)| *key);
    let pairs: Vec<String> = pairs.into_iter().map(|(key, value)| format!("{key}:{}", show(value))).collect();
    format!("map[{}]", pairs.join(" "))
}

fn show_list(items: &[Value]) -> String {
    let items: Vec<String> = items.iter().map(show).collect();
    format!("[{}]", items.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(original: Value, patch: Value) -> Result<Value, PatchError> {
        let schema = Schema::builtin("io.k8s.api.core.v1.Pod").expect("pod");
        let mut object = original;
        apply(&mut object, patch, &schema).map(|()| object)
    }

    #[test]
    fn containers_merge_by_name_and_keep_order() {
        let original = json!({"spec": {"containers": [{"name": "a", "image": "1"}, {"name": "b", "image": "2"}]}});
        let patch = json!({"spec": {"containers": [{"name": "c"}, {"name": "b", "image": "3"}]}});
        assert_eq!(
            pod(original, patch),
            Ok(
                json!({"spec": {"containers": [{"name": "c"}, {"name": "a", "image": "1"}, {"name": "b", "image": "3"}]}})
            )
        );
    }

    #[test]
    fn directives_delete_replace_and_order() {
        let list = || json!({"spec": {"containers": [{"name": "a"}, {"name": "b"}, {"name": "c"}]}});
        assert_eq!(
            pod(list(), json!({"spec": {"containers": [{"$patch": "delete", "name": "b"}]}})),
            Ok(json!({"spec": {"containers": [{"name": "a"}, {"name": "c"}]}}))
        );
        assert_eq!(
            pod(list(), json!({"spec": {"containers": [{"$patch": "replace"}, {"name": "z"}]}})),
            Ok(json!({"spec": {"containers": [{"name": "z"}]}}))
        );
        assert_eq!(
            pod(list(), json!({"spec": {"$setElementOrder/containers": [{"name": "c"}, {"name": "a"}]}})),
            Ok(json!({"spec": {"containers": [{"name": "b"}, {"name": "c"}, {"name": "a"}]}}))
        );
        assert_eq!(
            pod(
                json!({"metadata": {"finalizers": ["a", "b", "c"]}}),
                json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["b"], "finalizers": ["d"]}})
            ),
            Ok(json!({"metadata": {"finalizers": ["d", "a", "c"]}}))
        );
        assert_eq!(
            pod(
                json!({"spec": {"volumes": [{"name": "v", "emptyDir": {}}]}}),
                json!({"spec": {"volumes": [{"name": "v", "$retainKeys": ["name", "hostPath"], "hostPath": {"path": "/"}}]}})
            ),
            Ok(json!({"spec": {"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}}))
        );
        assert_eq!(
            pod(json!({"spec": {"a": 1}}), json!({"spec": {"$patch": "replace", "b": 1}})),
            Ok(json!({"spec": {"b": 1}}))
        );
        assert_eq!(pod(json!({"spec": {"a": 1}}), json!({"spec": {"$patch": "delete"}})), Ok(json!({"spec": {}})));
    }

    #[test]
    fn errors_are_the_servers() {
        let failed = |original, patch| match pod(original, patch) {
            Err(PatchError::Failed(text)) => text,
            other => format!("{other:?}"),
        };
        let two = json!({"spec": {"containers": [{"name": "a"}]}});
        assert_eq!(
            failed(two.clone(), json!({"spec": {"containers": [{"image": "x"}]}})),
            "map: map[image:x] does not contain declared merge key: name"
        );
        assert_eq!(
            failed(two, json!({"spec": {"containers": [{"name": "x", "$patch": "merge"}]}})),
            "merging lists cannot yet be specified in the patch"
        );
        assert_eq!(failed(json!({}), json!({"$patch": "nope"})), "unknown patch type: nope in map: map[]");
    }

    #[test]
    fn nulls_and_types_replace() {
        assert_eq!(
            pod(json!({"spec": {"a": 1, "b": 2}}), json!({"spec": {"a": null, "c": {"d": null, "e": 1}, "b": "x"}})),
            Ok(json!({"spec": {"b": "x", "c": {"e": 1}}}))
        );
        assert_eq!(
            pod(json!({"metadata": {"finalizers": ["a"]}}), json!({"metadata": {"finalizers": null}})),
            Ok(json!({"metadata": {}}))
        );
    }
}
