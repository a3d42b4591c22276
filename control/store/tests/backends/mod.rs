//! Stores to test, and objects to put into them.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coracle_store::{Draft, EmbeddedOptions, EtcdOptions, Store};
use coracle_testkit::{Deadline, need};
use serde_json::json;
use tempfile::TempDir;

pub(crate) fn draft(text: &str) -> Draft {
    Draft::encode(&json!({"kind": "Test", "metadata": {"name": "n", "uid": "u"}, "text": text})).unwrap()
}

/// The bytes of [`draft`] once written by `revision`.
pub(crate) fn text(text: &str, revision: u64) -> Bytes {
    let metadata = json!({"name": "n", "resourceVersion": revision.to_string(), "uid": "u"});
    json!({"kind": "Test", "metadata": metadata, "text": text}).to_string().into()
}

pub(crate) trait Backend {
    fn store(&self) -> Arc<dyn Store>;
}

pub(crate) struct Embedded {
    store: Arc<coracle_store::Embedded>,
    _folder: TempDir,
}

impl Embedded {
    pub(crate) async fn start() -> Embedded {
        let folder = tempfile::tempdir().unwrap();
        let store = coracle_store::Embedded::open(folder.path(), EmbeddedOptions::default()).unwrap();
        Embedded { store: Arc::new(store), _folder: folder }
    }

    pub(crate) fn store(&self) -> Arc<dyn Store> {
        self.store.clone()
    }
}

/// An etcd of its own on loopback, without flushes: these tests are not about its disk.
pub(crate) struct Etcd {
    process: Child,
    store: Option<Arc<coracle_store::Etcd>>,
    arguments: Vec<String>,
    options: EtcdOptions,
    folder: TempDir,
}

impl Etcd {
    pub(crate) async fn start() -> Etcd {
        // Ports may be taken by another test between the look and the use; then etcd ends and others are tried.
        for _ in 0..10 {
            let [client, peer] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
            let options = EtcdOptions::new(vec![format!("http://{client}")]);
            let arguments = vec!["--listen-peer-urls".to_owned(), format!("http://{peer}")];
            if let Some(etcd) = Self::start_with(options, arguments, tempfile::tempdir().unwrap()).await {
                return etcd;
            }
        }
        panic!("etcd does not start");
    }

    /// `None` when etcd ends at once.
    pub(crate) async fn start_with(options: EtcdOptions, arguments: Vec<String>, folder: TempDir) -> Option<Etcd> {
        let process = Self::spawn(&options, &arguments, &folder);
        let mut etcd = Etcd { process, store: None, arguments, options, folder };
        etcd.store = Some(Arc::new(etcd.connect().await?));
        Some(etcd)
    }

    fn spawn(options: &EtcdOptions, arguments: &[String], folder: &TempDir) -> Child {
        let endpoint = &options.endpoints[0];
        Command::new(need("etcd", "etcd-server"))
            .args(["--listen-client-urls", endpoint, "--advertise-client-urls", endpoint])
            .args(["--data-dir".as_ref(), folder.path().as_os_str()])
            .arg("--unsafe-no-fsync")
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Another store on the same etcd.
    pub(crate) async fn connect(&mut self) -> Option<coracle_store::Etcd> {
        let deadline = Deadline::after(Duration::from_secs(20));
        while self.process.try_wait().unwrap().is_none() {
            match coracle_store::Etcd::connect(self.options.clone()).await {
                Ok(store) => return Some(store),
                Err(error) => assert!(!deadline.passed(), "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        None
    }

    /// Kills etcd.
    pub(crate) fn stop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Starts it again with its data.
    pub(crate) fn start_again(&mut self) {
        self.process = Self::spawn(&self.options, &self.arguments, &self.folder);
    }
}

impl Backend for Etcd {
    fn store(&self) -> Arc<dyn Store> {
        self.store.clone().unwrap()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.store = None;
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
