//! DELETE of one object and of a collection.

use coracle_store::{Entry, Error, Precondition};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::answer::{self, Outgoing};
use super::call::Call;
use super::read::{self, Selection};
use super::write::{self, plugins};
use crate::context::{Context, Operation};
use crate::http::{ReqBody, Response, json_response};
use crate::kinds::OnDelete;
use crate::object;
use crate::status::Status;
use crate::wire;

/// Finalizer of dependents that are left alone.
const ORPHAN: &str = "orphan";
/// Finalizer of owners that wait for their dependents.
const FOREGROUND: &str = "foregroundDeletion";
/// Times that a deletion which names no version is tried on newer and newer versions.
const TRIES: usize = 20;

/// `metav1.DeleteOptions`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    pub(crate) grace: Option<i64>,
    pub(crate) propagation: Option<String>,
    pub(crate) orphan: Option<bool>,
    pub(crate) uid: Option<String>,
    pub(crate) revision: Option<String>,
    raw: Value,
}

impl Options {
    /// From the body when there is one, else from the query.
    async fn read(call: &mut Call, body: ReqBody) -> Result<Self, Status> {
        let bytes = body.read().await?;
        let raw = if bytes.is_empty() {
            let mut raw = json!({});
            if let Some(text) = call.query.get("gracePeriodSeconds") {
                let grace: i64 = text.parse().map_err(|_| {
                    Status::bad_request(format!("gracePeriodSeconds: Invalid value: {text:?}: must be an integer"))
                })?;
                raw["gracePeriodSeconds"] = grace.into();
            }
            if let Some(policy) = call.query.get("propagationPolicy") {
                raw["propagationPolicy"] = policy.into();
            }
            if call.query.has("orphanDependents") {
                raw["orphanDependents"] = call.query.flag("orphanDependents").into();
            }
            raw
        } else {
            let format = wire::format_of(&call.content_type)
                .ok_or_else(|| Status::unsupported_media_type(&crate::http::SERVED, &call.content_type))?;
            wire::parse(&bytes, format)
                .map_err(|error| Status::bad_request(format!("the delete options cannot be read: {error}")))?
                .value
        };
        Self::parse(call, raw)
    }

    pub(crate) fn parse(call: &mut Call, raw: Value) -> Result<Self, Status> {
        let text = |pointer: &str| raw.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
        let options = Self {
            grace: raw.get("gracePeriodSeconds").and_then(Value::as_i64),
            propagation: text("/propagationPolicy"),
            orphan: raw.get("orphanDependents").and_then(Value::as_bool),
            uid: text("/preconditions/uid"),
            revision: text("/preconditions/resourceVersion"),
            raw,
        };
        if let Some(values) = options.raw.get("dryRun").and_then(Value::as_array) {
            let values: Vec<String> = values.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect();
            call.set_dry_run(&values)?;
        }
        let invalid =
            |why: String| Status::new(422, "Invalid", format!("DeleteOptions.meta.k8s.io \"\" is invalid: {why}"));
        if options.propagation.is_some() && options.orphan.is_some() {
            return Err(invalid(
                "propagationPolicy: Invalid value: \"\": orphanDependents and deletionPropagation cannot be both set"
                    .into(),
            ));
        }
        if let Some(policy) = &options.propagation
            && !matches!(policy.as_str(), "Foreground" | "Background" | "Orphan")
        {
            return Err(invalid(format!(
                "propagationPolicy: Unsupported value: {policy:?}: supported values: \"Background\", \"Foreground\", \"Orphan\""
            )));
        }
        Ok(options)
    }
}

/// DELETE of the object of the path.
pub(super) async fn delete(call: &mut Call, body: ReqBody) -> Result<Response, Status> {
    let options = Options::read(call, body).await?;
    let key = call.key();
    let name = call.route.name.clone();
    match one(call, &key, &name, &options).await? {
        Outcome::Removed(object) if !returns_object(&call.kind) => {
            let mut status = json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
                "details": {"name": name, "kind": call.kind.resource, "uid": object::uid(&object)},
            });
            if !call.kind.group.is_empty() {
                status["details"]["group"] = call.kind.group.clone().into();
            }
            match call.media.format {
                crate::http::Format::Json => Ok(json_response(200, &status)),
                _ => answer::plain(call.media, 200, &status),
            }
        }
        Outcome::Removed(object) => answer::object(call, 200, Outgoing::Value(object)).await,
        Outcome::Marked(outgoing) => answer::object(call, 200, outgoing).await,
    }
}

