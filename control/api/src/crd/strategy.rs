//! The strategy of custom resources.

use coracle_schema::FieldError;
use serde_json::Value;

use crate::context::Context;
use crate::kinds::{Strategy, meta, names};
use crate::object;

/// The strategy of one definition's version.
pub(super) struct Custom {
    pub(super) has_status: bool,
    pub(super) namespaced: bool,
}

impl Strategy for Custom {
    fn prepare_subresource(&self, ctx: &Context, new: &mut Value, old: &Value) {
        if ctx.subresource == "status" {
            object::keep_all_but_status(new, old);
        }
    }

    fn validate(&self, _ctx: &Context, object: &Value) -> Vec<FieldError> {
        meta::check(object, self.namespaced, names::dns1123_subdomain)
    }

    fn validate_update(&self, _ctx: &Context, new: &Value, old: &Value) -> Vec<FieldError> {
        meta::check_update(new, old)
    }

    fn has_status(&self) -> bool {
        self.has_status
    }

    fn spec_changed(&self, new: &Value, old: &Value) -> bool {
        let ignored: &[&str] = if self.has_status {
            &["metadata", "status", "apiVersion", "kind"]
        } else {
            &["metadata", "apiVersion", "kind"]
        };
        object::differs_outside(new, old, ignored)
    }

    fn updates_unconditionally(&self) -> bool {
        false
    }
}
