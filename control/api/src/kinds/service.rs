//! Services: defaults, addresses, validation (`pkg/apis/core/validation`, `pkg/registry/core/service`).

use coracle_schema::FieldError;
use serde_json::{Value, json};

use crate::kinds::at::{At, Errs};
use crate::kinds::edit::{child, drop, each, empty, int, list, put, text, unset, zero};
use crate::kinds::row::Row;
use crate::kinds::{alloc, meta, names};

/// Default stickiness of a client, in seconds.
const AFFINITY_SECONDS: i64 = 10_800;
/// Longest stickiness, in seconds: a day.
const AFFINITY_MAX_SECONDS: i64 = 86_400;
const EXTERNAL_IPS_WORDS: &str = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";

pub static ROWS: &[Row] = &[Row {
    resource: "services",
    default,
    update: |_, new, old| {
        keep_addresses(new, old);
        drop_type_dependent(new, old);
    },
    validate: check,
    change,
    sub_change: |_, new, _, e| {
        for i in new.at("status").at("loadBalancer").at("ingress").items() {
            if !i.at("ip").is_zero() {
                e.check(&i.at("ip"), names::ip_address);
                if i.at("ipMode").is_zero() {
                    e.required(&i.at("ipMode"), "must be specified when `ip` is set");
                } else {
                    e.one_of(&i.at("ipMode"), &["Proxy", "VIP"]);
                }
            }
            if !i.at("hostname").is_zero() {
                e.check(&i.at("hostname"), names::dns1123_subdomain);
                if i.at("hostname").str().parse::<std::net::IpAddr>().is_ok() {
                    e.invalid(&i.at("hostname"), "must be a DNS name, not an IP address");
                }
            }
        }
    },
    begin: Some(|ctx, new, old| Box::pin(alloc::begin_service(ctx, new, old))),
    deleted: Some(|ctx, o| Box::pin(alloc::service_deleted(ctx, o))),
    name: names::dns1035_label,
    status: r#"{"loadBalancer":{}}"#,
    labels: &[("spec.clusterIP", "/spec/clusterIP"), ("spec.type", "/spec/type")],
    ..Row::BASE
}];

fn default(o: &mut Value) {
    let spec = child(o, "spec");
    empty(spec, "sessionAffinity", "None");
    match text(spec, "sessionAffinity") {
        "None" => drop(spec, "sessionAffinityConfig"),
        "ClientIP" if spec.pointer("/sessionAffinityConfig/clientIP/timeoutSeconds").is_none() => {
            put(spec, "sessionAffinityConfig", json!({"clientIP": {"timeoutSeconds": AFFINITY_SECONDS}}));
        }
        _ => {}
    }
    empty(spec, "type", "ClusterIP");
    let kind = text(spec, "type").to_owned();
    each(spec, "ports", |p| {
        empty(p, "protocol", "TCP");
        if let Some(n) = int(p, "port") {
            empty(p, "targetPort", n);
        }
        if int(p, "nodePort") == Some(0) {
            drop(p, "nodePort");
        }
    });
    let external =
        matches!(kind.as_str(), "NodePort" | "LoadBalancer") || (kind == "ClusterIP" && !zero(spec.get("externalIPs")));
    if external {
        empty(spec, "externalTrafficPolicy", "Cluster");
    }
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer" | "ClusterIP") {
        unset(spec, "internalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" {
        unset(spec, "allocateLoadBalancerNodePorts", true);
        let status = child(o, "status");
        each(child(status, "loadBalancer"), "ingress", |i| {
            if !text(i, "ip").is_empty() {
                unset(i, "ipMode", "VIP");
            }
        });
    }
    // The first address and the list of addresses say the same; either may be given.
    let spec = child(o, "spec");
    let ip = text(spec, "clusterIP").to_owned();
    if ip.is_empty() {
        if let Some(first) = list(spec, "clusterIPs").first().cloned() {
            put(spec, "clusterIP", first);
        }
    } else if zero(spec.get("clusterIPs")) {
        put(spec, "clusterIPs", json!([ip]));
    }
}

/// A change that leaves addresses, ports and families out means to keep them.
pub(super) fn keep_addresses(new: &mut Value, old: &Value) {
    let none = Value::Null;
    let before = old.get("spec").unwrap_or(&none);
    let spec = child(new, "spec");
    let kind = text(spec, "type").to_owned();
    if kind == "ExternalName" || text(before, "type") == "ExternalName" {
        return;
    }
    if zero(spec.get("clusterIP")) && zero(spec.get("clusterIPs")) {
        for f in ["clusterIP", "clusterIPs"] {
            if let Some(v) = before.get(f) {
                put(spec, f, v.clone());
            }
        }
    }
    // Only the first address was changed: the list follows.
    let (ip, old_ip) = (text(spec, "clusterIP").to_owned(), text(before, "clusterIP"));
    if ip != old_ip && spec.get("clusterIPs") == before.get("clusterIPs") && !zero(before.get("clusterIPs")) {
        put(spec, "clusterIPs", if ip.is_empty() { json!([]) } else { json!([ip]) });
    }
    for f in ["ipFamilies", "ipFamilyPolicy"] {
        if zero(spec.get(f))
            && let Some(v) = before.get(f)
        {
            put(spec, f, v.clone());
        }
    }
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        let old_ports = list(before, "ports").to_vec();
        let taken: Vec<i64> = list(spec, "ports").iter().filter_map(|p| int(p, "nodePort")).collect();
        each(spec, "ports", |p| {
            if int(p, "nodePort").is_none() {
                let same = |o: &&Value| int(o, "port") == int(p, "port") && text(o, "protocol") == text(p, "protocol");
                if let Some(n) = old_ports.iter().find(same).and_then(|o| int(o, "nodePort"))
                    && !taken.contains(&n)
                {
                    put(p, "nodePort", n);
                }
            }
        });
        let local = text(spec, "externalTrafficPolicy") == "Local" && kind == "LoadBalancer";
        if local
            && zero(spec.get("healthCheckNodePort"))
            && let Some(n) = int(before, "healthCheckNodePort")
        {
            put(spec, "healthCheckNodePort", n);
        }
    }
}

