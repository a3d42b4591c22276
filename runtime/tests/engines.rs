//! Container engines as users of the command. Each test has mounts, network and folders of its own; what an engine says of
//! the runtime as a warning is a failure.

#[allow(dead_code, reason = "each test program uses its part of what is shared")]
mod common;

use coracle_testkit::need;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs a shell script in a private mount and network namespace in which cgroups are version 2 alone.
fn host(folder: &Path, script: &str) -> Output {
    const PREPARE: &str = "set -e; ip link set lo up; umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; \
                           mount -t tmpfs tmpfs /run; mkdir -p /run/lock; mount -t tmpfs tmpfs /dev/shm; ";
    need("ip", "iproute2");
    Command::new(need("unshare", "util-linux"))
        .args(["--mount", "--net", "sh", "-c", &format!("{PREPARE}{script}")])
        .current_dir(folder)
        .env("CORUN", env!("CARGO_BIN_EXE_corun"))
        .env("TMPDIR", folder)
        .output()
        .expect("it runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// An image's root with busybox, as a tar archive for engines to import.
fn image(folder: &Path) -> PathBuf {
    let root = folder.join("image");
    std::fs::create_dir_all(root.join("bin")).expect("makes");
    std::fs::copy(need("busybox", "busybox-static"), root.join("bin/busybox")).expect("copies");
    for applet in ["sh", "true", "cat", "echo", "sleep", "id", "hostname", "httpd", "mkdir", "ls", "readlink"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).expect("links");
    }
    for name in ["proc", "sys", "dev", "tmp", "etc", "data"] {
        std::fs::create_dir_all(root.join(name)).expect("makes");
    }
    std::fs::write(root.join("bin/pause"), "#!/bin/sh\nexec sleep 1000\n").expect("writes");
    std::fs::set_permissions(root.join("bin/pause"), PermissionsExt::from_mode(0o755)).expect("permissions");
    std::fs::write(root.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n").expect("writes");
    let archive = folder.join("image.tar");
    let packed = Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&archive).arg(".").status();
    assert!(packed.expect("tar").success());
    archive
}

#[test]
fn podman_runs_containers_pods_and_volumes() {
    need("podman", "podman");
    need("conmon", "conmon");
    let folder = tempfile::tempdir().expect("a folder");
    image(folder.path());
    let script = r#"
        P="podman --runtime $CORUN --root $PWD/storage --runroot $PWD/run --tmpdir $PWD/tmp --cgroup-manager cgroupfs --storage-driver vfs --events-backend none"
        $P import -q image.tar localhost/box:1 >/dev/null
        run="$P run --log-driver k8s-file --network none --pids-limit -1 --ulimit nofile=1024:1024 --ulimit nproc=1024:1024"
        echo run: $($run --rm localhost/box:1 echo hello)
        $run --rm localhost/box:1 sh -c 'exit 7' || echo status: $?
        $run -d --name web --hostname vessel localhost/box:1 sh -c 'echo log line; exec sleep 100' >/dev/null
        echo exec: $($P exec -e WORD=said web sh -c 'echo $WORD; hostname')
        $P exec web sh -c 'exit 9' || echo exec status: $?
        echo logs: $($P logs web)
        echo inspected: $($P inspect -f '{{.State.Status}} {{.OCIRuntime}}' web)
        $P pause web >/dev/null && echo paused: $($P inspect -f '{{.State.Status}}' web) && $P unpause web >/dev/null
        $P stop -t 1 web >/dev/null && echo stopped: $($P inspect -f '{{.State.Status}}' web)
        $P start web >/dev/null && echo restarted: $($P inspect -f '{{.State.Status}}' web)
        $P rm -f -t 0 web >/dev/null
        $P volume create kept >/dev/null
        $run --rm -v kept:/data localhost/box:1 sh -c 'echo stays > /data/file'
        echo volume: $($run --rm -v kept:/data:ro localhost/box:1 cat /data/file)
        $run --rm --read-only --tmpfs /tmp --user 5:6 --cap-drop all localhost/box:1 id -u
        echo left: $($P ps -aq | wc -l)
    "#;
    let output = host(folder.path(), script);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    for line in [
        "run: hello",
        "status: 7",
        "exec: said vessel",
        "exec status: 9",
        "logs: log line",
        "inspected: running ",
        "paused: paused",
        "stopped: exited",
        "restarted: running",
        "volume: stays",
        "5",
        "left: 0",
    ] {
        assert!(out.lines().any(|found| found.starts_with(line)), "{line:?} in {out}\n{err}");
    }
    assert!(!err.contains("corun") && !err.to_lowercase().contains("runtime"), "a word about the runtime: {err}");
}

#[test]
fn podman_publishes_the_port_of_a_pod() {
    need("podman", "podman");
    need("conmon", "conmon");
    need("iptables", "iptables");
    need("/usr/lib/podman/netavark", "netavark");
    let folder = tempfile::tempdir().expect("a folder");
    image(folder.path());
    // Debian's podman refuses every device to the cgroup that it makes for a pod, whatever the runtime.
    let script = r#"
        printf '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\npids_limit = 0\nlog_driver = "k8s-file"\n' > containers.conf
        export CONTAINERS_CONF=$PWD/containers.conf
        P="podman --runtime $CORUN --root $PWD/storage --runroot $PWD/run --tmpdir $PWD/tmp --cgroup-manager cgroupfs --storage-driver vfs --events-backend none --network-config-dir $PWD/networks"
        $P import -q image.tar localhost/box:1 >/dev/null
        $P pod create --name pod --share-parent=false -p 8080:80 --infra-image localhost/box:1 --infra-command /bin/pause >/dev/null
        $P run -d --pod pod --name web localhost/box:1 httpd -f -p 80 -h /etc >/dev/null
        network="readlink /proc/self/ns/net"
        [ "$($P exec web $network)" = "$($P run --rm --pod pod localhost/box:1 $network)" ] && echo one network
        [ "$($P exec web $network)" != "$($network)" ] && echo not the host\'s
        for i in $(seq 300); do busybox wget -qO- http://127.0.0.1:8080/passwd > answer && break; sleep 0.1; done 2>/dev/null
        echo port: $(cat answer)
        echo published: $($P port web)
        echo pod: $($P pod inspect -f '{{.State}}' pod)
        $P pod rm -f -t 0 pod >/dev/null
        echo left: $($P ps -aq | wc -l)
    "#;
    let output = host(folder.path(), script);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    for line in [
        "one network",
        "not the host's",
        "port: root:x:0:0",
        "published: 80/tcp -> 0.0.0.0:8080",
        "pod: Running",
        "left: 0",
    ] {
        assert!(out.lines().any(|found| found.starts_with(line)), "{line:?} in {out}\n{err}");
    }
    assert!(!err.contains("corun") && !err.to_lowercase().contains("runtime"), "a word about the runtime: {err}");
}

#[test]
fn containerd_runs_containers() {
    need("containerd", "containerd");
    need("ctr", "containerd");
    let folder = tempfile::tempdir().expect("a folder");
    image(folder.path());
    let script = r#"
        printf 'version = 2\nroot = "%s/root"\nstate = "/run/c"\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\naddress = "/run/c.sock"\n' "$PWD" > config.toml
        containerd -c config.toml >daemon.log 2>&1 & daemon=$!
        trap 'kill $daemon' EXIT
        C="ctr -a /run/c.sock"
        for i in $(seq 300); do $C version >/dev/null 2>&1 && break; sleep 0.1; done
        run="$C run --rootfs --runc-binary $CORUN"
        echo run: $($run --rm $PWD/image one /bin/echo hello)
        $run --rm $PWD/image two /bin/sh -c 'exit 7' || echo status: $?
        $run -d $PWD/image three /bin/sleep 100
        echo exec: $($C task exec --exec-id e1 three /bin/echo inside)
        echo listed: $($C task ls | grep -c 'three.*RUNNING')
        $C task pause three; echo paused: $($C task ls | grep -c 'three.*PAUSED'); $C task resume three
        echo processes: $($C task ps three | grep -c -v PID)
        $C task kill -s KILL three; for i in $(seq 100); do $C task ls | grep -q 'three.*STOPPED' && break; sleep 0.1; done
        $C task rm three >/dev/null 2>&1; $C container rm three; echo left: $($C container ls -q | wc -l)
        # This shim loses the status of its last, forced removal with every runtime.
        grep -E 'level=(warning|error)' daemon.log | grep -i corun | grep -v 'failed to remove runc container' || true
    "#;
    let output = host(folder.path(), script);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    for line in ["run: hello", "status: 7", "exec: inside", "listed: 1", "paused: 1", "processes: 1", "left: 0"] {
        let log = std::fs::read_to_string(folder.path().join("daemon.log")).unwrap_or_default();
        assert!(out.lines().any(|found| found == line), "{line:?} in {out}\n{err}\n{log}");
    }
    assert!(!out.contains("level=") && !err.contains("corun"), "a word about the runtime: {out} {err}");
}
