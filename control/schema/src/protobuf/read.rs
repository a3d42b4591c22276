//! Messages to values.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::{Map, Number, Value};

use super::ProtobufError;
use super::wire::{self, Content};
use crate::decode::{MAX_DEPTH, MAX_NODES, scalar};
use crate::schema::{Kind, Schema, SchemaRef, Slot};

/// Bounds of one decoding.
struct Budget {
    depth: usize,
    nodes: usize,
}

pub(super) fn message(bytes: &[u8], schema: &Schema, depth: usize) -> Result<Value, ProtobufError> {
    let mut map = Map::new();
    fields(bytes, schema, &mut map, &mut Budget { depth, nodes: 0 })?;
    Ok(Value::Object(map))
}

/// Reads the fields of a message into `map`; unknown numbers are skipped.
fn fields(
    bytes: &[u8],
    schema: &Schema,
    map: &mut Map<String, Value>,
    budget: &mut Budget,
) -> Result<(), ProtobufError> {
    budget.depth += 1;
    if budget.depth > MAX_DEPTH {
        return Err(ProtobufError::Malformed("exceeded max depth"));
    }
    wire::each(bytes, |number, content| {
        let Some(wire) = schema.wire.iter().find(|wire| wire.number == number) else {
            return Ok(());
        };
        let at = match &wire.slot {
            Slot::Inline(inner) => return fields(content.bytes()?, inner.get(), map, budget),
            Slot::Field(at) => *at,
        };
        let field = &schema.fields[usize::from(at)];
        let inner = field.schema.get();
        budget.nodes += 1;
        if budget.nodes > MAX_NODES {
            return Err(ProtobufError::Malformed("too many values"));
        }
        let name = field.name.as_ref();
        match (inner.kind, &inner.items, &inner.values) {
            (Kind::List, Some(items), _) => {
                let list = map.entry(name).or_insert_with(|| Value::Array(Vec::new()));
                let Value::Array(list) = list else {
                    return Ok(());
                };
                repeated(content, items.get(), list, budget)
            }
            (Kind::Object, _, Some(values)) => {
                let entries = map.entry(name).or_insert_with(|| Value::Object(Map::new()));
                let Value::Object(entries) = entries else {
                    return Ok(());
                };
                entry(content.bytes()?, values, entries, budget)
            }
            _ => {
                let value = one(content, inner, budget)?;
                map.insert(name.to_owned(), value);
                Ok(())
            }
        }
    })?;
    budget.depth -= 1;
    Ok(())
}

/// One item of a repeated field, or several packed numbers.
fn repeated(
    content: Content<'_>,
    inner: &Schema,
    list: &mut Vec<Value>,
    budget: &mut Budget,
) -> Result<(), ProtobufError> {
    if let (Content::Bytes(mut packed), Kind::Int32 | Kind::Int64 | Kind::Bool) = (content, inner.kind) {
        while !packed.is_empty() {
            let item = Content::Varint(wire::take_varint(&mut packed)?);
            list.push(one(item, inner, budget)?);
        }
        return Ok(());
    }
    list.push(one(content, inner, budget)?);
    Ok(())
}

fn entry(
    bytes: &[u8],
    values: &SchemaRef,
    entries: &mut Map<String, Value>,
    budget: &mut Budget,
) -> Result<(), ProtobufError> {
    let mut key = "";
    let mut value = None;
    wire::each(bytes, |number, content| {
        match number {
            1 => key = content.text()?,
            2 => value = Some(one(content, values.get(), budget)?),
            _ => {}
        }
        Ok(())
    })?;
    let value = match value {
        Some(value) => value,
        None => one(Content::Bytes(&[]), values.get(), budget)?,
    };
    entries.insert(key.to_owned(), value);
    Ok(())
}

