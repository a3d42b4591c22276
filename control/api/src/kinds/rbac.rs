//! Roles and bindings.

use serde_json::Value;

use crate::kinds::at::{At, Errs};
use crate::kinds::edit::{each, empty, put, text};
use crate::kinds::row::Row;
use crate::kinds::{meta, names};

pub const GROUP: &str = "rbac.authorization.k8s.io";

const ROLE: Row = Row {
    group: GROUP,
    default: |o| {
        if o.get("rules").is_none() {
            put(o, "rules", Value::Null);
        }
    },
    name: names::path_segment,
    ..Row::BASE
};

pub static ROWS: &[Row] = &[
    Row { resource: "roles", validate: |o, e| rules(&o.at("rules"), true, e), ..ROLE },
    Row {
        resource: "clusterroles",
        validate: |o, e| {
            rules(&o.at("rules"), false, e);
            let a = o.at("aggregationRule");
            if a.is_set() {
                let s = a.at("clusterRoleSelectors");
                if s.is_empty() {
                    e.required(&s, "at least one clusterRoleSelector required if aggregationRule is non-nil");
                }
                for x in s.items() {
                    meta::selector(&x, e);
                }
            }
        },
        ..ROLE
    },
    Row {
        resource: "rolebindings",
        default: binding,
        validate: |o, e| check_binding(o, true, e),
        change: |n, o, e| role_ref_kept(n, o, e),
        ..ROLE
    },
    Row {
        resource: "clusterrolebindings",
        default: binding,
        validate: |o, e| check_binding(o, false, e),
        change: |n, o, e| role_ref_kept(n, o, e),
        ..ROLE
    },
];

fn role_ref_kept(new: &At<'_>, old: &At<'_>, e: &mut Errs) {
    if new.at("roleRef").v != old.at("roleRef").v {
        e.invalid(&new.at("roleRef"), "cannot change roleRef");
    }
}

fn binding(o: &mut Value) {
    crate::kinds::edit::each_field(o, "roleRef", |r| empty(r, "apiGroup", GROUP));
    each(o, "subjects", |s| {
        let group = match text(s, "kind") {
            "User" | "Group" => GROUP,
            _ => return,
        };
        empty(s, "apiGroup", group);
    });
}

fn rules(at: &At<'_>, namespaced: bool, e: &mut Errs) {
    for r in at.items() {
        if r.at("verbs").is_empty() {
            e.required(&r.at("verbs"), "verbs must contain at least one value");
        }
        let (groups, resources, urls) = (r.at("apiGroups"), r.at("resources"), r.at("nonResourceURLs"));
        if !urls.is_empty() {
            if namespaced {
                e.invalid(&urls, "namespaced rules cannot apply to non-resource URLs");
            }
            if !groups.is_empty() || !resources.is_empty() || !r.at("resourceNames").is_empty() {
                e.invalid(&urls, "rules cannot apply to both regular resources and non-resource URLs");
            }
            continue;
        }
        if groups.is_empty() {
            e.required(&groups, "resource rules must supply at least one api group");
        }
        if resources.is_empty() {
            e.required(&resources, "resource rules must supply at least one resource");
        }
    }
}

fn check_binding(o: &At<'_>, namespaced: bool, e: &mut Errs) {
    let r = o.at("roleRef");
    if r.at("apiGroup").str() != GROUP {
        e.not_supported(&r.at("apiGroup"), &[GROUP]);
    }
    let kinds: &[&str] = if namespaced { &["Role", "ClusterRole"] } else { &["ClusterRole"] };
    e.one_of(&r.at("kind"), kinds);
    e.required_check(&r.at("name"), names::path_segment);
    for s in o.at("subjects").items() {
        if s.at("name").is_zero() {
            e.required(&s.at("name"), "");
        }
        match s.at("kind").str() {
            "ServiceAccount" => {
                if !s.at("name").is_zero() {
                    e.check(&s.at("name"), names::dns1123_subdomain);
                }
                if !s.at("apiGroup").is_zero() {
                    e.not_supported(&s.at("apiGroup"), &[""]);
                }
                if !namespaced && s.at("namespace").is_zero() {
                    e.required(&s.at("namespace"), "");
                }
            }
            "User" | "Group" => {
                if s.at("apiGroup").str() != GROUP {
                    e.not_supported(&s.at("apiGroup"), &[GROUP]);
                }
            }
            _ => e.not_supported(&s.at("kind"), &["ServiceAccount", "User", "Group"]),
        }
    }
}
