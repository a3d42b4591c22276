//! What goes wrong in one pod, or with the node's own processes, and what the others see of it: nothing.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;

use coracle_testkit::{Image, assert_eventually};
use serde_json::{Value, json};

use super::support::{Host, PATIENCE_S};
use super::{IMAGE, condition, create, pod, shell, status, with};

/// Bytes for all logs of the host that lacks room: less than one container may have.
const LOG_ROOM: &str = "24m";
const SHORT_LINES: usize = 200_000;
const PROCESSES: usize = 300;

fn is_ready(host: &Host, pod: &str) -> bool {
    condition(&status(host, pod), "Ready").as_deref() == Some("True")
}

fn restarts(host: &Host, pod: &str) -> Value {
    status(host, pod)["containerStatuses"][0]["restartCount"].clone()
}

/// The first process of a pod's only container, outside.
fn first_process(host: &Host, pod: &str) -> i32 {
    let id = status(host, pod)["containerStatuses"][0]["containerID"].as_str().expect("an id").to_owned();
    let state = host.path("run/containers").join(id.rsplit('/').next().expect("an id")).join("state.json");
    let state: Value = serde_json::from_slice(&fs::read(state).expect("state")).expect("JSON");
    i32::try_from(state["pid"].as_i64().expect("a process")).expect("an id")
}

/// How many processes in the host's pods are `sleep` for so long.
fn sleepers(host: &Host, seconds: u32) -> usize {
    let all = fs::read_dir("/proc").expect("processes").flatten().map(|entry| entry.path());
    let wanted = format!("sleep\0{seconds}\0");
    // One that ends meanwhile is none.
    let is = |process: &PathBuf, file: &str, fits: &dyn Fn(String) -> bool| {
        fs::read_to_string(process.join(file)).is_ok_and(fits)
    };
    let ours = all.filter(|process| {
        is(process, "cmdline", &|line| line == wanted) && is(process, "cgroup", &|groups| groups.contains(&host.cgroup))
    });
    ours.count()
}

/// Where the logs of a pod's container are.
fn logs(host: &Host, pod: &str) -> PathBuf {
    let uid = host.get(&["get", "pod", pod, "-o", "jsonpath={.metadata.uid}"]);
    host.path("log/pods").join(format!("default_{pod}_{uid}")).join("main")
}

#[test]
fn what_goes_wrong_in_one_pod_hurts_no_other() {
    let mut host = Host::new("faults");
    let folder = host.path("log/pods").display().to_string();
    host.shell(&format!("mkdir -p {folder} && mount -t tmpfs -o size={LOG_ROOM} none {folder}"));
    host.start();
    host.import(&Image::busybox(IMAGE));
    let idle = "trap 'exit 0' TERM; while :; do sleep 0.2; done";
    let probe = json!({"exec": {"command": ["true"]}, "periodSeconds": 1});
    let well = with(shell(idle), json!({"livenessProbe": probe.clone(), "readinessProbe": probe}));
    create(
        &host,
        &[
            pod("well", json!({"containers": [well]})),
            pod("lines", json!({"containers": [shell(&format!("seq {SHORT_LINES}"))]})),
        ],
    );
    assert_eventually!(PATIENCE_S, is_ready(&host, "well"), "{:#}\n{}", status(&host, "well"), host.log());

    // Many short lines: all of them are there.
    assert_eventually!(PATIENCE_S, status(&host, "lines")["phase"] == "Succeeded", "{}", host.log());
    let lines = || host.get(&["logs", "lines"]);
    assert_eventually!(PATIENCE_S, lines().lines().count() == SHORT_LINES, "{} lines", lines().lines().count());
    assert!(lines().lines().enumerate().all(|(index, line)| line == (index + 1).to_string()), "in order");
    host.get(&["delete", "pod", "lines"]);

    // Output without end fills the disk; processes without number leave their parents; one is stopped; a registry is not there.
    let flood = format!("i=0; while [ $i -lt {PROCESSES} ]; do i=$((i+1)); (sleep 98765 &); done; {idle}");
    create(
        &host,
        &[
            pod("loud", json!({"containers": [shell("yes 0123456789012345678901234567890123456789")]})),
            pod("bomb", json!({"containers": [shell(&flood)]})),
            pod("stopped", json!({"containers": [shell(idle)]})),
            pod(
                "orphan",
                json!({"containers": [with(shell("true"), json!({"image": "127.0.0.1:1/none:1", "imagePullPolicy": "Always"}))]}),
            ),
        ],
    );
    assert_eventually!(PATIENCE_S, host.log().contains("o space left"), "{}", host.log());
    assert_eventually!(PATIENCE_S, sleepers(&host, 98_765) == PROCESSES, "{}", sleepers(&host, 98_765));
    assert_eventually!(PATIENCE_S, is_ready(&host, "stopped"), "{:#}", status(&host, "stopped"));
    let stopped = nix::unistd::Pid::from_raw(first_process(&host, "stopped"));
    nix::sys::signal::kill(stopped, nix::sys::signal::Signal::SIGSTOP).expect("it runs");
    let waits = || status(&host, "orphan")["containerStatuses"][0]["state"]["waiting"]["reason"].clone();
    assert_eventually!(PATIENCE_S, waits() == "ImagePullBackOff", "{}\n{}", waits(), host.log());

    // A command enters the stopped container; pods start and are well; and everything can be ended.
    assert_eq!(host.get(&["exec", "stopped", "--", "echo", "hello"]), "hello");
    create(&host, &[pod("after", json!({"containers": [shell(idle)]}))]);
    assert_eventually!(PATIENCE_S, is_ready(&host, "after"), "{:#}\n{}", status(&host, "after"), host.log());
    assert!(is_ready(&host, "well") && restarts(&host, "well") == 0, "{:#}", status(&host, "well"));
    assert!(is_ready(&host, "loud") && restarts(&host, "loud") == 0, "{:#}", status(&host, "loud"));
    host.get(&["delete", "pods", "loud", "bomb", "stopped", "orphan"]);
    assert_eq!(sleepers(&host, 98_765), 0);
    assert!(nix::sys::signal::kill(stopped, None).is_err(), "the stopped process is gone");
    // With room again, logs go on.
    create(&host, &[pod("speaks", json!({"containers": [shell(&format!("echo again; {idle}"))]}))]);
    assert_eventually!(PATIENCE_S, is_ready(&host, "speaks"), "{:#}\n{}", status(&host, "speaks"), host.log());
    assert_eventually!(PATIENCE_S, host.get(&["logs", "speaks"]) == "again", "{}", host.log());
    host.get(&["delete", "pods", "--all"]);
    host.shell(&format!("umount {folder}"));
    assert!(host.take_down().is_empty());
}

