//! Validation of a pod spec, in a pod or in a template.

use serde_json::Value;

use crate::kinds::at::{At, Errs};
use crate::kinds::edit::{list, text};
use crate::kinds::pod::{containers, scheduling, security, volumes};
use crate::kinds::{meta, names, resources};

/// Where a pod spec stands, which decides a few checks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Pod,
    Template,
}

/// A pod template: metadata and spec.
pub fn check(t: &At<'_>, e: &mut Errs) {
    let m = t.at("metadata");
    meta::labels(&m.at("labels"), e);
    meta::annotations(&m.at("annotations"), e);
    annotations(t, e);
    check_spec(&t.at("spec"), Place::Template, e);
    if !t.at("spec").at("ephemeralContainers").is_empty() {
        e.forbidden(&t.at("spec").at("ephemeralContainers"), "ephemeral containers not allowed in pod template");
    }
}

/// Annotations with a meaning for pods.
pub fn annotations(pod: &At<'_>, e: &mut Errs) {
    let a = pod.at("metadata").at("annotations");
    let mirror = a.key("kubernetes.io/config.mirror");
    if mirror.is_set() && pod.at("spec").at("nodeName").is_zero() {
        e.invalid(&mirror, "must set spec.nodeName if mirror pod annotation is set");
    }
    let cost = a.key("controller.kubernetes.io/pod-deletion-cost");
    if let Some(s) = cost.v.as_str() {
        let fine = s.parse::<i32>().is_ok_and(|n| n.to_string() == s);
        if !fine {
            e.invalid(&cost, "must be a 32bit integer");
        }
    }
}

/// The spec itself, in the order in which a real server reports.
pub fn check_spec(spec: &At<'_>, place: Place, e: &mut Errs) {
    let vols = volumes::check(&spec.at("volumes"), e);
    let claims: Vec<&str> = list(spec.v, "resourceClaims").iter().map(|c| text(c, "name")).collect();
    resource_claims(&spec.at("resourceClaims"), e);
    containers::check(spec, &vols, &claims, e);
    e.required_one_of(&spec.at("restartPolicy"), &["Always", "OnFailure", "Never"]);
    e.required_one_of(&spec.at("dnsPolicy"), &["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"]);
    meta::labels(&spec.at("nodeSelector"), e);
    security::pod(spec, e);
    host_network_ports(spec, place, e);
    for s in spec.at("imagePullSecrets").items() {
        if s.len() > 1 {
            e.invalid(&s, "only name may be set");
        }
    }
    scheduling::affinity(&spec.at("affinity"), e);
    dns_config(spec, e);
    for g in spec.at("readinessGates").items() {
        e.check(&g.at("conditionType"), names::qualified_name);
    }
    let mut gates: Vec<&str> = Vec::new();
    for g in spec.at("schedulingGates").items() {
        let name = g.at("name");
        for r in names::qualified_name(name.str()) {
            e.invalid_value(&g, name.str(), r);
        }
        if gates.contains(&name.str()) {
            e.duplicate(&g.with(name.v));
        }
        gates.push(name.str());
    }
    scheduling::spread(&spec.at("topologySpreadConstraints"), e);
    if !spec.at("serviceAccountName").is_zero() {
        e.check(&spec.at("serviceAccountName"), names::dns1123_subdomain);
    }
    if !spec.at("nodeName").is_zero() {
        e.check(&spec.at("nodeName"), names::dns1123_subdomain);
    }
    let deadline = spec.at("activeDeadlineSeconds");
    if deadline.is_set() && !(1..=i64::from(i32::MAX)).contains(&deadline.int()) {
        e.invalid(&deadline, format!("must be between 1 and {}, inclusive", i32::MAX));
    }
    let grace = spec.at("terminationGracePeriodSeconds");
    if grace.int() < 0 && place == Place::Template {
        e.invalid(&grace, crate::kinds::at::NOT_NEGATIVE);
    }
    for f in ["hostname", "subdomain"] {
        if !spec.at(f).is_zero() {
            e.check(&spec.at(f), names::dns1123_label);
        }
    }
    scheduling::tolerations(&spec.at("tolerations"), e);
    host_aliases(&spec.at("hostAliases"), e);
    if !spec.at("priorityClassName").is_zero() {
        e.check(&spec.at("priorityClassName"), names::dns1123_subdomain);
    }
    if !spec.at("runtimeClassName").is_zero() {
        e.check(&spec.at("runtimeClassName"), names::dns1123_subdomain);
    }
    if spec.at("preemptionPolicy").is_set() {
        e.one_of(&spec.at("preemptionPolicy"), &["PreemptLowerPriority", "Never"]);
    }
    for (k, q) in spec.at("overhead").entries() {
        resources::amount(k, &q, e);
    }
    if spec.at("resources").is_set() {
        resources::requirements(&spec.at("resources"), true, e);
    }
    if spec.at("setHostnameAsFQDN").bool() && spec.at("hostNetwork").bool() && !spec.at("hostname").is_zero() {
        e.forbidden(&spec.at("setHostnameAsFQDN"), "must not be true when hostNetwork is true and hostname is set");
    }
    let os = spec.at("os");
    if os.is_set() {
        e.required_one_of(&os.at("name"), &["linux", "windows"]);
        security::os(spec, os.at("name").str(), e);
    }
}

