//! POST: creation of an object.

use coracle_store::{Draft, Entry, Error, Precondition};
use rand::RngExt as _;
use serde_json::{Map, Value};

use super::answer::{self, Outgoing};
use super::call::{Call, convert, stored_api_version};
use super::managed;
use crate::context::{Context, Operation};
use crate::http::{ReqBody, Response};
use crate::kinds::Kind;
use crate::object;
use crate::status::Status;

/// Characters of generated names: no vowels, no digits that look like letters.
const SUFFIX: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
/// Characters that `generateName` gets appended.
const SUFFIX_LENGTH: usize = 5;
/// Longest generated name.
const GENERATED_LENGTH: usize = 63;
/// Times that another suffix is tried when a generated name is taken.
const GENERATE_TRIES: usize = 8;

/// POST on a collection.
pub(super) async fn create(call: &mut Call, body: ReqBody) -> Result<Response, Status> {
    let kind = call.kind.clone();
    let mut object = call.read_object(body, &kind).await?;
    type_matches(&kind, &object)?;
    namespace_matches(call, &mut object)?;
    if !kind.stored() {
        return review(call, object).await;
    }
    let generated = object::name(&object).is_empty() && !object::text(&object, "/metadata/generateName").is_empty();
    for _ in 0..if generated { GENERATE_TRIES } else { 0 } {
        match store_new(call, object.clone(), None).await {
            Err(status) if status.reason == "AlreadyExists" => {}
            created => return answer::object(call, 201, created?).await,
        }
    }
    let outgoing = store_new(call, object, None).await?;
    answer::object(call, 201, outgoing).await
}

/// POST of an object that is answered, not stored.
async fn review(call: &mut Call, mut object: Value) -> Result<Response, Status> {
    defaults(&call.kind, &mut object);
    let ctx = call.context(Operation::Create, object::name(&object));
    for plugin in plugins(&ctx) {
        plugin.admit(&ctx, &mut object, None).await?;
    }
    for plugin in plugins(&ctx) {
        plugin.validate(&ctx, &object, None).await?;
    }
    let answered = match (call.kind.group.as_str(), call.kind.resource.as_str()) {
        ("authentication.k8s.io", _) => crate::authn::review(&ctx, object).await?,
        ("", "bindings") => {
            let pods = call.api.kind("", "v1", "pods").ok_or_else(Status::no_such_resource)?;
            call.route.name = object::name(&object).to_owned();
            call.kind = pods;
            call.route.subresource = "binding".into();
            return super::subresource::bind(call, object).await;
        }
        _ => call.kind.strategy.clone().answer(&ctx, object).await?,
    };
    call.take_warnings(&ctx);
    answer::shaped(call, 201, answered)
}

/// The rest of a creation: defaults, admission, preparation, validation, the store. `applied` is the object when server-side
/// apply has made its managed fields already.
pub(super) async fn store_new(call: &mut Call, mut object: Value, applied: Option<()>) -> Result<Outgoing, Status> {
    let kind = call.kind.clone();
    if !object::text(&object, "/metadata/resourceVersion").is_empty() {
        return Err(Status::new(500, "", "resourceVersion should not be set on objects to be created"));
    }
    wipe_system_fields(&mut object);
    defaults(&kind, &mut object);
    generate_name(&mut object);
    let name = object::name(&object).to_owned();
    let ctx = call.context(Operation::Create, &name);
    for plugin in plugins(&ctx) {
        plugin.admit(&ctx, &mut object, None).await?;
    }
    if applied.is_none() {
        managed::track(&ctx, None, &mut object)?;
    }
    system_fields(&ctx, &mut object);
    let finish = kind.strategy.begin(&ctx, &mut object, None).await?;
    let result = commit_new(&ctx, &kind, &mut object).await;
    if let Some(finish) = finish {
        finish.done(result.is_ok() && !ctx.dry_run).await;
    }
    call.take_warnings(&ctx);
    match result? {
        Some(entry) => Ok(Outgoing::Stored(entry.value)),
        None => Ok(Outgoing::Value(object)),
    }
}

/// Prepares, validates and writes; `None` on a dry run.
async fn commit_new(ctx: &Context, kind: &Kind, object: &mut Value) -> Result<Option<Entry>, Status> {
    let strategy = &kind.strategy;
    strategy.prepare_create(ctx, object);
    if strategy.has_generation() {
        object::metadata(object).insert("generation".into(), 1.into());
    } else {
        object::metadata(object).remove("generation");
    }
    let name = object::name(object).to_owned();
    let mut errors = strategy.validate(ctx, object);
    errors.extend(crate::crd::validate(kind, object, None));
    if !errors.is_empty() {
        return Err(Status::invalid(kind, &name, &errors));
    }
    for sentence in strategy.warnings(ctx, object, None) {
        ctx.warn(sentence);
    }
    strategy.canonicalize(object);
    crate::wire::fill(kind, object);
    for plugin in plugins(ctx) {
        plugin.validate(ctx, object, None).await?;
    }
    let key = kind.key(&ctx_namespace(ctx, kind), &name);
    if ctx.dry_run {
        object::metadata(object).remove("resourceVersion");
        return match ctx.api.store.get(&key).await? {
            Some(_) => Err(Status::already_exists(kind, &name)),
            None => Ok(None),
        };
    }
    let draft = draft(kind, object).await?;
    match ctx.api.store.put(&key, draft, Precondition::Absent).await {
        Ok(entry) => Ok(Some(entry)),
        Err(Error::Conflict { .. }) => Err(Status::already_exists(kind, &name)),
        Err(other) => Err(store_error(other)),
    }
}

