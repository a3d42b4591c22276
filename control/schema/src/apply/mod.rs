//! Server-side apply and field ownership.
//!
//! [`apply`] merges a configuration into the live object, takes ownership of its fields, removes what the manager applied before
//! and no longer does, and reports conflicts. [`track_update`] keeps `metadata.managedFields` on every other write. Source: KEP-555
//! and the structured merge and diff rules of list maps, sets, atomic and granular types.

mod managers;
mod set;
mod typed;

use std::sync::Arc;

use serde_json::{Map, Value};

use managers::Entry;
pub use managers::MAX_UPDATE_MANAGERS;
pub use set::Set;
use typed::At;

use crate::decode::typed as typed_values;
use crate::schema::Schema;

/// Paths that nobody owns.
const STRIPPED: &[&[&str]] = &[
    &["apiVersion"],
    &["kind"],
    &["metadata"],
    &["metadata", "name"],
    &["metadata", "namespace"],
    &["metadata", "creationTimestamp"],
    &["metadata", "selfLink"],
    &["metadata", "uid"],
    &["metadata", "clusterName"],
    &["metadata", "generation"],
    &["metadata", "managedFields"],
    &["metadata", "resourceVersion"],
];

/// Manager of what an object held before it was first applied to.
const BEFORE_FIRST_APPLY: &str = "before-first-apply";
/// Where client-side apply keeps its last configuration.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// An object in another version of its kind, with that version's schema; `None` if the version is not served any more.
pub type Convert<'a> = &'a dyn Fn(&Value, &str) -> Option<(Value, Arc<Schema>)>;

/// What a write is about.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    pub schema: &'a Schema,
    /// The version of the request and of the objects given, `apps/v1`.
    pub api_version: &'a str,
    /// `""`, `status`, `scale` …
    pub subresource: &'a str,
    pub manager: &'a str,
    /// The time of the write, RFC 3339 in seconds.
    pub now: &'a str,
    /// Paths that this endpoint does not change (`[["status"]]` of a main resource with a status subresource).
    pub reset: &'a [&'a [&'a str]],
    /// For kinds with several versions; without it what others own in other versions is judged as if it were in this one.
    pub convert: Option<Convert<'a>>,
}

/// One field that somebody else owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// As the server names a manager: `"kubectl" using apps/v1`.
    pub manager: String,
    /// `.spec.replicas`
    pub path: String,
}

/// Why a configuration was not applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// `409 Conflict`; each conflict is a cause (`FieldManagerConflict`, `conflict with …`, the path).
    #[error("{}", conflict_message(.0))]
    Conflicts(Vec<Conflict>),
    /// `400 BadRequest`
    #[error("{0}")]
    BadRequest(String),
    /// The configuration does not fit the schema; the text follows
    /// `failed to create typed patch object (<namespace>/<name>; <group/version, Kind=kind>): `.
    #[error("{0}")]
    Typed(String),
}

fn conflict_message(conflicts: &[Conflict]) -> String {
    if let [one] = conflicts {
        return format!("Apply failed with 1 conflict: conflict with {}: {}", one.manager, one.path);
    }
    let mut text = format!("Apply failed with {} conflicts: ", conflicts.len());
    let mut lines = Vec::new();
    let mut last = "";
    for conflict in conflicts {
        if conflict.manager != last {
            lines.push(format!("conflicts with {}:", conflict.manager));
            last = &conflict.manager;
        }
        lines.push(format!("- {}", conflict.path));
    }
    text.push_str(&lines.join("\n"));
    text
}

/// The outcome of an apply.
#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    pub value: Value,
    /// Whether anything but managed fields changed.
    pub changed: bool,
}

/// Checks that a configuration, as it was sent, fits the schema: fields, shapes, list keys. To be asked before anything is dropped
/// from it; [`apply`] asks again.
pub fn check(config: &Value, schema: &Schema) -> Result<(), ApplyError> {
    typed::check(config, At::new(schema)).map_err(ApplyError::Typed)
}

