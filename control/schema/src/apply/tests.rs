use super::*;
use serde_json::json;

const DEPLOYMENT: &str = "io.k8s.api.apps.v1.Deployment";
const CONFIG_MAP: &str = "io.k8s.api.core.v1.ConfigMap";

struct Bench {
    schema: Arc<Schema>,
    api_version: &'static str,
    live: Value,
}

impl Bench {
    fn new(schema: &str, api_version: &'static str) -> Self {
        Self { schema: Schema::builtin(schema).expect("built in"), api_version, live: json!({}) }
    }

    fn request<'a>(&'a self, manager: &'a str, now: &'a str) -> Request<'a> {
        Request {
            schema: &self.schema,
            api_version: self.api_version,
            subresource: "",
            manager,
            now,
            reset: &[],
            convert: None,
        }
    }

    fn apply(&mut self, manager: &str, config: Value, force: bool) -> Result<(), ApplyError> {
        let applied = apply(&self.live, &config, force, &self.request(manager, "2026-01-01T00:00:00Z"))?;
        self.live = applied.value;
        self.live["metadata"]["uid"] = "u".into();
        Ok(())
    }

    fn update(&mut self, manager: &str, now: &str, change: impl FnOnce(&mut Value)) {
        let mut new = self.live.clone();
        change(&mut new);
        let live = if self.live.pointer("/metadata/uid").is_some() { Some(&self.live) } else { None };
        track_update(live, &mut new, &self.request(manager, now));
        new["metadata"]["uid"] = "u".into();
        self.live = new;
    }

    fn owner(&self, manager: &str) -> Option<Value> {
        let list = self.live.pointer("/metadata/managedFields")?.as_array()?;
        list.iter().find(|entry| entry["manager"] == manager).map(|entry| entry["fieldsV1"].clone())
    }
}

fn config(data: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": data})
}

#[test]
fn apply_owns_prunes_and_conflicts() {
    let mut bench = Bench::new(CONFIG_MAP, "v1");
    bench.apply("m1", config(json!({"a": "1", "b": "2"})), false).expect("applies");
    assert_eq!(bench.owner("m1"), Some(json!({"f:data": {"f:a": {}, "f:b": {}}})));
    // Another value for an owned field is a conflict.
    let error = bench.apply("m2", config(json!({"a": "2"})), false).expect_err("conflict");
    assert_eq!(error.to_string(), "Apply failed with 1 conflict: conflict with \"m1\": .data.a");
    // The same value is shared.
    bench.apply("m2", config(json!({"a": "1"})), false).expect("shares");
    assert_eq!(bench.owner("m2"), Some(json!({"f:data": {"f:a": {}}})));
    // What m1 no longer applies goes, unless m2 owns it.
    bench.apply("m1", config(json!({})), false).expect("prunes");
    assert_eq!(bench.live["data"], json!({"a": "1"}));
    // Force takes over.
    bench.apply("m3", config(json!({"a": "3"})), true).expect("forces");
    assert_eq!(bench.owner("m2"), None);
    assert_eq!(bench.owner("m3"), Some(json!({"f:data": {"f:a": {}}})));
    assert_eq!(bench.live["data"], json!({"a": "3"}));
}

#[test]
fn several_conflicts_are_listed_by_manager() {
    let mut bench = Bench::new(CONFIG_MAP, "v1");
    bench.update("kubectl-create", "2026-01-01T00:00:00Z", |new| *new = config(json!({"a": "1", "b": "1"})));
    let error = bench.apply("m2", config(json!({"a": "2", "b": "2"})), false).expect_err("conflict");
    assert_eq!(
        error.to_string(),
        "Apply failed with 2 conflicts: conflicts with \"kubectl-create\" using v1:\n- .data.a\n- .data.b"
    );
}

