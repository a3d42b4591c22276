//! What engines and people are used to from runc, where the specification leaves it open, and ways of use that are rare.

#[allow(dead_code, reason = "each test program uses its part of what is shared")]
mod common;

use common::{Bundle, is_corun};
use coracle_testkit::assert_eventually;
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

fn with_user_namespace(bundle: &mut Bundle) {
    bundle.spec["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({"type": "user"}));
    for map in ["uidMappings", "gidMappings"] {
        bundle.spec["linux"][map] = json!([{"containerID": 0, "hostID": 300_000, "size": 65_536}]);
    }
    bundle.give_root_to(300_000);
}

/// Makes every namespace but that of mounts one of the process `pid`.
fn joined(spec: &mut Value, pid: &Value) {
    for namespace in spec["linux"]["namespaces"].as_array_mut().expect("a list") {
        let name = match namespace["type"].as_str().expect("a type") {
            "mount" => continue,
            "network" => "net".to_string(),
            other => other.to_string(),
        };
        namespace["path"] = format!("/proc/{pid}/ns/{name}").into();
    }
    let linux = spec["linux"].as_object_mut().expect("an object");
    for field in ["uidMappings", "gidMappings", "timeOffsets"] {
        linux.remove(field);
    }
    spec.as_object_mut().expect("an object").remove("hostname");
}

/// The user's, the process ids' and the time's are the ones that depend on each other.
#[test]
fn every_namespace_of_another_container_is_joined() {
    if !is_corun() {
        return;
    }
    let mut first = Bundle::new("exec sleep 100");
    first.spec["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({"type": "time"}));
    first.spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000_000}});
    with_user_namespace(&mut first);
    first.ok(&["run", "-d", &first.id]);
    let pid = first.state()["pid"].clone();
    let mut second = Bundle::new("cat /proc/uptime; ps; cat /mapped/file; stat -c %u /mapped/file");
    second.spec["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({"type": "time"}));
    with_user_namespace(&mut second);
    joined(&mut second.spec, &pid);
    // The maps of a mount that names none are those of the namespace that is joined.
    std::fs::create_dir(second.folder.path().join("mapped")).expect("a folder");
    std::fs::write(second.folder.path().join("mapped/file"), "bound\n").expect("a file");
    second.mount(json!({"destination": "/mapped", "type": "bind", "source": "mapped", "options": ["bind", "idmap"]}));
    let (status, out, err) = second.run();
    assert_eq!(status, 0, "{err}");
    assert!(out.starts_with("10000"), "the uptime of the first: {out}");
    assert!(out.contains("sleep 100") && out.ends_with("bound\n0\n"), "its processes, and owners as inside: {out}");
}

/// A network namespace that the host made can be joined from a user namespace that has no rights over it.
#[test]
fn a_namespace_of_the_hosts_is_joined_from_a_user_namespace() {
    if !is_corun() {
        return;
    }
    let mut owner = Bundle::new("exec sleep 100");
    owner.ok(&["run", "-d", &owner.id]);
    let path = format!("/proc/{}/ns/net", owner.state()["pid"]);
    owner.spec = json!({});
    let mut bundle = Bundle::new("readlink /proc/self/ns/net");
    with_user_namespace(&mut bundle);
    for namespace in bundle.spec["linux"]["namespaces"].as_array_mut().expect("a list") {
        if namespace["type"] == "network" {
            namespace["path"] = path.clone().into();
        }
    }
    // The kernel gives sysfs to those alone whose network it shows.
    bundle.without_mount("/sys");
    let (status, out, err) = bundle.run();
    assert_eq!(status, 0, "{err}");
    assert_eq!(out.trim(), std::fs::read_link(path).expect("a link").to_str().expect("text"));
}

fn agent(bundle: &mut Bundle) -> UnixListener {
    let socket: PathBuf = bundle.folder.path().join("agent");
    bundle.spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "listenerPath": socket,
        "listenerMetadata": "of the test",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}],
    });
    UnixListener::bind(socket).expect("a socket")
}

/// What the agent was told; the descriptor that came with it is closed again, as when the agent ends.
fn told(agent: &UnixListener) -> Value {
    use std::io::Read;
    let mut text = String::new();
    agent.accept().expect("the runtime").0.read_to_string(&mut text).expect("reads");
    serde_json::from_str(&text).expect("JSON")
}

