//! Type checks of validating policies: each expression against the schema of each kind that the policy names, as
//! `status.typeChecking` tells it. They warn and forbid nothing, since a policy may be about several versions of a kind.

use coracle_schema::cel::{Program, Variable};
use serde_json::Value;

use crate::kinds::edit::{list, text};
use crate::server::ApiServer;

/// Kinds that one policy is checked against at most.
const KINDS_MOST: usize = 10;
const UNTYPED: [&str; 5] = ["request", "params", "namespaceObject", "authorizer", "variables"];

/// A warning about one expression.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Warning {
    /// Where the expression stands: `spec.validations[0].expression`.
    pub field_ref: String,
    /// What is wrong, for each kind a line that begins with it.
    pub warning: String,
}

/// The warnings about a policy, in the order of its expressions.
pub fn warnings(api: &ApiServer, policy: &Value) -> Vec<Warning> {
    let none = Value::Null;
    let spec = policy.get("spec").unwrap_or(&none);
    let rules = spec.pointer("/matchConstraints/resourceRules").and_then(Value::as_array);
    let names = |rule: &Value, field: &str| -> Vec<String> {
        list(rule, field).iter().filter_map(Value::as_str).filter(|name| *name != "*").map(str::to_owned).collect()
    };
    let mut kinds = Vec::new();
    for rule in rules.into_iter().flatten() {
        for group in names(rule, "apiGroups") {
            for version in names(rule, "apiVersions") {
                let found = names(rule, "resources");
                kinds.extend(found.iter().filter_map(|resource| api.registry.find(&group, &version, resource)));
            }
        }
    }
    kinds.truncate(KINDS_MOST);
    let mut expressions = Vec::new();
    for (index, validation) in list(spec, "validations").iter().enumerate() {
        for field in ["expression", "messageExpression"] {
            expressions.push((format!("spec.validations[{index}].{field}"), text(validation, field)));
        }
    }
    for (index, variable) in list(spec, "variables").iter().enumerate() {
        expressions.push((format!("spec.variables[{index}].expression"), text(variable, "expression")));
    }
    expressions.retain(|(_, source)| !source.is_empty());
    let mut found = Vec::new();
    for (field_ref, source) in expressions {
        let lines: Vec<String> = kinds
            .iter()
            .filter_map(|kind| {
                let schema = kind.schema();
                let mut variables = UNTYPED.map(|name| Variable { name, schema: None }).to_vec();
                variables.extend(["object", "oldObject"].map(|name| Variable { name, schema: Some(&**schema) }));
                let error = Program::compile(source, &variables).err()?;
                let group = if kind.group.is_empty() { String::new() } else { format!("{}/", kind.group) };
                Some(format!("{group}{}, Kind={}: {error}", kind.version, kind.kind))
            })
            .collect();
        if !lines.is_empty() {
            found.push(Warning { field_ref, warning: lines.join("\n") });
        }
    }
    found
}
