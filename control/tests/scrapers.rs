//! Prometheus and a shipper of logs as Debian has them, against a server and its node: they take all that is shown, with the
//! rights and by the names that they usually have.
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

/// A program that ends with the value.
struct Program(Child);

impl Drop for Program {
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
    let _prometheus = Program(command.spawn().expect("prometheus starts"));

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

/// What a shipper sends: the file's name, and the line as it stands there.
const SHIPPED: &str = r#"
global(workDirectory="FOLDER")
module(load="imfile")
input(type="imfile" file="FOLDER/log/containers/*.log" tag="kube" addMetadata="on" freshStartTail="off")
template(name="line" type="string" string="%$!metadata!filename% %msg%\n")
action(type="omfile" file="FOLDER/shipped.txt" template="line")
"#;

/// Pod, namespace and container of a file's name, as Fluent Bit's filter and Promtail's pipeline take it apart:
/// `POD_NAMESPACE_CONTAINER-ID.log`, where the id has 64 hexadecimal digits.
fn whose(file: &str) -> Option<(&str, &str, &str)> {
    let name = file.rsplit('/').next()?.strip_suffix(".log")?;
    let (rest, id) = name.rsplit_once('-')?;
    let is_id = id.len() == 64 && id.bytes().all(|digit| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit));
    let (pod, rest) = rest.split_once('_')?;
    let (namespace, container) = rest.split_once('_')?;
    is_id.then_some((pod, namespace, container))
}

#[test]
fn a_shipper_finds_the_logs_by_their_links() {
    let mut host = Host::new("shipper");
    host.start();
    host.import(&Image::busybox(IMAGE));
    let folder = host.path("").display().to_string();
    std::fs::write(host.path("rsyslog.conf"), SHIPPED.replace("FOLDER", folder.trim_end_matches('/')))
        .expect("written");
    let mut command = host.command(need("rsyslogd", "rsyslog"));
    command.arg("-n").arg("-f").arg(host.path("rsyslog.conf")).arg("-i").arg(host.path("rsyslog.pid"));
    let _shipper = Program(command.spawn().expect("rsyslogd starts"));
    let container = |name: &str, script: &str| json!({"name": name, "image": IMAGE, "imagePullPolicy": "Never", "command": ["/bin/sh", "-c", script]});
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "two-words", "namespace": "kube-public"}, "spec": {
        "terminationGracePeriodSeconds": 0,
        "containers": [
            container("first", "echo one two; echo three >&2; sleep 100000"),
            container("second-one", "i=0; while [ $i -lt 1000 ]; do i=$((i+1)); echo $i; done; sleep 100000"),
        ],
    }});
    assert!(host.apply(&pod.to_string()).status.success());
    // Of each line whose it is, its stream, whether it is whole, and what the container wrote.
    let shipped = || -> Vec<(String, String)> {
        let text = std::fs::read_to_string(host.path("shipped.txt")).unwrap_or_default();
        let take = |line: &str| {
            let mut words = line.splitn(5, ' ');
            let (pod, namespace, container) = whose(words.next()?)?;
            let time = words.next()?;
            assert!(time.parse::<k8s_openapi::jiff::Timestamp>().is_ok(), "{line}");
            let (stream, tag, content) = (words.next()?, words.next()?, words.next()?);
            Some((format!("{namespace}/{pod}/{container} {stream} {tag}"), content.to_owned()))
        };
        text.lines().filter_map(take).collect()
    };
    let of = |whose: &str| -> Vec<String> {
        shipped().into_iter().filter(|(known, _)| known == whose).map(|(_, content)| content).collect()
    };
    let numbers: Vec<String> = (1..=1000).map(|number: u32| number.to_string()).collect();
    let second = || of("kube-public/two-words/second-one stdout F");
    assert_eventually!(PATIENCE_S, second() == numbers, "{:?}\n{}", shipped(), host.log());
    let first = ["stdout", "stderr"].map(|stream| format!("kube-public/two-words/first {stream} F"));
    assert_eventually!(PATIENCE_S, of(&first[0]) == ["one two"] && of(&first[1]) == ["three"], "{:?}", shipped());
    host.get(&["delete", "pod", "-n", "kube-public", "two-words"]);
    assert!(host.take_down().is_empty());
}
