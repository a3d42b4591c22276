//! Kubernetes' protobuf encoding, both ways between bytes and JSON values, driven by the type table.
//!
//! An object on the wire is the four bytes `k8s\0` and a `runtime.Unknown` (type meta, raw message, encodings). The messages are
//! proto2 as the API's Go types generate them: scalars that are no pointers are always written, pointers when set, lists and
//! maps when not empty. No generated code: the field numbers stand in the type table.

mod list;
mod read;
pub(crate) mod wire;
mod write;

use serde_json::Value;

use crate::decode::typed;
use crate::schema::{Schema, definition_for};

pub use list::List;
pub use write::message;

/// First bytes of every enveloped object.
pub const MAGIC: [u8; 4] = *b"k8s\0";
/// Media type of enveloped objects.
pub const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";

/// Why bytes are no object, or an object has no protobuf form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtobufError {
    #[error("provided data does not appear to be a protobuf message, expected prefix [107 56 115 0]")]
    Magic,
    #[error("proto: {0}")]
    Malformed(&'static str),
    #[error("no kind \"{kind}\" is registered for version \"{api_version}\"")]
    UnknownKind { api_version: String, kind: String },
    #[error("Object 'Kind' is missing")]
    NoKind,
    #[error("{0}")]
    Value(String),
}

/// Encodes an object of a built-in kind, found by its `apiVersion` and `kind`, with the envelope.
pub fn encode(value: &Value) -> Result<Vec<u8>, ProtobufError> {
    let text = |name| value.get(name).and_then(Value::as_str).unwrap_or("");
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    let schema = schema_for(api_version, kind)?;
    Ok(envelope(api_version, kind, |out| write::message_into(out, value, &schema)))
}

/// Decodes an enveloped object of a built-in kind; `apiVersion` and `kind` are set from the envelope.
pub fn decode(bytes: &[u8]) -> Result<Value, ProtobufError> {
    decode_nested(bytes, 0)
}

/// [`decode`] inside a message that is already `depth` levels deep.
fn decode_nested(bytes: &[u8], depth: usize) -> Result<Value, ProtobufError> {
    let unknown = open(bytes)?;
    if unknown.kind.is_empty() {
        return Err(ProtobufError::NoKind);
    }
    let schema = schema_for(unknown.api_version, unknown.kind)?;
    decode_as(&unknown, &schema, depth)
}

/// Decodes an enveloped object as `schema`; an envelope without type meta is accepted.
pub fn decode_into(bytes: &[u8], schema: &Schema) -> Result<Value, ProtobufError> {
    decode_as(&open(bytes)?, schema, 0)
}

fn decode_as(unknown: &Unknown<'_>, schema: &Schema, depth: usize) -> Result<Value, ProtobufError> {
    let mut value = if unknown.content_type == "application/json" {
        serde_json::from_slice(unknown.raw).map_err(|_| ProtobufError::Malformed("cannot parse the JSON inside"))?
    } else {
        read::message(unknown.raw, schema, depth)?
    };
    typed::conform(&mut value, schema, &mut Vec::new()).map_err(|error| ProtobufError::Value(error.to_string()))?;
    if let Value::Object(map) = &mut value {
        for (name, text) in [("apiVersion", unknown.api_version), ("kind", unknown.kind)] {
            if !text.is_empty() {
                map.insert(name.into(), text.into());
            }
        }
    }
    Ok(value)
}

/// The schema of a kind that has a wire form.
pub fn schema_for(api_version: &str, kind: &str) -> Result<std::sync::Arc<Schema>, ProtobufError> {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    definition_for(group, version, kind)
        .and_then(Schema::builtin)
        .filter(|schema| !schema.wire.is_empty())
        .ok_or_else(|| ProtobufError::UnknownKind { api_version: api_version.into(), kind: kind.into() })
}

/// Wraps what `write` appends as the raw message of an envelope.
pub fn envelope(api_version: &str, kind: &str, write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    wire::nested(&mut out, 1, |out| {
        wire::bytes(out, 1, api_version.as_bytes());
        wire::bytes(out, 2, kind.as_bytes());
    });
    wire::nested(&mut out, 2, write);
    wire::bytes(&mut out, 3, b"");
    wire::bytes(&mut out, 4, b"");
    out
}

/// One frame of a protobuf watch: four bytes of length, then a bare `WatchEvent` that holds the enveloped `object`.
pub fn watch_frame(event: &str, object: &[u8]) -> Vec<u8> {
    let mut out = vec![0; 4];
    wire::bytes(&mut out, 1, event.as_bytes());
    wire::nested(&mut out, 2, |out| wire::bytes(out, 1, object));
    let length = u32::try_from(out.len() - 4).expect("an object is far below 4 GiB");
    out[..4].copy_from_slice(&length.to_be_bytes());
    out
}

/// An opened envelope.
#[derive(Debug)]
pub struct Unknown<'a> {
    pub api_version: &'a str,
    pub kind: &'a str,
    pub raw: &'a [u8],
    pub content_type: &'a str,
}

