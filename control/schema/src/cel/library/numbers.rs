//! Arithmetic, `math.*`, quantities.

use std::cmp::Ordering;

use cel::common::ast::operators as op;

use super::{Outcome, fail, no_overload};
use crate::cel::value::Val;
use crate::quantity::Quantity;

pub(super) fn call<'a>(name: &str, args: &[Val<'a>]) -> Option<Outcome<'a>> {
    Some(match (name, args) {
        (op::ADD | op::SUBSTRACT | op::MULTIPLY | op::DIVIDE | op::MODULO, [a, b]) => arithmetic(name, a, b)?,
        (op::NEGATE, [Val::Int(int)]) => {
            int.checked_neg().map_or_else(|| fail("integer overflow"), |int| Ok(Val::Int(int)))
        }
        (op::NEGATE, [Val::Double(float)]) => Ok(Val::Double(-float)),
        ("math.greatest" | "math.least", [only]) if only.items().is_some() => extreme(name, &only.items()?)?,
        ("math.greatest" | "math.least", many) if !many.is_empty() => extreme(name, many)?,
        ("math.abs", [Val::Int(int)]) => {
            int.checked_abs().map_or_else(|| fail("integer overflow"), |int| Ok(Val::Int(int)))
        }
        ("math.abs", [Val::Double(float)]) => Ok(Val::Double(float.abs())),
        ("math.sign", [Val::Int(int)]) => Ok(Val::Int(int.signum())),
        ("math.sign", [Val::Double(float)]) => Ok(Val::Double(if *float == 0.0 { 0.0 } else { float.signum() })),
        ("math.ceil", [Val::Double(float)]) => Ok(Val::Double(float.ceil())),
        ("math.floor", [Val::Double(float)]) => Ok(Val::Double(float.floor())),
        ("math.round", [Val::Double(float)]) => Ok(Val::Double(float.round())),
        ("math.trunc", [Val::Double(float)]) => Ok(Val::Double(float.trunc())),
        ("math.sqrt", [Val::Double(float)]) => Ok(Val::Double(float.sqrt())),
        ("math.sqrt", [Val::Int(int)]) => Ok(Val::Double((*int as f64).sqrt())),
        ("math.isNaN", [Val::Double(float)]) => Ok(Val::Bool(float.is_nan())),
        ("math.isInf", [Val::Double(float)]) => Ok(Val::Bool(float.is_infinite())),
        ("math.isFinite", [Val::Double(float)]) => Ok(Val::Bool(float.is_finite())),
        ("math.bitAnd", [Val::Int(a), Val::Int(b)]) => Ok(Val::Int(a & b)),
        ("math.bitOr", [Val::Int(a), Val::Int(b)]) => Ok(Val::Int(a | b)),
        ("math.bitXor", [Val::Int(a), Val::Int(b)]) => Ok(Val::Int(a ^ b)),
        ("math.bitNot", [Val::Int(a)]) => Ok(Val::Int(!a)),
        ("math.bitShiftLeft", [Val::Int(a), Val::Int(b)]) => shift(*b, |b| a.checked_shl(b)),
        ("math.bitShiftRight", [Val::Int(a), Val::Int(b)]) => {
            shift(*b, |b| a.cast_unsigned().checked_shr(b).map(u64::cast_signed))
        }
        ("quantity", [Val::Text(text)]) => match text.parse::<Quantity>() {
            Ok(quantity) => Ok(Val::Quantity(quantity)),
            Err(error) => fail(error.to_string()),
        },
        ("isQuantity", [Val::Text(text)]) => Ok(Val::Bool(text.parse::<Quantity>().is_ok())),
        (_, [Val::Quantity(quantity), rest @ ..]) => quantities(name, quantity, rest)?,
        _ => return None,
    })
}

fn quantities<'a>(name: &str, quantity: &Quantity, rest: &[Val<'a>]) -> Option<Outcome<'a>> {
    let other = match rest {
        [Val::Quantity(other)] => Some(*other),
        [Val::Int(int)] => Some(Quantity::new(*int)),
        _ => None,
    };
    Some(Ok(match (name, other) {
        ("sign", None) => Val::Int(i64::try_from(quantity.sign()).unwrap_or(0)),
        ("isInteger", None) => Val::Bool(quantity.as_i64().is_some()),
        ("asInteger", None) => match quantity.as_i64() {
            Some(int) => Val::Int(int),
            None => return Some(fail("cannot convert value to integer")),
        },
        ("asApproximateFloat", None) => Val::Double(quantity.as_f64()),
        ("add", Some(other)) => Val::Quantity(quantity.plus(&other)),
        ("sub", Some(other)) => Val::Quantity(quantity.minus(&other)),
        ("isGreaterThan", Some(other)) => Val::Bool(*quantity > other),
        ("isLessThan", Some(other)) => Val::Bool(*quantity < other),
        ("compareTo", Some(other)) => Val::Int(quantity.cmp(&other) as i64),
        _ => return None,
    }))
}

fn shift<'a>(by: i64, shifted: impl Fn(u32) -> Option<i64>) -> Outcome<'a> {
    match u32::try_from(by) {
        Ok(by) => Ok(Val::Int(shifted(by).unwrap_or(0))),
        Err(_) => fail(format!("math.bitShift() negative offset: {by}")),
    }
}

fn extreme<'a>(name: &str, values: &[Val<'a>]) -> Option<Outcome<'a>> {
    let wanted = if name == "math.greatest" { Ordering::Greater } else { Ordering::Less };
    let (first, rest) = values.split_first()?;
    let mut best = first.clone();
    for value in rest {
        if value.compare(&best)? == wanted {
            best = value.clone();
        }
    }
    Some(Ok(best))
}

fn arithmetic<'a>(name: &str, a: &Val<'a>, b: &Val<'a>) -> Option<Outcome<'a>> {
    Some(match (a, b) {
        (Val::Int(a), Val::Int(b)) => ints(name, *a, *b),
        (Val::Uint(a), Val::Uint(b)) => uints(name, *a, *b),
        (Val::Double(a), Val::Double(b)) => Ok(Val::Double(match name {
            op::ADD => a + b,
            op::SUBSTRACT => a - b,
            op::MULTIPLY => a * b,
            op::DIVIDE => a / b,
            _ => return Some(no_overload()),
        })),
        // The rest belongs to texts, lists and times.
        _ => return None,
    })
}

fn ints<'a>(name: &str, a: i64, b: i64) -> Outcome<'a> {
    let result = match name {
        op::ADD => a.checked_add(b),
        op::SUBSTRACT => a.checked_sub(b),
        op::MULTIPLY => a.checked_mul(b),
        op::DIVIDE if b == 0 => return fail("division by zero"),
        op::DIVIDE => a.checked_div(b),
        _ if b == 0 => return fail("modulus by zero"),
        _ => a.checked_rem(b),
    };
    result.map_or_else(|| fail("integer overflow"), |int| Ok(Val::Int(int)))
}

fn uints<'a>(name: &str, a: u64, b: u64) -> Outcome<'a> {
    let result = match name {
        op::ADD => a.checked_add(b),
        op::SUBSTRACT => a.checked_sub(b),
        op::MULTIPLY => a.checked_mul(b),
        op::DIVIDE if b == 0 => return fail("division by zero"),
        op::DIVIDE => a.checked_div(b),
        _ if b == 0 => return fail("modulus by zero"),
        _ => a.checked_rem(b),
    };
    result.map_or_else(|| fail("unsigned integer overflow"), |int| Ok(Val::Uint(int)))
}
