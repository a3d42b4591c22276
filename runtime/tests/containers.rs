//! Real bundles on the real command: what the specification promises.

#[allow(dead_code, reason = "each test program uses its part of what is shared")]
mod common;

use common::{Bundle, is_corun};
use coracle_testkit::assert_eventually;
use serde_json::json;
use std::path::Path;

#[test]
fn run_gives_the_exit_status_and_leaves_nothing() {
    let bundle = Bundle::new("echo out; echo err >&2; exit 7");
    let (status, out, err) = bundle.run();
    assert_eq!((status, out.as_str(), err.as_str()), (7, "out\n", "err\n"));
    bundle.assert_gone();
    let bundle = Bundle::new("kill -9 $$");
    let (status, ..) = bundle.run();
    assert!([137, 0].contains(&status), "the first process ignores its own signals or dies of them: {status}");
}

#[test]
fn a_container_goes_through_its_states() {
    let bundle = Bundle::new("sleep 100");
    bundle.ok(&["create", &bundle.id]);
    assert_eq!(bundle.state()["status"], "created");
    assert!(!bundle.command(&["create", &bundle.id]).status.success(), "the id is taken");
    bundle.ok(&["start", &bundle.id]);
    assert_eq!(bundle.state()["status"], "running");
    assert!(!bundle.command(&["start", &bundle.id]).status.success(), "started twice");
    assert!(!bundle.command(&["delete", &bundle.id]).status.success(), "deleted while it runs");
    let out = bundle.ok(&[
        "exec",
        "-e",
        "FOO=1",
        "--cwd",
        "/bin",
        "-u",
        "5:6",
        &bundle.id,
        "sh",
        "-c",
        "id -u; pwd; echo $FOO",
    ]);
    assert_eq!(out, "5\n/bin\n1\n");
    assert_eq!(bundle.command(&["exec", &bundle.id, "sh", "-c", "exit 9"]).status.code(), Some(9));
    assert!(bundle.ok(&["list", "-q"]).contains(&bundle.id));
    if is_corun() {
        bundle.ok(&["pause", &bundle.id]);
        assert_eq!(bundle.state()["status"], "paused");
        bundle.ok(&["resume", &bundle.id]);
    }
    bundle.ok(&["kill", &bundle.id, "KILL"]);
    assert_eventually!(10, bundle.state()["status"] == "stopped");
    bundle.ok(&["delete", &bundle.id]);
    assert!(!bundle.command(&["state", &bundle.id]).status.success());
    bundle.assert_gone();
}

#[test]
fn a_failed_start_says_why_and_leaves_nothing() {
    type Change = fn(&mut serde_json::Value);
    let cases: [(&str, Change); 7] = [
        ("no-such-program", |spec| spec["process"]["args"] = json!(["no-such-program"])),
        ("no-such-source", |spec| {
            spec["mounts"] = json!([{"destination": "/x", "source": "/no-such-source", "options": ["bind"]}]);
        }),
        ("nosuchfs", |spec| spec["mounts"] = json!([{"destination": "/x", "type": "nosuchfs", "source": "x"}])),
        ("kernel", |spec| spec["linux"]["sysctl"] = json!({"kernel.panic": "1"})),
        ("no-such-root", |spec| spec["root"]["path"] = "no-such-root".into()),
        ("false", |spec| {
            spec["hooks"] = json!({"createRuntime": [{"path": "/bin/false"}]});
        }),
        ("cwd", |spec| spec["process"]["cwd"] = "relative".into()),
    ];
    for (word, change) in cases {
        let mut bundle = Bundle::new("true");
        change(&mut bundle.spec);
        let (status, _, err) = bundle.run();
        assert_ne!(status, 0, "{word}");
        // Others word some of it differently.
        assert!(!is_corun() || err.contains(word), "{word}: {err}");
        bundle.assert_gone();
    }
}

#[test]
fn a_limit_without_its_controller_names_it() {
    if !is_corun() || std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return;
    }
    let mut bundle = Bundle::new("true");
    bundle.spec["linux"]["resources"]["memory"] = json!({"limit": 1 << 20});
    let (status, _, err) = bundle.run();
    assert!(status == 1 && err.contains("controller memory") && err.contains("memory.max"), "{err}");
    bundle.assert_gone();
}

