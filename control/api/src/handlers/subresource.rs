//! Subresources: status, scale, binding, eviction, token, approval, finalize, resize, ephemeralcontainers.

use coracle_schema::FieldError;
use serde_json::{Value, json};

use super::answer;
use super::call::Call;
use super::update::{self, Changed};
use super::{patch, read, write};
use crate::context::Operation;
use crate::http::{Format, ReqBody, Response, Verb, json_response};
use crate::kinds::{Kind, Scope, Subresource, builtin};
use crate::object;
use crate::status::{Details, Status};
use crate::wire;

/// Answers a request on a subresource.
pub(super) async fn handle(call: &mut Call, body: ReqBody) -> Result<Response, Status> {
    let kind = call.kind.clone();
    let sub = kind.subresource(&call.route.subresource).ok_or_else(Status::no_such_resource)?;
    if !sub.verbs.iter().any(|verb| verb == call.route.verb.as_str()) {
        return Err(Status::no_such_method());
    }
    match (sub.name.as_str(), call.route.verb) {
        ("scale", _) => scale(call, sub, body).await,
        ("binding", _) => binding(call, sub, body).await,
        ("eviction", _) => crate::eviction::evict(call, sub, body).await,
        ("token", _) => token(call, sub, body).await,
        (_, Verb::Get) => read::get(call).await,
        (_, Verb::Update) => update::replace(call, body).await,
        (_, Verb::Patch) => patch::patch(call, body).await,
        _ => Err(Status::no_such_method()),
    }
}

/// A row for the kind of a subresource's body, for decoding.
pub(crate) fn body_kind(sub: &Subresource, of: &Kind) -> Kind {
    let plain = builtin().iter().find(|row| row.kind == "ConfigMap").expect("the table has config maps");
    Kind {
        group: sub.group.clone(),
        version: sub.version.clone(),
        resource: of.resource.clone(),
        singular: of.singular.clone(),
        kind: sub.kind.clone(),
        list_kind: String::new(),
        scope: if of.namespaced() { Scope::Namespaced } else { Scope::Cluster },
        short_names: Vec::new(),
        categories: Vec::new(),
        verbs: Vec::new(),
        subresources: Vec::new(),
        columns: Vec::new(),
        schema_name: crate::kinds::schema_name(&sub.group, &sub.version, &sub.kind),
        schema: std::sync::OnceLock::new(),
        strategy: plain.strategy.clone(),
        prefix: String::new(),
        storage_version: sub.version.clone(),
        storage_group: sub.group.clone(),
        conversion: None,
        crd: None,
        deprecation: None,
        differs_when_read: false,
        served: true,
    }
}

/// Where replicas stand in objects that scale: JSON pointers.
struct ScalePaths {
    spec: String,
    status: String,
    selector: Option<String>,
}

fn scale_paths(kind: &Kind) -> ScalePaths {
    if let Some(scale) = crate::crd::scale(kind) {
        let path = |member: &str| scale.get(member).and_then(Value::as_str).map(|p| p.replace('.', "/"));
        return ScalePaths {
            spec: path("specReplicasPath").unwrap_or_else(|| "/spec/replicas".into()),
            status: path("statusReplicasPath").unwrap_or_else(|| "/status/replicas".into()),
            selector: path("labelSelectorPath"),
        };
    }
    ScalePaths {
        spec: "/spec/replicas".into(),
        status: "/status/replicas".into(),
        selector: Some("/spec/selector".into()),
    }
}

