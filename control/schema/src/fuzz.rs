//! Entry points for fuzzers: each takes any bytes, and must neither panic nor take unbounded time or memory.

use serde_json::Value;

use crate::decode::{self, Format};
use crate::error::Path;
use crate::schema::Schema;
use crate::{apply, cel, default, patch, protobuf, validate};

const POD: &str = "io.k8s.api.core.v1.Pod";
const DEFINITION: &str = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.CustomResourceDefinition";

/// An object body as JSON, YAML or protobuf, by its first bytes; what decodes must survive the protobuf round trip.
pub fn object(bytes: &[u8]) {
    for name in [POD, DEFINITION] {
        let Some(schema) = Schema::builtin(name) else { return };
        let Ok(decoded) = decode::decode(bytes, decode::sniff(bytes), &schema) else { continue };
        let mut value = decoded.value;
        decode::typed::fill(&mut value, &schema);
        let wire = protobuf::message(&value, &schema);
        let enveloped = protobuf::envelope("", "", |out| out.extend_from_slice(&wire));
        let _ = protobuf::decode_into(&enveloped, &schema);
    }
}

/// Two JSON documents, one a line: an object and a patch of every kind.
pub fn patches(bytes: &[u8]) {
    let Some((object, change)) = split(bytes) else { return };
    let Some(schema) = Schema::builtin(POD) else { return };
    let _ = patch::json::apply(&mut object.clone(), change.to_string().as_bytes());
    patch::merge::apply(&mut object.clone(), &change);
    let _ = patch::strategic::apply(&mut object.clone(), change, &schema);
}

/// Two JSON documents, one a line: a live object and a configuration that is applied to it.
pub fn applies(bytes: &[u8]) {
    let Some((live, config)) = split(bytes) else { return };
    let Some(schema) = Schema::builtin(POD) else { return };
    let request = apply::Request {
        schema: &schema,
        api_version: "v1",
        subresource: "",
        manager: "fuzz",
        now: "2026-01-01T00:00:00Z",
        reset: &[&["status"]],
        convert: None,
    };
    let Ok(applied) = apply::apply(&live, &config, true, &request) else { return };
    let mut new = applied.value.clone();
    apply::track_update(Some(&live), &mut new, &request);
    // What was just applied is applied again without a change.
    if let Ok(again) = apply::apply(&applied.value, &config, false, &request) {
        assert!(!again.changed, "applying twice changed {} to {}", applied.value, again.value);
    }
}

/// Two JSON documents, one a line: a structural schema and an object of it.
pub fn custom(bytes: &[u8]) {
    let Some((schema, mut object)) = split(bytes) else { return };
    let Ok(schema) = Schema::from_openapi(&schema, &Path::root()) else { return };
    let mut warnings = Vec::new();
    if decode::typed::conform(&mut object, &schema, &mut warnings).is_ok() {
        default::default(&mut object, &schema);
        let _ = validate::validate(&object, None, &schema);
    }
}

/// A CEL expression over a small object.
pub fn expression(bytes: &[u8]) {
    let Ok(source) = std::str::from_utf8(bytes) else { return };
    let object = serde_json::json!({"a": [1, 2, 3], "m": {"x": "y"}, "s": "text", "n": 1.5});
    let Ok(program) = cel::Program::compile(source, &[cel::Variable { name: "self", schema: None }]) else { return };
    let mut scope = cel::Scope::new();
    scope.json("self", &object, None);
    let _ = program.eval(&scope, &cel::Budget::of_expression());
}

fn split(bytes: &[u8]) -> Option<(Value, Value)> {
    let at = bytes.iter().position(|byte| *byte == b'\n')?;
    let read = |part: &[u8]| decode::parse(part, Format::Json).ok().map(|decoded| decoded.value);
    Some((read(&bytes[..at])?, read(&bytes[at + 1..])?))
}