/// Applies `config` to `live` (`{}` or an object without a UID when it is to be created).
pub fn apply(live: &Value, config: &Value, force: bool, request: &Request<'_>) -> Result<Applied, ApplyError> {
    if config.pointer("/metadata/managedFields").is_some_and(|fields| !fields.is_null()) {
        return Err(ApplyError::BadRequest("metadata.managedFields must be nil".into()));
    }
    let at = At::new(request.schema);
    typed::check(config, at).map_err(ApplyError::Typed)?;
    let mut owners = managers::read(live.pointer("/metadata/managedFields").unwrap_or(&Value::Null))
        .map_err(|error| ApplyError::Typed(format!("failed to decode managed fields: {error}")))?;
    let live = without_managed_fields(live);
    if owners.is_empty() {
        let before = Request { manager: BEFORE_FIRST_APPLY, ..*request };
        own_update(&unborn(request.schema), &live, &mut owners, &before);
    }
    let (mut value, mut owners, changed) = match try_apply(&live, config, owners.clone(), force, request) {
        Err(ApplyError::Conflicts(conflicts))
            if request.manager == "kubectl" && taken_over(&live, &conflicts, request) =>
        {
            try_apply(&live, config, owners, true, request)?
        }
        other => other?,
    };
    if request.manager == "kubectl" {
        refresh_last_applied(&mut value, config);
    }
    let changed = changed || value != *live;
    if changed {
        let own = entry(request, true, Set::default());
        if let Some(owner) = owners.iter_mut().find(|owner| owner.same(&own)) {
            owner.time = Some(request.now.to_owned());
        }
    }
    set_managed_fields(&mut value, owners);
    Ok(Applied { value, changed })
}

/// Lays an apply configuration of a mutating admission policy over `object`, without ownership: maps and keyed lists merge.
/// Atomic lists, maps and structs may not be part of it.
pub fn overlay(object: &Value, config: &Value, schema: &Schema) -> Result<Value, ApplyError> {
    let at = At::new(schema);
    typed::check(config, at).map_err(ApplyError::Typed)?;
    let mut found = Vec::new();
    typed::atomics(config, at, &mut String::new(), &mut found);
    if !found.is_empty() {
        let text =
            format!("invalid ApplyConfiguration: may not mutate atomic arrays, maps or structs: {}", found.join(", "));
        return Err(ApplyError::BadRequest(text));
    }
    Ok(typed::merge(object, config, at))
}

type Outcome = (Value, Vec<Entry>, bool);

fn try_apply(
    live: &Value,
    config: &Value,
    mut owners: Vec<Entry>,
    force: bool,
    request: &Request<'_>,
) -> Result<Outcome, ApplyError> {
    let at = At::new(request.schema);
    let mut own = entry(request, true, typed::to_set(config, at).minus_deep(&reset_set(request.reset)));
    let last = owners.iter().position(|owner| owner.same(&own)).map(|at| owners.remove(at));
    own.time = last.as_ref().and_then(|last| last.time.clone());
    owners.push(own.clone());
    let merged = typed::merge(live, config, at);
    let pruned = match &last {
        Some(last) if !last.set.is_empty() => prune(&merged, &owners, last, request),
        _ => merged,
    };
    transfer(live, &pruned, &mut owners, Some(&own), force, request)?;
    strip(&mut owners, &own);
    let changed = pruned != *live;
    Ok((pruned, owners, changed))
}

/// Removes what the manager applied last time, no longer applies, and nobody else owns.
fn prune(merged: &Value, owners: &[Entry], last: &Entry, request: &Request<'_>) -> Value {
    let Some((merged, schema)) = at_version(merged, &last.api_version, request) else {
        return merged.clone();
    };
    let at = At::new(schema.as_deref().unwrap_or(request.schema));
    let named = |set: &Set| typed::with_named_parents(set, at);
    let empty = || Value::Object(Map::new());
    let removed = typed::remove(&merged, &named(&last.set), at).unwrap_or_else(empty);
    // What other owners (and the new configuration) hold comes back.
    let owned = owners
        .iter()
        .filter(|owner| owner.api_version == last.api_version || request.convert.is_none())
        .fold(Set::default(), |all, owner| all.union(&owner.set));
    let merged_set = typed::to_set(&merged, at);
    let kept = named(&typed::to_set(&removed, at)).union(&named(&owned));
    let pruned = typed::remove(&merged, &named(&merged_set).minus(&kept), at).unwrap_or_else(empty);
    // Only what this manager owned may go.
    let gone = named(&merged_set).minus(&named(&typed::to_set(&pruned, at))).intersection(&named(&last.set));
    let pruned = typed::remove(&merged, &gone, at).unwrap_or_else(empty);
    let back =
        schema.is_some().then(|| request.convert.and_then(|convert| convert(&pruned, request.api_version))).flatten();
    back.map_or(pruned, |(value, _)| value)
}

type Versioned<'a> = (std::borrow::Cow<'a, Value>, Option<Arc<Schema>>);

/// The object in a version, with the schema if it is not the request's own.
fn at_version<'a>(value: &'a Value, version: &str, request: &Request<'_>) -> Option<Versioned<'a>> {
    match request.convert {
        Some(convert) if version != request.api_version => {
            convert(value, version).map(|(value, schema)| (std::borrow::Cow::Owned(value), Some(schema)))
        }
        _ => Some((std::borrow::Cow::Borrowed(value), None)),
    }
}

