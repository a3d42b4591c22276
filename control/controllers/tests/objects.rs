//! Controllers of objects as such, on a real server: garbage, namespaces, aggregated roles, tokens in secrets, address ranges,
//! policies, claims of devices.

mod support;

use coracle_testkit::assert_eventually_async;
use k8s_openapi::api::admissionregistration::v1::ValidatingAdmissionPolicy;
use k8s_openapi::api::authentication::v1::TokenReview;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Secret, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::{IPAddress, ServiceCIDR};
use k8s_openapi::api::rbac::v1::ClusterRole;
use k8s_openapi::api::resource::v1::{ResourceClaim, ResourceClaimTemplate};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::api::{DeleteParams, ListParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use support::Cluster;

#[tokio::test]
async fn roles_gather_what_their_selectors_match() {
    let cluster = Cluster::start().await;
    let roles: Api<ClusterRole> = cluster.all();
    let rules = async |name: &str| roles.get(name).await.expect("the role").rules.unwrap_or_default();
    for name in ["view", "edit", "admin"] {
        assert_eventually_async!(20, rules(name).await.len() > 5, "the role has rules");
    }
    cluster
        .create(
            &roles,
            json!({"metadata": {"name": "mine", "labels": {"rbac.authorization.k8s.io/aggregate-to-view": "true"}},
            "rules": [{"apiGroups": ["example.com"], "resources": ["widgets"], "verbs": ["get"]}]}),
        )
        .await;
    let has = |rules: &[k8s_openapi::api::rbac::v1::PolicyRule]| {
        rules.iter().any(|rule| rule.resources.iter().flatten().any(|resource| resource == "widgets"))
    };
    assert_eventually_async!(20, has(&rules("view").await), "a label extends the role");
    roles.delete("mine", &DeleteParams::default()).await.expect("deleted");
    assert_eventually_async!(20, !has(&rules("view").await), "and takes it back");
}

#[tokio::test]
async fn bootstrap_tokens_go_when_they_have_expired() {
    let mut cluster = Cluster::idle().await;
    let secrets: Api<Secret> = cluster.ns("kube-system");
    for (name, minutes) in [("old", -1), ("young", 10)] {
        let end = Timestamp::now().checked_add(SignedDuration::from_mins(minutes)).expect("a time").to_string();
        let token = json!({"metadata": {"name": format!("bootstrap-token-{name}")}, "type": "bootstrap.kubernetes.io/token",
            "stringData": {"token-id": "abcdef", "token-secret": "0123456789abcdef", "expiration": end}});
        cluster.create(&secrets, token).await;
    }
    cluster.control().await;
    let there = async |name: &str| secrets.get_opt(&format!("bootstrap-token-{name}")).await.expect("asked").is_some();
    assert_eventually_async!(20, !there("old").await, "its time is over");
    assert!(there("young").await);
}

#[tokio::test]
async fn secrets_of_accounts_hold_tokens_until_the_account_goes() {
    let cluster = Cluster::start().await;
    cluster.namespace("n").await;
    let accounts: Api<ServiceAccount> = cluster.ns("n");
    let secrets: Api<Secret> = cluster.ns("n");
    cluster.create(&accounts, json!({"metadata": {"name": "robot"}})).await;
    cluster
        .create(
            &secrets,
            json!({"metadata": {"name": "t", "annotations": {"kubernetes.io/service-account.name": "robot"}},
            "type": "kubernetes.io/service-account-token"}),
        )
        .await;
    let field = async |name: &str| {
        let data = secrets.get("t").await.expect("the secret").data.unwrap_or_default();
        data.get(name).map(|bytes| String::from_utf8(bytes.0.clone()).expect("text")).unwrap_or_default()
    };
    assert_eventually_async!(20, !field("token").await.is_empty(), "the secret is filled");
    assert_eq!(field("namespace").await, "n");
    assert!(field("ca.crt").await.contains("BEGIN CERTIFICATE"));
    let review = cluster
        .create(&cluster.all::<TokenReview>(), json!({"metadata": {}, "spec": {"token": field("token").await}}))
        .await;
    let user = review.status.and_then(|status| status.user).and_then(|user| user.username);
    assert_eq!(user.as_deref(), Some("system:serviceaccount:n:robot"));
    let labels = secrets.get("t").await.expect("the secret").metadata.labels.unwrap_or_default();
    assert!(labels.contains_key("kubernetes.io/legacy-token-last-used"), "{labels:?}");
    let invalid = json!({"metadata": {"labels": {"kubernetes.io/legacy-token-invalid-since": "2026-01-01"}}});
    cluster.patch(&secrets, "t", invalid).await;
    let review = cluster
        .create(&cluster.all::<TokenReview>(), json!({"metadata": {}, "spec": {"token": field("token").await}}))
        .await;
    assert_ne!(review.status.and_then(|status| status.authenticated), Some(true), "it is marked as invalid");
    accounts.delete("robot", &DeleteParams::default()).await.expect("deleted");
    assert_eventually_async!(
        20,
        secrets.get_opt("t").await.expect("asked").is_none(),
        "the secret goes with its account"
    );
}

fn owned(name: &str, owner: Option<&ConfigMap>) -> Value {
    let owners: Vec<_> = owner
        .iter()
        .map(|owner| json!({"apiVersion": "v1", "kind": "ConfigMap", "name": owner.name_any(), "uid": owner.uid(), "blockOwnerDeletion": true}))
        .collect();
    json!({"metadata": {"name": name, "ownerReferences": owners}})
}

#[tokio::test]
async fn a_circle_of_owners_does_not_hold_itself() {
    let cluster = Cluster::start().await;
    cluster.namespace("n").await;
    let maps: Api<ConfigMap> = cluster.ns("n");
    let a = cluster.create(&maps, owned("a", None)).await;
    let b = cluster.create(&maps, owned("b", Some(&a))).await;
    let c = cluster.create(&maps, owned("c", Some(&b))).await;
    cluster
        .patch(&maps, "a", json!({"metadata": {"ownerReferences": owned("", Some(&c))["metadata"]["ownerReferences"]}}))
        .await;
    maps.delete("a", &DeleteParams::foreground()).await.expect("deleted");
    let left = async || {
        maps.list(&ListParams::default()).await.expect("listed").iter().filter(|map| map.name_any().len() == 1).count()
    };
    assert_eventually_async!(30, left().await == 0, "all three go");
}

#[tokio::test]
async fn what_is_in_no_namespace_is_not_collected_for_an_owner_that_is_in_one() {
    let cluster = Cluster::start().await;
    cluster.namespace("n").await;
    let owner = cluster.create(&cluster.ns::<ConfigMap>("n"), json!({"metadata": {"name": "owner"}})).await;
    let roles: Api<ClusterRole> = cluster.all();
    let mut role = owned("kept", Some(&owner));
    role["rules"] = json!([]);
    cluster.create(&roles, role).await;
    cluster.ns::<ConfigMap>("n").delete("owner", &DeleteParams::default()).await.expect("deleted");
    // Something of which the owner may be gone, to know when the collector has looked.
    let maps: Api<ConfigMap> = cluster.ns("n");
    cluster.create(&maps, owned("goes", Some(&owner))).await;
    assert_eventually_async!(20, maps.get_opt("goes").await.expect("asked").is_none(), "it is collected");
    assert!(roles.get_opt("kept").await.expect("asked").is_some());
}

#[tokio::test]
async fn pods_go_before_the_rest_of_their_namespace() {
    let cluster = Cluster::start().await;
    cluster.namespace("n").await;
    let (pods, maps): (Api<Pod>, Api<ConfigMap>) = (cluster.ns("n"), cluster.ns("n"));
    let namespaces: Api<Namespace> = cluster.all();
    assert_eventually_async!(
        20,
        cluster.ns::<ServiceAccount>("n").get_opt("default").await.expect("asked").is_some(),
        "an account"
    );
    cluster
        .create(&pods, json!({"metadata": {"name": "p", "finalizers": ["example.com/hold"]}, "spec": {"containers": [{"name": "c", "image": "i"}]}}))
        .await;
    cluster.create(&maps, json!({"metadata": {"name": "m"}})).await;
    namespaces.delete("n", &DeleteParams::default()).await.expect("deleted");
    let remains = async || {
        let conditions =
            namespaces.get("n").await.expect("the namespace").status.and_then(|s| s.conditions).unwrap_or_default();
        conditions.iter().any(|c| c.type_ == "NamespaceFinalizersRemaining" && c.status == "True")
    };
    assert_eventually_async!(20, remains().await, "the finalizer is named");
    assert!(maps.get("m").await.expect("the map").metadata.deletion_timestamp.is_none(), "it waits for the pod");
    cluster.patch(&pods, "p", json!({"metadata": {"finalizers": null}})).await;
    assert_eventually_async!(20, namespaces.get_opt("n").await.expect("asked").is_none(), "all of it goes");
}

#[tokio::test]
async fn ranges_of_addresses_go_when_nothing_uses_them() {
    let cluster = Cluster::start().await;
    cluster.namespace("n").await;
    let ranges: Api<ServiceCIDR> = cluster.all();
    cluster.create(&ranges, json!({"metadata": {"name": "more"}, "spec": {"cidrs": ["10.99.0.0/24"]}})).await;
    let ready = async |status: &str| {
        let conditions =
            ranges.get("more").await.expect("the range").status.and_then(|s| s.conditions).unwrap_or_default();
        conditions.iter().any(|c| c.type_ == "Ready" && c.status == status)
    };
    assert_eventually_async!(20, ready("True").await, "it is ready");
    let services: Api<Service> = cluster.ns("n");
    cluster
        .create(
            &services,
            json!({"metadata": {"name": "s"}, "spec": {"clusterIP": "10.99.0.7", "ports": [{"port": 80}]}}),
        )
        .await;
    let addresses: Api<IPAddress> = cluster.all();
    assert_eventually_async!(
        20,
        addresses.get_opt("10.99.0.7").await.expect("asked").is_some(),
        "the address is taken"
    );
    ranges.delete("more", &DeleteParams::default()).await.expect("deleted");
    assert_eventually_async!(20, ready("False").await, "an address of it is in use");
    services.delete("s", &DeleteParams::default()).await.expect("deleted");
    assert_eventually_async!(20, ranges.get_opt("more").await.expect("asked").is_none(), "nothing uses it");
}

#[tokio::test]
async fn policies_tell_what_their_expressions_get_wrong() {
    let cluster = Cluster::start().await;
    let policies: Api<ValidatingAdmissionPolicy> = cluster.all();
    let policy = |name: &str, expression: &str| {
        json!({"metadata": {"name": name}, "spec": {
        "matchConstraints": {"resourceRules": [{"apiGroups": ["apps"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["deployments"]}]},
        "validations": [{"expression": expression}]}})
    };
    cluster.create(&policies, policy("good", "object.spec.replicas > 1")).await;
    cluster.create(&policies, policy("bad", "object.spec.nothing > 1")).await;
    let status =
        async |name: &str| serde_json::to_value(policies.get(name).await.expect("the policy").status).expect("JSON");
    assert_eventually_async!(20, status("good").await["typeChecking"].is_object(), "it is checked");
    assert!(status("good").await["typeChecking"]["expressionWarnings"].is_null());
    assert_eventually_async!(20, status("bad").await["typeChecking"].is_object(), "it is checked");
    let warning = status("bad").await["typeChecking"]["expressionWarnings"][0].clone();
    assert_eq!(warning["fieldRef"], "spec.validations[0].expression");
    assert!(warning["warning"].as_str().expect("text").starts_with("apps/v1, Kind=Deployment: "), "{warning}");
}

#[tokio::test]
async fn claims_of_devices_come_and_go_with_their_pod() {
    let cluster = Cluster::start().await;
    cluster.namespace("n").await;
    let pods: Api<Pod> = cluster.ns("n");
    let claims: Api<ResourceClaim> = cluster.ns("n");
    let request = json!({"devices": {"requests": [{"name": "r", "exactly": {"deviceClassName": "gpu.example.com"}}]}});
    cluster
        .create(
            &cluster.ns::<ResourceClaimTemplate>("n"),
            json!({"metadata": {"name": "t"}, "spec": {"spec": request}}),
        )
        .await;
    cluster.create(&claims, json!({"metadata": {"name": "shared"}, "spec": request})).await;
    cluster
        .create(&pods, json!({"metadata": {"name": "p"}, "spec": {"schedulerName": "none", "containers": [{"name": "c", "image": "i"}],
            "resourceClaims": [{"name": "own", "resourceClaimTemplateName": "t"}, {"name": "all", "resourceClaimName": "shared"}]}}))
        .await;
    let named = async || {
        let status =
            pods.get("p").await.expect("the pod").status.and_then(|s| s.resource_claim_statuses).unwrap_or_default();
        status.into_iter().find(|s| s.name == "own").and_then(|s| s.resource_claim_name).unwrap_or_default()
    };
    assert_eventually_async!(20, !named().await.is_empty(), "the claim is made and named");
    let own = named().await;
    let uid = pods.get("p").await.expect("the pod").uid();
    let device =
        json!({"devices": {"results": [{"request": "r", "driver": "d.example.com", "pool": "p", "device": "0"}]}});
    for name in [own.as_str(), "shared"] {
        cluster
            .patch_status(
                &claims,
                name,
                json!({"allocation": device, "reservedFor": [{"resource": "pods", "name": "p", "uid": uid}]}),
            )
            .await;
    }
    pods.delete("p", &DeleteParams::default().grace_period(0)).await.expect("deleted");
    let reserved =
        async || claims.get("shared").await.expect("the claim").status.and_then(|s| s.reserved_for).unwrap_or_default();
    assert_eventually_async!(20, reserved().await.is_empty(), "the shared claim is free again");
    assert_eventually_async!(20, claims.get_opt(&own).await.expect("asked").is_none(), "the pod's own claim goes");
}
