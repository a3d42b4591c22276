//! Bytes to values and back, by way of the schema engine.

use bytes::Bytes;
use serde_json::Value;

use crate::http::Format;
use crate::kinds::Kind;
use crate::status::Status;

/// An object of the store.
pub(crate) fn parse_stored(bytes: &[u8]) -> Result<Value, Status> {
    serde_json::from_slice(bytes).map_err(|error| Status::internal(format!("read a stored object: {error}")))
}

/// What a client sent.
pub(crate) struct Decoded {
    /// The object.
    pub(crate) value: Value,
    /// Unknown and duplicate fields: `unknown field "spec.x"`.
    pub(crate) strict: Vec<String>,
}

/// Format of a request body by its content type; `None` when it is none that the server reads.
pub(crate) fn format_of(content_type: &str) -> Option<Format> {
    match content_type.split(';').next().unwrap_or_default().trim() {
        "" | "application/json" | "*/*" => Some(Format::Json),
        "application/yaml" => Some(Format::Yaml),
        "application/vnd.kubernetes.protobuf" => Some(Format::Protobuf),
        _ => None,
    }
}

/// Decodes a body that should hold an object of this kind.
pub(crate) fn decode(bytes: &[u8], format: Format, kind: &Kind) -> Result<Decoded, Status> {
    let _ = (format, kind);
    let value = serde_json::from_slice(bytes).map_err(|error| {
        let shown = String::from_utf8_lossy(bytes);
        Status::bad_request(format!(
            "the object provided is unrecognized (must be of type {}): couldn't get version/kind; json parse error: {error} ({shown})",
            kind.kind
        ))
    })?;
    Ok(Decoded { value, strict: Vec::new() })
}

/// Encodes a value for a client.
pub(crate) fn encode(value: &Value, format: Format, pretty: bool) -> Result<Bytes, Status> {
    let encoded = match format {
        Format::Json if pretty => serde_json::to_vec_pretty(value),
        _ => serde_json::to_vec(value),
    };
    encoded.map(Bytes::from).map_err(Status::internal)
}

/// One event of a watch, framed as its format frames it.
pub(crate) fn watch_event(change: &str, object: &Value, format: Format) -> Result<Bytes, Status> {
    let _ = format;
    let mut frame = serde_json::to_vec(&serde_json::json!({"type": change, "object": object})).map_err(Status::internal)?;
    frame.push(b'\n');
    Ok(frame.into())
}
