//! A strategy as a row of a table: what a kind needs beyond the common behaviour, as plain functions.

use std::sync::OnceLock;

use async_trait::async_trait;
use coracle_schema::FieldError;
use futures::future::BoxFuture;
use serde_json::Value;

use crate::context::Context;
use crate::kinds::at::{At, Errs};
use crate::kinds::{FieldLabel, Finish, OnDelete, Strategy, edit, meta, names};
use crate::status::Status;

/// Sets something aside for an object, see [`Strategy::begin`].
pub type Begin =
    for<'a> fn(&'a Context, &'a mut Value, Option<&'a Value>) -> BoxFuture<'a, Result<Option<Box<dyn Finish>>, Status>>;
/// Answers a review, see [`Strategy::answer`].
pub type Answer = for<'a> fn(&'a Context, Value) -> BoxFuture<'a, Result<Value, Status>>;
/// Looks after what a deleted object held, see [`Strategy::deleted`].
pub type Gone = for<'a> fn(&'a Context, &'a Value) -> BoxFuture<'a, ()>;
/// Lists objects that are not stored.
pub type AnswerList = for<'a> fn(&'a Context) -> BoxFuture<'a, Result<Vec<Value>, Status>>;

/// One kind's behaviour. Fields that a row does not name keep the values of [`Row::BASE`].
pub struct Row {
    pub group: &'static str,
    pub resource: &'static str,
    /// Fills in defaults.
    pub default: fn(&mut Value),
    /// Prepares a new object; `status` has been reset before.
    pub create: fn(&Context, &mut Value),
    /// Prepares a changed object; `status` has been kept before.
    pub update: fn(&Context, &mut Value, &Value),
    /// Prepares an update through a subresource; returns false to have the common behaviour instead.
    pub subresource: fn(&Context, &mut Value, &Value) -> bool,
    /// Errors of an object.
    pub validate: fn(&At<'_>, &mut Errs),
    /// Errors of a change beyond those of the new object.
    pub change: fn(&At<'_>, &At<'_>, &mut Errs),
    /// Whether a changed object is checked like a new one, before `change`.
    pub whole_on_update: bool,
    /// Errors of an update through a subresource: name, new, old.
    pub sub_change: fn(&str, &At<'_>, &At<'_>, &mut Errs),
    /// Which names are allowed.
    pub name: names::Check,
    /// Members that `status` always has, as JSON; empty when the kind has no status.
    pub status: &'static str,
    /// Whether a new object keeps the status that it comes with, as nodes do that register themselves.
    pub born_with_status: bool,
    pub generation: bool,
    /// Whether a status update leaves all metadata alone; by default labels, annotations and the like may come with it.
    pub status_alone: bool,
    pub spec_changed: Option<fn(&Value, &Value) -> bool>,
    pub labels: &'static [FieldLabel],
    pub unconditional: bool,
    pub creates_on_update: bool,
    pub orphans: bool,
    pub warnings: fn(&Value, Option<&Value>) -> Vec<String>,
    pub begin: Option<Begin>,
    pub deleted: Option<Gone>,
    pub answer: Option<Answer>,
    pub answer_list: Option<AnswerList>,
    pub graceful: fn(&Context, &mut Value, Option<i64>) -> Option<i64>,
    /// Whether nulls inside mean something (raw JSON), so that they stay.
    pub raw: bool,
}

impl Row {
    pub const BASE: Row = Row {
        group: "",
        resource: "",
        default: |_| {},
        create: |_, _| {},
        update: |_, _, _| {},
        subresource: |_, _, _| false,
        validate: |_, _| {},
        change: |_, _, _| {},
        whole_on_update: true,
        sub_change: |_, _, _, _| {},
        name: names::dns1123_subdomain,
        status: "",
        born_with_status: false,
        generation: false,
        status_alone: false,
        spec_changed: None,
        labels: &[],
        unconditional: true,
        creates_on_update: false,
        orphans: false,
        warnings: |_, _| Vec::new(),
        begin: None,
        deleted: None,
        answer: None,
        answer_list: None,
        graceful: |_, _, _| None,
        raw: false,
    };

    fn initial_status(&self) -> Value {
        // The rows are literals of this crate; a test parses each.
        serde_json::from_str(self.status).unwrap_or_default()
    }

    /// Defaults without a request, for tests and for objects that the server itself makes.
    pub fn apply_defaults(&self, object: &mut Value) {
        if !self.raw {
            edit::drop_nulls(object);
        }
        if self.has_status() {
            let status = edit::child(object, "status");
            if let Value::Object(initial) = self.initial_status() {
                for (k, v) in initial {
                    edit::unset(status, &k, v);
                }
            }
        }
        (self.default)(object);
    }

    /// Errors of a new object.
    pub fn check(&self, object: &Value) -> Vec<FieldError> {
        let mut e = Errs::default();
        (self.validate)(&At::root(object), &mut e);
        e.0
    }

