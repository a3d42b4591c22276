//! JSON merge patch, RFC 7396.

use serde_json::Value;

/// Merges `patch` into `object`: `null` removes a field, objects merge, all else replaces.
pub fn apply(object: &mut Value, patch: &Value) {
    json_patch::merge(object, patch);
}
