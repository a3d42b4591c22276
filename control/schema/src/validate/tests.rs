use super::*;
use crate::decode::{Format, decode};
use crate::default::default;
use serde_json::json;

fn schema(json: Value) -> std::sync::Arc<Schema> {
    Schema::from_openapi(&json, &Path::root()).unwrap_or_else(|errors| panic!("{}", crate::aggregate(&errors)))
}

fn lines(value: Value, old: Option<Value>, schema: &Schema) -> Vec<String> {
    validate(&value, old.as_ref(), schema).iter().map(ToString::to_string).collect()
}

fn foo() -> std::sync::Arc<Schema> {
    schema(json!({"type": "object", "properties": {"spec": {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 1, "default": 3}, "s": {"type": "string", "enum": ["a", "b"]}},
        "x-kubernetes-validations": [{"rule": "!has(self.s) || self.n < 10", "message": "too big"}]
    }}}))
}

#[test]
fn a_custom_resource_as_recorded_from_a_server() {
    let schema = foo();
    let mut value =
        json!({"apiVersion": "golden.io/v1", "kind": "Foo", "metadata": {"name": "f1"}, "spec": {"s": "a"}});
    default(&mut value, &schema);
    assert_eq!(value["spec"], json!({"n": 3, "s": "a"}));
    assert_eq!(lines(value, None, &schema), [""; 0]);
    assert_eq!(
        lines(json!({"spec": {"n": 0, "s": "a"}}), None, &schema),
        ["spec.n: Invalid value: 0: spec.n in body should be greater than or equal to 1"]
    );
    assert_eq!(lines(json!({"spec": {"n": 11, "s": "a"}}), None, &schema), ["spec: Invalid value: too big"]);
    assert_eq!(
        lines(json!({"spec": {"n": "x", "s": "c"}}), None, &schema),
        [
            "spec.n: Invalid value: \"string\": spec.n in body must be of type integer: \"string\"",
            "spec.s: Unsupported value: \"c\": supported values: \"a\", \"b\""
        ]
    );
}

#[test]
fn pruning_names_what_it_drops() {
    let schema = schema(json!({"type": "object", "properties": {
        "spec": {"type": "object", "properties": {"l": {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string"}}}},
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}
    }}));
    let body = json!({"apiVersion": "a/v1", "kind": "A", "metadata": {"name": "x", "foo": 1},
        "spec": {"l": [{"a": "1", "b": 2}], "free": {"x": {"y": 1}}, "z": 1}, "status": {}});
    let decoded = decode(&serde_json::to_vec(&body).expect("encodes"), Format::Json, &schema).expect("decodes");
    assert_eq!(decoded.value["spec"], json!({"l": [{"a": "1"}], "free": {"x": {"y": 1}}}));
    assert_eq!(
        decoded.warnings,
        [
            "unknown field \"metadata.foo\"",
            "unknown field \"spec.l[0].b\"",
            "unknown field \"spec.z\"",
            "unknown field \"status\""
        ]
    );
}

#[test]
fn transitions_lists_and_combinations() {
    let schema = schema(json!({"type": "object", "properties": {
        "once": {"type": "string", "x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "is immutable", "reason": "FieldValueForbidden"}]},
        "items": {"type": "array", "maxItems": 3, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"], "items": {
            "type": "object", "required": ["k"], "properties": {"k": {"type": "string"}, "v": {"type": "integer"}},
            "x-kubernetes-validations": [{"rule": "self.v >= oldSelf.v", "messageExpression": "'shrank by ' + string(oldSelf.v - self.v)", "fieldPath": ".v"}]
        }},
        "port": {"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]},
        "set": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string", "maxLength": 3, "pattern": "^[a-z]+$"}},
        "one": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]}
    }}));
    let old = json!({"once": "a", "items": [{"k": "x", "v": 3}]});
    assert_eq!(lines(json!({"once": "b"}), Some(old.clone()), &schema), ["once: Forbidden: is immutable"]);
    assert_eq!(
        lines(json!({"once": "a", "items": [{"k": "y", "v": 0}, {"k": "x", "v": 1}]}), Some(old), &schema),
        ["items[1].v: Invalid value: shrank by 2"]
    );
    assert_eq!(
        lines(json!({"items": [{"k": "x"}, {"k": "x"}, {"v": 1}, {"k": "z"}]}), None, &schema),
        [
            "items: Too many: 4: must have at most 3 items",
            "items[2].k: Required value",
            "items[1]: Duplicate value: {\"k\":\"x\"}"
        ]
    );
    assert_eq!(
        lines(json!({"set": ["a", "a", "A", "abcd"]}), None, &schema),
        [
            "set[2]: Invalid value: \"A\": set[2] in body should match '^[a-z]+$'",
            "set[3]: Too long: may not be more than 3 bytes",
            "set[1]: Duplicate value: \"a\""
        ]
    );
    assert_eq!(lines(json!({"port": 1.5}), None, &schema).len(), 1);
    assert_eq!(lines(json!({"port": "http"}), None, &schema), [""; 0]);
    assert_eq!(
        lines(json!({"one": {"a": "1", "b": "2"}}), None, &schema),
        [
            "<nil>: Invalid value: \"\": \"one\" must validate one and only one schema (oneOf). Found 2 valid alternatives"
        ]
    );
}

#[test]
fn unstructural_schemas_are_refused() {
    let errors = |json: Value| -> Vec<String> {
        match Schema::from_openapi(&json, &Path::new("s")) {
            Ok(_) => Vec::new(),
            Err(errors) => errors.iter().map(ToString::to_string).collect(),
        }
    };
    assert_eq!(errors(json!({})), ["s.type: Required value: must not be empty at the root"]);
    assert_eq!(errors(json!({"type": "string"})), ["s.type: Invalid value: \"string\": must be object at the root"]);
    assert_eq!(
        errors(json!({"type": "object", "properties": {"a": {}, "b": {"type": "array"}}})),
        [
            "s.properties[a].type: Required value: must not be empty for specified object fields",
            "s.properties[b].items: Required value: must be specified"
        ]
    );
    let rule = |rule: &str| json!({"type": "object", "properties": {"a": {"type": "string"}}, "x-kubernetes-validations": [{"rule": rule}]});
    assert!(errors(rule("self.z == 'x'"))[0].contains("compilation failed: ERROR: <input>:1:5: undefined field 'z'"));
    assert!(errors(rule("self.a =="))[0].contains("Syntax error"));
    assert_eq!(errors(rule("self.a == 'x'")), [""; 0]);
    let nested = json!({"type": "object", "properties": {"l": {"type": "array", "items": {"type": "array", "items": {"type": "string",
        "x-kubernetes-validations": [{"rule": "self == 'x'"}]}}}}});
    assert!(errors(nested)[0].contains("exceeds budget by more than 100x"));
    assert!(
        errors(json!({"type": "object", "properties": {"a": {"type": "integer", "minimum": 3, "default": 1}}}))[0]
            .starts_with("s.properties[a].default: Invalid value: 1")
    );
}
