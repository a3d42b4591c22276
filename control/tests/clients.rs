//! Clients that others wrote, unmodified, against the program itself over TLS: Helm and the official Python client.
#![forbid(unsafe_code)]

#[path = "support/server.rs"]
mod server;

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use kube::api::ListParams;
use kube::{Api, Client};

use server::Server;

fn script(mut command: Command, file: &str, server: &Server) -> Command {
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(file));
    command.env("KUBECONFIG", server.folder.path().join("kubeconfig"));
    command
}

async fn map(client: &Client, name: &str) -> std::collections::BTreeMap<String, String> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
    maps.get(name).await.expect("a ConfigMap").data.unwrap_or_default()
}

#[tokio::test]
async fn helm_installs_upgrades_and_removes_a_release() {
    let (server, client) = Server::start().await;
    let log = std::fs::File::create(server.folder.path().join("helm.log")).expect("a log");
    // It says that it needs a newer Python than Debian's, and runs with that.
    let helm = coracle_testkit::python("helm-sdkpy", "helm_sdkpy", &["--ignore-requires-python"]);
    let mut helm = script(helm, "helm.py", &server)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/chart"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .expect("Helm starts");
    let mut said = BufReader::new(helm.stdout.take().expect("piped")).lines();
    let mut next = || said.next().and_then(Result::ok);
    let log = || std::fs::read_to_string(server.folder.path().join("helm.log")).unwrap_or_default();
    assert_eq!(next().as_deref(), Some("upgraded"), "{}\n{}", log(), server.log());
    let rendered = map(&client, "quay").await;
    assert_eq!((rendered["greeting"].as_str(), rendered["known"].as_str()), ("ahoy", "true"));
    assert!(rendered["version"].starts_with("v1.36.") && rendered["found"] == "default", "{rendered:?}");
    assert_eq!(map(&client, "quay-before").await["revision"], "2");
    helm.stdin.take().expect("piped").write_all(b"\n").expect("Helm listens");
    assert_eq!(next().as_deref(), Some("removed"), "{}", log());
    assert!(helm.wait().expect("Helm ends").success(), "{}", log());
    let accounts: Api<ServiceAccount> = Api::namespaced(client, "default");
    let left = accounts.list(&ListParams::default()).await.expect("listed");
    assert!(left.items.iter().all(|account| account.metadata.name.as_deref() == Some("default")), "{left:?}");
}

#[tokio::test]
async fn the_python_client_reads_writes_and_watches_typed_objects() {
    let (server, _) = Server::start().await;
    let output = script(coracle_testkit::python("kubernetes", "kubernetes", &[]), "typed.py", &server)
        .output()
        .expect("python3 starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert_eq!(text(&output.stdout).trim(), "done", "{}\n{}", text(&output.stderr), server.log());
}
