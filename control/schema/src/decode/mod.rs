//! From bytes to a checked value: syntax, depth, duplicate fields; then types and unknown fields by the schema.

pub mod scalar;
mod tree;
pub mod typed;

use serde_json::Value;

use crate::schema::Schema;

pub use tree::{MAX_DEPTH, MAX_NODES};

/// Encoding of a request body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    Yaml,
    Protobuf,
}

/// A decoded body and what strict decoding has to say about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    pub value: Value,
    /// `unknown field "spec.x"`, `duplicate field "spec.y"`: warnings, or one strict error, see [`strict_error`].
    pub warnings: Vec<String>,
}

/// Why a body cannot be decoded, in the server's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Not JSON or YAML at all: `unexpected end of JSON input`.
    #[error("{0}")]
    Syntax(String),
    /// A value of the wrong type: `json: cannot unmarshal string into Go struct field …`.
    #[error("{0}")]
    Type(String),
}

/// Most strict errors that are collected.
pub const MAX_STRICT_ERRORS: usize = 100;

/// Reads bytes into a value without a schema. Duplicate fields keep the last value and are reported.
pub fn parse(bytes: &[u8], format: Format) -> Result<Decoded, DecodeError> {
    match format {
        Format::Json => tree::json(bytes),
        Format::Yaml => tree::yaml(bytes),
        Format::Protobuf => {
            let value = crate::protobuf::decode(bytes).map_err(|error| DecodeError::Syntax(error.to_string()))?;
            Ok(Decoded { value, warnings: Vec::new() })
        }
    }
}

/// Reads bytes as an object of `schema`: wrong types are errors, unknown fields are dropped and reported.
pub fn decode(bytes: &[u8], format: Format, schema: &Schema) -> Result<Decoded, DecodeError> {
    let mut decoded = parse(bytes, format)?;
    let mut unknown = Vec::new();
    typed::conform(&mut decoded.value, schema, &mut unknown)?;
    skip_unknown(&mut decoded.warnings, &unknown);
    decoded.warnings.extend(unknown);
    in_document_order(bytes, format, &mut decoded.warnings);
    Ok(decoded)
}

/// Leaves out what parsing says of fields that the type does not know: they are skipped whole, so nothing in them counts as repeated.
pub fn skip_unknown(repeated: &mut Vec<String>, unknown: &[String]) {
    let unknown: Vec<&str> = unknown.iter().filter_map(|warning| field(warning, "unknown field ")).collect();
    repeated.retain(|warning| {
        let path = field(warning, "duplicate field ").unwrap_or_default();
        !unknown.iter().any(|skipped| {
            path.strip_prefix(skipped).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        })
    });
}

/// The path that a warning of this kind names.
fn field<'a>(warning: &'a str, kind: &str) -> Option<&'a str> {
    warning.strip_prefix(kind)?.strip_prefix('"')?.strip_suffix('"')
}

/// Puts the warnings of parsing and of conforming into the order in which the document has their fields.
pub fn in_document_order(bytes: &[u8], format: Format, warnings: &mut [String]) {
    if format == Format::Json && warnings.len() > 1 {
        tree::sort_by_place(bytes, warnings);
    }
}

/// The one error of strict field validation: `strict decoding error: unknown field "a", unknown field "b"`.
pub fn strict_error(warnings: &[String]) -> String {
    format!("strict decoding error: {}", warnings.join(", "))
}

/// JSON or YAML, by the first character that is not white space.
pub fn sniff(bytes: &[u8]) -> Format {
    match bytes.iter().find(|byte| !byte.is_ascii_whitespace()) {
        Some(b'{' | b'[') => Format::Json,
        _ if bytes.starts_with(b"k8s\0") => Format::Protobuf,
        _ => Format::Yaml,
    }
}

pub(crate) fn warn(warnings: &mut Vec<String>, text: impl FnOnce() -> String) {
    if warnings.len() < MAX_STRICT_ERRORS {
        warnings.push(text());
    }
}
