//! Lists and sets.

use std::cmp::Ordering;

use cel::common::ast::operators as op;

use super::{Outcome, fail, int, no_overload};
use crate::cel::value::Val;

/// Longest list that `lists.range` makes.
const MAX_RANGE: i64 = 100_000;

pub(super) fn call<'a>(name: &str, args: &[Val<'a>]) -> Option<Outcome<'a>> {
    if name == "lists.range" {
        return Some(match args {
            [Val::Int(count)] if (0..=MAX_RANGE).contains(count) => Ok(Val::list((0..*count).map(Val::Int).collect())),
            _ => fail("lists.range: argument out of range"),
        });
    }
    let (first, rest) = args.split_first()?;
    let items = first.items()?;
    let other = rest.first().and_then(Val::items);
    let has = |list: &[Val<'a>], item: &Val<'a>| list.iter().any(|own| own.equals(item));
    Some(Ok(match (name, rest) {
        (op::ADD, [_]) => Val::list(items.into_iter().chain(other?).collect()),
        ("sets.contains", [_]) => Val::Bool(other?.iter().all(|item| has(&items, item))),
        ("sets.intersects", [_]) => Val::Bool(other?.iter().any(|item| has(&items, item))),
        ("sets.equivalent", [_]) => {
            let other = other?;
            Val::Bool(other.iter().all(|item| has(&items, item)) && items.iter().all(|item| has(&other, item)))
        }
        ("isSorted", []) => {
            Val::Bool(items.windows(2).all(|pair| pair[0].compare(&pair[1]).is_some_and(Ordering::is_le)))
        }
        ("sum", []) => return Some(sum(items)),
        ("min" | "max", []) => {
            let wanted = if name == "min" { Ordering::Less } else { Ordering::Greater };
            let mut items = items.into_iter();
            let Some(mut best) = items.next() else { return Some(fail(format!("{name} called on empty list"))) };
            for item in items {
                if item.compare(&best)? == wanted {
                    best = item;
                }
            }
            best
        }
        ("indexOf", [item]) => Val::Int(items.iter().position(|own| own.equals(item)).map_or(-1, int)),
        ("lastIndexOf", [item]) => Val::Int(items.iter().rposition(|own| own.equals(item)).map_or(-1, int)),
        ("first", []) => items.into_iter().next().map_or(Val::Optional(None), Val::some),
        ("last", []) => items.into_iter().next_back().map_or(Val::Optional(None), Val::some),
        ("reverse", []) => Val::list(items.into_iter().rev().collect()),
        ("distinct", []) => {
            let mut kept: Vec<Val<'a>> = Vec::new();
            for item in items {
                if !has(&kept, &item) {
                    kept.push(item);
                }
            }
            Val::list(kept)
        }
        ("flatten", []) => flatten(items, 1),
        ("flatten", [Val::Int(depth)]) => flatten(items, *depth),
        ("sort", []) => {
            let mut items = items;
            items.sort_by(|a, b| a.compare(b).unwrap_or(Ordering::Equal));
            Val::list(items)
        }
        ("slice", [Val::Int(from), Val::Int(to)]) => match (usize::try_from(*from), usize::try_from(*to)) {
            (Ok(from), Ok(to)) if from <= to && to <= items.len() => Val::list(items[from..to].to_vec()),
            _ => return Some(fail(format!("cannot slice({from}, {to}), list is length {}", items.len()))),
        },
        _ => return None,
    }))
}

fn sum<'a>(items: Vec<Val<'a>>) -> Outcome<'a> {
    let mut items = items.into_iter();
    let Some(mut total) = items.next() else { return Ok(Val::Int(0)) };
    for item in items {
        total = match (&total, &item) {
            (Val::Duration(a), Val::Duration(b)) => Val::Duration(a.saturating_add(*b)),
            _ => super::numbers::call(op::ADD, &[total, item]).unwrap_or_else(no_overload)?,
        };
    }
    Ok(total)
}

fn flatten<'a>(items: Vec<Val<'a>>, depth: i64) -> Val<'a> {
    let mut flat = Vec::new();
    for item in items {
        match item.items() {
            Some(inner) if depth > 0 => match flatten(inner, depth - 1) {
                Val::List(inner) => flat.extend(inner.iter().cloned()),
                other => flat.push(other),
            },
            _ => flat.push(item),
        }
    }
    Val::list(flat)
}
