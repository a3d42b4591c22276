//! Metadata: names, labels, annotations, owners, finalizers and label selectors.

use coracle_schema::FieldError;
use serde_json::Value;

use crate::kinds::at::{At, Errs, IMMUTABLE, same};
use crate::kinds::names;

/// Bytes of all annotations together.
const ANNOTATIONS_MAX_BYTES: usize = 256 * 1024;

/// Errors of the metadata of a new object; `name` is the kind's own rule.
pub fn check(object: &Value, namespaced: bool, name: names::Check) -> Vec<FieldError> {
    let mut e = Errs::default();
    let meta = At::root(object).at("metadata");
    let (n, generate) = (meta.at("name"), meta.at("generateName"));
    if !generate.is_zero() {
        // A generated name may end with a dash here, as something follows.
        let whole = format!("{}a", generate.str().trim_end_matches('-'));
        for r in name(&whole) {
            e.invalid(&generate, r);
        }
    }
    if n.is_zero() {
        e.required(&n, "name or generateName is required");
    } else {
        e.check(&n, name);
    }
    let ns = meta.at("namespace");
    if namespaced {
        if ns.is_zero() {
            e.required(&ns, "");
        } else {
            e.check(&ns, names::dns1123_label);
        }
    } else if !ns.is_zero() {
        e.forbidden(&ns, "not allowed on this type");
    }
    common(&meta, &mut e);
    e.0
}

/// Errors of changed metadata.
pub fn check_update(new: &Value, old: &Value) -> Vec<FieldError> {
    let mut e = Errs::default();
    let (new, old) = (At::root(new).at("metadata"), At::root(old).at("metadata"));
    if old.at("deletionTimestamp").is_set() {
        for f in new.at("finalizers").items() {
            if !old.at("finalizers").array().contains(f.v) {
                e.forbidden(
                    &new.at("finalizers"),
                    format!("no new finalizers can be added if the object is being deleted, found new finalizers []string{{{:?}}}", f.str()),
                );
                break;
            }
        }
    }
    for f in ["name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"] {
        if !same(new.at(f).v, old.at(f).v) {
            e.invalid(&new.at(f), IMMUTABLE);
        }
    }
    common(&new, &mut e);
    e.0
}

fn common(meta: &At<'_>, e: &mut Errs) {
    if meta.at("generation").int() < 0 {
        e.invalid(&meta.at("generation"), crate::kinds::at::NOT_NEGATIVE);
    }
    labels(&meta.at("labels"), e);
    annotations(&meta.at("annotations"), e);
    owners(&meta.at("ownerReferences"), e);
    let finalizers = meta.at("finalizers");
    for f in finalizers.items() {
        e.check(&finalizers.with(f.v), names::qualified_name);
    }
    let has = |w: &str| finalizers.array().iter().any(|f| f == w);
    if has("orphan") && has("foregroundDeletion") {
        e.invalid(&finalizers, "finalizer orphan and foregroundDeletion cannot be both set");
    }
}

/// Errors of new finalizers: those of most built-in kinds are standard ones, or have a domain and a path. Definitions, custom
/// resources and the server's own configuration never asked for that.
pub fn check_finalizers(group: &str, new: &Value, old: Option<&Value>) -> Vec<FieldError> {
    const FREE: [&str; 4] = [
        "apiextensions.k8s.io",
        "apiregistration.k8s.io",
        "admissionregistration.k8s.io",
        "flowcontrol.apiserver.k8s.io",
    ];
    let mut e = Errs::default();
    let finalizers = At::root(new).at("metadata").at("finalizers");
    let had =
        |f: &Value| old.and_then(|old| old.pointer("/metadata/finalizers")?.as_array()).is_some_and(|l| l.contains(f));
    for f in finalizers.items().filter(|f| !FREE.contains(&group) && !had(f.v)) {
        if names::qualified_name(f.str()).is_empty() && !names::fully_qualified_finalizer(f.str()) {
            e.invalid(&finalizers.with(f.v), "name is neither a standard finalizer name nor is it fully qualified");
        }
    }
    e.0
}

/// One finalizer of a namespace's spec.
pub fn finalizer_name(at: &At<'_>, e: &mut Errs) {
    e.check(at, names::qualified_name);
    if !names::fully_qualified_finalizer(at.str()) {
        e.invalid(at, "name is neither a standard finalizer name nor is it fully qualified");
    }
}

/// A map of labels.
pub fn labels(at: &At<'_>, e: &mut Errs) {
    for (k, v) in at.entries() {
        for r in names::qualified_name(k) {
            e.invalid_value(at, k, r);
        }
        for r in names::label_value(v.str()) {
            e.invalid_value(at, v.str(), r);
        }
    }
}

