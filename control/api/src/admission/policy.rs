//! Validating- and MutatingAdmissionPolicy: CEL in place of a webhook.
//!
//! Source: KEP-3488, KEP-3962, `k8s.io/apiserver/pkg/admission/plugin/policy`.

use std::sync::Arc;

use coracle_schema::cel::{Budget, Program};
use serde_json::Value;

use crate::admission::matching::{self, Asked, Facts, program};
use crate::admission::plugin::{Plugin, look_all};
use crate::admission::webhook::settle;
use crate::context::Context;
use crate::kinds::edit::{list, text};
use crate::kinds::{Kind, meta};
use crate::status::{Cause, Status};

const GROUP: &str = "admissionregistration.k8s.io";
/// Longest message that an expression may give, in bytes.
const MESSAGE_MAX_BYTES: usize = 5 << 10;

pub static VALIDATING: Plugin = Plugin {
    name: "ValidatingAdmissionPolicy",
    handles: |ctx| !matching::exempt(ctx),
    admit: None,
    validate: Some(|ctx, o, old| Box::pin(async move { validate(ctx, o, old).await })),
};

pub static MUTATING: Plugin = Plugin {
    name: "MutatingAdmissionPolicy",
    handles: |ctx| !matching::exempt(ctx) && matching::mutable(ctx),
    admit: Some(|ctx, o, old| Box::pin(async move { mutate(ctx, o, old).await })),
    validate: None,
};

/// A policy with one of its bindings and one set of parameters, all of which take the request in.
struct Case {
    policy: Arc<Value>,
    binding: Arc<Value>,
    params: Value,
    /// The row in whose version the policy sees the object.
    kind: Arc<Kind>,
}

/// An error of a policy, which its failure policy may let pass.
fn misconfigured(ctx: &Context, kind: &str, policy: &Value, binding: &Value, why: &str) -> Result<(), Status> {
    if policy.pointer("/spec/failurePolicy").and_then(Value::as_str) == Some("Ignore") {
        return Ok(());
    }
    let (p, b) = (crate::object::name(policy), crate::object::name(binding));
    Err(Status::forbidden(&ctx.kind, &ctx.name, format!("{kind} '{p}' with binding '{b}' denied request: {why}")))
}

/// The row in whose version `matchConstraints` or `matchResources` take the request in.
fn constrained<'a>(
    holder: Option<&Value>,
    ctx: &Context,
    versions: &'a [Arc<Kind>],
    namespace: Option<&Value>,
    object: &Value,
    old: Option<&Value>,
) -> Option<&'a Arc<Kind>> {
    let Some(m) = holder else { return versions.first() };
    if matching::matched(list(m, "excludeResourceRules"), m, versions, ctx).is_some()
        || !matching::selectors_match(m, ctx, namespace, object, old)
    {
        return None;
    }
    match list(m, "resourceRules") {
        [] => versions.first(),
        rules => matching::matched(rules, m, versions, ctx),
    }
}

/// All cases of a request, policies and bindings in the order of their names.
async fn cases(
    ctx: &Context,
    kind: &str,
    policies: &str,
    object: &Value,
    old: Option<&Value>,
    namespace: Option<&Value>,
) -> Result<Vec<Case>, Status> {
    let all = look_all(ctx, GROUP, policies, "").await?;
    if all.is_empty() {
        return Ok(Vec::new());
    }
    let singular = policies.strip_suffix("policies").unwrap_or(policies);
    let bindings: Vec<Arc<Value>> =
        look_all(ctx, GROUP, &format!("{singular}policybindings"), "").await?.into_iter().map(Arc::new).collect();
    let versions = matching::versions(ctx);
    let limits = |holder: Option<&Value>| constrained(holder, ctx, &versions, namespace, object, old);
    let mut out = Vec::new();
    for policy in all.into_iter().map(Arc::new) {
        let Some(seen) = limits(policy.pointer("/spec/matchConstraints")) else { continue };
        for binding in &bindings {
            let bound = crate::object::text(binding, "/spec/policyName") == crate::object::name(&policy);
            if !bound || limits(binding.pointer("/spec/matchResources")).is_none() {
                continue;
            }
            match params(ctx, &policy, binding).await? {
                Ok(found) => out.extend(found.into_iter().map(|params| Case {
                    policy: Arc::clone(&policy),
                    binding: Arc::clone(binding),
                    params,
                    kind: Arc::clone(seen),
                })),
                Err(why) => misconfigured(ctx, kind, &policy, binding, &why)?,
            }
        }
    }
    Ok(out)
}

