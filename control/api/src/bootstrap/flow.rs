//! Who keeps a built-in rule of priority and fairness. Source: `k8s.io/apiserver/pkg/.../flowcontrol/ensurer`.

use serde_json::Value;

use crate::kinds::edit::{child, put};
use crate::object;

/// Whether the server keeps the spec: `true`, or `false` when an administrator does.
const KEPT_BY_SERVER: &str = "apf.kubernetes.io/autoupdate-spec";
/// Those without which requests would have no level; the server keeps them whatever they say.
const MANDATORY: [&str; 2] = ["exempt", "catch-all"];

/// The object as it is to be; `None` when it is so. A rule that does not say who keeps it is the server's until somebody
/// changes it.
pub(super) fn kept(have: &Value, ours: &Value) -> Option<Value> {
    let said = match have["metadata"]["annotations"][KEPT_BY_SERVER].as_str() {
        Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Some(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Some(false),
        _ => None,
    };
    let generation = have["metadata"]["generation"].as_i64().unwrap_or_default();
    let by_server = MANDATORY.contains(&object::name(ours)) || said.unwrap_or(generation == 1);
    let mut kept = have.clone();
    put(child(child(&mut kept, "metadata"), "annotations"), KEPT_BY_SERVER, by_server.to_string());
    if by_server {
        let mut spec = ours["spec"].clone();
        // How much of the seats exempt requests are counted with is the administrator's to say.
        for member in ["nominalConcurrencyShares", "lendablePercent"] {
            if let (true, Some(value)) = (spec["exempt"].is_object(), have["spec"]["exempt"].get(member)) {
                put(child(&mut spec, "exempt"), member, value.clone());
            }
        }
        if spec != have["spec"] {
            put(&mut kept, "spec", spec);
            put(child(&mut kept, "metadata"), "generation", generation + 1);
        }
    }
    (kept != *have).then_some(kept)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rule(name: &str, said: Option<&str>, generation: i64, spec: Value) -> Value {
        let annotations = said.map(|said| json!({KEPT_BY_SERVER: said}));
        let metadata = json!({"name": name, "generation": generation, "annotations": annotations});
        json!({"metadata": metadata, "spec": spec})
    }

    #[test]
    fn rules_are_kept_by_whom_they_say() {
        let (right, wrong) = (json!({"matchingPrecedence": 1}), json!({"matchingPrecedence": 2}));
        let ours = |name: &str| rule(name, Some("true"), 1, right.clone());
        let kept = |have: Value| kept(&have, &ours(object::name(&have)));
        assert_eq!(kept(ours("a")), None);
        assert_eq!(kept(rule("a", Some("true"), 4, wrong.clone())), Some(rule("a", Some("true"), 5, right.clone())));
        assert_eq!(kept(rule("a", Some("false"), 4, wrong.clone())), None);
        // Who says nothing has it written down.
        assert_eq!(kept(rule("a", None, 1, wrong.clone())), Some(rule("a", Some("true"), 2, right.clone())));
        assert_eq!(kept(rule("a", None, 2, wrong.clone())), Some(rule("a", Some("false"), 2, wrong.clone())));
        assert_eq!(
            kept(rule("catch-all", Some("false"), 2, wrong)),
            Some(rule("catch-all", Some("true"), 3, right.clone()))
        );
    }

    #[test]
    fn seats_of_exempt_requests_are_the_administrators() {
        let ours = rule("exempt", Some("true"), 1, json!({"type": "Exempt", "exempt": {"lendablePercent": 0}}));
        let have = |spec| rule("exempt", Some("true"), 2, spec);
        assert_eq!(kept(&have(json!({"type": "Exempt", "exempt": {"lendablePercent": 50}})), &ours), None);
        let changed = kept(&have(json!({"type": "Limited", "exempt": {"lendablePercent": 50}})), &ours);
        assert_eq!(changed.expect("kept")["spec"], json!({"type": "Exempt", "exempt": {"lendablePercent": 50}}));
    }
}
