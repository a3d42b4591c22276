//! Which address families a service has: what it asks for, what it had, and what the cluster is configured for.

use coracle_schema::FieldError;
use serde_json::{Value, json};

use crate::kinds::edit::{list, put, text, zero};

const POLICY: &str = "spec.ipFamilyPolicy";
pub(super) const V4: &str = "IPv4";
pub(super) const V6: &str = "IPv6";

/// The family of an address.
pub(super) fn family_of(ip: &str) -> &'static str {
    if ip.contains(':') { V6 } else { V4 }
}

fn other(family: &str) -> &'static str {
    if family == V4 { V6 } else { V4 }
}

fn len(spec: &Value, field: &str) -> usize {
    list(spec, field).len()
}

/// Settles `ipFamilyPolicy` and `ipFamilies`, and what is left of `clusterIPs` when a second family goes. `configured` has
/// the cluster's families, the default one first.
pub(super) fn settle(spec: &mut Value, before: Option<&Value>, configured: &[&str]) -> Result<(), Vec<FieldError>> {
    let same = |spec: &Value, field: &str| before.is_some_and(|before| list(spec, field) == list(before, field));
    let prefers = |spec: &Value| text(spec, "ipFamilyPolicy") == "PreferDualStack";
    // Such a service stays as it is when the cluster's families change, until somebody asks for something else.
    if prefers(spec) && before.is_some_and(prefers) && same(spec, "clusterIPs") && same(spec, "ipFamilies") {
        return Ok(());
    }
    let free = text(spec, "clusterIP") == "None" && zero(spec.get("selector"));
    if zero(spec.get("ipFamilyPolicy")) {
        let had = before.map(|before| text(before, "ipFamilyPolicy")).filter(|policy| !policy.is_empty());
        put(spec, "ipFamilyPolicy", had.unwrap_or(if free { "RequireDualStack" } else { "SingleStack" }));
    }
    let policy = text(spec, "ipFamilyPolicy").to_owned();
    let single = policy == "SingleStack";
    let mut errors = Vec::new();
    let mut wrong = |at: String, value: Value, why: String| errors.push(FieldError::invalid(at, value, why));
    for (field, words) in [("clusterIPs", "cluster IP"), ("ipFamilies", "IP family")] {
        let fewer = before.is_some_and(|before| len(before, field) == 2 && len(spec, field) == 1);
        if single && same(spec, field) && len(spec, field) > 1 {
            let first = list(spec, field)[0].clone();
            put(spec, field, json!([first]));
        } else if !single && fewer {
            let why = format!("must be 'SingleStack' to release the secondary {words}");
            wrong(POLICY.into(), json!(policy), why);
        }
    }
    for (field, words) in [("clusterIPs", "cluster IPs"), ("ipFamilies", "IP families")] {
        if single && len(spec, field) == 2 {
            let why = format!("must be 'RequireDualStack' or 'PreferDualStack' when multiple {words} are specified");
            wrong(POLICY.into(), json!(policy), why);
        }
    }
    let mut families: Vec<String> = list(spec, "ipFamilies").iter().filter_map(Value::as_str).map(Into::into).collect();
    let ips = list(spec, "clusterIPs");
    for (i, ip) in ips.iter().filter_map(Value::as_str).enumerate().filter(|(_, ip)| *ip != "None") {
        let family = family_of(ip);
        if i < families.len() {
            continue;
        }
        if configured.contains(&family) {
            families.push(family.into());
        } else {
            wrong(format!("spec.clusterIPs[{i}]"), json!(ips), format!("{family} is not configured on this cluster"));
        }
    }
    if !errors.is_empty() {
        return Err(errors);
    }
    if !free {
        if policy == "RequireDualStack" && configured.len() < 2 {
            let why = "this cluster is not configured for dual-stack services";
            errors.push(FieldError::invalid(POLICY, "RequireDualStack", why));
        }
        for (i, family) in families.iter().enumerate().filter(|(_, family)| !configured.contains(&family.as_str())) {
            let at = format!("spec.ipFamilies[{i}]");
            errors.push(FieldError::invalid(at, family.as_str(), "not configured on this cluster"));
        }
        if !errors.is_empty() {
            return Err(errors);
        }
    }
    if families.is_empty() {
        families.extend(configured.first().map(ToString::to_string));
    }
    // Without addresses to give, nothing keeps a service from both.
    if let [only] = families.as_slice()
        && !single
        && (free || configured.len() == 2)
    {
        families.push(other(only).into());
    }
    put(spec, "ipFamilies", json!(families));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The policy and the families that come of a service, or the first error.
    fn settled(mut spec: Value, before: Option<Value>, configured: &[&str]) -> String {
        match settle(&mut spec, before.as_ref(), configured) {
            Ok(()) => {
                let families: Vec<&str> = list(&spec, "ipFamilies").iter().filter_map(Value::as_str).collect();
                format!("{} {} {}", text(&spec, "ipFamilyPolicy"), families.join("+"), len(&spec, "clusterIPs"))
            }
            Err(errors) => errors[0].to_string(),
        }
    }

    #[test]
    fn new_services_get_what_they_ask_for() {
        let new = |spec: Value, configured: &[&str]| settled(spec, None, configured);
        let (one, both): (&[&str], &[&str]) = (&[V4], &[V6, V4]);
        assert_eq!(new(json!({}), one), "SingleStack IPv4 0");
        assert_eq!(new(json!({}), both), "SingleStack IPv6 0");
        assert_eq!(new(json!({"ipFamilyPolicy": "PreferDualStack"}), one), "PreferDualStack IPv4 0");
        assert_eq!(new(json!({"ipFamilyPolicy": "PreferDualStack"}), both), "PreferDualStack IPv6+IPv4 0");
        let required = json!({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv4"]});
        assert_eq!(new(required.clone(), both), "RequireDualStack IPv4+IPv6 0");
        assert!(new(required, one).contains("not configured for dual-stack"));
        assert!(new(json!({"ipFamilies": ["IPv6"]}), one).contains("spec.ipFamilies[0]"));
        assert!(new(json!({"ipFamilies": ["IPv4", "IPv6"]}), both).contains("multiple IP families"));
        assert_eq!(new(json!({"clusterIPs": ["fd00::5"]}), both), "SingleStack IPv6 1");
        assert!(new(json!({"clusterIPs": ["fd00::5"]}), one).contains("IPv6 is not configured on this cluster"));
        // Headless: without a selector it may have whatever its slices have.
        assert_eq!(new(json!({"clusterIP": "None", "clusterIPs": ["None"]}), one), "RequireDualStack IPv4+IPv6 1");
        let selecting = json!({"clusterIP": "None", "clusterIPs": ["None"], "selector": {"a": "b"}});
        assert_eq!(new(selecting, one), "SingleStack IPv4 1");
    }

    #[test]
    fn changes_add_and_release_the_second_family() {
        let one = json!({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"], "clusterIPs": ["10.0.0.1"]});
        let two = json!({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv4", "IPv6"], "clusterIPs": ["10.0.0.1", "fd00::1"]});
        let change = |from: &Value, patch: Value| {
            let mut to = from.clone();
            patch.as_object().expect("fields").iter().for_each(|(field, value)| put(&mut to, field, value.clone()));
            settled(to, Some(from.clone()), &[V4, V6])
        };
        assert_eq!(change(&one, json!({"ipFamilyPolicy": "PreferDualStack"})), "PreferDualStack IPv4+IPv6 1");
        assert_eq!(change(&two, json!({"ipFamilyPolicy": "SingleStack"})), "SingleStack IPv4 1");
        assert!(change(&two, json!({"clusterIPs": ["10.0.0.1"]})).contains("release the secondary cluster IP"));
        assert!(change(&two, json!({"ipFamilies": ["IPv4"]})).contains("release the secondary IP family"));
        assert_eq!(change(&two, json!({"ipFamilyPolicy": null})), "RequireDualStack IPv4+IPv6 2");
        // What prefers two and was made where there was one stays so.
        let prefers = json!({"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv4"], "clusterIPs": ["10.0.0.1"]});
        assert_eq!(change(&prefers, json!({"type": "NodePort"})), "PreferDualStack IPv4 1");
    }
}
