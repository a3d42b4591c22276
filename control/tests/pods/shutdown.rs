//! The host goes down: its pods get their time, the less important ones first, and nothing new starts.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use coracle_testkit::{Image, assert_eventually, need, python};
use serde_json::{Value, json};

use super::support::{Host, PATIENCE_S};
use super::{IMAGE, condition, create, pod, shell, status, with};

/// Everybody may say everything, as no real bus allows.
const BUS: &str = r#"<busconfig><type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_type="method_call"/><allow send_type="signal"/><allow send_requested_reply="true"/><allow receive_type="method_call"/><allow receive_type="signal"/><allow receive_type="method_return"/><allow receive_type="error"/></policy></busconfig>"#;

/// A process that ends with the value.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A bus and a stand-in for logind on it.
struct Logind {
    process: Process,
    _bus: Process,
}

impl Logind {
    fn start(host: &Host) -> Self {
        host.shell("mkdir -p /run/dbus");
        fs::write(host.path("bus.conf"), BUS).expect("a configuration");
        let mut command = host.command(need("dbus-daemon", "dbus-daemon"));
        command.arg(format!("--config-file={}", host.path("bus.conf").display())).args(["--nofork", "--nopidfile"]);
        let bus = Process(command.spawn().expect("the bus starts"));
        let listens = || host.command("test").args(["-S", "/run/dbus/system_bus_socket"]).status();
        assert_eventually!(PATIENCE_S, listens().is_ok_and(|status| status.success()), "the bus listens");
        // Found outside of the host, started inside.
        let found = python("jeepney", "jeepney", &[]);
        let mut command: Command = host.command(found.get_program());
        command.envs(found.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pods/logind.py"));
        let told = fs::File::create(host.path("logind.txt")).expect("a log");
        let process = Process(command.stdin(Stdio::piped()).stdout(told).spawn().expect("logind starts"));
        Self { process, _bus: bus }
    }

    fn announce(&mut self, ending: bool) {
        let input = self.process.0.stdin.as_mut().expect("piped");
        writeln!(input, "{ending}").expect("it listens");
    }
}

#[test]
fn pods_get_their_time_before_the_host_goes_down() {
    let mut host = Host::new("shutdown");
    host.shell("mount -t tmpfs none /run && mkdir /run/out");
    host.options = ["--shutdown-grace-period-by-pod-priority", "1000=40,0=10"].map(str::to_owned).into();
    host.start();
    host.import(&Image::busybox(IMAGE));
    // Without logind the node says so, and becomes graceful when there is one.
    let events = || host.get(&["get", "events", "-A", "-o", "jsonpath={.items[*].reason}"]);
    assert_eventually!(PATIENCE_S, events().contains("NoGracefulShutdown"), "{}", host.log());
    let mut logind = Logind::start(&host);
    let told = || fs::read_to_string(host.path("logind.txt")).unwrap_or_default();
    assert_eventually!(PATIENCE_S, told() == "waits 50\nheld shutdown coracle delay\n", "{}\n{}", told(), host.log());

    let ends = |script: &str, more: Value| {
        let main = shell(&format!("trap '{script}; exit 0' TERM; while :; do sleep 0.1; done"));
        let out = json!([{"name": "out", "hostPath": {"path": "/run/out"}}]);
        let main = with(main, json!({"volumeMounts": [{"name": "out", "mountPath": "/out"}]}));
        with(json!({"volumes": out, "terminationGracePeriodSeconds": 20, "containers": [main]}), more)
    };
    create(
        &host,
        &[
            json!({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "high"}, "value": 1000}),
        ],
    );
    create(
        &host,
        &[
            pod("done", json!({"containers": [shell("true")]})),
            pod("low", ends("sleep 1; touch /out/low", json!({}))),
            pod("high", ends("test -f /out/low && touch /out/high", json!({"priorityClassName": "high"}))),
            pod("deaf", ends("sleep 1000", json!({"terminationGracePeriodSeconds": 1}))),
            // Would keep the host waiting for long, were it not going down.
            pod("deleted", ends("sleep 1000", json!({"terminationGracePeriodSeconds": 3600}))),
        ],
    );
    let is = |pod: &str, type_: &str| condition(&status(&host, pod), type_).unwrap_or_default();
    for pod in ["low", "high", "deaf", "deleted"] {
        assert_eventually!(PATIENCE_S, is(pod, "Ready") == "True", "{pod}: {:#}\n{}", status(&host, pod), host.log());
    }
    assert_eventually!(PATIENCE_S, status(&host, "done")["phase"] == "Succeeded", "{}", host.log());
    host.get(&["delete", "pod", "deleted", "--wait=false"]);

    logind.announce(true);
    assert_eventually!(PATIENCE_S, told().ends_with("released\n"), "{}\n{}", told(), host.log());
    for pod in ["low", "high", "deaf"] {
        let status = status(&host, pod);
        assert_eq!((&status["phase"], &status["reason"]), (&json!("Failed"), &json!("Terminated")), "{status:#}");
        assert_eq!(status["message"], "Pod was terminated in response to imminent node shutdown.");
        assert_eq!(is(pod, "DisruptionTarget"), "True");
    }
    assert!(host.command("test").args(["-f", "/run/out/high"]).status().expect("test starts").success(), "in order");
    assert_eq!(status(&host, "done")["phase"], "Succeeded");
    assert!(!host.kubectl(&["get", "pod", "deleted"]).status.success(), "it has ended too");
    let ready =
        || host.get(&["get", "node", "n1", "-o", r#"jsonpath={.status.conditions[?(@.type=="Ready")].message}"#]);
    assert_eventually!(PATIENCE_S, ready() == "node is shutting down", "{}\n{}", ready(), host.log());
    create(&host, &[pod("late", with(ends("true", json!({})), json!({"nodeName": "n1"})))]);
    assert_eventually!(PATIENCE_S, status(&host, "late")["reason"] == "NodeShutdown", "{:#}", status(&host, "late"));
    assert!(events().contains("NodeShutdown"), "{}", events());

    // Somebody calls it off.
    logind.announce(false);
    assert_eventually!(PATIENCE_S, told().ends_with("released\nheld shutdown coracle delay\n"), "{}", told());
    assert_eventually!(PATIENCE_S, host.is_ready("n1"), "{}", host.log());
    create(&host, &[pod("again", with(ends("true", json!({})), json!({"nodeName": "n1"})))]);
    assert_eventually!(PATIENCE_S, is("again", "Ready") == "True", "{:#}\n{}", status(&host, "again"), host.log());
    host.get(&["delete", "pods", "--all"]);
    drop(logind);
    assert!(host.take_down().is_empty());
}
