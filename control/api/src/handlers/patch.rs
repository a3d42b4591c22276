//! PATCH in its four formats.

use coracle_schema::patch::PatchError;
use serde_json::Value;

use super::answer;
use super::call::Call;
use super::managed;
use super::update::{self, Changed};
use crate::http::{Format, ReqBody, Response};
use crate::object;
use crate::status::{Details, Status};
use crate::wire;

const JSON_PATCH: &str = "application/json-patch+json";
const MERGE_PATCH: &str = "application/merge-patch+json";
const STRATEGIC_PATCH: &str = "application/strategic-merge-patch+json";
const APPLY_PATCH: &str = "application/apply-patch+yaml";

/// A patch, read.
#[derive(Clone)]
pub(super) enum Patch {
    Json(bytes::Bytes),
    Merge(Value),
    Strategic(Value),
    Apply(Value),
}

/// PATCH on an object or a subresource that writes the object.
pub(super) async fn patch(call: &mut Call, body: ReqBody) -> Result<Response, Status> {
    let patch = read(call, body).await?;
    let (code, outgoing) = update::change(call, &mut |call, old| apply(call, &patch, old)).await?;
    answer::object(call, code, outgoing).await
}

/// Reads the body by its content type.
pub(super) async fn read(call: &mut Call, body: ReqBody) -> Result<Patch, Status> {
    let content_type = call.content_type.split(';').next().unwrap_or_default().trim().to_owned();
    let custom = call.kind.crd.is_some();
    let accepted: &[&str] = if custom {
        &[JSON_PATCH, MERGE_PATCH, APPLY_PATCH]
    } else {
        &[JSON_PATCH, MERGE_PATCH, STRATEGIC_PATCH, APPLY_PATCH]
    };
    if !accepted.contains(&content_type.as_str()) {
        return Err(Status::unsupported_media_type(accepted, &content_type));
    }
    if content_type != APPLY_PATCH && call.query.has("force") {
        let message =
            "PatchOptions.meta.k8s.io \"\" is invalid: force: Forbidden: may not be specified for non-apply patch";
        return Err(Status::new(422, "Invalid", message));
    }
    if content_type == APPLY_PATCH && call.field_manager.is_empty() {
        let message =
            "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch";
        return Err(Status::new(422, "Invalid", message));
    }
    let bytes = body.read().await?;
    if content_type == JSON_PATCH {
        return Ok(Patch::Json(bytes));
    }
    let format = if content_type == APPLY_PATCH { Format::Yaml } else { Format::Json };
    let parsed =
        wire::parse(&bytes, format).map_err(|error| Status::bad_request(format!("error decoding patch: {error}")))?;
    call.strictness(&parsed.strict, "")?;
    if !parsed.value.is_object() {
        return Err(Status::bad_request("error decoding patch: a patch must be an object"));
    }
    Ok(match content_type.as_str() {
        MERGE_PATCH => Patch::Merge(parsed.value),
        STRATEGIC_PATCH => Patch::Strategic(parsed.value),
        _ => Patch::Apply(parsed.value),
    })
}

/// The patched object.
pub(super) fn apply(call: &mut Call, patch: &Patch, old: Option<&Value>) -> Result<Changed, Status> {
    let kind = call.kind.clone();
    if let Patch::Apply(applied) = patch {
        return managed::apply(call, applied, old).map(|object| Changed { object, applied: true });
    }
    let old = old.ok_or_else(|| Status::not_found(&kind, &call.route.name))?;
    let mut object = old.clone();
    patch_value(patch, &mut object, &kind)?;
    let strict = wire::conform(&mut object, &kind)?;
    call.strictness(&strict, "")?;
    if object::name(&object) != object::name(old) {
        let message = format!(
            "the name of the object ({}) does not match the name on the URL ({})",
            object::name(&object),
            call.route.name
        );
        return Err(Status::bad_request(message));
    }
    super::write::type_matches(&kind, &object)?;
    Ok(Changed::new(object))
}

/// Applies one of the three merging formats.
pub(super) fn patch_value(patch: &Patch, object: &mut Value, kind: &crate::kinds::Kind) -> Result<(), Status> {
    match patch {
        Patch::Json(bytes) => coracle_schema::patch::json::apply(object, bytes).map_err(rejected),
        Patch::Merge(patch) => {
            coracle_schema::patch::merge::apply(object, patch);
            Ok(())
        }
        Patch::Strategic(patch) => {
            coracle_schema::patch::strategic::apply(object, patch.clone(), kind.schema()).map_err(rejected)
        }
        Patch::Apply(_) => Err(Status::internal("apply is no merging format")),
    }
}

fn rejected(error: PatchError) -> Status {
    match error {
        PatchError::Malformed(message) => Status::bad_request(message),
        PatchError::TooLarge(message) => Status::new(413, "RequestEntityTooLarge", message),
        PatchError::Failed(_) => {
            Status::new(422, "Invalid", "the server rejected our request due to an error in our request")
                .with(Details::default())
        }
    }
}
