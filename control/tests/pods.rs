//! Pods as their users write them, many beside each other on one server: what each prints, how it ends, what its status says.
#![forbid(unsafe_code)]

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

#[path = "pods/faults.rs"]
mod faults;
#[path = "pods/shutdown.rs"]
mod shutdown;

use coracle_testkit::{Image, assert_eventually};
use serde_json::{Value, json};
use support::{Host, PATIENCE_S};

const IMAGE: &str = "docker.io/library/box:1";

fn shell(script: &str) -> Value {
    json!({"name": "main", "image": IMAGE, "imagePullPolicy": "Never", "command": ["/bin/sh", "-c", script]})
}

/// `base` with the fields of `more` over it.
fn with(mut base: Value, more: Value) -> Value {
    for (key, value) in more.as_object().expect("an object") {
        base[key] = value.clone();
    }
    base
}

fn pod(name: &str, spec: Value) -> Value {
    let usual = json!({"restartPolicy": "Never", "terminationGracePeriodSeconds": 1});
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": with(usual, spec)})
}

fn create(host: &Host, objects: &[Value]) {
    let output = host.apply(&json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn status(host: &Host, pod: &str) -> Value {
    serde_json::from_str(&host.get(&["get", "pod", pod, "-o", "json"]))
        .map(|pod: Value| pod["status"].clone())
        .expect("JSON")
}

fn condition(status: &Value, type_: &str) -> Option<String> {
    let list = status["conditions"].as_array()?;
    list.iter().find(|held| held["type"] == type_)?["status"].as_str().map(str::to_owned)
}

/// Name, specification, phase at the end, and what the log of `main` holds.
fn endings() -> Vec<(&'static str, Value, &'static str, &'static str)> {
    let one = |script: &str| json!({"containers": [shell(script)]});
    let main = |script: &str, more: Value| json!({"containers": [with(shell(script), more)]});
    let init = |name: &str, script: &str| with(shell(script), json!({"name": name}));
    let env = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    let amount =
        |name: &str, resource: &str| json!({"name": name, "valueFrom": {"resourceFieldRef": {"resource": resource}}});
    let mount = |path: &str| json!({"name": "v", "mountPath": path});
    let inits = [init("a", "echo a >/v/x"), init("b", "echo b >>/v/x")]
        .map(|one| with(one, json!({"volumeMounts": [mount("/v")]})));
    vec![
        ("plain", one("echo hello"), "Succeeded", "hello"),
        ("fails", one("exit 3"), "Failed", ""),
        (
            "expands",
            main("echo '$(A)-$$(A)'", json!({"env": [{"name": "B", "value": "b"}, {"name": "A", "value": "a$(B)"}]})),
            "Succeeded",
            "ab-$(A)",
        ),
        (
            "fields",
            main(
                "echo $N $S $U $H",
                json!({"env": [env("N", "metadata.name"), env("S", "metadata.namespace"), env("U", "spec.serviceAccountName"), env("H", "status.hostIP")]}),
            ),
            "Succeeded",
            "fields default default ",
        ),
        (
            "amounts",
            main(
                "echo $L $R",
                json!({"env": [amount("L", "limits.cpu"), amount("R", "requests.memory")], "resources": {"limits": {"cpu": "1500m"}, "requests": {"memory": "32Mi"}}}),
            ),
            "Succeeded",
            "2 33554432",
        ),
        (
            "user",
            main("id -u; id -g; id -G", json!({"securityContext": {"runAsUser": 1001, "runAsGroup": 2002}})),
            "Succeeded",
            "1001\n2002\n2002",
        ),
        (
            "groups",
            json!({"securityContext": {"supplementalGroups": [7], "fsGroup": 8, "runAsUser": 1001, "runAsGroup": 5}, "containers": [shell("id -G")]}),
            "Succeeded",
            "5 7 8",
        ),
        (
            "streams",
            main(
                "echo there >/dev/stdout; echo too >>/proc/self/fd/2",
                json!({"securityContext": {"runAsUser": 1001}}),
            ),
            "Succeeded",
            "there\ntoo",
        ),
        (
            "readonly",
            main("touch /x || echo refused", json!({"securityContext": {"readOnlyRootFilesystem": true}})),
            "Succeeded",
            "refused",
        ),
        (
            "unprivileged",
            main("ip link add a type veth 2>&1 || echo refused", json!({"securityContext": {"privileged": false}})),
            "Succeeded",
            "refused",
        ),
        (
            "noescalation",
            main("grep NoNewPrivs /proc/self/status", json!({"securityContext": {"allowPrivilegeEscalation": false}})),
            "Succeeded",
            "NoNewPrivs:\t1",
        ),
        ("seccomp", one("grep Seccomp: /proc/self/status"), "Succeeded", "Seccomp:\t2"),
        (
            "unconfined",
            main(
                "grep Seccomp: /proc/self/status",
                json!({"securityContext": {"seccompProfile": {"type": "Unconfined"}}}),
            ),
            "Succeeded",
            "Seccomp:\t0",
        ),
        (
            "sysctl",
            json!({"securityContext": {"sysctls": [{"name": "kernel.shm_rmid_forced", "value": "1"}]}, "containers": [shell("cat /proc/sys/kernel/shm_rmid_forced")]}),
            "Succeeded",
            "1",
        ),
        (
            "aliases",
            json!({"hostAliases": [{"ip": "192.0.2.7", "hostnames": ["one", "two"]}], "containers": [shell("grep 192.0.2.7 /etc/hosts")]}),
            "Succeeded",
            "192.0.2.7\tone\ttwo",
        ),
        (
            "fqdn",
            json!({"hostname": "h", "subdomain": "s", "setHostnameAsFQDN": true, "containers": [shell("hostname")]}),
            "Succeeded",
            "h.s.default.svc.cluster.local",
        ),
        (
            "dns",
            json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["192.0.2.9"], "searches": ["a.b"]}, "containers": [shell("cat /etc/resolv.conf")]}),
            "Succeeded",
            "search a.b\nnameserver 192.0.2.9",
        ),
        (
            "nolinks",
            json!({"enableServiceLinks": false, "containers": [shell("env")]}),
            "Succeeded",
            "KUBERNETES_SERVICE_PORT=443",
        ),
        (
            "inits",
            json!({"initContainers": inits, "volumes": [{"name": "v", "emptyDir": {}}], "containers": [with(shell("cat /v/x"), json!({"volumeMounts": [mount("/v")]}))]}),
            "Succeeded",
            "a\nb",
        ),
        (
            "badinit",
            json!({"initContainers": [init("a", "exit 1")], "containers": [shell("echo never")]}),
            "Failed",
            "",
        ),
        (
            "sidecar",
            json!({"initContainers": [with(init("a", "trap 'exit 0' TERM; while :; do sleep 0.1; done"), json!({"restartPolicy": "Always"}))], "containers": [shell("echo done")]}),
            "Succeeded",
            "done",
        ),
        (
            "memory",
            json!({"volumes": [{"name": "v", "emptyDir": {"medium": "Memory"}}], "containers": [with(shell("grep ' /v ' /proc/mounts; stat -c %a /v"), json!({"volumeMounts": [mount("/v")]}))]}),
            "Succeeded",
            "777",
        ),
        (
            "subpath",
            json!({"volumes": [{"name": "v", "emptyDir": {}}], "containers": [with(shell("echo x >/s/f; cat /v/main-dir/f"), json!({"env": [{"name": "D", "value": "main-dir"}], "volumeMounts": [mount("/v"), {"name": "v", "mountPath": "/s", "subPathExpr": "$(D)"}]}))]}),
            "Succeeded",
            "x",
        ),
        (
            "shared",
            json!({"shareProcessNamespace": true, "containers": [shell("cat /proc/1/comm; ps | grep -c .; kill -0 1 2>&1; echo end")]}),
            "Succeeded",
            "pause",
        ),
        ("deadline", json!({"activeDeadlineSeconds": 1, "containers": [shell("sleep 1000")]}), "Failed", ""),
        (
            "rules",
            json!({"containers": [with(shell("test -f /v/x && exit 0; touch /v/x; exit 42"), json!({"restartPolicy": "Never", "restartPolicyRules": [{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}], "volumeMounts": [mount("/v")]}))], "volumes": [{"name": "v", "emptyDir": {}}]}),
            "Succeeded",
            "",
        ),
        (
            "unsafe",
            json!({"securityContext": {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}, "containers": [shell("true")]}),
            "Failed",
            "",
        ),
        (
            "toolarge",
            json!({"nodeName": "n1", "containers": [with(shell("true"), json!({"resources": {"requests": {"cpu": "1000"}}}))]}),
            "Failed",
            "",
        ),
    ]
}

