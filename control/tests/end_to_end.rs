//! The main job on the real thing: a server, a node, containers; and what users see when something is wrong.
#![forbid(unsafe_code)]

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::collections::BTreeSet;

use coracle_testkit::assert_eventually;
use support::{Host, PATIENCE_S, hello};

const HELLO: &str = include_str!("../../docs/examples/hello.yaml");

fn rolled_out(host: &Host, replicas: &str) {
    let status = "jsonpath={.status.readyReplicas} {.status.updatedReplicas} {.status.replicas}";
    let wanted = [replicas; 3].join(" ");
    assert_eventually!(
        PATIENCE_S,
        host.get(&["get", "deployment", "hello", "-o", status]) == wanted,
        "{}\n{}",
        host.get(&["get", "pods", "-o", "wide"]),
        host.log()
    );
}

fn pods(host: &Host) -> Vec<String> {
    let names = host.get(&["get", "pods", "-l", "app=hello", "-o", "jsonpath={.items[*].metadata.name}"]);
    names.split_whitespace().map(str::to_owned).collect()
}

fn restarts(host: &Host, pod: &str) -> String {
    host.get(&["get", "pod", pod, "-o", "jsonpath={.status.containerStatuses[0].restartCount}"])
}

/// Who answers at an address, asked from the host.
fn fetch(host: &Host, address: &str) -> Option<String> {
    let script =
        "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode().strip())";
    let output = host.command("python3").args(["-c", script, address]).output().expect("python3 starts");
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[test]
fn a_deployment_behind_a_service_runs_heals_scales_and_outlives_every_process_of_ours() {
    let mut host = Host::new("main");
    host.start();
    host.import(&hello());
    assert!(host.apply(HELLO).status.success(), "apply failed");
    rolled_out(&host, "3");

    // All three answer, on the host and inside a pod.
    let address = format!("http://{}/", host.get(&["get", "service", "hello", "-o", "jsonpath={.spec.clusterIP}"]));
    let mut answers = BTreeSet::new();
    assert_eventually!(
        PATIENCE_S,
        {
            answers.extend(fetch(&host, &address));
            answers.len() == 3
        },
        "answers from {answers:?}"
    );
    let first = pods(&host)[0].clone();
    let inside = host.get(&["exec", &first, "--", "/hello", "get", &address]);
    assert!(inside.starts_with("hello from hello-"), "{inside}");
    assert!(host.get(&["logs", &first]).starts_with("listening on port 8080"), "the log's first line is missing");
    assert!(host.get(&["describe", "pod", &first]).contains("Started"), "no event of the start");

    // A deleted pod is replaced; more are made.
    host.get(&["delete", "pod", &first]);
    rolled_out(&host, "3");
    assert!(!pods(&host).contains(&first), "the deleted pod is still there");
    host.get(&["scale", "deployment", "hello", "--replicas=5"]);
    rolled_out(&host, "5");

    // The daemon dies: pods run on, unrestarted, and so does the Service.
    let before = pods(&host);
    host.kill_server();
    assert!(fetch(&host, &address).is_some(), "no answer without the daemon");
    host.start();
    rolled_out(&host, "5");
    assert_eq!(pods(&host), before);
    assert!(before.iter().all(|pod| restarts(&host, pod) == "0"), "a daemon's death restarted a container");

    // The supervisor dies: the same; the log goes on, and an exit code is still known.
    host.kill_supervisor();
    let victim = &before[0];
    let logged = host.get(&["logs", victim]).lines().count();
    assert_eventually!(PATIENCE_S, host.get(&["logs", victim]).lines().count() > logged, "the log does not go on");
    assert!(before.iter().all(|pod| restarts(&host, pod) == "0"), "a supervisor's death restarted a container");
    host.kubectl(&["exec", victim, "--", "/hello", "get", "http://127.0.0.1:8080/exit/3"]);
    assert_eventually!(PATIENCE_S, restarts(&host, victim) == "1", "{}", host.log());
    let code = "jsonpath={.status.containerStatuses[0].lastState.terminated.exitCode}";
    assert_eq!(host.get(&["get", "pod", victim, "-o", code]), "3");
    rolled_out(&host, "5");

    // Deleting the Deployment takes its ReplicaSet and pods along.
    host.get(&["delete", "deployment", "hello"]);
    assert_eventually!(PATIENCE_S, pods(&host).is_empty(), "{}", host.log());
    assert_eventually!(PATIENCE_S, host.get(&["get", "replicasets"]).is_empty(), "the ReplicaSet stays");
    let left = host.take_down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}

#[test]
fn what_is_wrong_is_said_in_one_sentence() {
    let mut host = Host::new("wrong");
    host.start();
    let refused = |manifest: &str| {
        let output = host.apply(manifest);
        assert!(!output.status.success(), "was accepted: {manifest}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let unknown = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndatum: {a: b}\n";
    assert!(refused(unknown).contains("unknown field \"datum\""), "{}", refused(unknown));
    let wrong = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: a, image: b, ports: [{containerPort: x}]}]}\n";
    assert!(refused(wrong).contains("containerPort"), "{}", refused(wrong));

    // An image that is not there: the pod says so and waits.
    let missing = "apiVersion: v1\nkind: Pod\nmetadata: {name: missing}\nspec: {containers: [{name: a, image: 'example.invalid/none:1', imagePullPolicy: Never}]}\n";
    assert!(host.apply(missing).status.success(), "apply failed");
    let reason = "jsonpath={.status.containerStatuses[0].state.waiting.reason}";
    assert_eventually!(
        PATIENCE_S,
        host.get(&["get", "pod", "missing", "-o", reason]) == "ErrImageNeverPull",
        "{}",
        host.log()
    );
    host.get(&["delete", "pod", "missing"]);

    // A second server on the same port, and on the same data folder.
    let other = host.path("other").display().to_string();
    let kubeconfig = host.path("other.yaml").display().to_string();
    let second = |data: &str, more: &[&str]| {
        let mut command = host.command(env!("CARGO_BIN_EXE_coracle"));
        command.args(["server", "--disable-agent", "--write-kubeconfig", &kubeconfig, "--data-dir", data]).args(more);
        let output = command.output().expect("the server starts");
        assert!(!output.status.success(), "a second server started");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let taken = second(&other, &[]);
    assert!(taken.contains("6443") && taken.contains("--https-listen-port"), "{taken}");
    let data = host.path("data").display().to_string();
    let locked = second(&data, &["--https-listen-port", "0"]);
    assert!(locked.contains(&data), "{locked}");
    let no_folder = second("/proc/nowhere", &["--https-listen-port", "0"]);
    assert!(no_folder.contains("/proc/nowhere"), "{no_folder}");
    let both = second(&other, &["--https-listen-port", "0", "--service-cidr", "10.43.0.0/16,10.44.0.0/16"]);
    assert!(both.contains("--service-cidr") && both.contains("one of IPv6"), "{both}");
    let left = host.take_down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}

#[test]
fn the_host_is_checked_line_by_line() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_coracle"))
        .args(["check", "--json"])
        .output()
        .expect("check starts");
    let findings: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(output.status.success(), "this host cannot run pods: {findings:#?}");
    for subject in ["kernel", "cgroup v2", "io_uring", "overlayfs", "capabilities"] {
        assert!(findings.iter().any(|finding| finding["subject"] == subject), "nothing about {subject}");
    }
}
