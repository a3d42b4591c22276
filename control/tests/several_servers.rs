//! Several servers on one etcd, real processes: one is killed, and the others go on where it was.
#![forbid(unsafe_code)]

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use coracle_testkit::assert_eventually_async;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use kube::api::{Api, ListParams, PostParams};
use serde_json::json;
use tokio_util::sync::CancellationToken;

/// Seconds for anything that must come about; a loaded machine needs a multiple of what an idle one does.
const PATIENCE_S: u32 = 60;
/// Time for another to lead after the leader died: 15 s, and as much for a loaded machine.
const TAKEN_OVER: Duration = Duration::from_secs(30);

/// A process that ends with the test.
struct Process(Child);

impl Process {
    fn kill(&mut self) {
        self.0.kill().expect("it is killed");
        self.0.wait().expect("it ends");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An etcd that listens, and where.
fn etcd(folder: &Path) -> (Process, String) {
    // Ports may be taken by another test between the look and the use; then etcd ends and others are tried.
    for number in 0..10 {
        let [client, peer] = [(); 2].map(|()| {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
            listener.local_addr().expect("an address")
        });
        let url = format!("http://{client}");
        let process = Command::new(coracle_testkit::need("etcd", "etcd-server"))
            .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
            .args(["--listen-peer-urls", &format!("http://{peer}"), "--unsafe-no-fsync", "--data-dir"])
            .arg(folder.join(format!("etcd-{number}")))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd starts");
        let mut process = Process(process);
        let listens = coracle_testkit::eventually(Duration::from_secs(PATIENCE_S.into()), || {
            let ended = process.0.try_wait().expect("etcd's state").is_some();
            let listens = TcpStream::connect(client).is_ok();
            (ended || listens).then_some(!ended)
        });
        if listens == Some(true) {
            return (process, url);
        }
    }
    panic!("etcd does not start");
}

struct Server {
    process: Process,
    client: kube::Client,
    folder: PathBuf,
}

impl Server {
    /// Starts a server without a node; `like` has the authority that all must share.
    async fn start(folder: PathBuf, etcd: &str, like: Option<&Server>) -> Self {
        let (data, kubeconfig) = (folder.join("data"), folder.join("kubeconfig"));
        std::fs::create_dir_all(data.join("tls")).expect("a folder");
        for name in ["ca.crt", "ca.key", "service-account.key"] {
            if let Some(like) = like {
                let from = like.folder.join("data/tls").join(name);
                std::fs::copy(from, data.join("tls").join(name)).expect("a key is copied");
            }
        }
        let log = std::fs::File::create(folder.join("log.txt")).expect("a log");
        let mut process = Command::new(env!("CARGO_BIN_EXE_coracle"));
        process
            .args(["server", "--disable-agent", "--bind-address", "127.0.0.1", "--https-listen-port", "0"])
            .args(["--datastore-endpoint", etcd, "--data-dir"])
            .arg(&data)
            .arg("--run-dir")
            .arg(folder.join("run"))
            .arg("--write-kubeconfig")
            .arg(&kubeconfig)
            .stderr(log);
        let process = Process(process.spawn().expect("the server starts"));
        let told = || std::fs::read_to_string(folder.join("log.txt")).unwrap_or_default();
        assert_eventually_async!(PATIENCE_S, kubeconfig.exists(), "no kubeconfig:\n{}", told());
        let text = kube::config::Kubeconfig::read_from(&kubeconfig).expect("a kubeconfig");
        let config = kube::Config::from_custom_kubeconfig(text, &Default::default()).await.expect("a configuration");
        let client = kube::Client::try_from(config).expect("a client");
        assert_eventually_async!(PATIENCE_S, client.apiserver_version().await.is_ok(), "no answer:\n{}", told());
        Self { process, client, folder }
    }
}

async fn leader(client: &kube::Client) -> String {
    let leases = Api::<Lease>::namespaced(client.clone(), "kube-system");
    let lease = leases.get_opt("coracle-control-plane").await.ok().flatten();
    lease.and_then(|lease| lease.spec?.holder_identity).unwrap_or_default()
}

/// Writes until told to stop; the names of what was acknowledged.
async fn write(client: kube::Client, who: &'static str, stop: CancellationToken) -> Vec<String> {
    let maps = Api::<ConfigMap>::namespaced(client, "default");
    let mut acknowledged = Vec::new();
    for number in 0.. {
        if stop.is_cancelled() {
            break;
        }
        let name = format!("{who}-{number}");
        let map = serde_json::from_value(json!({"metadata": {"name": name}})).expect("a ConfigMap");
        match maps.create(&PostParams::default(), &map).await {
            Ok(_) => acknowledged.push(name),
            // Its server is gone: what it was told before counts.
            Err(_) if who == "first" => break,
            Err(error) => panic!("{who}: {error}"),
        }
    }
    acknowledged
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_leads_when_the_leader_dies_and_no_write_is_lost() {
    let folder = tempfile::tempdir().expect("a folder");
    let (_etcd, endpoint) = etcd(folder.path());
    let place = |name: &str| {
        std::fs::create_dir_all(folder.path().join(name)).expect("a folder");
        folder.path().join(name)
    };
    let mut first = Server::start(place("one"), &endpoint, None).await;
    assert_eventually_async!(PATIENCE_S, !leader(&first.client).await.is_empty(), "nobody leads");
    let before = leader(&first.client).await;
    let second = Server::start(place("two"), &endpoint, Some(&first)).await;
    let third = Server::start(place("three"), &endpoint, Some(&first)).await;
    let stop = CancellationToken::new();
    let writers: Vec<_> = [("first", &first), ("second", &second), ("third", &third)]
        .map(|(who, server)| tokio::spawn(write(server.client.clone(), who, stop.clone())))
        .into();
    let maps = Api::<ConfigMap>::namespaced(second.client.clone(), "default");
    let written = || async { maps.get_opt("first-20").await.ok().flatten().is_some() };
    assert_eventually_async!(PATIENCE_S, written().await, "the first server takes writes");
    assert_eq!(leader(&third.client).await, before, "one leads, as all see it");
    first.process.kill();
    let killed = Instant::now();
    let moved = || async { leader(&second.client).await != before };
    assert_eventually_async!(PATIENCE_S, moved().await, "nobody took over from {before}");
    let took = killed.elapsed();
    eprintln!("another leads after {took:?}");
    assert!(took < TAKEN_OVER, "another leads only after {took:?}");
    // The duties have moved, too: a Deployment gets its ReplicaSet.
    let deployment: Deployment = serde_json::from_value(json!({"metadata": {"name": "web"}, "spec": {
        "selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}},
            "spec": {"containers": [{"name": "c", "image": "x"}]}}}}))
    .expect("a Deployment");
    Api::namespaced(third.client.clone(), "default").create(&PostParams::default(), &deployment).await.expect("made");
    let sets = Api::<ReplicaSet>::namespaced(second.client.clone(), "default");
    let made = || async { sets.list(&ListParams::default()).await.is_ok_and(|list| list.items.len() == 1) };
    assert_eventually_async!(PATIENCE_S, made().await, "no controller makes the ReplicaSet");
    stop.cancel();
    let mut acknowledged = Vec::new();
    for writer in writers {
        acknowledged.extend(writer.await.expect("the writer ends"));
    }
    // What the others acknowledged is there, whichever of the two is asked.
    for server in [&second, &third] {
        let maps = Api::<ConfigMap>::namespaced(server.client.clone(), "default");
        let there = maps.list(&ListParams::default()).await.expect("a list").items;
        let there: std::collections::HashSet<String> = there.into_iter().filter_map(|map| map.metadata.name).collect();
        let lost: Vec<&String> = acknowledged.iter().filter(|name| !there.contains(*name)).collect();
        assert!(lost.is_empty(), "{} of {} acknowledged writes are lost: {lost:?}", lost.len(), acknowledged.len());
    }
}

/// Both servers are asked for the same node ports at the same time, and for any.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_servers_never_give_one_node_port_twice() {
    const ASKED: std::ops::Range<u16> = 30_100..30_130;
    let folder = tempfile::tempdir().expect("a folder");
    let (_etcd, endpoint) = etcd(folder.path());
    for name in ["one", "two"] {
        std::fs::create_dir_all(folder.path().join(name)).expect("a folder");
    }
    let first = Server::start(folder.path().join("one"), &endpoint, None).await;
    let second = Server::start(folder.path().join("two"), &endpoint, Some(&first)).await;
    let create = |server: &Server, name: String, port: Option<u16>| {
        let services = Api::<Service>::namespaced(server.client.clone(), "default");
        let spec = json!({"metadata": {"name": name}, "spec": {"type": "NodePort", "ports": [{"port": 80, "nodePort": port}]}});
        async move {
            let service = serde_json::from_value(spec).expect("a Service");
            match services.create(&PostParams::default(), &service).await {
                Ok(made) => Some(made),
                Err(kube::Error::Api(refusal)) if refusal.message.contains("already allocated") => None,
                Err(error) => panic!("{error}"),
            }
        }
    };
    let asked = ASKED.flat_map(|port| [("one", &first), ("two", &second)].map(|who| (who, port)));
    let asked = asked.map(|((who, server), port)| create(server, format!("{who}-{port}"), Some(port)));
    let any =
        (0..30).flat_map(|n| [create(&first, format!("one-{n}"), None), create(&second, format!("two-{n}"), None)]);
    let asked = futures::future::join_all(asked).await;
    let any = futures::future::join_all(any).await;
    for (port, both) in ASKED.zip(asked.chunks(2)) {
        assert_eq!(both.iter().flatten().count(), 1, "port {port}");
    }
    let number = |service: &Service| service.spec.as_ref()?.ports.as_ref()?.first()?.node_port;
    let all: Vec<i32> = asked.iter().chain(&any).flatten().filter_map(number).collect();
    let different: std::collections::BTreeSet<i32> = all.iter().copied().collect();
    assert_eq!((all.len(), different.len()), (90, 90), "{all:?}");
}
