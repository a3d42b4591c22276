//! One test for each known way out of a container, on the real command.

#[allow(dead_code, reason = "each test program uses its part of what is shared")]
mod common;

use common::{Bundle, is_corun};
use serde_json::json;
use std::os::unix::fs::{FileTypeExt, symlink};

/// The runtime's file cannot be reached for writing through a process that is still an image of it.
#[test]
fn cve_2019_5736_own_executable() {
    if !is_corun() {
        return;
    }
    let bundle = Bundle::new("true");
    bundle.program("bad", "#!/proc/self/exe\n");
    let before = std::fs::read(env!("CARGO_BIN_EXE_corun")).expect("the binary");
    bundle.ok(&["create", &bundle.id]);
    let exe = format!("/proc/{}/exe", bundle.state()["pid"]);
    // Writing fails now in any case, for the file is in use; what counts is that it will fail later, too.
    let file = std::fs::File::open(&exe).expect("opens");
    let mount = nix::sys::statvfs::fstatvfs(&file).expect("a mount").flags();
    let sealed = nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_GET_SEALS).is_ok_and(|seals| seals != 0);
    assert!(mount.contains(nix::sys::statvfs::FsFlags::ST_RDONLY) || sealed, "{mount:?}");
    drop(bundle);
    let mut bundle = Bundle::new("true");
    bundle.program("bad", "#!/proc/self/exe\n");
    bundle.spec["process"]["args"] = json!(["/bad"]);
    let (status, ..) = bundle.run();
    assert_ne!(status, 0);
    // The same for a process that is added: its image is the runtime's until it executes the program.
    let running = Bundle::new("sleep 100");
    running.program("bad", "#!/proc/self/exe\n");
    running.ok(&["run", "-d", &running.id]);
    assert!(!running.command(&["exec", &running.id, "/bad"]).status.success());
    assert_eq!(running.ok(&["exec", &running.id, "echo", "fine"]), "fine\n");
    assert!(before == std::fs::read(env!("CARGO_BIN_EXE_corun")).expect("the binary"), "the binary was changed");
}

/// Nothing but procfs may be mounted over procfs; what only shows one container's numbers may.
#[test]
fn cve_2019_16884_mount_over_proc() {
    for mount in [
        json!({"destination": "/proc", "type": "bind", "source": "/tmp", "options": ["bind"]}),
        json!({"destination": "/proc/self/attr", "type": "tmpfs", "source": "tmpfs"}),
        json!({"destination": "/proc/sys", "type": "bind", "source": "/tmp", "options": ["bind"]}),
        json!({"destination": "/x/../proc", "type": "tmpfs", "source": "tmpfs"}),
        json!({"destination": "/link", "type": "tmpfs", "source": "tmpfs"}),
    ] {
        let mut bundle = Bundle::new("echo started");
        symlink("/proc/sys", bundle.root().join("link")).expect("a link");
        bundle.mount(mount.clone());
        let (status, out, err) = bundle.run();
        assert!(status != 0 && !out.contains("started"), "{mount}: {out}");
        assert!(err.contains("/proc") || err.contains("/link"), "the error names the place: {err}");
        bundle.assert_gone();
    }
    let mut bundle = Bundle::new("cat /proc/uptime");
    std::fs::write(bundle.folder.path().join("uptime"), "1.00 1.00\n").expect("a file");
    bundle.mount(json!({"destination": "/proc/uptime", "type": "bind", "source": "uptime", "options": ["bind"]}));
    let (status, out, err) = bundle.run();
    assert_eq!((status, out.as_str()), (0, "1.00 1.00\n"), "{err}");
}

/// A `/proc` or `/sys` that is a symlink would let masks and labels go elsewhere.
#[test]
fn cve_2023_27561_proc_is_a_symlink() {
    for (name, is_link) in [("proc", true), ("sys", true), ("proc", false), ("sys", false)] {
        let bundle = Bundle::new("cat /proc/self/comm; ls /sys/kernel > /dev/null && echo started");
        std::fs::create_dir(bundle.root().join("elsewhere")).expect("a folder");
        if is_link {
            symlink("elsewhere", bundle.root().join(name)).expect("a link");
        } else {
            std::fs::create_dir(bundle.root().join(name)).expect("a folder");
        }
        let (status, out, err) = bundle.run();
        if is_link {
            assert!(status != 0 && !out.contains("started"), "{name}: {out}");
            assert!(err.contains(&format!("/{name}")), "the error names the place: {err}");
            let made = std::fs::read_dir(bundle.root().join("elsewhere")).expect("a folder").count();
            assert_eq!(made, 0, "something was made behind the link");
        } else {
            assert_eq!((status, out.as_str()), (0, "cat\nstarted\n"), "{err}");
        }
        bundle.assert_gone();
    }
}

