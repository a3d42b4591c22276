//! Devices of a device plugin, and of a driver of claimed devices, from the pod that asks for them to its end.

use std::path::Path;

use coracle_kubelet::devices::api;
use coracle_kubelet::devices::pod_resources::{ListPodResourcesRequest, ListPodResourcesResponse};
use coracle_kubelet::dra::api as dra;
use coracle_kubelet::grpc::{Client, Router, bind, serve};
use coracle_testkit::{Image, assert_eventually};
use serde_json::{Value, json};

use crate::csi::{create, read};
use crate::process::{self, Journal, Plugin};
use crate::support::{Host, PATIENCE_S};

/// The device plugin: as process, and as kind of devices.
pub(crate) const PLUGIN: &str = "device-plugin";
const KIND: &str = "test.example/widget";
/// The driver of claimed devices.
pub(crate) const DRIVER: &str = "gadgets.test.example";
const IMAGE: &str = "docker.io/library/box:1";

/// Two devices that work and one that does not; the last is preferred.
pub(crate) async fn run_plugin(kubelet: &Path, journal: Journal) {
    let folder = kubelet.join("device-plugins");
    let listener = bind(&folder.join("widgets.sock")).await.expect("the plugin listens");
    let allocations = journal.clone();
    let device = |id: &str, health: &str| api::Device { id: id.into(), health: health.into(), topology: None };
    let list = vec![device("w1", "Healthy"), device("w2", "Unhealthy"), device("w3", "Healthy")];
    let router = Router::default()
        .streaming("/v1beta1.DevicePlugin/ListAndWatch", move |_: api::Empty| {
            let first = Ok(api::ListAndWatchResponse { devices: list.clone() });
            async move {
                use futures::StreamExt as _;
                Ok(futures::stream::once(async { first }).chain(futures::stream::pending()))
            }
        })
        .unary("/v1beta1.DevicePlugin/GetPreferredAllocation", |asked: api::PreferredAllocationRequest| async move {
            let answer = asked.container_requests.into_iter().map(|wanted| {
                let size = usize::try_from(wanted.allocation_size).expect("a size");
                let ids = wanted.available_device_ids.into_iter().rev().take(size).collect();
                api::ContainerPreferredAllocationResponse { device_ids: ids }
            });
            Ok(api::PreferredAllocationResponse { container_responses: answer.collect() })
        })
        .unary("/v1beta1.DevicePlugin/Allocate", move |asked: api::AllocateRequest| {
            let ids = asked.container_requests[0].devices_ids.clone();
            allocations.note("allocate", json!({"ids": ids}));
            async move {
                let answer = api::ContainerAllocateResponse {
                    envs: [("WIDGETS".to_owned(), ids.join(","))].into(),
                    devices: vec![api::DeviceSpec {
                        container_path: "/dev/widget".into(),
                        host_path: "/dev/null".into(),
                        permissions: "rw".into(),
                    }],
                    mounts: vec![api::Mount {
                        container_path: "/widget".into(),
                        host_path: "/etc".into(),
                        read_only: true,
                    }],
                    ..Default::default()
                };
                Ok(api::AllocateResponse { container_responses: vec![answer] })
            }
        })
        .unary("/v1beta1.DevicePlugin/PreStartContainer", move |asked: api::PreStartContainerRequest| {
            journal.note("prestart", json!({"ids": asked.devices_ids}));
            async move { Ok(api::PreStartContainerResponse {}) }
        });
    let register = async {
        let node = Client::connect(&folder.join("kubelet.sock")).await.expect("the node listens");
        let options = api::DevicePluginOptions { pre_start_required: true, get_preferred_allocation_available: true };
        let request = api::RegisterRequest {
            version: "v1beta1".into(),
            endpoint: "widgets.sock".into(),
            resource_name: KIND.into(),
            options: Some(options),
        };
        let limit = std::time::Duration::from_secs(60);
        let _: api::Empty = node.call("/v1beta1.Registration/Register", request, limit).await.expect("registered");
        std::future::pending::<()>().await;
    };
    tokio::join!(async { serve(listener, router).await.expect("the plugin serves") }, register);
}

