//! Walks over values with their schema: field set, comparison, merge, removal.
//!
//! A node is a map (of fields or keys), a list (by key, a set, or atomic) or a scalar. Atomic nodes are leaves. What the schema
//! does not describe is deduced from the value: maps merge by field, lists are atomic.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde_json::{Map, Value};

use super::set::{Element, Set};
use crate::gofmt;
use crate::schema::{Kind, ListType, Schema, SchemaRef};

/// Most errors of one configuration that are listed.
const MAX_ERRORS: usize = 100;

/// Where a walk stands: the schema, if any, and whether the field makes it atomic.
#[derive(Clone, Copy, Debug)]
pub(super) struct At<'a> {
    schema: Option<&'a Schema>,
    atomic: bool,
}

/// How a node is merged.
enum Shape<'a> {
    Map,
    List(&'a ListType),
    Leaf,
}

const ATOMIC: &ListType = &ListType::Atomic;

impl<'a> At<'a> {
    pub(super) const fn new(schema: &'a Schema) -> Self {
        Self { schema: Some(schema), atomic: false }
    }

    const UNKNOWN: Self = Self { schema: None, atomic: false };

    fn child(self, name: &str) -> Self {
        let Some(schema) = self.schema else {
            return Self::UNKNOWN;
        };
        if let Some(field) = schema.field(name) {
            return Self { schema: Some(field.schema.get()), atomic: field.atomic };
        }
        Self { schema: schema.values.as_ref().map(SchemaRef::get), atomic: false }
    }

    fn item(self) -> Self {
        Self { schema: self.schema.and_then(|schema| schema.items.as_ref()).map(SchemaRef::get), atomic: false }
    }

    /// Whether `name` is a declared field (not just a key of a map).
    fn declares(self, name: &str) -> bool {
        self.schema.is_some_and(|schema| schema.field(name).is_some())
    }

    fn shape(self, value: &Value) -> Shape<'a> {
        let Some(schema) = self.schema else {
            return Self::deduced(value);
        };
        match schema.kind {
            Kind::Object if self.atomic || schema.atomic => Shape::Leaf,
            Kind::Object => Shape::Map,
            Kind::List => Shape::List(&schema.list),
            Kind::StringList => Shape::List(ATOMIC),
            Kind::SchemaOrBool | Kind::SchemaOrArray | Kind::SchemaOrStrings | Kind::Json => Shape::Leaf,
            Kind::Any | Kind::Raw | Kind::FieldsV1 => Self::deduced(value),
            _ => Shape::Leaf,
        }
    }

    fn deduced(value: &Value) -> Shape<'a> {
        match value {
            Value::Object(_) => Shape::Map,
            Value::Array(_) => Shape::List(ATOMIC),
            _ => Shape::Leaf,
        }
    }
}

/// The step that leads to a list item; the error says why it has none.
fn element(at: At<'_>, list: &ListType, item: &Value) -> Result<Element, String> {
    match list {
        ListType::Map(keys) => {
            let Value::Object(map) = item else {
                return Err(format!(
                    "associative list with keys may not have {} element",
                    if item.is_null() { "a null" } else { "non-map" }
                ));
            };
            let mut found: BTreeMap<&str, Cow<'_, Value>> = BTreeMap::new();
            let items = at.item().schema;
            for key in keys {
                let value = map.get(key.as_ref()).map(Cow::Borrowed).or_else(|| {
                    let field = items?.field(key)?;
                    field.default.clone().or_else(|| field.schema.get().default.clone()).map(Cow::Owned)
                });
                if let Some(value) = value {
                    found.insert(key, value);
                }
            }
            if found.is_empty() {
                let names: Vec<String> = keys.iter().map(|key| gofmt::quote(key)).collect();
                return Err(format!(
                    "associative list with keys has an element that omits all key fields [{}] (and doesn't have default values for any key fields)",
                    names.join(" ")
                ));
            }
            let object: Map<String, Value> =
                found.into_iter().map(|(name, value)| (name.to_owned(), value.into_owned())).collect();
            Ok(format!("k:{}", Value::Object(object)))
        }
        _ => match item {
            Value::Object(_) => Err("associative list without keys has an element that's a map type".into()),
            Value::Array(_) => Err("not supported: associative list with lists as elements".into()),
            Value::Null => Err("associative list without keys has an element that's an explicit null".into()),
            scalar => Ok(format!("v:{scalar}")),
        },
    }
}

