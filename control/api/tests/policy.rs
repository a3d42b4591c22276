//! Admission, authorisation and allocation on a real server, in process, on a store of its own.

use std::net::Ipv4Addr;
use std::sync::Arc;

use coracle_api::node::{NodeConnector, NodeStream};
use coracle_api::status::Status;
use coracle_api::user::UserInfo;
use coracle_api::{ApiServer, Config};
use coracle_store::{Embedded, EmbeddedOptions};
use coracle_testkit::assert_eventually_async;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

struct NoNodes;

#[async_trait::async_trait]
impl NodeConnector for NoNodes {
    async fn connect(&self, node: &str) -> Result<Box<dyn NodeStream>, Status> {
        Err(Status::unavailable(format!("there is no node {node} here")))
    }
}

struct Server {
    api: Arc<ApiServer>,
    stop: CancellationToken,
    _data: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Server {
    async fn start() -> Self {
        Self::start_with_services_in("10.43.0.0/24").await
    }

    async fn start_with_services_in(ranges: &str) -> Self {
        let data = tempfile::tempdir().expect("a folder");
        let store = Arc::new(Embedded::open(data.path().join("store"), EmbeddedOptions::default()).expect("a store"));
        let stop = CancellationToken::new();
        let config = Config {
            tls_dir: data.path().join("tls"),
            tls_sans: Vec::new(),
            service_cidr: ranges.into(),
            cluster_cidr: "10.42.0.0/16".into(),
            node_ports: (30000, 30010),
            cluster_domain: "cluster.local".into(),
            dns_ips: vec![Ipv4Addr::new(10, 43, 0, 10).into()],
            advertise: (Ipv4Addr::new(192, 0, 2, 1), 6443).into(),
            shared_store: false,
            nodes: Arc::new(NoNodes),
            authn: Default::default(),
            disabled_admission: Vec::new(),
        };
        let api = ApiServer::new(config, store, stop.clone()).await.expect("a server");
        let server = Self { api, stop, _data: data };
        server
            .ok(
                "POST",
                "/api/v1/namespaces",
                json!({"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": "n"}}),
            )
            .await;
        server
            .ok(
                "POST",
                "/api/v1/namespaces/n/serviceaccounts",
                json!({"kind": "ServiceAccount", "apiVersion": "v1", "metadata": {"name": "default"}}),
            )
            .await;
        server
    }

    async fn call(&self, user: UserInfo, method: &str, path: &str, body: Value) -> Result<Value, kube::core::Status> {
        let kind = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let body = if body.is_null() { Vec::new() } else { serde_json::to_vec(&body).expect("JSON") };
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", kind)
            .body(body)
            .expect("a request");
        match self.api.client(user).request::<Value>(request).await {
            Ok(v) => Ok(v),
            Err(kube::Error::Api(status)) => Err(*status),
            Err(other) => panic!("{method} {path}: {other}"),
        }
    }

    async fn admin(&self, method: &str, path: &str, body: Value) -> Result<Value, kube::core::Status> {
        self.call(UserInfo::new("admin", &["system:masters"]), method, path, body).await
    }

    async fn ok(&self, method: &str, path: &str, body: Value) -> Value {
        self.admin(method, path, body).await.unwrap_or_else(|s| panic!("{method} {path}: {}", s.message))
    }

    async fn refused(&self, method: &str, path: &str, body: Value) -> kube::core::Status {
        match self.admin(method, path, body).await {
            Ok(v) => panic!("{method} {path} was taken: {v}"),
            Err(s) => s,
        }
    }
}

const PODS: &str = "/api/v1/namespaces/n/pods";

fn pod(name: &str, spec: Value) -> Value {
    let mut spec = spec;
    if spec.get("containers").is_none() {
        spec["containers"] = json!([{"name": "c", "image": "x:1"}]);
    }
    json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": name}, "spec": spec})
}

fn object(version: &str, kind: &str, name: &str, rest: Value) -> Value {
    let mut o = json!({"apiVersion": version, "kind": kind, "metadata": {"name": name}});
    o.as_object_mut().expect("an object").extend(rest.as_object().cloned().unwrap_or_default());
    o
}

