//! Mutating and validating webhooks.
//!
//! Source: `k8s.io/api/admission/v1`, `k8s.io/apiserver/pkg/admission/plugin/webhook`.

use std::sync::Arc;

use base64::Engine as _;
use futures::future::join_all;
use serde_json::{Value, json};

use crate::admission::matching::{self, Facts};
use crate::admission::plugin::{Plugin, look_all};
use crate::admission::{PLUGINS, call};
use crate::context::Context;
use crate::kinds::Kind;
use crate::kinds::edit::{int, list, put, text};
use crate::status::Status;

const GROUP: &str = "admissionregistration.k8s.io";
/// Webhooks of one kind that are called for one request; more would not end in time anyway.
const CALLS_MAX: usize = 256;

pub static MUTATING: Plugin = Plugin {
    name: "MutatingAdmissionWebhook",
    handles: |ctx| !matching::exempt(ctx),
    admit: Some(|ctx, o, old| Box::pin(async move { mutate(ctx, o, old).await })),
    validate: None,
};

pub static VALIDATING: Plugin = Plugin {
    name: "ValidatingAdmissionWebhook",
    handles: |ctx| !matching::exempt(ctx),
    admit: None,
    validate: Some(|ctx, o, old| Box::pin(async move { validate(ctx, o, old).await })),
};

/// The webhooks of all configurations in the order of their names.
async fn hooks(ctx: &Context, resource: &str) -> Result<Vec<Value>, Status> {
    let mut all = look_all(ctx, GROUP, resource, "").await?;
    all.sort_by(|a, b| crate::object::name(a).cmp(crate::object::name(b)));
    Ok(all.iter().flat_map(|c| list(c, "webhooks").to_vec()).take(CALLS_MAX).collect())
}

/// What a webhook is told: the objects in the version that its rules name.
struct Told {
    kind: Arc<Kind>,
    object: Value,
    old: Option<Value>,
}

/// What a request is made of, for all webhooks.
struct Request<'a> {
    ctx: &'a Context,
    versions: Vec<Arc<Kind>>,
    namespace: Option<Value>,
    old: Option<&'a Value>,
}

impl<'a> Request<'a> {
    async fn new(ctx: &'a Context, old: Option<&'a Value>) -> Result<Self, Status> {
        Ok(Self { ctx, versions: matching::versions(ctx), namespace: matching::namespace_of(ctx).await?, old })
    }
}

/// What a webhook is to be called with, `None` when it is not to be called; an error is the refusal of one that cannot tell and
/// must not be passed over.
async fn wanted(hook: &Value, request: &Request<'_>, object: &Value) -> Result<Option<Told>, Status> {
    let (ctx, old) = (request.ctx, request.old);
    let Some(kind) = matching::matched(list(hook, "rules"), hook, &request.versions, ctx) else { return Ok(None) };
    if !matching::selectors_match(hook, ctx, request.namespace.as_ref(), object, old) {
        return Ok(None);
    }
    let object = matching::in_version(ctx, kind, object).await?;
    let old = match old {
        Some(old) => Some(matching::in_version(ctx, kind, old).await?),
        None => None,
    };
    let told = Told { kind: Arc::clone(kind), object, old };
    let conditions = list(hook, "matchConditions");
    if !conditions.is_empty() {
        let facts = Facts {
            ctx,
            request: matching::request(ctx, kind),
            object: &told.object,
            old: told.old.as_ref().unwrap_or(&Value::Null),
            namespace: request.namespace.clone().unwrap_or_default(),
            params: Value::Null,
        };
        match matching::conditions_match(conditions, &facts) {
            Ok(true) => {}
            Ok(false) => return Ok(None),
            Err(_) if text(hook, "failurePolicy") == "Ignore" => return Ok(None),
            Err(why) => {
                return Err(Status::forbidden(
                    &ctx.kind,
                    &ctx.name,
                    format!("webhook {:?}: {why}", text(hook, "name")),
                ));
            }
        }
    }
    if ctx.dry_run && !matches!(text(hook, "sideEffects"), "None" | "NoneOnDryRun") {
        return Err(Status::bad_request(format!(
            "admission webhook {:?} does not support dry run",
            text(hook, "name")
        )));
    }
    Ok(Some(told))
}