#[test]
fn a_user_namespace_maps_ids() {
    let mut bundle = Bundle::new("id -u; cat /proc/self/uid_map; cat /proc/self/oom_score_adj; echo x > /dev/null");
    bundle.spec["process"]["oomScoreAdj"] = 500.into();
    bundle.spec["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({"type": "user"}));
    for map in ["uidMappings", "gidMappings"] {
        bundle.spec["linux"][map] = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    }
    bundle.give_root_to(100_000);
    let (status, out, err) = bundle.run();
    assert_eq!(status, 0, "{err}");
    assert_eq!(out.split_whitespace().collect::<Vec<_>>(), ["0", "0", "100000", "65536", "500"]);
}

#[test]
fn a_time_namespace_has_offsets() {
    let mut bundle = Bundle::new("cat /proc/uptime");
    bundle.spec["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({"type": "time"}));
    bundle.spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000_000}});
    if is_corun() {
        let (status, out, err) = bundle.run();
        assert_eq!(status, 0, "{err}");
        let uptime: f64 = out.split_whitespace().next().expect("a number").parse().expect("a number");
        assert!(uptime > 1e9, "{uptime}");
    }
}

#[test]
fn hooks_run_in_order_with_the_state() {
    let mut bundle = Bundle::new("echo program");
    let log = bundle.folder.path().join("log");
    let hook = |name: &str, to: &str| json!([{"path": "/bin/sh", "args": ["sh", "-c", format!("(echo {name}; cat; echo) >> {to}")]}]);
    let host = log.to_str().expect("a path").to_string();
    bundle.spec["root"]["readonly"] = false.into();
    bundle.spec["hooks"] = json!({
        "createRuntime": hook("createRuntime", &host),
        "createContainer": hook("createContainer", &host),
        "startContainer": hook("startContainer", "/log"),
        "poststart": hook("poststart", &host),
        "poststop": hook("poststop", &host),
    });
    let (status, _, err) = bundle.run();
    assert_eq!(status, 0, "{err}");
    let log = std::fs::read_to_string(log).expect("the hooks wrote");
    let names: Vec<&str> = log.lines().filter(|line| !line.starts_with('{') && !line.is_empty()).collect();
    assert_eq!(names, ["createRuntime", "createContainer", "poststart", "poststop"]);
    assert!(log.contains(&format!("\"id\":\"{}\"", bundle.id)), "{log}");
    let inside = std::fs::read_to_string(bundle.root().join("log")).expect("the hook wrote inside");
    assert!(inside.starts_with("startContainer"), "{inside}");
}

/// What an image has in a hook's place is as little trusted as its program.
#[test]
fn hooks_in_the_container_are_confined_as_its_program() {
    let mut bundle = Bundle::new("true");
    bundle.program(
        "hook",
        "#!/bin/sh\n(grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status; mkdir /tmp/x 2>&1; readlink /proc/self/ns/pid) > /tmp/log\n",
    );
    bundle.spec["root"]["readonly"] = false.into();
    bundle.spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}],
    });
    for name in ["bounding", "effective", "permitted"] {
        bundle.spec["process"]["capabilities"][name] = json!(["CAP_KILL"]);
    }
    let tmp = bundle.root().join("tmp");
    std::fs::create_dir(&tmp).expect("a folder");
    bundle.spec["process"]["args"] = json!(["sh", "-c", "readlink /proc/self/ns/pid"]);
    bundle.spec["hooks"] = json!({"startContainer": [{"path": "/hook"}]});
    let (status, out, err) = bundle.run();
    let log = std::fs::read_to_string(tmp.join("log")).unwrap_or_else(|error| panic!("{error}: {err}"));
    assert_eq!(status, 0, "{err}");
    assert!(log.contains("CapEff:\t0000000000000020\nNoNewPrivs:\t1\nSeccomp:\t2\n"), "{log}");
    assert!(log.contains("No space left"), "{log}");
    if is_corun() {
        assert!(log.ends_with(&out), "{log} {out}");
    }
}

