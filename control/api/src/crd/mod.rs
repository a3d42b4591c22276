//! Custom resources: rows of the table that CustomResourceDefinitions make at run time.

use std::sync::Arc;

use coracle_schema::FieldError;
use serde_json::Value;

use crate::kinds::Kind;
use crate::server::ApiServer;
use crate::status::Status;

/// Takes in the definitions that exist and follows their changes.
pub(crate) async fn start(_api: &Arc<ApiServer>) -> Result<(), Status> {
    Ok(())
}

/// Fields that a custom resource's field selectors may name, such as `spec.color`.
pub(crate) fn selectable_fields(_kind: &Kind) -> Vec<String> {
    Vec::new()
}

/// `subresources.scale` of a custom resource's version.
pub(crate) fn scale(_kind: &Kind) -> Option<Value> {
    None
}

/// Errors by the schema of a custom resource; nothing for built-in kinds.
pub(crate) fn validate(_kind: &Kind, _new: &Value, _old: Option<&Value>) -> Vec<FieldError> {
    Vec::new()
}
