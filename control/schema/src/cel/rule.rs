//! One entry of `x-kubernetes-validations`.

use serde_json::Value;

use super::{Budget, CelError, Program, Scope, Val, Variable};
use crate::error::{ErrorKind, FieldError, Path};
use crate::schema::Schema;

const REASONS: [&str; 4] = ["FieldValueRequired", "FieldValueForbidden", "FieldValueInvalid", "FieldValueDuplicate"];

/// A compiled rule.
#[derive(Debug)]
pub struct Rule {
    program: Program,
    message: String,
    message_expression: Option<Program>,
    reason: ErrorKind,
    /// Relative path that errors are reported at, `.a.b` or empty.
    field_path: String,
    /// The rule compares with the earlier value.
    transition: bool,
    optional_old_self: bool,
}

impl Rule {
    /// Compiles the rule `json` of a node; `path` is where it stands.
    pub(crate) fn compile(json: &Value, schema: &Schema, path: &Path) -> Result<Self, Vec<FieldError>> {
        let text = |name: &str| json.get(name).and_then(Value::as_str).map(str::trim);
        let mut errors = Vec::new();
        let source = text("rule").unwrap_or("");
        if source.is_empty() {
            errors.push(FieldError::required(path.child("rule"), "rule is not specified"));
        }
        let message = text("message");
        match message {
            Some("") => errors.push(FieldError::invalid(path.child("message"), "", "must be non-empty if specified")),
            Some(words) if words.contains('\n') => {
                errors.push(FieldError::invalid(path.child("message"), words, "must not contain line breaks"));
            }
            None if source.contains('\n') => {
                let words = "message must be specified if rule contains line breaks";
                errors.push(FieldError::required(path.child("message"), words));
            }
            _ => {}
        }
        let reason = match text("reason") {
            None | Some("FieldValueInvalid") => ErrorKind::Invalid,
            Some("FieldValueForbidden") => ErrorKind::Forbidden,
            Some("FieldValueRequired") => ErrorKind::Required,
            Some("FieldValueDuplicate") => ErrorKind::Duplicate,
            Some(other) => {
                errors.push(FieldError::not_supported(path.child("reason"), other, &REASONS));
                ErrorKind::Invalid
            }
        };
        let field_path = text("fieldPath").unwrap_or("").to_owned();
        if !field_path.is_empty() && !names_a_field(&field_path, schema) {
            let words = format!("must be a valid path: {field_path}");
            errors.push(FieldError::invalid(path.child("fieldPath"), field_path.as_str(), words));
        }
        let optional_old_self = json.get("optionalOldSelf").and_then(Value::as_bool).unwrap_or(false);
        let old_schema = if optional_old_self { None } else { Some(schema) };
        let variables =
            [Variable { name: "self", schema: Some(schema) }, Variable { name: "oldSelf", schema: old_schema }];
        let mut compile = |source: &str, at: &str| {
            Program::compile(source, &variables)
                .map_err(|error| {
                    let words = format!("compilation failed: {error}");
                    errors.push(FieldError::invalid(path.child(at), json.clone(), words));
                })
                .ok()
        };
        let program = if source.is_empty() { None } else { compile(source, "rule") };
        let message_expression = text("messageExpression").and_then(|source| compile(source, "messageExpression"));
        let Some(program) = program.filter(|_| errors.is_empty()) else { return Err(errors) };
        Ok(Self {
            transition: program.mentions("oldSelf"),
            program,
            message: message.unwrap_or("").to_owned(),
            message_expression,
            reason,
            field_path,
            optional_old_self,
        })
    }

    /// Estimated steps for one value of the rule's schema.
    pub const fn cost_estimate(&self) -> u64 {
        self.program.cost_estimate()
    }

    /// Runs the rule on `value` at `path`; transition rules only when there is an earlier value.
    pub(crate) fn check<'a>(
        &'a self,
        value: &'a Value,
        old: Option<&'a Value>,
        schema: &'a Schema,
        path: &Path,
        budget: &mut Budget,
    ) -> Option<FieldError> {
        if self.transition && old.is_none() && !self.optional_old_self {
            return None;
        }
        // A rule without a look at the past has nothing new to say of what did not change.
        if !self.transition && old == Some(value) {
            return None;
        }
        let mut scope = Scope::new();
        scope.value("self", Val::from_json(value, Some(schema)));
        let old = old.map(|old| Val::from_json(old, Some(schema)));
        if self.optional_old_self {
            scope.value("oldSelf", Val::Optional(old.map(std::rc::Rc::new)));
        } else if let Some(old) = old {
            scope.value("oldSelf", old);
        }
        let share = budget.share();
        let outcome = self.program.eval_bool(&scope, &share);
        budget.settle(&share);
        let error = |words: String| Some(FieldError::new(ErrorKind::Invalid, path, None, words));
        match outcome {
            Ok(true) => None,
            Ok(false) => Some(self.failure(&scope, path, budget)),
            Err(CelError::Budget) if budget.is_spent() => error(
                "validation failed due to running out of cost budget, no further validation rules will be run".into(),
            ),
            Err(CelError::Budget) => {
                error(format!("call cost exceeds limit for rule: {}, try simplifying the rule", self.program.source()))
            }
            Err(CelError::Message(text)) => {
                let subject = if self.message.is_empty() { self.program.source() } else { &self.message };
                error(format!("{text} evaluating rule: {subject}"))
            }
        }
    }

    fn failure<'a>(&'a self, scope: &Scope<'a>, path: &Path, budget: &Budget) -> FieldError {
        let computed =
            self.message_expression.as_ref().and_then(|program| match program.eval(scope, &budget.share()) {
                Ok(Val::Text(text)) => {
                    let text = text.trim();
                    (!text.is_empty() && !text.contains('\n')).then(|| text.to_owned())
                }
                _ => None,
            });
        let words = computed.unwrap_or_else(|| {
            if self.message.is_empty() {
                format!("failed rule: {}", self.program.source())
            } else {
                self.message.clone()
            }
        });
        let at = match self.field_path.strip_prefix('.') {
            Some(field) => path.child(field),
            None if self.field_path.is_empty() => path.clone(),
            None => Path::new(format!("{path}{}", self.field_path)),
        };
        FieldError::new(self.reason, at, None, words)
    }
}

/// Whether a `fieldPath` (`.a.b['c']`) leads to a field of the schema.
fn names_a_field(field_path: &str, schema: &Schema) -> bool {
    let plain = field_path.replace("['", ".").replace("']", "");
    plain.starts_with('.') && schema.descend(&plain).is_some()
}