/// Calls that an agent will never answer fail; nobody else keeps them waiting.
#[test]
fn seccomp_calls_end_with_their_agent() {
    for created in [false, true] {
        let mut bundle = Bundle::new("mkdir /dev/shm/x 2> /dev/shm/said; echo $? >> /dev/shm/said; exec sleep 100");
        let agent = agent(&mut bundle);
        let told = std::thread::scope(|scope| {
            let told = scope.spawn(|| told(&agent));
            if created {
                bundle.ok(&["create", &bundle.id]);
                bundle.ok(&["start", &bundle.id]);
            } else {
                bundle.ok(&["run", "-d", &bundle.id]);
            }
            told.join().expect("the agent")
        });
        assert_eq!((&told["metadata"], &told["fds"]), (&json!("of the test"), &json!(["seccompFd"])), "{told}");
        assert_eq!((&told["state"]["id"], &told["pid"]), (&json!(bundle.id), &told["state"]["pid"]), "{told}");
        let said = || {
            String::from_utf8_lossy(&bundle.command(&["exec", &bundle.id, "cat", "/dev/shm/said"]).stdout).into_owned()
        };
        assert_eventually!(20, said().ends_with("1\n"));
        assert!(said().contains("not implemented"), "{}", said());
        agent.set_nonblocking(true).expect("a socket");
    }
}

#[test]
fn mounts_are_made_in_order_and_take_over_what_they_cover() {
    let mut bundle = Bundle::new("cat /seen/file; stat -c %a /covered /new /named; grep -c ' /covered ' /proc/mounts");
    let root = bundle.root();
    for name in ["covered", "first", "seen"] {
        std::fs::create_dir(root.join(name)).expect("a folder");
    }
    std::fs::set_permissions(root.join("covered"), PermissionsExt::from_mode(0o710)).expect("permissions");
    std::fs::create_dir(bundle.folder.path().join("volume")).expect("a folder");
    std::fs::write(bundle.folder.path().join("volume/file"), "of the volume\n").expect("a file");
    bundle.spec["root"]["readonly"] = false.into();
    bundle.mount(json!({"destination": "/first", "type": "bind", "source": "volume", "options": ["bind"]}));
    // From within the root, where only the mount before has it.
    let source = root.join("first/file");
    std::fs::write(root.join("seen/file"), "of the image\n").expect("a file");
    bundle.mount(json!({"destination": "/seen/file", "type": "bind", "source": source, "options": ["bind"]}));
    for (name, options) in [("covered", json!([])), ("new", json!([])), ("named", json!(["mode=1500"]))] {
        bundle
            .mount(json!({"destination": format!("/{name}"), "type": "tmpfs", "source": "tmpfs", "options": options}));
    }
    let (status, out, err) = bundle.run();
    assert_eq!((status, out.as_str()), (0, "of the volume\n710\n1777\n1500\n1\n"), "{err}");
}

#[test]
fn a_path_masked_twice_is_covered_once() {
    let mut bundle = Bundle::new("grep -c ' /secret ' /proc/mounts");
    std::fs::create_dir(bundle.root().join("secret")).expect("a folder");
    bundle.spec["linux"]["maskedPaths"] = json!(["/secret", "/secret/", "/x/../secret"]);
    if is_corun() {
        assert_eq!(bundle.run().1, "1\n");
    }
}

#[test]
fn hooks_in_the_container_have_the_environment_of_the_program() {
    if !is_corun() {
        return;
    }
    let mut bundle = Bundle::new("true");
    bundle.program("hook", "#!/bin/sh -u\necho $ONE $HOME > /log\n");
    bundle.spec["root"]["readonly"] = false.into();
    bundle.spec["process"]["env"].as_array_mut().expect("a list").push("ONE=two".into());
    bundle.spec["hooks"] = json!({"startContainer": [{"path": "/hook"}]});
    for words in [&["run"][..], &["create", "start"]] {
        let _ = std::fs::remove_file(bundle.root().join("log"));
        for word in words {
            bundle.ok(&[word, &bundle.id]);
        }
        assert_eq!(std::fs::read_to_string(bundle.root().join("log")).expect("the hook wrote"), "two /\n");
    }
}

