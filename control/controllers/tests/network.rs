//! Where Services lead, on a real server: Endpoints, slices, mirrors, balancers.

mod support;

use coracle_testkit::assert_eventually_async;
use k8s_openapi::api::core::v1::{Endpoints, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::{DeleteParams, ListParams};
use serde_json::{Value, json};
use support::Cluster;

async fn serve(cluster: &Cluster, name: &str, ip: &str, ready: bool) {
    let pods: Api<Pod> = cluster.ns("n");
    cluster
        .create(
            &pods,
            json!({"metadata": {"name": name, "labels": {"app": "a"}}, "spec": {"nodeName": "node-1",
            "containers": [{"name": "c", "image": "i", "ports": [{"name": "web", "containerPort": 8080}]}]}}),
        )
        .await;
    let status = json!({"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
        "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]});
    cluster.patch_status(&pods, name, status).await;
}

async fn slices(cluster: &Cluster, service: &str) -> Vec<EndpointSlice> {
    let of = ListParams::default().labels(&format!("kubernetes.io/service-name={service}"));
    cluster.ns::<EndpointSlice>("n").list(&of).await.expect("slices").items
}

async fn endpoints(cluster: &Cluster, service: &str) -> Value {
    let found = cluster.ns::<Endpoints>("n").get_opt(service).await.expect("asked");
    serde_json::to_value(found.and_then(|found| found.subsets)).expect("JSON")
}

#[tokio::test]
async fn endpoints_and_slices_follow_the_pods() {
    let cluster = Cluster::start().await;
    cluster.namespace("n").await;
    cluster
        .create(
            &cluster.all::<Node>(),
            json!({"metadata": {"name": "node-1", "labels": {"topology.kubernetes.io/zone": "z"}}}),
        )
        .await;
    let services: Api<Service> = cluster.ns("n");
    cluster
        .create(
            &services,
            json!({"metadata": {"name": "s", "labels": {"tier": "x"}}, "spec": {"selector": {"app": "a"},
            "trafficDistribution": "PreferClose", "ports": [{"name": "http", "port": 80, "targetPort": "web"}]}}),
        )
        .await;
    assert_eventually_async!(20, slices(&cluster, "s").await.len() == 1, "a Service without pods has a slice");
    assert_eventually_async!(
        20,
        cluster.ns::<Endpoints>("n").get_opt("s").await.expect("asked").is_some(),
        "and Endpoints"
    );
    serve(&cluster, "one", "10.0.0.1", true).await;
    serve(&cluster, "two", "10.0.0.2", false).await;
    let wanted = |view: &Value| {
        view[0]["addresses"][0]["ip"] == "10.0.0.1"
            && view[0]["notReadyAddresses"][0]["ip"] == "10.0.0.2"
            && view[0]["ports"] == json!([{"name": "http", "port": 8080, "protocol": "TCP"}])
    };
    assert_eventually_async!(20, wanted(&endpoints(&cluster, "s").await), "both pods are in the Endpoints");
    let view = async || serde_json::to_value(&slices(&cluster, "s").await).expect("JSON");
    assert_eventually_async!(
        20,
        view().await[0]["endpoints"].as_array().is_some_and(|all| all.len() == 2),
        "and in the slice"
    );
    let slice = view().await[0].clone();
    assert_eq!(slice["metadata"]["labels"]["tier"], "x");
    assert_eq!(slice["endpoints"][0]["hints"], json!({"forZones": [{"name": "z"}]}));
    assert_eq!(slice["endpoints"][1]["conditions"], json!({"ready": false, "serving": false, "terminating": false}));
    // Without its Service all of it goes.
    services.delete("s", &DeleteParams::default()).await.expect("deleted");
    assert_eventually_async!(20, slices(&cluster, "s").await.is_empty(), "the slices go");
    assert_eventually_async!(
        20,
        cluster.ns::<Endpoints>("n").get_opt("s").await.expect("asked").is_none(),
        "the Endpoints go"
    );
}

#[tokio::test]
async fn endpoints_that_users_write_are_mirrored() {
    let cluster = Cluster::start().await;
    cluster.namespace("n").await;
    let custom: Api<Endpoints> = cluster.ns("n");
    // Whatever has no Service when the controllers start goes; they have started when a Service gets its Endpoints.
    let selecting = json!({"metadata": {"name": "first"}, "spec": {"selector": {"app": "x"}, "ports": [{"port": 80}]}});
    cluster.create(&cluster.ns::<Service>("n"), selecting).await;
    assert_eventually_async!(20, custom.get_opt("first").await.expect("asked").is_some(), "the controllers run");
    // From then on Endpoints without a Service are nobody's business.
    let subset = |ip: &str, port: i32| json!([{"addresses": [{"ip": ip}], "ports": [{"name": "p", "port": port}]}]);
    cluster.create(&custom, json!({"metadata": {"name": "alone"}, "subsets": subset("192.0.2.1", 80)})).await;
    cluster
        .create(
            &cluster.ns::<Service>("n"),
            json!({"metadata": {"name": "m"}, "spec": {"ports": [{"name": "p", "port": 80}]}}),
        )
        .await;
    cluster.create(&custom, json!({"metadata": {"name": "m"}, "subsets": subset("192.0.2.2", 80)})).await;
    let view = async || {
        let all = slices(&cluster, "m").await;
        all.iter()
            .map(|s| {
                (
                    s.endpoints.as_deref().unwrap_or_default()[0].addresses[0].clone(),
                    s.ports.as_deref().unwrap_or_default()[0].port,
                )
            })
            .collect::<Vec<_>>()
    };
    assert_eventually_async!(20, view().await == [("192.0.2.2".to_owned(), Some(80))], "they are mirrored");
    assert_eq!(
        slices(&cluster, "m").await[0].metadata.labels.as_ref().expect("labels")["endpointslice.kubernetes.io/managed-by"],
        "endpointslicemirroring-controller.k8s.io"
    );
    cluster.patch(&custom, "m", json!({"subsets": subset("192.0.2.3", 81)})).await;
    assert_eventually_async!(20, view().await == [("192.0.2.3".to_owned(), Some(81))], "changes follow");
    custom.delete("m", &DeleteParams::default()).await.expect("deleted");
    assert_eventually_async!(20, slices(&cluster, "m").await.is_empty(), "the mirror goes");
    assert!(custom.get_opt("alone").await.expect("asked").is_some());
    assert!(slices(&cluster, "alone").await.is_empty());
}

#[tokio::test]
async fn balancers_announce_ready_nodes_where_the_port_is_free() {
    let cluster = Cluster::start().await;
    cluster.namespace("n").await;
    let nodes: Api<Node> = cluster.all();
    cluster.create(&nodes, json!({"metadata": {"name": "node-1"}})).await;
    let status = |ready: &str| {
        json!({"addresses": [{"type": "InternalIP", "address": "192.0.2.7"}],
        "conditions": [{"type": "Ready", "status": ready, "lastHeartbeatTime": "2099-01-01T00:00:00Z"}]})
    };
    cluster.patch_status(&nodes, "node-1", status("True")).await;
    let services: Api<Service> = cluster.ns("n");
    let balancer = |name: &str, port: u16| {
        json!({"metadata": {"name": name},
        "spec": {"type": "LoadBalancer", "selector": {"app": name}, "ports": [{"port": port}]}})
    };
    cluster.create(&services, balancer("first", 80)).await;
    let ingress = async |name: &str| {
        let service = services.get(name).await.expect("the Service");
        serde_json::to_value(service.status.and_then(|s| s.load_balancer).and_then(|b| b.ingress)).expect("JSON")
    };
    let announced = json!([{"ip": "192.0.2.7", "ipMode": "VIP"}]);
    assert_eventually_async!(20, ingress("first").await == announced, "the node is announced");
    cluster.create(&services, balancer("second", 80)).await;
    cluster.create(&services, balancer("api", 6443)).await;
    cluster.create(&services, balancer("other", 81)).await;
    assert_eventually_async!(20, ingress("other").await == announced, "another port is free");
    assert_eq!((ingress("second").await, ingress("api").await), (Value::Null, Value::Null));
    services.delete("first", &DeleteParams::default()).await.expect("deleted");
    assert_eventually_async!(20, ingress("second").await == announced, "the port is free again");
    cluster.patch_status(&nodes, "node-1", status("False")).await;
    assert_eventually_async!(20, ingress("second").await == Value::Null, "a node that is not ready balances nothing");
}
