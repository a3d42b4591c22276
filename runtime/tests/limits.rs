//! Limits, on a host of the test's own: a virtual machine with Debian's kernel, whose controllers all belong to version 2
//! of cgroups whatever this host does with its own. It is the oldest kernel that is supported, too.

use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

/// The machine is emulated: a boot takes seconds, a process tens of milliseconds.
const LIMIT: Duration = Duration::from_secs(300);
const MEMORY_MIB: u32 = 768;

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

#[test]
fn limits_hold_on_the_oldest_supported_kernel() {
    let folder = tempfile::tempdir().expect("a folder");
    let machine = coracle_testkit::Machine::new(folder.path());
    let root = machine.root();
    std::fs::create_dir_all(root.join("rootfs/bin")).expect("makes");
    std::fs::copy(root.join("bin/busybox"), root.join("rootfs/bin/busybox")).expect("copies");
    for applet in ["sh", "dd", "sleep", "cat", "mkdir", "touch"] {
        std::os::unix::fs::symlink("busybox", root.join("rootfs/bin").join(applet)).expect("links");
    }
    machine.add_program(Path::new(env!("CARGO_BIN_EXE_corun")), "corun");
    for (name, program, resources) in containers() {
        let bundle = root.join("bundles").join(name);
        std::fs::create_dir_all(&bundle).expect("makes");
        let spec = specification(name, program, resources).to_string();
        std::fs::write(bundle.join("config.json"), spec).expect("writes");
    }
    machine.add_script("init", INIT);
    machine.add_script("script", SCRIPT);
    let module = machine.modules().join("kernel/drivers/block/loop.ko");
    std::fs::copy(module, root.join("loop.ko")).expect("the kernel has loop devices");
    let text = machine.boot(MEMORY_MIB, LIMIT);
    assert!(text.contains("finished"), "the machine did not come to the end: {text}");
    assert!(!text.contains("not ok"), "{text}");
    assert!(text.matches("ok ").count() >= 18, "{text}");
}