    /// Errors of a changed object.
    pub fn check_change(&self, new: &Value, old: &Value) -> Vec<FieldError> {
        let mut e = Errs::default();
        let (new, old) = (At::root(new), At::root(old));
        if self.whole_on_update {
            (self.validate)(&new, &mut e);
        }
        (self.change)(&new, &old, &mut e);
        e.0
    }
}

/// Keeps everything of `old` but status and metadata, which for most kinds may change together.
pub fn keep_all_but_status_and_metadata(new: &mut Value, old: &Value) {
    let given = std::mem::replace(new, old.clone());
    for field in ["metadata", "status"] {
        crate::object::copy(new, &given, field);
    }
}

/// The wrapper that makes a row a strategy.
pub struct Rowed(pub &'static Row);

#[async_trait]
impl Strategy for Rowed {
    fn default(&self, object: &mut Value) {
        self.0.apply_defaults(object);
    }

    fn prepare_create(&self, ctx: &Context, object: &mut Value) {
        if self.0.has_status() && !self.0.born_with_status {
            edit::put(object, "status", self.0.initial_status());
        }
        (self.0.create)(ctx, object);
    }

    fn prepare_update(&self, ctx: &Context, new: &mut Value, old: &Value) {
        if self.0.has_status() {
            crate::object::copy(new, old, "status");
        }
        (self.0.update)(ctx, new, old);
    }

    fn prepare_subresource(&self, ctx: &Context, new: &mut Value, old: &Value) {
        if (self.0.subresource)(ctx, new, old) || ctx.subresource != "status" {
            return;
        }
        if self.0.status_alone {
            crate::object::keep_all_but_status(new, old);
        } else {
            keep_all_but_status_and_metadata(new, old);
        }
    }

    fn validate(&self, ctx: &Context, object: &Value) -> Vec<FieldError> {
        let mut errors =
            if ctx.kind.stored() { meta::check(object, ctx.kind.namespaced(), self.0.name) } else { Vec::new() };
        errors.extend(meta::check_finalizers(self.0.group, object, None));
        errors.extend(self.0.check(object));
        errors
    }

    fn validate_update(&self, _ctx: &Context, new: &Value, old: &Value) -> Vec<FieldError> {
        let mut errors = meta::check_update(new, old);
        errors.extend(meta::check_finalizers(self.0.group, new, Some(old)));
        errors.extend(self.0.check_change(new, old));
        errors
    }

    fn validate_subresource(&self, ctx: &Context, new: &Value, old: &Value) -> Vec<FieldError> {
        let mut e = Errs::default();
        (self.0.sub_change)(&ctx.subresource, &At::root(new), &At::root(old), &mut e);
        e.0
    }

    fn warnings(&self, _ctx: &Context, new: &Value, old: Option<&Value>) -> Vec<String> {
        (self.0.warnings)(new, old)
    }

    async fn begin(
        &self,
        ctx: &Context,
        new: &mut Value,
        old: Option<&Value>,
    ) -> Result<Option<Box<dyn Finish>>, Status> {
        match self.0.begin {
            Some(begin) => begin(ctx, new, old).await,
            None => Ok(None),
        }
    }

    async fn deleted(&self, ctx: &Context, object: &Value) {
        if let Some(gone) = self.0.deleted {
            gone(ctx, object).await;
        }
    }

    async fn answer(&self, ctx: &Context, object: Value) -> Result<Value, Status> {
        match self.0.answer {
            Some(answer) => answer(ctx, object).await,
            None => Err(Status::method_not_allowed(&ctx.kind, "create")),
        }
    }

    async fn answer_list(&self, ctx: &Context) -> Result<Vec<Value>, Status> {
        match self.0.answer_list {
            Some(answer) => answer(ctx).await,
            None => Err(Status::method_not_allowed(&ctx.kind, "list")),
        }
    }

    fn graceful(&self, ctx: &Context, object: &mut Value, asked: Option<i64>) -> Option<i64> {
        (self.0.graceful)(ctx, object, asked)
    }

    fn on_delete(&self) -> OnDelete {
        if self.0.orphans { OnDelete::Orphan } else { OnDelete::Background }
    }

    fn has_status(&self) -> bool {
        self.0.has_status()
    }

    fn has_generation(&self) -> bool {
        self.0.generation
    }

    fn spec_changed(&self, new: &Value, old: &Value) -> bool {
        match self.0.spec_changed {
            Some(f) => f(new, old),
            None => crate::object::differs_outside(new, old, &["metadata", "status", "apiVersion", "kind"]),
        }
    }

    fn creates_on_update(&self) -> bool {
        self.0.creates_on_update
    }

    fn updates_unconditionally(&self) -> bool {
        self.0.unconditional
    }

    fn field_labels(&self) -> &'static [FieldLabel] {
        self.0.labels
    }
}

impl Row {
    pub fn has_status(&self) -> bool {
        !self.status.is_empty()
    }
}

/// The row of a built-in resource, if it has one.
pub fn find(group: &str, resource: &str) -> Option<&'static Row> {
    type Index = std::collections::HashMap<(&'static str, &'static str), &'static Row>;
    static INDEX: OnceLock<Index> = OnceLock::new();
    INDEX
        .get_or_init(|| {
            crate::kinds::table::ROWS.iter().copied().flatten().map(|r| ((r.group, r.resource), r)).collect()
        })
        .get(&(group, resource))
        .copied()
}