/// Takes changed fields away from everybody but `own`; without `force` that is a conflict. Forgets removed fields.
fn transfer(
    old: &Value,
    new: &Value,
    owners: &mut Vec<Entry>,
    own: Option<&Entry>,
    force: bool,
    request: &Request<'_>,
) -> Result<typed::Comparison, ApplyError> {
    let reset = reset_set(request.reset);
    let compare = |old: &Value, new: &Value, at: At<'_>| {
        let mut found = typed::compare(old, new, at);
        if !request.reset.is_empty() {
            found.added = std::mem::take(&mut found.added).minus_deep(&reset);
            found.modified = std::mem::take(&mut found.modified).minus_deep(&reset);
            found.removed = std::mem::take(&mut found.removed).minus_deep(&reset);
        }
        found
    };
    let found = compare(old, new, At::new(request.schema));
    let mut conflicts = Vec::new();
    let mut kept = Vec::with_capacity(owners.len());
    for owner in owners.drain(..) {
        if own.is_some_and(|own| own.same(&owner)) {
            kept.push(owner);
            continue;
        }
        let other_version;
        let found = if owner.api_version == request.api_version || request.convert.is_none() {
            &found
        } else {
            // An owner in a version that is gone is forgotten.
            let (Some(old), Some(new)) =
                (at_version(old, &owner.api_version, request), at_version(new, &owner.api_version, request))
            else {
                continue;
            };
            let schema = new.1.as_deref().unwrap_or(request.schema);
            other_version = compare(&old.0, &new.0, At::new(schema));
            &other_version
        };
        let contested = owner.set.intersection(&found.modified.clone().union(&found.added));
        conflicts.extend(contested.paths().into_iter().map(|path| Conflict { manager: owner.printed(), path }));
        let set = owner.set.clone().minus(&contested).minus(&found.removed);
        if !set.is_empty() {
            kept.push(Entry { set, ..owner });
        }
    }
    if !force && !conflicts.is_empty() {
        conflicts.sort_by(|a, b| a.manager.cmp(&b.manager));
        return Err(ApplyError::Conflicts(conflicts));
    }
    kept.retain(|owner| !owner.set.is_empty());
    *owners = kept;
    Ok(found)
}

/// Keeps `new.metadata.managedFields` right on a create (`live` is `None`), update or patch.
pub fn track_update(live: Option<&Value>, new: &mut Value, request: &Request<'_>) {
    let live_fields = live.and_then(|live| live.pointer("/metadata/managedFields"));
    let given = take_managed_fields(new);
    let mut owners = Vec::new();
    let reset = given
        .as_ref()
        .and_then(Value::as_array)
        .is_some_and(|list| list.is_empty() || matches!(list.as_slice(), [Value::Object(only)] if only.is_empty()));
    if !reset || !request.subresource.is_empty() {
        let given = if request.subresource.is_empty() {
            given.as_ref().and_then(|given| managers::read(given).ok())
        } else {
            None
        };
        owners = given
            .filter(|entries| !entries.is_empty())
            .unwrap_or_else(|| live_fields.and_then(|fields| managers::read(fields).ok()).unwrap_or_default());
    }
    let live_value = live.map_or_else(|| std::borrow::Cow::Owned(unborn(request.schema)), without_managed_fields);
    // An object that nobody has been tracked on stays so.
    if owners.is_empty() && live_value.pointer("/metadata/uid").is_some() {
        return;
    }
    own_update(&live_value, new, &mut owners, request);
    // Nothing but times of owners changed: keep what was, so that the write is none.
    if let (Some(fields), true) = (live_fields, *live_value == *new) {
        let times_aside = |entries: &[Entry]| -> Vec<Entry> {
            let mut entries: Vec<Entry> = entries.iter().cloned().map(|entry| Entry { time: None, ..entry }).collect();
            entries.sort_by(|a, b| {
                (&a.manager, a.applied, &a.api_version, &a.subresource).cmp(&(
                    &b.manager,
                    b.applied,
                    &b.api_version,
                    &b.subresource,
                ))
            });
            entries
        };
        if managers::read(fields).is_ok_and(|old| times_aside(&old) == times_aside(&owners)) {
            put_managed_fields(new, fields.clone());
            return;
        }
    }
    set_managed_fields(new, owners);
}

