//! Requests over TLS: ConfigMap creates, GET of one object, LIST of many; coracle and, where it is, kube-apiserver.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use futures::future::try_join_all;
use kube::Client;

use crate::kube_apiserver::KubeApiserver;
use crate::report::{Figure, Samples};
use crate::server::Server;

const CREATORS: [usize; 3] = [1, 16, 64];
const READERS: usize = 32;
const MOST_CLIENTS: usize = 64;
/// Makes a LIST of 10,000 about as long as one of small pods: 7 MB.
const VALUE_BYTES: usize = 400;
const PATH: &str = "/api/v1/namespaces/default/configmaps";

/// How much is asked.
pub(crate) struct Load {
    pub(crate) rounds: usize,
    pub(crate) round: Duration,
    pub(crate) objects: usize,
}

/// One API server, and a connection for each client.
struct Target {
    name: &'static str,
    clients: Vec<Client>,
    serial: AtomicUsize,
}

pub(crate) async fn measure(coracle: &Path, load: &Load) -> anyhow::Result<Vec<Figure>> {
    let alone = ["--disable-agent", "--disable-controller-manager", "--disable-scheduler"];
    let server = Server::start(coracle, &alone).await?;
    let measured = beside_peer(&server, load).await;
    server.stop().await.context("take the server down")?;
    measured
}

async fn beside_peer(server: &Server, load: &Load) -> anyhow::Result<Vec<Figure>> {
    let mut ours = Target { name: "coracle", clients: Vec::new(), serial: AtomicUsize::new(0) };
    for _ in 0..MOST_CLIENTS {
        ours.clients.push(server.client().await?);
    }
    let mut targets = vec![ours];
    let peer = KubeApiserver::start().await;
    let failure = match &peer {
        Ok(Some(peer)) => {
            let clients = (0..MOST_CLIENTS).map(|_| peer.client()).collect::<Result<_, _>>()?;
            targets.push(Target { name: "kube-apiserver", clients, serial: AtomicUsize::new(0) });
            None
        }
        Ok(None) => None,
        Err(error) => Some(format!("{error:#}")),
    };
    let mut figures = Vec::new();
    for count in CREATORS {
        figures.extend(
            rates(&targets, &format!("create a ConfigMap, {count} clients"), count, load, Request::Create).await?,
        );
    }
    figures.extend(rates(&targets, &format!("get a ConfigMap, {READERS} clients"), READERS, load, Request::Get).await?);
    figures.push(lists(&targets, load).await?);
    if let Some(failure) = failure {
        let missing: Samples = ("kube-apiserver".into(), Err(failure));
        figures.push(Figure::compare("peers that did not start", "", &[("coracle".into(), Ok(Vec::new())), missing]));
    }
    if let Ok(Some(peer)) = peer {
        peer.stop().await.context("stop kube-apiserver")?;
    }
    Ok(figures)
}

#[derive(Clone, Copy)]
enum Request {
    Create,
    Get,
}

/// Requests a second, and the median time of one, in rounds that alternate between the targets.
async fn rates(
    targets: &[Target],
    name: &str,
    clients: usize,
    load: &Load,
    request: Request,
) -> anyhow::Result<Vec<Figure>> {
    let mut rates: Vec<_> = targets.iter().map(|target| (target.name.to_owned(), Ok(Vec::new()))).collect();
    let mut times = rates.clone();
    for round in 0..=load.rounds {
        for (index, target) in targets.iter().enumerate() {
            let started = Instant::now();
            let workers =
                target.clients[..clients].iter().map(|client| worker(target, client, started + load.round, request));
            let mut taken: Vec<f64> = try_join_all(workers).await?.concat();
            let rate = taken.len() as f64 / started.elapsed().as_secs_f64();
            taken.sort_by(f64::total_cmp);
            // The first round opens connections and warms caches.
            if round > 0
                && let (Ok(rates), Ok(times)) = (&mut rates[index].1, &mut times[index].1)
            {
                rates.push(rate);
                times.extend(taken.get(taken.len() / 2));
            }
        }
    }
    Ok(vec![Figure::compare(name, "per s", &rates), Figure::compare(format!("{name}, p50 of a round"), "ms", &times)])
}

/// One client that asks again and again; the milliseconds of each answer.
async fn worker(target: &Target, client: &Client, until: Instant, request: Request) -> anyhow::Result<Vec<f64>> {
    let mut taken = Vec::new();
    while Instant::now() < until {
        let started = Instant::now();
        match request {
            Request::Create => create(target, client).await?,
            Request::Get => {
                let text = client.request_text(http_request("GET", &format!("{PATH}/object-0"), Vec::new())?).await?;
                ensure!(text.contains("object-0"), "GET answered {text}");
            }
        }
        taken.push(started.elapsed().as_secs_f64() * 1e3);
    }
    Ok(taken)
}

async fn create(target: &Target, client: &Client) -> anyhow::Result<()> {
    let serial = target.serial.fetch_add(1, Ordering::Relaxed);
    let body = serde_json::json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": format!("object-{serial}")},
        "data": {"key": "v".repeat(VALUE_BYTES)},
    });
    client.request_text(http_request("POST", PATH, serde_json::to_vec(&body)?)?).await.context("create a ConfigMap")?;
    Ok(())
}

/// LIST of exactly `load.objects`, whatever the creates before have left.
async fn lists(targets: &[Target], load: &Load) -> anyhow::Result<Figure> {
    for target in targets {
        let missing = load.objects.saturating_sub(target.serial.load(Ordering::Relaxed));
        let share = missing.div_ceil(target.clients.len());
        let fill = target.clients.iter().map(|client| async move {
            for _ in 0..share {
                create(target, client).await?;
            }
            anyhow::Ok(())
        });
        try_join_all(fill).await?;
    }
    let mut times: Vec<_> = targets.iter().map(|target| (target.name.to_owned(), Ok(Vec::new()))).collect();
    let path = format!("{PATH}?limit={}", load.objects);
    let mut bytes = 0;
    for round in 0..=load.rounds {
        for (index, target) in targets.iter().enumerate() {
            let started = Instant::now();
            let text = target.clients[0].request_text(http_request("GET", &path, Vec::new())?).await?;
            let taken = started.elapsed().as_secs_f64() * 1e3;
            let items = text.matches("\"uid\":").count();
            ensure!(items == load.objects, "LIST of {} returned {items} objects", load.objects);
            bytes = text.len();
            if round > 0
                && let Ok(times) = &mut times[index].1
            {
                times.push(taken);
            }
        }
    }
    Ok(Figure::compare(format!("list {} ConfigMaps ({:.1} MB)", load.objects, bytes as f64 / 1e6), "ms", &times))
}

fn http_request(method: &str, path: &str, body: Vec<u8>) -> anyhow::Result<http::Request<Vec<u8>>> {
    Ok(http::Request::builder()
        .method(method)
        .uri(path)
        .header("Content-Type", "application/json")
        .header("Accept", "application/json")
        .body(body)?)
}