/// A file that only its group may execute, and a user outside with the right to pass over that.
#[test]
fn programs_are_found_with_the_rights_of_the_program() {
    let mut bundle = Bundle::new("true");
    bundle.program("tool", "#!/bin/sh\necho ran\n");
    std::fs::set_permissions(bundle.root().join("tool"), PermissionsExt::from_mode(0o750)).expect("permissions");
    bundle.spec["process"]["args"] = json!(["/tool"]);
    bundle.spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    assert_ne!(bundle.run().0, 0, "without the right");
    for set in ["bounding", "effective", "permitted", "inheritable", "ambient"] {
        bundle.spec["process"]["capabilities"][set] = json!(["CAP_DAC_OVERRIDE"]);
    }
    let (status, out, err) = bundle.run();
    assert_eq!((status, out.as_str()), (0, "ran\n"), "{err}");
}

#[test]
fn a_process_is_described_by_as_little_as_the_specification_asks() {
    let bundle = Bundle::new("exec sleep 100");
    bundle.ok(&["run", "-d", &bundle.id]);
    let file = bundle.folder.path().join("process.json");
    let process = json!({
        "args": ["cat", "/proc/self/sched_policy", "/proc/self/stat"], "cwd": "/", "env": ["PATH=/bin"],
        "ioPriority": {"class": "IOPRIO_CLASS_BE"},
        "scheduler": {"policy": "SCHED_OTHER", "flags": ["SCHED_FLAG_RESET_ON_FORK"]},
    });
    std::fs::write(&file, process.to_string()).expect("a file");
    if is_corun() {
        let output = bundle.command(&["exec", "--process", file.to_str().expect("a path"), &bundle.id]);
        assert!(String::from_utf8_lossy(&output.stdout).contains("(cat)"), "{output:?}");
    }
}

/// What outlives the first process of a container in the host's PID namespace is still killed.
#[test]
fn a_container_without_its_first_process_is_killed() {
    let mut bundle = Bundle::new("sleep 1000 & sleep 1000 & exec sleep 1000");
    bundle.spec["linux"]["namespaces"].as_array_mut().expect("a list").retain(|namespace| namespace["type"] != "pid");
    bundle.ok(&["run", "-d", &bundle.id]);
    let listed = || serde_json::from_str::<Option<Vec<i32>>>(&bundle.ok(&["ps", "-f", "json", &bundle.id]));
    let pids = || listed().expect("a list").unwrap_or_default();
    assert_eventually!(10, pids().len() == 3);
    let first = bundle.state()["pid"].as_i64().expect("a number") as i32;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(first), nix::sys::signal::Signal::SIGKILL).expect("a signal");
    assert_eventually!(10, bundle.state()["status"] == "stopped");
    bundle.ok(&["kill", &bundle.id, "KILL"]);
    assert_eventually!(10, pids().is_empty());
    let output = bundle.command(&["kill", &bundle.id, "KILL"]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    let known = !output.status.success() && told.contains("container not running");
    assert!(known || !is_corun(), "engines know these words: {told}");
}

#[test]
fn a_command_stays_in_the_cgroup_of_its_container() {
    let bundle = Bundle::new("exec sleep 100");
    bundle.ok(&["run", "-d", &bundle.id]);
    for below in ["..", "/../..", "x/../.."] {
        let output = bundle.command(&["exec", "--cgroup", below, &bundle.id, "true"]);
        assert!(!output.status.success(), "{below}");
    }
}

/// As an init system in a container does, that moves aside and hands controllers down.
#[test]
fn a_command_follows_the_first_process_within_the_cgroup() {
    let mut bundle = Bundle::new(
        "cd /sys/fs/cgroup; mkdir below; echo 1 > below/cgroup.procs; read -r one others < cgroup.controllers; \
         test -z \"$one\" || echo +$one > cgroup.subtree_control; touch /tmp/moved; exec sleep 100",
    );
    std::fs::create_dir(bundle.root().join("tmp")).expect("a folder");
    bundle.spec["root"]["readonly"] = false.into();
    for mount in bundle.spec["mounts"].as_array_mut().expect("mounts") {
        if mount["destination"] == "/sys/fs/cgroup" {
            mount["options"] = json!(["rw"]);
        }
    }
    bundle.ok(&["run", "-d", &bundle.id]);
    assert_eventually!(30, bundle.root().join("tmp/moved").exists());
    let output = bundle.command(&[
        "exec",
        &bundle.id,
        "sh",
        "-c",
        "grep -c . /sys/fs/cgroup/cgroup.subtree_control; cat /proc/self/cgroup",
    ]);
    let out = String::from_utf8_lossy(&output.stdout);
    let own = out.lines().find(|line| line.starts_with("0::")).unwrap_or_else(|| panic!("{output:?}"));
    // Without a controller to hand down, both places take processes.
    let handed_down = out.lines().next() == Some("1");
    assert_eq!(own, if handed_down { "0::/below" } else { "0::/" }, "{out}");
    let exact = bundle.command(&["exec", "--cgroup", "/", &bundle.id, "true"]);
    assert_eq!(exact.status.success(), !handed_down, "{exact:?}");
}