/// The parameters of a binding; none at all count as one set of nothing when the policy asks for none.
async fn params(ctx: &Context, policy: &Value, binding: &Value) -> Result<Result<Vec<Value>, String>, Status> {
    let Some(wanted) = policy.pointer("/spec/paramKind") else { return Ok(Ok(vec![Value::Null])) };
    let Some(reference) = binding.pointer("/spec/paramRef") else { return Ok(Ok(vec![Value::Null])) };
    let (group, version) = text(wanted, "apiVersion").split_once('/').unwrap_or(("", text(wanted, "apiVersion")));
    let Some(kind) = ctx.api.registry.find_kind(group, version, text(wanted, "kind")) else {
        return Ok(Err(format!(
            "failed to configure policy: failed to find resource referenced by paramKind: '{}/{}, Kind={}'",
            group,
            version,
            text(wanted, "kind")
        )));
    };
    let namespace = match text(reference, "namespace") {
        "" if kind.namespaced() => ctx.namespace.as_str(),
        n => n,
    };
    let name = text(reference, "name");
    let found = if name.is_empty() {
        let selector = reference.get("selector").cloned().unwrap_or_default();
        let labels = |o: &Value| o.pointer("/metadata/labels").cloned().unwrap_or_default();
        ctx.api.list(&kind, namespace).await?.into_iter().filter(|o| meta::selects(&selector, &labels(o))).collect()
    } else {
        ctx.api.get(&kind, namespace, name).await?.into_iter().collect::<Vec<_>>()
    };
    if found.is_empty() {
        return Ok(if text(reference, "parameterNotFoundAction") == "Allow" {
            Ok(Vec::new())
        } else {
            Err("failed to configure binding: no params found for policy binding with `Deny` parameterNotFoundAction"
                .to_owned())
        });
    }
    Ok(Ok(found))
}

/// `(name, program)` of the policy's variables.
fn variables(policy: &Value) -> Result<Vec<(String, Arc<Program>)>, String> {
    policy
        .pointer("/spec/variables")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .map(|v| Ok((text(v, "name").to_owned(), program(text(v, "expression"))?)))
        .collect()
}

fn reason(word: &str) -> (u16, &'static str) {
    match word {
        "Unauthorized" => (401, "Unauthorized"),
        "Forbidden" => (403, "Forbidden"),
        "RequestEntityTooLarge" => (413, "RequestEntityTooLarge"),
        _ => (422, "Invalid"),
    }
}