/// Calls one webhook; `None` when it failed and may be passed over.
async fn ask(ctx: &Context, hook: &Value, told: &Told) -> Result<Option<Value>, Status> {
    let name = text(hook, "name");
    let mut request = matching::request(ctx, &told.kind);
    put(&mut request, "object", told.object.clone());
    put(&mut request, "oldObject", told.old.clone().unwrap_or_default());
    let uid = text(&request, "uid").to_owned();
    let version = list(hook, "admissionReviewVersions")
        .iter()
        .filter_map(Value::as_str)
        .find(|v| matches!(*v, "v1" | "v1beta1"))
        .unwrap_or("v1");
    let review =
        json!({"kind": "AdmissionReview", "apiVersion": format!("admission.k8s.io/{version}"), "request": request});
    let seconds = int(hook, "timeoutSeconds").and_then(|n| u64::try_from(n).ok()).unwrap_or(10);
    let config = hook.get("clientConfig").cloned().unwrap_or_default();
    let answer = call::call(ctx, &config, &review, seconds).await.and_then(|a| {
        let response = a.get("response").cloned().unwrap_or_default();
        if !response.is_object() {
            return Err("failed to call webhook: expected response, got nil".to_owned());
        }
        if version == "v1" && text(&response, "uid") != uid {
            return Err(format!(
                "received invalid webhook response: expected response.uid={uid:?}, got {:?}",
                text(&response, "uid")
            ));
        }
        Ok(response)
    });
    match answer {
        Ok(response) => {
            for (k, v) in response.get("auditAnnotations").and_then(Value::as_object).into_iter().flatten() {
                ctx.annotations.lock().push((format!("{name}/{k}"), v.as_str().unwrap_or_default().to_owned()));
            }
            for w in list(&response, "warnings").iter().filter_map(Value::as_str) {
                ctx.warn(w);
            }
            Ok(Some(response))
        }
        Err(why) if text(hook, "failurePolicy") == "Ignore" => {
            tracing::warn!(webhook = name, %why, "a webhook failed and is passed over, as its failure policy says");
            Ok(None)
        }
        Err(why) => Err(Status::internal(format!("failed calling webhook {name:?}: {why}"))),
    }
}

/// Reasons that a webhook may give; anything else is left out.
const REASONS: [&str; 16] = [
    "Unauthorized",
    "Forbidden",
    "NotFound",
    "AlreadyExists",
    "Conflict",
    "Gone",
    "Invalid",
    "ServerTimeout",
    "Timeout",
    "TooManyRequests",
    "BadRequest",
    "MethodNotAllowed",
    "NotAcceptable",
    "RequestEntityTooLarge",
    "InternalError",
    "ServiceUnavailable",
];

/// The refusal of a webhook.
fn denied(name: &str, response: &Value) -> Status {
    let none = Value::Null;
    let result = response.get("status").unwrap_or(&none);
    let by = format!("admission webhook {name:?} denied the request");
    let message = match (text(result, "message"), text(result, "reason")) {
        ("", "") => format!("{by} without explanation"),
        ("", reason) => format!("{by}: {reason}"),
        (message, _) => format!("{by}: {message}"),
    };
    let code =
        int(result, "code").and_then(|c| u16::try_from(c).ok()).filter(|c| (400..600).contains(c)).unwrap_or(400);
    let reason = REASONS.iter().find(|r| **r == text(result, "reason")).copied().unwrap_or_default();
    Status::new(code, reason, message)
}

fn allowed(response: &Value) -> bool {
    response.get("allowed").and_then(Value::as_bool).unwrap_or(false)
}