fn field(name: &str) -> Element {
    format!("f:{name}")
}

/// All paths of a value.
pub(super) fn to_set(value: &Value, at: At<'_>) -> Set {
    let mut set = Set::default();
    collect(value, at, &mut Vec::new(), &mut set);
    set
}

fn collect(value: &Value, at: At<'_>, path: &mut Vec<Element>, set: &mut Set) {
    match (at.shape(value), value) {
        (Shape::Map, Value::Object(map)) => {
            for (name, inner) in map {
                path.push(field(name));
                collect(inner, at.child(name), path, set);
                let empty = inner.is_null() || inner.as_object().is_some_and(Map::is_empty);
                if empty || !at.declares(name) {
                    set.insert(path);
                }
                path.pop();
            }
        }
        (Shape::List(list), Value::Array(items)) if *list != ListType::Atomic => {
            for item in items {
                let Ok(step) = element(at, list, item) else {
                    continue;
                };
                path.push(step);
                collect(item, at.item(), path, set);
                set.insert(path);
                path.pop();
            }
        }
        (Shape::Map, _) => {}
        (Shape::List(list), _) if *list != ListType::Atomic => {}
        _ => set.insert(path),
    }
}

/// What changed between two objects.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    pub(super) added: Set,
    pub(super) modified: Set,
    pub(super) removed: Set,
}

pub(super) fn compare(old: &Value, new: &Value, at: At<'_>) -> Comparison {
    let mut found = Comparison::default();
    compare_node(Some(old), Some(new), at, &mut Vec::new(), &mut found);
    found
}

fn compare_node(old: Option<&Value>, new: Option<&Value>, at: At<'_>, path: &mut Vec<Element>, found: &mut Comparison) {
    if old == new {
        return;
    }
    let shape_of = |value: Option<&Value>| value.map(|value| at.shape(value));
    let leaf = match (shape_of(old), shape_of(new)) {
        (Some(old_shape), Some(new_shape))
            if std::mem::discriminant(&old_shape) != std::mem::discriminant(&new_shape) =>
        {
            let was_leaf = compare_shape(old_shape, old, new, at, path, found);
            compare_shape(new_shape, old, new, at, path, found) || was_leaf
        }
        (_, Some(shape)) | (Some(shape), None) => compare_shape(shape, old, new, at, path, found),
        (None, None) => return,
    };
    if !leaf {
        if old.is_none() {
            found.added.insert(path);
        } else if new.is_none() {
            found.removed.insert(path);
        }
    }
}

/// Compares by one shape; says whether the node was a leaf.
fn compare_shape(
    shape: Shape<'_>,
    old: Option<&Value>,
    new: Option<&Value>,
    at: At<'_>,
    path: &mut Vec<Element>,
    found: &mut Comparison,
) -> bool {
    match shape {
        Shape::Map => {
            let (old_map, new_map) = (old.and_then(Value::as_object), new.and_then(Value::as_object));
            if old_map.is_none_or(Map::is_empty) && new_map.is_none_or(Map::is_empty) {
                return compare_leaf(old, new, path, found);
            }
            let names: BTreeSet<&String> = old_map.into_iter().chain(new_map).flat_map(Map::keys).collect();
            for name in names {
                path.push(field(name));
                let (old, new) = (old_map.and_then(|map| map.get(name)), new_map.and_then(|map| map.get(name)));
                compare_node(old, new, at.child(name), path, found);
                path.pop();
            }
            false
        }
        Shape::List(list) if *list != ListType::Atomic => {
            let items = |value: Option<&Value>| value.and_then(Value::as_array).map_or(0, Vec::len);
            if items(old) == 0 && items(new) == 0 {
                return compare_leaf(old, new, path, found);
            }
            compare_items(list, old, new, at, path, found);
            false
        }
        _ => compare_leaf(old, new, path, found),
    }
}

