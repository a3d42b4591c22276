//! Which strategy a built-in resource has.

use std::sync::Arc;

use crate::kinds::row::{self, Rowed};
use crate::kinds::{Generic, Strategy};

/// The strategy of a built-in resource.
pub(crate) fn strategy(group: &str, resource: &str) -> Arc<dyn Strategy> {
    match row::find(group, resource) {
        Some(row) => Arc::new(Rowed(row)),
        None => Arc::new(Generic),
    }
}
