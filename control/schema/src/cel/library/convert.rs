//! Conversions between types, optionals, base64.

use std::rc::Rc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::{Outcome, fail};
use crate::cel::value::Val;
use crate::gofmt;

pub(super) fn call<'a>(name: &str, args: &[Val<'a>]) -> Option<Outcome<'a>> {
    Some(match (name, args) {
        ("int", [value]) => to_int(value)?,
        ("uint", [value]) => to_uint(value)?,
        ("double", [value]) => match value {
            Val::Double(_) => Ok(value.clone()),
            Val::Int(int) => Ok(Val::Double(*int as f64)),
            Val::Uint(int) => Ok(Val::Double(*int as f64)),
            Val::Text(text) => text.parse().map_or_else(
                |_| fail("type conversion error from 'string' to 'double'"),
                |float| Ok(Val::Double(float)),
            ),
            _ => return None,
        },
        ("bool", [value]) => match value {
            Val::Bool(_) => Ok(value.clone()),
            Val::Text(text) => match text.as_ref() {
                "1" | "t" | "true" | "TRUE" | "True" | "T" => Ok(Val::Bool(true)),
                "0" | "f" | "false" | "FALSE" | "False" | "F" => Ok(Val::Bool(false)),
                _ => fail("type conversion error from 'string' to 'bool'"),
            },
            _ => return None,
        },
        ("bytes", [Val::Text(text)]) => Ok(Val::Bytes(text.as_bytes().into())),
        ("bytes", [value @ Val::Bytes(_)]) => Ok(value.clone()),
        ("string", [value]) => to_text(value)?,
        ("base64.encode", [Val::Bytes(bytes)]) => Ok(Val::text(STANDARD.encode(bytes))),
        ("base64.decode", [Val::Text(text)]) => match STANDARD.decode(text.as_bytes()) {
            Ok(bytes) => Ok(Val::Bytes(bytes.into())),
            Err(_) => fail("illegal base64 data"),
        },
        ("optional.of", [value]) => Ok(Val::some(value.clone())),
        ("optional.none", []) => Ok(Val::Optional(None)),
        ("optional.ofNonZeroValue", [value]) => {
            Ok(if is_zero(value) { Val::Optional(None) } else { Val::some(value.clone()) })
        }
        ("hasValue", [Val::Optional(inner)]) => Ok(Val::Bool(inner.is_some())),
        ("value", [Val::Optional(inner)]) => match inner {
            Some(inner) => Ok(inner.as_ref().clone()),
            None => fail("optional.none() dereference"),
        },
        ("orValue", [Val::Optional(inner), other]) => {
            Ok(inner.as_ref().map_or_else(|| other.clone(), |inner| inner.as_ref().clone()))
        }
        ("or", [Val::Optional(inner), other]) => Ok(match inner {
            Some(inner) => Val::Optional(Some(Rc::clone(inner))),
            None => other.clone(),
        }),
        _ => return None,
    })
}

fn is_zero(value: &Val<'_>) -> bool {
    match value {
        Val::Null => true,
        Val::Bool(flag) => !flag,
        Val::Int(int) => *int == 0,
        Val::Uint(int) => *int == 0,
        Val::Double(float) => *float == 0.0,
        Val::Duration(nanos) => *nanos == 0,
        Val::Optional(inner) => inner.is_none(),
        other => other.size() == Some(0),
    }
}

fn to_int<'a>(value: &Val<'a>) -> Option<Outcome<'a>> {
    Some(match value {
        Val::Int(_) => Ok(value.clone()),
        Val::Uint(int) => i64::try_from(*int).map_or_else(|_| fail("integer overflow"), |int| Ok(Val::Int(int))),
        Val::Double(float) if float.is_finite() && float.abs() < 9.2e18 => Ok(Val::Int(*float as i64)),
        Val::Double(_) => fail("integer overflow"),
        Val::Text(text) => {
            text.parse().map_or_else(|_| fail("type conversion error from 'string' to 'int'"), |int| Ok(Val::Int(int)))
        }
        Val::Timestamp(at) => Ok(Val::Int(at.as_second())),
        Val::Duration(nanos) => Ok(Val::Int(*nanos)),
        _ => return None,
    })
}

fn to_uint<'a>(value: &Val<'a>) -> Option<Outcome<'a>> {
    Some(match value {
        Val::Uint(_) => Ok(value.clone()),
        Val::Int(int) => {
            u64::try_from(*int).map_or_else(|_| fail("unsigned integer overflow"), |int| Ok(Val::Uint(int)))
        }
        Val::Double(float) if (0.0..1.8e19).contains(float) => Ok(Val::Uint(*float as u64)),
        Val::Double(_) => fail("unsigned integer overflow"),
        Val::Text(text) => text
            .parse()
            .map_or_else(|_| fail("type conversion error from 'string' to 'uint'"), |int| Ok(Val::Uint(int))),
        _ => return None,
    })
}

fn to_text<'a>(value: &Val<'a>) -> Option<Outcome<'a>> {
    Some(Ok(match value {
        Val::Text(_) => value.clone(),
        Val::Bool(flag) => Val::text(flag.to_string()),
        Val::Int(int) => Val::text(int.to_string()),
        Val::Uint(int) => Val::text(int.to_string()),
        Val::Double(float) => {
            let mut text = String::new();
            gofmt::float_into(&mut text, *float);
            Val::text(text)
        }
        Val::Bytes(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => Val::text(text.to_owned()),
            Err(_) => return Some(fail("invalid UTF-8 in bytes, cannot convert to string")),
        },
        Val::Timestamp(at) => Val::text(at.to_string()),
        Val::Duration(nanos) => {
            let mut text = String::new();
            gofmt::float_into(&mut text, *nanos as f64 / 1e9);
            text.push('s');
            Val::text(text)
        }
        Val::Ip(ip) => Val::text(ip.to_string()),
        Val::Cidr(ip, bits) => Val::text(format!("{ip}/{bits}")),
        Val::Quantity(quantity) => Val::text(quantity.to_string()),
        Val::Type(name) => Val::text(name.to_string()),
        _ => return None,
    }))
}
