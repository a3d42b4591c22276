//! What goes beyond the everyday container: interfaces, ranks of memory, unprivileged users, limits changed later, and the
//! words and statuses in which the command answers.

#[allow(dead_code, reason = "each test program uses its part of what is shared")]
mod common;

use common::{Bundle, is_corun, runtime};
use coracle_testkit::assert_eventually;
use serde_json::{Value, json};
use std::process::{Command, Output};

fn host(words: &[&str]) -> Output {
    let program = coracle_testkit::need(words[0], if words[0] == "ip" { "iproute2" } else { "util-linux" });
    Command::new(program).args(&words[1..]).output().expect("it runs")
}

/// Debian's runc is older than `linux.netDevices`.
#[test]
fn an_interface_moves_in_with_its_addresses() {
    if !is_corun() {
        return;
    }
    let name = format!("crn{}", std::process::id());
    let mut bundle = Bundle::new("ip addr show dev data0");
    bundle.spec["linux"]["netDevices"] = json!({&name: {"name": "data0"}});
    let (status, _, err) = bundle.run();
    assert!(status != 0 && err.contains(&name), "there is no such interface yet: {err}");
    bundle.assert_gone();
    let made = host(&["ip", "link", "add", &name, "type", "veth", "peer", "name", &format!("{name}p")]);
    assert!(made.status.success(), "{made:?}");
    for address in ["192.0.2.7/24", "2001:db8::7/64"] {
        let made = host(&["ip", "addr", "add", address, "dev", &name, "nodad"]);
        assert!(made.status.success(), "{made:?}");
    }
    let (status, out, err) = bundle.run();
    let gone = host(&["ip", "link", "del", &format!("{name}p")]);
    assert_eq!(status, 0, "{err}");
    assert!(out.contains("192.0.2.7/24") && out.contains("2001:db8::7/64") && out.contains("UP"), "{out}");
    drop(gone);
    for (devices, word) in
        [(json!({&name: {"name": "no/name"}}), "no/name"), (json!({"a": {"name": "c"}, "b": {"name": "c"}}), "c")]
    {
        bundle.spec["linux"]["netDevices"] = devices;
        let (status, _, err) = bundle.run();
        assert!(status != 0 && err.contains(word), "{err}");
    }
    bundle.spec["linux"]["netDevices"] = json!({&name: {}});
    bundle.spec["linux"]["namespaces"]
        .as_array_mut()
        .expect("a list")
        .retain(|namespace| namespace["type"] != "network");
    assert!(bundle.run().2.contains("network namespace"));
}