/// Fields that meant something to the old type alone go when the type changes and they were left as they were.
fn drop_type_dependent(new: &mut Value, old: &Value) {
    let none = Value::Null;
    let before = old.get("spec").unwrap_or(&none);
    let spec = child(new, "spec");
    let (was, is) = (text(before, "type").to_owned(), text(spec, "type").to_owned());
    let has_ip = |t: &str| matches!(t, "ClusterIP" | "NodePort" | "LoadBalancer");
    let has_ports = |t: &str| matches!(t, "NodePort" | "LoadBalancer");
    if has_ip(&was) && !has_ip(&is) {
        for f in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            if spec.get(f) == before.get(f) {
                drop(spec, f);
            }
        }
        drop(spec, "internalTrafficPolicy");
    }
    if has_ports(&was) && !has_ports(&is) {
        let old_ports = list(before, "ports").to_vec();
        each(spec, "ports", |p| {
            if old_ports.iter().any(|o| int(o, "nodePort") == int(p, "nodePort")) {
                drop(p, "nodePort");
            }
        });
        if zero(spec.get("externalIPs")) && spec.get("externalTrafficPolicy") == before.get("externalTrafficPolicy") {
            drop(spec, "externalTrafficPolicy");
        }
    }
    let checks = |t: &str, s: &Value| t == "LoadBalancer" && text(s, "externalTrafficPolicy") == "Local";
    if checks(&was, before)
        && !checks(&is, spec)
        && spec.get("healthCheckNodePort") == before.get("healthCheckNodePort")
    {
        drop(spec, "healthCheckNodePort");
    }
    if was == "LoadBalancer" && is != "LoadBalancer" {
        for f in ["allocateLoadBalancerNodePorts", "loadBalancerClass"] {
            if spec.get(f) == before.get(f) {
                drop(spec, f);
            }
        }
    }
}

