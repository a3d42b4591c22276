//! A device as selectors see it.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use coracle_schema::cel::{Budget, Program, Scope, Val, Variable};
use k8s_openapi::api::resource::v1::{Device, DeviceAttribute};
use std::collections::HashMap;

/// Compiled selectors kept; all are dropped when there are more.
const MAX_PROGRAMS: usize = 4096;

/// Selectors that were compiled before.
#[derive(Debug, Default)]
pub(crate) struct Programs(Mutex<HashMap<String, Result<Arc<Program>, String>>>);

impl Programs {
    fn of(&self, expression: &str) -> Result<Arc<Program>, String> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(program) = known.get(expression) {
            return program.clone();
        }
        if known.len() >= MAX_PROGRAMS {
            known.clear();
        }
        let program = Program::compile(expression, &[Variable { name: "device", schema: None }]).map(Arc::new);
        known.insert(expression.to_owned(), program.clone());
        program
    }

    /// Whether a selector takes a device. An expression that fails takes none: its message goes to the pod.
    pub(super) fn matches(&self, expression: &str, driver: &str, device: &Device) -> Result<bool, String> {
        let program = self.of(expression).map_err(|error| format!("CEL compile error: {error}"))?;
        let value = value(expression, driver, device);
        let mut scope = Scope::new();
        scope.value("device", value);
        let outcome = program.eval_bool(&scope, &Budget::of_expression());
        outcome.map_err(|error| format!("CEL runtime error: {error}"))
    }
}

/// The full name of an attribute or a capacity: those without a domain have the driver's.
pub(super) fn qualified<'a>(name: &'a str, driver: &'a str) -> (&'a str, &'a str) {
    name.split_once('/').unwrap_or((driver, name))
}

/// An attribute of a device by its full name.
pub(super) fn attribute<'a>(device: &'a Device, driver: &str, name: &str) -> Option<&'a DeviceAttribute> {
    let wanted = qualified(name, driver);
    let all = device.attributes.iter().flatten();
    all.filter(|(own, _)| qualified(own, driver) == wanted).map(|(_, attribute)| attribute).next()
}

type Domains<'a> = BTreeMap<&'a str, Vec<(Val<'a>, Val<'a>)>>;

fn map<'a>(entries: Vec<(Val<'a>, Val<'a>)>) -> Val<'a> {
    Val::Map(Rc::new(entries))
}

fn value<'a>(expression: &'a str, driver: &'a str, device: &'a Device) -> Val<'a> {
    // A domain that a device knows nothing of is an empty map, so an expression may ask whether it has something: the
    // domains that it can ask for are among the texts in it.
    let asked = || expression.split(['"', '\'']).skip(1).step_by(2).map(|domain| (domain, Vec::new()));
    let mut attributes: Domains<'a> = asked().collect();
    for (name, attribute) in device.attributes.iter().flatten() {
        let (domain, name) = qualified(name, driver);
        attributes.entry(domain).or_default().push((Val::text(name), of_attribute(attribute)));
    }
    let mut capacity: Domains<'a> = asked().collect();
    for (name, amount) in device.capacity.iter().flatten() {
        let (domain, name) = qualified(name, driver);
        let amount = Val::quantity(&amount.value.0).unwrap_or(Val::Null);
        capacity.entry(domain).or_default().push((Val::text(name), amount));
    }
    let by_domain =
        |domains: Domains<'a>| map(domains.into_iter().map(|(domain, all)| (Val::text(domain), map(all))).collect());
    map(vec![
        (Val::text("driver"), Val::text(driver)),
        (Val::text("attributes"), by_domain(attributes)),
        (Val::text("capacity"), by_domain(capacity)),
        (Val::text("allowMultipleAllocations"), Val::Bool(device.allow_multiple_allocations == Some(true))),
    ])
}

fn of_attribute(attribute: &DeviceAttribute) -> Val<'_> {
    match attribute {
        DeviceAttribute { bool: Some(flag), .. } => Val::Bool(*flag),
        DeviceAttribute { int: Some(number), .. } => Val::Int(*number),
        DeviceAttribute { string: Some(text), .. } => Val::text(text.as_str()),
        DeviceAttribute { version: Some(version), .. } => Val::semver(version).unwrap_or(Val::Null),
        _ => Val::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_see_the_device() {
        let device: Device = serde_json::from_value(serde_json::json!({
            "name": "d", "attributes": {"model": {"string": "a"}, "other.io/n": {"int": 3}, "v": {"version": "1.2.3"}, "b": {"bool": true}},
            "capacity": {"memory": {"value": "8Gi"}},
        }))
        .expect("a device");
        let programs = Programs::default();
        let check = |expression: &str| programs.matches(expression, "gpu.io", &device);
        for (expression, wanted) in [
            (r#"device.driver == "gpu.io" && device.attributes["gpu.io"].model == "a""#, true),
            (r#"device.attributes["other.io"].n > 3"#, false),
            (r#"device.attributes["gpu.io"].v.isGreaterThan(semver("1.2.0"))"#, true),
            (r#"device.capacity["gpu.io"].memory.compareTo(quantity("4Gi")) > 0"#, true),
            (r#""x" in device.attributes["none.io"]"#, false),
            (r#"has(device.attributes["none.io"].x) || device.attributes["gpu.io"].b"#, true),
        ] {
            assert_eq!(check(expression), Ok(wanted), "{expression}");
        }
        assert!(
            check(r#"device.attributes["gpu.io"].none == 1"#).expect_err("no key").starts_with("CEL runtime error")
        );
        assert!(check("device.").expect_err("no expression").starts_with("CEL compile error"));
    }
}