async fn validate(ctx: &Context, object: &Value, old: Option<&Value>) -> Result<(), Status> {
    const KIND: &str = "ValidatingAdmissionPolicy";
    let namespace = matching::namespace_of(ctx).await?;
    let cases = cases(ctx, KIND, "validatingadmissionpolicies", object, old, namespace.as_ref()).await?;
    for case in cases {
        let (policy, binding) = (&case.policy, &case.binding);
        let object = matching::in_version(ctx, &case.kind, object).await?;
        let old = matching::in_version(ctx, &case.kind, old.unwrap_or(&Value::Null)).await?;
        let budget = Budget::of_object();
        let facts = Facts {
            ctx,
            request: matching::request(ctx, &case.kind),
            object: &object,
            old: &old,
            namespace: namespace.clone().unwrap_or_default(),
            params: case.params,
        };
        let none = Value::Null;
        let spec = policy.get("spec").unwrap_or(&none);
        match matching::conditions_match(list(spec, "matchConditions"), &facts) {
            Ok(true) => {}
            Ok(false) => continue,
            Err(why) => {
                misconfigured(ctx, KIND, policy, binding, &why)?;
                continue;
            }
        }
        let variables = match variables(policy) {
            Ok(v) => v,
            Err(why) => {
                misconfigured(ctx, KIND, policy, binding, &why)?;
                continue;
            }
        };
        let mut failures: Vec<(String, &str)> = Vec::new();
        let mut broken = None;
        {
            for v in list(spec, "validations") {
                let source = text(v, "expression");
                let compiled = match program(source) {
                    Ok(p) => p,
                    Err(why) => {
                        broken = Some(format!("compilation error: compilation failed: {why}"));
                        break;
                    }
                };
                let outcome = facts_eval_bool(&compiled, &facts, &variables, &budget);
                match outcome {
                    Ok(true) => {}
                    Ok(false) => failures.push((message(v, source, &facts, &variables, &budget), text(v, "reason"))),
                    Err(why) => {
                        broken = Some(format!("expression '{source}' resulted in error: {why}"));
                        break;
                    }
                }
            }
            for a in list(spec, "auditAnnotations") {
                let Ok(p) = program(text(a, "valueExpression")) else { continue };
                if let Ok(Value::String(s)) = facts_eval(&p, &facts, &variables, &budget) {
                    ctx.annotations.lock().push((format!("{}/{}", crate::object::name(policy), text(a, "key")), s));
                }
            }
        }
        if let Some(why) = broken {
            misconfigured(ctx, KIND, policy, binding, &why)?;
        }
        let actions = binding.pointer("/spec/validationActions").and_then(Value::as_array).cloned().unwrap_or_default();
        let acts = |word: &str| actions.iter().any(|a| a == word);
        let (p, b) = (crate::object::name(policy), crate::object::name(binding));
        for (message, word) in failures {
            if acts("Warn") {
                ctx.warn(format!("Validation failed for {KIND} '{p}' with binding '{b}': {message}"));
            }
            if acts("Audit") {
                ctx.annotations
                    .lock()
                    .push(("validation.policy.admission.k8s.io/validation_failure".into(), message.clone()));
            }
            if acts("Deny") {
                let (code, word) = reason(word);
                let mut status = Status::forbidden(
                    &ctx.kind,
                    &ctx.name,
                    format!("{KIND} '{p}' with binding '{b}' denied request: {message}"),
                );
                status.code = code;
                status.reason = word;
                if let Some(details) = &mut status.details {
                    details.causes.push(Cause { message, ..Cause::default() });
                }
                return Err(status);
            }
        }
    }
    Ok(())
}

fn facts_eval(
    p: &Program,
    facts: &Facts<'_>,
    variables: &[(String, Arc<Program>)],
    budget: &Budget,
) -> Result<Value, String> {
    let asked = Asked(facts.ctx);
    let mut scope = facts.scope(&asked);
    for (name, program) in variables {
        scope.variable(name, program);
    }
    let value = p.eval(&scope, budget).map_err(|e| e.to_string())?;
    value.to_json().ok_or_else(|| "the value has no JSON form".to_owned())
}

fn facts_eval_bool(
    p: &Program,
    facts: &Facts<'_>,
    variables: &[(String, Arc<Program>)],
    budget: &Budget,
) -> Result<bool, String> {
    match facts_eval(p, facts, variables, budget)? {
        Value::Bool(b) => Ok(b),
        other => Err(format!("the expression gave {other}, not a bool")),
    }
}

/// What a failed validation says: its expression for a message, its message, or itself.
fn message(
    v: &Value,
    source: &str,
    facts: &Facts<'_>,
    variables: &[(String, Arc<Program>)],
    budget: &Budget,
) -> String {
    let made = program(text(v, "messageExpression")).ok().filter(|_| !text(v, "messageExpression").is_empty());
    if let Some(p) = made
        && let Ok(Value::String(s)) = facts_eval(&p, facts, variables, budget)
        && !s.trim().is_empty()
        && s.len() <= MESSAGE_MAX_BYTES
        && !s.contains('\n')
    {
        return s.trim().to_owned();
    }
    match text(v, "message") {
        "" => format!("failed expression: {}", source.trim()),
        m => m.trim().to_owned(),
    }
}

