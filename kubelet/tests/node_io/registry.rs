//! Pulls from Debian's docker-registry on loopback: plain and TLS, with and without password, through mirrors and over
//! connections that break.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use coracle_kubelet::images::registry::{HostConfig, Keyring, Mirror, RegistryConfig, TlsConfig};
use coracle_kubelet::images::{ImageError, ImageStore, NoProgress, StoreOptions};
use coracle_testkit::{assert_eventually, need};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::host::run;
use crate::images::{Entry, docker_archive, tar_of};

/// `htpasswd` line of the user `someone` with the password `s3cret`.
const PASSWORD_FILE: &str = "someone:$2b$04$SjO6gHonkK0QWzxojiCyteQWadY2WgWUX1JSr77nMRaOtt2ygpN1.\n";

struct Registry {
    process: Child,
    address: String,
    dir: tempfile::TempDir,
    certificate: Option<PathBuf>,
}

impl Drop for Registry {
    fn drop(&mut self) {
        // Already gone is gone as well.
        let _killed = self.process.kill();
        let _reaped = self.process.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|socket| socket.local_addr()).expect("a free port").port()
}

impl Registry {
    fn start(secure: bool) -> Self {
        let program = need("docker-registry", "docker-registry");
        let dir = tempfile::tempdir().expect("temp folder");
        let port = free_port();
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp:\n  addr: 127.0.0.1:{port}\n",
            dir.path().join("data").display()
        );
        let mut certificate = None;
        if secure {
            let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".into()]).expect("certificate");
            let (pem, key) = (dir.path().join("tls.pem"), dir.path().join("tls.key"));
            fs::write(&pem, made.cert.pem()).expect("write");
            fs::write(&key, made.signing_key.serialize_pem()).expect("write");
            let users = dir.path().join("users");
            fs::write(&users, PASSWORD_FILE).expect("write");
            config += &format!("  tls: {{certificate: {}, key: {}}}\n", pem.display(), key.display());
            config += &format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", users.display());
            certificate = Some(pem);
        }
        let path = dir.path().join("config.yml");
        fs::write(&path, config).expect("write");
        let process = Command::new(program)
            .arg("serve")
            .arg(&path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("start");
        assert_eventually!(10, TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok(), "the registry listens");
        Self { process, address: format!("127.0.0.1:{port}"), dir, certificate }
    }

    /// Pushes an image of one layer (compressed by skopeo) and returns its reference.
    fn push(&self, name: &str, layer: &[u8], options: &[&str]) -> String {
        let archive = self.dir.path().join("push.tar");
        docker_archive(&archive, "pushed.example/x:1", &[layer.to_vec()], None);
        let reference = format!("{}/{name}", self.address);
        let (from, to) = (format!("docker-archive:{}", archive.display()), format!("docker://{reference}"));
        let mut arguments = vec!["copy", "-q", "--dest-tls-verify=false"];
        if self.certificate.is_some() {
            arguments.extend(["--dest-creds", "someone:s3cret"]);
        }
        arguments.extend(options);
        arguments.extend([from.as_str(), to.as_str()]);
        run(&need("skopeo", "skopeo"), &arguments);
        reference
    }
}

fn store(dir: &Path, registries: RegistryConfig) -> Arc<ImageStore> {
    ImageStore::open(&dir.join("images"), StoreOptions { registries, ..StoreOptions::default() }).expect("store")
}

fn plain(address: &str) -> RegistryConfig {
    let mut config = RegistryConfig::default();
    config.mirrors.insert(address.into(), Mirror { endpoint: vec![format!("http://{address}")], only: true });
    config
}

