//! What differs from kind to kind: defaults, preparation, validation, deletion, field labels.
//!
//! Source: `k8s.io/apiserver/pkg/registry/rest` (create, update, delete strategies). The order in which the generic
//! handlers call a strategy:
//!
//! - create: `default` → mutating admission → `begin` → `prepare_create` → `validate` → `canonicalize` → validating admission
//!   → store → `Finish::done(true)`
//! - update: `default` → mutating admission → `begin` → `prepare_update` → `validate_update` → `canonicalize` → validating
//!   admission → store → `Finish::done(true)`
//! - update of a subresource that writes the object (`status`, `resize`, …): the same with `prepare_subresource` and
//!   `validate_subresource`
//! - delete: validating admission → `graceful` → store → `deleted`
//!
//! Objects are JSON values in the row's version. Metadata that is the same for every kind (uid, times, generation, name
//! syntax, immutability) is done by the generic handlers.

use async_trait::async_trait;
use coracle_schema::FieldError;
use serde_json::Value;

use crate::context::Context;
use crate::status::Status;

/// Something to finish (or take back) after the store has answered, such as an address that was set aside.
#[async_trait]
pub trait Finish: Send {
    /// Called once: `stored` tells whether the object was written.
    async fn done(self: Box<Self>, stored: bool);
}

/// What deletion does with dependents when the request does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDelete {
    /// They are collected in the background.
    Background,
    /// They lose their owner and stay.
    Orphan,
}

/// A field that field selectors may name beside `metadata.name` and `metadata.namespace`: `("spec.nodeName", "/spec/nodeName")`,
/// label and JSON pointer. A missing value counts as the empty string.
pub type FieldLabel = (&'static str, &'static str);

/// What is special about a kind. Every method has the common behaviour as its default.
#[async_trait]
pub trait Strategy: Send + Sync + 'static {
    /// Fills in defaults that the schema's `default` keywords do not say (those are applied before).
    fn default(&self, _object: &mut Value) {}

    /// Clears what a client may not set on creation (status, above all) and derives fields.
    fn prepare_create(&self, _ctx: &Context, object: &mut Value) {
        if self.has_status() {
            crate::object::remove(object, "status");
        }
    }

    /// Keeps what a client may not change. The generic part has kept the metadata, and raises `generation` afterwards when
    /// `spec_changed` says so.
    fn prepare_update(&self, _ctx: &Context, new: &mut Value, old: &Value) {
        if self.has_status() {
            crate::object::copy(new, old, "status");
        }
    }

    /// The same for an update through a subresource. By default `status` may change the status and nothing else
    /// (metadata: labels, annotations, finalizers and owner references stay as they were, too, for built-in kinds).
    fn prepare_subresource(&self, ctx: &Context, new: &mut Value, old: &Value) {
        if ctx.subresource == "status" {
            crate::object::keep_all_but_status(new, old);
        }
    }

    /// Errors of a new object, beyond what the schema and the generic metadata checks find.
    fn validate(&self, _ctx: &Context, _object: &Value) -> Vec<FieldError> {
        Vec::new()
    }

    /// Errors of a changed object; includes everything that `validate` finds where that applies.
    fn validate_update(&self, ctx: &Context, new: &Value, _old: &Value) -> Vec<FieldError> {
        self.validate(ctx, new)
    }

    /// Errors of an update through a subresource (`ctx.subresource`).
    fn validate_subresource(&self, _ctx: &Context, _new: &Value, _old: &Value) -> Vec<FieldError> {
        Vec::new()
    }

    /// Normalises the object after validation.
    fn canonicalize(&self, _object: &mut Value) {}

    /// Sentences for `Warning` headers.
    fn warnings(&self, _ctx: &Context, _new: &Value, _old: Option<&Value>) -> Vec<String> {
        Vec::new()
    }

    /// Sets things aside before validation (service addresses, node ports); dropped without `done` it must give them back.
    async fn begin(
        &self,
        _ctx: &Context,
        _new: &mut Value,
        _old: Option<&Value>,
    ) -> Result<Option<Box<dyn Finish>>, Status> {
        Ok(None)
    }

    /// Called after an object has left the store.
    async fn deleted(&self, _ctx: &Context, _object: &Value) {}

    /// Answers a create on a kind that is not stored (reviews). The object has been decoded and defaulted.
    async fn answer(&self, ctx: &Context, _object: Value) -> Result<Value, Status> {
        Err(Status::method_not_allowed(&ctx.kind, "create"))
    }

    /// Answers the list of a kind that is not stored (component statuses).
    async fn answer_list(&self, ctx: &Context) -> Result<Vec<Value>, Status> {
        Err(Status::method_not_allowed(&ctx.kind, "list"))
    }

    /// Seconds that the object lives on after a delete, when the kind has graceful deletion (pods); `asked` is the request's
    /// `gracePeriodSeconds`. `None`: the object goes at once. May change the object (phase and so on).
    fn graceful(&self, _ctx: &Context, _object: &mut Value, _asked: Option<i64>) -> Option<i64> {
        None
    }

    /// What happens to dependents when the request does not say.
    fn on_delete(&self) -> OnDelete {
        OnDelete::Background
    }

    /// Whether the kind has a `status` that only the status subresource writes.
    fn has_status(&self) -> bool {
        true
    }

    /// Whether `metadata.generation` is kept (starts with 1 and rises with the spec).
    fn has_generation(&self) -> bool {
        true
    }

    /// Whether the change from `old` to `new` raises `metadata.generation`. By default: anything but metadata and status.
    fn spec_changed(&self, new: &Value, old: &Value) -> bool {
        crate::object::differs_outside(new, old, &["metadata", "status", "apiVersion", "kind"])
    }

    /// Whether PUT on a missing object creates it.
    fn creates_on_update(&self) -> bool {
        false
    }

    /// Whether PUT without a resourceVersion is taken.
    fn updates_unconditionally(&self) -> bool {
        true
    }

    /// Field selectors beside name and namespace.
    fn field_labels(&self) -> &'static [FieldLabel] {
        &[]
    }
}

/// The strategy of kinds with nothing special.
pub struct Generic;

impl Strategy for Generic {
    fn validate(&self, ctx: &Context, object: &Value) -> Vec<FieldError> {
        crate::kinds::meta::check(object, ctx.kind.namespaced(), crate::kinds::names::dns1123_subdomain)
    }

    fn validate_update(&self, _ctx: &Context, new: &Value, old: &Value) -> Vec<FieldError> {
        crate::kinds::meta::check_update(new, old)
    }
}
