//! Ingresses, network policies, endpoint slices, addresses and their ranges.

use std::net::IpAddr;

use serde_json::{Value, json};

use crate::kinds::at::{At, Errs};
use crate::kinds::edit::{child, each, empty, put, unset, zero};
use crate::kinds::row::Row;
use crate::kinds::{core, meta, names};

const NET: &str = "networking.k8s.io";
const CLASS_ANNOTATION: &str = "kubernetes.io/ingress.class";
/// Endpoints and ports that one slice may hold.
const SLICE_MAX: (usize, usize) = (1000, 20_000);

pub static ROWS: &[Row] = &[
    Row {
        group: NET,
        resource: "ingresses",
        default: |o| {
            each(child(o, "spec"), "rules", |r| {
                crate::kinds::edit::each_field(r, "http", |h| {
                    each(h, "paths", |p| {
                        unset(p, "pathType", "ImplementationSpecific");
                        child(p, "backend");
                    });
                });
            });
        },
        validate: check_ingress,
        sub_change: |_, n, _, e| {
            for i in n.at("status").at("loadBalancer").at("ingress").items() {
                if !i.at("ip").is_zero() {
                    e.check(&i.at("ip"), names::ip_address);
                }
                if !i.at("hostname").is_zero() {
                    e.check(&i.at("hostname"), names::dns1123_subdomain);
                }
            }
        },
        status: r#"{"loadBalancer":{}}"#,
        generation: true,
        ..Row::BASE
    },
    Row {
        group: NET,
        resource: "ingressclasses",
        default: |o| {
            crate::kinds::edit::each_field(child(o, "spec"), "parameters", |p| unset(p, "scope", "Cluster"));
        },
        validate: |o, e| {
            let s = o.at("spec");
            let c = s.at("controller");
            if c.len() > 250 {
                e.too_long(&c, 250);
            }
            if c.is_zero() {
                e.required(&c, "");
            } else if !domain_path(c.str()) {
                e.invalid(&c, "must be a domain-prefixed path (such as \"acme.io/foo\")");
            }
            let p = s.at("parameters");
            if p.is_set() {
                for f in ["kind", "name"] {
                    if p.at(f).is_zero() {
                        e.required(&p.at(f), format!("{f} is required"));
                    }
                }
                e.one_of(&p.at("scope"), &["Cluster", "Namespace"]);
                match p.at("scope").str() {
                    "Namespace" if p.at("namespace").is_zero() => {
                        e.required(&p.at("namespace"), "`parameters.scope` is set to 'Namespace'");
                    }
                    "Cluster" if p.at("namespace").is_set() => {
                        e.forbidden(&p.at("namespace"), "`parameters.scope` is set to 'Cluster'");
                    }
                    _ => {}
                }
            }
        },
        change: |n, o, e| e.immutable(&n.at("spec").at("controller"), &o.at("spec").at("controller")),
        generation: true,
        ..Row::BASE
    },
    Row {
        group: NET,
        resource: "networkpolicies",
        default: |o| {
            let spec = child(o, "spec");
            child(spec, "podSelector");
            for way in ["ingress", "egress"] {
                each(spec, way, |r| each(r, "ports", |p| unset(p, "protocol", "TCP")));
            }
            let mut types = vec!["Ingress"];
            if !zero(spec.get("egress")) {
                types.push("Egress");
            }
            empty(spec, "policyTypes", json!(types));
        },
        validate: check_policy,
        generation: true,
        ..Row::BASE
    },
    Row {
        group: NET,
        resource: "ipaddresses",
        validate: |o, e| {
            let name = o.at("metadata").at("name");
            if name.str().parse::<IpAddr>().is_ok_and(|ip| ip.to_string() != name.str()) {
                e.invalid(&name, "must be a canonical IP address");
            }
            let r = o.at("spec").at("parentRef");
            if !r.is_set() {
                return e.required(&r, "");
            }
            for f in ["name", "resource"] {
                if r.at(f).is_zero() {
                    e.required(&r.at(f), "");
                } else {
                    e.check(&r.at(f), names::path_segment);
                }
            }
        },
        change: |n, o, e| e.immutable(&n.at("spec").at("parentRef"), &o.at("spec").at("parentRef")),
        name: names::ip_address,
        labels: &[("spec.parentRef.resource", "/spec/parentRef/resource")],
        ..Row::BASE
    },
    Row {
        group: NET,
        resource: "servicecidrs",
        validate: |o, e| {
            let c = o.at("spec").at("cidrs");
            if c.is_empty() {
                return e.required(&c, "at least one CIDR required");
            }
            if c.len() > 2 {
                return e.invalid(&c, "may only hold up to 2 values");
            }
            for x in c.items() {
                e.check(&x, names::cidr);
            }
            if let [a, b] = c.array()
                && a.as_str().is_some_and(|s| s.contains(':')) == b.as_str().is_some_and(|s| s.contains(':'))
            {
                e.invalid(
                    &c,
                    "may specify no more than one IP for each IP family, i.e 192.168.0.0/24 and 2001:db8::/64",
                );
            }
        },
        change: |n, o, e| e.immutable(&n.at("spec").at("cidrs"), &o.at("spec").at("cidrs")),
        status: "{}",
        ..Row::BASE
    },
    Row {
        group: "discovery.k8s.io",
        resource: "endpointslices",
        default: |o| {
            each(o, "endpoints", |x| {
                child(x, "conditions");
            });
            each(o, "ports", |p| {
                unset(p, "name", "");
                unset(p, "protocol", "TCP");
            });
            if o.get("endpoints").is_none() {
                put(o, "endpoints", Value::Null);
            }
            if o.get("ports").is_none() {
                put(o, "ports", Value::Null);
            }
        },
        validate: check_slice,
        change: |n, o, e| e.immutable(&n.at("addressType"), &o.at("addressType")),
        generation: true,
        ..Row::BASE
    },
];