#[test]
fn updates_are_tracked_as_a_server_does() {
    let mut bench = Bench::new(CONFIG_MAP, "v1");
    bench.update("creator", "2026-01-01T00:00:00Z", |new| {
        *new = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "labels": {"x": "y"}}, "data": {"a": "1"}});
    });
    assert_eq!(
        bench.live.pointer("/metadata/managedFields"),
        Some(&json!([{
            "manager": "creator", "operation": "Update", "apiVersion": "v1", "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1",
            "fieldsV1": {"f:data": {".": {}, "f:a": {}}, "f:metadata": {"f:labels": {".": {}, "f:x": {}}}}
        }]))
    );
    bench.update("editor", "2026-01-02T00:00:00Z", |new| new["data"]["a"] = "2".into());
    assert_eq!(bench.owner("editor"), Some(json!({"f:data": {"f:a": {}}})));
    assert_eq!(bench.owner("creator"), Some(json!({"f:data": {}, "f:metadata": {"f:labels": {".": {}, "f:x": {}}}})));
    // A write that changes nothing keeps the times.
    let before = bench.live.clone();
    bench.update("editor", "2026-01-03T00:00:00Z", |_| {});
    assert_eq!(bench.live, before);
    bench.update("editor", "2026-01-03T00:00:00Z", |new| {
        new["data"].as_object_mut().expect("object").remove("a");
    });
    assert_eq!(bench.owner("editor"), None);
    // An explicit empty list forgets everybody; the one who did it owns what it changed.
    bench.update("reset", "2026-01-04T00:00:00Z", |new| new["metadata"]["managedFields"] = json!([{}]));
    assert_eq!(bench.live.pointer("/metadata/managedFields"), None);
}

#[test]
fn old_updaters_are_put_together() {
    let mut bench = Bench::new(CONFIG_MAP, "v1");
    for i in 0..13 {
        let now = format!("2026-01-01T00:00:{i:02}Z");
        bench.update(&format!("m{i:02}"), &now, |new| {
            if i == 0 {
                *new = config(json!({}));
            }
            new["data"][format!("k{i}")] = "v".into();
        });
    }
    let list = bench.live["metadata"]["managedFields"].as_array().expect("list");
    assert_eq!(list.len(), MAX_UPDATE_MANAGERS);
    assert_eq!(list[0]["manager"], "ancient-changes");
    assert_eq!(list[0]["time"], "2026-01-01T00:00:03Z");
    assert_eq!(list[0]["fieldsV1"]["f:data"], json!({".": {}, "f:k0": {}, "f:k1": {}, "f:k2": {}, "f:k3": {}}));
}

fn deployment(containers: Value) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"},
        "spec": {"template": {"spec": {"containers": containers}}}
    })
}