/// A destination that leads out of the root by symlinks stays in the root.
#[test]
fn cve_2021_30465_symlink_in_mount_destination() {
    let mut bundle = Bundle::new("cat /inside/mark");
    let outside = tempfile::tempdir().expect("a folder");
    std::fs::write(outside.path().join("mark"), "outside\n").expect("a file");
    std::fs::create_dir(bundle.folder.path().join("volume")).expect("a folder");
    std::fs::write(bundle.folder.path().join("volume/mark"), "volume\n").expect("a file");
    symlink(format!("../../../../../..{}", outside.path().display()), bundle.root().join("inside")).expect("a link");
    bundle.spec["root"]["readonly"] = false.into();
    bundle.mount(json!({"destination": "/inside", "type": "bind", "source": "volume", "options": ["bind"]}));
    let (status, out, err) = bundle.run();
    assert_eq!((status, out.as_str()), (0, "volume\n"), "{err}");
    assert_eq!(std::fs::read_dir(outside.path()).expect("a folder").count(), 1);
}

/// Making a missing destination behind a dangling symlink makes nothing outside.
#[test]
fn cve_2024_45310_made_behind_a_symlink() {
    let mut bundle = Bundle::new("cat /etc/resolv.conf");
    let outside = tempfile::tempdir().expect("a folder");
    let target = outside.path().join("made");
    std::fs::create_dir(bundle.root().join("etc")).expect("a folder");
    symlink(&target, bundle.root().join("etc/resolv.conf")).expect("a link");
    std::fs::write(bundle.folder.path().join("file"), "bound\n").expect("a file");
    bundle.mount(json!({"destination": "/etc/resolv.conf", "type": "bind", "source": "file", "options": ["bind"]}));
    let (status, out, err) = bundle.run();
    assert!(!target.exists(), "made {target:?} on the host");
    assert_eq!((status, out.as_str()), (0, "bound\n"), "{err}");
}

/// The same while somebody changes what the path leads to: what is mounted and made stays in the root.
#[test]
fn cve_2021_30465_and_2024_45310_raced_symlinks() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let outside = tempfile::tempdir().expect("a folder");
    let mut bundle = Bundle::new("cat /swapped/inner/mark");
    let root = bundle.root();
    std::fs::create_dir(root.join("real")).expect("a folder");
    std::fs::create_dir(bundle.folder.path().join("volume")).expect("a folder");
    std::fs::write(bundle.folder.path().join("volume/mark"), "volume\n").expect("a file");
    symlink("real", root.join("swapped")).expect("a link");
    bundle.spec["root"]["readonly"] = false.into();
    bundle.mount(json!({"destination": "/swapped/inner", "type": "bind", "source": "volume", "options": ["bind"]}));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let targets = [outside.path().to_path_buf(), "real".into()];
            for target in targets.iter().cycle() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                symlink(target, root.join("next")).expect("a link");
                std::fs::rename(root.join("next"), root.join("swapped")).expect("swaps");
            }
        });
        for _ in 0..20 {
            // Which of the two the path led to does not matter; the runtime may also see neither.
            bundle.run();
            bundle.assert_gone();
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(std::fs::read_dir(outside.path()).expect("a folder").count(), 0, "made outside the root");
    std::fs::remove_file(root.join("swapped")).expect("a link");
    symlink("real", root.join("swapped")).expect("a link");
    let (status, out, err) = bundle.run();
    assert_eq!((status, out.as_str()), (0, "volume\n"), "left alone it starts: {err}");
}

