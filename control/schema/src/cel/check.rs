//! Checks before an expression is ever run: undeclared names, fields that a schema lacks, estimated cost.

use cel::common::ast::operators as op;
use cel::common::ast::{EntryExpr, Expr, IdedExpr, SourceInfo};

use super::eval::unescape;
use super::{UNBOUNDED_ITEMS, Variable, library};
use crate::schema::{Kind, Schema, SchemaRef};

/// The depth of an expression; `None` if it is above `max`.
pub(super) fn depth(expr: &IdedExpr, max: usize) -> Option<usize> {
    let left = max.checked_sub(1)?;
    let mut deepest = 0;
    for child in children(expr) {
        deepest = deepest.max(depth(child, left)?);
    }
    Some(deepest + 1)
}

pub(super) fn mentions(expr: &IdedExpr, variable: &str) -> bool {
    matches!(&expr.expr, Expr::Ident(name) if name == variable)
        || children(expr).into_iter().any(|child| mentions(child, variable))
}

fn children(expr: &IdedExpr) -> Vec<&IdedExpr> {
    match &expr.expr {
        Expr::Call(call) => call.target.as_deref().into_iter().chain(&call.args).collect(),
        Expr::Select(select) => vec![&select.operand],
        Expr::List(list) => list.elements.iter().collect(),
        Expr::Comprehension(fold) => {
            vec![&fold.iter_range, &fold.accu_init, &fold.loop_cond, &fold.loop_step, &fold.result]
        }
        Expr::Map(map) => map.entries.iter().flat_map(|entry| entry_parts(&entry.expr)).collect(),
        Expr::Struct(object) => object.entries.iter().flat_map(|entry| entry_parts(&entry.expr)).collect(),
        _ => Vec::new(),
    }
}

fn entry_parts(entry: &EntryExpr) -> Vec<&IdedExpr> {
    match entry {
        EntryExpr::MapEntry(entry) => vec![&entry.key, &entry.value],
        EntryExpr::StructField(field) => vec![&field.value],
    }
}

/// What is known of a value before it exists.
#[derive(Clone, Copy)]
enum Known<'a> {
    Nothing,
    Schema(&'a Schema),
    /// A list of keys of a map.
    Text,
}

/// Checks names and fields; gives the estimated cost.
pub(super) fn check(expr: &IdedExpr, variables: &[Variable<'_>], places: &SourceInfo) -> Result<u64, String> {
    let names = variables
        .iter()
        .map(|variable| (variable.name, variable.schema.map_or(Known::Nothing, Known::Schema)))
        .collect();
    let mut walk = Walk { names, errors: Vec::new(), places };
    let (_, cost) = walk.node(expr);
    if walk.errors.is_empty() { Ok(cost) } else { Err(walk.errors.join("\n")) }
}

struct Walk<'a> {
    names: Vec<(&'a str, Known<'a>)>,
    errors: Vec<String>,
    places: &'a SourceInfo,
}

impl<'a> Walk<'a> {
    fn node(&mut self, expr: &'a IdedExpr) -> (Known<'a>, u64) {
        match &expr.expr {
            Expr::Literal(_) | Expr::Unspecified => (Known::Nothing, 0),
            Expr::Ident(name) => {
                let found = self.names.iter().rev().find(|(own, _)| own == name).map(|(_, known)| *known);
                if found.is_none() && library::type_named(name).is_none() {
                    self.error(expr, &format!("undeclared reference to '{name}' (in container '')"));
                }
                (found.unwrap_or(Known::Nothing), 1)
            }
            Expr::Select(select) => {
                if matches!(&select.operand.expr, Expr::Select(inner) if matches!(&inner.operand.expr, Expr::Ident(name) if name == "google"))
                {
                    return (Known::Nothing, 1);
                }
                let (operand, cost) = self.node(&select.operand);
                (self.field(expr, operand, &select.field), cost + 1)
            }
            Expr::List(list) => {
                let cost = list.elements.iter().map(|element| self.node(element).1).sum::<u64>();
                (Known::Nothing, cost + 10)
            }
            Expr::Map(_) | Expr::Struct(_) => {
                let cost = children(expr).into_iter().map(|part| self.node(part).1).sum::<u64>();
                (Known::Nothing, cost + 30)
            }
            Expr::Call(call) => self.call(expr, call),
            Expr::Comprehension(fold) => {
                let (range, range_cost) = self.node(&fold.iter_range);
                let (item, count) = items_of(range);
                let depth = self.names.len();
                let (_, init) = self.node(&fold.accu_init);
                self.names.push((&fold.accu_var, Known::Nothing));
                match &fold.iter_var2 {
                    Some(second) => {
                        self.names.push((&fold.iter_var, Known::Nothing));
                        self.names.push((second, item));
                    }
                    None => self.names.push((&fold.iter_var, if is_map(range) { Known::Text } else { item })),
                }
                let (_, condition) = self.node(&fold.loop_cond);
                let (_, step) = self.node(&fold.loop_step);
                self.names.truncate(depth + 1);
                let (_, result) = self.node(&fold.result);
                self.names.truncate(depth);
                let body = condition.saturating_add(step).max(1);
                let total = count.saturating_mul(body).saturating_add(range_cost + init + result);
                // `filter` gives items of its range.
                (if keeps_items(&fold.loop_step.expr) { range } else { Known::Nothing }, total)
            }
        }
    }

