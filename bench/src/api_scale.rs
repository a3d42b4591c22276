//! What grows with a cluster: memory and start with many pods, long lists, one change that many watch.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use futures::StreamExt as _;
use futures::future::try_join_all;
use http_body_util::BodyExt as _;
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::report::Figure;
use crate::server::Server;

/// Clients that make the objects.
const CREATORS: usize = 64;
/// Nodes that the pods are on.
const NODES: usize = 100;
/// Lists that are taken.
const LISTS: usize = 9;
/// Watches that are opened at once.
const OPENED_AT_ONCE: usize = 200;
/// Time for watchers to begin to wait.
const QUIET: Duration = Duration::from_millis(500);
/// Time for one change to reach everybody.
const PATIENCE: Duration = Duration::from_secs(60);
/// Flags of a server that is an API and nothing else.
const ALONE: [&str; 3] = ["--disable-agent", "--disable-controller-manager", "--disable-scheduler"];
/// Time after which a server without work is measured.
const SETTLED: Duration = Duration::from_secs(20);
/// Time between renewals of a node's lease.
const RENEWED: Duration = Duration::from_secs(10);
const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
const PODS: &str = "/api/v1/namespaces/default/pods";
const WATCHED: &str = "/api/v1/namespaces/default/configmaps";

/// How much there is of everything.
pub(crate) struct Scale {
    pub(crate) pods: usize,
    pub(crate) listed: usize,
    pub(crate) watchers: usize,
}

pub(crate) async fn measure(coracle: &Path, scale: &Scale) -> anyhow::Result<Vec<Figure>> {
    let mut figures = Vec::new();
    if scale.watchers > 0 {
        let server = Server::start(coracle, &ALONE).await?;
        let measured = watched(&server, scale).await;
        server.stop().await.context("take the server down")?;
        figures.extend(measured?);
    }
    if scale.pods > 0 {
        figures.extend(held(coracle, &ALONE, scale, "API alone").await?);
        figures.extend(held(coracle, &["--disable-agent"], scale, "with controllers and scheduler").await?);
    }
    Ok(figures)
}

/// A figure of ours; it takes long until all are there, so each is told when it is.
fn ours(name: String, unit: &'static str, samples: Vec<f64>) -> Figure {
    eprintln!("{name}: {samples:.1?} {unit}");
    Figure::ours(name, unit, samples)
}

async fn held(coracle: &Path, flags: &[&str], scale: &Scale, what: &str) -> anyhow::Result<Vec<Figure>> {
    let mut server = Server::start(coracle, flags).await?;
    let measured = async {
        let clients = try_join_all((0..CREATORS).map(|_| server.client())).await?;
        account(&clients[0], flags == ALONE).await?;
        let alive = (flags != ALONE).then(|| tokio::spawn(keep_alive(clients[0].clone())));
        for node in 0..NODES {
            let name = format!("node-{node}");
            call(&clients[0], "POST", "/api/v1/nodes", &json!({"metadata": {"name": name}})).await?;
        }
        let empty = server.rss_mib()?;
        let (share, started, cpu) = (scale.pods.div_ceil(CREATORS), Instant::now(), server.cpu_s()?);
        try_join_all(clients.iter().enumerate().map(|(creator, client)| async move {
            for number in creator * share..scale.pods.min((creator + 1) * share) {
                call(client, "POST", PODS, &pod(number)).await?;
            }
            anyhow::Ok(())
        }))
        .await?;
        let rate = scale.pods as f64 / started.elapsed().as_secs_f64();
        let cost = (server.cpu_s()? - cpu) * 1e6 / scale.pods as f64;
        let full = server.rss_mib()?;
        let mut figures = Vec::new();
        let (mut first, mut whole, mut bytes) = (Vec::new(), Vec::new(), 0);
        for _ in 0..LISTS {
            let started = Instant::now();
            let path = format!("{PODS}?limit={}", scale.listed);
            let mut body = clients[0].send(request("GET", &path, &Value::Null)?).await?.into_body();
            bytes = 0;
            while let Some(frame) = body.frame().await {
                if bytes == 0 {
                    first.push(started.elapsed().as_secs_f64() * 1e3);
                }
                bytes += frame?.data_ref().map_or(0, |data| data.len());
            }
            whole.push(started.elapsed().as_secs_f64() * 1e3);
        }
        let listed = format!("list {} of {} pods ({:.1} MB), {what}", scale.listed, scale.pods, bytes as f64 / 1e6);
        drop(clients);
        if let Some(alive) = alive {
            alive.abort();
        }
        server.restart().await?;
        let (ready, again) = (server.started.elapsed().as_secs_f64(), server.rss_mib()?);
        let start_cpu = server.cpu_s()?;
        tokio::time::sleep(SETTLED).await;
        let settled = server.rss_mib()?;
        let of = |name: &str| format!("{} pods, {what}: {name}", scale.pods);
        figures.extend([
            ours(of("created"), "per s", vec![rate]),
            ours(of("the server's CPU time a creation"), "µs", vec![cost]),
            ours(of("memory"), "MiB", vec![full]),
            ours(of("memory a pod"), "KiB", vec![(full - empty) * 1024.0 / scale.pods as f64]),
            ours(of("ready after a restart"), "s", vec![ready]),
            ours(of("CPU time until ready again"), "s", vec![start_cpu]),
            ours(of("memory when ready again"), "MiB", vec![again]),
            ours(of("memory 20 s later"), "MiB", vec![settled]),
            ours(format!("{listed}: first byte"), "ms", first),
            ours(format!("{listed}: whole"), "ms", whole),
        ]);
        anyhow::Ok(figures)
    }
    .await;
    server.stop().await.context("take the server down")?;
    measured
}

