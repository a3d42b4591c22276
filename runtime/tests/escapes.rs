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
    assert!(before == std::fs::read(env!("CARGO_BIN_EXE_corun")).expect("the binary"), "the binary was changed");
}

/// Nothing but procfs may be mounted over procfs.
#[test]
fn cve_2019_16884_mount_over_proc() {
    for mount in [
        json!({"destination": "/proc", "type": "bind", "source": "/tmp", "options": ["bind"]}),
        json!({"destination": "/proc/self/attr", "type": "tmpfs", "source": "tmpfs"}),
        json!({"destination": "/proc/sys", "type": "bind", "source": "/tmp", "options": ["bind"]}),
        json!({"destination": "/x/../proc", "type": "tmpfs", "source": "tmpfs"}),
    ] {
        let mut bundle = Bundle::new("true");
        bundle.mount(mount.clone());
        let (status, _, err) = bundle.run();
        assert_ne!(status, 0, "{mount}");
        assert!(err.contains("proc"), "{err}");
        bundle.assert_gone();
    }
}

/// A `/proc` that is a symlink would let masks and labels go elsewhere.
#[test]
fn cve_2023_27561_proc_is_a_symlink() {
    for (name, target) in [("proc", "elsewhere"), ("sys", "elsewhere")] {
        let bundle = Bundle::new("true");
        std::fs::create_dir(bundle.root().join(target)).expect("a folder");
        symlink(target, bundle.root().join(name)).expect("a link");
        let (status, ..) = bundle.run();
        assert_ne!(status, 0, "{name}");
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

/// Neither the first process nor an added one has inheritable capabilities that were not asked for.
#[test]
fn cve_2022_29162_inheritable_capabilities() {
    let bundle = Bundle::new("sleep 100");
    bundle.ok(&["run", "-d", &bundle.id]);
    let out =
        bundle.ok(&["exec", "--cap", "CAP_SYS_TIME", &bundle.id, "grep", "-E", "CapInh|CapAmb", "/proc/self/status"]);
    assert!(out.lines().all(|line| line.ends_with("0000000000000000")), "{out}");
}

/// No descriptor of the host is inherited, and the working directory cannot be one.
#[test]
fn cve_2024_21626_leaked_descriptors() {
    let bundle = Bundle::new("ls /proc/self/fd | wc -l; sleep 100");
    bundle.ok(&["run", "-d", &bundle.id]);
    let count = bundle.ok(&["exec", &bundle.id, "sh", "-c", "ls /proc/self/fd | wc -l"]);
    // 0, 1, 2 and the one with which ls reads the folder.
    assert_eq!(count.trim(), "4");
    for fd in 3..12 {
        let mut bundle = Bundle::new("true");
        bundle.spec["process"]["cwd"] = format!("/proc/self/fd/{fd}").into();
        assert_ne!(bundle.run().0, 0, "descriptor {fd}");
        bundle.assert_gone();
    }
}

/// A false `/dev/null` is not used for masking.
#[test]
fn cve_2025_31133_false_null_device() {
    let mut bundle = Bundle::new("cat /proc/keys; echo end");
    bundle.without_mount("/dev");
    std::fs::create_dir(bundle.root().join("dev")).expect("a folder");
    symlink("/proc/sys/kernel/core_pattern", bundle.root().join("dev/null")).expect("a link");
    bundle.spec["linux"]["maskedPaths"] = json!(["/proc/keys"]);
    let (status, out, err) = bundle.run();
    if status == 0 {
        assert_eq!(out, "end\n", "{err}");
    }
}

/// A `/dev/console` that is a symlink does not choose what the terminal is mounted over.
#[test]
fn cve_2025_52565_console_is_a_symlink() {
    if !is_corun() {
        return;
    }
    let mut bundle = Bundle::new("cat /target");
    bundle.without_mount("/dev");
    bundle.mount(json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts"}));
    std::fs::create_dir_all(bundle.root().join("dev/pts")).expect("a folder");
    std::fs::write(bundle.root().join("target"), "intact\n").expect("a file");
    symlink("/target", bundle.root().join("dev/console")).expect("a link");
    bundle.spec["process"]["terminal"] = true.into();
    let (status, out, err) = bundle.run();
    assert!(status != 0 || out.contains("intact"), "{out} {err}");
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
    let mut bundle = Bundle::new("true");
    let outside = tempfile::tempdir().expect("a folder");
    symlink(outside.path(), bundle.root().join("dev")).expect("a link");
    bundle.without_mount("/dev");
    let _ = bundle.run();
    let made = std::fs::read_dir(outside.path()).expect("a folder").count();
    assert_eq!(made, 0, "devices on the host");
    let null = std::fs::metadata("/dev/null").expect("the host's null device");
    assert!(null.file_type().is_char_device());
}
