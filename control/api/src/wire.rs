//! Bytes to values and back, by way of the schema engine.

use bytes::Bytes;
use coracle_schema::decode::{self as decoder, DecodeError, typed};
use coracle_schema::{Schema, protobuf};
use serde_json::{Value, json};

use crate::http::Format;
use crate::kinds::Kind;
use crate::status::Status;

/// Bytes of a body that an error message shows.
const SHOWN_BYTES: usize = 1024;

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

fn format(format: Format) -> decoder::Format {
    match format {
        Format::Json => decoder::Format::Json,
        Format::Yaml => decoder::Format::Yaml,
        Format::Protobuf => decoder::Format::Protobuf,
    }
}

/// Reads a body of any shape.
pub(crate) fn parse(bytes: &[u8], of: Format) -> Result<Decoded, String> {
    let decoded = decoder::parse(bytes, format(of)).map_err(|error| error.to_string())?;
    Ok(Decoded { value: decoded.value, strict: decoded.warnings })
}

/// Decodes a body that should hold an object of this kind.
pub(crate) fn decode(bytes: &[u8], of: Format, kind: &Kind) -> Result<Decoded, Status> {
    let unrecognised = |why: &str| {
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(SHOWN_BYTES)]);
        let hint = if of == Format::Json {
            format!("couldn't get version/kind; json parse error: {why} ({shown})")
        } else {
            why.to_owned()
        };
        Status::bad_request(format!("the object provided is unrecognized (must be of type {}): {hint}", kind.kind))
    };
    let parsed = decoder::parse(bytes, format(of)).map_err(|error| unrecognised(&error.to_string()))?;
    let (mut value, mut strict) = (parsed.value, parsed.warnings);
    if !value.is_object() {
        return Err(unrecognised("json: cannot unmarshal into Go value of type struct"));
    }
    // A body may leave its type out, the path says it (as typed Go clients do).
    if value.get("kind").and_then(Value::as_str).unwrap_or_default().is_empty() {
        if kind.crd.is_some() {
            let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(SHOWN_BYTES)]);
            return Err(Status::bad_request(format!("Object 'Kind' is missing in '{shown}'")));
        }
        value["kind"] = kind.kind.clone().into();
    }
    if value.get("apiVersion").and_then(Value::as_str).unwrap_or_default().is_empty() {
        value["apiVersion"] = kind.api_version().into();
    }
    let unknown = conform(&mut value, kind)?;
    if kind.crd.is_none() {
        decoder::skip_unknown(&mut strict, &unknown);
    }
    strict.extend(unknown);
    decoder::in_document_order(bytes, format(of), &mut strict);
    Ok(Decoded { value, strict })
}

/// Brings a value into the shape of its kind; returns unknown fields, which are dropped.
pub(crate) fn conform(value: &mut Value, kind: &Kind) -> Result<Vec<String>, Status> {
    let mut strict = Vec::new();
    match typed::conform(value, kind.schema(), &mut strict) {
        Ok(()) => Ok(strict),
        Err(DecodeError::Syntax(why) | DecodeError::Type(why)) => Err(Status::bad_request(format!(
            "{} in version {:?} cannot be handled as a {}: {why}",
            kind.kind, kind.version, kind.kind
        ))),
    }
}

/// Schema defaults. Those of built-in kinds are list keys only; their strategies do the rest.
pub(crate) fn default(kind: &Kind, object: &mut Value) {
    coracle_schema::default::default(object, kind.schema());
}

/// Fields that the type always writes.
pub(crate) fn fill(kind: &Kind, object: &mut Value) {
    if kind.crd.is_none() {
        typed::fill(object, kind.schema());
    }
}

/// Encodes a value for a client.
pub(crate) fn encode(value: &Value, format: Format, pretty: bool) -> Result<Bytes, Status> {
    match format {
        Format::Json if pretty => serde_json::to_vec_pretty(value).map(|mut text| {
            text.push(b'\n');
            text.into()
        }),
        Format::Json => serde_json::to_vec(value).map(Bytes::from),
        Format::Yaml => return serde_saphyr::to_string(value).map(Bytes::from).map_err(Status::internal),
        Format::Protobuf => return protobuf::encode(value).map(Bytes::from).map_err(Status::internal),
    }
    .map_err(Status::internal)
}

/// One event of a watch, framed as its format frames it.
pub(crate) fn watch_event(change: &str, object: &Value, format: Format) -> Result<Bytes, Status> {
    if format == Format::Protobuf {
        let object = protobuf::encode(object).map_err(Status::internal)?;
        return Ok(protobuf::watch_frame(change, &object).into());
    }
    let mut frame = serde_json::to_vec(&json!({"type": change, "object": object})).map_err(Status::internal)?;
    frame.push(b'\n');
    Ok(frame.into())
}

/// The schema of a built-in definition; anything goes for one that nobody knows.
pub(crate) fn builtin_schema(name: &str) -> std::sync::Arc<Schema> {
    Schema::builtin(name).unwrap_or_else(|| std::sync::Arc::new(Schema::of(coracle_schema::Kind::Any)))
}
