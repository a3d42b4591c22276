//! Which requests a webhook or a policy looks at: rules, selectors, match conditions; and what it is told of the request.

use std::collections::HashMap;
use std::sync::Arc;

use coracle_schema::cel::{self, Access, Budget, CelError, Program, Scope, Variable, Verdict};
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::admission::plugin::look;
use crate::authz::{Attributes, Decision};
use crate::context::{Context, Operation};
use crate::kinds::edit::{drop, list, put, text};
use crate::kinds::{Kind, meta, reviews};
use crate::status::Status;
use crate::user::UserInfo;

/// Compiled expressions that are kept; more are compiled anew after the cache was emptied.
const PROGRAMS_MAX: usize = 4096;
const GROUP: &str = "admissionregistration.k8s.io";

/// Objects that decide over admission are never subject to it.
pub fn exempt(ctx: &Context) -> bool {
    ctx.kind.group == GROUP
}

/// The rows of the objects at hand: the request's own, then those of their other served versions.
pub fn versions(ctx: &Context) -> Vec<Arc<Kind>> {
    let mut found = vec![Arc::clone(&ctx.kind)];
    let is_other =
        |k: &&Arc<Kind>| k.served && k.prefix == ctx.kind.prefix && k.api_version() != ctx.kind.api_version();
    if ctx.kind.stored() {
        found.extend(ctx.api.registry.rows().all.iter().filter(is_other).cloned());
    }
    found
}

/// The row in whose version the rules take the request in: the request's own, or with `matchPolicy: Equivalent` that of
/// another version of the same objects. The rules' owner is then to see the object in that version.
pub fn matched<'a>(rules: &[Value], holder: &Value, versions: &'a [Arc<Kind>], ctx: &Context) -> Option<&'a Arc<Kind>> {
    let considered = if text(holder, "matchPolicy") == "Exact" { 1 } else { versions.len() };
    versions[..considered].iter().find(|kind| rules_match(rules, kind, ctx))
}

/// An object in another version of its resource. Bodies of subresources with a kind of their own stay as they are.
pub async fn in_version(ctx: &Context, kind: &Kind, object: &Value) -> Result<Value, Status> {
    let own = object.get("kind").is_some_and(|k| *k == ctx.kind.kind.as_str());
    if !own || text(object, "apiVersion") == kind.api_version() {
        return Ok(object.clone());
    }
    let all = crate::handlers::convert(kind, vec![object.clone()], &kind.api_version()).await?;
    all.into_iter().next().ok_or_else(|| Status::internal("a conversion lost its object"))
}

/// Whether any of the rules takes the request in, were it made in this row's version.
fn rules_match(rules: &[Value], kind: &Kind, ctx: &Context) -> bool {
    rules.iter().any(|r| {
        let has = |field: &str, word: &str| list(r, field).iter().any(|v| v == "*" || v == word);
        let scope = match text(r, "scope") {
            "Namespaced" => kind.namespaced(),
            "Cluster" => !kind.namespaced(),
            _ => true,
        };
        let resource = list(r, "resources").iter().filter_map(Value::as_str).any(|x| {
            let (res, sub) = x.split_once('/').unwrap_or((x, ""));
            (res == "*" || res == kind.resource) && ((sub == "*" && x != "*") || sub == ctx.subresource)
        });
        let names = list(r, "resourceNames");
        has("operations", ctx.operation.as_str())
            && has("apiGroups", &kind.group)
            && has("apiVersions", &kind.version)
            && scope
            && resource
            && (names.is_empty() || names.iter().any(|n| n == ctx.name.as_str()))
    })
}

/// The namespace of a request, as selectors and expressions see it.
pub async fn namespace_of(ctx: &Context) -> Result<Option<Value>, Status> {
    if ctx.namespace.is_empty() { Ok(None) } else { look(ctx, "", "namespaces", "", &ctx.namespace).await }
}

/// Whether namespace and object selectors take the request in.
pub fn selectors_match(
    holder: &Value,
    ctx: &Context,
    namespace: Option<&Value>,
    object: &Value,
    old: Option<&Value>,
) -> bool {
    let none = Value::Null;
    let labels = |o: &Value| o.pointer("/metadata/labels").cloned().unwrap_or_default();
    let by_namespace = holder.get("namespaceSelector").unwrap_or(&none);
    if !meta::selects_all(by_namespace) {
        // A namespace is selected by its own labels; other cluster-wide objects always are.
        let seen = if ctx.kind.is("", "namespaces") {
            Some(labels(if object.is_object() { object } else { old.unwrap_or(&none) }))
        } else {
            namespace.map(labels)
        };
        if seen.is_some_and(|l| !meta::selects(by_namespace, &l)) {
            return false;
        }
    }
    let by_object = holder.get("objectSelector").unwrap_or(&none);
    meta::selects_all(by_object)
        || [Some(object), old].into_iter().flatten().any(|o| o.is_object() && meta::selects(by_object, &labels(o)))
}

/// `AdmissionRequest` without the objects, for somebody whose rules name the objects in the version of `matched`.
pub fn request(ctx: &Context, matched: &Kind) -> Value {
    let body = |kind: &Kind| match kind.subresource(&ctx.subresource) {
        Some(s) if !s.kind.is_empty() => json!({"group": s.group, "version": s.version, "kind": s.kind}),
        _ => json!({"group": kind.group, "version": kind.version, "kind": kind.kind}),
    };
    let resource = |kind: &Kind| json!({"group": kind.group, "version": kind.version, "resource": kind.resource});
    let mut r = json!({
        "uid": uuid::Uuid::new_v4().to_string(),
        "kind": body(matched), "requestKind": body(&ctx.kind),
        "resource": resource(matched), "requestResource": resource(&ctx.kind),
        "operation": ctx.operation.as_str(),
        "userInfo": reviews::user_info(&ctx.user),
        "dryRun": ctx.dry_run,
        "options": ctx.options,
    });
    for (field, value) in [
        ("name", &ctx.name),
        ("namespace", &ctx.namespace),
        ("subResource", &ctx.subresource),
        ("requestSubResource", &ctx.subresource),
    ] {
        if !value.is_empty() {
            put(&mut r, field, value.as_str());
        }
    }
    if ctx.options.is_null() {
        drop(&mut r, "options");
    }
    r
}

