//! A host for one test: mount and network namespaces of its own, a server in them, and nothing left when it ends.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use coracle_testkit::{Image, eventually};

/// Seconds for anything that must come about; a loaded machine needs a multiple of what an idle one does.
pub(crate) const PATIENCE_S: u32 = 60;

pub(crate) struct Host {
    folder: tempfile::TempDir,
    /// A process that holds the namespaces, so that a server that starts again finds what the one before left.
    holder: Child,
    server: Option<Child>,
    /// More options of the daemon.
    pub options: Vec<String>,
    pub cgroup: String,
}

impl Host {
    pub(crate) fn new(name: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let script = "umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup && ip link set lo up && echo ready && exec sleep 600";
        let mut holder = Command::new("unshare")
            .args(["--net", "--mount", "--propagation", "private", "sh", "-c", script])
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare starts");
        let mut line = String::new();
        let out = holder.stdout.take().expect("piped");
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).expect("the holder speaks");
        assert_eq!(line.trim(), "ready", "the test's host is not made");
        let cgroup = format!("coracle-test-{name}-{}", holder.id());
        Self { folder, holder, server: None, options: Vec::new(), cgroup }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a manifest of a static pod; an empty one goes.
    pub(crate) fn manifests(&self, name: &str, text: &str) {
        let folder = self.path("manifests");
        std::fs::create_dir_all(&folder).expect("a folder of manifests");
        let path = folder.join(name);
        if text.is_empty() {
            std::fs::remove_file(path).expect("there was a manifest");
        } else {
            std::fs::write(path, text).expect("a manifest");
        }
    }

    /// Writes a file of the Container Device Interface.
    pub(crate) fn cdi(&self, name: &str, text: &str) {
        std::fs::create_dir_all(self.path("cdi")).expect("a folder");
        std::fs::write(self.path("cdi").join(name), text).expect("a CDI file");
    }

