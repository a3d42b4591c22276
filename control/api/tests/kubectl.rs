//! kubectl against a server process of ours.

mod common;

use std::io::Write as _;
use std::process::{Command, Stdio};

use common::Server;

/// Runs kubectl; what it prints, errors included.
fn run(server: &Server, arguments: &[&str], input: &str) -> (bool, String) {
    let mut child = Command::new(coracle_testkit::kubectl())
        .args(arguments)
        .env("KUBECONFIG", &server.kubeconfig)
        .env("HOME", server.kubeconfig.parent().expect("a folder"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("kubectl starts");
    child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("written");
    let output = child.wait_with_output().expect("it ends");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

const MANIFEST: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: c, image: nginx, ports: [{containerPort: 80}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
";

const LIST: &str = "
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: ConfigMap, metadata: {name: one}, data: {a: b}}
- {apiVersion: v1, kind: ConfigMap, metadata: {name: two}, data: {a: b}}
";

const DEFINITION: &str = "
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: boats.example.com}
spec:
  group: example.com
  scope: Namespaced
  names: {plural: boats, singular: boat, kind: Boat, shortNames: [bo]}
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}, scale: {specReplicasPath: .spec.crew, statusReplicasPath: .status.crew}}
    additionalPrinterColumns: [{name: Crew, type: integer, jsonPath: .spec.crew}]
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec: {type: object, properties: {crew: {type: integer, default: 1, maximum: 5}}}
          status: {type: object, properties: {crew: {type: integer}}}
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubectl_works() {
    let server = Server::start().await;
    tokio::task::spawn_blocking(move || {
        let ok = |arguments: &[&str], input: &str, expected: &str| {
            let (success, text) = run(&server, arguments, input);
            assert!(success && text.contains(expected), "kubectl {arguments:?} printed {text:?}, wanted {expected:?}");
        };
        ok(&["version"], "", "v1.36");
        ok(&["apply", "-f", "-"], MANIFEST, "deployment.apps/web created");
        ok(&["apply", "-f", "-"], MANIFEST, "service/web unchanged");
        ok(&["get", "deploy", "-o", "wide"], "", "0/2");
        ok(&["scale", "deploy", "web", "--replicas=5"], "", "scaled");
        ok(&["get", "deploy", "web", "-o", "jsonpath={.spec.replicas}"], "", "5");
        ok(&["set", "image", "deploy/web", "c=nginx:2"], "", "image updated");
        ok(&["describe", "deploy", "web"], "", "nginx:2");
        ok(&["explain", "pod.spec.containers"], "", "List of containers");
        ok(&["explain", "pod.spec.containers", "--output=plaintext-openapiv2"], "", "List of containers");
        ok(&["apply", "-f", "-"], LIST, "configmap/two created");
        ok(&["create", "--validate", "-f", "-"], &LIST.replace("one", "three").replace("two", "four"), "four created");
        ok(&["apply", "--server-side", "--force-conflicts", "-f", "-"], MANIFEST, "serverside-applied");
        let (success, text) = run(&server, &["apply", "-f", "-"], &MANIFEST.replace("replicas", "replicaz"));
        assert!(!success && text.contains("unknown field \"spec.replicaz\""), "{text}");
        ok(&["apply", "-f", "-"], DEFINITION, "boats.example.com created");
        ok(&["wait", "--for=condition=Established", "crd/boats.example.com", "--timeout=10s"], "", "met");
        ok(
            &["create", "-f", "-"],
            "apiVersion: example.com/v1\nkind: Boat\nmetadata: {name: a}\nspec: {}\n",
            "boat.example.com/a created",
        );
        ok(&["get", "bo"], "", "CREW");
        ok(&["scale", "boat", "a", "--replicas=3"], "", "scaled");
        let (success, text) = run(&server, &["scale", "boat", "a", "--replicas=9"], "");
        assert!(!success && text.contains("less than or equal to 5"), "{text}");
        ok(&["explain", "boat.spec.crew"], "", "<integer>");
        ok(&["delete", "crd", "boats.example.com", "--timeout=20s"], "", "deleted");
        ok(&["auth", "can-i", "create", "pods"], "", "yes");
        ok(&["delete", "-f", "-"], MANIFEST, "deleted");
    })
    .await
    .expect("kubectl ran");
}