/// A map of annotations.
pub fn annotations(at: &At<'_>, e: &mut Errs) {
    let mut total = 0;
    for (k, v) in at.entries() {
        // Keys are compared without case, for history's sake.
        for r in names::qualified_name(&k.to_lowercase()) {
            e.invalid_value(at, k, r);
        }
        total += k.len() + v.len();
    }
    if total > ANNOTATIONS_MAX_BYTES {
        e.too_long(at, ANNOTATIONS_MAX_BYTES);
    }
}

fn owners(at: &At<'_>, e: &mut Errs) {
    let mut controller: Option<&str> = None;
    for o in at.items() {
        if o.at("apiVersion").is_zero() {
            e.invalid_value(&o.at("apiVersion"), "", "version must not be empty");
        }
        for (f, words) in
            [("kind", "kind must not be empty"), ("name", "name must not be empty"), ("uid", "uid must not be empty")]
        {
            if o.at(f).is_zero() {
                e.invalid_value(&o.at(f), "", words);
            }
        }
        if o.at("apiVersion").str() == "v1" && o.at("kind").str() == "Event" {
            e.invalid_value(&o, o.v.clone(), "/v1, Kind=Event is disallowed from being an owner");
        }
        if o.at("controller").bool() {
            if let Some(other) = controller {
                e.invalid(
                    at,
                    format!(
                        "Only one reference can have Controller set to true. Found \"true\" in references for {other} and {}",
                        o.at("name").str()
                    ),
                );
            }
            controller = Some(o.at("name").str());
        }
    }
}

/// A `metav1.LabelSelector`.
pub fn selector(at: &At<'_>, e: &mut Errs) {
    labels(&at.at("matchLabels"), e);
    for x in at.at("matchExpressions").items() {
        let values = x.at("values");
        match x.at("operator").str() {
            "In" | "NotIn" => {
                if values.is_empty() {
                    e.required(&values, "must be specified when `operator` is 'In' or 'NotIn'");
                }
            }
            "Exists" | "DoesNotExist" => {
                if !values.is_empty() {
                    e.forbidden(&values, "may not be specified when `operator` is 'Exists' or 'DoesNotExist'");
                }
            }
            _ => e.invalid(&x.at("operator"), "not a valid selector operator"),
        }
        let key = x.at("key");
        for r in names::qualified_name(key.str()) {
            e.invalid(&key, r);
        }
        for v in values.items() {
            e.check(&v, names::label_value);
        }
    }
}

/// Whether a `metav1.LabelSelector` selects a set of labels. A selector that is malformed selects nothing.
pub fn selects(selector: &Value, labels: &Value) -> bool {
    let label = |k: &str| labels.get(k).and_then(Value::as_str);
    let exact = selector.get("matchLabels").and_then(Value::as_object);
    if exact.is_some_and(|m| m.iter().any(|(k, v)| label(k) != v.as_str())) {
        return false;
    }
    crate::kinds::edit::list(selector, "matchExpressions").iter().all(|x| {
        let have = label(crate::kinds::edit::text(x, "key"));
        let listed = have.is_some_and(|h| crate::kinds::edit::list(x, "values").iter().any(|v| v == h));
        match crate::kinds::edit::text(x, "operator") {
            "In" => listed,
            "NotIn" => !listed,
            "Exists" => have.is_some(),
            "DoesNotExist" => have.is_none(),
            _ => false,
        }
    })
}

/// True for a selector without any requirement.
pub fn selects_all(selector: &Value) -> bool {
    ["matchLabels", "matchExpressions"].iter().all(|f| crate::kinds::edit::zero(selector.get(*f)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn words(errors: &[FieldError]) -> Vec<String> {
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn metadata_words() {
        let o = json!({"metadata": {"name": "a", "namespace": "b", "labels": {"a b": "c"},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "", "uid": "1"}]}});
        assert_eq!(
            words(&check(&o, true, names::dns1123_subdomain)),
            [
                "metadata.labels: Invalid value: \"a b\": name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')",
                "metadata.ownerReferences[0].name: Invalid value: \"\": name must not be empty"
            ]
        );
        let o = json!({"metadata": {"generateName": "a-", "namespace": "b"}});
        assert_eq!(
            words(&check(&o, true, names::dns1123_subdomain)),
            ["metadata.name: Required value: name or generateName is required"]
        );
    }

    #[test]
    fn selectors_select() {
        let s = json!({"matchLabels": {"a": "1"}, "matchExpressions": [{"key": "b", "operator": "NotIn", "values": ["x"]}]});
        assert!(selects(&s, &json!({"a": "1"})));
        assert!(!selects(&s, &json!({"a": "1", "b": "x"})));
        assert!(!selects(&s, &json!({"b": "y"})));
        assert!(selects(&json!({}), &Value::Null));
    }
}