fn check(o: &At<'_>, e: &mut Errs) {
    let spec = o.at("spec");
    let kind = spec.at("type");
    let headless = spec.at("clusterIP").str() == "None";
    let ports = spec.at("ports");
    if ports.is_empty() && !headless && kind.str() != "ExternalName" {
        e.required(&ports, "");
    }
    match kind.str() {
        "LoadBalancer" => {
            for p in ports.items() {
                if p.at("port").int() == 10250 {
                    e.invalid(&p, "may not expose port 10250 externally since it is used by kubelet");
                }
            }
            if headless {
                e.invalid(&spec.at("clusterIPs").item(0), "may not be set to 'None' for LoadBalancer services");
            }
        }
        "NodePort" if headless => {
            e.invalid(&spec.at("clusterIPs").item(0), "may not be set to 'None' for NodePort services");
        }
        "ExternalName" => {
            for f in ["clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                if !spec.at(f).is_zero() {
                    e.forbidden(&spec.at(f), "may not be set for ExternalName services");
                }
            }
            let name = spec.at("externalName");
            if name.is_zero() {
                e.required(&name, "");
            } else {
                let at = name.with(name.v);
                let trimmed = Value::from(name.str().trim_end_matches('.'));
                e.check(&at.with(&trimmed), names::dns1123_subdomain);
            }
        }
        _ => {}
    }
    let mut port_names: Vec<&str> = Vec::new();
    for p in ports.items() {
        let name = p.at("name");
        if name.is_zero() {
            if ports.len() > 1 {
                e.required(&name, "");
            }
        } else {
            e.check(&name, names::dns1123_label);
            if port_names.contains(&name.str()) {
                e.duplicate(&name);
            }
            port_names.push(name.str());
        }
        e.reasons(&p.at("port"), names::port_number(p.at("port").int()));
        e.required_one_of(&p.at("protocol"), &["SCTP", "TCP", "UDP"]);
        let target = p.at("targetPort");
        if target.v.is_string() {
            e.check(&target, names::port_name);
        } else {
            e.reasons(&target, names::port_number(target.int()));
        }
        if let Some(app) = p.at("appProtocol").v.as_str() {
            e.reasons(&p.at("appProtocol"), names::qualified_name(app));
        }
    }
    if !spec.at("selector").is_zero() {
        meta::labels(&spec.at("selector"), e);
    }
    e.required_one_of(&spec.at("sessionAffinity"), &["ClientIP", "None"]);
    affinity_config(&spec, e);
    for ip in spec.at("externalIPs").items() {
        if ip.str().parse::<std::net::IpAddr>().is_err() {
            e.invalid(&ip, EXTERNAL_IPS_WORDS);
        } else {
            crate::kinds::core::endpoint_ip(&ip, e);
        }
    }
    e.required_one_of(&kind, &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"]);
    for r in spec.at("loadBalancerSourceRanges").items() {
        e.check(&r, names::cidr);
    }
    if !spec.at("loadBalancerSourceRanges").is_empty() && kind.str() != "LoadBalancer" {
        e.forbidden(&spec.at("loadBalancerSourceRanges"), "may only be used when `type` is 'LoadBalancer'");
    }
    if spec.at("allocateLoadBalancerNodePorts").is_set() && kind.str() != "LoadBalancer" {
        e.forbidden(&spec.at("allocateLoadBalancerNodePorts"), "may only be used when `type` is 'LoadBalancer'");
    }
    if kind.str() == "LoadBalancer" && !spec.at("allocateLoadBalancerNodePorts").is_set() {
        e.required(&spec.at("allocateLoadBalancerNodePorts"), "field is required when `type` is 'LoadBalancer'");
    }
    if !spec.at("loadBalancerClass").is_zero() {
        if kind.str() == "LoadBalancer" {
            e.check(&spec.at("loadBalancerClass"), names::qualified_name);
        } else {
            e.forbidden(&spec.at("loadBalancerClass"), "may only be used when `type` is 'LoadBalancer'");
        }
    }
    port_conflicts(&ports, e);
    traffic_policies(&spec, e);
    addresses(&spec, e);
}

fn affinity_config(spec: &At<'_>, e: &mut Errs) {
    let config = spec.at("sessionAffinityConfig");
    match spec.at("sessionAffinity").str() {
        "None" if config.is_set() => {
            e.forbidden(&config, "must not be set when session affinity is None");
        }
        "ClientIP" => {
            let t = config.at("clientIP").at("timeoutSeconds");
            if !t.is_set() {
                e.required(&t, "");
            } else if !(1..=AFFINITY_MAX_SECONDS).contains(&t.int()) {
                e.invalid(&t, format!("must be greater than 0 and less than {AFFINITY_MAX_SECONDS}"));
            }
        }
        _ => {}
    }
}

fn port_conflicts(ports: &At<'_>, e: &mut Errs) {
    let mut nodes: Vec<(i64, &str)> = Vec::new();
    let mut pairs: Vec<(i64, &str)> = Vec::new();
    for p in ports.items() {
        let n = p.at("nodePort");
        let id = (n.int(), p.at("protocol").str());
        if n.int() != 0 {
            if nodes.contains(&id) {
                e.duplicate(&n);
            }
            nodes.push(id);
        }
    }
    for p in ports.items() {
        let id = (p.at("port").int(), p.at("protocol").str());
        if pairs.contains(&id) {
            let value = json!({"port": id.0, "protocol": id.1, "targetPort": 0});
            let mut shown = value;
            drop(&mut shown, "targetPort");
            e.duplicate(&p.with(&shown));
        }
        pairs.push(id);
    }
}

