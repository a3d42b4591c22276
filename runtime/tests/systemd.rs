//! `--systemd-cgroup` with a real systemd: the first process of namespaces of its own, which runs one service, the test's
//! script, and ends with it.

#[allow(dead_code, reason = "each test program uses its part of what is shared")]
mod common;

use std::process::Command;

use common::Bundle;
use coracle_testkit::need;

/// Runs a script as systemd's only service; returns what it printed.
fn in_systemd(bundle: &Bundle, script: &str) -> String {
    need("systemctl", "systemd");
    let folder = bundle.folder.path().display().to_string();
    std::fs::write(bundle.folder.path().join("config.json"), bundle.spec.to_string()).expect("the specification");
    std::fs::write(bundle.folder.path().join("script"), script).expect("the script");
    let service = format!(
        "[Unit]\nDefaultDependencies=no\nSuccessAction=exit-force\nFailureAction=exit-force\n\
         [Service]\nType=oneshot\nWorkingDirectory={folder}\nExecStart=/bin/sh -e script\nEnvironment=R='{} --systemd-cgroup --root {folder}/state'\n\
         StandardOutput=append:{folder}/told\nStandardError=append:{folder}/told\n",
        env!("CARGO_BIN_EXE_corun")
    );
    std::fs::write(bundle.folder.path().join("test.service"), service).expect("the unit");
    let boot = "echo 0 > $G/cgroup.procs; exec unshare --cgroup sh -ec '
        umount /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; mount -t proc proc /proc
        mount -t tmpfs none /run; mkdir -p /run/systemd/system; cp $FOLDER/test.service /run/systemd/system/
        export container=test SYSTEMD_UNIT_PATH=/run/systemd/system: SYSTEMD_GENERATOR_PATH=/nonexistent
        S=/usr/lib/systemd/systemd; [ -x $S ] || S=/lib/systemd/systemd
        exec $S --system --unit=test.service --log-target=console --show-status=no'";
    let host = "umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup
        export G=/sys/fs/cgroup/corun-systemd-$$; mkdir $G
        unshare --mount --pid --fork sh -ec \"$BOOT\" || echo systemd ended with $?
        find $G -depth -type d -exec rmdir {} +";
    let output = Command::new(need("unshare", "util-linux"))
        .args(["--mount", "--net", "--uts", "--ipc", "timeout", "60", "sh", "-ec", host])
        .env("FOLDER", &folder)
        .env("BOOT", boot)
        .output()
        .expect("it runs");
    let told = std::fs::read_to_string(bundle.folder.path().join("told"));
    assert!(output.status.success(), "{output:?} {told:?}");
    told.unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

#[test]
fn systemd_makes_shows_and_removes_the_scope() {
    let mut bundle = Bundle::new("exec sleep 100");
    bundle.spec["annotations"] = serde_json::json!({"org.systemd.property.TimeoutStopSec": "7"});
    let told = in_systemd(
        &bundle,
        r#"
        $R run -d box >/dev/null </dev/null
        pid=$($R state box | sed -n 's/.*"pid": *\([0-9]*\).*/\1/p')
        echo cgroup: $(sed -n s/^0:://p /proc/$pid/cgroup)
        echo alone: $(cat /sys/fs/cgroup/system.slice/corun-box.scope/cgroup.procs | wc -l)
        echo shown: $(systemctl show -p Description -p Delegate -p Slice -p TimeoutStopUSec -p ActiveState corun-box.scope)
        # This host may lack the controller, whose file is then missing; systemd knows of the limit all the same.
        $R update --pids-limit 123 box || true
        echo limit: $(systemctl show -p TasksMax --value corun-box.scope)
        $R exec box true && echo entered
        $R delete --force box
        echo left: $(systemctl list-units --all --plain --no-legend 'corun-*') $(ls -d /sys/fs/cgroup/system.slice/corun-* 2>/dev/null)
        sed -i 's/"linux":{/"linux":{"cgroupsPath":"machine-test.slice:pre:box",/' config.json
        $R run -d box >/dev/null </dev/null
        echo cgroup: $($R ps -f json box | tr -d '[]' | xargs -I{} sed -n s/^0:://p /proc/{}/cgroup)
        $R delete --force box
        sed -i 's/machine-test.slice:pre:box/some.path/' config.json
        $R run -d box || echo refused
        ls state
        "#,
    );
    let line = |key: &str| told.lines().filter_map(|line| line.strip_prefix(key)).map(str::trim).collect::<Vec<_>>();
    assert_eq!(
        line("cgroup:"),
        ["/system.slice/corun-box.scope", "/machine.slice/machine-test.slice/pre-box.scope"],
        "{told}"
    );
    assert_eq!(line("alone:"), ["1"], "{told}");
    for word in
        ["Slice=system.slice", "TimeoutStopUSec=7s", "Delegate=yes", "ActiveState=active", "corun container box"]
    {
        assert!(line("shown:")[0].contains(word), "{word}: {told}");
    }
    assert_eq!((line("limit:"), line("left:")), (vec!["123"], vec![""]), "{told}");
    assert!(told.contains("entered\n") && told.contains("slice:prefix:name") && told.ends_with("refused\n"), "{told}");
}

#[test]
fn without_systemd_the_flag_is_a_clear_error() {
    let bundle = Bundle::new("true");
    let folder = bundle.folder.path();
    std::fs::write(folder.join("config.json"), bundle.spec.to_string()).expect("the specification");
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-ec", "mount -t tmpfs none /run; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_corun")])
        .args(["--systemd-cgroup", "--root", "state", "run", &bundle.id])
        .current_dir(folder)
        .output()
        .expect("it runs");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && told.contains("leave --systemd-cgroup out"), "{told}");
    assert_eq!(std::fs::read_dir(folder.join("state")).map_or(0, Iterator::count), 0);
}