fn compare_leaf(old: Option<&Value>, new: Option<&Value>, path: &[Element], found: &mut Comparison) -> bool {
    match (old, new) {
        (None, _) => found.added.insert(path),
        (_, None) => found.removed.insert(path),
        (Some(old), Some(new)) if old != new => found.modified.insert(path),
        _ => {}
    }
    true
}

fn compare_items(
    list: &ListType,
    old: Option<&Value>,
    new: Option<&Value>,
    at: At<'_>,
    path: &mut Vec<Element>,
    found: &mut Comparison,
) {
    let mut groups: BTreeMap<Element, (Vec<&Value>, Vec<&Value>)> = BTreeMap::new();
    for item in old.and_then(Value::as_array).into_iter().flatten() {
        if let Ok(step) = element(at, list, item) {
            groups.entry(step).or_default().0.push(item);
        }
    }
    for item in new.and_then(Value::as_array).into_iter().flatten() {
        if let Ok(step) = element(at, list, item) {
            groups.entry(step).or_default().1.push(item);
        }
    }
    for (step, (old, new)) in groups {
        path.push(step);
        match (old.as_slice(), new.as_slice()) {
            ([] | [_], [] | [_]) => {
                compare_node(old.first().copied(), new.first().copied(), at.item(), path, found);
            }
            ([_, _, ..], [_, _, ..]) => {
                if old != new {
                    found.modified.insert(path);
                }
            }
            ([_, _, ..], rest) => {
                if let Some(only) = rest.first() {
                    compare_node(None, Some(only), at.item(), path, found);
                }
                found.removed.insert(path);
            }
            (rest, _) => {
                if let Some(only) = rest.first() {
                    compare_node(Some(only), None, at.item(), path, found);
                }
                found.added.insert(path);
            }
        }
        path.pop();
    }
}

/// The applied configuration laid over the live object.
pub(super) fn merge(live: &Value, applied: &Value, at: At<'_>) -> Value {
    merge_node(Some(live), Some(applied), at).unwrap_or(Value::Null)
}

fn merge_node(old: Option<&Value>, new: Option<&Value>, at: At<'_>) -> Option<Value> {
    let keep_new = || new.or(old).cloned();
    match at.shape(new.or(old)?) {
        Shape::Map => {
            let (old_map, new_map) = (old.and_then(Value::as_object), new.and_then(Value::as_object));
            if old_map.is_none_or(Map::is_empty) && new_map.is_none_or(Map::is_empty) {
                return keep_new();
            }
            let mut out = Map::new();
            for (name, old) in old_map.into_iter().flatten() {
                let new = new_map.and_then(|map| map.get(name));
                if let Some(value) = merge_node(Some(old), new, at.child(name)) {
                    out.insert(name.clone(), value);
                }
            }
            for (name, new) in new_map.into_iter().flatten() {
                if !old_map.is_some_and(|map| map.contains_key(name))
                    && let Some(value) = merge_node(None, Some(new), at.child(name))
                {
                    out.insert(name.clone(), value);
                }
            }
            (!out.is_empty()).then_some(Value::Object(out))
        }
        Shape::List(list) if *list != ListType::Atomic => {
            let empty = Vec::new();
            let old_items = old.and_then(Value::as_array).unwrap_or(&empty);
            let new_items = new.and_then(Value::as_array).unwrap_or(&empty);
            if old_items.is_empty() && new_items.is_empty() {
                return keep_new();
            }
            let out = merge_items(list, old_items, new_items, at);
            (!out.is_empty()).then_some(Value::Array(out))
        }
        _ => keep_new(),
    }
}