/// What an object is before it is created: of a built-in kind all that the type always writes, so that nobody comes to own
/// `spec` by creating an object that has one.
fn unborn(schema: &Schema) -> Value {
    let mut empty = Value::Object(Map::new());
    if !schema.name.is_empty() {
        typed_values::fill(&mut empty, schema);
    }
    empty
}

/// Gives what changed between `live` and `new` to the request's manager.
fn own_update(live: &Value, new: &Value, owners: &mut Vec<Entry>, request: &Request<'_>) {
    let Ok(found) = transfer(live, new, owners, None, true, request) else {
        return;
    };
    let set = found.modified.union(&found.added).minus_deep(&reset_set(request.reset)).minus(&strip_set());
    let own = entry(request, false, set);
    if !own.set.is_empty() {
        match owners.iter_mut().find(|owner| owner.same(&own)) {
            Some(owner) => {
                owner.set = std::mem::take(&mut owner.set).union(&own.set);
                owner.time = own.time;
            }
            None => owners.push(own),
        }
    }
    managers::cap(owners);
}

fn entry(request: &Request<'_>, applied: bool, set: Set) -> Entry {
    Entry {
        manager: if request.manager.is_empty() { "unknown" } else { request.manager }.to_owned(),
        applied,
        api_version: request.api_version.to_owned(),
        subresource: request.subresource.to_owned(),
        time: Some(request.now.to_owned()),
        set,
    }
}

fn strip(owners: &mut Vec<Entry>, own: &Entry) {
    for owner in owners.iter_mut().filter(|owner| owner.same(own)) {
        owner.set = std::mem::take(&mut owner.set).minus(&strip_set());
    }
    owners.retain(|owner| !owner.set.is_empty());
}

fn strip_set() -> Set {
    reset_set(STRIPPED)
}

fn reset_set(paths: &[&[&str]]) -> Set {
    let mut set = Set::default();
    for path in paths {
        let path: Vec<String> = path.iter().map(|name| format!("f:{name}")).collect();
        set.insert(&path);
    }
    set
}

fn without_managed_fields(value: &Value) -> std::borrow::Cow<'_, Value> {
    if value.pointer("/metadata/managedFields").is_none() {
        return std::borrow::Cow::Borrowed(value);
    }
    let mut value = value.clone();
    take_managed_fields(&mut value);
    std::borrow::Cow::Owned(value)
}

fn take_managed_fields(value: &mut Value) -> Option<Value> {
    value.get_mut("metadata").and_then(Value::as_object_mut).and_then(|metadata| metadata.remove("managedFields"))
}

fn set_managed_fields(value: &mut Value, owners: Vec<Entry>) {
    if let Some(fields) = managers::write(owners) {
        put_managed_fields(value, fields);
    }
}

fn put_managed_fields(value: &mut Value, fields: Value) {
    let Value::Object(map) = value else { return };
    let metadata = map.entry("metadata").or_insert_with(|| Value::Object(Map::new()));
    if let Value::Object(metadata) = metadata {
        metadata.insert("managedFields".into(), fields);
    }
}

/// Whether all conflicts are over fields that client-side apply set last and nobody changed since.
fn taken_over(live: &Value, conflicts: &[Conflict], request: &Request<'_>) -> bool {
    let Some(last) = last_applied(live).and_then(|text| serde_json::from_str::<Value>(text).ok()) else {
        return false;
    };
    if last.get("apiVersion").and_then(Value::as_str) != Some(request.api_version) {
        return false;
    }
    let at = At::new(request.schema);
    let found = typed::compare(&last, live, at);
    let allowed = typed::to_set(&last, at).minus(&found.modified).minus(&found.added).minus(&found.removed).paths();
    conflicts.iter().all(|conflict| allowed.contains(&conflict.path))
}

fn last_applied(value: &Value) -> Option<&str> {
    value.get("metadata")?.get("annotations")?.get(LAST_APPLIED)?.as_str().filter(|text| !text.is_empty())
}

/// Keeps client-side apply's annotation right when its user has turned to server-side apply.
fn refresh_last_applied(value: &mut Value, config: &Value) {
    if last_applied(value).is_none() {
        return;
    }
    let mut config = config.clone();
    let annotations = config.get_mut("metadata").and_then(|metadata| metadata.get_mut("annotations"));
    if let Some(annotations) = annotations.and_then(Value::as_object_mut) {
        annotations.remove(LAST_APPLIED);
    }
    let text = Value::String(format!("{config}\n"));
    let annotations = value.get_mut("metadata").and_then(|metadata| metadata.get_mut("annotations"));
    if let Some(annotations) = annotations.and_then(Value::as_object_mut) {
        annotations.insert(LAST_APPLIED.into(), text);
    }
}

#[cfg(test)]
mod tests;
