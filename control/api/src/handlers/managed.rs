//! `metadata.managedFields`, server-side apply, and the question whether a write changes anything.

use coracle_schema::apply::{self as engine, ApplyError};
use serde_json::{Value, json};

use super::Call;
use crate::context::Context;
use crate::status::{Cause, Details, Status};

/// Writes down who owns which fields after a create or update that is not an apply.
pub(super) fn track(ctx: &Context, old: Option<&Value>, new: &mut Value) -> Result<(), Status> {
    let api_version = ctx.kind.api_version();
    let request = engine::Request {
        schema: ctx.kind.schema(),
        api_version: &api_version,
        subresource: &ctx.subresource,
        manager: &ctx.field_manager,
        now: &ctx.now_text(),
        reset: reset(&ctx.kind, &ctx.subresource),
        convert: None,
    };
    engine::track_update(old, new, &request);
    Ok(())
}

/// Server-side apply: the live object (`None` when there is none yet) with what the manager applies.
pub(super) fn apply(call: &mut Call, applied: &Value, old: Option<&Value>) -> Result<Value, Status> {
    let kind = call.kind.clone();
    let mut config = applied.clone();
    super::write::type_matches(&kind, &config)?;
    let name = crate::object::name(&config);
    if name.is_empty() {
        crate::object::metadata(&mut config).insert("name".into(), call.route.name.clone().into());
    } else if name != call.route.name {
        let message =
            format!("the name of the object ({name}) does not match the name on the URL ({})", call.route.name);
        return Err(Status::bad_request(message));
    }
    super::write::namespace_matches(call, &mut config)?;
    engine::check(&config, kind.schema()).map_err(|error| untyped(&config, &kind, &error))?;
    // Values of the wrong type are refused; what is applied and owned is the configuration as it was sent.
    crate::wire::conform(&mut config.clone(), &kind)?;
    if old.is_none() && !call.route.subresource.is_empty() {
        return Err(Status::not_found(&kind, &call.route.name));
    }
    let api_version = kind.api_version();
    let request = engine::Request {
        schema: kind.schema(),
        api_version: &api_version,
        subresource: &call.route.subresource,
        manager: &call.field_manager,
        now: &crate::time::seconds(call.now),
        reset: reset(&kind, &call.route.subresource),
        convert: None,
    };
    let none = json!({});
    let applied = engine::apply(old.unwrap_or(&none), &config, call.query.flag("force"), &request).map_err(refused)?;
    let mut object = applied.value;
    crate::wire::conform(&mut object, &kind)?;
    if old.is_none() {
        object["apiVersion"] = api_version.into();
        object["kind"] = kind.kind.clone().into();
    }
    Ok(object)
}

/// A configuration that does not fit its kind's schema.
fn untyped(config: &Value, kind: &crate::kinds::Kind, error: &ApplyError) -> Status {
    let (namespace, name) = (crate::object::namespace(config), crate::object::name(config));
    let place = if namespace.is_empty() { format!("/{name}") } else { format!("{namespace}/{name}") };
    let message = format!(
        "failed to create typed patch object ({place}; {}/{}, Kind={}): {error}",
        kind.group, kind.version, kind.kind
    );
    Status::new(500, "", message)
}

fn refused(error: ApplyError) -> Status {
    let message = error.to_string();
    match error {
        ApplyError::Conflicts(conflicts) => Status::new(409, "Conflict", message).with(Details {
            causes: conflicts
                .into_iter()
                .map(|conflict| Cause {
                    reason: "FieldManagerConflict".into(),
                    message: format!("conflict with {}", conflict.manager),
                    field: conflict.path,
                })
                .collect(),
            ..Details::default()
        }),
        ApplyError::BadRequest(_) => Status::bad_request(message),
        other => Status::internal(other),
    }
}

/// Fields that an endpoint does not change: nobody comes to own them by it.
fn reset(kind: &crate::kinds::Kind, subresource: &str) -> &'static [&'static [&'static str]] {
    match subresource {
        "" if kind.subresource("status").is_some() => &[&["status"]],
        "status" => &[
            &["spec"],
            &["metadata", "labels"],
            &["metadata", "annotations"],
            &["metadata", "finalizers"],
            &["metadata", "ownerReferences"],
        ],
        _ => &[],
    }
}

/// Whether two versions are the same but for the times in their managed fields.
pub(super) fn same(new: &Value, old: &Value) -> bool {
    if new == old {
        return true;
    }
    if crate::object::differs_outside(new, old, &["metadata"]) {
        return false;
    }
    let timeless = |object: &Value| {
        let mut metadata = object.get("metadata").cloned().unwrap_or_default();
        let managed = metadata.get_mut("managedFields").and_then(Value::as_array_mut);
        for entry in managed.into_iter().flatten() {
            crate::object::remove(entry, "time");
        }
        metadata
    };
    timeless(new) == timeless(old)
}