/// `example.com/name`, not more than one slash.
fn domain_path(s: &str) -> bool {
    s.split_once('/').is_some_and(|(d, p)| {
        names::dns1123_subdomain(d).is_empty() && !p.is_empty() && !p.contains(char::is_whitespace)
    })
}

fn check_ingress(o: &At<'_>, e: &mut Errs) {
    let spec = o.at("spec");
    let (rules, backend) = (spec.at("rules"), spec.at("defaultBackend"));
    if rules.is_empty() && !backend.is_set() {
        e.invalid_value(&spec, rules.v.clone(), "either `defaultBackend` or `rules` must be specified");
    }
    if backend.is_set() {
        ingress_backend(&backend, e);
    }
    for r in rules.items() {
        let host = r.at("host");
        if !host.is_zero() {
            if host.str().parse::<IpAddr>().is_ok() {
                e.invalid(&host, "must be a DNS name, not an IP address");
            }
            if host.str().contains('*') {
                e.check(&host, names::wildcard_subdomain);
            } else {
                e.check(&host, names::dns1123_subdomain);
            }
        }
        let paths = r.at("http").at("paths");
        if r.has("http") && paths.is_empty() {
            e.required(&paths, "");
        }
        for p in paths.items() {
            let (path, kind) = (p.at("path"), p.at("pathType"));
            match kind.str() {
                "" if !kind.is_set() => e.required(&kind, "pathType must be specified"),
                "Exact" | "Prefix" => {
                    if !path.str().starts_with('/') {
                        e.invalid(&path, "must be an absolute path");
                    }
                    for bad in ["//", "/./", "/../", "%2f", "%2F"] {
                        if path.str().contains(bad) {
                            e.invalid(&path, format!("must not contain '{bad}'"));
                        }
                    }
                    for bad in ["/..", "/."] {
                        if path.str().ends_with(bad) {
                            e.invalid(&path, format!("cannot end with '{bad}'"));
                        }
                    }
                }
                "ImplementationSpecific" => {
                    if !path.is_zero() && !path.str().starts_with('/') {
                        e.invalid(&path, "must be an absolute path");
                    }
                }
                _ => e.not_supported(&kind, &["Exact", "ImplementationSpecific", "Prefix"]),
            }
            ingress_backend(&p.at("backend"), e);
        }
    }
    for t in spec.at("tls").items() {
        for h in t.at("hosts").items() {
            if h.str().contains('*') {
                e.check(&h, names::wildcard_subdomain);
            } else {
                e.check(&h, names::dns1123_subdomain);
            }
        }
        if !t.at("secretName").is_zero() {
            e.check(&t.at("secretName"), names::dns1123_subdomain);
        }
    }
    let class = spec.at("ingressClassName");
    if class.is_set() {
        e.check(&class, names::dns1123_subdomain);
        if o.at("metadata").at("annotations").v.get(CLASS_ANNOTATION).is_some()
            && o.v.pointer("/metadata/generation").is_none()
        {
            e.invalid(
                &o.at("metadata").at("annotations").at(CLASS_ANNOTATION),
                "can not be set when the class field is also set",
            );
        }
    }
}

