//! Conversions between the versions of built-in kinds that have two: events and horizontal pod autoscalers.

use std::sync::Arc;

use crate::kinds::Conversion;

/// The conversion of a built-in resource, `None` for those with one version.
pub(crate) fn builtin(_group: &str, _resource: &str) -> Option<Arc<dyn Conversion>> {
    None
}