/// The `autoscaling/v1` Scale of an object.
fn scale_of(kind: &Kind, object: &Value) -> Value {
    let paths = scale_paths(kind);
    let mut metadata = json!({});
    for member in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        if let Some(value) = object.pointer(&format!("/metadata/{member}")) {
            metadata[member] = value.clone();
        }
    }
    let number = |pointer: &str| object.pointer(pointer).and_then(Value::as_i64);
    let mut spec = json!({});
    if let Some(replicas) = number(&paths.spec).filter(|&n| n != 0) {
        spec["replicas"] = replicas.into();
    }
    let mut status = json!({"replicas": number(&paths.status).unwrap_or(0)});
    let selector = paths.selector.and_then(|pointer| object.pointer(&pointer).cloned());
    let text = match selector {
        Some(Value::String(text)) => text,
        Some(selector) => selector_text(&selector),
        None => String::new(),
    };
    if !text.is_empty() {
        status["selector"] = text.into();
    }
    json!({"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata, "spec": spec, "status": status})
}

/// A label selector (or a plain map of labels) as text.
pub(crate) fn selector_text(selector: &Value) -> String {
    let none = serde_json::Map::new();
    let plain = selector.get("matchLabels").is_none() && selector.get("matchExpressions").is_none();
    let labels = if plain { selector.as_object() } else { selector.get("matchLabels").and_then(Value::as_object) };
    let mut terms: Vec<(String, String)> = labels
        .unwrap_or(&none)
        .iter()
        .map(|(key, value)| (key.clone(), format!("{key}={}", value.as_str().unwrap_or_default())))
        .collect();
    for expression in selector.get("matchExpressions").and_then(Value::as_array).into_iter().flatten() {
        let key = object::text(expression, "/key");
        let mut values: Vec<&str> = expression
            .get("values")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        values.sort_unstable();
        let values = values.join(",");
        let term = match object::text(expression, "/operator") {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "Exists" => key.to_owned(),
            _ => format!("!{key}"),
        };
        terms.push((key.to_owned(), term));
    }
    terms.sort();
    terms.into_iter().map(|(_, term)| term).collect::<Vec<_>>().join(",")
}

async fn scale(call: &mut Call, sub: &Subresource, body: ReqBody) -> Result<Response, Status> {
    let kind = call.kind.clone();
    if call.route.verb == Verb::Get {
        let entry = call.api.store.get(&call.key()).await?;
        let entry = entry.ok_or_else(|| Status::not_found(&kind, &call.route.name))?;
        let object = call.decode(&entry.value).await?;
        return answer::shaped(call, 200, scale_of(&kind, &object));
    }
    let scale_kind = body_kind(sub, &kind);
    let given = match call.route.verb {
        Verb::Update => Input::Whole(call.read_object(body, &scale_kind).await?),
        _ => Input::Patch(patch::read(call, body).await?),
    };
    let (code, outgoing) = update::change(call, &mut |call, old| {
        let old = old.ok_or_else(|| Status::not_found(&call.kind, &call.route.name))?;
        let mut scale = scale_of(&call.kind, old);
        match &given {
            Input::Whole(whole) => scale = whole.clone(),
            Input::Patch(patch::Patch::Apply(applied)) => coracle_schema::patch::merge::apply(&mut scale, applied),
            Input::Patch(patch) => patch::patch_value(patch, &mut scale, &scale_kind)?,
        }
        let replicas = scale.pointer("/spec/replicas").and_then(Value::as_i64).unwrap_or(0);
        if replicas < 0 {
            let error = FieldError::invalid("spec.replicas", replicas, "must be greater than or equal to 0");
            return Err(Status::invalid_kind("autoscaling", "Scale", &call.route.name, &[error]));
        }
        let version = object::text(&scale, "/metadata/resourceVersion").to_owned();
        if !version.is_empty() && version != object::text(old, "/metadata/resourceVersion") {
            return Err(Status::modified(&call.kind, &call.route.name));
        }
        let mut new = old.clone();
        set_pointer(&mut new, &scale_paths(&call.kind).spec, replicas.into());
        Ok(Changed::new(new))
    })
    .await?;
    let object = match outgoing {
        answer::Outgoing::Stored(bytes) => call.decode(&bytes).await?,
        answer::Outgoing::Value(value) => value,
    };
    answer::shaped(call, code, scale_of(&kind, &object))
}

enum Input {
    Whole(Value),
    Patch(patch::Patch),
}

/// Sets a value at a JSON pointer, making the objects on the way.
fn set_pointer(object: &mut Value, pointer: &str, value: Value) {
    let mut here = object;
    for part in pointer.split('/').skip(1) {
        here = object::members(here).entry(part).or_insert(Value::Null);
    }
    *here = value;
}

/// POST of a Binding: the scheduler's answer.
async fn binding(call: &mut Call, sub: &Subresource, body: ReqBody) -> Result<Response, Status> {
    let binding = call.read_object(body, &body_kind(sub, &call.kind)).await?;
    bind(call, binding).await
}

/// Binds the pod of the path (or, for `bindings`, of the body).
pub(crate) async fn bind(call: &mut Call, mut binding: Value) -> Result<Response, Status> {
    let ctx = call.context(Operation::Create, &call.route.name);
    for plugin in write::plugins(&ctx) {
        plugin.admit(&ctx, &mut binding, None).await?;
    }
    for plugin in write::plugins(&ctx) {
        plugin.validate(&ctx, &binding, None).await?;
    }
    let node = object::text(&binding, "/target/name").to_owned();
    let target_kind = object::text(&binding, "/target/kind");
    if !target_kind.is_empty() && target_kind != "Node" {
        let error = FieldError::not_supported("target.kind", target_kind, &["Node", "<empty>"]);
        return Err(Status::invalid_kind("", "Binding", &call.route.name, &[error]));
    }
    if node.is_empty() {
        let error = FieldError::required("target.name", "");
        return Err(Status::invalid_kind("", "Binding", &call.route.name, &[error]));
    }
    update::change(call, &mut |call, old| {
        let old = old.ok_or_else(|| Status::not_found(&call.kind, &call.route.name))?;
        let conflict = |why: String| Err(Status::conflict(&call.kind, &call.route.name, &why));
        let uid = object::uid(&binding);
        if !uid.is_empty() && uid != object::uid(old) {
            return conflict(format!(
                "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
                object::uid(old)
            ));
        }
        if old.pointer("/metadata/deletionTimestamp").is_some_and(Value::is_string) {
            return conflict(format!("pod {} is being deleted, cannot be assigned to a host", call.route.name));
        }
        let current = object::text(old, "/spec/nodeName");
        if !current.is_empty() {
            return conflict(format!("pod {} is already assigned to node {current:?}", call.route.name));
        }
        if old.pointer("/spec/schedulingGates").and_then(Value::as_array).is_some_and(|gates| !gates.is_empty()) {
            return conflict(format!("pod {} has non-empty .spec.schedulingGates", call.route.name));
        }
        let mut new = old.clone();
        set_pointer(&mut new, "/spec/nodeName", node.as_str().into());
        for member in ["annotations", "labels"] {
            for (key, value) in
                binding.pointer(&format!("/metadata/{member}")).and_then(Value::as_object).into_iter().flatten()
            {
                let map = object::metadata(&mut new).entry(member).or_insert_with(|| json!({}));
                object::members(map).insert(key.clone(), value.clone());
            }
        }
        mark_scheduled(&mut new, &crate::time::seconds(call.now));
        Ok(Changed::new(new))
    })
    .await?;
    Ok(json_response(
        201,
        &json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}),
    ))
}