/// Neither the first process nor an added one has inheritable capabilities that were not asked for.
#[test]
fn cve_2022_29162_inheritable_capabilities() {
    const SHOW: &str = "grep -E 'CapInh|CapAmb|CapEff' /proc/self/status";
    let bundle = Bundle::new(&format!("{SHOW} > /dev/shm/sets; sleep 100"));
    bundle.ok(&["run", "-d", &bundle.id]);
    coracle_testkit::assert_eventually!(
        10,
        bundle.command(&["exec", &bundle.id, "grep", "-q", "CapAmb", "/dev/shm/sets"]).status.success()
    );
    let first = bundle.ok(&["exec", &bundle.id, "cat", "/dev/shm/sets"]);
    let added = bundle.ok(&["exec", "--cap", "CAP_SYS_TIME", &bundle.id, "sh", "-c", SHOW]);
    for (name, out) in [("first", &first), ("added", &added)] {
        let set = |name: &str| {
            let line = out.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name} in {out}"));
            u64::from_str_radix(line.split_whitespace().last().expect("a set"), 16).expect("hexadecimal")
        };
        assert_eq!((set("CapInh"), set("CapAmb")), (0, 0), "{name}: {out}");
        assert_ne!(set("CapEff"), 0, "{name}: {out}");
    }
    assert!(added.contains("CapEff:\t0000000022000420") || !is_corun(), "the capability asked for is there: {added}");
}

/// No descriptor of the host is inherited, and the working directory cannot be one.
#[test]
fn cve_2024_21626_leaked_descriptors() {
    const SHOW: &str =
        "for fd in /proc/self/fd/*; do readlink $fd; done | sort | uniq -c | wc -l; ls /proc/self/fd | wc -l";
    let bundle = Bundle::new(&format!("{SHOW} > /dev/shm/count; sleep 100"));
    bundle.ok(&["run", "-d", &bundle.id]);
    // 0, 1, 2 and the one with which ls reads the folder.
    let counted = |text: &str| text.lines().last() == Some("4");
    // Until the container has got so far there is no such file.
    let noted =
        || String::from_utf8_lossy(&bundle.command(&["exec", &bundle.id, "cat", "/dev/shm/count"]).stdout).into_owned();
    coracle_testkit::assert_eventually!(10, counted(&noted()));
    assert!(counted(&bundle.ok(&["exec", &bundle.id, "sh", "-c", SHOW])));
    for fd in 3..12 {
        let cwd = format!("/proc/self/fd/{fd}");
        let inside = bundle.command(&["exec", "--cwd", &cwd, &bundle.id, "echo", "started"]);
        assert!(!inside.status.success() && inside.stdout.is_empty(), "{cwd}: {inside:?}");
        for link in [None, Some("link")] {
            let mut bundle = Bundle::new("echo started; pwd");
            if let Some(link) = link {
                symlink(&cwd, bundle.root().join(link)).expect("a link");
            }
            bundle.spec["process"]["cwd"] = link.map_or(cwd.clone(), |link| format!("/{link}")).into();
            let (status, out, _) = bundle.run();
            assert!(status != 0 && !out.contains("started"), "descriptor {fd}: {out}");
            bundle.assert_gone();
        }
    }
    let mut bundle = Bundle::new("pwd");
    bundle.spec["process"]["cwd"] = "/bin".into();
    assert_eq!(bundle.run().1, "/bin\n");
}

/// A false `/dev/null` is not used for masking: it would show or open what it leads to.
#[test]
fn cve_2025_31133_false_null_device() {
    for is_false in [true, false] {
        let mut bundle = Bundle::new("cat /proc/keys; echo end");
        bundle.spec["linux"]["maskedPaths"] = json!(["/proc/keys"]);
        bundle.spec["root"]["readonly"] = false.into();
        // The host's folder as it is: nothing is made in it, so what stands there is what masks are taken from.
        bundle.without_mount("/dev");
        let dev = bundle.folder.path().join("dev");
        std::fs::create_dir(&dev).expect("a folder");
        if is_false {
            symlink("/proc/sys/kernel/core_pattern", dev.join("null")).expect("a link");
        } else {
            std::os::unix::fs::symlink("/nowhere", dev.join("other")).expect("a link");
            let made = std::process::Command::new("mknod").arg(dev.join("null")).args(["c", "1", "3"]).status();
            assert!(made.expect("mknod").success());
        }
        bundle.mount(json!({"destination": "/dev", "type": "bind", "source": "dev", "options": ["bind"]}));
        let (status, out, err) = bundle.run();
        if is_false && is_corun() {
            assert!(status != 0 && !out.contains("end"), "{out}");
            assert!(err.contains("/dev/null"), "the error names the place: {err}");
        } else if !is_false {
            assert_eq!((status, out.as_str()), (0, "end\n"), "{err}");
        }
        // Another runtime may have masked by its own device; a core pattern must not be what is seen in any case.
        assert!(!out.contains("core") && !out.contains('|'), "{out}");
        bundle.assert_gone();
    }
}