#[tokio::test]
async fn a_fresh_cluster_has_its_objects() {
    let s = Server::start().await;
    for ns in ["default", "kube-system", "kube-public", "kube-node-lease"] {
        assert_eq!(s.ok("GET", &format!("/api/v1/namespaces/{ns}"), Value::Null).await["status"]["phase"], "Active");
    }
    let service = s.ok("GET", "/api/v1/namespaces/default/services/kubernetes", Value::Null).await;
    assert_eq!(service["spec"]["clusterIP"], "10.43.0.1");
    let slice =
        s.ok("GET", "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/kubernetes", Value::Null).await;
    assert_eq!(slice["endpoints"][0]["addresses"], json!(["192.0.2.1"]));
    let roles = s.ok("GET", "/apis/rbac.authorization.k8s.io/v1/clusterroles", Value::Null).await;
    // Those of a real server, the reader of usage, and those that this product's own controllers need besides.
    let roles = roles["items"].as_array().expect("a list");
    let own =
        roles.iter().filter(|role| role["metadata"]["name"].as_str().is_some_and(|name| name.starts_with("coracle:")));
    assert_eq!((roles.len(), own.count()), (76, 4));
    assert_eq!(
        s.refused("DELETE", "/api/v1/namespaces/default", Value::Null).await.message,
        "namespaces \"default\" is forbidden: this namespace may not be deleted"
    );
    assert_eq!(
        s.refused("POST", "/api/v1/namespaces/none/pods", pod("p", json!({}))).await.message,
        "namespaces \"none\" not found"
    );
}

#[tokio::test]
async fn pods_get_token_priority_and_class() {
    let s = Server::start().await;
    let p = s.ok("POST", PODS, pod("p", json!({}))).await;
    let volume = &p["spec"]["volumes"][0];
    assert!(volume["name"].as_str().is_some_and(|n| n.starts_with("kube-api-access-") && n.len() == 21), "{volume}");
    assert_eq!(p["spec"]["containers"][0]["volumeMounts"][0]["name"], volume["name"]);
    assert_eq!((&p["spec"]["priority"], &p["status"]["qosClass"]), (&json!(0), &json!("BestEffort")));
    let p = s
        .ok(
            "POST",
            PODS,
            pod("q", json!({"automountServiceAccountToken": false, "priorityClassName": "system-cluster-critical"})),
        )
        .await;
    assert_eq!((p["spec"].get("volumes"), &p["spec"]["priority"]), (None, &json!(2_000_000_000)));
    for (spec, message) in [
        (
            json!({"serviceAccountName": "x"}),
            "pods \"bad\" is forbidden: error looking up service account n/x: serviceaccount \"x\" not found",
        ),
        (json!({"priorityClassName": "x"}), "pods \"bad\" is forbidden: no PriorityClass with name x was found"),
        (json!({"runtimeClassName": "x"}), "pods \"bad\" is forbidden: pod rejected: RuntimeClass \"x\" not found"),
    ] {
        assert_eq!(s.refused("POST", PODS, pod("bad", spec)).await.message, message);
    }
    // Images may change, names of containers may not.
    let path = format!("{PODS}/p");
    let mut changed = s.ok("GET", &path, Value::Null).await;
    changed["spec"]["containers"][0]["image"] = "y:2".into();
    let now = s.ok("PUT", &path, changed.clone()).await;
    assert_eq!(now["metadata"]["generation"], 2);
    let mut bad = now.clone();
    bad["spec"]["nodeSelector"] = json!({"a": "b"});
    assert!(
        s.refused("PUT", &path, bad)
            .await
            .message
            .starts_with("Pod \"p\" is invalid: spec: Forbidden: pod updates may not change fields other than")
    );
}

