//! Limits, on a host of the test's own: a virtual machine with Debian's kernel, whose controllers all belong to version 2
//! of cgroups whatever this host does with its own. It is the oldest kernel that is supported, too.

use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// The machine is emulated: a boot takes seconds, a process tens of milliseconds.
const LIMIT: Duration = Duration::from_secs(300);
const MEMORY_MIB: &str = "768";

/// What the machine does. Each check prints `ok NAME` or `not ok NAME`.
const SCRIPT: &str = r##"#!/bin/sh
export PATH=/bin
check() { name=$1; shift; if "$@"; then echo "ok $name"; else echo "not ok $name"; fi; }
has() { grep -q -- "$1" "$2"; }
make() { cd /bundles/$1; }
run() { corun run --no-pivot "$1" </dev/null >/out 2>/err; }
start() { corun run -d "$1" </dev/null >/out 2>/err || cat /err; }
end() { corun delete -f "$1"; }
group=/sys/fs/cgroup

make oom
corun run --keep oom </dev/null >/out 2>/err; status=$?
check memory-kills test "$status" = 137
check memory-survives-not test "$(grep -c survived /out)" = 0
check memory-counts-the-kill has 'oom_kill [1-9]' $group/oom/memory.events
check memory-limit-is-set test "$(cat $group/oom/memory.max)" = 33554432
end oom

make events
start events
corun events --interval 600s events >/events &
sleep 6
check events-tell-want-of-memory-at-once has '"type":"oom"' /events
end events

make pids
run pids
check pids-are-limited has "fork" /err

make cpu
corun run --keep cpu </dev/null
check cpu-quota-throttles has 'nr_throttled [1-9]' $group/cpu/cpu.stat
check cpu-weight-follows-shares test "$(cat $group/cpu/cpu.weight)" = 59
check cpuset-is-set test "$(cat $group/cpu/cpuset.cpus.effective)" = 1
end cpu

make up
start up
corun update --cpu-quota 20000 up
check update-keeps-the-period test "$(cat $group/up/cpu.max)" = "20000 50000"
corun update --memory 128m --pids-limit 9 up
check update-memory test "$(cat $group/up/memory.max)" = 134217728
check update-pids test "$(cat $group/up/pids.max)" = 9
echo '{"memory": {"limit": 4096, "checkBeforeUpdate": true}}' | corun update -r - up 2>/err
check update-below-usage-is-refused has 'uses now' /err
cat /err
check update-refused-changes-nothing test "$(cat $group/up/memory.max)" = 134217728
corun events --stats up >/events
check stats-have-the-limit has '"limit":134217728' /events
corun pause up; check pause has 'frozen 1' $group/up/cgroup.events
corun resume up; check resume has 'frozen 0' $group/up/cgroup.events
end up
check removal-leaves-no-cgroup test ! -e $group/up

make tiny
run tiny
check one-mebibyte-is-enough-to-start has started /out
cat /err

if [ -e /loop.ko ]; then
    insmod /loop.ko; dd if=/dev/zero of=/disk bs=1M count=8 2>/dev/null; losetup /dev/loop0 /disk
    device=$(cat /sys/block/loop0/dev)
    make io
    start io
    check io-maximum-is-set has "$device rbps=1048576" $group/io/io.max
    end io
fi

make given
chown -R 1000:1000 /rootfs
run given
check cgroup-is-given-to-the-root-of-a-user-namespace has delegated /out
cat /err
echo finished
"##;