async fn validate(ctx: &Context, object: &Value, old: Option<&Value>) -> Result<(), Status> {
    let hooks = hooks(ctx, "validatingwebhookconfigurations").await?;
    if hooks.is_empty() {
        return Ok(());
    }
    let request = Request::new(ctx, old).await?;
    let mut called = Vec::new();
    for hook in &hooks {
        called.extend(wanted(hook, &request, object).await?.map(|told| (hook, told)));
    }
    // All at once: they do not see each other.
    let answers = join_all(called.iter().map(|(hook, told)| async move { (*hook, ask(ctx, hook, told).await) })).await;
    for (hook, answer) in answers {
        if let Some(response) = answer?
            && !allowed(&response)
        {
            return Err(denied(text(hook, "name"), &response));
        }
    }
    Ok(())
}

async fn mutate(ctx: &Context, object: &mut Value, old: Option<&Value>) -> Result<(), Status> {
    let hooks = hooks(ctx, "mutatingwebhookconfigurations").await?;
    if hooks.is_empty() {
        return Ok(());
    }
    let request = Request::new(ctx, old).await?;
    let before = object.clone();
    // What the object was after each webhook, to tell whether something changed since.
    let mut last: Vec<Option<Value>> = vec![None; hooks.len()];
    for (i, hook) in hooks.iter().enumerate() {
        if let Some(told) = wanted(hook, &request, object).await? {
            one(ctx, hook, told, object).await?;
            last[i] = Some(object.clone());
        }
    }
    if *object == before || !matching::mutable(ctx) {
        return Ok(());
    }
    // The other plugins look once more, as what they guard may have been added.
    for plugin in PLUGINS.iter().filter(|p| (p.handles)(ctx) && p.name != MUTATING.name) {
        if let (Some(admit), false) = (plugin.admit, ctx.api.config.disabled_admission.iter().any(|d| d == plugin.name))
        {
            admit(ctx, object, old).await?;
        }
    }
    for (hook, seen) in hooks.iter().zip(&last) {
        let changed = seen.as_ref().is_some_and(|s| *s != *object);
        if text(hook, "reinvocationPolicy") == "IfNeeded"
            && changed
            && let Some(told) = wanted(hook, &request, object).await?
        {
            one(ctx, hook, told, object).await?;
        }
    }
    Ok(())
}

async fn one(ctx: &Context, hook: &Value, mut told: Told, object: &mut Value) -> Result<(), Status> {
    let Some(response) = ask(ctx, hook, &told).await? else { return Ok(()) };
    let name = text(hook, "name");
    if !allowed(&response) {
        return Err(denied(name, &response));
    }
    let patch = text(&response, "patch");
    if patch.is_empty() {
        return Ok(());
    }
    let bytes = base64::engine::general_purpose::STANDARD.decode(patch).map_err(Status::internal)?;
    if !matching::mutable(ctx) {
        return Err(Status::internal(format!(
            "admission webhook {name:?} attempted to modify the object, which is not supported for this operation"
        )));
    }
    coracle_schema::patch::json::apply(&mut told.object, &bytes).map_err(Status::internal)?;
    *object = settle(ctx, &told.kind, told.object).await?;
    Ok(())
}

/// An object of `kind` that admission has changed, as the request's version has it: fields that the type does not know go, and what
/// was added gets its defaults, like what a client sends.
pub async fn settle(ctx: &Context, kind: &Kind, mut object: Value) -> Result<Value, Status> {
    if !ctx.subresource.is_empty() && ctx.kind.subresource(&ctx.subresource).is_none_or(|s| s.kind != ctx.kind.kind) {
        return Ok(object);
    }
    crate::wire::conform(&mut object, kind).map_err(|status| Status::internal(status.message))?;
    let mut object = matching::in_version(ctx, &ctx.kind, &object).await?;
    crate::wire::default(&ctx.kind, &mut object);
    ctx.kind.strategy.default(&mut object);
    Ok(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_in_words() {
        let s = denied("a.b.c", &json!({"allowed": false, "status": {"message": "no", "reason": "x", "code": 403}}));
        assert_eq!((s.code, s.message.as_str()), (403, "admission webhook \"a.b.c\" denied the request: no"));
        let s = denied("a.b.c", &json!({"allowed": false}));
        assert_eq!(
            (s.code, s.message.as_str()),
            (400, "admission webhook \"a.b.c\" denied the request without explanation")
        );
    }
}