#[tokio::test]
async fn services_get_addresses_and_ports_of_their_own() {
    let s = Server::start().await;
    let path = "/api/v1/namespaces/n/services";
    let service = |name: &str, spec: Value| object("v1", "Service", name, json!({"spec": spec}));
    let ports = json!([{"port": 80}]);
    let mut seen = std::collections::BTreeSet::new();
    let made = futures::future::join_all(
        (0..8).map(|i| s.ok("POST", path, service(&format!("s{i}"), json!({"type": "NodePort", "ports": ports})))),
    )
    .await;
    let mut nodes = std::collections::BTreeSet::new();
    for m in &made {
        seen.insert(m["spec"]["clusterIP"].as_str().expect("an address").to_owned());
        nodes.insert(m["spec"]["ports"][0]["nodePort"].as_i64().expect("a port"));
    }
    assert_eq!((seen.len(), nodes.len()), (8, 8));
    let ip = made[0]["spec"]["clusterIP"].as_str().expect("an address").to_owned();
    let published = s.ok("GET", &format!("/apis/networking.k8s.io/v1/ipaddresses/{ip}"), Value::Null).await;
    assert_eq!(published["spec"]["parentRef"]["name"], "s0");
    let taken = s.refused("POST", path, service("t", json!({"clusterIP": ip, "ports": ports}))).await;
    assert_eq!(
        taken.message,
        format!(
            "Service \"t\" is invalid: spec.clusterIPs: Invalid value: [\"{ip}\"]: failed to allocate IP {ip}: provided IP is already allocated"
        )
    );
    // Kept over an update that leaves it out, immutable otherwise, free again after deletion.
    let mut changed = made[0].clone();
    changed["spec"]["ports"] = json!([{"port": 81}]);
    for f in ["clusterIP", "clusterIPs"] {
        changed["spec"].as_object_mut().expect("spec").remove(f);
    }
    assert_eq!(s.ok("PUT", &format!("{path}/s0"), changed.clone()).await["spec"]["clusterIP"], ip.as_str());
    changed["metadata"].as_object_mut().expect("metadata").remove("resourceVersion");
    changed["spec"]["clusterIP"] = "10.43.0.200".into();
    let refused = s.refused("PUT", &format!("{path}/s0"), changed).await;
    assert!(
        refused.message.contains("spec.clusterIPs[0]: Invalid value: [\"10.43.0.200\"]: may not change once set"),
        "{}",
        refused.message
    );
    s.ok("DELETE", &format!("{path}/s0"), Value::Null).await;
    s.refused("GET", &format!("/apis/networking.k8s.io/v1/ipaddresses/{ip}"), Value::Null).await;
    s.ok("POST", path, service("t", json!({"clusterIP": ip, "ports": ports}))).await;
    // A node port that is asked for is given once, also for two protocols, and free again when its service goes or needs it no more.
    let free = (30_000..=30_010).find(|port| !nodes.contains(port)).expect("eight of eleven are taken");
    let node = |name: &str, spec: &str| {
        let ports = json!([{"name": "a", "port": 53, "nodePort": free}, {"name": "b", "port": 53, "nodePort": free, "protocol": "UDP"}]);
        service(name, json!({"type": spec, "ports": ports}))
    };
    s.ok("POST", path, node("dns", "NodePort")).await;
    let again = s.refused("POST", path, node("dns2", "LoadBalancer")).await;
    assert_eq!(
        again.message,
        format!(
            "Service \"dns2\" is invalid: spec.ports[0].nodePort: Invalid value: {free}: provided port is already allocated"
        )
    );
    s.refused("POST", &format!("{path}?dryRun=All"), node("dns2", "NodePort")).await;
    let mut inside = s.ok("GET", &format!("{path}/dns"), Value::Null).await;
    inside["spec"]["type"] = "ClusterIP".into();
    let inside = s.ok("PUT", &format!("{path}/dns"), inside).await;
    assert!(inside["spec"]["ports"][0].get("nodePort").is_none(), "{inside}");
    s.ok("POST", &format!("{path}?dryRun=All"), node("dns2", "NodePort")).await;
    s.ok("POST", path, node("dns2", "NodePort")).await;
    s.ok("DELETE", &format!("{path}/dns2"), Value::Null).await;
    s.ok("POST", path, node("dns3", "NodePort")).await;
    // To a name and back.
    let mut external = s.ok("GET", &format!("{path}/s1"), Value::Null).await;
    external["spec"]["type"] = "ExternalName".into();
    external["spec"]["externalName"] = "example.com".into();
    let external = s.ok("PUT", &format!("{path}/s1"), external).await;
    assert!(
        external["spec"].get("clusterIP").is_none() && external["spec"]["ports"][0].get("nodePort").is_none(),
        "{external}"
    );
    let had = made[1]["spec"]["clusterIP"].as_str().expect("an address");
    s.refused("GET", &format!("/apis/networking.k8s.io/v1/ipaddresses/{had}"), Value::Null).await;
}

#[tokio::test]
async fn services_have_the_families_that_they_ask_for() {
    let s = Server::start_with_services_in("10.43.0.0/24,fd00:43::/120").await;
    let path = "/api/v1/namespaces/n/services";
    let service = |name: &str, policy: &str, spec: Value| {
        let mut spec = spec;
        spec["ports"] = json!([{"port": 80}]);
        spec["ipFamilyPolicy"] = policy.into();
        object("v1", "Service", name, json!({"spec": spec}))
    };
    let ips = |service: &Value| -> Vec<String> {
        let ips = service["spec"]["clusterIPs"].as_array().expect("addresses");
        ips.iter().map(|ip| ip.as_str().expect("an address").to_owned()).collect()
    };
    let both = s.ok("POST", path, service("both", "RequireDualStack", json!({}))).await;
    assert_eq!(both["spec"]["ipFamilies"], json!(["IPv4", "IPv6"]));
    let given = ips(&both);
    assert!(given[0].starts_with("10.43.0.") && given[1].starts_with("fd00:43::"), "{given:?}");
    for ip in &given {
        let object = s.ok("GET", &format!("/apis/networking.k8s.io/v1/ipaddresses/{ip}"), Value::Null).await;
        assert_eq!(object["spec"]["parentRef"]["name"], "both");
    }
    let six = s.ok("POST", path, service("six", "SingleStack", json!({"ipFamilies": ["IPv6"]}))).await;
    assert!(six["spec"]["clusterIP"].as_str().is_some_and(|ip| ip.starts_with("fd00:43::")), "{six}");
    // A second family is added and given back.
    let one = s.ok("POST", path, service("one", "SingleStack", json!({}))).await;
    let policy = |policy: &str| json!({"spec": {"ipFamilyPolicy": policy}});
    let two = s.ok("PATCH", &format!("{path}/one"), policy("PreferDualStack")).await;
    assert_eq!((ips(&two).len(), &ips(&two)[..1]), (2, &ips(&one)[..]));
    let back = s.ok("PATCH", &format!("{path}/one"), policy("SingleStack")).await;
    assert_eq!((ips(&back), &back["spec"]["ipFamilies"]), (ips(&one), &json!(["IPv4"])));
    s.refused("GET", &format!("/apis/networking.k8s.io/v1/ipaddresses/{}", ips(&two)[1]), Value::Null).await;
    // What cannot be had is refused, and nothing of it is kept.
    let asked = json!({"clusterIPs": ["10.43.0.77", given[1]]});
    let refused = s.refused("POST", path, service("taken", "RequireDualStack", asked)).await;
    assert!(refused.message.contains("provided IP is already allocated"), "{}", refused.message);
    s.refused("GET", "/apis/networking.k8s.io/v1/ipaddresses/10.43.0.77", Value::Null).await;
    let asked = json!({"clusterIPs": ["10.43.0.77", "10.43.0.78"]});
    let refused = s.refused("POST", path, service("same", "RequireDualStack", asked)).await;
    assert!(refused.message.contains("no more than one IP for each IP family"), "{}", refused.message);
}

