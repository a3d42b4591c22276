//! A control plane of a test's own, in process: API server, store in a temporary folder, every controller.
#![allow(dead_code, reason = "each test file uses its part of what they share")]

use std::net::Ipv4Addr;
use std::sync::Arc;

use coracle_api::node::{NodeConnector, NodeStream};
use coracle_api::status::Status;
use coracle_api::user::UserInfo;
use coracle_api::{ApiServer, Config};
use coracle_store::{Embedded, EmbeddedOptions, SharedStore};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, ServiceAccount};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

struct NoNodes;

#[async_trait::async_trait]
impl NodeConnector for NoNodes {
    async fn connect(&self, node: &str) -> Result<Box<dyn NodeStream>, Status> {
        Err(Status::unavailable(format!("there is no node {node} here")))
    }
}

/// An object of JSON.
pub(crate) fn made<K: DeserializeOwned>(object: Value) -> K {
    serde_json::from_value(object).expect("an object")
}

/// The seeds of a simulation: the one of `CORACLE_SEED`, or as many as `CORACLE_SEEDS` says (one), each printed.
pub(crate) fn seeds() -> Vec<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = match (number("CORACLE_SEED"), number("CORACLE_SEEDS")) {
        (Some(seed), _) => vec![seed],
        (None, count) => (0..count.unwrap_or(1)).map(|_| rand::random()).collect(),
    };
    eprintln!("CORACLE_SEED={}", seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(" or "));
    seeds
}

/// The control plane; it ends with the value.
pub(crate) struct Cluster {
    pub(crate) api: Arc<ApiServer>,
    pub(crate) client: Client,
    controllers: Option<JoinHandle<()>>,
    stop: CancellationToken,
    // Last, so that the store is closed first.
    _data: tempfile::TempDir,
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        let mut cluster = Self::idle().await;
        cluster.control().await;
        cluster
    }

    /// Starts the controllers, anew if they run: one process ends with all that it had under way before the next begins.
    pub(crate) async fn control(&mut self) {
        if let Some(running) = self.controllers.take() {
            running.abort();
            assert!(running.await.is_err_and(|error| error.is_cancelled()), "the controllers ended by themselves");
            // The store writes in order: what the old ones had handed to it is done when this is.
            let now = k8s_openapi::jiff::Timestamp::now().to_string();
            let note =
                json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "crashed"}, "data": {"at": now}});
            let notes = Api::<ConfigMap>::namespaced(self.client.clone(), "default");
            notes.patch("crashed", &PatchParams::apply("test").force(), &Patch::Apply(note)).await.expect("written");
        }
        self.controllers = Some(tokio::spawn(coracle_controllers::run(self.api.clone())));
    }

    /// Starts the controllers anew while those that run already, which do not know that they lead no longer, go on for a
    /// moment.
    pub(crate) async fn take_over(&mut self, moment: std::time::Duration) {
        let next = tokio::spawn(coracle_controllers::run(self.api.clone()));
        if let Some(before) = self.controllers.replace(next) {
            tokio::time::sleep(moment).await;
            before.abort();
        }
    }

    /// A control plane without controllers.
    pub(crate) async fn idle() -> Self {
        Self::idle_with(Arc::new(NoNodes)).await
    }

    /// The same, with a way to kubelets.
    pub(crate) async fn idle_with(nodes: Arc<dyn NodeConnector>) -> Self {
        Self::idle_on(nodes, |store| store).await
    }

    /// The same, with something between the API and its store.
    pub(crate) async fn idle_on(
        nodes: Arc<dyn NodeConnector>,
        between: impl FnOnce(SharedStore) -> SharedStore,
    ) -> Self {
        let data = tempfile::tempdir().expect("a folder");
        let store = Arc::new(Embedded::open(data.path().join("store"), EmbeddedOptions::default()).expect("a store"));
        let store = between(store);
        let stop = CancellationToken::new();
        let config = Config {
            tls_dir: data.path().join("tls"),
            tls_sans: Vec::new(),
            service_cidr: "10.43.0.0/24".into(),
            cluster_cidr: "10.42.0.0/16".into(),
            node_ports: (30000, 30010),
            cluster_domain: "cluster.local".into(),
            dns_ips: vec![Ipv4Addr::new(10, 43, 0, 10).into()],
            advertise: (Ipv4Addr::new(192, 0, 2, 1), 6443).into(),
            shared_store: false,
            nodes,
            authn: Default::default(),
            disabled_admission: Vec::new(),
        };
        let api = ApiServer::new(config, store, stop.clone()).await.expect("a server");
        let client = api.client(UserInfo::new("admin", &["system:masters"]));
        Self { api, client, controllers: None, stop, _data: data }
    }

    /// A client of somebody else.
    pub(crate) fn client_of(&self, user: &str, groups: &[&str]) -> Client {
        self.api.client(UserInfo::new(user, groups))
    }

    pub(crate) fn all<K: Resource<DynamicType = ()>>(&self) -> Api<K> {
        Api::all(self.client.clone())
    }

    pub(crate) fn ns<K: Resource<DynamicType = (), Scope = NamespaceResourceScope>>(&self, namespace: &str) -> Api<K> {
        Api::namespaced(self.client.clone(), namespace)
    }

    pub(crate) async fn namespace(&self, name: &str) {
        self.create(&self.all::<Namespace>(), json!({"metadata": {"name": name}})).await;
        if self.controllers.is_some() {
            let accounts = self.ns::<ServiceAccount>(name);
            coracle_testkit::assert_eventually_async!(
                30,
                accounts.get_opt("default").await.expect("asked").is_some(),
                "pods can be made"
            );
        }
    }

    pub(crate) async fn create<K>(&self, api: &Api<K>, object: Value) -> K
    where
        K: Resource<DynamicType = ()> + DeserializeOwned + Serialize + Clone + std::fmt::Debug,
    {
        api.create(&PostParams::default(), &made(object)).await.expect("created")
    }

    /// Merges into an object.
    pub(crate) async fn patch<K>(&self, api: &Api<K>, name: &str, patch: Value) -> K
    where
        K: Resource<DynamicType = ()> + DeserializeOwned + Serialize + Clone + std::fmt::Debug,
    {
        api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.expect("patched")
    }

    /// Merges into an object's status, as whoever owns the status would.
    pub(crate) async fn patch_status<K>(&self, api: &Api<K>, name: &str, patch: Value) -> K
    where
        K: Resource<DynamicType = ()> + DeserializeOwned + Serialize + Clone + std::fmt::Debug,
    {
        api.patch_status(name, &PatchParams::default(), &Patch::Merge(json!({"status": patch})))
            .await
            .expect("status patched")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(running) = &self.controllers {
            running.abort();
        }
        self.stop.cancel();
    }
}
