//! Operators that know nothing of us: one written with kopf, one with kube-rs, and an election of a leader by Lease, against
//! the program itself over TLS.
#![forbid(unsafe_code)]

#[path = "support/server.rs"]
mod server;

use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::Duration;

use coracle_testkit::assert_eventually_async;
use futures::StreamExt as _;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Event};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::GroupVersionKind;
use kube::runtime::controller::Action;
use kube::runtime::finalizer::{Event as Finalizer, finalizer};
use kube::runtime::{Controller, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};

use server::Server;

/// Seconds for anything that must come about.
const PATIENCE_S: u32 = 60;

/// The process of an operator; it ends with the value.
struct Operator(Child);

impl Drop for Operator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn define(client: &Client, plural: &str, kind: &str) -> Api<DynamicObject> {
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    let definition = serde_json::from_value(json!({
        "metadata": {"name": format!("{plural}.example.com")},
        "spec": {"group": "example.com", "scope": "Namespaced", "names": {"plural": plural, "singular": kind.to_lowercase(), "kind": kind},
            "versions": [{"name": "v1", "served": true, "storage": true, "subresources": {"status": {}}, "schema": {"openAPIV3Schema": {
                "type": "object", "properties": {"spec": {"type": "object", "properties": {"text": {"type": "string"}}},
                    "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}}}]},
    }))
    .expect("a definition");
    definitions.create(&PostParams::default(), &definition).await.expect("defined");
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("example.com", "v1", kind), plural);
    let objects = Api::namespaced_with(client.clone(), "default", &resource);
    assert_eventually_async!(PATIENCE_S, objects.list(&ListParams::default()).await.is_ok(), "the kind is served");
    objects
}

fn object(kind: &str, name: &str, text: &str) -> DynamicObject {
    serde_json::from_value(
        json!({"apiVersion": "example.com/v1", "kind": kind, "metadata": {"name": name}, "spec": {"text": text}}),
    )
    .expect("an object")
}

async fn text_of(maps: &Api<ConfigMap>, name: &str) -> Option<String> {
    maps.get_opt(name).await.expect("asked")?.data?.get("text").cloned()
}

#[tokio::test]
async fn an_operator_written_with_kopf_runs_unmodified() {
    let (server, client) = Server::start().await;
    let greetings = define(&client, "greetings", "Greeting").await;
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/operators/greeter.py");
    let log = std::fs::File::create(server.folder.path().join("operator.log")).expect("a log");
    let mut command = coracle_testkit::python("kopf", "kopf", &["kubernetes"]);
    command.args(["-m", "kopf", "run", "--standalone", "--namespace", "default"]).arg(script);
    command.env("KUBECONFIG", server.folder.path().join("kubeconfig")).stdout(Stdio::null()).stderr(log);
    let _operator = Operator(command.spawn().expect("the operator starts"));
    let log = || std::fs::read_to_string(server.folder.path().join("operator.log")).unwrap_or_default();

    greetings.create(&PostParams::default(), &object("Greeting", "hi", "hello")).await.expect("created");
    assert_eventually_async!(
        PATIENCE_S,
        text_of(&maps, "hi-child").await.as_deref() == Some("hello"),
        "no child:\n{}",
        log()
    );
    let greeted = async || greetings.get("hi").await.expect("the object").data["status"]["create"]["greeted"].clone();
    assert_eventually_async!(PATIENCE_S, greeted().await == "hello", "no status:\n{}", log());
    let events: Api<Event> = Api::namespaced(client.clone(), "default");
    let told = async || {
        events
            .list(&ListParams::default())
            .await
            .expect("listed")
            .iter()
            .any(|event| event.reason.as_deref() == Some("Greeted"))
    };
    assert_eventually_async!(PATIENCE_S, told().await, "no event:\n{}", log());
    let change = Patch::Merge(json!({"spec": {"text": "good day"}}));
    greetings.patch("hi", &PatchParams::default(), &change).await.expect("patched");
    assert_eventually_async!(
        PATIENCE_S,
        text_of(&maps, "hi-child").await.as_deref() == Some("good day"),
        "no change:\n{}",
        log()
    );
    greetings.delete("hi", &DeleteParams::default()).await.expect("deleted");
    assert_eventually_async!(
        PATIENCE_S,
        maps.get_opt("hi-farewell").await.expect("asked").is_some(),
        "no farewell:\n{}",
        log()
    );
    assert_eventually_async!(
        PATIENCE_S,
        greetings.get_opt("hi").await.expect("asked").is_none(),
        "the finalizer stays:\n{}",
        log()
    );
    assert_eventually_async!(PATIENCE_S, maps.get_opt("hi-child").await.expect("asked").is_none(), "the child stays");
}

/// What the operator written with kube-rs does about one object.
async fn mirror(
    object: Arc<DynamicObject>,
    context: Arc<(Client, Api<DynamicObject>)>,
) -> Result<Action, kube::runtime::finalizer::Error<kube::Error>> {
    let (client, objects) = &*context;
    finalizer(objects, "example.com/mirror", object, |event| async {
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
        match event {
            Finalizer::Apply(object) => {
                let name = object.name_any();
                let child = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"text": object.data["spec"]["text"]}});
                maps.patch(&name, &PatchParams::apply("mirror").force(), &Patch::Apply(child)).await?;
                let status = json!({"status": {"seen": object.metadata.generation}});
                objects.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await?;
            }
            Finalizer::Cleanup(object) => {
                maps.delete(&object.name_any(), &DeleteParams::default()).await?;
            }
        }
        Ok(Action::await_change())
    })
    .await
}

#[tokio::test]
async fn an_operator_written_with_kube_rs_runs_unmodified() {
    let (server, client) = Server::start().await;
    let objects = define(&client, "mirrors", "Mirror").await;
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("example.com", "v1", "Mirror"), "mirrors");
    let context = Arc::new((client.clone(), objects.clone()));
    let controller = Controller::new_with(objects.clone(), watcher::Config::default(), resource)
        .run(mirror, |_, _, _| Action::requeue(Duration::from_secs(1)), context)
        .for_each(|done| async move {
            if let Err(error) = done {
                eprintln!("the operator: {error}");
            }
        });
    let operator = tokio::spawn(controller);
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
    objects.create(&PostParams::default(), &object("Mirror", "m", "one")).await.expect("created");
    assert_eventually_async!(
        PATIENCE_S,
        text_of(&maps, "m").await.as_deref() == Some("one"),
        "no child:\n{}",
        server.log()
    );
    let change = Patch::Merge(json!({"spec": {"text": "two"}}));
    objects.patch("m", &PatchParams::default(), &change).await.expect("patched");
    assert_eventually_async!(PATIENCE_S, text_of(&maps, "m").await.as_deref() == Some("two"), "no change");
    let seen = async || objects.get("m").await.expect("the object").data["status"]["seen"].clone();
    assert_eventually_async!(PATIENCE_S, seen().await == 2, "the status does not say which generation was seen");
    objects.delete("m", &DeleteParams::default()).await.expect("deleted");
    assert_eventually_async!(PATIENCE_S, objects.get_opt("m").await.expect("asked").is_none(), "the finalizer stays");
    assert!(maps.get_opt("m").await.expect("asked").is_none(), "the child went first");
    operator.abort();
}

/// One try of a candidate to hold the Lease, as client-go's leader election makes it.
async fn hold(leases: &Api<Lease>, me: &str) -> bool {
    let spec = |transitions: i32| -> Value {
        let now = format!("{:.6}", Timestamp::now());
        json!({"holderIdentity": me, "leaseDurationSeconds": 2, "acquireTime": now, "renewTime": now, "leaseTransitions": transitions})
    };
    let Some(mut lease) = leases.get_opt("leader").await.expect("asked") else {
        let new = serde_json::from_value(json!({"metadata": {"name": "leader"}, "spec": spec(0)})).expect("a lease");
        return leases.create(&PostParams::default(), &new).await.is_ok();
    };
    let held = lease.spec.clone().unwrap_or_default();
    let renewed = held.renew_time.map(|time| time.0);
    let expired = renewed.is_none_or(|time| Timestamp::now().duration_since(time).as_secs() >= 2);
    if held.holder_identity.as_deref() != Some(me) && !expired {
        return false;
    }
    lease.spec = Some(serde_json::from_value(spec(held.lease_transitions.unwrap_or_default() + 1)).expect("a spec"));
    // Whoever read an older version is refused.
    leases.replace("leader", &PostParams::default(), &lease).await.is_ok()
}

#[tokio::test]
async fn a_lease_has_one_holder_and_passes_on() {
    let (_server, client) = Server::start().await;
    let leases: Api<Lease> = Api::namespaced(client, "default");
    for round in 0..3 {
        let tries = (0..8).map(|number| {
            let leases = leases.clone();
            async move { hold(&leases, &format!("candidate-{round}-{number}")).await }
        });
        let won = futures::future::join_all(tries).await.into_iter().filter(|held| *held).count();
        assert_eq!(won, 1, "in round {round}");
        // The holder falls silent; the next round's candidates may take over when its time is up.
        let expired = async || {
            let renewed = leases.get("leader").await.expect("the lease").spec.and_then(|spec| spec.renew_time);
            renewed.is_some_and(|time| Timestamp::now().duration_since(time.0).as_secs() >= 2)
        };
        assert_eventually_async!(PATIENCE_S, expired().await, "the lease runs out");
    }
}
