//! Rows against what a v1.36 server answers, and properties that every row has.

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::kinds::row::{self, Row};
use crate::kinds::{edit, meta, table};

/// Answers of a real server to creations: path, body, and the object or the causes of its refusal.
const ANSWERS: &str = include_str!("answers.json");

fn rows() -> impl Iterator<Item = &'static Row> {
    table::ROWS.iter().copied().flatten()
}

/// Group and resource of a path.
fn resource(path: &str) -> (String, String) {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let group = if parts[0] == "api" { "" } else { parts[1] };
    (group.to_owned(), parts.last().copied().unwrap_or_default().to_owned())
}

/// Server-side values, which differ each time.
fn mask(v: &mut Value) {
    match v {
        Value::Object(o) => {
            for f in ["uid", "resourceVersion", "creationTimestamp", "managedFields"] {
                o.remove(f);
            }
            for (k, x) in o.iter_mut() {
                match k.as_str() {
                    "clusterIP"
                    | "clusterIPs"
                    | "nodePort"
                    | "batch.kubernetes.io/controller-uid"
                    | "controller-uid"
                    | "lastPhaseTransitionTime" => *x = json!("<v>"),
                    _ => mask(x),
                }
            }
        }
        Value::Array(a) => a.iter_mut().for_each(mask),
        _ => {}
    }
}

/// Members that admission or allocation adds after the row's work, taken from the answer.
fn added_later(resource: &str, want: &Value, got: &mut Value) {
    let pointers: &[&str] = match resource {
        "pods" => &["/spec/priority", "/spec/preemptionPolicy", "/spec/tolerations", "/status"],
        "services" => {
            &["/spec/clusterIP", "/spec/clusterIPs", "/spec/ipFamilies", "/spec/ipFamilyPolicy", "/spec/ports"]
        }
        "persistentvolumes" | "persistentvolumeclaims" => &["/metadata/finalizers", "/status"],
        "namespaces" | "customresourcedefinitions" => &["/spec/finalizers", "/status"],
        "daemonsets" => &["/metadata/annotations"],
        "jobs" => &["/metadata/labels", "/spec/selector", "/spec/template/metadata"],
        _ => &[],
    };
    for p in pointers {
        if let (Some(v), Some((parent, last))) = (want.pointer(p), p.rsplit_once('/'))
            && let Some(at) = got.pointer_mut(parent)
        {
            edit::put(at, last, v.clone());
        }
    }
    edit::put(
        edit::child(got, "metadata"),
        "namespace",
        want.pointer("/metadata/namespace").cloned().unwrap_or_default(),
    );
}

