//! The evaluator: a walk over the parsed expression that pays for every step.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use cel::common::ast::operators as op;
use cel::common::ast::{CallExpr, ComprehensionExpr, EntryExpr, Expr, IdedExpr, LiteralValue};
use serde_json::Value;

use super::authorizer::{Access, Authorizer, Query};
use super::library;
use super::value::{CelError, Val};
use super::{Budget, Program};
use crate::schema::Schema;

type Outcome<'a> = Result<Val<'a>, CelError>;

/// The variables of an expression.
#[derive(Default)]
pub struct Scope<'a> {
    values: Vec<(&'a str, Val<'a>)>,
    /// `variables.<name>`: expressions that are evaluated once, when first used.
    lazy: HashMap<&'a str, &'a Program>,
    done: RefCell<HashMap<&'a str, Outcome<'a>>>,
}

impl<'a> Scope<'a> {
    pub fn new() -> Self {
        Self::default()
    }

    /// A JSON variable; without a schema its types are its own.
    pub fn json(&mut self, name: &'a str, value: &'a Value, schema: Option<&'a Schema>) -> &mut Self {
        self.value(name, Val::from_json(value, schema))
    }

    pub fn value(&mut self, name: &'a str, value: Val<'a>) -> &mut Self {
        self.values.retain(|(other, _)| *other != name);
        self.values.push((name, value));
        self
    }

    /// `variables.<name>` of a policy; it may use those added before.
    pub fn variable(&mut self, name: &'a str, program: &'a Program) -> &mut Self {
        self.lazy.insert(name, program);
        self.value("variables", Val::Variables)
    }

    /// The `authorizer`, with what `authorizer.requestResource` asks about.
    pub fn authorizer(&mut self, authorizer: &'a dyn Authorizer, request: Access) -> &mut Self {
        let query = Query { authorizer, access: Access::default(), request };
        self.value("authorizer", Val::Authorizer(Rc::new(query)))
    }

    pub(super) fn run(&self, expr: &'a IdedExpr, budget: &Budget) -> Outcome<'a> {
        Evaluation { scope: self, budget }.eval(expr, None)
    }

    fn lazy_variable(&self, name: &str, budget: &Budget) -> Outcome<'a> {
        let Some((name, program)) = self.lazy.get_key_value(name) else {
            return Err(CelError::message(format!("no such key: {name}")));
        };
        if let Some(done) = self.done.borrow().get(name) {
            return done.clone();
        }
        // A variable that asks for itself finds this.
        let cycle = Err(CelError::message(format!("variable '{name}' refers to itself")));
        self.done.borrow_mut().insert(name, cycle);
        let value = self.run(&program.expr, budget).map_err(|error| match error {
            CelError::Message(text) => {
                CelError::message(format!("composited variable {name:?} fails to evaluate: {text}"))
            }
            other => other,
        });
        self.done.borrow_mut().insert(name, value.clone());
        value
    }
}

/// A variable of a comprehension, innermost first.
struct Frame<'s, 'a> {
    name: &'s str,
    value: Val<'a>,
    outer: Option<&'s Frame<'s, 'a>>,
}

struct Evaluation<'s, 'a> {
    scope: &'s Scope<'a>,
    budget: &'s Budget,
}

type Locals<'f, 'a> = Option<&'f Frame<'f, 'a>>;

