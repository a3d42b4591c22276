//! A cursor over an object that knows where it stands, and the list of errors found on the way.
//!
//! Validation code reads like the object: `let port = container.at("ports").item(0).at("hostPort")`. A missing value is
//! `null`, so no step can fail; the textual path is only built when an error is reported.

use std::rc::Rc;

use coracle_schema::{ErrorKind, FieldError};
use serde_json::Value;

use crate::kinds::names::{Check, Reasons};

static NULL: Value = Value::Null;

enum Step {
    Field(&'static str),
    Index(usize),
    Key(String),
}

struct Node {
    up: Option<Rc<Node>>,
    step: Step,
}

/// A value and the path to it.
#[derive(Clone)]
pub struct At<'a> {
    pub v: &'a Value,
    path: Option<Rc<Node>>,
}

impl<'a> At<'a> {
    pub fn root(v: &'a Value) -> Self {
        At { v, path: None }
    }

    fn down(&self, v: &'a Value, step: Step) -> Self {
        At { v, path: Some(Rc::new(Node { up: self.path.clone(), step })) }
    }

    /// The member `field`; null when it is missing.
    pub fn at(&self, field: &'static str) -> At<'a> {
        self.down(self.v.get(field).unwrap_or(&NULL), Step::Field(field))
    }

    /// The element `[i]`; null when it is missing.
    pub fn item(&self, i: usize) -> At<'a> {
        self.down(self.v.get(i).unwrap_or(&NULL), Step::Index(i))
    }

    /// The entry `[key]` of a map; null when it is missing.
    pub fn key(&self, key: &str) -> At<'a> {
        self.down(self.v.get(key).unwrap_or(&NULL), Step::Key(key.to_owned()))
    }

    /// The same place, seen as holding another value (an old object's, a part of it).
    pub fn with<'b>(&self, v: &'b Value) -> At<'b> {
        At { v, path: self.path.clone() }
    }

    /// A child named like a field although the value is this one's (paths that name no real field).
    pub fn named(&self, field: &'static str) -> At<'a> {
        self.down(self.v, Step::Field(field))
    }

    pub fn items(&self) -> impl Iterator<Item = At<'a>> + use<'a, '_> {
        self.array().iter().enumerate().map(|(i, v)| self.down(v, Step::Index(i)))
    }

    pub fn entries(&self) -> impl Iterator<Item = (&'a str, At<'a>)> + use<'a, '_> {
        self.v.as_object().into_iter().flatten().map(|(k, v)| (k.as_str(), self.down(v, Step::Key(k.clone()))))
    }

    pub fn array(&self) -> &'a [Value] {
        self.v.as_array().map_or(&[], Vec::as_slice)
    }

    /// Number of elements or members; 0 for anything else.
    pub fn len(&self) -> usize {
        match self.v {
            Value::Array(a) => a.len(),
            Value::Object(o) => o.len(),
            Value::String(s) => s.len(),
            _ => 0,
        }
    }

    /// Whether there is neither element nor member.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True for what Go calls the zero value: absent, `""`, `[]`, `{}`, `0`, `false`.
    pub fn is_zero(&self) -> bool {
        match self.v {
            Value::Null => true,
            Value::Bool(b) => !b,
            Value::Number(n) => n.as_i64() == Some(0) || n.as_f64() == Some(0.0),
            _ => self.is_empty(),
        }
    }

    /// True when the member is there at all (a pointer that is not nil).
    pub fn is_set(&self) -> bool {
        !self.v.is_null()
    }

    pub fn str(&self) -> &'a str {
        self.v.as_str().unwrap_or_default()
    }

    pub fn int(&self) -> i64 {
        self.v.as_i64().unwrap_or_default()
    }

    pub fn bool(&self) -> bool {
        self.v.as_bool().unwrap_or_default()
    }

    pub fn has(&self, field: &str) -> bool {
        self.v.get(field).is_some_and(|v| !v.is_null())
    }

    pub fn path(&self) -> String {
        let mut steps = Vec::new();
        let mut node = self.path.as_ref();
        while let Some(n) = node {
            steps.push(&n.step);
            node = n.up.as_ref();
        }
        let mut out = String::new();
        for s in steps.into_iter().rev() {
            match s {
                Step::Field(f) => {
                    if !out.is_empty() {
                        out.push('.');
                    }
                    out.push_str(f);
                }
                Step::Index(i) => out.push_str(&format!("[{i}]")),
                Step::Key(k) => out.push_str(&format!("[{k}]")),
            }
        }
        out
    }
}