#[tokio::test]
async fn rbac_decides_and_nobody_grants_more_than_they_hold() {
    let s = Server::start().await;
    let bob = || UserInfo::new("bob", &[]);
    let refused = s.call(bob(), "GET", PODS, Value::Null).await.expect_err("nobody knows bob");
    assert_eq!(
        refused.message,
        "pods is forbidden: User \"bob\" cannot list resource \"pods\" in API group \"\" in the namespace \"n\""
    );
    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    let v = "rbac.authorization.k8s.io/v1";
    s.ok(
        "POST",
        &format!("{rbac}/namespaces/n/roles"),
        object(
            v,
            "Role",
            "r",
            json!({"rules": [
        {"verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods"]},
        {"verbs": ["create"], "apiGroups": ["rbac.authorization.k8s.io"], "resources": ["roles", "rolebindings"]}]}),
        ),
    )
    .await;
    s.ok(
        "POST",
        &format!("{rbac}/namespaces/n/rolebindings"),
        object(
            v,
            "RoleBinding",
            "rb",
            json!({
        "roleRef": {"kind": "Role", "name": "r"}, "subjects": [{"kind": "User", "name": "bob"}]}),
        ),
    )
    .await;
    assert_eventually_async!(10, s.call(bob(), "GET", PODS, Value::Null).await.is_ok(), "bob may list pods");
    let role = |verb: &str| {
        object(v, "Role", "mine", json!({"rules": [{"verbs": [verb], "apiGroups": [""], "resources": ["pods"]}]}))
    };
    let refused =
        s.call(bob(), "POST", &format!("{rbac}/namespaces/n/roles"), role("delete")).await.expect_err("more than held");
    assert_eq!(
        refused.message,
        "roles.rbac.authorization.k8s.io \"mine\" is forbidden: user \"bob\" (groups=[\"system:authenticated\"]) is attempting to grant RBAC permissions not currently held:\n{APIGroups:[\"\"], Resources:[\"pods\"], Verbs:[\"delete\"]}"
    );
    s.call(bob(), "POST", &format!("{rbac}/namespaces/n/roles"), role("get"))
        .await
        .expect("what is held may be granted");
    let review = s
        .ok(
            "POST",
            "/apis/authorization.k8s.io/v1/subjectaccessreviews",
            object(
                "authorization.k8s.io/v1",
                "SubjectAccessReview",
                "",
                json!({
        "spec": {"user": "bob", "resourceAttributes": {"verb": "list", "resource": "pods", "namespace": "n"}}}),
            ),
        )
        .await;
    assert_eq!(review["status"]["allowed"], true, "{review}");
}

#[tokio::test]
async fn quota_is_never_overrun() {
    let s = Server::start().await;
    let path = "/api/v1/namespaces/n/resourcequotas";
    s.ok("POST", path, object("v1", "ResourceQuota", "q", json!({"spec": {"hard": {"configmaps": "5"}}}))).await;
    let maps = "/api/v1/namespaces/n/configmaps";
    let map = |i: usize| object("v1", "ConfigMap", &format!("m{i}"), json!({}));
    assert_eq!(
        s.refused("POST", maps, map(0)).await.message,
        "configmaps \"m0\" is forbidden: status unknown for quota: q, resources: configmaps"
    );
    s.ok(
        "PATCH",
        &format!("{path}/q/status"),
        json!({"status": {"hard": {"configmaps": "5"}, "used": {"configmaps": "0"}}}),
    )
    .await;
    let all = futures::future::join_all((0..20).map(|i| s.admin("POST", maps, map(i)))).await;
    assert_eq!(all.iter().filter(|r| r.is_ok()).count(), 5);
    let refused = all.into_iter().find_map(Result::err).expect("fifteen were refused");
    assert!(
        refused.message.ends_with(
            "is forbidden: exceeded quota: q, requested: configmaps=1, used: configmaps=5, limited: configmaps=5"
        ),
        "{}",
        refused.message
    );
}