#[test]
fn pods_end_as_their_specifications_say() {
    let mut host = Host::new("pods");
    host.start();
    host.import(&Image::busybox(IMAGE));
    let cases = endings();
    let pods: Vec<Value> = cases.iter().map(|(name, spec, ..)| pod(name, spec.clone())).collect();
    create(&host, &pods);
    for (name, _, phase, log) in &cases {
        assert_eventually!(
            PATIENCE_S,
            status(&host, name)["phase"] == *phase,
            "{name}: {:#}\n{}",
            status(&host, name),
            host.log()
        );
        if !log.is_empty() {
            let printed = host.get(&["logs", name, "-c", "main"]);
            assert!(printed.contains(log), "{name} printed {printed:?}, not {log:?}");
        }
    }
    for (name, reason) in [("deadline", "DeadlineExceeded"), ("unsafe", "SysctlForbidden"), ("toolarge", "OutOfcpu")] {
        assert_eq!(status(&host, name)["reason"], reason, "{name}");
    }
    let ended = status(&host, "fails");
    let state = &ended["containerStatuses"][0]["state"]["terminated"];
    assert_eq!((&state["exitCode"], &state["reason"]), (&json!(3), &json!("Error")));
    assert_eq!(status(&host, "rules")["containerStatuses"][0]["restartCount"], 1);
    assert_eq!(status(&host, "badinit")["containerStatuses"][0]["state"]["waiting"]["reason"], "PodInitializing");
    // What has ended stays so under a new daemon.
    host.kill_server();
    host.start();
    assert_eq!(status(&host, "plain")["phase"], "Succeeded");
    assert_eq!(status(&host, "plain")["containerStatuses"][0]["restartCount"], 0);
    host.get(&["delete", "pods", "--all", "--wait=false"]);
    assert_eventually!(PATIENCE_S, host.get(&["get", "pods"]).is_empty(), "{}", host.log());
    let left = host.take_down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}