/// One change, and everybody who watches.
async fn watched(server: &Server, scale: &Scale) -> anyhow::Result<Vec<Figure>> {
    let writer = server.client().await?;
    tokio::time::sleep(SETTLED).await;
    let empty = server.rss_mib()?;
    let path = format!("{WATCHED}?watch=true&resourceVersion=0");
    let opened: Vec<anyhow::Result<Body>> = futures::stream::iter(0..scale.watchers)
        .map(|_| async {
            let response = server.client().await?.send(request("GET", &path, &Value::Null)?).await?;
            ensure!(response.status().is_success(), "a watch was refused: {}", response.status());
            Ok(response.into_body())
        })
        .buffer_unordered(OPENED_AT_ONCE)
        .collect()
        .await;
    let mut watches = opened.into_iter().collect::<anyhow::Result<Vec<Body>>>()?;
    let with = server.rss_mib()?;
    let (mut times, mut costs) = (Vec::new(), Vec::new());
    for round in 0..=LISTS {
        let reading = watches.into_iter().map(|mut body| {
            tokio::spawn(async move {
                let frame = body.frame().await;
                (frame.is_some_and(|frame| frame.is_ok()).then(Instant::now), body)
            })
        });
        let reading: Vec<_> = reading.collect();
        // Until everybody waits: what they do before is none of the change's cost.
        tokio::time::sleep(QUIET).await;
        let (started, cpu) = (Instant::now(), server.cpu_s()?);
        call(&writer, "POST", WATCHED, &json!({"metadata": {"name": format!("change-{round}")}})).await?;
        let mut last = started;
        watches = Vec::new();
        for read in timeout(PATIENCE, try_join_all(reading)).await.context("a change did not reach everybody")?? {
            last = last.max(read.0.context("a watch broke")?);
            watches.push(read.1);
        }
        // The first finds everything cold.
        if round > 0 {
            times.push((last - started).as_secs_f64() * 1e3);
            costs.push((server.cpu_s()? - cpu) * 1e3);
        }
    }
    let a_watch = (with - empty) * 1024.0 / scale.watchers as f64;
    Ok(vec![
        ours(format!("one change to {} watchers, each on its own connection", scale.watchers), "ms", times),
        ours(format!("one change to {} watchers: the server's CPU time", scale.watchers), "ms", costs),
        ours("memory of an API alone without work".into(), "MiB", vec![empty]),
        ours(format!("{} watchers: memory a watcher", scale.watchers), "KiB", vec![a_watch]),
    ])
}

/// Without the account of their namespace there are no pods; with controllers it comes by itself.
async fn account(client: &Client, make: bool) -> anyhow::Result<()> {
    const ACCOUNTS: &str = "/api/v1/namespaces/default/serviceaccounts";
    if make {
        return call(client, "POST", ACCOUNTS, &json!({"metadata": {"name": "default"}})).await;
    }
    let made = async {
        while call(client, "GET", &format!("{ACCOUNTS}/default"), &Value::Null).await.is_err() {
            tokio::time::sleep(QUIET).await;
        }
    };
    timeout(PATIENCE, made).await.context("no controller makes the account of the namespace")
}

/// Renews the leases of the nodes, so that their pods are left where they are.
async fn keep_alive(client: Client) {
    loop {
        let now = k8s_openapi::jiff::Timestamp::now();
        for node in 0..NODES {
            let name = format!("node-{node}");
            let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name},
                "spec": {"holderIdentity": name, "leaseDurationSeconds": 40,
                    "renewTime": now.strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string()}});
            let path = format!("{LEASES}/{name}?fieldManager=bench&force=true");
            let request = http::Request::patch(path).header("content-type", "application/apply-patch+yaml");
            let renewed = match request.body(Body::from(lease.to_string().into_bytes())) {
                Ok(request) => client.send(request).await.map(|response| response.status()),
                Err(error) => return eprintln!("renew a lease: {error}"),
            };
            match renewed {
                Ok(status) if status.is_success() => {}
                other => eprintln!("renew the lease of {name}: {other:?}"),
            }
        }
        tokio::time::sleep(RENEWED).await;
    }
}

fn pod(number: usize) -> Value {
    json!({"metadata": {"name": format!("pod-{number}"), "labels": {"app": "scale", "tier": "bench"}}, "spec": {
        "nodeName": format!("node-{}", number % NODES), "containers": [{"name": "main", "image": "registry.example/app:1.2.3",
            "env": [{"name": "A", "value": "some value"}, {"name": "B", "value": "some other value"}],
            "ports": [{"containerPort": 8080, "name": "http"}],
            "readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}},
            "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"memory": "64Mi"}}}]}})
}

async fn call(client: &Client, method: &str, path: &str, body: &Value) -> anyhow::Result<()> {
    let response = client.send(request(method, path, body)?).await?;
    let status = response.status();
    let answer = response.into_body().collect_bytes().await?;
    ensure!(status.is_success(), "{method} {path}: {}", String::from_utf8_lossy(&answer));
    Ok(())
}

fn request(method: &str, path: &str, body: &Value) -> anyhow::Result<http::Request<Body>> {
    let body = if body.is_null() { Vec::new() } else { serde_json::to_vec(body)? };
    let request = http::Request::builder().method(method).uri(path).header("content-type", "application/json");
    Ok(request.header("accept", "application/json").body(Body::from(body))?)
}