#[tokio::test]
async fn policies_in_cel_deny_and_mutate() {
    let s = Server::start().await;
    let group = "/apis/admissionregistration.k8s.io/v1";
    let v = "admissionregistration.k8s.io/v1";
    let rules = json!({"resourceRules": [{"operations": ["CREATE"], "apiGroups": ["apps"], "apiVersions": ["v1"], "resources": ["deployments"]}]});
    s.ok("POST", &format!("{group}/validatingadmissionpolicies"), object(v, "ValidatingAdmissionPolicy", "few", json!({"spec": {
        "matchConstraints": rules, "variables": [{"name": "n", "expression": "object.spec.replicas"}],
        "validations": [{"expression": "variables.n <= 3", "messageExpression": "'too many: ' + string(variables.n)"}]}}))).await;
    s.ok(
        "POST",
        &format!("{group}/validatingadmissionpolicybindings"),
        object(
            v,
            "ValidatingAdmissionPolicyBinding",
            "few",
            json!({"spec": {
        "policyName": "few", "validationActions": ["Deny"]}}),
        ),
    )
    .await;
    s.ok("POST", &format!("{group}/mutatingadmissionpolicies"), object(v, "MutatingAdmissionPolicy", "mark", json!({"spec": {
        "matchConstraints": rules, "reinvocationPolicy": "Never", "failurePolicy": "Fail", "mutations": [
            {"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": "Object{metadata: Object.metadata{labels: {'marked': 'yes'}}}"}},
            {"patchType": "JSONPatch", "jsonPatch": {"expression": "[JSONPatch{op: 'add', path: '/spec/paused', value: true}]"}}]}}))).await;
    s.ok(
        "POST",
        &format!("{group}/mutatingadmissionpolicybindings"),
        object(v, "MutatingAdmissionPolicyBinding", "mark", json!({"spec": {"policyName": "mark"}})),
    )
    .await;
    let deployment = |name: &str, n: i64| {
        object(
            "apps/v1",
            "Deployment",
            name,
            json!({"spec": {"replicas": n, "selector": {"matchLabels": {"a": "b"}},
        "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "x"}]}}}}),
        )
    };
    let path = "/apis/apps/v1/namespaces/n/deployments";
    let refused = s.refused("POST", path, deployment("big", 4)).await;
    assert_eq!(
        (refused.code, refused.reason.as_str(), refused.message.as_str()),
        (
            422,
            "Invalid",
            "deployments.apps \"big\" is forbidden: ValidatingAdmissionPolicy 'few' with binding 'few' denied request: too many: 4"
        )
    );
    let made = s.ok("POST", path, deployment("small", 2)).await;
    assert_eq!((&made["metadata"]["labels"]["marked"], &made["spec"]["paused"]), (&json!("yes"), &json!(true)));
    assert_eq!(made["spec"]["strategy"]["type"], "RollingUpdate");
}

#[tokio::test]
async fn limits_fill_in_and_bound() {
    let s = Server::start().await;
    s.ok(
        "POST",
        "/api/v1/namespaces/n/limitranges",
        object(
            "v1",
            "LimitRange",
            "l",
            json!({"spec": {"limits": [
        {"type": "Container", "default": {"cpu": "200m"}, "max": {"cpu": "500m"}, "min": {"cpu": "50m"}}]}}),
        ),
    )
    .await;
    let p = s.ok("POST", PODS, pod("p", json!({}))).await;
    assert_eq!(
        p["spec"]["containers"][0]["resources"],
        json!({"limits": {"cpu": "200m"}, "requests": {"cpu": "200m"}})
    );
    let big = pod("big", json!({"containers": [{"name": "c", "image": "x", "resources": {"limits": {"cpu": "1"}}}]}));
    assert_eq!(
        s.refused("POST", PODS, big).await.message,
        "pods \"big\" is forbidden: maximum cpu usage per Container is 500m, but limit is 1"
    );
}

#[tokio::test]
async fn pod_security_enforces_what_the_namespace_asks() {
    let s = Server::start().await;
    s.ok(
        "PATCH",
        "/api/v1/namespaces/n",
        json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "baseline"}}}),
    )
    .await;
    s.ok("POST", PODS, pod("fine", json!({}))).await;
    assert_eq!(
        s.refused("POST", PODS, pod("host", json!({"hostNetwork": true}))).await.message,
        "pods \"host\" is forbidden: violates PodSecurity \"baseline:latest\": host namespaces (hostNetwork=true)"
    );
}