#[test]
fn seccomp_answers_as_the_profile_says() {
    let mut bundle = Bundle::new("mkdir /tmp/x 2>&1; echo $?");
    bundle.spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}],
    });
    for no_new_privileges in [true, false] {
        bundle.spec["process"]["noNewPrivileges"] = no_new_privileges.into();
        let (_, out, err) = bundle.run();
        assert!(out.contains("No space left"), "{out} {err}");
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn calls_newer_than_the_profile_do_not_exist() {
    const NEWER_CALL: u32 = 4000;
    let mut bundle = Bundle::new("true");
    // Its status says both answers: 1 for EPERM to mkdir (83), which is refused, 2 for ENOSYS to the other.
    let source = format!(
        "static long call(long n) {{ long r; __asm__ volatile(\"syscall\" : \"=a\"(r) : \"a\"(n), \"D\"(0) : \"rcx\", \"r11\"); return r; }}
         void _start(void) {{ long s = (call(83) == -1) + 2 * (call({NEWER_CALL}) == -38);
         __asm__ volatile(\"syscall\" : : \"a\"(60L), \"D\"(s)); }}"
    );
    let file = bundle.folder.path().join("calls.c");
    std::fs::write(&file, source).expect("a program");
    let cc = std::process::Command::new(coracle_testkit::need("cc", "gcc"))
        .args(["-nostdlib", "-static", "-fno-stack-protector", "-o"])
        .arg(bundle.root().join("calls"))
        .arg(&file)
        .status();
    assert!(cc.expect("the compiler").success());
    let mut profile = coracle_runtime::seccomp::default_profile(&std::collections::HashSet::new());
    profile.set_default_errno_ret(Some(1));
    let mut profile = serde_json::to_value(profile).expect("JSON");
    profile["syscalls"][0]["names"].as_array_mut().expect("names").retain(|name| name != "mkdir");
    bundle.spec["linux"]["seccomp"] = profile;
    bundle.spec["process"]["args"] = json!(["/calls"]);
    let (status, _, err) = bundle.run();
    assert_eq!(status, 3, "{err}");
}

#[test]
fn the_configuration_is_applied() {
    let mut bundle = Bundle::new(
        "hostname; cat /proc/sys/net/ipv4/ip_forward; ulimit -n; umask; cat /proc/self/oom_score_adj; \
         cat /tmp/file; touch /ro/x 2>/dev/null || echo read-only; grep -c . /proc/keys; id -G",
    );
    std::fs::write(bundle.folder.path().join("file"), "bound\n").expect("a file");
    bundle.spec["hostname"] = "vessel".into();
    bundle.spec["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1"});
    bundle.spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 78}]);
    bundle.spec["process"]["user"] = json!({"uid": 0, "gid": 0, "umask": 0o27, "additionalGids": [5, 6]});
    bundle.spec["process"]["oomScoreAdj"] = 500.into();
    bundle.spec["root"]["readonly"] = false.into();
    bundle.mount(json!({"destination": "/tmp/file", "type": "bind", "source": "file", "options": ["bind", "ro"]}));
    bundle.mount(json!({"destination": "/ro", "type": "tmpfs", "source": "tmpfs", "options": ["ro"]}));
    let (status, out, err) = bundle.run();
    let got: Vec<&str> = out.lines().collect();
    assert_eq!(got, ["vessel", "1", "77", "0027", "500", "bound", "read-only", "0", "0 5 6"], "{status} {err}");
}

/// It would never come to run.
#[test]
fn a_frozen_cgroup_is_refused() {
    if !is_corun() {
        // One as old as 1.1.5 waits for ever.
        return;
    }
    let mut bundle = Bundle::new("true");
    let top =
        if Path::new("/sys/fs/cgroup/cgroup.procs").exists() { "/sys/fs/cgroup" } else { "/sys/fs/cgroup/unified" };
    let folder = Path::new(top).join(format!("frozen-{}", bundle.id));
    std::fs::create_dir(&folder).expect("a cgroup");
    std::fs::write(folder.join("cgroup.freeze"), "1").expect("freezes");
    bundle.spec["linux"]["cgroupsPath"] = json!(format!("/frozen-{}", bundle.id));
    let (status, _, err) = bundle.run();
    // Taken away before anything is said about it.
    let left = std::fs::remove_dir(&folder);
    assert!(status == 1 && err.contains("frozen"), "{status} {err}");
    left.expect("a cgroup of somebody else's stays");
}

#[test]
fn a_terminal_leaves_line_ends_to_the_callers() {
    if !is_corun() {
        // It wants to run on a terminal itself.
        return;
    }
    let mut bundle = Bundle::new("echo line; test -t 1 && echo terminal");
    bundle.spec["process"]["terminal"] = true.into();
    let (status, out, err) = bundle.run();
    assert_eq!((status, out.as_str()), (0, "line\nterminal\n"), "{err}");
}

