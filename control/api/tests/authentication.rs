//! Who is who: static, bootstrap and issuers' tokens, impersonation, anonymous requests, over TLS.

mod common;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use common::Server;
use coracle_api::authn::Settings;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use serde_json::{Value, json};

/// What a request with these headers is answered, with its code.
async fn ask(server: &Server, method: &str, path: &str, headers: &[(&str, &str)], body: &Value) -> (u16, Value) {
    let client = server.client_with(|config| config.auth_info = Default::default()).await;
    send(&client, method, path, headers, body).await
}

async fn send(client: &kube::Client, method: &str, path: &str, headers: &[(&str, &str)], body: &Value) -> (u16, Value) {
    let mut request = http::Request::builder().method(method).uri(path).header("content-type", "application/json");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
    let answer = client.send(request.body(body.into()).expect("a request")).await.expect("an answer");
    let code = answer.status().as_u16();
    let bytes = http_body_util::BodyExt::collect(answer.into_body()).await.expect("a body").to_bytes();
    (code, serde_json::from_slice(&bytes).unwrap_or_default())
}

const WHOAMI: &str = "/apis/authentication.k8s.io/v1/selfsubjectreviews";

async fn whoami(server: &Server, headers: &[(&str, &str)]) -> (u16, Value) {
    let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"});
    let (code, answer) = ask(server, "POST", WHOAMI, headers, &review).await;
    (code, answer["status"]["userInfo"].clone())
}

#[tokio::test]
async fn tokens_of_the_file_and_of_bootstrap_secrets_hold() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tokens");
    std::fs::write(&file, "s3cret,jane,7,\"dev,ops\"\n").expect("written");
    let settings = Settings::read(Some(&file), None).expect("well formed");
    let server = Server::start_with(|config| config.authn = settings).await;
    let (code, user) = whoami(&server, &[("authorization", "Bearer s3cret")]).await;
    assert_eq!((code, &user["username"], &user["uid"]), (201, &json!("jane"), &json!("7")));
    assert_eq!(user["groups"], json!(["dev", "ops", "system:authenticated"]));
    assert_eq!(whoami(&server, &[("authorization", "Bearer other")]).await.0, 401);

    let admin = server.client().await;
    let secret = |expires: &str| {
        json!({"apiVersion": "v1", "kind": "Secret", "type": "bootstrap.kubernetes.io/token",
            "metadata": {"name": "bootstrap-token-abcdef", "namespace": "kube-system"},
            "stringData": {"token-id": "abcdef", "token-secret": "0123456789abcdef",
                "usage-bootstrap-authentication": "true", "expiration": expires,
                "auth-extra-groups": "system:bootstrappers:nodes"}})
    };
    let secrets = "/api/v1/namespaces/kube-system/secrets";
    let (code, answer) = send(&admin, "POST", secrets, &[], &secret("2099-01-01T00:00:00Z")).await;
    assert_eq!(code, 201, "{answer}");
    let token = [("authorization", "Bearer abcdef.0123456789abcdef")];
    let (code, user) = whoami(&server, &token).await;
    assert_eq!((code, &user["username"]), (201, &json!("system:bootstrap:abcdef")));
    assert_eq!(user["groups"], json!(["system:bootstrappers", "system:authenticated", "system:bootstrappers:nodes"]));
    assert_eq!(whoami(&server, &[("authorization", "Bearer abcdef.0123456789abcdee")]).await.0, 401);
    let one = format!("{secrets}/bootstrap-token-abcdef");
    assert_eq!(send(&admin, "PUT", &one, &[], &secret("2020-01-01T00:00:00Z")).await.0, 200);
    assert_eq!(whoami(&server, &token).await.0, 401);
}

