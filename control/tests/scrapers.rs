//! Prometheus as Debian has it against a server and its node: it takes all that they show, with the rights that it usually has.
#![forbid(unsafe_code)]

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::process::{Child, Command, Stdio};

use coracle_testkit::{Image, assert_eventually, need};
use serde_json::{Value, json};
use support::{Host, PATIENCE_S};

const IMAGE: &str = "docker.io/library/box:1";

/// Rights as the project's own example gives them, and a pod that answers with metrics of its own.
const OBJECTS: &str = r#"
apiVersion: v1
kind: ServiceAccount
metadata: {name: prometheus}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: prometheus}
rules:
- apiGroups: [""]
  resources: [nodes, nodes/metrics, services, endpoints, pods]
  verbs: [get, list, watch]
- nonResourceURLs: [/metrics]
  verbs: [get]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: prometheus}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: prometheus}
subjects: [{kind: ServiceAccount, name: prometheus, namespace: default}]
---
apiVersion: v1
kind: Pod
metadata:
  name: speaks
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: docker.io/library/box:1
    imagePullPolicy: Never
    command: [/bin/sh, -c, "while :; do printf 'HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nspeaks 1\n' | nc -l -p 8080 >/dev/null; done"]
    ports: [{containerPort: 8080}]
"#;

/// Job, address, scheme and path of each target: those that the project's own configuration for Kubernetes scrapes, and the
/// node's others. Debian builds Prometheus without its discovery by the API, so the addresses are asked for here.
fn configuration(host: &Host) -> String {
    let ask =
        |kind: &[&str], path: &str| host.get(&[&["get"], kind, &["-o", &format!("jsonpath={{{path}}}")]].concat());
    let node = ask(&["node", "n1"], ".status.addresses[0].address") + ":10250";
    let pod = ask(&["pod", "speaks"], ".status.podIP") + ":8080";
    let api = ask(&["endpointslice", "kubernetes"], ".endpoints[0].addresses[0]") + ":6443";
    let rows = [
        ("kubernetes-apiservers", &api, "https", "/metrics"),
        ("kubernetes-cadvisor", &node, "https", "/metrics/cadvisor"),
        ("kubernetes-nodes", &node, "https", "/metrics"),
        ("kubernetes-pods", &pod, "http", "/metrics"),
        ("kubernetes-probes", &node, "https", "/metrics/probes"),
        ("kubernetes-resource", &node, "https", "/metrics/resource"),
    ];
    let job = |(name, target, scheme, path): (&str, &String, &str, &str)| {
        json!({
            "job_name": name, "scheme": scheme, "metrics_path": path, "static_configs": [{"targets": [target]}],
            "tls_config": {"ca_file": host.path("data/tls/ca.crt")},
            "authorization": {"credentials_file": host.path("token")},
        })
    };
    // JSON is YAML too.
    json!({"global": {"scrape_interval": "1s"}, "scrape_configs": rows.map(job)}).to_string()
}

struct Prometheus(Child);

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What Prometheus answers, if it does.
fn ask(host: &Host, path: &str) -> Value {
    let busybox = need("busybox", "busybox-static");
    let url = format!("http://127.0.0.1:9090/api/v1/{path}");
    let output = host.command(busybox).args(["wget", "-q", "-O", "-", &url]).output().expect("busybox starts");
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

#[test]
fn prometheus_finds_all_targets_up() {
    let mut host = Host::new("scrapers");
    host.start();
    host.import(&Image::busybox(IMAGE));
    assert!(host.apply(OBJECTS).status.success());
    std::fs::write(host.path("token"), host.get(&["create", "token", "prometheus"])).expect("a token");
    let address = || !host.get(&["get", "pod", "speaks", "-o", "jsonpath={.status.podIP}"]).is_empty();
    assert_eventually!(PATIENCE_S, address(), "{}", host.log());
    std::fs::write(host.path("prometheus.yml"), configuration(&host)).expect("a configuration");
    let log = std::fs::File::create(host.path("prometheus.log")).expect("a log");
    let flag = |name: &str, file: &str| format!("--{name}={}", host.path(file).display());
    let mut command: Command = host.command(need("prometheus", "prometheus"));
    command.args([flag("config.file", "prometheus.yml"), flag("storage.tsdb.path", "tsdb")]);
    command.arg("--web.listen-address=127.0.0.1:9090").stdout(Stdio::null()).stderr(log);
    let _prometheus = Prometheus(command.spawn().expect("prometheus starts"));

    let targets = || {
        let answer = ask(&host, "targets?state=active");
        let mut all: Vec<(String, String)> = answer["data"]["activeTargets"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|target| {
                let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                (word(&target["labels"]["job"]), word(&target["health"]) + &word(&target["lastError"]))
            })
            .collect();
        all.sort();
        all
    };
    let names = ["apiservers", "cadvisor", "nodes", "pods", "probes", "resource"];
    let up = names.map(|name| (format!("kubernetes-{name}"), "up".to_owned()));
    assert_eventually!(PATIENCE_S, targets() == up, "{:#?}\n{}", targets(), host.log());

    // What dashboards ask for, and whether somebody answers.
    for query in [
        "apiserver_request_total",
        "kubelet_running_pods",
        "kubelet_pod_start_duration_seconds_count",
        "kubelet_pod_worker_duration_seconds_bucket",
        "kubelet_runtime_operations_total",
        "container_cpu_usage_seconds_total{pod=\"speaks\",container=\"main\"}",
        "container_memory_working_set_bytes{pod=\"speaks\"}",
        "speaks",
        "up==1",
    ] {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let found = || ask(&host, &format!("query?query={encoded}"))["data"]["result"].as_array().map_or(0, Vec::len);
        assert_eventually!(PATIENCE_S, found() > 0, "nobody answers {query}\n{}", host.log());
    }
    host.get(&["delete", "pod", "speaks"]);
    assert!(host.take_down().is_empty());
}