/// Kinds whose deletion answers with the object in place of a `Status`.
fn returns_object(kind: &crate::kinds::Kind) -> bool {
    matches!(
        (kind.group.as_str(), kind.resource.as_str()),
        (
            "",
            "pods"
                | "services"
                | "serviceaccounts"
                | "persistentvolumes"
                | "persistentvolumeclaims"
                | "podtemplates"
                | "resourcequotas"
        ) | (
            "storage.k8s.io",
            "storageclasses" | "csidrivers" | "csinodes" | "volumeattachments" | "volumeattributesclasses"
        )
    )
}

/// What became of an object.
pub(super) enum Outcome {
    /// It is gone.
    Removed(Value),
    /// It waits for finalizers or its grace period.
    Marked(Outgoing),
}

/// Deletes one object.
pub(super) async fn one(call: &mut Call, key: &str, name: &str, options: &Options) -> Result<Outcome, Status> {
    for _ in 0..TRIES {
        let entry = call.api.store.get(key).await?;
        let entry = entry.ok_or_else(|| Status::not_found(&call.kind, name))?;
        if let Some(outcome) = attempt(call, key, name, options, entry).await? {
            return Ok(outcome);
        }
    }
    Err(Status::modified(&call.kind, name))
}

async fn attempt(
    call: &mut Call,
    key: &str,
    name: &str,
    options: &Options,
    entry: Entry,
) -> Result<Option<Outcome>, Status> {
    let kind = call.kind.clone();
    let old = call.decode(&entry.value).await?;
    preconditions(&kind, name, options, &old)?;
    let mut ctx = call.context(Operation::Delete, name);
    if kind.namespaced() {
        ctx.namespace = object::namespace(&old).to_owned();
    }
    for (member, value) in options.raw.as_object().into_iter().flatten() {
        ctx.options[member] = value.clone();
    }
    for plugin in plugins(&ctx) {
        plugin.admit(&ctx, &mut Value::Null, Some(&old)).await?;
    }
    for plugin in plugins(&ctx) {
        plugin.validate(&ctx, &Value::Null, Some(&old)).await?;
    }
    let mut new = old.clone();
    let waits = mark(&ctx, options, &mut new, &old);
    call.take_warnings(&ctx);
    if waits {
        if ctx.dry_run || new == old {
            return Ok(Some(Outcome::Marked(Outgoing::Value(new))));
        }
        let draft = write::draft(&kind, &new).await?;
        return match call.api.store.put(key, draft, Precondition::Revision(entry.revision)).await {
            Ok(entry) => Ok(Some(Outcome::Marked(Outgoing::Stored(entry.value)))),
            Err(Error::Conflict { .. }) => Ok(None),
            Err(other) => Err(write::store_error(other)),
        };
    }
    if ctx.dry_run {
        return Ok(Some(Outcome::Removed(new)));
    }
    match call.api.store.delete(key, Precondition::Revision(entry.revision)).await {
        Ok(_) => {
            kind.strategy.deleted(&ctx, &old).await;
            Ok(Some(Outcome::Removed(new)))
        }
        Err(Error::Conflict { .. }) => Ok(None),
        Err(other) => Err(write::store_error(other)),
    }
}

/// Whether an object is the one that is meant.
pub(crate) fn preconditions(
    kind: &crate::kinds::Kind,
    name: &str,
    options: &Options,
    old: &Value,
) -> Result<(), Status> {
    let checks = [
        ("UID", &options.uid, object::uid(old)),
        ("ResourceVersion", &options.revision, object::text(old, "/metadata/resourceVersion")),
    ];
    for (what, wanted, have) in checks {
        if let Some(wanted) = wanted
            && wanted != have
        {
            let why = format!(
                "the {what} in the precondition ({wanted}) does not match the {what} in record ({have}). The object might have been deleted and then recreated"
            );
            return Err(Status::conflict(kind, name, &why));
        }
    }
    Ok(())
}