#[tokio::test]
async fn impersonation_asks_for_every_part() {
    let eve = coracle_api::user::UserInfo::new("eve", &[]);
    let server = Server::start_with(|config| config.authn.tokens = vec![("eve".into(), eve)]).await;
    let admin = server.client().await;
    let headers = [
        ("impersonate-user", "jane"),
        ("impersonate-group", "dev"),
        ("impersonate-uid", "7"),
        ("impersonate-extra-example.com%2ftenant", "t"),
    ];
    let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"});
    let (code, answer) = send(&admin, "POST", WHOAMI, &headers, &review).await;
    let user = &answer["status"]["userInfo"];
    assert_eq!((code, &user["username"], &user["uid"]), (201, &json!("jane"), &json!("7")), "{answer}");
    assert_eq!(user["groups"], json!(["dev", "system:authenticated"]));
    assert_eq!(user["extra"]["example.com/tenant"], json!(["t"]));
    // Whoever may act as an account may not add groups to it.
    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    let role = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "act"},
        "rules": [{"apiGroups": [""], "resources": ["serviceaccounts"], "verbs": ["impersonate"]}]});
    let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "act"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "act"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "eve"}]});
    assert_eq!(send(&admin, "POST", &format!("{rbac}/clusterroles"), &[], &role).await.0, 201);
    assert_eq!(send(&admin, "POST", &format!("{rbac}/clusterrolebindings"), &[], &binding).await.0, 201);
    let eve = ("authorization", "Bearer eve");
    let robot = ("impersonate-user", "system:serviceaccount:default:robot");
    coracle_testkit::assert_eventually_async!(5, whoami(&server, &[eve, robot]).await.0 == 201, "the role counts");
    let (_, user) = whoami(&server, &[eve, robot]).await;
    let groups = json!(["system:serviceaccounts", "system:serviceaccounts:default", "system:authenticated"]);
    assert_eq!(user["groups"], groups);
    let more = ("impersonate-group", "system:serviceaccounts:kube-system");
    assert_eq!(whoami(&server, &[eve, robot, more]).await.0, 403);
    assert_eq!(whoami(&server, &[eve, ("impersonate-user", "jane")]).await.0, 403);
}

#[tokio::test]
async fn who_acts_for_some_actions_alone_does_no_others() {
    let agent = coracle_api::user::UserInfo {
        extra: [("authentication.kubernetes.io/node-name".to_owned(), vec!["n1".to_owned()])].into(),
        ..coracle_api::user::UserInfo::new("system:serviceaccount:default:agent", &["system:serviceaccounts"])
    };
    let eve = coracle_api::user::UserInfo::new("eve", &[]);
    let tokens = vec![("eve".into(), eve), ("agent".into(), agent)];
    let server = Server::start_with(|config| config.authn.tokens = tokens).await;
    let admin = server.client().await;
    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    let grant = async |namespace: &str, name: &str, user: &str, rules: Value| {
        let (place, role, binding) = match namespace {
            "" => (rbac.to_owned(), "ClusterRole", "ClusterRoleBinding"),
            _ => (format!("{rbac}/namespaces/{namespace}"), "Role", "RoleBinding"),
        };
        let version = "rbac.authorization.k8s.io/v1";
        let object = json!({"apiVersion": version, "kind": role, "metadata": {"name": name}, "rules": rules});
        let path = format!("{place}/{}s", role.to_lowercase());
        assert_eq!(send(&admin, "POST", &path, &[], &object).await.0, 201);
        let object = json!({"apiVersion": version, "kind": binding, "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": role, "name": name},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}]});
        let path = format!("{place}/{}s", binding.to_lowercase());
        assert_eq!(send(&admin, "POST", &path, &[], &object).await.0, 201);
    };
    let be = |resource: &str, names: &[&str], verb: &str| {
        json!([{"apiGroups": ["authentication.k8s.io"],
        "resources": [resource], "resourceNames": names, "verbs": [verb]}])
    };
    grant("", "be-jane", "eve", be("users", &["jane"], "impersonate:user-info")).await;
    let list = json!([{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["impersonate-on:user-info:list"]}]);
    grant("default", "list-as", "eve", list).await;
    grant("", "jane", "jane", json!([{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["*"]}])).await;
    let (eve, jane) = (("authorization", "Bearer eve"), ("impersonate-user", "jane"));
    let maps = "/api/v1/namespaces/default/configmaps";
    let none = Value::Null;
    coracle_testkit::assert_eventually_async!(
        20,
        ask(&server, "GET", maps, &[eve, jane], &none).await.0 == 200,
        "the roles count"
    );
    let (code, answer) = ask(&server, "GET", "/api/v1/namespaces/kube-system/configmaps", &[eve, jane], &none).await;
    let refused = "configmaps is forbidden: User \"eve\" cannot impersonate-on:user-info:list resource \"configmaps\" in API \
                   group \"\" in the namespace \"kube-system\"";
    assert_eq!((code, answer["message"].as_str()), (403, Some(refused)));
    assert_eq!(ask(&server, "GET", &format!("{maps}/a"), &[eve, jane], &none).await.0, 403);
    assert_eq!(ask(&server, "GET", maps, &[eve, ("impersonate-user", "joe")], &none).await.0, 403);
    assert_eq!(ask(&server, "GET", maps, &[eve, jane, ("impersonate-group", "dev")], &none).await.0, 403);
    assert_eq!(ask(&server, "GET", maps, &[eve], &none).await.0, 403);
    let (code, answer) = ask(&server, "GET", maps, &[eve, ("impersonate-group", "dev")], &none).await;
    let refused = "requested &user.DefaultInfo{Name:\"\", UID:\"\", Groups:[]string{\"dev\"}, \
                   Extra:map[string][]string(nil)} without impersonating a user name";
    assert_eq!((code, answer["message"].as_str()), (400, Some(refused)));
    // A pod's account may be the node that the pod is on, and no other.
    grant(
        "",
        "be-node",
        "system:serviceaccount:default:agent",
        json!([
        {"apiGroups": ["authentication.k8s.io"], "resources": ["nodes"], "verbs": ["impersonate:associated-node"]},
        {"apiGroups": ["authentication.k8s.io"], "resources": ["selfsubjectreviews"],
            "verbs": ["impersonate-on:associated-node:create"]}]),
    )
    .await;
    let agent = ("authorization", "Bearer agent");
    let own = ("impersonate-user", "system:node:n1");
    coracle_testkit::assert_eventually_async!(20, whoami(&server, &[agent, own]).await.0 == 201, "the role counts");
    let (_, user) = whoami(&server, &[agent, own]).await;
    assert_eq!(
        (&user["username"], &user["groups"]),
        (&json!("system:node:n1"), &json!(["system:nodes", "system:authenticated"]))
    );
    assert_eq!(whoami(&server, &[agent, ("impersonate-user", "system:node:n2")]).await.0, 403);
}

