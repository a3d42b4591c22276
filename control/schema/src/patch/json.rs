//! JSON patch, RFC 6902, as the API server takes it.

use json_patch::{PatchErrorKind, PatchOperation};
use serde_json::{Map, Value};

use super::PatchError;

/// Most operations a patch may hold.
pub const MAX_OPERATIONS: usize = 10_000;
/// Most bytes that `copy` operations may add in sum.
pub const MAX_COPIED_BYTES: usize = 3 << 20;

/// Applies the JSON patch in `patch` to `object`, which is left half-changed when an error is returned.
pub fn apply(object: &mut Value, patch: &[u8]) -> Result<(), PatchError> {
    let malformed = |error| PatchError::Malformed(format!("error decoding patch: {error}"));
    let mut operations: Vec<Map<String, Value>> = serde_json::from_slice(patch).map_err(malformed)?;
    // Clients written in Go leave an empty value out, which the API server takes as null.
    for operation in &mut operations {
        if operation.get("op").is_some_and(|op| op == "add" || op == "replace" || op == "test") {
            operation.entry("value").or_insert(Value::Null);
        }
    }
    let operations = operations.into_iter().map(|operation| serde_json::from_value(operation.into()));
    let operations: Vec<PatchOperation> = operations.collect::<Result<_, _>>().map_err(malformed)?;
    if operations.len() > MAX_OPERATIONS {
        let count = operations.len();
        let text = format!("The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {count}");
        return Err(PatchError::TooLarge(text));
    }
    let mut copied_bytes = 0;
    for operation in operations {
        if let PatchOperation::Copy(copy) = &operation {
            copied_bytes += object.pointer(copy.from.as_str()).map_or(0, |value| value.to_string().len());
            if copied_bytes > MAX_COPIED_BYTES {
                let text = format!(
                    "Unable to complete the copy, the accumulated size increase of copy is {copied_bytes}, exceeding the limit {MAX_COPIED_BYTES}"
                );
                return Err(PatchError::Failed(text));
            }
        }
        if absent_as_null(object, &operation) {
            continue;
        }
        let path = operation.path().to_string();
        let name = name(&operation);
        json_patch::patch_unsafe(object, &[operation]).map_err(|error| {
            PatchError::Failed(match error.kind {
                PatchErrorKind::TestFailed => format!("testing value {path} failed: test failed"),
                _ => format!("{name} operation does not apply: doc is missing path: {path}: missing value"),
            })
        })?;
    }
    Ok(())
}

/// Whether a test for null meets a field that is not there, which the API server takes as null: so do clients test that an
/// object has no finalizers yet.
fn absent_as_null(object: &Value, operation: &PatchOperation) -> bool {
    let PatchOperation::Test(test) = operation else { return false };
    let path = test.path.as_str();
    let parent = path.rsplit_once('/').and_then(|(parent, _)| object.pointer(parent));
    test.value.is_null() && object.pointer(path).is_none() && parent.is_some_and(Value::is_object)
}

const fn name(operation: &PatchOperation) -> &'static str {
    match operation {
        PatchOperation::Add(_) => "add",
        PatchOperation::Remove(_) => "remove",
        PatchOperation::Replace(_) => "replace",
        PatchOperation::Move(_) => "move",
        PatchOperation::Copy(_) => "copy",
        PatchOperation::Test(_) => "test",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn applies_and_names_what_failed() {
        let mut object = json!({"data": {"a": "b"}, "list": [1]});
        let patch = br#"[{"op":"add","path":"/data/z","value":"1"},{"op":"add","path":"/list/-","value":2}]"#;
        apply(&mut object, patch).expect("applies");
        assert_eq!(object, json!({"data": {"a": "b", "z": "1"}, "list": [1, 2]}));
        let failed = apply(&mut object, br#"[{"op":"test","path":"/data/z","value":"2"}]"#);
        assert_eq!(failed, Err(PatchError::Failed("testing value /data/z failed: test failed".into())));
        assert!(matches!(apply(&mut object, b"{}"), Err(PatchError::Malformed(_))));
        assert!(matches!(apply(&mut object, br#"[{"op":"remove","path":"/x"}]"#), Err(PatchError::Failed(_))));
    }

    #[test]
    fn a_field_that_is_not_there_tests_as_null() {
        let mut object = json!({"metadata": {}});
        let patch = br#"[{"op":"test","path":"/metadata/finalizers","value":null},{"op":"add","path":"/metadata/finalizers","value":["a"]}]"#;
        apply(&mut object, patch).expect("applies");
        assert_eq!(object, json!({"metadata": {"finalizers": ["a"]}}));
        assert!(apply(&mut object, patch).is_err(), "there are finalizers now");
        let nowhere = br#"[{"op":"test","path":"/spec/a","value":null}]"#;
        assert!(apply(&mut object, nowhere).is_err(), "not even its parent is there");
    }

    #[test]
    fn a_value_that_is_left_out_is_null() {
        let mut object = json!({"a": {}});
        apply(&mut object, br#"[{"op":"add","path":"/a/b"}]"#).expect("applies");
        assert_eq!(object, json!({"a": {"b": null}}));
        assert!(matches!(apply(&mut object, br#"[{"op":"move","path":"/a"}]"#), Err(PatchError::Malformed(_))));
    }

    #[test]
    fn copies_are_bounded() {
        let mut object = json!({"a": "x".repeat(1 << 20)});
        let copies: Vec<_> = (0..4).map(|i| json!({"op": "copy", "from": "/a", "path": format!("/b{i}")})).collect();
        let patch = serde_json::to_vec(&copies).expect("encodes");
        assert!(matches!(apply(&mut object, &patch), Err(PatchError::Failed(_))));
    }
}