impl<'a> Evaluation<'_, 'a> {
    fn eval(&self, expr: &'a IdedExpr, locals: Locals<'_, 'a>) -> Outcome<'a> {
        self.budget.spend(1)?;
        match &expr.expr {
            Expr::Literal(literal) => Ok(literal_value(literal)),
            Expr::Ident(name) => self.ident(name, locals),
            Expr::Select(select) => {
                if let Some(value) = Self::qualified(expr) {
                    return value;
                }
                let operand = self.eval(&select.operand, locals)?;
                if select.test { self.has(&operand, &select.field) } else { self.select(operand, &select.field) }
            }
            Expr::Call(call) => self.call(call, locals),
            Expr::Comprehension(fold) => self.fold(fold, locals),
            Expr::List(list) => {
                let mut items = Vec::with_capacity(list.elements.len());
                for (at, element) in list.elements.iter().enumerate() {
                    let value = self.eval(element, locals)?;
                    match value {
                        Val::Optional(inner) if list.optional_indices.contains(&at) => {
                            items.extend(inner.map(|inner| inner.as_ref().clone()));
                        }
                        value => items.push(value),
                    }
                }
                Ok(Val::list(items))
            }
            Expr::Map(map) => {
                let mut entries: Vec<(Val<'a>, Val<'a>)> = Vec::with_capacity(map.entries.len());
                for entry in &map.entries {
                    let EntryExpr::MapEntry(entry) = &entry.expr else { continue };
                    let key = self.eval(&entry.key, locals)?;
                    let value = self.eval(&entry.value, locals)?;
                    if entries.iter().any(|(other, _)| other.equals(&key)) {
                        return Err(CelError::message("Failed with repeated key"));
                    }
                    push_entry(&mut entries, key, value, entry.optional);
                }
                Ok(Val::Map(Rc::new(entries)))
            }
            // Objects of mutating policies (`Object.spec{…}`, `JSONPatch{…}`) are maps.
            Expr::Struct(object) => {
                let mut entries = Vec::with_capacity(object.entries.len());
                for entry in &object.entries {
                    let EntryExpr::StructField(field) = &entry.expr else { continue };
                    let value = self.eval(&field.value, locals)?;
                    let name = unescape(&field.field).unwrap_or_else(|| field.field.clone());
                    push_entry(&mut entries, Val::text(name), value, field.optional);
                }
                Ok(Val::Map(Rc::new(entries)))
            }
            Expr::Unspecified => Err(CelError::message("unspecified expression")),
        }
    }

    fn ident(&self, name: &str, locals: Locals<'_, 'a>) -> Outcome<'a> {
        let mut frame = locals;
        while let Some(here) = frame {
            if here.name == name {
                return Ok(here.value.clone());
            }
            frame = here.outer;
        }
        if let Some((_, value)) = self.scope.values.iter().find(|(own, _)| *own == name) {
            return Ok(value.clone());
        }
        library::type_named(name).ok_or_else(|| CelError::message(format!("no such attribute(s): {name}")))
    }

    /// Type names with dots (`google.protobuf.Timestamp`).
    fn qualified(expr: &'a IdedExpr) -> Option<Outcome<'a>> {
        let Expr::Select(select) = &expr.expr else { return None };
        if select.test || !matches!(select.field.as_str(), "Timestamp" | "Duration") {
            return None;
        }
        let Expr::Select(inner) = &select.operand.expr else { return None };
        match &inner.operand.expr {
            Expr::Ident(root) if root == "google" && inner.field == "protobuf" => {
                Some(Ok(Val::Type(format!("google.protobuf.{}", select.field).into())))
            }
            _ => None,
        }
    }

    fn select(&self, operand: Val<'a>, field: &str) -> Outcome<'a> {
        match &operand {
            Val::Variables => self.scope.lazy_variable(field, self.budget),
            Val::Authorizer(query) => {
                query.select(field).ok_or_else(|| CelError::message(format!("no such key: {field}")))
            }
            Val::Optional(None) => Ok(operand),
            Val::Optional(Some(inner)) => Ok(Val::Optional(self.lookup(inner, field).map(Rc::new))),
            Val::Map(_) | Val::Object(..) => {
                self.lookup(&operand, field).ok_or_else(|| CelError::message(format!("no such key: {field}")))
            }
            other => Err(CelError::message(format!("type '{}' does not support field selection", other.type_name()))),
        }
    }

    fn lookup(&self, operand: &Val<'a>, field: &str) -> Option<Val<'a>> {
        let found = operand.get(&Val::text(field.to_owned()));
        found.or_else(|| operand.get(&Val::text(unescape(field)?)))
    }

    fn has(&self, operand: &Val<'a>, field: &str) -> Outcome<'a> {
        match operand {
            Val::Map(_) | Val::Object(..) => Ok(Val::Bool(self.lookup(operand, field).is_some())),
            Val::Variables => Ok(Val::Bool(self.scope.lazy.contains_key(field))),
            Val::Optional(inner) => {
                Ok(Val::Bool(inner.as_ref().is_some_and(|inner| self.lookup(inner, field).is_some())))
            }
            other => Err(CelError::message(format!("type '{}' does not support field selection", other.type_name()))),
        }
    }

    fn call(&self, call: &'a CallExpr, locals: Locals<'_, 'a>) -> Outcome<'a> {
        let (name, args) = (call.func_name.as_str(), call.args.as_slice());
        match (name, args) {
            (op::LOGICAL_AND, [left, right]) => return self.logic(left, right, false, locals),
            (op::LOGICAL_OR, [left, right]) => return self.logic(left, right, true, locals),
            (op::CONDITIONAL, [test, yes, no]) => {
                return match self.eval(test, locals)? {
                    Val::Bool(true) => self.eval(yes, locals),
                    Val::Bool(false) => self.eval(no, locals),
                    _ => Err(CelError::message("no such overload")),
                };
            }
            (op::NOT_STRICTLY_FALSE, [inner]) => {
                return match self.eval(inner, locals) {
                    Ok(Val::Bool(false)) => Ok(Val::Bool(false)),
                    Err(CelError::Budget) => Err(CelError::Budget),
                    _ => Ok(Val::Bool(true)),
                };
            }
            (op::OPT_SELECT, [operand, field]) => {
                let operand = self.eval(operand, locals)?;
                let Val::Text(field) = self.eval(field, locals)? else {
                    return Err(CelError::message("no such overload"));
                };
                return Ok(match &operand {
                    Val::Optional(None) => operand,
                    Val::Optional(Some(inner)) => Val::Optional(self.lookup(inner, &field).map(Rc::new)),
                    _ => Val::Optional(self.lookup(&operand, &field).map(Rc::new)),
                });
            }
            _ => {}
        }
        if let Some(value) = self.macros(call, locals) {
            return value;
        }
        let mut values = Vec::with_capacity(args.len() + 1);
        let mut full_name = std::borrow::Cow::Borrowed(name);
        if let Some(target) = &call.target {
            match &target.expr {
                Expr::Ident(space) if library::is_namespace(space) && self.ident(space, locals).is_err() => {
                    full_name = format!("{space}.{name}").into();
                }
                _ => values.push(self.eval(target, locals)?),
            }
        }
        for arg in args {
            values.push(self.eval(arg, locals)?);
        }
        library::call(&full_name, call.target.is_some() && full_name == name, &values, self.budget)
    }

    /// Macros that the parser leaves alone.
    fn macros(&self, call: &'a CallExpr, locals: Locals<'_, 'a>) -> Option<Outcome<'a>> {
        let target = call.target.as_deref()?;
        let name_of = |at: usize| match &call.args.get(at)?.expr {
            Expr::Ident(name) => Some(name.as_str()),
            _ => None,
        };
        match (call.func_name.as_str(), call.args.as_slice()) {
            ("bind", [_, init, body]) if matches!(&target.expr, Expr::Ident(space) if space == "cel") => {
                let name = name_of(0)?;
                Some(
                    self.eval(init, locals)
                        .and_then(|value| self.eval(body, Some(&Frame { name, value, outer: locals }))),
                )
            }
            (word @ ("optMap" | "optFlatMap"), [_, body]) => {
                let name = name_of(0)?;
                Some(self.eval(target, locals).and_then(|value| match value {
                    Val::Optional(None) => Ok(Val::Optional(None)),
                    Val::Optional(Some(inner)) => {
                        let frame = Frame { name, value: inner.as_ref().clone(), outer: locals };
                        let result = self.eval(body, Some(&frame))?;
                        Ok(if word == "optMap" { Val::some(result) } else { result })
                    }
                    _ => Err(CelError::message("no such overload")),
                }))
            }
            ("sortBy", [_, key]) => {
                let name = name_of(0)?;
                Some(self.eval(target, locals).and_then(|value| {
                    let mut keyed = Vec::new();
                    for item in value.items().ok_or_else(|| CelError::message("no such overload"))? {
                        keyed.push((self.eval(key, Some(&Frame { name, value: item.clone(), outer: locals }))?, item));
                    }
                    self.budget.spend(keyed.len() as u64)?;
                    keyed.sort_by(|(a, _), (b, _)| a.compare(b).unwrap_or(std::cmp::Ordering::Equal));
                    Ok(Val::list(keyed.into_iter().map(|(_, item)| item).collect()))
                }))
            }
            ("existsOne", [_, body]) => {
                let name = name_of(0)?;
                Some(
                    self.over_pairs(target, None, name, locals, |frame, count: &mut usize, _, _| {
                        *count += usize::from(matches!(self.eval(body, Some(frame))?, Val::Bool(true)));
                        Ok(true)
                    })
                    .map(|count| Val::Bool(count == 1)),
                )
            }
            (word @ ("all" | "exists" | "existsOne" | "exists_one"), [_, _, body]) => {
                let (first, second) = (name_of(0)?, name_of(1)?);
                let outcome =
                    self.over_pairs(target, Some(first), second, locals, |frame, seen: &mut (usize, usize), _, _| {
                        let hit = matches!(self.eval(body, Some(frame))?, Val::Bool(true));
                        *if hit { &mut seen.0 } else { &mut seen.1 } += 1;
                        Ok(!matches!((word, hit), ("all", false) | ("exists", true)))
                    });
                Some(outcome.map(|(hits, misses)| match word {
                    "all" => Val::Bool(misses == 0),
                    "exists" => Val::Bool(hits > 0),
                    _ => Val::Bool(hits == 1),
                }))
            }
            (word @ ("transformList" | "transformMap" | "transformMapEntry"), [_, _, rest @ ..])
                if !rest.is_empty() && rest.len() <= 2 =>
            {
                let (first, second) = (name_of(0)?, name_of(1)?);
                let (filter, body) = if rest.len() == 2 { (Some(&rest[0]), &rest[1]) } else { (None, &rest[0]) };
                let outcome = self.over_pairs(
                    target,
                    Some(first),
                    second,
                    locals,
                    |frame, out: &mut Vec<(Val<'a>, Val<'a>)>, key, _| {
                        if let Some(filter) = filter
                            && !matches!(self.eval(filter, Some(frame))?, Val::Bool(true))
                        {
                            return Ok(true);
                        }
                        let value = self.eval(body, Some(frame))?;
                        if word == "transformMapEntry" {
                            out.extend(value.entries().ok_or_else(|| CelError::message("no such overload"))?);
                        } else {
                            out.push((key.clone(), value));
                        }
                        Ok(true)
                    },
                );
                Some(outcome.map(|out| match word {
                    "transformList" => Val::list(out.into_iter().map(|(_, value)| value).collect()),
                    _ => Val::Map(Rc::new(out)),
                }))
            }
            _ => None,
        }
    }

    /// Runs `step` over the pairs of a map or of a list and its places, until it says to stop.
    fn over_pairs<'f, S: Default>(
        &self,
        target: &'a IdedExpr,
        first: Option<&'f str>,
        second: &'f str,
        locals: Locals<'f, 'a>,
        step: impl Fn(&Frame<'_, 'a>, &mut S, &Val<'a>, &Val<'a>) -> Result<bool, CelError>,
    ) -> Result<S, CelError> {
        let range = self.eval(target, locals)?;
        let pairs = match range.items() {
            Some(items) => items.into_iter().zip(0_i64..).map(|(item, at)| (Val::Int(at), item)).collect(),
            None => range.entries().ok_or_else(|| CelError::message("no such overload"))?,
        };
        let keys_only = first.is_none() && matches!(range, Val::Map(_) | Val::Object(..));
        let mut state = S::default();
        for (key, value) in pairs {
            self.budget.spend(1)?;
            let outer = Frame { name: first.unwrap_or(""), value: key.clone(), outer: locals };
            let inner = if keys_only { key.clone() } else { value.clone() };
            let frame = Frame { name: second, value: inner, outer: Some(&outer) };
            if !step(&frame, &mut state, &key, &value)? {
                break;
            }
        }
        Ok(state)
    }

    /// `&&` and `||`: either side may decide, even when the other fails.
    fn logic(&self, left: &'a IdedExpr, right: &'a IdedExpr, decides: bool, locals: Locals<'_, 'a>) -> Outcome<'a> {
        let left = self.eval(left, locals);
        match left {
            Ok(Val::Bool(value)) if value == decides => return Ok(Val::Bool(decides)),
            Err(CelError::Budget) => return left,
            _ => {}
        }
        match (left, self.eval(right, locals)) {
            (_, Ok(Val::Bool(value))) if value == decides => Ok(Val::Bool(decides)),
            (Ok(Val::Bool(_)), Ok(Val::Bool(_))) => Ok(Val::Bool(!decides)),
            (Err(error), _) | (_, Err(error)) => Err(error),
            _ => Err(CelError::message("no such overload")),
        }
    }

    fn fold(&self, fold: &'a ComprehensionExpr, locals: Locals<'_, 'a>) -> Outcome<'a> {
        let range = self.eval(&fold.iter_range, locals)?;
        let items = match (range.items(), &fold.iter_var2) {
            (Some(items), _) => {
                items.into_iter().zip(0_i64..).map(|(item, at)| (Val::Int(at), item)).collect::<Vec<_>>()
            }
            (None, second) => {
                let entries = range.entries().ok_or_else(|| CelError::message("no such overload"))?;
                entries
                    .into_iter()
                    .map(|(key, value)| (key.clone(), if second.is_some() { value } else { key }))
                    .collect()
            }
        };
        self.budget.spend(items.len() as u64)?;
        let mut accumulator = self.eval(&fold.accu_init, locals)?;
        let endless = matches!(&fold.loop_cond.expr, Expr::Literal(LiteralValue::Boolean(flag)) if *flag.inner());
        for (key, item) in items {
            if !endless {
                let frame = Frame { name: &fold.accu_var, value: accumulator.clone(), outer: locals };
                if matches!(self.eval(&fold.loop_cond, Some(&frame))?, Val::Bool(false)) {
                    break;
                }
            }
            let outer;
            let frame = match &fold.iter_var2 {
                Some(second) => {
                    outer = Frame { name: &fold.iter_var, value: key, outer: locals };
                    Frame { name: second, value: item, outer: Some(&outer) }
                }
                None => Frame { name: &fold.iter_var, value: item, outer: locals },
            };
            accumulator = self.step(&fold.loop_step, &fold.accu_var, accumulator, &frame)?;
        }
        let frame = Frame { name: &fold.accu_var, value: accumulator, outer: locals };
        self.eval(&fold.result, Some(&frame))
    }

    /// One step of a fold. Appending to the accumulator is done in place, so that `map` and `filter` take linear time.
    fn step(&self, expr: &'a IdedExpr, accu: &str, accumulator: Val<'a>, locals: &Frame<'_, 'a>) -> Outcome<'a> {
        let is_accu = |expr: &IdedExpr| matches!(&expr.expr, Expr::Ident(name) if name == accu);
        if is_accu(expr) {
            return Ok(accumulator);
        }
        if let Expr::Call(call) = &expr.expr {
            match (call.func_name.as_str(), call.args.as_slice()) {
                (op::CONDITIONAL, [test, yes, no]) => {
                    let frame = Frame { name: accu, value: Val::Null, outer: Some(locals) };
                    return match self.eval(test, Some(&frame))? {
                        Val::Bool(true) => self.step(yes, accu, accumulator, locals),
                        Val::Bool(false) => self.step(no, accu, accumulator, locals),
                        _ => Err(CelError::message("no such overload")),
                    };
                }
                (op::ADD, [left, right]) if is_accu(left) => {
                    if let (Val::List(mut items), Expr::List(_)) = (accumulator.clone(), &right.expr) {
                        drop(accumulator);
                        let new = self.eval(right, Some(locals))?;
                        Rc::make_mut(&mut items).extend(new.items().unwrap_or_default());
                        return Ok(Val::List(items));
                    }
                }
                _ => {}
            }
        }
        self.eval(expr, Some(&Frame { name: accu, value: accumulator, outer: Some(locals) }))
    }
}

fn push_entry<'a>(entries: &mut Vec<(Val<'a>, Val<'a>)>, key: Val<'a>, value: Val<'a>, optional: bool) {
    match value {
        Val::Optional(inner) if optional => entries.extend(inner.map(|inner| (key, inner.as_ref().clone()))),
        value => entries.push((key, value)),
    }
}

fn literal_value<'a>(literal: &'a LiteralValue) -> Val<'a> {
    match literal {
        LiteralValue::Boolean(flag) => Val::Bool(*flag.inner()),
        LiteralValue::Bytes(bytes) => Val::Bytes(bytes.inner().into()),
        LiteralValue::Double(float) => Val::Double(*float.inner()),
        LiteralValue::Int(int) => Val::Int(*int.inner()),
        LiteralValue::Null => Val::Null,
        LiteralValue::String(text) => Val::text(text.inner()),
        LiteralValue::UInt(int) => Val::Uint(*int.inner()),
    }
}

/// Field names that are no identifiers, as rules write them: `foo__dash__bar` → `foo-bar`, `__if__` → `if`.
pub(super) fn unescape(name: &str) -> Option<String> {
    if !name.contains("__") {
        return None;
    }
    const RESERVED: [&str; 22] = [
        "true",
        "false",
        "null",
        "in",
        "as",
        "break",
        "const",
        "continue",
        "else",
        "for",
        "function",
        "if",
        "import",
        "let",
        "loop",
        "package",
        "namespace",
        "return",
        "var",
        "void",
        "while",
        "self",
    ];
    if let Some(word) = name.strip_prefix("__").and_then(|rest| rest.strip_suffix("__"))
        && RESERVED.contains(&word)
    {
        return Some(word.to_owned());
    }
    let plain = name
        .replace("__underscores__", "\u{0}")
        .replace("__dot__", ".")
        .replace("__dash__", "-")
        .replace("__slash__", "/")
        .replace('\u{0}', "__");
    (plain != name).then_some(plain)
}