#[test]
fn containers_are_never_doubled_whoever_dies() {
    let mut host = Host::new("deaths");
    host.start();
    host.import(&Image::busybox(IMAGE));
    let marked = |mark: u32| shell(&format!("sleep {mark} & trap 'exit 0' TERM; while :; do sleep 0.2; done"));
    let out = json!({"volumes": [{"name": "v", "emptyDir": {}}]});
    let mount = json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]});
    let loud = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done";
    create(
        &host,
        &[
            pod("always", json!({"restartPolicy": "Always", "containers": [marked(91_001)]})),
            pod("never", json!({"containers": [marked(91_002)]})),
            pod("keeps", with(out, json!({"restartPolicy": "Always", "containers": [with(shell(loud), mount)]}))),
        ],
    );
    for pod in ["always", "never", "keeps"] {
        assert_eventually!(PATIENCE_S, is_ready(&host, pod), "{pod}: {:#}\n{}", status(&host, pod), host.log());
    }

    // The daemon dies during a command: the caller is cut off, the command goes on to its end, and the volume stays.
    let script = "echo begun; sleep 2; echo done >/v/done";
    let mut caller = host.command(coracle_testkit::kubectl());
    caller.args(["exec", "keeps", "--", "sh", "-c", script]).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut caller = caller.spawn().expect("kubectl starts");
    let mut line = String::new();
    let output = caller.stdout.take().expect("piped");
    std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line).expect("the command speaks");
    assert_eq!(line, "begun\n");
    host.kill_server();
    assert!(!caller.wait().expect("kubectl ends").success(), "its exit code is not made up");
    host.start();
    assert_eventually!(
        PATIENCE_S,
        host.kubectl(&["exec", "keeps", "--", "cat", "/v/done"]).stdout == b"done\n",
        "{}",
        host.log()
    );
    // Exit codes are known of commands that come after.
    let code = host.kubectl(&["exec", "keeps", "--", "sh", "-c", "exit 7"]);
    assert_eq!(code.status.code(), Some(7), "{}", String::from_utf8_lossy(&code.stderr));
    for pod in ["always", "never", "keeps"] {
        assert_eq!(restarts(&host, pod), 0, "{pod}");
    }

    // Both die: what cannot be followed any more ends, and its policy decides; nothing runs twice.
    host.kill_server();
    host.kill_supervisor();
    host.start();
    assert_eventually!(
        PATIENCE_S,
        is_ready(&host, "always") && restarts(&host, "always") == 1,
        "{:#}\n{}",
        status(&host, "always"),
        host.log()
    );
    assert_eventually!(
        PATIENCE_S,
        status(&host, "never")["phase"] == "Failed",
        "{:#}\n{}",
        status(&host, "never"),
        host.log()
    );
    assert_eq!((sleepers(&host, 91_001), sleepers(&host, 91_002)), (1, 0));
    // What it wrote before is there with what it writes now.
    assert_eventually!(PATIENCE_S, is_ready(&host, "keeps"), "{:#}\n{}", status(&host, "keeps"), host.log());
    assert_eq!(host.get(&["exec", "keeps", "--", "cat", "/v/done"]), "done");
    let numbers = |name: &str| {
        let text = fs::read_to_string(logs(&host, "keeps").join(name)).expect("a log");
        text.lines().filter_map(|line| line.rsplit(' ').next()?.parse::<usize>().ok()).collect::<Vec<_>>()
    };
    let first = numbers("0.log");
    assert!(first.iter().enumerate().all(|(index, number)| *number == index + 1), "no line is lost or doubled");
    assert_eventually!(PATIENCE_S, numbers("1.log").first() == Some(&1), "the log goes on");
    host.get(&["delete", "pods", "--all"]);
    assert!(host.take_down().is_empty());
}