fn one(content: Content<'_>, schema: &Schema, budget: &mut Budget) -> Result<Value, ProtobufError> {
    Ok(match schema.kind {
        Kind::Object => {
            let mut map = Map::new();
            fields(content.bytes()?, schema, &mut map, budget)?;
            Value::Object(map)
        }
        Kind::List => Value::Null,
        Kind::String => content.text()?.into(),
        Kind::Bytes => STANDARD.encode(content.bytes()?).into(),
        Kind::Bool => (content.int()? != 0).into(),
        Kind::Int32 | Kind::Int64 => content.int()?.into(),
        Kind::Float => match content {
            Content::Fixed64(bits) => float(f64::from_bits(bits)),
            Content::Fixed32(bits) => float(f32::from_bits(bits).into()),
            _ => {
                return Err(ProtobufError::Malformed("wrong wireType for a double field"));
            }
        },
        Kind::Quantity => first(content, 1)?.map_or(Ok("0"), Content::text)?.into(),
        Kind::IntOrString => {
            let bytes = content.bytes()?;
            let (mut is_text, mut number_value, mut text) = (false, 0, "");
            wire::each(bytes, |number, content| {
                match number {
                    1 => is_text = content.int()? == 1,
                    2 => number_value = content.int()?,
                    3 => text = content.text()?,
                    _ => {}
                }
                Ok(())
            })?;
            if is_text { text.into() } else { number_value.into() }
        }
        Kind::Time | Kind::MicroTime => time(content, schema.kind)?,
        Kind::Duration => scalar::format_duration(first(content, 1)?.map_or(Ok(0), Content::int)?).into(),
        Kind::Raw | Kind::FieldsV1 | Kind::Json | Kind::Any => raw(content, schema.kind, budget)?,
        Kind::StringList => {
            let mut list = Vec::new();
            wire::each(content.bytes()?, |number, content| {
                if number == 1 {
                    list.push(content.text()?.into());
                }
                Ok(())
            })?;
            Value::Array(list)
        }
        Kind::SchemaOrBool | Kind::SchemaOrArray | Kind::SchemaOrStrings => schema_or(content, schema, budget)?,
    })
}

fn first(content: Content<'_>, wanted: u32) -> Result<Option<Content<'_>>, ProtobufError> {
    let mut found = None;
    wire::each(content.bytes()?, |number, content| {
        if number == wanted {
            found = Some(content);
        }
        Ok(())
    })?;
    Ok(found)
}

fn time(content: Content<'_>, kind: Kind) -> Result<Value, ProtobufError> {
    let seconds = first(content, 1)?.map_or(Ok(0), Content::int)?;
    let nanos = first(content, 2)?.map_or(Ok(0), Content::int)?;
    if seconds == 0 && nanos == 0 {
        return Ok(Value::Null);
    }
    let nanos = i32::try_from(nanos).map_err(|_| ProtobufError::Malformed("nanoseconds out of range"))?;
    let at = Timestamp::new(seconds, nanos).map_err(|_| ProtobufError::Malformed("time out of range"))?;
    Ok(if kind == Kind::Time { scalar::format_time(at) } else { scalar::format_micro_time(at) }.into())
}

/// Bytes that hold JSON or, in a list of anything, an enveloped object.
fn raw(content: Content<'_>, kind: Kind, budget: &Budget) -> Result<Value, ProtobufError> {
    let bytes = first(content, 1)?.map_or(Ok(&[][..]), Content::bytes)?;
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    if kind == Kind::Raw && bytes.starts_with(&super::MAGIC) {
        return super::decode_nested(bytes, budget.depth);
    }
    serde_json::from_slice(bytes).map_err(|_| ProtobufError::Malformed("cannot parse the JSON inside"))
}

fn schema_or(content: Content<'_>, schema: &Schema, budget: &mut Budget) -> Result<Value, ProtobufError> {
    let Some(inner) = schema.items.as_ref().map(SchemaRef::get) else {
        return Ok(Value::Null);
    };
    let (mut allows, mut single, mut list) = (false, None, Vec::new());
    let schema_number = if schema.kind == Kind::SchemaOrBool { 2 } else { 1 };
    wire::each(content.bytes()?, |number, content| {
        if number == schema_number {
            single = Some(one(content, inner, budget)?);
        } else if schema.kind == Kind::SchemaOrBool {
            allows = content.int()? != 0;
        } else if schema.kind == Kind::SchemaOrArray {
            list.push(one(content, inner, budget)?);
        } else {
            list.push(content.text()?.into());
        }
        Ok(())
    })?;
    Ok(single.unwrap_or(if schema.kind == Kind::SchemaOrBool { allows.into() } else { Value::Array(list) }))
}

/// A number as JSON has it: a whole one without a fraction.
fn float(value: f64) -> Value {
    /// Up to here every whole number has a `f64` of its own.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if value.fract() == 0.0 && value.abs() <= EXACT {
        return (value as i64).into();
    }
    Number::from_f64(value).map_or(Value::Null, Value::Number)
}
