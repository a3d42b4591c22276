//! A strategic merge patch on a Deployment: two JSON documents with a zero byte between them. Merging never panics, and an
//! empty patch changes nothing.
#![no_main]

use coracle_schema::Schema;
use coracle_schema::patch;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some(at) = data.iter().position(|byte| *byte == 0) else { return };
    let (Ok(object), Ok(patch)) = (serde_json::from_slice(&data[..at]), serde_json::from_slice(&data[at + 1..])) else { return };
    let schema = Schema::builtin("io.k8s.api.apps.v1.Deployment").expect("a built-in kind");
    let _ = patch::strategic(&object, &patch, &schema);
    let unchanged = patch::strategic(&object, &serde_json::json!({}), &schema);
    assert!(unchanged.is_err() || unchanged.is_ok_and(|same| same == object), "an empty patch changed the object");
});
