//! A plugin as a row of a table: its name, what it looks at, and what it does in either phase.

use async_trait::async_trait;
use futures::future::BoxFuture;
use serde_json::Value;

use crate::admission::Admission;
use crate::context::{Context, Operation};
use crate::status::Status;

/// Mutating phase: request, object, old object.
pub type Admit = for<'a> fn(&'a Context, &'a mut Value, Option<&'a Value>) -> BoxFuture<'a, Result<(), Status>>;
/// Validating phase.
pub type Check = for<'a> fn(&'a Context, &'a Value, Option<&'a Value>) -> BoxFuture<'a, Result<(), Status>>;

/// One plugin.
pub struct Plugin {
    pub name: &'static str,
    pub handles: fn(&Context) -> bool,
    pub admit: Option<Admit>,
    pub validate: Option<Check>,
}

/// The wrapper that makes a row a plugin.
pub struct Rowed(pub &'static Plugin);

#[async_trait]
impl Admission for Rowed {
    fn name(&self) -> &'static str {
        self.0.name
    }

    fn handles(&self, ctx: &Context) -> bool {
        (self.0.handles)(ctx)
    }

    async fn admit(&self, ctx: &Context, object: &mut Value, old: Option<&Value>) -> Result<(), Status> {
        match self.0.admit {
            Some(f) => f(ctx, object, old).await,
            None => Ok(()),
        }
    }

    async fn validate(&self, ctx: &Context, object: &Value, old: Option<&Value>) -> Result<(), Status> {
        match self.0.validate {
            Some(f) => f(ctx, object, old).await,
            None => Ok(()),
        }
    }
}

/// A pod that is created.
pub fn new_pod(ctx: &Context) -> bool {
    ctx.operation == Operation::Create && ctx.is_object_of("", "pods")
}

/// Any object of a resource that is created.
pub fn creates(ctx: &Context, group: &str, resource: &str) -> bool {
    ctx.operation == Operation::Create && ctx.is_object_of(group, resource)
}

/// 403 about the object at hand.
pub fn forbid(ctx: &Context, object: &Value, why: impl std::fmt::Display) -> Status {
    let name = match ctx.name.as_str() {
        "" => crate::object::name(object),
        n => n,
    };
    Status::forbidden(&ctx.kind, name, why)
}

/// Another object, read from the store.
pub async fn look(
    ctx: &Context,
    group: &str,
    resource: &str,
    namespace: &str,
    name: &str,
) -> Result<Option<Value>, Status> {
    match stored_kind(ctx, group, resource) {
        Some(kind) => ctx.api.get(&kind, namespace, name).await,
        None => Ok(None),
    }
}

/// All objects of a resource in a namespace.
pub async fn look_all(ctx: &Context, group: &str, resource: &str, namespace: &str) -> Result<Vec<Value>, Status> {
    match stored_kind(ctx, group, resource) {
        Some(kind) => ctx.api.list(&kind, namespace).await,
        None => Ok(Vec::new()),
    }
}

fn stored_kind(ctx: &Context, group: &str, resource: &str) -> Option<std::sync::Arc<crate::kinds::Kind>> {
    let version = if group == "autoscaling" { "v2" } else { "v1" };
    ctx.api.kind(group, version, resource)
}