#[test]
fn defaults_are_the_servers() {
    let answers: Vec<Value> = serde_json::from_str(ANSWERS).expect("a table");
    let mut bad = Vec::new();
    for a in answers.iter().filter(|a| a["code"] == 201) {
        let (group, resource) = resource(a["path"].as_str().expect("a path"));
        let row = row::find(&group, &resource).unwrap_or_else(|| panic!("no row for {group}/{resource}"));
        let (mut got, mut want) = (a["body"].clone(), a["want"].clone());
        row.apply_defaults(&mut got);
        if row.generation {
            edit::put(edit::child(&mut got, "metadata"), "generation", 1);
        }
        added_later(&resource, &want, &mut got);
        mask(&mut got);
        mask(&mut want);
        // Nulls of the answer's fixed members count like absent ones here.
        if want["metadata"].get("namespace").is_none() {
            edit::drop(&mut got["metadata"], "namespace");
        }
        if got != want {
            bad.push(format!("{}\n  got  {got}\n  want {want}", a["name"]));
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

#[test]
fn refusals_are_the_servers() {
    let answers: Vec<Value> = serde_json::from_str(ANSWERS).expect("a table");
    for a in answers.iter().filter(|a| a["code"] == 422) {
        let (group, resource) = resource(a["path"].as_str().expect("a path"));
        let row = row::find(&group, &resource).expect("a row");
        let mut o = a["body"].clone();
        edit::put(edit::child(&mut o, "metadata"), "namespace", "golden");
        row.apply_defaults(&mut o);
        let mut errors = meta::check(&o, true, row.name);
        errors.extend(row.check(&o));
        let got: Vec<Value> = errors
            .iter()
            .map(|e| json!({"reason": e.reason(), "message": e.message(), "field": e.path.to_string()}))
            .collect();
        assert_eq!(Value::from(got), a["want"], "{}", a["name"]);
    }
}

#[test]
fn accepted_objects_are_valid() {
    let answers: Vec<Value> = serde_json::from_str(ANSWERS).expect("a table");
    for a in answers.iter().filter(|a| a["code"] == 201) {
        let (group, resource) = resource(a["path"].as_str().expect("a path"));
        let row = row::find(&group, &resource).expect("a row");
        let mut o = a["want"].clone();
        row.apply_defaults(&mut o);
        let errors: Vec<String> = row
            .check(&o)
            .iter()
            .map(ToString::to_string)
            .filter(|e| !e.contains("u003cv") && !e.contains("<v>"))
            .collect();
        assert!(errors.is_empty(), "{}: {errors:?}", a["name"]);
        // Nothing changed: nothing to complain about.
        let errors: Vec<String> = row
            .check_change(&o, &o)
            .iter()
            .map(ToString::to_string)
            .filter(|e| !e.contains("u003cv") && !e.contains("<v>"))
            .collect();
        assert!(errors.is_empty(), "{}: {errors:?}", a["name"]);
    }
}

#[test]
fn every_stored_kind_has_a_row() {
    for kind in crate::kinds::builtin().iter().filter(|k| k.stored()) {
        assert!(row::find(&kind.group, &kind.resource).is_some(), "{kind:?}");
    }
    for row in rows().filter(|r| r.has_status()) {
        assert!(serde_json::from_str::<Value>(row.status).is_ok_and(|v| v.is_object()), "{}", row.resource);
    }
}

/// Any JSON, with member names that the rows look at.
fn anything() -> impl proptest::strategy::Strategy<Value = Value> {
    let words = proptest::sample::select(
        &[
            "spec",
            "metadata",
            "name",
            "containers",
            "template",
            "ports",
            "rules",
            "selector",
            "labels",
            "type",
            "status",
            "resources",
            "limits",
            "cpu",
            "volumes",
            "secret",
            "env",
            "valueFrom",
            "matchLabels",
            "matchExpressions",
            "webhooks",
            "versions",
            "initContainers",
            "livenessProbe",
            "httpGet",
            "port",
            "image",
            "clusterIPs",
            "data",
            "strategy",
            "rollingUpdate",
            "maxUnavailable",
            "metrics",
            "subjects",
            "roleRef",
            "items",
            "sources",
            "projected",
            "affinity",
            "hard",
            "default",
        ][..],
    );
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-zA-Z0-9%./*-]{0,12}".prop_map(Value::from),
        Just(json!("RollingUpdate")),
        Just(json!("1Gi")),
        Just(json!("None")),
    ];
    leaf.prop_recursive(6, 64, 6, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::vec((words.clone(), inner), 0..6)
                .prop_map(|m| Value::Object(m.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn no_value_panics_and_defaults_are_idempotent(v in anything(), w in anything()) {
        for row in rows() {
            let mut once = json!({"metadata": {"name": "x"}, "spec": v, "webhooks": w, "rules": w, "data": v, "template": w});
            row.apply_defaults(&mut once);
            let mut twice = once.clone();
            row.apply_defaults(&mut twice);
            prop_assert_eq!(&once, &twice, "{}", row.resource);
            let _ = row.check(&once);
            let _ = row.check_change(&once, &w);
            let mut bare = v.clone();
            row.apply_defaults(&mut bare);
            let _ = row.check(&bare);
        }
    }
}
