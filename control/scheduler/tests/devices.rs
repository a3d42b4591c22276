//! Devices that several claims have parts of, in the whole engine.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::Delta;
use coracle_scheduler::{Action, Config, Engine, Update};
use k8s_openapi::api::resource::v1::ResourceClaim;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::Instant;

fn parse<K: DeserializeOwned>(value: Value) -> Arc<K> {
    Arc::new(serde_json::from_value(value).expect("well formed"))
}

fn claim(name: &str, memory: &str) -> Arc<ResourceClaim> {
    let request =
        json!({"name": "r", "exactly": {"deviceClassName": "gpu", "capacity": {"requests": {"memory": memory}}}});
    parse(
        json!({"metadata": {"name": name, "namespace": "d", "uid": name}, "spec": {"devices": {"requests": [request]}}}),
    )
}

#[test]
fn a_device_is_shared_until_it_is_used_up() {
    let (mut engine, mut now) = (Engine::new(Config::default(), 1), Instant::now());
    let device = json!({"name": "x", "allowMultipleAllocations": true, "capacity": {"memory": {"value": "10Gi"}}});
    let slice = json!({"metadata": {"name": "s"}, "spec": {"driver": "test", "nodeName": "n", "devices": [device],
        "pool": {"name": "p", "generation": 1, "resourceSliceCount": 1}}});
    let node = json!({"metadata": {"name": "n"}, "status": {"allocatable": {"cpu": "100", "pods": "110"}}});
    engine.update(
        &Update::DeviceClass(Delta { old: None, new: Some(parse(json!({"metadata": {"name": "gpu"}, "spec": {}}))) }),
        now,
    );
    engine.update(&Update::ResourceSlice(Delta { old: None, new: Some(parse(slice)) }), now);
    engine.update(&Update::Node(Delta { old: None, new: Some(parse(node)) }), now);
    for (name, memory) in [("a", "4Gi"), ("b", "5Gi"), ("c", "2Gi")] {
        engine.update(&Update::ResourceClaim(Delta { old: None, new: Some(claim(name, memory)) }), now);
        let spec = json!({"containers": [{"name": "c"}], "resourceClaims": [{"name": "g", "resourceClaimName": name}]});
        let pod = json!({"metadata": {"name": name, "namespace": "d", "uid": name}, "spec": spec});
        engine.update(&Update::Pod(Delta { old: None, new: Some(parse(pod)) }), now);
    }
    for name in ["a", "b"] {
        let Some(Action::Bind(bind)) = engine.step(now) else { panic!("{name} finds room") };
        assert_eq!((bind.pod(), &*bind.node), (name, "n"));
        engine.bound(&bind, true, now);
    }
    let Some(Action::Report(report)) = engine.step(now) else { panic!("there is only 1Gi left") };
    assert!(report.message.contains("cannot allocate all claims"), "{}", report.message);
    // What goes gives its part back.
    engine.update(&Update::ResourceClaim(Delta { old: Some(claim("a", "4Gi")), new: None }), now);
    now += Duration::from_secs(10);
    assert!(matches!(engine.step(now), Some(Action::Bind(bind)) if bind.pod() == "c"));
}