#[test]
fn running_pods_are_resized_debugged_probed_and_refused() {
    let mut host = Host::new("running");
    host.manifests(
        "fixed.yaml",
        &pod("fixed", json!({"restartPolicy": "Always", "containers": [shell("sleep 100000")]})).to_string(),
    );
    host.start();
    host.import(&Image::busybox(IMAGE));
    let sleeper = |more: Value| with(shell("trap 'exit 0' TERM; while :; do sleep 0.2; done"), more);
    let limits = |cpu: &str, memory: &str| json!({"requests": {"cpu": cpu, "memory": memory}, "limits": {"cpu": cpu, "memory": memory}});
    let policies = json!([{"resourceName": "memory", "restartPolicy": "RestartContainer"}]);
    create(&host, &[
        pod("resized", json!({"restartPolicy": "Always", "containers": [sleeper(json!({"resources": limits("20m", "64Mi"), "resizePolicy": policies}))]})),
        pod("gated", json!({"readinessGates": [{"conditionType": "example.com/gate"}], "containers": [sleeper(json!({}))]})),
        pod("probed", json!({"containers": [sleeper(json!({"readinessProbe": {"exec": {"command": ["test", "-f", "/tmp/ready"]}, "periodSeconds": 1}}))]})),
        pod("sidecars", json!({"restartPolicy": "Always", "initContainers": [with(shell("test -f /tmp/seen || { touch /tmp/seen; sleep 2; exit 1; }; sleep 100000"), json!({"name": "side", "restartPolicy": "Always"}))], "containers": [sleeper(json!({}))]})),
        pod("together", json!({"shareProcessNamespace": true, "containers": [sleeper(json!({})), with(sleeper(json!({})), json!({"name": "other"}))]})),
        pod("classy", json!({"runtimeClassName": "unknown", "containers": [sleeper(json!({}))]})),
        json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "unknown"}, "handler": "nothing"}),
    ].into_iter().rev().collect::<Vec<_>>());
    // What is mounted in one pod shows on the host and in another.
    let shared = host.path("shared").display().to_string();
    host.shell(&format!("mkdir {shared} && mount --bind {shared} {shared} && mount --make-shared {shared}"));
    let sharing = |name: &str, script: &str, propagation: &str| {
        let mount = json!([{"name": "v", "mountPath": "/v", "mountPropagation": propagation}]);
        let main = with(shell(script), json!({"volumeMounts": mount, "securityContext": {"privileged": true}}));
        pod(name, json!({"volumes": [{"name": "v", "hostPath": {"path": shared}}], "containers": [main]}))
    };
    create(
        &host,
        &[
            sharing("sees", "while ! test -f /v/inner/file; do sleep 0.1; done", "HostToContainer"),
            sharing("apart", "while ! test -f /v/done; do sleep 0.1; done; test ! -f /v/inner/file", "None"),
        ],
    );
    for pod in ["sees", "apart"] {
        let running = || status(&host, pod)["containerStatuses"][0]["state"]["running"].is_object();
        assert_eventually!(PATIENCE_S, running(), "{pod}: {:#}\n{}", status(&host, pod), host.log());
    }
    let mounts = "mkdir /v/inner && mount -t tmpfs none /v/inner && touch /v/inner/file /v/done";
    create(&host, &[sharing("mounts", mounts, "Bidirectional")]);
    for pod in ["mounts", "sees", "apart"] {
        assert_eventually!(PATIENCE_S, status(&host, pod)["phase"] == "Succeeded", "{pod}: {:#}", status(&host, pod));
    }
    host.shell(&format!("test -f {shared}/inner/file && umount {shared}/inner && umount {shared}"));

    let is = |pod: &str, type_: &str| condition(&status(&host, pod), type_).unwrap_or_default();
    for pod in ["resized", "sidecars", "together", "fixed-n1"] {
        assert_eventually!(PATIENCE_S, is(pod, "Ready") == "True", "{pod}: {:#}\n{}", status(&host, pod), host.log());
    }

    // In place first, then by a restart, then more than there is.
    let resize = |resources: Value| {
        let patch = json!({"spec": {"containers": [{"name": "main", "resources": resources}]}}).to_string();
        host.get(&["patch", "pod", "resized", "--subresource", "resize", "--patch", &patch]);
    };
    let first = |pod: &str| status(&host, pod)["containerStatuses"][0].clone();
    for (cpu, memory, restarts) in [("30m", "64Mi", 0), ("30m", "70Mi", 1)] {
        resize(limits(cpu, memory));
        assert_eventually!(
            PATIENCE_S,
            first("resized")["resources"]["limits"] == json!({"cpu": cpu, "memory": memory})
                && first("resized")["restartCount"] == restarts
                && is("resized", "Ready") == "True",
            "{:#}\n{}",
            status(&host, "resized"),
            host.log()
        );
        assert_eq!(first("resized")["allocatedResources"]["cpu"], cpu);
    }
    resize(limits("1000", "70Mi"));
    assert_eventually!(PATIENCE_S, is("resized", "PodResizePending") == "True", "{:#}", status(&host, "resized"));
    assert_eq!(first("resized")["resources"]["limits"]["cpu"], "30m");
    resize(limits("30m", "70Mi"));
    assert_eventually!(PATIENCE_S, is("resized", "PodResizePending").is_empty(), "{:#}", status(&host, "resized"));

    // A gate that another opens, a probe that passes later, a sidecar that comes again while the pod runs.
    assert_eventually!(PATIENCE_S, is("gated", "ContainersReady") == "True", "{:#}", status(&host, "gated"));
    assert_eq!(is("gated", "Ready"), "False");
    let open = json!({"status": {"conditions": [{"type": "example.com/gate", "status": "True"}]}}).to_string();
    host.get(&["patch", "pod", "gated", "--subresource", "status", "--patch", &open]);
    assert_eventually!(PATIENCE_S, is("gated", "Ready") == "True", "{:#}", status(&host, "gated"));
    assert_eq!(is("probed", "Ready"), "False");
    host.get(&["exec", "probed", "--", "touch", "/tmp/ready"]);
    assert_eventually!(PATIENCE_S, is("probed", "Ready") == "True", "{:#}", status(&host, "probed"));
    let side = || status(&host, "sidecars")["initContainerStatuses"][0]["restartCount"].clone();
    assert_eventually!(PATIENCE_S, side() != json!(0), "{:#}", status(&host, "sidecars"));
    assert_eq!(status(&host, "sidecars")["phase"], "Running");

    // Two containers see each other; a third one comes to look.
    let seen = host.get(&["exec", "together", "-c", "other", "--", "ps"]);
    assert!(seen.contains("/pause") && seen.matches("sleep 0.2").count() >= 1, "{seen}");
    host.get(&[
        "debug",
        "probed",
        "--image",
        IMAGE,
        "--image-pull-policy=Never",
        "--target",
        "main",
        "-c",
        "looks",
        "--",
        "/bin/sh",
        "-c",
        "ps; sleep 1000",
    ]);
    assert_eventually!(
        PATIENCE_S,
        status(&host, "probed")["ephemeralContainerStatuses"][0]["state"]["running"].is_object(),
        "{:#}",
        status(&host, "probed")
    );
    assert_eventually!(
        PATIENCE_S,
        host.get(&["logs", "probed", "-c", "looks"]).contains("sleep 0.2"),
        "{}",
        host.get(&["logs", "probed", "-c", "looks"])
    );
    assert_eventually!(
        PATIENCE_S,
        host.get(&["describe", "pod", "classy"]).contains("no runtime for \"nothing\" is configured"),
        "{}",
        host.log()
    );

    // A mirror that somebody deletes comes back, and the pod has not noticed.
    let of = |field: &str| host.get(&["get", "pod", "fixed-n1", "-o", &format!("jsonpath={{{field}}}")]);
    let (uid, id) = (of(".metadata.uid"), of(".status.containerStatuses[0].containerID"));
    host.get(&["delete", "pod", "fixed-n1", "--wait=false"]);
    assert_eventually!(
        PATIENCE_S,
        host.kubectl(&["get", "pod", "fixed-n1"]).status.success()
            && of(".metadata.uid") != uid
            && of(".status.containerStatuses[0].containerID") == id,
        "{}",
        host.log()
    );
    host.manifests("fixed.yaml", "");
    assert_eventually!(PATIENCE_S, !host.kubectl(&["get", "pod", "fixed-n1"]).status.success(), "{}", host.log());
    host.get(&["delete", "pods", "--all", "--wait=false"]);
    assert_eventually!(
        PATIENCE_S,
        host.get(&["get", "pods"]).is_empty(),
        "{}\n{}",
        host.get(&["get", "pods"]),
        host.log()
    );
    let left = host.take_down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}