/// Items of both lists: those applied take the applied order, the others stay where they were among them.
fn merge_items(list: &ListType, old: &[Value], new: &[Value], at: At<'_>) -> Vec<Value> {
    let steps = |items: &[Value]| -> Vec<Element> {
        items.iter().map(|item| element(at, list, item).unwrap_or_else(|_| format!("v:{item}"))).collect()
    };
    let (old_steps, new_steps) = (steps(old), steps(new));
    // A step that repeats in the live list has no single value to merge with.
    let mut old_by: HashMap<&str, Option<&Value>> = HashMap::new();
    for (step, item) in old_steps.iter().zip(old) {
        old_by.entry(step).and_modify(|value| *value = None).or_insert(Some(item));
    }
    let new_by: HashMap<&str, &Value> = new_steps.iter().map(String::as_str).zip(new).collect();
    let mut shared = new_steps.iter().filter(|step| old_by.contains_key(step.as_str()));
    let mut next_shared = shared.next();
    let mut merged: BTreeSet<&str> = BTreeSet::new();
    let mut out = Vec::with_capacity(old.len().max(new.len()));
    let both = |step: &str| merge_node(old_by.get(step).copied().flatten(), new_by.get(step).copied(), at.item());
    let (mut l, mut r) = (0, 0);
    while l < old.len() || r < new.len() {
        if l < old.len() && r < new.len() {
            let step = &old_steps[l];
            if *step == new_steps[r] {
                merged.insert(step);
                out.extend(both(step));
                l += 1;
                r += 1;
                next_shared = shared.next();
                continue;
            }
            if new_by.contains_key(step.as_str()) && next_shared.is_some_and(|next| next != step) {
                l += 1;
                continue;
            }
        }
        if l < old.len() {
            let step = &old_steps[l];
            if !new_by.contains_key(step.as_str()) {
                out.extend(merge_node(Some(&old[l]), None, at.item()));
                l += 1;
                continue;
            }
            if merged.contains(step.as_str()) {
                l += 1;
            }
        }
        if r < new.len() {
            let step = &new_steps[r];
            merged.insert(step);
            out.extend(both(step));
            r += 1;
            if next_shared == Some(step) {
                next_shared = shared.next();
            }
        }
    }
    out
}

/// The value without the paths of `set`; `None` when nothing is left.
pub(super) fn remove(value: &Value, set: &Set, at: At<'_>) -> Option<Value> {
    match (at.shape(value), value) {
        (Shape::Map, Value::Object(map)) => {
            let mut out = Map::new();
            for (name, inner) in map {
                match set.0.get(&field(name)) {
                    Some(node) if node.member => {}
                    Some(node) if !node.children.is_empty() => {
                        if let Some(rest) = remove(inner, &node.children, at.child(name)) {
                            out.insert(name.clone(), rest);
                        }
                    }
                    _ => {
                        out.insert(name.clone(), inner.clone());
                    }
                }
            }
            (!out.is_empty()).then_some(Value::Object(out))
        }
        (Shape::List(list), Value::Array(items)) if *list != ListType::Atomic => {
            let mut out = Vec::with_capacity(items.len());
            for item in items {
                let node = element(at, list, item).ok().and_then(|step| set.0.get(&step));
                match node {
                    Some(node) if node.member => {}
                    Some(node) if !node.children.is_empty() => out.extend(remove(item, &node.children, at.item())),
                    _ => out.push(item.clone()),
                }
            }
            (!out.is_empty()).then_some(Value::Array(out))
        }
        (Shape::Leaf, value) if !value.is_object() && !value.is_array() => Some(value.clone()),
        _ => None,
    }
}