/// Reads an envelope.
pub fn open(bytes: &[u8]) -> Result<Unknown<'_>, ProtobufError> {
    let body = bytes.strip_prefix(&MAGIC).ok_or(ProtobufError::Magic)?;
    let mut unknown = Unknown { api_version: "", kind: "", raw: &[], content_type: "" };
    wire::each(body, |number, content| {
        match number {
            1 => wire::each(content.bytes()?, |number, content| {
                match number {
                    1 => unknown.api_version = content.text()?,
                    2 => unknown.kind = content.text()?,
                    _ => {}
                }
                Ok(())
            })?,
            2 => unknown.raw = content.bytes()?,
            4 => unknown.content_type = content.text()?,
            _ => {}
        }
        Ok(())
    })?;
    Ok(unknown)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn round(value: Value) {
        let bytes = encode(&value).expect("encodes");
        assert_eq!(decode(&bytes).expect("decodes"), value);
    }

    #[test]
    fn objects_survive_the_round_trip() {
        round(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "a", "labels": {"x": "y"}, "creationTimestamp": "2026-01-02T03:04:05Z", "generation": 3,
                "managedFields": [{"manager": "m", "operation": "Update", "fieldsV1": {"f:spec": {}}}]},
            "spec": {
                "volumes": [{"name": "v", "configMap": {"name": "c", "defaultMode": 420}}],
                "containers": [{"name": "c", "image": "i", "resources": {"limits": {"cpu": "500m"}},
                    "livenessProbe": {"httpGet": {"port": "http"}, "initialDelaySeconds": 1},
                    "readinessProbe": {"tcpSocket": {"port": 80}}}],
                "terminationGracePeriodSeconds": 0, "securityContext": {"supplementalGroups": [1, -2]}
            },
            "status": {"phase": "Running"}
        }));
        round(json!({"apiVersion": "v1", "kind": "Secret", "metadata": {}, "data": {"a": "AAE=", "b": ""}}));
        round(
            json!({
                "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {},
                "spec": {"group": "g", "names": {"kind": "K", "plural": "ks"}, "scope": "Namespaced", "versions": [{
                    "name": "v1", "served": true, "storage": false, "schema": {"openAPIV3Schema": {
                        "type": "object", "default": {"a": [1]}, "minimum": 1.5, "maximum": 3,
                        "properties": {"a": {"type": "array", "items": {"type": "string"}}},
                        "additionalProperties": false
                    }}
                }]},
                "status": {"conditions": null, "acceptedNames": {"kind": "", "plural": ""}, "storedVersions": null}
            })
            .as_object()
            .map(|o| {
                let mut o = o.clone();
                o.remove("status");
                o.insert("status".into(), json!({"acceptedNames": {"kind": "", "plural": ""}}));
                Value::Object(o)
            })
            .expect("object"),
        );
        round(json!({
            "apiVersion": "v1", "kind": "ConfigMapList", "metadata": {"resourceVersion": "1"},
            "items": [{"metadata": {"name": "x"}, "data": {"a": "b"}}]
        }));
        round(json!({"apiVersion": "v1", "kind": "Status", "metadata": {}, "code": 404, "status": "Failure"}));
        for version in ["policy/v1", "autoscaling/v2"] {
            round(json!({"apiVersion": version, "kind": "DeleteOptions", "gracePeriodSeconds": 0}));
        }
        round(json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "metadata": {}, "spec": {},
            "status": {"user": {"username": "u", "extra": {"k": ["a", "b"]}}}
        }));
    }

    #[test]
    fn bytes_are_gos() {
        // What a Go client sends for a ConfigMap named "a" with one datum.
        let value = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"k": "v"}});
        let bytes = encode(&value).expect("encodes");
        let head = b"k8s\0\x0a\x0f\x0a\x02v1\x12\x09ConfigMap\x12";
        assert_eq!(&bytes[..head.len()], head);
        // metadata: name, generateName, namespace, selfLink, uid, resourceVersion, generation, creationTimestamp are always there
        let meta = b"\x0a\x11\x0a\x01a\x12\x00\x1a\x00\x22\x00\x2a\x00\x32\x00\x38\x00\x42\x00";
        let at = head.len() + 1;
        assert_eq!(&bytes[at..at + meta.len()], meta);
        assert_eq!(&bytes[at + meta.len()..], b"\x12\x06\x0a\x01k\x12\x01v\x1a\x00\x22\x00");
    }

    #[test]
    fn garbage_is_refused() {
        assert_eq!(decode(b"{}"), Err(ProtobufError::Magic));
        assert!(decode(b"k8s\0\xff\xff\xff").is_err());
        assert!(decode(b"k8s\0").is_err());
        let bytes = encode(&json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "abc"}})).expect("encodes");
        for end in 0..bytes.len() {
            let _ = decode(&bytes[..end]);
        }
    }
}