/// Neither what the maker was given by accident nor what it opened itself.
#[test]
fn a_container_that_waits_holds_no_descriptors_of_its_maker() {
    if !is_corun() {
        return;
    }
    let bundle = Bundle::new("true");
    let config = bundle.folder.path().join("config.json");
    std::fs::write(config, bundle.spec.to_string()).expect("the specification");
    let state = bundle.folder.path().join("state");
    let script = format!(
        "exec {} --root {} create {} 7</etc/passwd 9<.",
        env!("CARGO_BIN_EXE_corun"),
        state.display(),
        bundle.id
    );
    let status = std::process::Command::new("sh")
        .args(["-c", &script])
        .current_dir(bundle.folder.path())
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status();
    assert!(status.expect("it runs").success());
    let open = std::fs::read_dir(format!("/proc/{}/fd", bundle.state()["pid"])).expect("a folder");
    let mut links: Vec<String> = open
        .map(|entry| std::fs::read_link(entry.expect("an entry").path()).expect("a link").display().to_string())
        .filter(|link| !link.starts_with("socket:"))
        .collect();
    links.dedup();
    assert_eq!(links, ["/dev/null"]);
}

#[test]
fn ambient_capabilities_that_cannot_be_had_are_told() {
    let mut bundle = Bundle::new("grep CapAmb /proc/self/status");
    for set in ["bounding", "effective", "permitted", "ambient"] {
        bundle.spec["process"]["capabilities"][set] = json!(["CAP_KILL", "CAP_CHOWN"]);
    }
    bundle.spec["process"]["capabilities"]["inheritable"] = json!(["CAP_KILL"]);
    if is_corun() {
        let (status, out, err) = bundle.run();
        assert_eq!((status, out.as_str()), (0, "CapAmb:\t0000000000000020\n"), "{err}");
        assert!(err.contains("CAP_CHOWN") && !err.contains("CAP_KILL"), "{err}");
    }
    let output = {
        bundle.spec["process"]["args"] = json!(["sleep", "100"]);
        bundle.ok(&["run", "-d", &bundle.id]);
        bundle.ok(&[
            "exec",
            "--cap",
            "CAP_SYS_TIME",
            "--cap",
            "CAP_KILL",
            &bundle.id,
            "grep",
            "CapAmb",
            "/proc/self/status",
        ])
    };
    assert!(!is_corun() || output == "CapAmb:\t0000000000000020\n", "{output}");
}

#[test]
fn the_command_explains_itself() {
    if !is_corun() {
        return;
    }
    let bundle = Bundle::new("true");
    for words in [&["-h"][..], &["help"], &["run", "-h"], &["checkpoint", "--help"], &["help", "exec"]] {
        assert!(bundle.ok(words).contains("Usage: corun"), "{words:?}");
    }
    assert!(bundle.ok(&["exec", "--help"]).contains("--preserve-fds VALUE"));
    assert_eq!(bundle.command(&["help", "no-such-command"]).status.code(), Some(3));
    let log = bundle.folder.path().join("log");
    bundle.ok(&["--debug", "--log", "log", "--log-format", "json", "run", &bundle.id]);
    let lines = std::fs::read_to_string(&log).expect("a log");
    let levels: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(levels.len() > 1 && levels.iter().all(|line| line["level"] == "debug"), "{lines}");
    assert!(String::from_utf8_lossy(&bundle.command(&["--debug", "run", &bundle.id]).stderr).contains("level=debug"));
    let mut broken = Bundle::new("true");
    broken.spec["linux"]["memoryPolicy"] = json!({});
    let (_, _, err) = broken.run();
    assert_eq!(err.matches("missing field").count(), 1, "said once: {err}");
    bundle.ok(&["create", &bundle.id]);
    let state = bundle.ok(&["state", &bundle.id]);
    let keys = ["ociVersion", "id", "pid", "status", "bundle", "rootfs", "created", "owner"];
    assert!(keys.map(|key| state.find(&format!("\"{key}\":")).expect(key)).is_sorted(), "{state}");
}