/// An issuer on loopback: discovery and keys. Its URL, its CA and the key that signs.
async fn issuer() -> (String, String, EcdsaKeyPair) {
    let random = ring::rand::SystemRandom::new();
    let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).expect("a key");
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref(), &random).expect("a key");
    let (x, y) = key.public_key().as_ref()[1..].split_at(32);
    let set = json!({"keys": [{"kty": "EC", "crv": "P-256", "kid": "k", "alg": "ES256",
        "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y)}]});
    let (url, ca) = common::https(&["127.0.0.1"], None, move |url, request| match request.uri.path() {
        "/.well-known/openid-configuration" => json!({"issuer": url, "jwks_uri": format!("{url}/keys")}),
        "/keys" => set.clone(),
        other => panic!("nobody should ask for {other}"),
    })
    .await;
    (url, ca, key)
}

fn sign(key: &EcdsaKeyPair, claims: &Value) -> String {
    let text = format!(
        "{}.{}",
        URL_SAFE_NO_PAD.encode(json!({"alg": "ES256", "kid": "k"}).to_string()),
        URL_SAFE_NO_PAD.encode(claims.to_string())
    );
    let signature = key.sign(&ring::rand::SystemRandom::new(), text.as_bytes()).expect("signed");
    format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
}

#[tokio::test]
async fn tokens_of_a_trusted_issuer_hold() {
    let (url, ca, key) = issuer().await;
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("authentication.yaml");
    let configuration = json!({"apiVersion": "apiserver.config.k8s.io/v1", "kind": "AuthenticationConfiguration",
        "anonymous": {"enabled": true, "conditions": [{"path": "/livez"}]},
        "jwt": [{"issuer": {"url": url, "audiences": ["cluster"], "certificateAuthority": ca},
            "claimMappings": {"username": {"expression": "'id:' + claims.sub"}, "groups": {"claim": "roles", "prefix": "id:"}},
            "claimValidationRules": [{"claim": "hd", "requiredValue": "example.com"}]}]});
    std::fs::write(&file, configuration.to_string()).expect("written");
    let settings = Settings::read(None, Some(&file)).expect("well formed");
    let server = Server::start_with(|config| config.authn = settings).await;
    let now = jiff::Timestamp::now().as_second();
    let claims = |more: Value| {
        let mut claims = json!({"iss": url, "aud": "cluster", "sub": "jane", "roles": ["dev"], "hd": "example.com",
            "exp": now + 600, "nbf": now});
        claims.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        format!("Bearer {}", sign(&key, &claims))
    };
    let (code, user) = whoami(&server, &[("authorization", &claims(json!({})))]).await;
    assert_eq!((code, &user["username"]), (201, &json!("id:jane")), "{user}");
    assert_eq!(user["groups"], json!(["id:dev", "system:authenticated"]));
    for wrong in [json!({"aud": "other"}), json!({"hd": "x"}), json!({"exp": now - 600}), json!({"iss": "https://x"})] {
        assert_eq!(whoami(&server, &[("authorization", &claims(wrong.clone()))]).await.0, 401, "{wrong}");
    }
    let (_, _, other) = issuer().await;
    let forged =
        sign(&other, &json!({"iss": url, "aud": "cluster", "sub": "jane", "hd": "example.com", "exp": now + 600}));
    assert_eq!(whoami(&server, &[("authorization", &format!("Bearer {forged}"))]).await.0, 401);
    assert_eq!(ask(&server, "GET", "/livez", &[], &Value::Null).await.0, 200);
    assert_eq!(ask(&server, "GET", "/readyz", &[], &Value::Null).await.0, 401);
}