/// A driver that prepares a device by naming its CDI device.
pub(crate) async fn run_driver(kubelet: &Path, journal: Journal) {
    let taken_back = journal.clone();
    let router = Router::default()
        .unary(
            "/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin/NodePrepareResources",
            move |asked: dra::NodePrepareResourcesRequest| {
                let journal = journal.clone();
                async move {
                    let answer = asked.claims.into_iter().map(|claim| {
                        journal.note("prepare", json!({"claim": claim.name}));
                        let device = dra::Device {
                            cdi_device_ids: vec!["test.example/gadget=any".into()],
                            ..Default::default()
                        };
                        (claim.uid, dra::NodePrepareResourceResponse { devices: vec![device], error: String::new() })
                    });
                    Ok(dra::NodePrepareResourcesResponse { claims: answer.collect() })
                }
            },
        )
        .unary(
            "/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin/NodeUnprepareResources",
            move |asked: dra::NodeUnprepareResourcesRequest| {
                let journal = taken_back.clone();
                async move {
                    let answer = asked.claims.into_iter().map(|claim| {
                        journal.note("unprepare", json!({"claim": claim.name}));
                        (claim.uid, dra::NodeUnprepareResourceResponse::default())
                    });
                    Ok(dra::NodeUnprepareResourcesResponse { claims: answer.collect() })
                }
            },
        );
    process::run(kubelet, "DRAPlugin", DRIVER, "v1.DRAPlugin", router).await;
}

fn pod(name: &str, resources: Value, more: Value) -> Value {
    let mut spec = json!({
        "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "main", "image": IMAGE, "imagePullPolicy": "Never",
            "command": ["/bin/sleep", "100000"], "resources": resources}],
    });
    for (key, value) in more.as_object().expect("an object") {
        spec[key] = value.clone();
    }
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec})
}

fn is_running(host: &Host, pod: &str) -> bool {
    host.get(&["get", "pod", pod, "-o", "jsonpath={.status.containerStatuses[0].ready}"]) == "true"
}

#[test]
fn devices_of_plugins_are_counted_given_and_given_back() {
    let mut host = Host::new("devices");
    host.start();
    host.import(&Image::busybox(IMAGE));
    let plugin = Plugin::start(&host, PLUGIN);
    let amounts = |host: &Host| {
        let status = &read(host, &["get", "node", "n1"])["status"];
        (status["capacity"][KIND].clone(), status["allocatable"][KIND].clone())
    };
    assert_eventually!(PATIENCE_S, amounts(&host) == (json!("3"), json!("2")), "{:?}\n{}", amounts(&host), host.log());
    let one = json!({"limits": {KIND: "1"}});
    create(&host, &[pod("first", one.clone(), json!({}))]);
    assert_eventually!(PATIENCE_S, is_running(&host, "first"), "{}", host.get(&["describe", "pod", "first"]));
    let script = "echo $WIDGETS; test -c /dev/widget && test -f /widget/passwd && echo whole";
    assert_eq!(host.get(&["exec", "first", "--", "sh", "-c", script]), "w3\nwhole");
    assert_eq!((plugin.count("allocate"), plugin.count("prestart")), (1, 1));
    let socket = host.path("data/kubelet/pod-resources/kubelet.sock");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let listed = || -> Vec<String> {
        let answer: ListPodResourcesResponse = runtime.block_on(async {
            let client = Client::connect(&socket).await.expect("connects");
            let limit = std::time::Duration::from_secs(60);
            client.call("/v1.PodResourcesLister/List", ListPodResourcesRequest {}, limit).await.expect("answers")
        });
        let containers = answer.pod_resources.into_iter().flat_map(|pod| pod.containers);
        containers.flat_map(|container| container.devices).flat_map(|device| device.device_ids).collect()
    };
    assert_eq!(listed(), ["w3"]);
    // A new daemon knows who has what, and the scheduler that one is left.
    host.kill_server();
    host.start();
    assert_eventually!(PATIENCE_S, is_running(&host, "first") && listed() == ["w3"], "{}", host.log());
    let two = json!({"limits": {KIND: "2"}});
    create(&host, &[pod("greedy", two, json!({}))]);
    let reason = |host: &Host| host.get(&["get", "pod", "greedy", "-o", "jsonpath={.status.conditions[0].message}"]);
    assert_eventually!(PATIENCE_S, reason(&host).contains("Insufficient"), "{}\n{}", reason(&host), host.log());
    assert_eq!(plugin.count("allocate"), 1, "nothing is given twice");
    drop(plugin);
    let plugin = Plugin::start(&host, PLUGIN);
    assert_eventually!(PATIENCE_S, amounts(&host) == (json!("3"), json!("2")), "{:?}\n{}", amounts(&host), host.log());
    host.get(&["delete", "pod", "first", "--wait=false"]);
    assert_eventually!(PATIENCE_S, is_running(&host, "greedy"), "{}", host.get(&["describe", "pod", "greedy"]));
    assert_eq!(listed(), ["w1", "w3"]);
    drop(plugin);
    host.get(&["delete", "pod", "greedy", "--wait=false"]);
    assert_eventually!(PATIENCE_S, host.get(&["get", "pods"]).is_empty(), "{}", host.log());
    let left = host.take_down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}

