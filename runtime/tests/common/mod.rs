//! Bundles made on the spot, run by `corun` or, with `CORACLE_TEST_RUNTIME=runc`, by another runtime.

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Programs of busybox that tests use.
const APPLETS: [&str; 26] = [
    "sh", "true", "false", "ls", "cat", "id", "mount", "ps", "sleep", "mkdir", "echo", "hostname", "env", "stat",
    "head", "grep", "touch", "test", "readlink", "tty", "wc", "kill", "sort", "uniq", "ip", "dd",
];
const LIMIT: Duration = Duration::from_secs(30);
static COUNTER: AtomicU32 = AtomicU32::new(0);

pub(crate) fn is_corun() -> bool {
    std::env::var_os("CORACLE_TEST_RUNTIME").is_none()
}

/// A bundle and the one container made from it; taken down when dropped.
pub(crate) struct Bundle {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) id: String,
    pub(crate) spec: Value,
    pub(crate) environment: Vec<(String, String)>,
}

impl Bundle {
    pub(crate) fn new(script: &str) -> Self {
        let busybox = coracle_testkit::need("busybox", "busybox-static");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let bin = folder.path().join("rootfs/bin");
        std::fs::create_dir_all(&bin).expect("a root");
        std::fs::copy(busybox, bin.join("busybox")).expect("busybox");
        for applet in APPLETS {
            std::os::unix::fs::symlink("busybox", bin.join(applet)).expect("a link");
        }
        let made = runtime().arg("spec").current_dir(folder.path()).output().expect("the runtime");
        assert!(made.status.success(), "{made:?}");
        let text = std::fs::read(folder.path().join("config.json")).expect("a specification");
        let mut spec: Value = serde_json::from_slice(&text).expect("JSON");
        spec["process"]["terminal"] = false.into();
        spec["process"]["args"] = json!(["sh", "-c", script]);
        let id = format!("coracle-test-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        Self { folder, id, spec, environment: Vec::new() }
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.folder.path().join("rootfs")
    }

    /// A script in the container's root.
    pub(crate) fn program(&self, name: &str, text: &str) {
        use std::os::unix::fs::PermissionsExt;
        let path = self.root().join(name);
        std::fs::write(&path, text).expect("a program");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("executable");
    }

    pub(crate) fn without_mount(&mut self, destination: &str) {
        let mounts = self.spec["mounts"].as_array_mut().expect("mounts");
        mounts.retain(|mount| !mount["destination"].as_str().is_some_and(|path| path.starts_with(destination)));
    }

    pub(crate) fn mount(&mut self, mount: Value) {
        self.spec["mounts"].as_array_mut().expect("mounts").push(mount);
    }

    /// Lets the root of a user namespace make mount points.
    pub(crate) fn give_root_to(&self, uid: u32) {
        std::os::unix::fs::chown(self.root(), Some(uid), Some(uid)).expect("chown");
    }

    /// Runs a command of the runtime with the specification as it is now.
    pub(crate) fn command(&self, words: &[&str]) -> Output {
        let config = self.folder.path().join("config.json");
        std::fs::write(&config, self.spec.to_string()).expect("the specification");
        let output = self.folder.path().join(format!("output-{}", COUNTER.fetch_add(1, Ordering::Relaxed)));
        // A created container keeps the streams, so they must not be pipes that somebody waits for the end of.
        let file = |suffix: &str| std::fs::File::create(output.with_extension(suffix)).expect("a file");
        let mut child = runtime()
            .arg("--root")
            .arg(self.folder.path().join("state"))
            .args(words)
            .envs(self.environment.iter().cloned())
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(file("out"))
            .stderr(file("err"))
            .spawn()
            .expect("the runtime starts");
        let status = coracle_testkit::eventually(LIMIT, || child.try_wait().expect("waits"));
        let status = status.unwrap_or_else(|| {
            child.kill().expect("kills");
            panic!("{words:?} did not end within {LIMIT:?}")
        });
        let read = |suffix: &str| std::fs::read(output.with_extension(suffix)).expect("output");
        Output { status, stdout: read("out"), stderr: read("err") }
    }

    /// Runs the container to its end: status, output, errors.
    pub(crate) fn run(&self) -> (i32, String, String) {
        let output = self.command(&["run", &self.id]);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
    }

    /// Runs a command that must succeed and hands back what it printed.
    pub(crate) fn ok(&self, words: &[&str]) -> String {
        let output = self.command(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    pub(crate) fn state(&self) -> Value {
        serde_json::from_str(&self.ok(&["state", &self.id])).expect("JSON")
    }

    /// Asserts that nothing of the container is left.
    pub(crate) fn assert_gone(&self) {
        assert!(!self.folder.path().join("state").join(&self.id).exists(), "state folder of {}", self.id);
        for top in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
            assert!(!Path::new(top).join(&self.id).exists(), "cgroup of {}", self.id);
        }
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = runtime()
            .arg("--root")
            .arg(self.folder.path().join("state"))
            .args(["delete", "--force", &self.id])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}

pub(crate) fn runtime() -> Command {
    match std::env::var_os("CORACLE_TEST_RUNTIME") {
        Some(other) => Command::new(coracle_testkit::need(&other.to_string_lossy(), &other.to_string_lossy())),
        None => Command::new(env!("CARGO_BIN_EXE_corun")),
    }
}
