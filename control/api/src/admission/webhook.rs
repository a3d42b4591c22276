//! Mutating and validating webhooks.
//!
//! Source: `k8s.io/api/admission/v1`, `k8s.io/apiserver/pkg/admission/plugin/webhook`.

use base64::Engine as _;
use futures::future::join_all;
use serde_json::{Value, json};

use crate::admission::matching::{self, Facts};
use crate::admission::plugin::{Plugin, look_all};
use crate::admission::{PLUGINS, call};
use crate::context::Context;
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

/// Whether a webhook is to be called; an error is the refusal of one that cannot tell and must not be passed over.
fn wanted(
    hook: &Value,
    ctx: &Context,
    namespace: Option<&Value>,
    object: &Value,
    old: Option<&Value>,
) -> Result<bool, Status> {
    if !matching::rules_match(list(hook, "rules"), ctx) || !matching::selectors_match(hook, ctx, namespace, object, old)
    {
        return Ok(false);
    }
    let conditions = list(hook, "matchConditions");
    if !conditions.is_empty() {
        let facts = Facts {
            ctx,
            request: matching::request(ctx),
            object,
            old: old.unwrap_or(&Value::Null),
            namespace: namespace.cloned().unwrap_or_default(),
            params: Value::Null,
        };
        match matching::conditions_match(conditions, &facts) {
            Ok(true) => {}
            Ok(false) => return Ok(false),
            Err(_) if text(hook, "failurePolicy") == "Ignore" => return Ok(false),
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
    Ok(true)
}

/// Calls one webhook; `None` when it failed and may be passed over.
async fn ask(ctx: &Context, hook: &Value, object: &Value, old: Option<&Value>) -> Result<Option<Value>, Status> {
    let name = text(hook, "name");
    let mut request = matching::request(ctx);
    put(&mut request, "object", object.clone());
    put(&mut request, "oldObject", old.cloned().unwrap_or_default());
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
    let namespace = matching::namespace_of(ctx).await?;
    let mut called = Vec::new();
    for hook in &hooks {
        if wanted(hook, ctx, namespace.as_ref(), object, old)? {
            called.push(hook);
        }
    }
    // All at once: they do not see each other.
    let answers = join_all(called.iter().map(|hook| async move { (*hook, ask(ctx, hook, object, old).await) })).await;
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
    let namespace = matching::namespace_of(ctx).await?;
    let before = object.clone();
    // What the object was after each webhook, to tell whether something changed since.
    let mut last: Vec<Option<Value>> = vec![None; hooks.len()];
    for (i, hook) in hooks.iter().enumerate() {
        if wanted(hook, ctx, namespace.as_ref(), object, old)? {
            one(ctx, hook, object, old).await?;
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
            && wanted(hook, ctx, namespace.as_ref(), object, old)?
        {
            one(ctx, hook, object, old).await?;
        }
    }
    Ok(())
}

async fn one(ctx: &Context, hook: &Value, object: &mut Value, old: Option<&Value>) -> Result<(), Status> {
    let Some(response) = ask(ctx, hook, object, old).await? else { return Ok(()) };
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
    coracle_schema::patch::json::apply(object, &bytes).map_err(Status::internal)?;
    redefault(ctx, object);
    Ok(())
}

/// What was added gets its defaults like what a client sends.
pub fn redefault(ctx: &Context, object: &mut Value) {
    if ctx.subresource.is_empty() || ctx.kind.subresource(&ctx.subresource).is_some_and(|s| s.kind == ctx.kind.kind) {
        crate::wire::default(&ctx.kind, object);
        ctx.kind.strategy.default(object);
    }
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