/// The containers of the script: name, program, `linux.resources`.
fn containers() -> [(&'static str, &'static str, Value); 8] {
    [
        (
            "oom",
            "dd if=/dev/zero of=/dev/shm/x bs=1M count=60 && echo survived",
            json!({"memory": {"limit": 32 << 20, "swap": 32 << 20}}),
        ),
        (
            "events",
            "sleep 2; dd if=/dev/zero of=/dev/shm/x bs=1M count=60; sleep 5",
            json!({"memory": {"limit": 32 << 20, "swap": 32 << 20}}),
        ),
        ("pids", "for i in 1 2 3 4 5 6 7 8; do sleep 100 & done; wait", json!({"pids": {"limit": 5}})),
        (
            "cpu",
            "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done",
            json!({"cpu": {"quota": 10_000, "period": 50_000, "shares": 512, "cpus": "1"}}),
        ),
        ("up", "sleep 100", json!({"cpu": {"quota": 10_000, "period": 50_000}, "memory": {"limit": 64 << 20}})),
        ("tiny", "echo started", json!({"memory": {"limit": 1 << 20}})),
        ("io", "sleep 100", json!({"blockIO": {"throttleReadBpsDevice": [{"major": 7, "minor": 0, "rate": 1 << 20}]}})),
        ("given", "mkdir /sys/fs/cgroup/mine && echo delegated", json!({})),
    ]
}

