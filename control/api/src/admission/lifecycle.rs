//! NamespaceLifecycle: nothing is made in a namespace that is not there or is going.

use serde_json::Value;

use crate::admission::plugin::{Plugin, forbid, look};
use crate::context::{Context, Operation};
use crate::status::{Cause, Status};

/// Namespaces that may not be deleted.
const IMMORTAL: [&str; 3] = ["default", "kube-system", "kube-public"];

pub static PLUGIN: Plugin = Plugin {
    name: "NamespaceLifecycle",
    handles: |ctx| {
        let namespaces = ctx.kind.is("", "namespaces");
        match ctx.operation {
            Operation::Delete => namespaces && IMMORTAL.contains(&ctx.name.as_str()),
            Operation::Create => {
                !ctx.namespace.is_empty() && !namespaces && !ctx.kind.resource.ends_with("accessreviews")
            }
            _ => false,
        }
    },
    admit: Some(|ctx, object, _| Box::pin(async move { check(ctx, object).await })),
    validate: Some(|ctx, object, _| Box::pin(async move { check(ctx, object).await })),
};

async fn check(ctx: &Context, object: &Value) -> Result<(), Status> {
    if ctx.operation == Operation::Delete {
        return Err(forbid(ctx, object, "this namespace may not be deleted"));
    }
    let Some(ns) = look(ctx, "", "namespaces", "", &ctx.namespace).await? else {
        return Err(match ctx.api.kind("", "v1", "namespaces") {
            Some(kind) => Status::not_found(&kind, &ctx.namespace),
            None => Status::no_such_resource(),
        });
    };
    if ns.pointer("/status/phase").and_then(Value::as_str) != Some("Terminating") {
        return Ok(());
    }
    let at = &ctx.namespace;
    let mut status =
        forbid(ctx, object, format!("unable to create new content in namespace {at} because it is being terminated"));
    if let Some(details) = &mut status.details {
        details.causes.push(Cause {
            reason: "NamespaceTerminating".into(),
            message: format!("namespace {at} is being terminated"),
            field: "metadata.namespace".into(),
        });
    }
    Err(status)
}