#[test]
fn sources_that_an_earlier_mount_brings_are_found() {
    const FIRST: u32 = 100_000;
    for (user, mapped, owner) in [(false, false, 0), (true, false, 65534), (false, true, FIRST), (true, true, 0)] {
        if (user || mapped) && !is_corun() {
            // Another runtime may be older than id-mapped mounts, and reach sources by their paths.
            continue;
        }
        let mut bundle = Bundle::new("cat /final/file; stat -c %u /final/file");
        let source = bundle.folder.path().join("source/x");
        std::fs::create_dir_all(&source).expect("a folder");
        std::fs::write(source.join("file"), "brought\n").expect("a file");
        let maps = json!([{"containerID": 0, "hostID": FIRST, "size": 1000}]);
        if user {
            bundle.give_root_to(FIRST);
            bundle.spec["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({"type": "user"}));
            bundle.spec["linux"]["uidMappings"] = maps.clone();
            bundle.spec["linux"]["gidMappings"] = maps.clone();
        }
        bundle.mount(json!({"destination": "/mnt", "type": "bind", "source": "source", "options": ["bind"]}));
        let mut last = json!({"destination": "/final", "type": "bind", "source": bundle.root().join("mnt/x"), "options": ["rbind"]});
        if mapped {
            last["uidMappings"] = maps.clone();
            last["gidMappings"] = maps;
        }
        bundle.mount(last);
        let (status, out, err) = bundle.run();
        assert_eq!((status, out), (0, format!("brought\n{owner}\n")), "{user} {mapped}: {err}");
    }
}

#[test]
fn copy_up_keeps_what_the_image_has() {
    let mut bundle =
        Bundle::new("cat /data/deep/file; readlink /data/link; stat -c %a /data/deep; echo new > /data/deep/file");
    let deep = bundle.root().join("data/deep");
    std::fs::create_dir_all(&deep).expect("a folder");
    std::fs::write(deep.join("file"), "image\n").expect("a file");
    std::os::unix::fs::symlink("deep/file", bundle.root().join("data/link")).expect("a link");
    bundle.mount(json!({"destination": "/data", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"]}));
    let (status, out, err) = bundle.run();
    assert_eq!((status, out.as_str()), (0, "image\ndeep/file\n755\n"), "{err}");
    assert_eq!(std::fs::read_to_string(deep.join("file")).expect("a file"), "image\n");
}

#[test]
fn namespaces_of_another_container_are_joined() {
    let mut first = Bundle::new("sleep 100");
    first.spec["hostname"] = "shared".into();
    first.spec["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({"type": "user"}));
    for map in ["uidMappings", "gidMappings"] {
        first.spec["linux"][map] = json!([{"containerID": 0, "hostID": 200_000, "size": 65_536}]);
    }
    first.give_root_to(200_000);
    first.ok(&["run", "-d", &first.id]);
    let pid = first.state()["pid"].as_i64().expect("a number");
    let mut second = Bundle::new("hostname; cat /proc/self/uid_map; sleep 0; ps | wc -l");
    second.spec["hostname"] = json!(null);
    for map in ["uidMappings", "gidMappings"] {
        second.spec["linux"][map] = first.spec["linux"][map].clone();
    }
    second.spec["linux"]["namespaces"] = json!([
        {"type": "user", "path": format!("/proc/{pid}/ns/user")},
        {"type": "uts", "path": format!("/proc/{pid}/ns/uts")},
        {"type": "network", "path": format!("/proc/{pid}/ns/net")},
        {"type": "ipc", "path": format!("/proc/{pid}/ns/ipc")},
        {"type": "pid"}, {"type": "mount"}, {"type": "cgroup"},
    ]);
    second.give_root_to(200_000);
    let (status, out, err) = second.run();
    assert_eq!(status, 0, "{err}");
    let mut lines = out.lines();
    assert_eq!(lines.next(), Some("shared"), "{out}");
    assert!(lines.next().expect("a map").contains("200000"), "{out}");
}

#[test]
fn a_failure_after_any_step_leaves_nothing() {
    if !is_corun() {
        return;
    }
    let mut failed = 0;
    for step in 0..coracle_runtime::Step::ALL.len() {
        let mut bundle = Bundle::new("true");
        bundle.environment = vec![("CORUN_FAIL_STEP".into(), step.to_string())];
        bundle.spec["hostname"] = "vessel".into();
        bundle.spec["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1"});
        bundle.spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW"});
        bundle.spec["process"]["oomScoreAdj"] = 500.into();
        let (status, _, err) = bundle.run();
        if status != 0 {
            failed += 1;
            let name = coracle_runtime::Step::ALL[step].to_string();
            assert!(err.contains("I/O error") && err.contains(&name), "{name}: {err}");
        }
        bundle.assert_gone();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        assert!(!mounts.contains(&*bundle.folder.path().to_string_lossy()), "a mount is left after step {step}");
        let left = std::process::Command::new("ps").args(["-eo", "args"]).output().expect("ps");
        assert!(!String::from_utf8_lossy(&left.stdout).contains(&bundle.id), "a process is left after step {step}");
    }
    assert!(failed >= 25, "only {failed} steps were reached");
}

#[test]
fn devices_names_and_propagation_are_as_configured() {
    let mut bundle = Bundle::new(
        "stat -c '%F %a %u %g' /dev/extra /dev/pipe; cat /proc/sys/kernel/domainname; grep -c ' / r[ow].* shared:' /proc/self/mountinfo",
    );
    bundle.spec["linux"]["devices"] = json!([
        {"path": "/dev/extra", "type": "c", "major": 1, "minor": 3, "fileMode": 0o660, "uid": 5, "gid": 6},
        {"path": "/dev/pipe", "type": "p", "fileMode": 0o600},
    ]);
    bundle.spec["domainname"] = "example.net".into();
    bundle.spec["linux"]["rootfsPropagation"] = "shared".into();
    let (status, out, err) = bundle.run();
    if is_corun() {
        let wanted = "character special file 660 5 6\nfifo 600 0 0\nexample.net\n1\n";
        assert_eq!((status, out.as_str()), (0, wanted), "{err}");
    }
}

/// The host's sysfs has mounts below it on every host.
#[test]
fn attributes_hold_for_the_mounts_below() {
    for (option, writable) in [("rro", "0"), ("rw", "1")] {
        let mut bundle = Bundle::new(
            "grep ' /below/fs/cgroup' /proc/mounts | grep -q ' rw,'; echo $((1 - $?)); grep -c ' /below' /proc/mounts",
        );
        bundle.mount(json!({"destination": "/below", "type": "bind", "source": "/sys", "options": ["rbind", option]}));
        let (status, out, err) = bundle.run();
        let mut lines = out.lines();
        assert_eq!((status, lines.next()), (0, Some(writable)), "{option}: {out} {err}");
        assert!(lines.next().and_then(|count| count.parse().ok()).is_some_and(|count: u32| count > 1), "{out}");
    }
}

#[test]
fn a_hook_that_takes_too_long_is_ended() {
    let mut bundle = Bundle::new("true");
    bundle.spec["hooks"] = json!({"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}]});
    let (status, _, err) = bundle.run();
    assert!(status != 0 && (!is_corun() || err.contains("/bin/sleep did not end within 1 s")), "{err}");
    bundle.assert_gone();
}

#[test]
fn descriptors_that_were_asked_for_are_inherited() {
    let bundle = Bundle::new("cat <&3; ls /proc/self/fd | wc -l");
    std::fs::write(bundle.folder.path().join("config.json"), bundle.spec.to_string()).expect("the specification");
    std::fs::write(bundle.folder.path().join("given"), "given\n").expect("a file");
    let runtime = common::runtime();
    let script = format!(
        "exec {} --root state run --preserve-fds 1 {} 3<given 4<given",
        runtime.get_program().display(),
        bundle.id
    );
    let output = std::process::Command::new("sh").args(["-c", &script]).current_dir(bundle.folder.path()).output();
    let output = output.expect("it runs");
    // 0 to 3, and the one with which ls reads the folder.
    assert_eq!(String::from_utf8_lossy(&output.stdout), "given\n5\n", "{output:?}");
}

#[test]
fn a_terminal_goes_to_the_console_socket() {
    use std::io::Read;
    use std::os::fd::AsFd;
    let mut bundle = Bundle::new("busybox stty size; tty; exec sleep 100");
    bundle.spec["process"]["terminal"] = true.into();
    bundle.spec["process"]["consoleSize"] = json!({"height": 33, "width": 44});
    let socket = bundle.folder.path().join("console");
    let listener = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
    let master = std::thread::scope(|scope| {
        let master = scope.spawn(|| {
            let (stream, _) = listener.accept().expect("the runtime");
            coracle_sys::channel::receive(stream.as_fd(), &mut [0; 4096], true).expect("a message").1
        });
        bundle.ok(&["run", "-d", "--console-socket", socket.to_str().expect("a path"), &bundle.id]);
        master.join().expect("a terminal").expect("a descriptor")
    });
    let (mut terminal, mut text) = (std::fs::File::from(master), String::new());
    while text.lines().count() < 2 || !text.ends_with('\n') {
        let mut bytes = [0; 256];
        let length = terminal.read(&mut bytes).expect("reads");
        text.push_str(&String::from_utf8_lossy(&bytes[..length]));
    }
    assert_eq!(text, "33 44\r\n/dev/pts/0\r\n");
}