/// The set with every declared field that leads to a member made a member itself.
pub(super) fn with_named_parents(set: &Set, at: At<'_>) -> Set {
    let mut out = set.clone();
    for (step, node) in &mut out.0 {
        let child = match step.split_at_checked(2) {
            Some(("f:", name)) => {
                node.member |= !node.children.0.is_empty() && at.declares(name);
                at.child(name)
            }
            _ => at.item(),
        };
        node.children = with_named_parents(&node.children, child);
    }
    out
}

/// The paths of atomic lists, maps and structs in a value.
pub(super) fn atomics(value: &Value, at: At<'_>, path: &mut String, found: &mut Vec<String>) {
    let base = path.len();
    match (at.shape(value), value) {
        (Shape::Map, Value::Object(map)) => {
            for (name, inner) in map {
                path.push('.');
                path.push_str(name);
                atomics(inner, at.child(name), path, found);
                path.truncate(base);
            }
        }
        (Shape::List(list), Value::Array(items)) if *list != ListType::Atomic => {
            for item in items {
                path.push_str(&element(at, list, item).map(|step| super::set::printed(&step)).unwrap_or_default());
                atomics(item, at.item(), path, found);
                path.truncate(base);
            }
        }
        (_, Value::Object(_) | Value::Array(_)) => found.push(path.clone()),
        _ => {}
    }
}

/// Says what of an applied configuration does not fit the schema, in the words of a typed value's check.
pub(super) fn check(value: &Value, at: At<'_>) -> Result<(), String> {
    let mut errors = Vec::new();
    check_node(value, at, &mut String::new(), &mut errors);
    match errors.as_slice() {
        [] => Ok(()),
        [one] => Err(one.clone()),
        many => Err(format!("errors:\n  {}", many.join("\n  "))),
    }
}

fn check_node(value: &Value, at: At<'_>, path: &mut String, errors: &mut Vec<String>) {
    let Some(schema) = at.schema else { return };
    let base = path.len();
    let shown = |path: &str| if path.is_empty() { String::new() } else { format!("{path}: ") };
    if errors.len() >= MAX_ERRORS {
        return;
    }
    match (schema.kind, value) {
        (_, Value::Null) | (Kind::Any | Kind::Raw | Kind::FieldsV1 | Kind::Json, _) => {}
        (Kind::Object, Value::Object(map)) => {
            for (name, inner) in map {
                path.push('.');
                path.push_str(name);
                let envelope =
                    (base == 0 || schema.embedded) && matches!(name.as_str(), "apiVersion" | "kind" | "metadata");
                if schema.child(name).is_some() || schema.preserve_unknown || envelope {
                    check_node(inner, at.child(name), path, errors);
                } else {
                    errors.push(format!("{}field not declared in schema", shown(path)));
                }
                path.truncate(base);
            }
        }
        (Kind::List, Value::Array(items)) => {
            let mut seen = BTreeSet::new();
            for (index, item) in items.iter().enumerate() {
                let step = if schema.list == ListType::Atomic {
                    format!("i:{index}")
                } else {
                    match element(at, &schema.list, item) {
                        Ok(step) => step,
                        Err(error) => {
                            errors.push(format!("{}element {index}: {error}", shown(path)));
                            continue;
                        }
                    }
                };
                let printed = super::set::printed(&step);
                if !seen.insert(step) {
                    errors.push(format!("{}duplicate entries for key {printed}", shown(path)));
                    continue;
                }
                path.push_str(&printed);
                check_node(item, at.item(), path, errors);
                path.truncate(base);
            }
        }
        (Kind::Object, other) => errors.push(format!("{}expected map, got &{{{}}}", shown(path), gofmt::json(other))),
        (Kind::List, other) => errors.push(format!("{}expected list, got &{{{}}}", shown(path), gofmt::json(other))),
        (Kind::String, other) if !other.is_string() => {
            errors.push(format!(
                "{}expected string, got &value.valueUnstructured{{Value:{}}}",
                shown(path),
                gofmt::json(other)
            ));
        }
        _ => {}
    }
}
