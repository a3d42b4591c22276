//! A control plane without a node, as a process of its own.

use std::net::TcpListener;
use std::process::{Child, Command};
use std::time::Duration;

use coracle_testkit::eventually;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

/// Seconds until it answers.
const PATIENCE_S: u64 = 60;

/// A server without a node; it ends with the value.
pub(crate) struct Server {
    pub(crate) folder: tempfile::TempDir,
    process: Child,
}

impl Server {
    pub(crate) async fn start() -> (Self, Client) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name).display().to_string();
        // Free now, and most likely a moment later.
        let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
        let log = std::fs::File::create(folder.path().join("log")).expect("a log");
        let process = Command::new(env!("CARGO_BIN_EXE_coracle"))
            .args(["server", "--disable-agent", "--bind-address", "127.0.0.1", "--node-ip", "127.0.0.1"])
            .args(["--https-listen-port", &port.to_string(), "--data-dir", &path("data"), "--run-dir", &path("run")])
            .args(["--write-kubeconfig", &path("kubeconfig")])
            .stderr(log)
            .spawn()
            .expect("the server starts");
        let server = Self { folder, process };
        let file = server.folder.path().join("kubeconfig");
        let written = eventually(Duration::from_secs(PATIENCE_S), || file.is_file().then_some(()));
        assert!(written.is_some(), "no kubeconfig:\n{}", server.log());
        let kubeconfig = Kubeconfig::read_from(&file).expect("a kubeconfig");
        let config =
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.expect("a configuration");
        let client = Client::try_from(config).expect("a client");
        (server, client)
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The server has no node, so nothing of it is left.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