/// A webhook on loopback with a certificate of its own; `answer` makes the response's members out of the request.
async fn webhook(answer: fn(&Value) -> Value) -> (String, String) {
    use base64::Engine as _;
    use http_body_util::{BodyExt as _, Full};
    let signed = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).expect("a certificate");
    let ca = base64::engine::general_purpose::STANDARD.encode(signed.cert.pem());
    let key = rustls_pki_types::PrivateKeyDer::try_from(signed.signing_key.serialize_der()).expect("a key");
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![signed.cert.der().clone()], key)
        .expect("a configuration");
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    let url = format!("https://{}/hook", listener.local_addr().expect("an address"));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let service = hyper::service::service_fn(
                    move |request: http::Request<hyper::body::Incoming>| async move {
                        let body = request.into_body().collect().await?.to_bytes();
                        let review: Value = serde_json::from_slice(&body).expect("a review");
                        let mut response = answer(&review["request"]);
                        response["uid"] = review["request"]["uid"].clone();
                        let review = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response});
                        Ok::<_, hyper::Error>(http::Response::new(Full::new(bytes::Bytes::from(review.to_string()))))
                    },
                );
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(hyper_util::rt::TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    (url, ca)
}

fn hook(url: &str, ca: &str, resource: &str, more: Value) -> Value {
    let mut h = json!({"name": "a.hook.example.com", "clientConfig": {"url": url, "caBundle": ca}, "sideEffects": "None",
        "admissionReviewVersions": ["v1"], "timeoutSeconds": 2,
        "rules": [{"operations": ["CREATE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": [resource]}]});
    h.as_object_mut().expect("an object").extend(more.as_object().cloned().unwrap_or_default());
    json!({"webhooks": [h]})
}

#[tokio::test]
async fn webhooks_mutate_deny_and_fail_as_configured() {
    let s = Server::start().await;
    let group = "/apis/admissionregistration.k8s.io/v1";
    let v = "admissionregistration.k8s.io/v1";
    let maps = "/api/v1/namespaces/n/configmaps";
    let (url, ca) = webhook(|r| {
        use base64::Engine as _;
        assert_eq!((&r["operation"], &r["resource"]["resource"]), (&json!("CREATE"), &json!("configmaps")));
        let patch = json!([{"op": "add", "path": "/data", "value": {"added": "yes"}}]).to_string();
        json!({"allowed": true, "patchType": "JSONPatch", "patch": base64::engine::general_purpose::STANDARD.encode(patch), "warnings": ["seen"]})
    })
    .await;
    s.ok(
        "POST",
        &format!("{group}/mutatingwebhookconfigurations"),
        object(v, "MutatingWebhookConfiguration", "m", hook(&url, &ca, "configmaps", json!({}))),
    )
    .await;
    let made = s.ok("POST", maps, object("v1", "ConfigMap", "a", json!({}))).await;
    assert_eq!(made["data"], json!({"added": "yes"}));
    let (url, ca) = webhook(|r| json!({"allowed": r["name"] != "bad", "status": {"message": "not this one", "code": 403, "reason": "Forbidden"}})).await;
    let skip = json!({"matchConditions": [{"name": "skip", "expression": "object.metadata.name != 'skipped-bad'"}]});
    s.ok(
        "POST",
        &format!("{group}/validatingwebhookconfigurations"),
        object(v, "ValidatingWebhookConfiguration", "v", hook(&url, &ca, "configmaps", skip)),
    )
    .await;
    let refused = s.refused("POST", maps, object("v1", "ConfigMap", "bad", json!({}))).await;
    assert_eq!(
        (refused.code, refused.message.as_str()),
        (403, "admission webhook \"a.hook.example.com\" denied the request: not this one")
    );
    s.ok("POST", maps, object("v1", "ConfigMap", "skipped-bad", json!({}))).await;
    // Nobody listens: the failure policy decides.
    let gone = |policy: &str| hook("https://127.0.0.1:1/x", &ca, "secrets", json!({"failurePolicy": policy}));
    let secret = |name: &str| object("v1", "Secret", name, json!({}));
    let path = format!("{group}/validatingwebhookconfigurations");
    s.ok("POST", &path, object(v, "ValidatingWebhookConfiguration", "gone", gone("Fail"))).await;
    let refused = s.refused("POST", "/api/v1/namespaces/n/secrets", secret("x")).await;
    assert_eq!(
        (refused.code, refused.message.as_str()),
        (
            500,
            "Internal error occurred: failed calling webhook \"a.hook.example.com\": failed to call webhook: Post \"https://127.0.0.1:1/x?timeout=2s\": dial tcp 127.0.0.1:1: connect: connection refused"
        )
    );
    s.ok("DELETE", &format!("{path}/gone"), Value::Null).await;
    s.ok("POST", &path, object(v, "ValidatingWebhookConfiguration", "gone", gone("Ignore"))).await;
    s.ok("POST", "/api/v1/namespaces/n/secrets", secret("x")).await;
}

#[tokio::test]
async fn status_updates_change_status_and_annotations_only() {
    let s = Server::start().await;
    let path = "/apis/apps/v1/namespaces/n/deployments";
    let made = object(
        "apps/v1",
        "Deployment",
        "d",
        json!({"spec": {"selector": {"matchLabels": {"a": "b"}},
        "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "x"}]}}}}),
    );
    s.ok("POST", path, made).await;
    let patch = json!({"metadata": {"annotations": {"seen": "yes"}}, "spec": {"replicas": 9}, "status": {"replicas": 1, "observedGeneration": 1}});
    let now = s.ok("PATCH", &format!("{path}/d/status"), patch).await;
    assert_eq!(
        (
            &now["spec"]["replicas"],
            &now["status"]["replicas"],
            &now["metadata"]["annotations"]["seen"],
            &now["metadata"]["generation"]
        ),
        (&json!(1), &json!(1), &json!("yes"), &json!(1))
    );
    let pods = s.ok("POST", PODS, pod("p", json!({}))).await;
    let status = json!({"status": {"phase": "Running", "qosClass": "Guaranteed"}});
    let now = s.ok("PATCH", &format!("{PODS}/p/status"), status).await;
    assert_eq!((&now["status"]["phase"], &now["status"]["qosClass"]), (&json!("Running"), &json!("BestEffort")));
    assert_eq!(now["spec"], pods["spec"]);
}

#[tokio::test]
async fn definitions_with_bad_schemas_are_refused() {
    let s = Server::start().await;
    let path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    let crd = |schema: Value| {
        object(
            "apiextensions.k8s.io/v1",
            "CustomResourceDefinition",
            "foos.example.com",
            json!({"spec": {
        "group": "example.com", "scope": "Namespaced", "names": {"plural": "foos", "kind": "Foo"},
        "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": schema}}]}}),
        )
    };
    let refused = s.refused("POST", path, crd(json!({"properties": {"spec": {"type": "object"}}}))).await;
    assert!(refused.message.contains("must not be empty at the root"), "{}", refused.message);
    s.ok("POST", path, crd(json!({"type": "object", "properties": {"spec": {"type": "object"}}}))).await;
}

#[tokio::test]
async fn definitions_change_under_their_objects() {
    let s = Server::start().await;
    let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    let text = json!({"type": "string"});
    let spec = json!({"spec": {"group": "example.com", "scope": "Cluster", "names": {"plural": "boats", "kind": "Boat"},
        "versions": [{"name": "v1", "served": true, "storage": true,
            "schema": {"openAPIV3Schema": {"type": "object", "properties": {"sail": text}}}}]}});
    s.ok("POST", definitions, object("apiextensions.k8s.io/v1", "CustomResourceDefinition", "boats.example.com", spec))
        .await;
    // Finalizers of custom resources need no domain.
    let mut boat = object("example.com/v1", "Boat", "a", json!({}));
    boat["metadata"]["finalizers"] = json!(["dry"]);
    s.ok("POST", "/apis/example.com/v1/boats", boat).await;
    let versions = json!([{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema":
        {"type": "object", "properties": {"sail": {"type": "string", "default": "white"}}}}}]);
    s.ok("PATCH", &format!("{definitions}/boats.example.com"), json!({"spec": {"versions": versions}})).await;
    let read = s.ok("GET", "/apis/example.com/v1/boats/a", Value::Null).await;
    assert_eq!(read["sail"], "white", "a default counts for what was stored before it");
    let listed = s.ok("GET", "/apis/example.com/v1/boats", Value::Null).await;
    assert_eq!(listed["items"][0]["sail"], "white");
    let review = object(
        "authorization.k8s.io/v1",
        "SelfSubjectAccessReview",
        "",
        json!({"spec": {"nonResourceAttributes": {"path": "/", "verb": "get"}}}),
    );
    let request = http::Request::post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews")
        .header("content-type", "application/json")
        .header("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")
        .body(review.to_string().into_bytes())
        .expect("a request");
    match s.api.client(UserInfo::apiserver()).request::<Value>(request).await {
        Err(kube::Error::Api(status)) => assert_eq!(status.code, 406, "a review is no row of a table"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_was_stored_in_another_version_is_read_in_the_one_that_was_asked_for() {
    let s = Server::start().await;
    let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    let version = |name: &str, storage: bool| json!({"name": name, "served": true, "storage": storage, "schema": {"openAPIV3Schema": {"type": "object"}}});
    let spec = json!({"spec": {"group": "example.com", "scope": "Cluster", "names": {"plural": "boats", "kind": "Boat"},
        "versions": [version("v1", true), version("v2", false)]}});
    s.ok("POST", definitions, object("apiextensions.k8s.io/v1", "CustomResourceDefinition", "boats.example.com", spec))
        .await;
    s.ok("POST", "/apis/example.com/v1/boats", object("example.com/v1", "Boat", "old", json!({}))).await;
    let versions = json!({"spec": {"versions": [version("v1", false), version("v2", true)]}});
    let definition = s.ok("PATCH", &format!("{definitions}/boats.example.com"), versions).await;
    assert_eq!(definition["status"]["storedVersions"], json!(["v1", "v2"]));
    s.ok("POST", "/apis/example.com/v1/boats", object("example.com/v1", "Boat", "recent", json!({}))).await;
    for version in ["v1", "v2"] {
        let (all, wanted) = (format!("/apis/example.com/{version}/boats"), format!("example.com/{version}"));
        let one = s.ok("GET", &format!("{all}/old"), Value::Null).await;
        assert_eq!(one["apiVersion"], wanted);
        let list = s.ok("GET", &all, Value::Null).await;
        let seen: Vec<_> = list["items"].as_array().into_iter().flatten().map(|boat| &boat["apiVersion"]).collect();
        assert_eq!(seen, [&wanted, &wanted]);
    }
}

#[tokio::test]
async fn admission_sees_the_version_it_names_and_what_it_adds_is_pruned() {
    let s = Server::start().await;
    let text = json!({"type": "string"});
    let spec = json!({"type": "object", "properties": {"a": text, "b": text, "seen": text}});
    let version = |name: &str, storage: bool| {
        json!({"name": name, "served": true, "storage": storage,
            "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": spec}}}})
    };
    let definition = json!({"spec": {"group": "example.com", "scope": "Cluster", "names": {"plural": "boats", "kind": "Boat"},
        "versions": [version("v1", true), version("v2", false)]}});
    let definition = object("apiextensions.k8s.io/v1", "CustomResourceDefinition", "boats.example.com", definition);
    s.ok("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition).await;
    let (url, ca) = webhook(|r| {
        use base64::Engine as _;
        let seen = format!("{} {}", r["kind"]["version"], r["requestKind"]["version"]).replace('"', "");
        let ok = r["object"]["apiVersion"] == "example.com/v1" && r["resource"]["version"] == "v1";
        let patch = json!([{"op": "add", "path": "/spec/seen", "value": seen}, {"op": "add", "path": "/spec/alien", "value": "x"}]);
        json!({"allowed": ok, "patchType": "JSONPatch",
            "patch": base64::engine::general_purpose::STANDARD.encode(patch.to_string())})
    })
    .await;
    let group = "/apis/admissionregistration.k8s.io/v1";
    let v = "admissionregistration.k8s.io/v1";
    let rules = json!([{"operations": ["CREATE"], "apiGroups": ["example.com"], "apiVersions": ["v1"], "resources": ["boats"]}]);
    let hooks = format!("{group}/mutatingwebhookconfigurations");
    s.ok(
        "POST",
        &hooks,
        object(v, "MutatingWebhookConfiguration", "m", hook(&url, &ca, "boats", json!({"rules": rules}))),
    )
    .await;
    let policy = json!({"spec": {"matchConstraints": {"resourceRules": rules},
        "validations": [{"expression": "object.apiVersion == 'example.com/v1' && object.spec.a != 'bad'", "message": "bad"}]}});
    s.ok("POST", &format!("{group}/validatingadmissionpolicies"), object(v, "ValidatingAdmissionPolicy", "p", policy))
        .await;
    let binding = json!({"spec": {"policyName": "p", "validationActions": ["Deny"]}});
    let binding = object(v, "ValidatingAdmissionPolicyBinding", "p", binding);
    s.ok("POST", &format!("{group}/validatingadmissionpolicybindings"), binding).await;
    let boat = |name: &str, a: &str| object("example.com/v2", "Boat", name, json!({"spec": {"a": a}}));
    let made = s.ok("POST", "/apis/example.com/v2/boats", boat("one", "good")).await;
    assert_eq!(
        (&made["apiVersion"], &made["spec"]),
        (&json!("example.com/v2"), &json!({"a": "good", "seen": "v1 v2"}))
    );
    let refused = s.refused("POST", "/apis/example.com/v2/boats", boat("two", "bad")).await;
    assert!(refused.message.ends_with("denied request: bad"), "{}", refused.message);
    // Who wants exactly its version is not asked about another.
    let exact = json!({"rules": rules, "matchPolicy": "Exact"});
    let exact = object(v, "MutatingWebhookConfiguration", "m", hook(&url, &ca, "boats", exact));
    s.ok("PUT", &format!("{hooks}/m"), exact).await;
    let made = s.ok("POST", "/apis/example.com/v2/boats", boat("three", "good")).await;
    assert_eq!(made["spec"], json!({"a": "good"}));
}