#[test]
fn list_maps_merge_by_key_with_defaults() {
    let mut bench = Bench::new(DEPLOYMENT, "apps/v1");
    bench
        .apply(
            "m1",
            deployment(
                json!([{"name": "a", "image": "1", "ports": [{"containerPort": 80}]}, {"name": "b", "image": "1"}]),
            ),
            false,
        )
        .expect("applies");
    assert_eq!(
        bench.owner("m1").expect("owner")["f:spec"]["f:template"]["f:spec"]["f:containers"]["k:{\"name\":\"a\"}"],
        json!({
            ".": {}, "f:image": {}, "f:name": {},
            "f:ports": {"k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {".": {}, "f:containerPort": {}}}
        })
    );
    bench
        .apply("m2", deployment(json!([{"name": "c", "image": "3"}, {"name": "b", "workingDir": "/"}])), false)
        .expect("applies");
    let names = |live: &Value| -> Vec<String> {
        let list = live.pointer("/spec/template/spec/containers").and_then(Value::as_array).expect("containers");
        list.iter().map(|item| item["name"].as_str().expect("name").to_owned()).collect()
    };
    assert_eq!(names(&bench.live), ["a", "c", "b"]);
    bench.apply("m1", deployment(json!([{"name": "b", "image": "1"}])), false).expect("prunes");
    assert_eq!(names(&bench.live), ["c", "b"]);
    let error = bench.apply("m1", deployment(json!([{"name": "b"}, {"name": "b"}])), false).expect_err("duplicate");
    assert_eq!(
        error,
        ApplyError::Typed(".spec.template.spec.containers: duplicate entries for key [name=\"b\"]".into())
    );
    let error = bench.apply("m1", json!({"spec": {"nope": 1}}), false).expect_err("unknown");
    assert_eq!(error, ApplyError::Typed(".spec.nope: field not declared in schema".into()));
    let error = bench.apply("m3", deployment(json!([{"name": "c", "image": "4"}])), false).expect_err("conflict");
    assert_eq!(
        error.to_string(),
        "Apply failed with 1 conflict: conflict with \"m2\": .spec.template.spec.containers[name=\"c\"].image"
    );
}

#[test]
fn status_and_main_resource_keep_out_of_each_other() {
    let schema = Schema::builtin(DEPLOYMENT).expect("built in");
    let mut live = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": {"replicas": 1}, "status": {"replicas": 1}});
    let request = |subresource, reset| Request {
        schema: &schema,
        api_version: "apps/v1",
        subresource,
        manager: "m",
        now: "2026-01-01T00:00:00Z",
        reset,
        convert: None,
    };
    track_update(None, &mut live, &request("", &[&["status"]]));
    assert_eq!(live["metadata"]["managedFields"][0]["fieldsV1"], json!({"f:spec": {"f:replicas": {}}}));
    live["metadata"]["uid"] = "u".into();
    let mut new = live.clone();
    new["status"]["replicas"] = 2.into();
    track_update(Some(&live), &mut new, &request("status", &[&["spec"]]));
    let entries = new["metadata"]["managedFields"].as_array().expect("list");
    assert_eq!(entries.len(), 2);
    assert_eq!(entries[1]["subresource"], "status");
    assert_eq!(entries[1]["fieldsV1"], json!({"f:status": {"f:replicas": {}}}));
}

#[test]
fn applying_to_an_untracked_object_starts_with_what_was() {
    let mut bench = Bench::new(CONFIG_MAP, "v1");
    bench.live = config(json!({"a": "1", "b": "1"}));
    bench.live["metadata"]["uid"] = "u".into();
    let error = bench.apply("m", config(json!({"a": "2"})), false).expect_err("conflict");
    assert_eq!(
        error.to_string(),
        "Apply failed with 1 conflict: conflict with \"before-first-apply\" using v1: .data.a"
    );
}

#[test]
fn owners_in_other_versions_are_converted_or_kept() {
    let v2 = "io.k8s.api.autoscaling.v2.HorizontalPodAutoscaler";
    let mut bench = Bench::new(v2, "autoscaling/v2");
    let config = |min: i32| json!({"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "h"}, "spec": {"minReplicas": min}});
    bench.apply("m1", config(1), false).expect("applies");
    bench.live["metadata"]["managedFields"][0]["apiVersion"] = "autoscaling/v1".into();
    let gone = |_: &Value, _: &str| None;
    let mut request = bench.request("m2", "2026-01-01T00:00:00Z");
    assert!(apply(&bench.live, &config(2), false, &request).is_err(), "an owner in another version still owns");
    request.convert = Some(&gone);
    let applied =
        apply(&bench.live, &config(2), false, &request).expect("an owner in a version that is gone is forgotten");
    assert_eq!(applied.value["metadata"]["managedFields"].as_array().map(Vec::len), Some(1));
}

#[test]
fn mutating_policies_overlay_without_owners() {
    let schema = Schema::builtin(DEPLOYMENT).expect("built in");
    let object = deployment(json!([{"name": "a", "image": "1"}]));
    let config = json!({"spec": {"replicas": 2, "template": {"spec": {"containers": [{"name": "b", "image": "2"}]}}}});
    let merged = overlay(&object, &config, &schema).expect("overlays");
    assert_eq!(merged["spec"]["replicas"], 2);
    assert_eq!(
        merged["spec"]["template"]["spec"]["containers"],
        json!([{"name": "a", "image": "1"}, {"name": "b", "image": "2"}])
    );
    let atomic = json!({"spec": {"selector": {"matchLabels": {"a": "b"}}}});
    assert_eq!(
        overlay(&object, &atomic, &schema).expect_err("atomic").to_string(),
        "invalid ApplyConfiguration: may not mutate atomic arrays, maps or structs: .spec.selector"
    );
}

/// What a server records for `kubectl create deployment`.
#[test]
fn creating_does_not_own_structs_that_are_always_there() {
    let schema = Schema::builtin(DEPLOYMENT).expect("built in");
    let mut new = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d", "labels": {"app": "d"}},
        "spec": {
            "replicas": 1, "selector": {"matchLabels": {"app": "d"}},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%"}},
            "template": {"metadata": {"labels": {"app": "d"}}, "spec": {"containers": [{"name": "n", "image": "i", "resources": {}}]}}
        }, "status": {}
    });
    let request = Request {
        schema: &schema,
        api_version: "apps/v1",
        subresource: "",
        manager: "m",
        now: "2026-01-01T00:00:00Z",
        reset: &[&["status"]],
        convert: None,
    };
    track_update(None, &mut new, &request);
    assert_eq!(
        new["metadata"]["managedFields"][0]["fieldsV1"],
        json!({
            "f:metadata": {"f:labels": {".": {}, "f:app": {}}},
            "f:spec": {
                "f:replicas": {}, "f:selector": {},
                "f:strategy": {"f:rollingUpdate": {".": {}, "f:maxSurge": {}}, "f:type": {}},
                "f:template": {
                    "f:metadata": {"f:labels": {".": {}, "f:app": {}}},
                    "f:spec": {"f:containers": {"k:{\"name\":\"n\"}": {".": {}, "f:image": {}, "f:name": {}, "f:resources": {}}}}
                }
            }
        })
    );
}