/// Variables of every admission expression.
const VARIABLES: [&str; 7] = ["object", "oldObject", "request", "params", "namespaceObject", "authorizer", "variables"];

/// The program of an expression, compiled when first seen.
pub fn program(source: &str) -> Result<Arc<Program>, String> {
    type Cache = HashMap<String, Result<Arc<Program>, String>>;
    static PROGRAMS: Mutex<Option<Cache>> = Mutex::new(None);
    let mut guard = PROGRAMS.lock();
    let cache = guard.get_or_insert_with(HashMap::new);
    if let Some(known) = cache.get(source) {
        return known.clone();
    }
    let variables = VARIABLES.map(|name| Variable { name, schema: None });
    let made = Program::compile(source, &variables).map(Arc::new);
    if cache.len() >= PROGRAMS_MAX {
        cache.clear();
    }
    cache.insert(source.to_owned(), made.clone());
    made
}

/// The authoriser as expressions may ask it.
pub struct Asked<'a>(pub &'a Context);

impl cel::Authorizer for Asked<'_> {
    fn decide(&self, access: &Access) -> Verdict {
        let account;
        let user: &UserInfo = match &access.service_account {
            Some((namespace, name)) => {
                let all = format!("system:serviceaccounts:{namespace}");
                account = UserInfo::new(
                    format!("system:serviceaccount:{namespace}:{name}"),
                    &["system:serviceaccounts", &all],
                );
                &account
            }
            None => &self.0.user,
        };
        let request = Attributes {
            user,
            verb: &access.verb,
            is_resource: access.path.is_none(),
            group: &access.group,
            version: "*",
            resource: &access.resource,
            subresource: &access.subresource,
            namespace: &access.namespace,
            name: &access.name,
            path: access.path.as_deref().unwrap_or_default(),
        };
        match self.0.api.authorizer().authorize(&request) {
            Decision::Allow(reason) => Verdict { allowed: true, reason, error: None },
            Decision::Deny(reason) | Decision::NoOpinion(reason) => Verdict { allowed: false, reason, error: None },
        }
    }
}

/// What expressions of one request see.
pub struct Facts<'a> {
    pub ctx: &'a Context,
    pub request: Value,
    pub object: &'a Value,
    pub old: &'a Value,
    pub namespace: Value,
    pub params: Value,
}

impl<'a> Facts<'a> {
    /// A scope over the facts; the authoriser is given apart, as it must live as long.
    pub fn scope<'s>(&'s self, asked: &'s Asked<'s>) -> Scope<'s> {
        let mut scope = Scope::new();
        scope.json("object", self.object, None);
        scope.json("oldObject", self.old, None);
        scope.json("request", &self.request, None);
        scope.json("params", &self.params, None);
        scope.json("namespaceObject", &self.namespace, None);
        let request = Access {
            group: self.ctx.kind.group.clone(),
            resource: self.ctx.kind.resource.clone(),
            subresource: self.ctx.subresource.clone(),
            namespace: self.ctx.namespace.clone(),
            name: self.ctx.name.clone(),
            ..Access::default()
        };
        scope.authorizer(asked, request);
        scope
    }
}

/// Whether all match conditions hold: `Ok(false)` as soon as one says no, an error when one could not be told.
pub fn conditions_match(conditions: &[Value], facts: &Facts<'_>) -> Result<bool, String> {
    let mut failed = None;
    for c in conditions {
        let asked = Asked(facts.ctx);
        let outcome = program(text(c, "expression")).and_then(|p| {
            p.eval_bool(&facts.scope(&asked), &Budget::of_expression()).map_err(|e: CelError| e.to_string())
        });
        match outcome {
            Ok(true) => {}
            // One that says no decides, even if another failed.
            Ok(false) => return Ok(false),
            Err(why) => {
                failed = failed.or(Some(format!("expression '{}' resulted in error: {why}", text(c, "expression"))))
            }
        }
    }
    match failed {
        Some(why) => Err(why),
        None => Ok(true),
    }
}

/// Whether an operation carries an object that may be changed.
pub fn mutable(ctx: &Context) -> bool {
    matches!(ctx.operation, Operation::Create | Operation::Update)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_build_objects_and_patches() {
        let object = json!({"spec": {"replicas": 3}});
        let mut scope = Scope::new();
        scope.json("object", &object, None);
        let run = |source: &str| {
            let p = program(source).expect("compiles");
            let mut scope = Scope::new();
            scope.json("object", &object, None);
            p.eval(&scope, &Budget::of_expression()).expect("evaluates").to_json()
        };
        assert_eq!(
            run("Object{spec: Object.spec{replicas: object.spec.replicas + 1}}"),
            Some(json!({"spec": {"replicas": 4}}))
        );
        assert_eq!(
            run("[JSONPatch{op: \"add\", path: \"/metadata/labels/\" + jsonpatch.escapeKey(\"a/b\"), value: \"c\"}]"),
            Some(json!([{"op": "add", "path": "/metadata/labels/a~1b", "value": "c"}]))
        );
        assert!(program("object.spec.(").is_err());
    }
}