    /// A command in the host's namespaces.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.holder.id().to_string(), "--net", "--mount"]).arg(program.as_ref());
        command.env("KUBECONFIG", self.path("kubeconfig"));
        command
    }

    fn folders(&self) -> Vec<String> {
        let text = |name: &str| self.path(name).display().to_string();
        [
            "--data-dir",
            &text("data"),
            "--run-dir",
            &text("run"),
            "--pod-log-dir",
            &text("log/pods"),
            "--cdi-spec-dir",
            &text("cdi"),
            "--cgroup-root",
            &self.cgroup,
        ]
        .map(str::to_owned)
        .into()
    }

    /// Starts the server; returns when its node is Ready.
    pub(crate) fn start(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.path("log.txt")).expect("a log");
        let mut command = self.command(env!("CARGO_BIN_EXE_coracle"));
        command
            .arg("server")
            .args(self.folders())
            .args(["--node-name", "n1", "--write-kubeconfig"])
            .arg(self.path("kubeconfig"))
            .arg("--pod-manifest-path")
            .arg(self.path("manifests"))
            // How full the disk of the machine is decides nothing in a test.
            .args(["--eviction-hard", "memory.available<1Mi"])
            .args(&self.options);
        self.server = Some(command.stderr(log).spawn().expect("the server starts"));
        let ready = || self.is_ready("n1").then_some(());
        assert!(eventually(Duration::from_secs(PATIENCE_S.into()), ready).is_some(), "no Ready node:\n{}", self.log());
    }

    /// Makes the host a switch that others can be plugged into, at 10.99.0.254.
    pub(crate) fn make_switch(&self) {
        self.shell("ip link add br0 type bridge && ip address add 10.99.0.254/24 dev br0 && ip link set br0 up");
    }

    /// Gives the host an uplink with the address 10.99.0.NUMBER.
    pub(crate) fn plug_into(&self, switch: &Self, number: usize) {
        let peer = format!("port{number}");
        let to = switch.holder.id();
        self.shell(&format!(
            "ip link add eth0 type veth peer name {peer} netns {to} && ip address add 10.99.0.{number}/24 dev eth0 && ip link set eth0 up && ip route add default via 10.99.0.254"
        ));
        switch.shell(&format!("ip link set {peer} master br0 up"));
    }

    pub(crate) fn shell(&self, script: &str) {
        let output = self.command("sh").args(["-c", script]).output().expect("sh starts");
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// What a command of ours prints; it must succeed.
    pub(crate) fn coracle(&self, arguments: &[&str]) -> String {
        let output = self.command(env!("CARGO_BIN_EXE_coracle")).args(arguments).output().expect("coracle starts");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    fn agent(&self, name: &str, server: &str, token: Option<&str>) -> Command {
        let mut command = self.command(env!("CARGO_BIN_EXE_coracle"));
        command.arg("agent").args(self.folders()).args(["--node-name", name, "--server", server]);
        command.args(token.iter().flat_map(|token| ["--token", token])).args(&self.options);
        command
    }

    /// Starts an agent; it joins by itself.
    pub(crate) fn start_agent(&mut self, name: &str, server: &str, token: Option<&str>) {
        let log = std::fs::File::options().create(true).append(true).open(self.path("log.txt")).expect("a log");
        self.server = Some(self.agent(name, server, token).stderr(log).spawn().expect("the agent starts"));
    }

    /// What an agent says that cannot join.
    pub(crate) fn agent_error(&self, name: &str, server: &str, token: &str) -> String {
        let output = self.agent(name, server, Some(token)).output().expect("the agent starts");
        assert!(!output.status.success(), "it joined");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Whether the API calls a node Ready.
    pub(crate) fn is_ready(&self, node: &str) -> bool {
        let status = r#"jsonpath={.status.conditions[?(@.type=="Ready")].status}"#;
        let output = self.kubectl(&["get", "node", node, "-o", status]);
        output.status.success() && output.stdout == b"True"
    }

    /// Starts the container runtime alone; returns when it listens.
    pub(crate) fn start_cri(&mut self) -> PathBuf {
        let log = std::fs::File::options().create(true).append(true).open(self.path("log.txt")).expect("a log");
        let socket = self.path("cri.sock");
        let mut command = self.command(env!("CARGO_BIN_EXE_coracle"));
        command.arg("cri").args(self.folders()).arg("--listen").arg(format!("unix://{}", socket.display()));
        self.server = Some(command.stderr(log).spawn().expect("the runtime starts"));
        let listens = || std::os::unix::net::UnixStream::connect(&socket).ok().map(drop);
        assert!(eventually(Duration::from_secs(PATIENCE_S.into()), listens).is_some(), "no socket:\n{}", self.log());
        socket
    }

    /// Kills the server without warning.
    pub(crate) fn kill_server(&mut self) {
        let mut server = self.server.take().expect("a server runs");
        // nsenter executes the server in its own process.
        server.kill().expect("the server is killed");
        server.wait().expect("the server ends");
    }

    /// Kills the supervisor of containers without warning.
    pub(crate) fn kill_supervisor(&self) {
        let killed =
            Command::new("pkill").args(["-KILL", "-f", &format!("supervisor {}", self.path("run").display())]).status();
        assert!(killed.expect("pkill starts").success(), "there was no supervisor");
    }

    pub(crate) fn import(&self, image: &Image) {
        let archive = self.path("image.tar");
        image.write(&archive).expect("an image archive");
        let data = self.path("data").display().to_string();
        let output = self
            .command(env!("CARGO_BIN_EXE_coracle"))
            .args(["image", "--data-dir", &data, "import"])
            .arg(&archive)
            .output();
        let output = output.expect("the import starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    pub(crate) fn kubectl(&self, arguments: &[&str]) -> Output {
        self.command(coracle_testkit::kubectl()).args(arguments).output().expect("kubectl starts")
    }

    /// What kubectl prints; it must succeed.
    pub(crate) fn get(&self, arguments: &[&str]) -> String {
        let output = self.kubectl(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl {arguments:?}: {error}\n{}", self.log());
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    pub(crate) fn apply(&self, manifest: &str) -> Output {
        let file = self.path("manifest.yaml");
        std::fs::write(&file, manifest).expect("a manifest");
        self.kubectl(&["apply", "-f", &file.display().to_string()])
    }

    pub(crate) fn log(&self) -> String {
        let text = std::fs::read_to_string(self.path("log.txt")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// Stops the server, takes the node down and says what is left of it: nothing should be.
    pub(crate) fn take_down(&mut self) -> Vec<String> {
        if let Some(mut server) = self.server.take() {
            nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(i32::try_from(server.id()).expect("a pid")),
                nix::sys::signal::Signal::SIGTERM,
            )
            .expect("the server can be told to stop");
            assert!(server.wait().expect("the server ends").success(), "the server failed:\n{}", self.log());
        }
        let output = self
            .command(env!("CARGO_BIN_EXE_coracle"))
            .arg("cleanup")
            .args(self.folders())
            .output()
            .expect("cleanup starts");
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !told.contains("coracle supervisor:"), "cleanup: {told}");
        let root = self.folder.path().display().to_string();
        let script = format!(
            "grep -F {root} /proc/self/mounts; ip -o link | grep -v LOOPBACK; ls -d /sys/fs/cgroup/{} 2>/dev/null; ls {root}/run 2>/dev/null; pgrep -af 'supervisor {root}'; true",
            self.cgroup
        );
        let left = self.command("sh").args(["-c", &script]).output().expect("sh starts");
        String::from_utf8_lossy(&left.stdout)
            .lines()
            .filter(|line| !line.contains("pgrep"))
            .map(str::to_owned)
            .collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
            let _ = self.command(env!("CARGO_BIN_EXE_coracle")).arg("cleanup").args(self.folders()).output();
        }
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// The image of the small web server, built once by cargo beside this test.
pub(crate) fn hello() -> Image {
    let program = Path::new(env!("CARGO_BIN_EXE_coracle")).with_file_name("hello-static");
    static BUILT: std::sync::Once = std::sync::Once::new();
    BUILT.call_once(|| {
        let target = std::path::Path::new(env!("CARGO_BIN_EXE_coracle"))
            .ancestors()
            .nth(2)
            .expect("a target folder")
            .join("static");
        let output = Command::new(env!("CARGO"))
            .args(["rustc", "-q", "-p", "coracle-hello", "--bin", "hello", "--", "-C", "target-feature=+crt-static"])
            .env("CARGO_TARGET_DIR", &target)
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .output()
            .expect("cargo starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let new = program.with_extension(std::process::id().to_string());
        std::fs::copy(target.join("debug/hello"), &new).expect("the program is copied");
        std::fs::rename(&new, &program).expect("the program is put in place");
    });
    Image {
        tag: "docker.io/library/hello:1".into(),
        files: vec![(program, "/hello".into())],
        entrypoint: vec!["/hello".into()],
        ..Image::default()
    }
}