    fn field(&mut self, expr: &IdedExpr, operand: Known<'a>, name: &str) -> Known<'a> {
        let Known::Schema(schema) = operand else { return Known::Nothing };
        if schema.kind != Kind::Object {
            return Known::Nothing;
        }
        let child = schema.child(name).or_else(|| schema.child(&unescape(name)?));
        match child {
            Some(child) => Known::Schema(child),
            None => {
                // Fields that are kept without a schema are as unknown to rules as to the schema; named types without fields
                // hold anything.
                if schema.name.is_empty() || !schema.fields.is_empty() {
                    self.error(expr, &format!("undefined field '{name}'"));
                }
                Known::Nothing
            }
        }
    }

    fn call(&mut self, expr: &'a IdedExpr, call: &'a cel::common::ast::CallExpr) -> (Known<'a>, u64) {
        let name = call.func_name.as_str();
        let mut cost: u64 = 1;
        let mut target = Known::Nothing;
        let mut spaced = None;
        if let Some(inner) = call.target.as_deref() {
            match &inner.expr {
                Expr::Ident(space)
                    if library::is_namespace(space) && !self.names.iter().any(|(own, _)| own == space) =>
                {
                    spaced = Some(format!("{space}.{name}"));
                }
                _ => {
                    let (known, inner_cost) = self.node(inner);
                    (target, cost) = (known, cost.saturating_add(inner_cost));
                }
            }
        }
        let full = spaced.as_deref().unwrap_or(name);
        if !library::is_known(full) {
            self.error(expr, &format!("undeclared reference to '{full}' (in container '')"));
            return (Known::Nothing, cost);
        }
        // Macros that bind names: their first arguments are names, not expressions.
        let bound = library::bound_names(full, call.args.len());
        let depth = self.names.len();
        let mut repeat = 1;
        if bound > 0 {
            let (item, count) = items_of(target);
            repeat = if full == "cel.bind" || full.starts_with("opt") { 1 } else { count };
            for arg in call.args.iter().take(bound) {
                if let Expr::Ident(name) = &arg.expr {
                    self.names.push((
                        name,
                        if bound == 1 && !full.starts_with("opt") && full != "cel.bind" {
                            item
                        } else {
                            Known::Nothing
                        },
                    ));
                }
            }
        }
        let mut args = Vec::with_capacity(call.args.len());
        for arg in call.args.iter().skip(bound) {
            let (known, arg_cost) = self.node(arg);
            args.push(known);
            cost = cost.saturating_add(arg_cost.saturating_mul(repeat));
        }
        self.names.truncate(depth);
        let known = match (full, args.as_slice()) {
            (op::INDEX | op::OPT_INDEX, [list, ..]) => items_of(*list).0,
            (op::CONDITIONAL, [_, yes, _]) => *yes,
            _ => Known::Nothing,
        };
        (known, cost.saturating_add(library::extra_cost(full)))
    }

    fn error(&mut self, expr: &IdedExpr, words: &str) {
        let (line, column, text) = place(self.places, expr.id);
        let dots = ".".repeat(column.saturating_sub(1));
        self.errors.push(format!("ERROR: <input>:{line}:{column}: {words}\n | {text}\n | {dots}^"));
    }
}

/// Line and column (from 1) of a node, and the line's text.
fn place(places: &SourceInfo, id: u64) -> (usize, usize, &str) {
    let start = places.offset_for(id).map_or(0, |(start, _)| start as usize);
    let before = places.source.get(..start).unwrap_or("");
    let line = before.matches('\n').count();
    let column = before.rsplit('\n').next().unwrap_or("").chars().count();
    (line + 1, column + 1, places.source.lines().nth(line).unwrap_or(""))
}

fn is_map(known: Known<'_>) -> bool {
    matches!(known, Known::Schema(schema) if schema.kind == Kind::Object)
}

/// What the items of a list or map are, and how many there may be.
fn items_of(known: Known<'_>) -> (Known<'_>, u64) {
    let Known::Schema(schema) = known else { return (Known::Nothing, 10) };
    let checks = schema.checks.as_deref();
    let bound = match schema.kind {
        Kind::List => checks.and_then(|checks| checks.max_items),
        Kind::Object if schema.values.is_some() => checks.and_then(|checks| checks.max_properties),
        _ => Some(schema.fields.len() as u64),
    };
    let inner = schema.items.as_ref().or(schema.values.as_ref()).map(SchemaRef::get);
    (inner.map_or(Known::Nothing, Known::Schema), bound.unwrap_or(UNBOUNDED_ITEMS))
}

/// Whether a fold's step is `filter`'s: keep the accumulator or append the item itself.
fn keeps_items(step: &Expr) -> bool {
    let Expr::Call(call) = step else { return false };
    let (op::CONDITIONAL, [_, yes, _]) = (call.func_name.as_str(), call.args.as_slice()) else { return false };
    let Expr::Call(add) = &yes.expr else { return false };
    match add.args.as_slice() {
        [_, list] => {
            matches!(&list.expr, Expr::List(list) if matches!(list.elements.as_slice(), [IdedExpr { expr: Expr::Ident(_), .. }]))
        }
        _ => false,
    }
}