/// A `/dev/console` that is a symlink does not choose what the terminal is mounted over.
#[test]
fn cve_2025_52565_console_is_a_symlink() {
    if !is_corun() {
        return;
    }
    for is_link in [true, false] {
        let mut bundle =
            Bundle::new("test -c /target && echo covered; cat /target; test -c /dev/console && echo console");
        bundle.without_mount("/dev");
        bundle.spec["root"]["readonly"] = false.into();
        bundle.mount(json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts"}));
        std::fs::create_dir_all(bundle.root().join("dev/pts")).expect("a folder");
        std::fs::write(bundle.root().join("target"), "intact\n").expect("a file");
        if is_link {
            symlink("/target", bundle.root().join("dev/console")).expect("a link");
        }
        bundle.spec["process"]["terminal"] = true.into();
        let (status, out, err) = bundle.run();
        // The terminal covers the link itself, wherever that leads.
        assert!(status == 0 && !out.contains("covered"), "{out} {err}");
        assert!(out.contains("intact") && out.contains("console"), "{out} {err}");
        let target = std::fs::read_to_string(bundle.root().join("target")).expect("a file");
        assert_eq!(target, "intact\n");
        bundle.assert_gone();
    }
}

/// Kernel settings go to procfs even when the image has its own idea of `/proc`.
#[test]
fn cve_2025_52881_redirected_procfs_writes() {
    if !is_corun() {
        return;
    }
    let mut bundle = Bundle::new("cat /decoy/sys/net/ipv4/ip_forward");
    let decoy = bundle.root().join("decoy/sys/net/ipv4");
    std::fs::create_dir_all(&decoy).expect("a folder");
    std::fs::write(decoy.join("ip_forward"), "untouched\n").expect("a file");
    symlink("decoy", bundle.root().join("proc")).expect("a link");
    bundle.without_mount("/proc");
    bundle.spec["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1"});
    bundle.spec["linux"]["maskedPaths"] = json!([]);
    bundle.spec["linux"]["readonlyPaths"] = json!([]);
    let (status, out, err) = bundle.run();
    assert_eq!((status, out.as_str()), (0, "untouched\n"), "{err}");
}

/// A `/dev` that is a symlink does not make devices appear on the host.
#[test]
fn cve_2026_47766_dev_is_a_symlink() {
    let outside = tempfile::tempdir().expect("a folder");
    let mut bundle = Bundle::new("test -c /dev/null && echo x > /dev/null && echo started");
    symlink(outside.path(), bundle.root().join("dev")).expect("a link");
    bundle.without_mount("/dev");
    bundle.spec["root"]["readonly"] = false.into();
    // Masks are taken from a /dev/null that no link leads to; without them the devices are all that is at stake.
    bundle.spec["linux"]["maskedPaths"] = json!([]);
    let (status, out, err) = bundle.run();
    let made = std::fs::read_dir(outside.path()).expect("a folder").count();
    assert_eq!(made, 0, "devices on the host");
    let null = std::fs::metadata("/dev/null").expect("the host's null device");
    assert!(null.file_type().is_char_device());
    bundle.assert_gone();
    if is_corun() {
        // The link is read as one within the root, and the container has its devices there.
        assert_eq!((status, out.as_str()), (0, "started\n"), "{err}");
        assert!(bundle.root().join(outside.path().strip_prefix("/").expect("absolute")).join("null").exists());
    }
    let mut bundle = Bundle::new("test -c /dev/null && echo started");
    bundle.without_mount("/dev");
    bundle.spec["root"]["readonly"] = false.into();
    assert_eq!(bundle.run().1, "started\n", "without the link");
}