#[test]
fn pods_have_users_of_their_own() {
    let mut host = Host::new("users");
    host.start();
    host.import(&Image::busybox(IMAGE));
    let mount = |name: &str| json!({"name": name, "mountPath": format!("/{name}")});
    let names = ["disk", "memory", "map", "secret", "image"];
    let mounts: Vec<Value> = names.iter().map(|name| mount(name)).collect();
    let idle = "trap 'exit 0' TERM; while :; do sleep 0.2; done";
    let spec = json!({
        "hostUsers": false,
        "hostname": "own",
        "securityContext": {"fsGroup": 2000},
        "volumes": [
            {"name": "disk", "emptyDir": {}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
            {"name": "map", "configMap": {"name": "text"}},
            {"name": "secret", "secret": {"secretName": "word", "defaultMode": 0o400}},
            {"name": "image", "image": {"reference": IMAGE, "pullPolicy": "Never"}},
        ],
        "containers": [
            with(shell(&format!("echo ready >/dev/stdout; {idle}")), json!({"volumeMounts": mounts})),
            with(shell(idle), json!({"name": "other", "volumeMounts": mounts, "securityContext": {"runAsUser": 1000}})),
        ],
    });
    create(
        &host,
        &[
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "text"}, "data": {"key": "value"}}),
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "word"}, "stringData": {"key": "hush"}}),
            pod("one", spec.clone()),
            pod("two", with(spec, json!({"shareProcessNamespace": true}))),
        ],
    );
    let ready = |pod: &str| condition(&status(&host, pod), "Ready").as_deref() == Some("True");
    for pod in ["one", "two"] {
        assert_eventually!(PATIENCE_S, ready(pod), "{pod}: {:#}\n{}", status(&host, pod), host.log());
    }
    let run = |pod: &str, container: &str, script: &str| {
        host.get(&["exec", pod, "-c", container, "--", "/bin/sh", "-c", script])
    };
    // Where a pod's ids begin outside: what root in it is there.
    let base = |pod: &str| -> u32 {
        let map = run(pod, "main", "cat /proc/self/uid_map; cat /proc/self/gid_map");
        let numbers: Vec<u32> = map.split_whitespace().map(|number| number.parse().expect("a number")).collect();
        assert_eq!((numbers[0], numbers[2]), (0, 65_536), "{map}");
        assert_eq!(numbers[..3], numbers[3..], "{map}");
        numbers[1]
    };
    let (one, two) = (base("one"), base("two"));
    assert!(one >= 65_536 && one.abs_diff(two) >= 65_536, "{one} {two}");
    for pod in ["one", "two"] {
        // Root inside owns what it should, and is no root outside.
        let owners = run(
            pod,
            "main",
            "touch /disk/file /memory/file /root-file && stat -L -c %u:%g /disk/file /memory/file /root-file /bin/busybox /image/bin/busybox /map/key /etc/hosts /etc/resolv.conf /dev/shm",
        );
        assert_eq!(
            owners.lines().collect::<Vec<_>>(),
            ["0:2000", "0:2000", "0:0", "0:0", "0:0", "0:2000", "0:0", "0:0", "0:0"],
            "{pod}"
        );
        assert_eq!(
            run(
                pod,
                "main",
                "cat /map/key /secret/key; echo >>/etc/hosts && hostname; cat /sys/class/net/eth0/operstate"
            ),
            "valuehushown\nup"
        );
        assert_eq!(
            run(pod, "other", "id -u; touch /disk/other && stat -c %u:%g /disk/other; cat /map/key"),
            "1000\n1000:2000\nvalue"
        );
        assert_eq!(
            run(pod, "main", "echo 1 >/proc/sys/kernel/sysrq || mount -t tmpfs x /mnt || echo refused"),
            "refused"
        );
        assert!(host.get(&["logs", pod, "-c", "main"]).contains("ready"));
    }
    assert!(run("two", "main", "cat /proc/1/comm").contains("pause"));
    let uid = |pod: &str| host.get(&["get", "pod", pod, "-o", "jsonpath={.metadata.uid}"]);
    let file = host.path("data/kubelet/pods").join(uid("one")).join("volumes/kubernetes.io~empty-dir/disk/file");
    let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(&file).expect("the file that the pod made"));
    assert_eq!(owner, 0, "on disk files belong to the same ids as without a user namespace");
    let id = status(&host, "one")["containerStatuses"][0]["containerID"].as_str().expect("an id").to_owned();
    let state = host.path("run/containers").join(id.rsplit('/').next().expect("an id")).join("state.json");
    let state: Value = serde_json::from_slice(&std::fs::read(state).expect("state")).expect("JSON");
    let outside = std::fs::read_to_string(format!("/proc/{}/status", state["pid"])).expect("the pod's process");
    assert!(outside.contains(&format!("Uid:\t{one}\t{one}")), "{outside}");

    // A new daemon keeps the ranges apart, and what runs goes on.
    host.kill_server();
    host.start();
    create(&host, &[pod("three", json!({"hostUsers": false, "containers": [shell(idle)]}))]);
    let ready = |pod: &str| condition(&status(&host, pod), "Ready").as_deref() == Some("True");
    assert_eventually!(PATIENCE_S, ready("three"), "{:#}\n{}", status(&host, "three"), host.log());
    let run = |pod: &str, script: &str| host.get(&["exec", pod, "-c", "main", "--", "/bin/sh", "-c", script]);
    let first = |pod: &str| run(pod, "cat /proc/self/uid_map").split_whitespace().nth(1).map(str::to_owned);
    assert_eq!((first("one"), first("two")), (Some(one.to_string()), Some(two.to_string())));
    assert!(first("three") != first("one") && first("three") != first("two"));
    assert_eq!(run("one", "stat -c %u /disk/file"), "0");
    let features =
        host.get(&["get", "node", "n1", "-o", "jsonpath={.status.runtimeHandlers[0].features.userNamespaces}"]);
    assert_eq!(features, "true");
    host.get(&["delete", "pods", "--all", "--wait=false"]);
    assert_eventually!(PATIENCE_S, host.get(&["get", "pods"]).is_empty(), "{}", host.log());
    let left = host.take_down();
    assert!(left.is_empty(), "left behind: {left:#?}");
}
