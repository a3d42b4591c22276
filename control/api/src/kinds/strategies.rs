//! Which strategy a built-in resource has.

use std::sync::Arc;

use crate::kinds::{Generic, Strategy};

/// The strategy of a built-in resource.
pub(crate) fn strategy(_group: &str, _resource: &str) -> Arc<dyn Strategy> {
    Arc::new(Generic)
}