async fn mutate(ctx: &Context, object: &mut Value, old: Option<&Value>) -> Result<(), Status> {
    const KIND: &str = "MutatingAdmissionPolicy";
    let namespace = matching::namespace_of(ctx).await?;
    let cases = cases(ctx, KIND, "mutatingadmissionpolicies", object, old, namespace.as_ref()).await?;
    if cases.is_empty() {
        return Ok(());
    }
    let mut again = Vec::new();
    for case in &cases {
        run(ctx, KIND, case, object, old, namespace.as_ref()).await?;
        again.push(object.clone());
    }
    // Those who asked for it see what came after them.
    for (case, seen) in cases.iter().zip(&again) {
        let wants = case.policy.pointer("/spec/reinvocationPolicy").and_then(Value::as_str) == Some("IfNeeded");
        if wants && seen != object {
            run(ctx, KIND, case, object, old, namespace.as_ref()).await?;
        }
    }
    Ok(())
}

/// Lets a case change the object, in the version that its policy names.
async fn run(
    ctx: &Context,
    kind: &str,
    case: &Case,
    object: &mut Value,
    old: Option<&Value>,
    namespace: Option<&Value>,
) -> Result<(), Status> {
    let before = matching::in_version(ctx, &case.kind, object).await?;
    let old = matching::in_version(ctx, &case.kind, old.unwrap_or(&Value::Null)).await?;
    let mut changed = before.clone();
    one(ctx, kind, case, &mut changed, &old, namespace, &Budget::of_object())?;
    if changed != before {
        *object = settle(ctx, &case.kind, changed).await?;
    }
    Ok(())
}

fn one(
    ctx: &Context,
    kind: &str,
    case: &Case,
    object: &mut Value,
    old: &Value,
    namespace: Option<&Value>,
    budget: &Budget,
) -> Result<(), Status> {
    let (policy, binding) = (&case.policy, &case.binding);
    let none = Value::Null;
    let spec = policy.get("spec").unwrap_or(&none);
    let variables = match variables(policy) {
        Ok(v) => v,
        Err(why) => return misconfigured(ctx, kind, policy, binding, &why),
    };
    for m in list(spec, "mutations") {
        let json_patch = text(m, "patchType") == "JSONPatch";
        let field = if json_patch { "jsonPatch" } else { "applyConfiguration" };
        let source = m.get(field).map(|x| text(x, "expression")).unwrap_or_default();
        let seen = object.clone();
        let facts = Facts {
            ctx,
            request: matching::request(ctx, &case.kind),
            object: &seen,
            old,
            namespace: namespace.cloned().unwrap_or_default(),
            params: case.params.clone(),
        };
        match matching::conditions_match(list(spec, "matchConditions"), &facts) {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(why) => return misconfigured(ctx, kind, policy, binding, &why),
        }
        let patch = program(source).and_then(|p| facts_eval(&p, &facts, &variables, budget));
        let applied = patch.and_then(|patch| {
            if json_patch {
                let bytes = serde_json::to_vec(&patch).map_err(|e| e.to_string())?;
                coracle_schema::patch::json::apply(object, &bytes).map_err(|e| e.to_string())
            } else {
                // Lists merge by their keys, as server-side apply merges them.
                let merged = coracle_schema::apply::overlay(object, &patch, case.kind.schema());
                merged.map(|merged| *object = merged).map_err(|e| e.to_string())
            }
        });
        if let Err(why) = applied {
            *object = seen;
            misconfigured(ctx, kind, policy, binding, &format!("expression '{source}' resulted in error: {why}"))?;
        }
    }
    Ok(())
}