/// Marks an object as being deleted; tells whether it has to wait.
fn mark(ctx: &Context, options: &Options, new: &mut Value, old: &Value) -> bool {
    let strategy = &ctx.kind.strategy;
    let finalizers = finalizers(ctx, options, old);
    let deleting = old.pointer("/metadata/deletionTimestamp").is_some_and(Value::is_string);
    let wanted = strategy.graceful(ctx, new, options.grace);
    let before = old.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64);
    let namespace_waits = ctx.kind.is("", "namespaces")
        && old.pointer("/spec/finalizers").and_then(Value::as_array).is_some_and(|list| !list.is_empty());
    // A second deletion may shorten the time, never lengthen it.
    let grace = match (wanted, before) {
        (Some(wanted), Some(before)) if deleting => Some(wanted.min(before)),
        (Some(wanted), _) => Some(wanted),
        (None, _) => None,
    };
    let waits = !finalizers.is_empty() || grace.is_some_and(|seconds| seconds > 0) || namespace_waits;
    if !waits {
        return false;
    }
    let metadata = object::metadata(new);
    let generation = metadata.get("generation").and_then(Value::as_i64);
    let seconds = grace.unwrap_or(0);
    let shortened = deleting && before.is_some_and(|before| seconds < before);
    if !deleting || shortened {
        let start = if shortened { deletion_began(old, before.unwrap_or(0), ctx.now) } else { ctx.now };
        let end = start.checked_add(SignedDuration::from_secs(seconds)).unwrap_or(start);
        metadata.insert("deletionTimestamp".into(), crate::time::seconds(end).into());
        metadata.insert("deletionGracePeriodSeconds".into(), seconds.into());
    }
    if !deleting && let Some(generation) = generation {
        metadata.insert("generation".into(), (generation + 1).into());
    }
    if finalizers.is_empty() {
        metadata.remove("finalizers");
    } else {
        metadata.insert("finalizers".into(), json!(finalizers));
    }
    if ctx.kind.is("", "namespaces") {
        object::members(object::members(new).entry("status").or_insert_with(|| json!({})))
            .insert("phase".into(), "Terminating".into());
    }
    true
}

/// When the grace period began.
fn deletion_began(old: &Value, grace: i64, now: Timestamp) -> Timestamp {
    let end: Option<Timestamp> = object::text(old, "/metadata/deletionTimestamp").parse().ok();
    end.and_then(|end| end.checked_sub(SignedDuration::from_secs(grace)).ok()).unwrap_or(now)
}

/// Finalizers after the propagation policy has been put in.
fn finalizers(ctx: &Context, options: &Options, old: &Value) -> Vec<String> {
    let mut finalizers: Vec<String> = old
        .pointer("/metadata/finalizers")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|v| v.as_str().map(str::to_owned))
        .collect();
    let had = |name: &str| finalizers.iter().any(|f| f == name);
    let (orphan, foreground) = match (options.orphan, options.propagation.as_deref()) {
        (Some(orphan), _) => (orphan, false),
        (None, Some(policy)) => (policy == "Orphan", policy == "Foreground"),
        // What the object carries already stays; else the kind decides.
        (None, None) if had(ORPHAN) || had(FOREGROUND) => (had(ORPHAN), had(FOREGROUND)),
        (None, None) => (ctx.kind.strategy.on_delete() == OnDelete::Orphan, false),
    };
    finalizers.retain(|name| name != ORPHAN && name != FOREGROUND);
    if orphan {
        finalizers.push(ORPHAN.into());
    }
    if foreground {
        finalizers.push(FOREGROUND.into());
    }
    finalizers
}

/// DELETE of a collection.
pub(super) async fn collection(call: &mut Call, body: ReqBody) -> Result<Response, Status> {
    let options = Options::read(call, body).await?;
    let selection = Selection::parse(call)?;
    let page = read::page(call, &selection).await?;
    let mut items = Vec::with_capacity(page.entries.len());
    for entry in page.entries {
        let object = read::decode_entry(call, &entry).await?;
        let name = object::name(&object).to_owned();
        match one(call, &entry.key, &name, &options).await {
            Ok(_) => items.push(object),
            Err(status) if status.code == 404 => {}
            Err(status) => return Err(status),
        }
    }
    let list = json!({
        "kind": call.kind.list_kind, "apiVersion": call.kind.api_version(),
        "metadata": {"resourceVersion": page.revision.to_string()}, "items": items,
    });
    answer::plain(call.media, 200, &list)
}