#[test]
fn claimed_devices_are_allocated_prepared_and_taken_back() {
    let mut host = Host::new("claims");
    host.cdi(
        "gadget.json",
        &json!({
            "cdiVersion": "0.6.0", "kind": "test.example/gadget",
            "devices": [{"name": "any", "containerEdits": {"env": ["GADGET=here"],
                "deviceNodes": [{"path": "/dev/gadget", "hostPath": "/dev/zero"}]}}],
        })
        .to_string(),
    );
    host.start();
    host.import(&Image::busybox(IMAGE));
    let driver = Plugin::start(&host, DRIVER);
    let device = |name: &str, model: &str| json!({"name": name, "attributes": {"model": {"string": model}}});
    let template = json!({"requests": [{"name": "one", "exactly": {"deviceClassName": "gadgets",
        "selectors": [{"cel": {"expression": format!("device.attributes[\"{DRIVER}\"].model == \"b\"")}}]}}]});
    create(
        &host,
        &[
            json!({"apiVersion": "resource.k8s.io/v1", "kind": "DeviceClass", "metadata": {"name": "gadgets"},
            "spec": {"selectors": [{"cel": {"expression": format!("device.driver == \"{DRIVER}\"")}}]}}),
            json!({"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice", "metadata": {"name": "n1-gadgets"},
            "spec": {"driver": DRIVER, "nodeName": "n1", "pool": {"name": "n1", "generation": 1, "resourceSliceCount": 1},
                "devices": [device("g1", "a"), device("g2", "b")]}}),
            json!({"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaimTemplate", "metadata": {"name": "gadget"},
            "spec": {"spec": {"devices": template}}}),
        ],
    );
    let uses = |name: &str| {
        pod(
            name,
            json!({"claims": [{"name": "mine"}]}),
            json!({"resourceClaims": [{"name": "mine", "resourceClaimTemplateName": "gadget"}]}),
        )
    };
    create(&host, &[uses("first")]);
    assert_eventually!(
        PATIENCE_S,
        is_running(&host, "first"),
        "{}\n{}",
        host.get(&["describe", "pod", "first"]),
        host.log()
    );
    let script = "echo $GADGET; test -c /dev/gadget && echo device";
    assert_eq!(host.get(&["exec", "first", "--", "sh", "-c", script]), "here\ndevice");
    let claims = |host: &Host| read(host, &["get", "resourceclaims"])["items"].clone();
    let claim = claims(&host)[0]["status"].clone();
    assert_eq!(claim["allocation"]["devices"]["results"][0]["device"], "g2", "{claim:#}");
    assert_eq!(claim["reservedFor"][0]["name"], "first");
    // There is no second of this model.
    create(&host, &[uses("second")]);
    let reason = |host: &Host| host.get(&["get", "pod", "second", "-o", "jsonpath={.status.conditions[0].message}"]);
    assert_eventually!(PATIENCE_S, reason(&host).contains("cannot allocate all claims"), "{}", reason(&host));
    host.kill_server();
    host.start();
    assert_eventually!(PATIENCE_S, is_running(&host, "first"), "{}", host.log());
    host.get(&["delete", "pod", "first", "--wait=false"]);
    assert_eventually!(
        PATIENCE_S,
        is_running(&host, "second"),
        "{}\n{}",
        host.get(&["describe", "pod", "second"]),
        host.log()
    );
    assert_eventually!(
        PATIENCE_S,
        (driver.count("prepare"), driver.count("unprepare")) == (2, 1),
        "{:?}",
        driver.calls()
    );
    host.get(&["delete", "pod", "second", "--wait=false"]);
    assert_eventually!(PATIENCE_S, claims(&host) == json!([]), "{:#}\n{}", claims(&host), host.log());
    // The pod's object goes before its end on the node is over.
    assert_eventually!(PATIENCE_S, driver.count("unprepare") == 2, "{:?}", driver.calls());
    drop(driver);
    let left = host.take_down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}
