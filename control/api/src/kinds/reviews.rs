//! Reviews: questions about users and permissions, answered at once and never stored.

use std::collections::BTreeMap;

use coracle_schema::FieldError;
use serde_json::{Value, json};

use crate::authz::{Attributes, Decision};
use crate::context::Context;
use crate::kinds::edit::{child, list, put, text};
use crate::kinds::row::Row;
use crate::status::Status;
use crate::user::UserInfo;

const AUTHZ: &str = "authorization.k8s.io";
const AUTHN: &str = "authentication.k8s.io";

pub static ROWS: &[Row] = &[
    Row {
        group: AUTHZ,
        resource: "selfsubjectaccessreviews",
        answer: Some(|ctx, o| Box::pin(async move { access(ctx, o, Who::Me) })),
        ..Row::BASE
    },
    Row {
        group: AUTHZ,
        resource: "subjectaccessreviews",
        answer: Some(|ctx, o| Box::pin(async move { access(ctx, o, Who::Named) })),
        ..Row::BASE
    },
    Row {
        group: AUTHZ,
        resource: "localsubjectaccessreviews",
        answer: Some(|ctx, o| Box::pin(async move { access(ctx, o, Who::NamedHere) })),
        ..Row::BASE
    },
    Row {
        group: AUTHZ,
        resource: "selfsubjectrulesreviews",
        answer: Some(|ctx, o| Box::pin(async move { rules(ctx, o) })),
        ..Row::BASE
    },
    Row {
        group: AUTHN,
        resource: "selfsubjectreviews",
        answer: Some(|ctx, mut o| {
            Box::pin(async move {
                put(&mut o, "status", json!({"userInfo": user_info(&ctx.user)}));
                Ok(o)
            })
        }),
        ..Row::BASE
    },
];

/// `authentication.k8s.io/v1` UserInfo.
pub fn user_info(user: &UserInfo) -> Value {
    let mut out = json!({"username": user.name, "groups": user.groups});
    if !user.uid.is_empty() {
        put(&mut out, "uid", user.uid.clone());
    }
    if !user.extra.is_empty() {
        put(&mut out, "extra", json!(user.extra));
    }
    out
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    Me,
    Named,
    NamedHere,
}

fn strings(v: &Value, field: &str) -> Vec<String> {
    list(v, field).iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn access(ctx: &Context, mut o: Value, who: Who) -> Result<Value, Status> {
    let spec = o.get("spec").cloned().unwrap_or_default();
    let (resource, other) = (spec.get("resourceAttributes"), spec.get("nonResourceAttributes"));
    let mut errors = Vec::new();
    match (resource, other) {
        (Some(_), Some(_)) => errors.push(FieldError::invalid(
            "spec.nonResourceAttributes",
            other.cloned().unwrap_or_default(),
            "cannot be specified in combination with resourceAttributes",
        )),
        (None, None) => errors.push(FieldError::invalid(
            "spec.resourceAttributes",
            Value::Null,
            "exactly one of nonResourceAttributes or resourceAttributes must be specified",
        )),
        _ => {}
    }
    if who != Who::Me && text(&spec, "user").is_empty() && list(&spec, "groups").is_empty() {
        errors.push(FieldError::invalid("spec.user", "", "at least one of user or group must be specified"));
    }
    if who == Who::NamedHere {
        let ns = resource.map(|r| text(r, "namespace")).unwrap_or_default();
        if ns != ctx.namespace {
            errors.push(FieldError::invalid("spec.resourceAttributes.namespace", ns, "must match metadata.namespace"));
        }
        if other.is_some() {
            errors.push(FieldError::invalid(
                "spec.nonResourceAttributes",
                other.cloned().unwrap_or_default(),
                "disallowed on this kind of request",
            ));
        }
    }
    if !errors.is_empty() {
        return Err(Status::invalid(&ctx.kind, "", &errors));
    }
    let user = match who {
        Who::Me => (*ctx.user).clone(),
        _ => UserInfo {
            name: text(&spec, "user").to_owned(),
            uid: text(&spec, "uid").to_owned(),
            groups: strings(&spec, "groups"),
            extra: spec
                .get("extra")
                .and_then(Value::as_object)
                .into_iter()
                .flatten()
                .map(|(k, v)| {
                    (
                        k.clone(),
                        v.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect(),
                    )
                })
                .collect::<BTreeMap<_, Vec<String>>>(),
        },
    };
    let none = Value::Null;
    let (r, p) = (resource.unwrap_or(&none), other.unwrap_or(&none));
    let request = Attributes {
        user: &user,
        verb: if resource.is_some() { text(r, "verb") } else { text(p, "verb") },
        is_resource: resource.is_some(),
        group: text(r, "group"),
        version: text(r, "version"),
        resource: text(r, "resource"),
        subresource: text(r, "subresource"),
        namespace: text(r, "namespace"),
        name: text(r, "name"),
        path: text(p, "path"),
    };
    let (allowed, denied, reason) = match ctx.api.authorizer().authorize(&request) {
        Decision::Allow(why) => (true, false, why),
        Decision::Deny(why) => (false, true, why),
        Decision::NoOpinion(why) => (false, false, why),
    };
    let status = child(&mut o, "status");
    *status = json!({"allowed": allowed});
    if denied {
        put(status, "denied", true);
    }
    if !reason.is_empty() {
        put(status, "reason", reason);
    }
    Ok(o)
}

fn rules(ctx: &Context, mut o: Value) -> Result<Value, Status> {
    let namespace = o.pointer("/spec/namespace").and_then(Value::as_str).unwrap_or_default().to_owned();
    if namespace.is_empty() {
        return Err(Status::bad_request("no namespace on request"));
    }
    let (mut resources, mut paths) = (Vec::new(), Vec::new());
    if ctx.user.is_in(crate::user::SYSTEM_MASTERS) {
        resources.push(json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}));
        paths.push(json!({"verbs": ["*"], "nonResourceURLs": ["*"]}));
    }
    for rule in ctx.api.authorizer().rules_for(&ctx.user, &namespace) {
        if rule.urls.is_empty() {
            let mut r = json!({"verbs": rule.verbs, "apiGroups": rule.groups, "resources": rule.resources});
            if !rule.names.is_empty() {
                put(&mut r, "resourceNames", json!(rule.names));
            }
            resources.push(r);
        } else {
            paths.push(json!({"verbs": rule.verbs, "nonResourceURLs": rule.urls}));
        }
    }
    put(&mut o, "status", json!({"resourceRules": resources, "nonResourceRules": paths, "incomplete": false}));
    Ok(o)
}
