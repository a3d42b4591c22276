//! The quota controller beside admission: a real server, in process, on a store of its own.

use std::net::Ipv4Addr;
use std::sync::Arc;

use coracle_api::node::{NodeConnector, NodeStream};
use coracle_api::status::Status;
use coracle_api::user::UserInfo;
use coracle_api::{ApiServer, Config};
use coracle_store::{Embedded, EmbeddedOptions};
use coracle_testkit::assert_eventually_async;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, ResourceQuota};
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use serde_json::json;
use tokio_util::sync::CancellationToken;

struct NoNodes;

#[async_trait::async_trait]
impl NodeConnector for NoNodes {
    async fn connect(&self, node: &str) -> Result<Box<dyn NodeStream>, Status> {
        Err(Status::unavailable(format!("there is no node {node} here")))
    }
}

fn made<K: serde::de::DeserializeOwned>(object: serde_json::Value) -> K {
    serde_json::from_value(object).expect("an object")
}

#[tokio::test]
async fn usage_follows_what_is_made_and_goes() {
    let data = tempfile::tempdir().expect("a folder");
    let store = Arc::new(Embedded::open(data.path().join("store"), EmbeddedOptions::default()).expect("a store"));
    let stop = CancellationToken::new();
    let config = Config {
        tls_dir: data.path().join("tls"),
        tls_sans: Vec::new(),
        service_cidr: "10.43.0.0/24".into(),
        cluster_cidr: "10.42.0.0/16".into(),
        node_ports: (30000, 30010),
        cluster_domain: "cluster.local".into(),
        dns_ip: Ipv4Addr::new(10, 43, 0, 10).into(),
        advertise: (Ipv4Addr::new(192, 0, 2, 1), 6443).into(),
        nodes: Arc::new(NoNodes),
        authn: Default::default(),
        disabled_admission: Vec::new(),
    };
    let api = ApiServer::new(config, store, stop.clone()).await.expect("a server");
    let controllers = tokio::spawn(coracle_controllers::run(api.clone()));
    let client = api.client(UserInfo::new("admin", &["system:masters"]));
    let new = PostParams::default();
    Api::<Namespace>::all(client.clone()).create(&new, &made(json!({"metadata": {"name": "q"}}))).await.expect("made");
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "q");
    let quotas: Api<ResourceQuota> = Api::namespaced(client, "q");
    let map = |name: &str| made::<ConfigMap>(json!({"metadata": {"name": name}}));
    maps.create(&new, &map("before")).await.expect("there is no quota yet");
    // The cluster's own bundle counts, too; once it is there nothing else comes by itself.
    assert_eventually_async!(
        20,
        maps.get_opt("kube-root-ca.crt").await.expect("asked").is_some(),
        "the CA is published"
    );
    quotas
        .create(&new, &made(json!({"metadata": {"name": "q"}, "spec": {"hard": {"configmaps": "3"}}})))
        .await
        .expect("made");
    let used = async || {
        let quota = quotas.get("q").await.expect("the quota");
        quota.status.and_then(|s| s.used).and_then(|u| u.get("configmaps").map(|q| q.0.clone())).unwrap_or_default()
    };
    assert_eventually_async!(20, used().await == "2", "both are counted");
    maps.create(&new, &map("a")).await.expect("there is room for one");
    assert_eq!(used().await, "3");
    assert!(maps.create(&new, &map("b")).await.is_err(), "the quota is full");
    maps.delete("a", &DeleteParams::default()).await.expect("deleted");
    assert_eventually_async!(20, used().await == "2", "what went is given back");
    maps.create(&new, &map("b")).await.expect("there is room again");
    controllers.abort();
    stop.cancel();
}
