//! The peer of the API: kube-apiserver with an etcd of its own, in a temporary folder.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use kube::config::AuthInfo;
use kube::{Client, Config};
use tokio::process::{Child, Command};

use crate::peers::find;

const URL: &str = "https://127.0.0.1:6444";
const ETCD: &str = "http://127.0.0.1:2379";
const TOKEN: &str = "bench";
/// kube-apiserver tells nobody when it is ready; it is asked this often, and so many times.
const ASK_EVERY: Duration = Duration::from_millis(100);
const ASK_TIMES: usize = 600;

pub(crate) struct KubeApiserver {
    folder: tempfile::TempDir,
    etcd: Child,
    apiserver: Child,
}

impl KubeApiserver {
    /// `None` where the machine has no kube-apiserver or no etcd.
    pub(crate) async fn start() -> anyhow::Result<Option<Self>> {
        let (Some(apiserver), Some(etcd)) = (find("kube-apiserver"), find("etcd")) else { return Ok(None) };
        let folder = tempfile::tempdir().context("make a folder")?;
        let path = |name: &str| folder.path().join(name).display().to_string();
        let key = path("key.pem");
        let openssl = find("openssl").context("a key for service accounts needs openssl")?;
        let made = Command::new(openssl).args(["genrsa", "-out", &key, "2048"]).output().await?;
        ensure!(made.status.success(), "openssl: {}", String::from_utf8_lossy(&made.stderr));
        std::fs::write(path("tokens"), format!("{TOKEN},bench,bench,\"system:masters\"\n")).context("write tokens")?;
        let etcd = spawn(
            &etcd,
            &path("etcd.log"),
            &[("--data-dir", &path("etcd")), ("--listen-client-urls", ETCD), ("--advertise-client-urls", ETCD)],
        )?;
        let apiserver = spawn(
            &apiserver,
            &path("apiserver.log"),
            &[
                ("--etcd-servers", ETCD),
                ("--secure-port", "6444"),
                ("--bind-address", "127.0.0.1"),
                ("--cert-dir", &path("tls")),
                ("--token-auth-file", &path("tokens")),
                ("--authorization-mode", "RBAC"),
                ("--service-cluster-ip-range", "10.43.0.0/16"),
                ("--service-account-issuer", "https://kubernetes.default.svc"),
                ("--service-account-key-file", &key),
                ("--service-account-signing-key-file", &key),
                // Nobody else is there to be fair to.
                ("--max-requests-inflight", "0"),
                ("--max-mutating-requests-inflight", "0"),
                ("--enable-priority-and-fairness", "false"),
            ],
        )?;
        let mut peer = Self { folder, etcd, apiserver };
        let client = peer.client()?;
        for _ in 0..ASK_TIMES {
            let request = http::Request::get("/api/v1/namespaces/default").body(Vec::new())?;
            if client.request_text(request).await.is_ok() {
                return Ok(Some(peer));
            }
            if let Some(status) = peer.apiserver.try_wait()? {
                let log = std::fs::read_to_string(peer.folder.path().join("apiserver.log")).context("read its log")?;
                bail!("kube-apiserver ended: {status}: {}", log.lines().last().unwrap_or_default());
            }
            tokio::time::sleep(ASK_EVERY).await;
        }
        bail!("kube-apiserver does not become ready");
    }

    pub(crate) fn client(&self) -> anyhow::Result<Client> {
        let mut config = Config::new(URL.parse()?);
        // Its certificate is its own, made in this run.
        config.accept_invalid_certs = true;
        config.auth_info = AuthInfo { token: Some(TOKEN.to_owned().into()), ..AuthInfo::default() };
        Ok(Client::try_from(config)?)
    }

    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        self.apiserver.kill().await?;
        self.etcd.kill().await?;
        Ok(())
    }
}

fn spawn(program: &Path, log: &str, flags: &[(&str, &str)]) -> anyhow::Result<Child> {
    Command::new(program)
        .args(flags.iter().map(|(flag, value)| format!("{flag}={value}")))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(log).context("make a log")?)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("start {}", program.display()))
}