fn layer() -> Vec<u8> {
    tar_of(&[Entry::File("hello", 0o755, b"from the registry")])
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_by_tag_by_digest_and_through_a_mirror() {
    let registry = Registry::start(false);
    let reference = registry.push("team/app:v1", &layer(), &["--format", "oci"]);
    let zstd = registry.push(
        "library/zipped:v1",
        &layer(),
        &["--format", "oci", "--dest-compress-format", "zstd", "--dest-compress"],
    );
    let dir = tempfile::tempdir().expect("temp folder");
    let mut config = plain(&registry.address);
    config
        .mirrors
        .insert("docker.io".into(), Mirror { endpoint: vec![format!("http://{}", registry.address)], only: true });
    let store = store(dir.path(), config);
    let none = Keyring::default();
    let image = store.pull(&reference, &none, Arc::new(NoProgress)).await.expect("pull");
    assert_eq!(fs::read_to_string(image.layers[0].join("hello")).expect("file"), "from the registry");
    assert_eq!(image.repo_tags, std::slice::from_ref(&reference));
    let by_digest = image.repo_digests[0].clone();
    assert!(by_digest.starts_with(&format!("{}/team/app@sha256:", registry.address)), "{by_digest}");
    assert_eq!(store.pull(&by_digest, &none, Arc::new(NoProgress)).await.expect("by digest").id, image.id);
    let zipped = store.pull(&zstd, &none, Arc::new(NoProgress)).await.expect("zstd");
    assert_eq!(zipped.layers, image.layers, "however compressed, the layer is the same");
    let mirrored = store.pull("zipped:v1", &none, Arc::new(NoProgress)).await.expect("through the mirror");
    assert!(mirrored.repo_tags.contains(&"docker.io/library/zipped:v1".to_owned()), "{:?}", mirrored.repo_tags);
    let error = store
        .pull(&format!("{}/team/none:v1", registry.address), &none, Arc::new(NoProgress))
        .await
        .expect_err("absent");
    assert!(matches!(&error, ImageError::Registry { status: 404, .. }), "{error}");
    assert!(error.to_string().contains("manifest unknown"), "{error}");
    let lie = format!("{}/team/app@sha256:{}", registry.address, "0".repeat(64));
    assert!(store.pull(&lie, &none, Arc::new(NoProgress)).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_and_passwords() {
    let registry = Registry::start(true);
    let reference = registry.push("app:v1", &layer(), &[]);
    let dir = tempfile::tempdir().expect("temp folder");
    let mut config = RegistryConfig::default();
    let tls = TlsConfig { ca_file: registry.certificate.clone(), ..TlsConfig::default() };
    config.configs.insert(registry.address.clone(), HostConfig { auth: None, tls: Some(tls) });
    let strict = store(&dir.path().join("strict"), RegistryConfig::default());
    let error = strict.pull(&reference, &Keyring::default(), Arc::new(NoProgress)).await.expect_err("unknown CA");
    assert!(matches!(error, ImageError::Transport { .. }), "{error}");
    let store = store(dir.path(), config);
    let error = store.pull(&reference, &Keyring::default(), Arc::new(NoProgress)).await.expect_err("no password");
    assert!(matches!(error, ImageError::Unauthorized { .. }), "{error}");
    let keyring = |password: &str| {
        let mut keyring = Keyring::default();
        let json =
            format!(r#"{{"auths":{{"{}":{{"username":"someone","password":"{password}"}}}}}}"#, registry.address);
        keyring.add_docker_config_json(json.as_bytes()).expect("valid");
        keyring
    };
    let error = store.pull(&reference, &keyring("wrong"), Arc::new(NoProgress)).await.expect_err("wrong password");
    assert!(matches!(error, ImageError::Unauthorized { .. }), "{error}");
    assert!(!error.to_string().contains("wrong"), "no secret in an error: {error}");
    store.pull(&reference, &keyring("s3cret"), Arc::new(NoProgress)).await.expect("the right password");
}

/// Between client and registry: the first answers that are longer than a manifest break off.
async fn flaky_proxy(to: String, breaks: usize, seen: Arc<AtomicUsize>) -> SocketAddr {
    const BREAK_AFTER_BYTES: usize = 100_000;
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bind");
    let address = listener.local_addr().expect("address");
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (to, seen) = (to.clone(), seen.clone());
            tokio::spawn(async move {
                let server = tokio::net::TcpStream::connect(to).await.expect("registry");
                let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
                    (client.into_split(), server.into_split());
                tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
                let (mut buffer, mut sent) = (vec![0; 8192], 0);
                while let Ok(count @ 1..) = from_server.read(&mut buffer).await {
                    if to_client.write_all(&buffer[..count]).await.is_err() {
                        return;
                    }
                    sent += count;
                    if sent > BREAK_AFTER_BYTES && seen.load(Ordering::SeqCst) < breaks {
                        seen.fetch_add(1, Ordering::SeqCst);
                        return;
                    }
                }
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_downloads_are_resumed() {
    let registry = Registry::start(false);
    // Noise, so that compression leaves it long.
    let mut state = 1u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
    .take(400_000)
    .collect();
    registry.push("big:v1", &tar_of(&[Entry::File("noise", 0o644, &noise)]), &[]);
    let seen = Arc::new(AtomicUsize::new(0));
    let proxy = flaky_proxy(registry.address.clone(), 3, seen.clone()).await;
    let dir = tempfile::tempdir().expect("temp folder");
    let store = store(dir.path(), plain(&proxy.to_string()));
    let image =
        store.pull(&format!("{proxy}/big:v1"), &Keyring::default(), Arc::new(NoProgress)).await.expect("in the end");
    assert_eq!(fs::read(image.layers[0].join("noise")).expect("file"), noise);
    assert_eq!(seen.load(Ordering::SeqCst), 3, "it did break");
}