/// The specification of one of them.
fn specification(name: &str, program: &str, resources: Value) -> Value {
    let mut spec = serde_json::to_value(coracle_runtime::spec::default_container()).expect("JSON");
    spec["process"]["args"] = json!(["sh", "-c", program]);
    spec["root"]["path"] = "/rootfs".into();
    spec["linux"]["resources"] = resources;
    if name == "given" {
        spec["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({"type": "user"}));
        for map in ["uidMappings", "gidMappings"] {
            spec["linux"][map] = json!([{"containerID": 0, "hostID": 1000, "size": 1000}]);
        }
        for mount in spec["mounts"].as_array_mut().expect("a list") {
            if mount["destination"] == "/sys/fs/cgroup" {
                mount["options"] = json!(["nosuid", "noexec", "nodev"]);
            }
        }
    }
    spec
}

const INIT: &str = r#"#!/bin/sh
/bin/busybox --install -s /bin
mkdir -p /new; mount -t tmpfs -o size=80% tmpfs /new
for f in bin lib lib64 script loop.ko rootfs bundles; do [ -e /$f ] && cp -a /$f /new/; done
mkdir -p /new/proc /new/sys /new/dev /new/tmp /new/run
mount -t proc proc /new/proc; mount -t sysfs sysfs /new/sys; mount -t devtmpfs dev /new/dev
mount -t cgroup2 cgroup2 /new/sys/fs/cgroup
exec switch_root /new /bin/sh -c 'sh /script; poweroff -f'
"#;

/// A folder that survives the run, so that packages are fetched once.
fn cache() -> PathBuf {
    let home = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    home.unwrap_or_else(std::env::temp_dir).join("coracle-tests")
}

fn run(program: &str, arguments: &[&str], folder: &Path) -> String {
    let output = Command::new(program).args(arguments).current_dir(folder).output().expect("it runs");
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Debian's kernel for clouds, unpacked but not installed.
fn kernel() -> PathBuf {
    let folder = cache().join("kernel");
    let found = || {
        let entries = std::fs::read_dir(folder.join("boot")).ok()?;
        entries.flatten().map(|entry| entry.path()).find(|path| path.to_string_lossy().contains("vmlinuz"))
    };
    if let Some(image) = found() {
        return image;
    }
    let parts = tempfile::tempdir().expect("a folder");
    run("apt-get", &["update", "-qq"], parts.path());
    let depends = run("apt-cache", &["depends", "linux-image-cloud-amd64"], parts.path());
    let package = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: ")).expect("a kernel").to_string();
    // apt-get drops to another user, who must be able to write here.
    std::os::unix::fs::chown(parts.path(), None, None).expect("chown");
    run("apt-get", &["-o", "APT::Sandbox::User=root", "download", &package], parts.path());
    let file = std::fs::read_dir(parts.path()).expect("reads").flatten().next().expect("a package").path();
    let unpacked = parts.path().join("unpacked");
    run("dpkg", &["-x", file.to_str().expect("a path"), unpacked.to_str().expect("a path")], parts.path());
    std::fs::create_dir_all(folder.parent().expect("a folder")).expect("makes");
    run("cp", &["-r", unpacked.to_str().expect("a path"), folder.to_str().expect("a path")], parts.path());
    found().expect("the package has a kernel")
}

/// A program with the libraries that it loads, at the places where it looks for them.
fn with_libraries(program: &Path, root: &Path) {
    let listed = run("ldd", &[program.to_str().expect("a path")], root);
    for library in listed.split_whitespace().filter(|word| word.starts_with('/')) {
        let target = root.join(library.trim_start_matches('/').trim_start_matches("usr/"));
        std::fs::create_dir_all(target.parent().expect("a folder")).expect("makes");
        std::fs::copy(library, target).expect("copies");
    }
    std::fs::copy(program, root.join("bin").join(program.file_name().expect("a name"))).expect("copies");
}

#[test]
fn limits_hold_on_the_oldest_supported_kernel() {
    use std::os::unix::fs::PermissionsExt;
    let qemu = coracle_testkit::need("qemu-system-x86_64", "qemu-system-x86");
    let busybox = coracle_testkit::need("busybox", "busybox-static");
    let image = kernel();
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path().join("root");
    for path in ["bin", "rootfs/bin"] {
        std::fs::create_dir_all(root.join(path)).expect("makes");
        std::fs::copy(&busybox, root.join(path).join("busybox")).expect("copies");
    }
    for (link, target) in [("bin/sh", "busybox"), ("rootfs/bin/sh", "busybox")] {
        std::os::unix::fs::symlink(target, root.join(link)).expect("links");
    }
    for applet in ["dd", "sleep", "cat", "mkdir", "touch"] {
        std::os::unix::fs::symlink("busybox", root.join("rootfs/bin").join(applet)).expect("links");
    }
    with_libraries(Path::new(env!("CARGO_BIN_EXE_corun")), &root);
    for (name, program, resources) in containers() {
        let bundle = root.join("bundles").join(name);
        std::fs::create_dir_all(&bundle).expect("makes");
        let spec = specification(name, program, resources).to_string();
        std::fs::write(bundle.join("config.json"), spec).expect("writes");
    }
    for (name, text) in [("init", INIT), ("script", SCRIPT)] {
        std::fs::write(root.join(name), text).expect("writes");
        std::fs::set_permissions(root.join(name), PermissionsExt::from_mode(0o755)).expect("permissions");
    }
    let modules = run(
        "find",
        &[image.parent().and_then(Path::parent).expect("a folder").to_str().expect("a path"), "-name", "loop.ko"],
        folder.path(),
    );
    let module = modules.lines().next().expect("the kernel has loop devices");
    std::fs::copy(module, root.join("loop.ko")).expect("copies");
    let archive = folder.path().join("initrd");
    let packed = Command::new("sh")
        .args(["-c", "find . | busybox cpio -o -H newc 2>/dev/null | gzip -1"])
        .current_dir(&root)
        .stdout(std::fs::File::create(&archive).expect("a file"))
        .status();
    assert!(packed.expect("packs").success());
    let console = folder.path().join("console");
    let mut machine = Command::new(qemu)
        .args(["-accel", "tcg", "-smp", "2", "-m", MEMORY_MIB, "-nographic", "-no-reboot", "-nic", "none"])
        .arg("-kernel")
        .arg(&image)
        .arg("-initrd")
        .arg(&archive)
        .args(["-append", "console=ttyS0 quiet panic=-1"])
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(&console).expect("a file"))
        .stderr(Stdio::inherit())
        .spawn()
        .expect("the machine starts");
    let ended = coracle_testkit::eventually(LIMIT, || machine.try_wait().expect("waits"));
    if ended.is_none() {
        machine.kill().expect("kills");
    }
    let text = String::from_utf8_lossy(&std::fs::read(&console).expect("reads")).into_owned();
    if let Some(path) = std::env::var_os("CORACLE_TEST_CONSOLE") {
        std::fs::File::create(path).and_then(|mut file| file.write_all(text.as_bytes())).expect("writes");
    }
    assert!(ended.is_some() && text.contains("finished"), "the machine did not come to the end: {text}");
    assert!(!text.contains("not ok"), "{text}");
    assert!(text.matches("ok ").count() >= 18, "{text}");
}
