//! Values to messages.

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use super::wire;
use crate::decode::scalar;
use crate::schema::{Field, Kind, Schema, SchemaRef, Slot};

static NULL: Value = Value::Null;

/// The message of `value` (an object of `schema`) without an envelope.
pub fn message(value: &Value, schema: &Schema) -> Vec<u8> {
    let mut out = Vec::new();
    message_into(&mut out, value, schema);
    out
}

pub(super) fn message_into(out: &mut Vec<u8>, value: &Value, schema: &Schema) {
    for wire in &schema.wire {
        match &wire.slot {
            // An embedded struct reads the same JSON object.
            Slot::Inline(inner) => wire::nested(out, wire.number, |out| message_into(out, value, inner.get())),
            Slot::Field(at) => {
                let field = &schema.fields[usize::from(*at)];
                field_into(out, wire.number, value.get(field.name.as_ref()).unwrap_or(&NULL), field);
            }
        }
    }
}

fn field_into(out: &mut Vec<u8>, number: u32, value: &Value, field: &Field) {
    let schema = field.schema.get();
    match (schema.kind, value) {
        (Kind::List, Value::Array(items)) => {
            let Some(inner) = schema.items.as_ref().map(SchemaRef::get) else {
                return;
            };
            items.iter().for_each(|item| one(out, number, item, inner));
        }
        (Kind::Object, Value::Object(map)) if schema.values.is_some() => {
            let Some(inner) = schema.values.as_ref().map(SchemaRef::get) else {
                return;
            };
            for (key, item) in map {
                wire::nested(out, number, |out| {
                    wire::bytes(out, 1, key.as_bytes());
                    one(out, 2, item, inner);
                });
            }
        }
        (Kind::List | Kind::StringList | Kind::Bytes, Value::Null) => {}
        (Kind::Object, Value::Null) if schema.values.is_some() => {}
        (_, Value::Null) if field.pointer => {}
        _ => one(out, number, value, schema),
    }
}

/// One value as one field; an absent one is written as its zero.
pub(super) fn one(out: &mut Vec<u8>, number: u32, value: &Value, schema: &Schema) {
    match schema.kind {
        Kind::Object => wire::nested(out, number, |out| message_into(out, value, schema)),
        Kind::List => {}
        Kind::String => wire::bytes(out, number, value.as_str().unwrap_or("").as_bytes()),
        Kind::Bytes => {
            let bytes = value.as_str().and_then(|text| STANDARD.decode(text).ok()).unwrap_or_default();
            wire::bytes(out, number, &bytes);
        }
        Kind::Bool => wire::int(out, number, value.as_bool().unwrap_or(false).into()),
        Kind::Int32 | Kind::Int64 => wire::int(out, number, value.as_i64().unwrap_or(0)),
        Kind::Float => wire::double(out, number, value.as_f64().unwrap_or(0.0)),
        Kind::Quantity => {
            wire::nested(out, number, |out| wire::bytes(out, 1, value.as_str().unwrap_or("0").as_bytes()))
        }
        Kind::IntOrString => wire::nested(out, number, |out| {
            wire::int(out, 1, value.is_string().into());
            wire::int(out, 2, value.as_i64().unwrap_or(0));
            wire::bytes(out, 3, value.as_str().unwrap_or("").as_bytes());
        }),
        Kind::Time | Kind::MicroTime => wire::nested(out, number, |out| {
            let at = value.as_str().and_then(|text| scalar::parse_time(text, "").ok());
            if let Some(at) = at {
                wire::int(out, 1, at.as_second());
                // Seconds only are kept for Time; MicroTime keeps whole microseconds.
                let nanos = if schema.kind == Kind::MicroTime { at.subsec_nanosecond() / 1_000 * 1_000 } else { 0 };
                wire::int(out, 2, nanos.into());
            }
        }),
        Kind::Duration => wire::nested(out, number, |out| {
            wire::int(out, 1, value.as_str().and_then(|text| scalar::duration(text).ok()).unwrap_or(0));
        }),
        Kind::Raw | Kind::FieldsV1 | Kind::Json | Kind::Any => wire::nested(out, number, |out| {
            if !value.is_null() || schema.kind == Kind::Json {
                wire::bytes(out, 1, text_of(value).as_bytes());
            }
        }),
        Kind::StringList => wire::nested(out, number, |out| {
            for item in value.as_array().into_iter().flatten() {
                wire::bytes(out, 1, item.as_str().unwrap_or("").as_bytes());
            }
        }),
        Kind::SchemaOrBool => wire::nested(out, number, |out| {
            wire::int(out, 1, value.as_bool().unwrap_or(true).into());
            inner_schema(out, 2, value, schema);
        }),
        Kind::SchemaOrArray => wire::nested(out, number, |out| {
            inner_schema(out, 1, value, schema);
            for item in value.as_array().into_iter().flatten() {
                inner_schema(out, 2, item, schema);
            }
        }),
        Kind::SchemaOrStrings => wire::nested(out, number, |out| {
            inner_schema(out, 1, value, schema);
            for item in value.as_array().into_iter().flatten() {
                wire::bytes(out, 2, item.as_str().unwrap_or("").as_bytes());
            }
        }),
    }
}

fn inner_schema(out: &mut Vec<u8>, number: u32, value: &Value, schema: &Schema) {
    if let (Value::Object(_), Some(inner)) = (value, &schema.items) {
        wire::nested(out, number, |out| message_into(out, value, inner.get()));
    }
}

fn text_of(value: &Value) -> Cow<'static, str> {
    if value.is_null() { "null".into() } else { value.to_string().into() }
}
