//! Certificate requests from the asking to the certificate, on a real server.

mod support;

use base64::Engine as _;
use coracle_testkit::assert_eventually_async;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use kube::Api;
use kube::api::PostParams;
use serde_json::{Value, json};
use support::{Cluster, made};

type Requests = Api<CertificateSigningRequest>;

fn request(name: &str, subject: &[(rcgen::DnType, &str)], addresses: &[&str], rest: Value) -> Value {
    let names: Vec<String> = addresses.iter().map(|address| (*address).to_owned()).collect();
    let mut params = rcgen::CertificateParams::new(names).expect("names");
    params.distinguished_name = rcgen::DistinguishedName::new();
    for (type_, value) in subject {
        params.distinguished_name.push(type_.clone(), *value);
    }
    let key = rcgen::KeyPair::generate().expect("a key");
    let pem = params.serialize_request(&key).expect("a request").pem().expect("PEM");
    let mut object = json!({"metadata": {"name": name}, "spec": {
        "request": base64::engine::general_purpose::STANDARD.encode(pem)}});
    for (field, value) in rest.as_object().expect("fields") {
        object["spec"][field] = value.clone();
    }
    object
}

fn node_subject(name: &'static str) -> [(rcgen::DnType, &'static str); 2] {
    [(rcgen::DnType::OrganizationName, "system:nodes"), (rcgen::DnType::CommonName, name)]
}

fn holds(request: &CertificateSigningRequest, type_: &str) -> bool {
    request.status.iter().flat_map(|s| s.conditions.iter().flatten()).any(|c| c.type_ == type_)
}

fn certificate(request: &CertificateSigningRequest) -> bool {
    request.status.as_ref().is_some_and(|status| status.certificate.is_some())
}

#[tokio::test]
async fn a_host_with_a_bootstrap_token_becomes_a_node() {
    let cluster = Cluster::start().await;
    let requests: Requests = cluster.all();
    let client = json!({"signerName": "kubernetes.io/kube-apiserver-client-kubelet",
        "usages": ["digital signature", "client auth"]});
    let joining: Requests =
        Api::all(cluster.client_of("system:bootstrap:abcdef", &["system:bootstrappers", "system:bootstrappers:x"]));
    let asked = made(request("join", &node_subject("system:node:a"), &[], client.clone()));
    joining.create(&PostParams::default(), &asked).await.expect("hosts may ask");
    assert_eventually_async!(30, certificate(&joining.get("join").await.expect("read")), "the host gets a certificate");

    // Somebody without the token may not have the certificate, even if they may ask.
    cluster
        .create(
            &requests,
            request(
                "admin",
                &node_subject("system:node:a"),
                &[],
                json!({
            "signerName": "kubernetes.io/kube-apiserver-client-kubelet", "usages": ["client auth"]}),
            ),
        )
        .await;

    // The node renews its own certificate, and serves with one for its own address.
    let node: Requests = Api::all(cluster.client_of("system:node:a", &["system:nodes"]));
    let asked = made(request("renew", &node_subject("system:node:a"), &[], client));
    node.create(&PostParams::default(), &asked).await.expect("nodes may ask");
    assert_eventually_async!(30, certificate(&node.get("renew").await.expect("read")), "the node renews");
    let nodes: Api<k8s_openapi::api::core::v1::Node> = cluster.all();
    cluster.create(&nodes, json!({"metadata": {"name": "a"}})).await;
    let addresses = json!({"addresses": [{"type": "InternalIP", "address": "192.0.2.9"}]});
    cluster.patch_status(&nodes, "a", addresses).await;
    let serving = json!({"signerName": "kubernetes.io/kubelet-serving",
        "usages": ["digital signature", "server auth"]});
    for (name, address) in [("own", "192.0.2.9"), ("others", "192.0.2.10")] {
        let asked = made(request(name, &node_subject("system:node:a"), &[address], serving.clone()));
        node.create(&PostParams::default(), &asked).await.expect("nodes may ask");
    }
    assert_eventually_async!(30, certificate(&node.get("own").await.expect("read")), "the node serves");
    assert!(!holds(&requests.get("others").await.expect("read"), "Approved"), "an address of another host");
    assert!(!holds(&requests.get("admin").await.expect("read"), "Approved"), "lacks the digital signature usage");
}

#[tokio::test]
async fn clients_are_signed_once_approved() {
    let cluster = Cluster::start().await;
    let requests: Requests = cluster.all();
    let subject = [(rcgen::DnType::CommonName, "jane")];
    let good = json!({"signerName": "kubernetes.io/kube-apiserver-client", "expirationSeconds": 3600,
        "usages": ["digital signature", "key encipherment", "client auth"]});
    let bad = json!({"signerName": "kubernetes.io/kube-apiserver-client", "usages": ["server auth"]});
    for (name, rest) in [("good", good), ("bad", bad)] {
        let mut object = cluster.create(&requests, request(name, &subject, &[], rest)).await;
        assert!(!certificate(&object), "nobody has approved it");
        object.status = made(json!({"conditions": [{"type": "Approved", "status": "True", "reason": "Test"}]}));
        let put =
            http::Request::put(format!("/apis/certificates.k8s.io/v1/certificatesigningrequests/{name}/approval"))
                .header("content-type", "application/json")
                .body(serde_json::to_vec(&object).expect("JSON"))
                .expect("a request");
        cluster.client.request::<Value>(put).await.expect("approved");
    }
    assert_eventually_async!(
        30,
        certificate(&requests.get("good").await.expect("read")),
        "an approved request is signed"
    );
    assert_eventually_async!(30, holds(&requests.get("bad").await.expect("read"), "Failed"), "usages are checked");
    let pem = requests.get("good").await.expect("read").status.and_then(|s| s.certificate).expect("a certificate").0;
    assert_eq!(String::from_utf8(pem).expect("PEM").matches("BEGIN CERTIFICATE").count(), 1);
}