/// A write that the store did not take.
pub(super) fn store_error(error: Error) -> Status {
    match error {
        Error::NoSpace { .. } => Status::new(507, "InsufficientStorage", error.to_string()),
        Error::Poisoned { .. } | Error::Closed | Error::Unavailable { .. } => Status::unavailable(error.to_string()),
        other => other.into(),
    }
}

/// Encodes an object in its storage version.
pub(super) async fn draft(kind: &Kind, object: &Value) -> Result<Draft, Status> {
    if kind.is_storage_version() {
        return Draft::encode(object).map_err(Status::internal);
    }
    let converted = convert(kind, vec![object.clone()], &stored_api_version(kind)).await?.pop();
    let converted = converted.ok_or_else(|| Status::internal("a conversion lost its object"))?;
    Draft::encode(&converted).map_err(Status::internal)
}

/// The plugins that look at a request.
pub(super) fn plugins(ctx: &Context) -> impl Iterator<Item = &std::sync::Arc<dyn crate::admission::Admission>> {
    ctx.api.chain.get().into_iter().flatten().filter(|plugin| plugin.handles(ctx))
}

/// Defaults of the schema, then those of the strategy.
pub(super) fn defaults(kind: &Kind, object: &mut Value) {
    crate::wire::default(kind, object);
    kind.strategy.default(object);
}

/// Namespace of the object's key.
pub(super) fn ctx_namespace(ctx: &Context, kind: &Kind) -> String {
    if kind.namespaced() { ctx.namespace.clone() } else { String::new() }
}

/// `apiVersion` and `kind` of a body must be those of the path.
pub(super) fn type_matches(kind: &Kind, object: &Value) -> Result<(), Status> {
    let (api_version, body_kind) = (object::text(object, "/apiVersion"), object::text(object, "/kind"));
    let wanted = kind.api_version();
    if api_version != wanted {
        return Err(Status::bad_request(format!(
            "the API version in the data ({api_version}) does not match the expected API version ({wanted})"
        )));
    }
    if body_kind != kind.kind {
        return Err(Status::bad_request(format!(
            "{body_kind} in version {:?} cannot be handled as a {}: converting ({body_kind}) to ({}): unknown conversion",
            kind.version, kind.kind, kind.kind
        )));
    }
    Ok(())
}

/// The namespace of a body must be that of the path; an empty one is filled in.
pub(super) fn namespace_matches(call: &Call, object: &mut Value) -> Result<(), Status> {
    let metadata = object::metadata(object);
    let given = metadata.get("namespace").and_then(Value::as_str).unwrap_or_default().to_owned();
    if !call.kind.namespaced() {
        if given.is_empty() {
            metadata.remove("namespace");
        }
        return if given.is_empty() {
            Ok(())
        } else {
            Err(Status::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ))
        };
    }
    if given.is_empty() {
        metadata.insert("namespace".into(), call.route.namespace.clone().into());
    } else if given != call.route.namespace {
        return Err(Status::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    Ok(())
}

/// What only the server sets is taken away.
fn wipe_system_fields(object: &mut Value) {
    let metadata = object::metadata(object);
    for member in
        ["uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "resourceVersion"]
    {
        metadata.remove(member);
    }
}

fn system_fields(ctx: &Context, object: &mut Value) {
    let metadata = object::metadata(object);
    metadata.insert("uid".into(), uuid::Uuid::new_v4().to_string().into());
    metadata.insert("creationTimestamp".into(), ctx.now_text().into());
    tidy_metadata(metadata);
}

/// Empty members of the metadata are not written.
pub(super) fn tidy_metadata(metadata: &mut Map<String, Value>) {
    metadata.retain(|_, value| match value {
        Value::Null => false,
        Value::Object(map) => !map.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::String(text) => !text.is_empty(),
        _ => true,
    });
}

fn generate_name(object: &mut Value) {
    let base = object::text(object, "/metadata/generateName").to_owned();
    if base.is_empty() || !object::name(object).is_empty() {
        return;
    }
    let mut rng = rand::rng();
    let suffix: String = (0..SUFFIX_LENGTH).map(|_| char::from(SUFFIX[rng.random_range(0..SUFFIX.len())])).collect();
    let kept: String = base.chars().take(GENERATED_LENGTH - SUFFIX_LENGTH).collect();
    object::metadata(object).insert("name".into(), format!("{kept}{suffix}").into());
}