fn resource_claims(at: &At<'_>, e: &mut Errs) {
    let mut seen: Vec<&str> = Vec::new();
    for c in at.items() {
        e.required_check(&c.at("name"), names::dns1123_label);
        if seen.contains(&c.at("name").str()) {
            e.duplicate(&c.at("name"));
        }
        seen.push(c.at("name").str());
        match (c.at("resourceClaimName").is_set(), c.at("resourceClaimTemplateName").is_set()) {
            (true, true) => {
                e.invalid(&c, "at most one of `resourceClaimName` or `resourceClaimTemplateName` may be specified")
            }
            (false, false) => e.invalid(&c, "must specify one of: `resourceClaimName`, `resourceClaimTemplateName`"),
            _ => {}
        }
    }
}

fn host_network_ports(spec: &At<'_>, place: Place, e: &mut Errs) {
    if !spec.at("hostNetwork").bool() {
        return;
    }
    for c in spec.at("containers").items() {
        for p in c.at("ports").items() {
            let (host, own) = (p.at("hostPort"), p.at("containerPort"));
            if (place == Place::Pod || host.int() != 0) && host.int() != own.int() {
                e.invalid_value(&host, host.int(), "must match `containerPort` when `hostNetwork` is true");
            }
        }
    }
}

/// Limits of name resolution in the C library.
const DNS_MAX_SERVERS: usize = 3;
const DNS_MAX_SEARCHES: usize = 32;
const DNS_MAX_SEARCH_BYTES: usize = 2048;

fn dns_config(spec: &At<'_>, e: &mut Errs) {
    let c = spec.at("dnsConfig");
    let servers = c.at("nameservers");
    if spec.at("dnsPolicy").str() == "None" {
        if !c.is_set() {
            return e.required(&c, "must provide `dnsConfig` when `dnsPolicy` is None");
        }
        if servers.is_empty() {
            return e.required(&servers, "must provide at least one DNS nameserver when `dnsPolicy` is None");
        }
    }
    if servers.len() > DNS_MAX_SERVERS {
        e.invalid(&servers, format!("must not have more than {DNS_MAX_SERVERS} nameservers"));
    }
    for s in servers.items() {
        e.check(&s, names::ip_address);
    }
    let searches = c.at("searches");
    if searches.len() > DNS_MAX_SEARCHES {
        e.invalid(&searches, format!("must not have more than {DNS_MAX_SEARCHES} search paths"));
    }
    let total: usize = searches.array().iter().filter_map(Value::as_str).map(|s| s.len() + 1).sum();
    if total.saturating_sub(1) > DNS_MAX_SEARCH_BYTES {
        e.invalid(
            &searches,
            format!("must not have more than {DNS_MAX_SEARCH_BYTES} characters (including spaces) in the search list"),
        );
    }
    for s in searches.items() {
        if s.str() != "." {
            // Underscores are allowed here, as names of services in the wild have them.
            let trimmed = s.str().trim_end_matches('.');
            for r in names::dns1123_subdomain(&trimmed.replace('_', "a")) {
                e.invalid_value(&s, trimmed, r);
            }
        }
    }
    for o in c.at("options").items() {
        if o.at("name").is_zero() {
            e.required(&o, "must not be empty");
        }
    }
}

fn host_aliases(at: &At<'_>, e: &mut Errs) {
    for a in at.items() {
        e.check(&a.at("ip"), names::ip_address);
        for h in a.at("hostnames").items() {
            e.reasons(&a.at("hostnames").with(h.v), names::dns1123_subdomain(h.str()));
        }
    }
}