fn ingress_backend(b: &At<'_>, e: &mut Errs) {
    let (s, r) = (b.at("service"), b.at("resource"));
    match (s.is_set(), r.is_set()) {
        (true, true) => e.invalid_value(b, "", "cannot set both resource and service backends"),
        (false, true) => {
            for f in ["kind", "name"] {
                if r.at(f).is_zero() {
                    e.required(&r.at(f), format!("{f} is required"));
                }
            }
        }
        (true, false) => {
            if s.at("name").is_zero() {
                e.required(&s.at("name"), "");
            } else {
                e.check(&s.at("name"), names::dns1035_label);
            }
            let p = s.at("port");
            let (name, number) = (!p.at("name").is_zero(), !p.at("number").is_zero());
            if name && number {
                e.invalid_value(b, "", "cannot set both port name & port number");
            } else if name {
                e.check(&p.at("name"), names::port_name);
            } else if number {
                e.reasons(&p.at("number"), names::port_number(p.at("number").int()));
            } else {
                e.required(b, "port name or number is required");
            }
        }
        (false, false) => e.invalid_value(b, "", "resource or service backend is required"),
    }
}

fn check_policy(o: &At<'_>, e: &mut Errs) {
    let spec = o.at("spec");
    meta::selector(&spec.at("podSelector"), e);
    for (way, peers) in [("ingress", "from"), ("egress", "to")] {
        for r in spec.at(way).items() {
            for p in r.at("ports").items() {
                policy_port(&p, e);
            }
            for peer in r.at(peers).items() {
                policy_peer(&peer, e);
            }
        }
    }
    let types = spec.at("policyTypes");
    if types.len() > 2 {
        e.invalid(&types, "may not specify more than two policyTypes");
        return;
    }
    for t in types.items() {
        e.one_of(&t, &["Egress", "Ingress"]);
    }
}

fn policy_port(p: &At<'_>, e: &mut Errs) {
    e.one_of(&p.at("protocol"), &["SCTP", "TCP", "UDP"]);
    let (port, end) = (p.at("port"), p.at("endPort"));
    match port.v {
        Value::Number(_) => {
            e.reasons(&port, names::port_number(port.int()));
            if end.is_set() {
                if end.int() < port.int() {
                    e.invalid(&end, "must be greater than or equal to `port`");
                }
                e.reasons(&end, names::port_number(end.int()));
            }
        }
        Value::String(_) => {
            if end.is_set() {
                e.invalid(&end, "may not be specified when `port` is non-numeric");
            }
            e.check(&port, names::port_name);
        }
        _ => {
            if end.is_set() {
                e.invalid(&end, "may not be specified when `port` is not specified");
            }
        }
    }
}

