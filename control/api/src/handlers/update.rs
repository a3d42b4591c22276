//! PUT, and the loop that every change of a stored object goes through.

use coracle_schema::FieldError;
use coracle_store::{Entry, Error, Precondition};
use serde_json::Value;

use super::answer::{self, Outgoing};
use super::call::Call;
use super::managed;
use super::write::{self, plugins};
use crate::context::{Context, Operation};
use crate::http::{ReqBody, Response};
use crate::object;
use crate::status::Status;

/// Times that a change which names no version is tried on newer and newer versions.
const TRIES: usize = 20;

/// Makes the new object out of the stored one (`None` when there is none, in the version of the request).
pub(super) type Change<'a> = dyn FnMut(&mut Call, Option<&Value>) -> Result<Changed, Status> + Send + 'a;

/// What a [`Change`] made.
pub(super) struct Changed {
    pub(super) object: Value,
    /// Whether managed fields are done already (server-side apply).
    pub(super) applied: bool,
}

impl Changed {
    pub(super) fn new(object: Value) -> Self {
        Self { object, applied: false }
    }
}

/// PUT on an object or on a subresource that writes the object.
pub(super) async fn replace(call: &mut Call, body: ReqBody) -> Result<Response, Status> {
    let kind = call.kind.clone();
    let mut object = call.read_object(body, &kind).await?;
    write::type_matches(&kind, &object)?;
    write::namespace_matches(call, &mut object)?;
    let name = object::name(&object);
    if name.is_empty() {
        return Err(Status::bad_request(
            "the name of the object (based on URL) was unable to be determined: name must be provided",
        ));
    }
    if name != call.route.name {
        let message =
            format!("the name of the object ({name}) does not match the name on the URL ({})", call.route.name);
        return Err(Status::bad_request(message));
    }
    let strategy = kind.strategy.clone();
    let (code, outgoing) = change(call, &mut |call, old| {
        if old.is_none() && (!strategy.creates_on_update() || !call.route.subresource.is_empty()) {
            return Err(Status::not_found(&call.kind, &call.route.name));
        }
        if object::text(&object, "/metadata/resourceVersion").is_empty() && !strategy.updates_unconditionally() {
            let error = FieldError::invalid("metadata.resourceVersion", 0, "must be specified for an update");
            return Err(Status::invalid(&call.kind, &call.route.name, &[error]));
        }
        Ok(Changed::new(object.clone()))
    })
    .await?;
    answer::object(call, code, outgoing).await
}

/// Reads, changes, admits, validates and writes the object of the path; again when somebody else was faster.
/// Returns the HTTP status and the object.
pub(super) async fn change(call: &mut Call, make: &mut Change<'_>) -> Result<(u16, Outgoing), Status> {
    let key = call.key();
    for _ in 0..TRIES {
        let Some(entry) = call.api.store.get(&key).await? else {
            let made = make(call, None)?;
            let mut object = made.object;
            if !object::text(&object, "/metadata/uid").is_empty()
                || !object::text(&object, "/metadata/resourceVersion").is_empty()
            {
                return Err(Status::not_found(&call.kind, &call.route.name));
            }
            write::namespace_matches(call, &mut object)?;
            return match write::store_new(call, object, made.applied.then_some(())).await {
                Err(status) if status.reason == "AlreadyExists" => continue,
                created => Ok((201, created?)),
            };
        };
        match attempt(call, make, entry, &key).await? {
            Some(outgoing) => return Ok((200, outgoing)),
            None => continue,
        }
    }
    Err(Status::modified(&call.kind, &call.route.name))
}

/// One attempt; `None` when the object changed meanwhile and the change may be made again.
async fn attempt(call: &mut Call, make: &mut Change<'_>, entry: Entry, key: &str) -> Result<Option<Outgoing>, Status> {
    let kind = call.kind.clone();
    let old = call.decode(&entry.value).await?;
    let made = make(call, Some(&old))?;
    let mut new = made.object;
    let asked = object::text(&new, "/metadata/resourceVersion");
    let current = entry.revision.to_string();
    if !asked.is_empty() && asked != "0" && asked != current {
        return Err(Status::modified(&kind, &call.route.name));
    }
    // A patch that starts from the stored object carries its version without having asked for it.
    let conditional = !asked.is_empty() && call.route.verb == crate::http::Verb::Update;
    carry_system_fields(call, &mut new, &old)?;
    write::defaults(&kind, &mut new);
    let ctx = call.context(Operation::Update, &call.route.name);
    for plugin in plugins(&ctx) {
        plugin.admit(&ctx, &mut new, Some(&old)).await?;
    }
    let finish = kind.strategy.begin(&ctx, &mut new, Some(&old)).await?;
    let result = commit(&ctx, &mut new, &old, &entry, key, made.applied).await;
    if let Some(finish) = finish {
        finish.done(matches!(result, Ok(Committed::Written(_))) && !ctx.dry_run).await;
    }
    call.take_warnings(&ctx);
    match result? {
        Committed::Written(entry) => Ok(Some(Outgoing::Stored(entry.value))),
        Committed::Unchanged => Ok(Some(Outgoing::Stored(entry.value))),
        Committed::Dry => Ok(Some(Outgoing::Value(new))),
        Committed::Gone => Ok(Some(Outgoing::Value(new))),
        Committed::Raced if conditional => Err(Status::modified(&kind, &call.route.name)),
        Committed::Raced => Ok(None),
    }
}