/// The condition `PodScheduled` becomes true.
fn mark_scheduled(pod: &mut Value, now: &str) {
    let status = object::members(pod).entry("status").or_insert_with(|| json!({}));
    let conditions = object::members(status).entry("conditions").or_insert_with(|| json!([]));
    let Some(list) = conditions.as_array_mut() else { return };
    let fresh = json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null, "lastTransitionTime": now});
    match list.iter_mut().find(|c| object::text(c, "/type") == "PodScheduled") {
        Some(condition) if object::text(condition, "/status") == "True" => {}
        Some(condition) => *condition = fresh,
        None => list.push(fresh),
    }
}

/// POST of a TokenRequest on a service account.
async fn token(call: &mut Call, sub: &Subresource, body: ReqBody) -> Result<Response, Status> {
    let request_kind = body_kind(sub, &call.kind);
    let request = if matches!(call.body_format()?, Format::Json | Format::Yaml | Format::Protobuf) {
        call.read_object(body, &request_kind).await?
    } else {
        return Err(Status::unsupported_media_type(&crate::http::SERVED, &call.content_type));
    };
    let entry = call.api.store.get(&call.key()).await?;
    let entry = entry.ok_or_else(|| Status::not_found(&call.kind, &call.route.name))?;
    let account = wire::parse_stored(&entry.value)?;
    let mut request = request;
    let ctx = call.context(Operation::Create, &call.route.name);
    for plugin in write::plugins(&ctx) {
        plugin.admit(&ctx, &mut request, None).await?;
    }
    for plugin in write::plugins(&ctx) {
        plugin.validate(&ctx, &request, None).await?;
    }
    let answered = call
        .api
        .authn
        .request_token(&call.api, &account, request, call.now)
        .await
        .map_err(|status| if status.details.is_none() { status.with(Details::default()) } else { status })?;
    answer::shaped(call, 201, answered)
}