/// Words that many checks share.
pub const NOT_NEGATIVE: &str = "must be greater than or equal to 0";
pub const IMMUTABLE: &str = "field is immutable";

/// The errors found so far, in the order of the checks.
#[derive(Default)]
pub struct Errs(pub Vec<FieldError>);

impl Errs {
    fn push(&mut self, kind: ErrorKind, at: &At<'_>, value: Option<Value>, detail: impl Into<String>) {
        self.0.push(FieldError::new(kind, at.path(), value, detail));
    }

    pub fn required(&mut self, at: &At<'_>, detail: impl Into<String>) {
        self.push(ErrorKind::Required, at, None, detail);
    }

    pub fn invalid(&mut self, at: &At<'_>, detail: impl Into<String>) {
        self.push(ErrorKind::Invalid, at, Some(at.v.clone()), detail);
    }

    pub fn invalid_value(&mut self, at: &At<'_>, value: impl Into<Value>, detail: impl Into<String>) {
        self.push(ErrorKind::Invalid, at, Some(value.into()), detail);
    }

    pub fn forbidden(&mut self, at: &At<'_>, detail: impl Into<String>) {
        self.push(ErrorKind::Forbidden, at, None, detail);
    }

    pub fn duplicate(&mut self, at: &At<'_>) {
        self.push(ErrorKind::Duplicate, at, Some(at.v.clone()), "");
    }

    pub fn not_found(&mut self, at: &At<'_>) {
        self.push(ErrorKind::NotFound, at, Some(at.v.clone()), "");
    }

    pub fn too_long(&mut self, at: &At<'_>, max_bytes: usize) {
        self.0.push(FieldError::too_long(at.path(), max_bytes));
    }

    pub fn too_many(&mut self, at: &At<'_>, actual: usize, max: usize) {
        self.0.push(FieldError::too_many(at.path(), actual, max));
    }

    pub fn not_supported(&mut self, at: &At<'_>, supported: &[&str]) {
        let v = if at.is_set() { at.v.clone() } else { Value::from("") };
        self.0.push(FieldError::not_supported(at.path(), v, supported));
    }

    /// One of `words`, which are listed in the given order.
    pub fn one_of(&mut self, at: &At<'_>, words: &[&str]) {
        if !words.contains(&at.str()) {
            self.not_supported(at, words);
        }
    }

    /// One of `words`; nothing at all is `Required value`.
    pub fn required_one_of(&mut self, at: &At<'_>, words: &[&str]) {
        if at.is_zero() {
            self.required(at, "");
        } else {
            self.one_of(at, words);
        }
    }

    /// One `Invalid value` a reason.
    pub fn reasons(&mut self, at: &At<'_>, reasons: Reasons) {
        for r in reasons {
            self.invalid(at, r);
        }
    }

    pub fn check(&mut self, at: &At<'_>, check: Check) {
        self.reasons(at, check(at.str()));
    }

    /// `check` of a string that must be there.
    pub fn required_check(&mut self, at: &At<'_>, check: Check) {
        if at.is_zero() {
            self.required(at, "");
        } else {
            self.check(at, check);
        }
    }

    pub fn not_negative(&mut self, at: &At<'_>) {
        if at.int() < 0 {
            self.invalid(at, NOT_NEGATIVE);
        }
    }

    /// The value may not differ from the old object's.
    pub fn immutable(&mut self, new: &At<'_>, old: &At<'_>) {
        if !same(new.v, old.v) {
            self.invalid(new, IMMUTABLE);
        }
    }
}

/// Equality that takes a missing value and an empty one for the same, as the API's semantic comparison does.
pub fn same(a: &Value, b: &Value) -> bool {
    let empty = |v: &Value| match v {
        Value::Null => true,
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
        _ => false,
    };
    match (a, b) {
        (Value::Object(x), Value::Object(y)) => {
            x.iter().all(|(k, v)| same(v, y.get(k).unwrap_or(&NULL)))
                && y.iter().all(|(k, v)| x.contains_key(k) || empty(v))
        }
        (Value::Array(x), Value::Array(y)) => x.len() == y.len() && x.iter().zip(y).all(|(a, b)| same(a, b)),
        _ => a == b || (empty(a) && empty(b)),
    }
}