enum Committed {
    Written(Entry),
    Unchanged,
    Dry,
    /// The last finalizer went, and the object with it.
    Gone,
    Raced,
}

async fn commit(
    ctx: &Context,
    new: &mut Value,
    old: &Value,
    entry: &Entry,
    key: &str,
    applied: bool,
) -> Result<Committed, Status> {
    let kind = &ctx.kind;
    let strategy = &kind.strategy;
    if ctx.subresource.is_empty() {
        strategy.prepare_update(ctx, new, old);
    } else {
        strategy.prepare_subresource(ctx, new, old);
    }
    generation(ctx, new, old);
    if !applied {
        managed::track(ctx, Some(old), new)?;
    }
    let mut errors = if ctx.subresource.is_empty() {
        strategy.validate_update(ctx, new, old)
    } else {
        strategy.validate_subresource(ctx, new, old)
    };
    errors.extend(crate::crd::validate(kind, new, Some(old)));
    if !errors.is_empty() {
        return Err(Status::invalid(kind, &ctx.name, &errors));
    }
    for sentence in strategy.warnings(ctx, new, Some(old)) {
        ctx.warn(sentence);
    }
    strategy.canonicalize(new);
    write::tidy_metadata(object::metadata(new));
    crate::wire::fill(kind, new);
    for plugin in plugins(ctx) {
        plugin.validate(ctx, new, Some(old)).await?;
    }
    object::metadata(new).insert("resourceVersion".into(), entry.revision.to_string().into());
    if managed::same(new, old) {
        return Ok(Committed::Unchanged);
    }
    if ctx.dry_run {
        return Ok(Committed::Dry);
    }
    if may_go(new) {
        return match ctx.api.store.delete(key, Precondition::Revision(entry.revision)).await {
            Ok(deleted) => {
                object::metadata(new).insert("resourceVersion".into(), deleted.revision.to_string().into());
                strategy.deleted(ctx, new).await;
                Ok(Committed::Gone)
            }
            Err(Error::Conflict { .. }) => Ok(Committed::Raced),
            Err(other) => Err(write::store_error(other)),
        };
    }
    let draft = write::draft(kind, new).await?;
    match ctx.api.store.put(key, draft, Precondition::Revision(entry.revision)).await {
        Ok(entry) => Ok(Committed::Written(entry)),
        Err(Error::Conflict { .. }) => Ok(Committed::Raced),
        Err(other) => Err(write::store_error(other)),
    }
}

/// An object that is being deleted goes when its last finalizer goes and nothing waits for its grace period.
pub(super) fn may_go(object: &Value) -> bool {
    let none = |pointer| object.pointer(pointer).and_then(Value::as_array).is_none_or(Vec::is_empty);
    let deleting = object.pointer("/metadata/deletionTimestamp").is_some_and(Value::is_string);
    let grace = object.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(0);
    let namespace = object::text(object, "/kind") == "Namespace" && !none("/spec/finalizers");
    deleting && none("/metadata/finalizers") && grace == 0 && !namespace
}

/// What a client may not change, or may leave out.
fn carry_system_fields(call: &Call, new: &mut Value, old: &Value) -> Result<(), Status> {
    let old_metadata = &old["metadata"];
    let metadata = object::metadata(new);
    let given = metadata.get("uid").and_then(Value::as_str).unwrap_or_default();
    let uid = old_metadata["uid"].as_str().unwrap_or_default();
    if !given.is_empty() && given != uid {
        let why = format!("Precondition failed: UID in precondition: {given}, UID in object meta: {uid}");
        return Err(Status::conflict(&call.kind, &call.route.name, &why));
    }
    for member in ["name", "uid", "creationTimestamp", "generation"] {
        match old_metadata.get(member) {
            Some(value) => metadata.insert(member.into(), value.clone()),
            None => metadata.remove(member),
        };
    }
    for member in ["deletionTimestamp", "deletionGracePeriodSeconds"] {
        if metadata.get(member).is_none_or(Value::is_null) {
            match old_metadata.get(member) {
                Some(value) => metadata.insert(member.into(), value.clone()),
                None => metadata.remove(member),
            };
        }
    }
    metadata.remove("selfLink");
    Ok(())
}

fn generation(ctx: &Context, new: &mut Value, old: &Value) {
    let strategy = &ctx.kind.strategy;
    let before = old.pointer("/metadata/generation").and_then(Value::as_i64);
    if !strategy.has_generation() {
        return;
    }
    let changed = ctx.subresource != "status" && strategy.spec_changed(new, old);
    let generation = before.unwrap_or(i64::from(!changed)) + i64::from(changed);
    object::metadata(new).insert("generation".into(), generation.into());
}