fn policy_peer(peer: &At<'_>, e: &mut Errs) {
    let mut n = 0;
    for f in ["podSelector", "namespaceSelector"] {
        if peer.has(f) {
            n += 1;
            meta::selector(&peer.at(f), e);
        }
    }
    let block = peer.at("ipBlock");
    if block.is_set() {
        if n > 0 {
            e.forbidden(peer, "may not specify both ipBlock and another peer");
        }
        n += 1;
        let net = block.at("cidr");
        if net.is_zero() {
            e.required(&net, "");
        } else {
            e.check(&net, names::cidr);
            for x in block.at("except").items() {
                if names::cidr(x.str()).is_empty() {
                    if names::cidr(net.str()).is_empty() && !strictly_inside(net.str(), x.str()) {
                        e.invalid(&x, "must be a strict subset of `cidr`");
                    }
                } else {
                    e.check(&x, names::cidr);
                }
            }
        }
    }
    if n == 0 {
        e.required(peer, "must specify a peer");
    }
}

fn strictly_inside(outer: &str, inner: &str) -> bool {
    let parse = |s: &str| -> Option<(u128, u32, bool)> {
        let (ip, len) = s.split_once('/')?;
        let len: u32 = len.parse().ok()?;
        match ip.parse::<IpAddr>().ok()? {
            IpAddr::V4(v) => Some((u128::from(u32::from(v)) << 96, len, false)),
            IpAddr::V6(v) => Some((u128::from(v), len, true)),
        }
    };
    let (Some((a, n, six)), Some((b, m, six2))) = (parse(outer), parse(inner)) else { return false };
    let mask = if n == 0 { 0 } else { u128::MAX << (128 - n) };
    six == six2 && m > n && a & mask == b & mask
}

fn check_slice(o: &At<'_>, e: &mut Errs) {
    let kind = o.at("addressType");
    if kind.is_zero() {
        e.required(&kind, "");
    } else {
        e.one_of(&kind, &["FQDN", "IPv4", "IPv6"]);
    }
    let endpoints = o.at("endpoints");
    if endpoints.len() > SLICE_MAX.0 {
        return e.too_many(&endpoints, endpoints.len(), SLICE_MAX.0);
    }
    for x in endpoints.items() {
        let addresses = x.at("addresses");
        if addresses.is_empty() {
            e.required(&addresses, "must contain at least 1 address");
        } else if addresses.len() > 100 {
            e.too_many(&addresses, addresses.len(), 100);
        }
        for a in addresses.items() {
            match kind.str() {
                "IPv4" => {
                    if a.str().parse::<std::net::Ipv4Addr>().is_err() {
                        e.invalid(&a, "must be an IPv4 address");
                    } else {
                        core::endpoint_ip(&a, e);
                    }
                }
                "IPv6" => {
                    if a.str().parse::<std::net::Ipv6Addr>().is_err() {
                        e.invalid(&a, "must be an IPv6 address");
                    } else {
                        core::endpoint_ip(&a, e);
                    }
                }
                "FQDN" => e.check(&a, names::dns1123_subdomain),
                _ => {}
            }
        }
        if !x.at("nodeName").is_zero() {
            e.check(&x.at("nodeName"), names::dns1123_subdomain);
        }
        if !x.at("hostname").is_zero() {
            e.check(&x.at("hostname"), names::dns1123_label);
        }
    }
    let ports = o.at("ports");
    if ports.len() > SLICE_MAX.1 {
        return e.too_many(&ports, ports.len(), SLICE_MAX.1);
    }
    let mut seen: Vec<&str> = Vec::new();
    for p in ports.items() {
        let name = p.at("name");
        if !name.is_zero() {
            e.check(&name, names::dns1123_label);
        }
        if seen.contains(&name.str()) {
            e.duplicate(&name);
        }
        seen.push(name.str());
        if p.at("port").is_set() {
            e.reasons(&p.at("port"), names::port_number(p.at("port").int()));
        }
        e.one_of(&p.at("protocol"), &["SCTP", "TCP", "UDP"]);
        if !p.at("appProtocol").is_zero() {
            e.check(&p.at("appProtocol"), names::qualified_name);
        }
    }
}
