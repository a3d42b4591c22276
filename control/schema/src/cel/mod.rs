//! CEL for custom resource rules and admission policies.
//!
//! The `cel` crate parses; evaluation is here, over JSON values without copying them, with a cost bound on every step and with
//! the libraries that Kubernetes adds to the language (lists, strings, regex, sets, math, URLs, IP addresses, quantities, formats,
//! semver, optionals, the authoriser).

mod authorizer;
mod check;
mod eval;
mod library;
mod rule;
mod value;

use std::cell::Cell;

use cel::common::ast::{IdedExpr, SourceInfo};
use cel::parser::Parser;

pub use authorizer::{Access, Authorizer, Verdict};
pub use eval::Scope;
pub use rule::Rule;
pub use value::{CelError, Val};

use crate::schema::Schema;

/// Most steps one expression may take.
pub const MAX_EXPRESSION_COST: u64 = 10_000_000;
/// Most steps all rules of one object may take.
pub const MAX_OBJECT_COST: u64 = 100_000_000;
/// Most steps that a rule may be estimated to take on the largest object its schema allows.
pub const MAX_ESTIMATED_RULE_COST: u64 = 10_000_000;
/// The same for all rules of a schema.
pub const MAX_ESTIMATED_SCHEMA_COST: u64 = 100_000_000;
/// How many items a list or map without `maxItems` or `maxProperties` is estimated to hold.
pub const UNBOUNDED_ITEMS: u64 = 100_000;
/// Longest expression.
const MAX_SOURCE_BYTES: usize = 16 << 10;
/// Stack of the thread that parses an expression; only what is used is ever mapped.
const PARSER_STACK_BYTES: usize = 128 << 20;
/// Deepest nesting of an expression.
const MAX_DEPTH: usize = 200;

/// What is left to spend.
#[derive(Debug)]
pub struct Budget {
    left: Cell<u64>,
}

impl Budget {
    /// For all the rules of one object.
    pub const fn of_object() -> Self {
        Self { left: Cell::new(MAX_OBJECT_COST) }
    }

    /// For one expression of a policy.
    pub const fn of_expression() -> Self {
        Self { left: Cell::new(MAX_EXPRESSION_COST) }
    }

    pub const fn is_spent(&self) -> bool {
        self.left.get() == 0
    }

    pub(crate) fn spend(&self, cost: u64) -> Result<(), CelError> {
        match self.left.get().checked_sub(cost) {
            Some(left) => {
                self.left.set(left);
                Ok(())
            }
            None => {
                self.left.set(0);
                Err(CelError::Budget)
            }
        }
    }

    /// A budget for one expression, out of this one.
    fn share(&self) -> Self {
        Self { left: Cell::new(self.left.get().min(MAX_EXPRESSION_COST)) }
    }

    fn settle(&self, share: &Self) {
        let used = self.left.get().min(MAX_EXPRESSION_COST) - share.left.get();
        self.left.set(self.left.get() - used);
    }
}

/// A variable of an expression.
#[derive(Clone, Copy, Debug)]
pub struct Variable<'a> {
    pub name: &'a str,
    /// What is known of its fields; without it any field may be selected.
    pub schema: Option<&'a Schema>,
}

/// A parsed and checked expression.
#[derive(Debug)]
pub struct Program {
    source: String,
    expr: IdedExpr,
    cost: u64,
}

impl Program {
    /// Parses `source` and checks names and functions. The error is the server's, ready to follow `compilation failed: `.
    pub fn compile(source: &str, variables: &[Variable<'_>]) -> Result<Self, String> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(format!(
                "ERROR: <input>:-1:0: expression code point size exceeds limit: size: {}, limit {MAX_SOURCE_BYTES}",
                source.len()
            ));
        }
        let (expr, places) = parse(source)?;
        let cost = check::check(&expr, variables, &places)?;
        Ok(Self { source: source.to_owned(), expr, cost })
    }

    pub fn source(&self) -> &str {
        &self.source
    }

    /// Estimated steps on the largest value its schema allows.
    pub const fn cost_estimate(&self) -> u64 {
        self.cost
    }

    /// Whether the expression names `variable` anywhere.
    pub fn mentions(&self, variable: &str) -> bool {
        check::mentions(&self.expr, variable)
    }

    /// Evaluates with the variables of `scope`.
    pub fn eval<'a>(&'a self, scope: &Scope<'a>, budget: &Budget) -> Result<Val<'a>, CelError> {
        scope.run(&self.expr, budget)
    }

    /// Evaluates to a boolean.
    pub fn eval_bool<'a>(&'a self, scope: &Scope<'a>, budget: &Budget) -> Result<bool, CelError> {
        match self.eval(scope, budget)? {
            Val::Bool(value) => Ok(value),
            other => Err(CelError::message(format!("cel expression returned unexpected type: {}", other.type_name()))),
        }
    }
}

/// Parses on a stack of its own: the parser's recursion grows with the expression, which is refused afterwards if it is too deep.
fn parse(source: &str) -> Result<(IdedExpr, SourceInfo), String> {
    let run = || {
        let parser = Parser::new().enable_optional_syntax(true).enable_ident_escape_syntax(true);
        let (expr, places) = parser.parse_with_source_info(source).map_err(|errors| {
            let lines: Vec<String> = errors.errors.iter().map(ToString::to_string).collect();
            lines.join("\n")
        })?;
        match check::depth(&expr, MAX_DEPTH) {
            Some(_) => Ok((expr, places)),
            None => Err("ERROR: <input>:-1:0: expression recursion limit exceeded".into()),
        }
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("cel-parse".into()).stack_size(PARSER_STACK_BYTES);
        let parsed = thread.spawn_scoped(scope, run).map_err(|error| format!("cannot start the parser: {error}"))?;
        parsed.join().map_err(|_| "ERROR: <input>:-1:0: the parser failed on this expression".to_owned())?
    })
}

#[cfg(test)]
mod tests;