#[test]
fn what_the_scheduler_is_told_holds_in_the_program() {
    let mut bundle = Bundle::new(
        "grep -E 'Cpus_allowed_list|Mems_allowed_list' /proc/self/status; cat /proc/self/sched_policy; uname -m; sleep 1",
    );
    bundle.spec["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 5});
    bundle.spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
    bundle.spec["linux"]["personality"] = json!({"domain": "LINUX32"});
    if is_corun() {
        bundle.spec["linux"]["memoryPolicy"] = json!({"mode": "MPOL_BIND", "nodes": "0"});
    }
    bundle.spec["process"]["args"] = json!(["sleep", "100"]);
    bundle.ok(&["run", "-d", &bundle.id]);
    let pid = bundle.state()["pid"].to_string();
    let policy = String::from_utf8(host(&["chrt", "-p", &pid]).stdout).expect("text");
    // Debian's runc is older than this part of the specification.
    assert!(!is_corun() || policy.contains("SCHED_BATCH"), "{policy}");
    let io = String::from_utf8(host(&["ionice", "-p", &pid]).stdout).expect("text");
    assert!(io.contains("idle"), "{io}");
    let personality = std::fs::read_to_string(format!("/proc/{pid}/personality")).expect("reads");
    assert_eq!(personality.trim(), "00000008");
    if is_corun() {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/numa_maps")).unwrap_or_else(|_| "bind:0".into());
        assert!(maps.contains("bind:0"), "{maps}");
    }
}

#[test]
fn a_root_can_be_entered_without_pivoting() {
    let bundle = Bundle::new("ls /; readlink /proc/self/cwd");
    let output = bundle.command(&["run", "--no-pivot", &bundle.id]);
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    assert!(out.contains("bin") && !out.contains("boot") && out.ends_with("/\n"), "{out}");
    bundle.assert_gone();
}

#[test]
fn exec_runs_on_the_processors_it_is_told() {
    let bundle = Bundle::new("sleep 100");
    bundle.ok(&["run", "-d", &bundle.id]);
    let mut process = bundle.spec["process"].clone();
    process["args"] = json!(["grep", "Cpus_allowed_list", "/proc/self/status"]);
    process["execCPUAffinity"] = json!({"initial": "0", "final": "0"});
    let file = bundle.folder.path().join("process.json");
    std::fs::write(&file, process.to_string()).expect("a file");
    if is_corun() {
        let out = bundle.ok(&["exec", "--process", file.to_str().expect("a path"), &bundle.id]);
        assert_eq!(out.split_whitespace().last(), Some("0"), "{out}");
    }
}

#[test]
fn without_a_mount_namespace_nothing_stays_mounted_on_the_host() {
    if !is_corun() {
        return;
    }
    let mut bundle = Bundle::new("readlink /proc/self/ns/mnt; ls /");
    bundle.spec["linux"]["namespaces"].as_array_mut().expect("a list").retain(|namespace| namespace["type"] != "mount");
    let (status, _, err) = bundle.run();
    assert!(status != 0 && err.contains("mount namespace"), "masks would hide the host's files: {err}");
    bundle.spec["linux"]["maskedPaths"] = json!([]);
    bundle.spec["linux"]["readonlyPaths"] = json!([]);
    let own = std::fs::read_link("/proc/self/ns/mnt").expect("a link");
    let (status, out, err) = bundle.run();
    assert_eq!(status, 0, "{err}");
    assert_eq!(out.lines().next(), own.to_str(), "the host's own");
    assert!(out.contains("bin") && !out.contains("boot"), "the container's root: {out}");
    bundle.assert_gone();
    let mounted = || {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        mounts.contains(&*bundle.folder.path().to_string_lossy())
    };
    assert!(!mounted(), "after its end");
    bundle.ok(&["create", &bundle.id]);
    assert!(mounted(), "while it is there");
    bundle.ok(&["delete", "--force", &bundle.id]);
    assert!(!mounted(), "after its removal");
}

#[test]
fn what_nobody_can_give_is_told_or_refused() {
    let mut bundle = Bundle::new("echo started");
    bundle.spec["process"]["capabilities"]["bounding"] = json!(["CAP_KILL", "CAP_NOT_OF_THIS_KERNEL"]);
    let (status, out, err) = bundle.run();
    assert_eq!((status, out.as_str()), (0, "started\n"), "{err}");
    assert!(err.contains("CAP_NOT_OF_THIS_KERNEL"), "a warning names it: {err}");
    for (field, value, word) in [
        ("intelRdt", json!({"closID": "guaranteed"}), "ntel"),
        ("mountLabel", json!("system_u:object_r:container_file_t:s0"), "abel"),
    ] {
        let mut bundle = Bundle::new("echo started");
        bundle.spec["linux"][field] = value;
        let (status, out, err) = bundle.run();
        if is_corun() {
            assert!(status == 1 && out.is_empty() && err.contains(word), "{field}: {out} {err}");
            bundle.assert_gone();
        }
    }
    for command in ["checkpoint", "restore"] {
        let output = bundle.command(&[command, "--image-path", "x", &bundle.id]);
        assert!(!output.status.success(), "{command}");
        if is_corun() {
            assert!(String::from_utf8_lossy(&output.stderr).contains("not supported"), "{output:?}");
        }
    }
}

/// On a tree of ordinary files in place of the resctrl file system: its groups bring no files along and keep those that
/// were written.
#[test]
fn a_container_gets_its_share_of_caches_and_bandwidth() {
    if !is_corun() {
        return;
    }
    let tree = tempfile::tempdir().expect("a folder");
    let path = |name: &str| tree.path().join(name);
    let read = |name: &str| std::fs::read_to_string(path(name)).expect(name);
    let mut bundle = Bundle::new("exec sleep 100");
    bundle.environment = vec![("CORUN_RESCTRL".into(), tree.path().display().to_string())];
    let id = bundle.id.clone();
    let schemata = json!(["L3:0=f0;1=f", "L2:0=f"]);
    bundle.spec["linux"]["intelRdt"] =
        json!({"l3CacheSchema": "L3:0=f", "memBwSchema": "MB:0=20", "schemata": schemata});
    bundle.ok(&["run", "-d", &id]);
    let pid = bundle.state()["pid"].to_string();
    assert_eq!((read(&format!("{id}/tasks")), read(&format!("{id}/schemata"))), (pid.clone(), "L2:0=f\n".into()));
    bundle.ok(&["exec", &id, "true"]);
    assert_ne!(read(&format!("{id}/tasks")), pid, "what is added comes in, too");
    bundle.ok(&["update", "--l3-cache-schema", "L3:0=3", &id]);
    assert_eq!(read(&format!("{id}/schemata")), "L3:0=3\n");
    let event: Value = serde_json::from_str(&bundle.ok(&["events", "--stats", &id])).expect("JSON");
    assert_eq!(event["data"]["intel_rdt"]["l3_cache_schema"], "L3:0=3");
    for file in ["tasks", "schemata"] {
        std::fs::remove_file(path(&format!("{id}/{file}"))).expect("removes");
    }
    bundle.ok(&["delete", "-f", &id]);
    assert!(!path(&id).exists(), "the class made for it goes with it");

    std::fs::create_dir_all(path("class/mon_groups")).expect("a class");
    std::fs::write(path("class/schemata"), "    L3:0=0f0;1=fff\n    MB:0=100\n").expect("writes");
    bundle.spec["linux"]["intelRdt"] = json!({"closID": "class", "l3CacheSchema": "L3:0=f0", "enableMonitoring": true});
    bundle.ok(&["run", "-d", &id]);
    let tasks = (read("class/tasks"), read(&format!("class/mon_groups/{id}/tasks")));
    let pid = bundle.state()["pid"].to_string();
    assert_eq!(tasks, (pid.clone(), pid));
    std::fs::remove_file(path(&format!("class/mon_groups/{id}/tasks"))).expect("removes");
    bundle.ok(&["delete", "-f", &id]);
    assert!(path("class").exists() && !path(&format!("class/mon_groups/{id}")).exists());

    for (rdt, word) in [
        (json!({"closID": "class", "l3CacheSchema": "L3:0=f"}), "another value of L3 for cache 0"),
        (json!({"closID": "class", "schemata": ["L2:0=f"]}), "another value of L2"),
        (json!({"closID": "missing"}), "there is no class"),
        (json!({"closID": "../x"}), "closID"),
        (json!({"memBwSchema": "L3:0=f"}), "memBwSchema"),
        (json!({"schemata": ["L3:0=f\nMB:0=10"]}), "schemata"),
    ] {
        bundle.spec["linux"]["intelRdt"] = rdt;
        let (status, _, err) = bundle.run();
        assert!(status == 1 && err.contains(word), "{word}: {err}");
        bundle.assert_gone();
    }
    assert_eq!(std::fs::read_dir(tree.path()).expect("a folder").count(), 1, "nothing but the class is left");
    let features: Value = serde_json::from_str(&bundle.ok(&["features"])).expect("JSON");
    assert_eq!(features["linux"]["intelRdt"]["enabled"], true);
}

/// With programs of the user's own, below a folder that the user may reach.
#[test]
fn an_unprivileged_user_runs_containers() {
    const USER: u32 = 54_321;
    if !is_corun() {
        return;
    }
    let mut bundle = Bundle::new("id -u; cat /proc/self/uid_map");
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(bundle.folder.path(), PermissionsExt::from_mode(0o755)).expect("permissions");
    let program = bundle.folder.path().join("program");
    std::fs::copy(env!("CARGO_BIN_EXE_corun"), &program).expect("a copy");
    std::os::unix::fs::chown(bundle.folder.path(), Some(USER), Some(USER)).expect("chown");
    bundle.give_root_to(USER);
    let user = |words: &[&str]| {
        let user = USER.to_string();
        Command::new(coracle_testkit::need("setpriv", "util-linux"))
            .args(["--reuid", &user, "--regid", &user, "--clear-groups"])
            .arg(&program)
            .args(words)
            .env("XDG_RUNTIME_DIR", bundle.folder.path())
            .current_dir(bundle.folder.path())
            .output()
            .expect("it runs")
    };
    std::fs::remove_file(bundle.folder.path().join("config.json")).expect("removes");
    assert!(user(&["spec", "--rootless"]).status.success());
    let config = bundle.folder.path().join("config.json");
    let write = |script: &str| {
        let mut spec: Value = serde_json::from_slice(&std::fs::read(&config).expect("reads")).expect("JSON");
        spec["process"]["terminal"] = false.into();
        spec["process"]["args"] = json!(["sh", "-c", script]);
        std::fs::write(&config, spec.to_string()).expect("writes");
    };
    write("id -u; cat /proc/self/uid_map; exit 5");
    let output = user(&["run", &bundle.id]);
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    assert_eq!(out.split_whitespace().collect::<Vec<_>>(), ["0", "0", "54321", "1"]);
    write("exec sleep 100");
    let detached = Command::new("sh")
        .arg("-c")
        .arg(format!(
            "exec setpriv --reuid {USER} --regid {USER} --clear-groups {} run -d {} </dev/null >/dev/null 2>&1",
            program.display(),
            bundle.id
        ))
        .env("XDG_RUNTIME_DIR", bundle.folder.path())
        .current_dir(bundle.folder.path())
        .status()
        .expect("it runs");
    assert!(detached.success());
    let inside = user(&["exec", &bundle.id, "id", "-u"]);
    assert_eq!(String::from_utf8_lossy(&inside.stdout), "0\n", "{inside:?}");
    let removed = user(&["delete", "--force", &bundle.id]);
    assert!(removed.status.success(), "{removed:?}");
    assert!(!bundle.folder.path().join("corun").join(&bundle.id).exists());
    bundle.spec = json!({});
}

#[test]
fn answers_have_the_shape_and_the_status_that_callers_of_runc_know() {
    let mut bundle = Bundle::new("sleep 100");
    bundle.spec["annotations"] = json!({"org.example.key": "value"});
    bundle.ok(&["run", "-d", &bundle.id]);
    let state = bundle.state();
    for key in ["ociVersion", "id", "pid", "status", "bundle", "rootfs", "created", "owner", "annotations"] {
        assert!(!state[key].is_null(), "{key} in {state}");
    }
    let list: Value = serde_json::from_str(&bundle.ok(&["list", "-f", "json"])).expect("JSON");
    let row = list.as_array().expect("a list").iter().find(|row| row["id"] == bundle.id.as_str()).expect("a row");
    assert_eq!((&row["pid"], &row["owner"]), (&state["pid"], &json!("root")));
    let table = bundle.ok(&["list"]);
    let titles: Vec<_> = table.lines().next().expect("a title").split_whitespace().collect();
    assert_eq!(titles, ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]);
    let pids: Value = serde_json::from_str(&bundle.ok(&["ps", "-f", "json", &bundle.id])).expect("JSON");
    assert_eq!(pids, json!([state["pid"]]));
    assert!(bundle.ok(&["ps", &bundle.id, "-o", "pid,args"]).contains("sleep 100"));
    // Hosts that hold controllers in version 1 give Debian's runc nothing to tell.
    if is_corun() {
        let event: Value = serde_json::from_str(&bundle.ok(&["events", "--stats", &bundle.id])).expect("JSON");
        assert_eq!((&event["type"], &event["id"]), (&json!("stats"), &json!(bundle.id)));
        for path in
            ["/cpu/usage/total", "/memory/usage/usage", "/pids/current", "/blkio/ioServiceBytesRecursive", "/hugetlb"]
        {
            assert!(event["data"].pointer(path).is_some(), "{path} in {event}");
        }
        let features: Value = serde_json::from_str(&bundle.ok(&["features"])).expect("JSON");
        assert_eq!(features["ociVersionMax"], "1.3.0");
        assert_eq!(features["linux"]["netDevices"]["enabled"], true);
    }
    let status = |words: &[&str]| bundle.command(words).status.code();
    assert_eq!(status(&["exec", &bundle.id, "/no/such"]), Some(255));
    assert_eq!(status(&["exec", "no-such-container", "true"]), Some(255));
    assert_eq!(status(&["exec", &bundle.id, "sh", "-c", "kill -9 $$"]), Some(137));
    assert_eq!(status(&["state", "no-such-container"]), Some(1));
    assert_eq!(status(&["delete", "no-such-container"]), Some(1));
    assert_eq!(status(&["delete", "-f", "no-such-container"]), Some(0));
    assert_eq!(status(&["no-such-command"]), Some(3));
    assert_eq!(status(&["run", "--no-such-flag", "x"]), Some(1));
    assert_eq!(status(&["run"]), Some(1));
    bundle.ok(&["kill", &bundle.id, "SIGKILL"]);
    assert_eventually!(10, bundle.state()["status"] == "stopped");
    assert_eq!(status(&["kill", &bundle.id, "KILL"]), Some(1));
    assert_eq!(status(&["exec", &bundle.id, "true"]), Some(255));
    assert_eq!(status(&["start", &bundle.id]), Some(1));
    let version = runtime().arg("--version").output().expect("it runs");
    assert!(String::from_utf8_lossy(&version.stdout).contains("spec: "), "{version:?}");
}