fn traffic_policies(spec: &At<'_>, e: &mut Errs) {
    let kind = spec.at("type").str();
    let external = spec.at("externalTrafficPolicy");
    let reachable = matches!(kind, "NodePort" | "LoadBalancer") || !spec.at("externalIPs").is_empty();
    if !external.is_zero() {
        if reachable {
            e.one_of(&external, &["Cluster", "Local"]);
        } else {
            e.invalid(&external, "may only be set for externally-accessible services");
        }
    } else if reachable {
        e.required(&external, "");
    }
    let health = spec.at("healthCheckNodePort");
    let wanted = kind == "LoadBalancer" && external.str() == "Local";
    if health.int() < 0 || (!health.is_zero() && !wanted) {
        e.invalid(&health, "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'");
    }
    let internal = spec.at("internalTrafficPolicy");
    if internal.is_set() {
        e.one_of(&internal, &["Cluster", "Local"]);
    } else if matches!(kind, "ClusterIP" | "NodePort" | "LoadBalancer") {
        e.required(&internal, "");
    }
    if spec.at("trafficDistribution").is_set() {
        e.one_of(&spec.at("trafficDistribution"), &["PreferClose", "PreferSameNode", "PreferSameZone"]);
    }
}

/// What is wrong with the addresses and families that a service asks for.
pub(super) fn address_errors(o: &Value) -> Vec<FieldError> {
    let mut errors = Errs::default();
    addresses(&At::root(o).at("spec"), &mut errors);
    errors.0
}

fn addresses(spec: &At<'_>, e: &mut Errs) {
    if spec.at("type").str() == "ExternalName" {
        return;
    }
    let ips = spec.at("clusterIPs");
    for (i, ip) in ips.items().enumerate() {
        if i == 0 && ip.str() != spec.at("clusterIP").str() {
            e.invalid(&ips, "first value must match `clusterIP`");
        }
        if ip.str() == "None" {
            if ips.len() > 1 {
                e.invalid(&ip, "may not be set to 'None' if other IPs are set");
            }
        } else {
            e.check(&ip, names::ip_address);
        }
    }
    let families = spec.at("ipFamilies");
    for (i, family) in families.items().enumerate() {
        e.one_of(&family, &["IPv4", "IPv6"]);
        if families.array()[..i].contains(family.v) {
            e.duplicate(&family);
        }
    }
    if families.len() > 2 {
        e.invalid(&families, "may only hold up to 2 values");
    }
    let is_v6 = |ip: &At<'_>| ip.str().contains(':');
    if ips.len() > 2 {
        e.invalid(&ips, "may only hold up to 2 values");
    } else if ips.len() == 2 && is_v6(&ips.item(0)) == is_v6(&ips.item(1)) {
        e.invalid(&ips, "may specify no more than one IP for each IP family");
    }
    for (i, (ip, family)) in ips.items().zip(families.items()).enumerate() {
        let (known, fits) = (["IPv4", "IPv6"].contains(&family.str()), is_v6(&ip) == (family.str() == "IPv6"));
        if ip.str() != "None" && known && !fits {
            e.invalid(&ip, format!("expected an {} value as indicated by `ipFamilies[{i}]`", family.str()));
        }
    }
    if spec.at("ipFamilyPolicy").is_set() {
        e.one_of(&spec.at("ipFamilyPolicy"), &["PreferDualStack", "RequireDualStack", "SingleStack"]);
    }
}

fn change(new: &At<'_>, old: &At<'_>, e: &mut Errs) {
    let (n, o) = (new.at("spec"), old.at("spec"));
    let kept = n.at("type").str() != "ExternalName" && o.at("type").str() != "ExternalName";
    let (was, is) = (o.at("clusterIPs"), n.at("clusterIPs"));
    if kept && !was.is_empty() && is.is_empty() {
        e.invalid_value(&is.item(0), is.v.clone(), "primary clusterIP can not be unset");
    } else if kept {
        // The second may come and go, but not change.
        for (_, ip) in was.items().zip(is.items()).filter(|(was, ip)| was.v != ip.v) {
            e.invalid_value(&ip, is.v.clone(), "may not change once set");
        }
        let (was, is) = (o.at("ipFamilies"), n.at("ipFamilies"));
        for (_, family) in was.items().zip(is.items()).filter(|(was, family)| was.v != family.v) {
            e.invalid(&family, "may not change once set");
        }
    }
    if o.at("type").str() == "LoadBalancer"
        && n.at("type").str() == "LoadBalancer"
        && n.at("loadBalancerClass").v != o.at("loadBalancerClass").v
    {
        e.invalid(&n.at("loadBalancerClass"), "may not change once set");
    }
}