/// Each with its own namespaces and cgroup, from one root.
#[test]
fn a_thousand_containers_live_at_once() {
    const COUNT: usize = 1000;
    const LANES: usize = 4;
    let bundle = Bundle::new("exec sleep 1000");
    std::fs::write(bundle.folder.path().join("config.json"), bundle.spec.to_string()).expect("writes");
    let state = bundle.folder.path().join("state");
    let all = |words: &[&str]| {
        std::thread::scope(|scope| {
            for lane in 0..LANES {
                let (bundle, state) = (&bundle, &state);
                scope.spawn(move || {
                    for number in (lane..COUNT).step_by(LANES) {
                        let status = runtime()
                            .arg("--root")
                            .arg(state)
                            .args(words)
                            .arg(format!("{}-{number}", bundle.id))
                            .current_dir(bundle.folder.path())
                            .stdin(std::process::Stdio::null())
                            .stdout(std::process::Stdio::null())
                            .status();
                        assert!(status.expect("it runs").success(), "{words:?} of container {number}");
                    }
                });
            }
        });
    };
    all(&["run", "-d"]);
    let listed: Value = serde_json::from_str(&bundle.ok(&["list", "-f", "json"])).expect("JSON");
    let running = listed.as_array().expect("a list").iter().filter(|row| row["status"] == "running").count();
    all(&["delete", "-f"]);
    assert_eq!(running, COUNT);
    assert_eq!(std::fs::read_dir(&state).map_or(0, Iterator::count), 0, "states that are left");
}

/// Two hundred that start at the same time leave nothing.
#[test]
fn many_containers_start_at_once() {
    const AT_ONCE: usize = 200;
    let bundle = Bundle::new("true");
    let config = bundle.folder.path().join("config.json");
    std::fs::write(&config, bundle.spec.to_string()).expect("writes");
    let state = bundle.folder.path().join("state");
    let mut started: Vec<_> = (0..AT_ONCE)
        .map(|number| {
            runtime()
                .arg("--root")
                .arg(&state)
                .args(["run", &format!("{}-{number}", bundle.id)])
                .current_dir(bundle.folder.path())
                .stdin(std::process::Stdio::null())
                .spawn()
                .expect("it starts")
        })
        .collect();
    let failed = started.iter_mut().filter_map(|child| child.wait().ok()).filter(|status| !status.success()).count();
    assert_eq!(failed, 0, "of {AT_ONCE}");
    assert_eq!(std::fs::read_dir(&state).map_or(0, Iterator::count), 0, "states that are left");
}
