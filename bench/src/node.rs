//! What a node costs and bears: the end of pods, many pods that run, logs that are written fast, many probes.

use std::collections::HashSet;
use std::path::Path;
use std::pin::pin;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use coracle_testkit::Image;
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::runtime::wait::await_condition;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::pod_start::{IMAGE, PATIENCE, all_ready, settle, spec};
use crate::report::Figure;
use crate::server::Server;

/// How often it is looked whether pods are gone.
const LOOK: Duration = Duration::from_micros(500);
/// Over which processor time is counted.
const SPAN: Duration = Duration::from_secs(10);
/// Output of the container that writes fast, in MiB, and its lines when they are short.
const LOG_MIB: u32 = 1024;
const SHORT_LINES: u32 = 1_000_000;
/// Pods whose three containers are probed for life and readiness each second.
const PROBED_PODS: usize = 50;
const PROBES_PER_POD: usize = 6;
/// The number of probes a second that the figure is told for.
const PROBES_A_SECOND: f64 = 1500.0;

pub(crate) async fn measure(coracle: &Path, deletes: usize, many: usize) -> anyhow::Result<Vec<Figure>> {
    let server = Server::start(coracle, &[]).await?;
    let measured = on(&server, deletes, many).await;
    server.stop().await.context("take the server down")?;
    measured
}

async fn on(server: &Server, deletes: usize, many: usize) -> anyhow::Result<Vec<Figure>> {
    let client = server.client().await?;
    settle(&client).await?;
    server.import(&Image::busybox(IMAGE)).await.context("import the image")?;
    let mut figures = Vec::new();
    figures.push(Figure::ours("pod delete to gone, grace 0", "ms", gone(server, &client, deletes).await?));
    figures.extend(logs(server, &client).await?);
    figures.push(probes(server, &client).await?);
    figures.extend(running(server, &client, many).await?);
    Ok(figures)
}

async fn create(client: &Client, name: &str, spec: &Value) -> anyhow::Result<()> {
    let pod: Pod = serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec}))?;
    Api::default_namespaced(client.clone()).create(&PostParams::default(), &pod).await.context("create a pod")?;
    Ok(())
}

/// Makes pods at once; returns how long it took until all were Ready.
async fn start(client: &Client, names: &HashSet<String>, spec: &Value) -> anyhow::Result<Duration> {
    let api: Api<Pod> = Api::default_namespaced(client.clone());
    let mut changes = pin!(watcher(api, watcher::Config::default()).applied_objects());
    let started = Instant::now();
    try_join_all(names.iter().map(|name| create(client, name, spec))).await?;
    all_ready(&mut changes, names.clone()).await?;
    Ok(started.elapsed())
}

/// Deletes pods at once, with their own grace of 0; returns how long it took until the API and this host had none of them.
async fn end(server: &Server, client: &Client, names: &HashSet<String>) -> anyhow::Result<Duration> {
    let api: Api<Pod> = Api::default_namespaced(client.clone());
    let held = api.list(&ListParams::default()).await?.items.into_iter();
    let ours = held.filter(|pod| pod.metadata.name.as_ref().is_some_and(|name| names.contains(name)));
    let uids: Vec<_> = ours.filter_map(|pod| pod.metadata.uid).collect();
    // One that has ended has none any more.
    let cgroups: Vec<_> = uids.iter().filter_map(|uid| server.cgroup_of(uid).ok()).collect();
    let started = Instant::now();
    let usual = DeleteParams::default();
    try_join_all(names.iter().map(|name| api.delete(name, &usual))).await?;
    let gone = async {
        while cgroups.iter().any(|cgroup| cgroup.exists()) {
            tokio::time::sleep(LOOK).await;
        }
        for name in names {
            while api.get_metadata_opt(name).await?.is_some() {
                tokio::time::sleep(LOOK).await;
            }
        }
        anyhow::Ok(())
    };
    timeout(PATIENCE, gone).await.context("pods stay")??;
    Ok(started.elapsed())
}

async fn gone(server: &Server, client: &Client, runs: usize) -> anyhow::Result<Vec<f64>> {
    let mut times_ms = Vec::new();
    for index in 0..runs {
        let names = HashSet::from([format!("gone-{index}")]);
        start(client, &names, &spec(json!({}))).await?;
        times_ms.push(end(server, client, &names).await?.as_secs_f64() * 1e3);
    }
    Ok(times_ms)
}

/// How fast a container's output gets into its log, by the container's own clock.
async fn logs(server: &Server, client: &Client) -> anyhow::Result<Vec<Figure>> {
    let timed = |make: &str, write: &str| {
        format!(
            "{make}; read from rest </proc/uptime; {write}; read to rest </proc/uptime; echo $from $to >/dev/termination-log"
        )
    };
    let block = "yes 0123456789012345678901234567890123456789012345678901234567890123456789012345678 | head -c 67108864 >/dev/shm/block";
    let fast = timed(block, &format!("for i in $(seq {}); do cat /dev/shm/block; done", LOG_MIB / 64));
    let short = timed(&format!("seq {SHORT_LINES} >/dev/shm/lines"), "cat /dev/shm/lines");
    let mut figures = Vec::new();
    for (name, script, amount, unit, title) in [
        ("fast", fast, f64::from(LOG_MIB), "MiB/s", "log of a container that writes lines of 80 bytes"),
        ("short", short, f64::from(SHORT_LINES), "lines/s", "log of a container that writes lines of 7 bytes"),
    ] {
        let before = server.all_cpu_s()?;
        let main =
            json!([{"name": "main", "image": IMAGE, "imagePullPolicy": "Never", "command": ["/bin/sh", "-c", script]}]);
        create(client, name, &spec(json!({"restartPolicy": "Never", "containers": main}))).await?;
        let api: Api<Pod> = Api::default_namespaced(client.clone());
        let ended = |pod: Option<&Pod>| words(pod).is_some();
        let pod = timeout(PATIENCE, await_condition(api, name, ended)).await.context("the log is not written")??;
        let seconds = words(pod.as_ref()).context("the container does not tell its times")?;
        let cpu_s = server.all_cpu_s()? - before;
        figures.push(Figure::ours(title, unit, vec![amount / seconds.max(0.01)]));
        figures.push(Figure::ours(format!("{title}: processor time of ours"), "s", vec![cpu_s]));
        end(server, client, &HashSet::from([name.to_owned()])).await?;
    }
    Ok(figures)
}

/// Seconds between the two times that a container has left as its last words.
fn words(pod: Option<&Pod>) -> Option<f64> {
    let status = pod?.status.as_ref()?.container_statuses.as_ref()?.first()?;
    let message = status.state.as_ref()?.terminated.as_ref()?.message.as_ref()?;
    let (from, to) = message.trim().split_once(' ')?;
    Some(to.parse::<f64>().ok()? - from.parse::<f64>().ok()?)
}

/// Part of a core that probes take of our processes; what the probed program takes is its own.
async fn probes(server: &Server, client: &Client) -> anyhow::Result<Figure> {
    let probe = json!({"tcpSocket": {"port": 8080}, "periodSeconds": 1, "failureThreshold": 100});
    let idle = json!({"name": "main", "image": IMAGE, "imagePullPolicy": "Never", "command": ["/bin/sleep", "100000"]});
    let container = |name: &str, command: &[&str], probed: bool| {
        let mut container = idle.clone();
        (container["name"], container["command"]) = (json!(name), json!(command));
        if probed {
            (container["livenessProbe"], container["readinessProbe"]) = (probe.clone(), probe.clone());
        }
        container
    };
    let serve = ["/bin/busybox", "httpd", "-f", "-p", "8080"];
    let of = |probed: bool| {
        let all = [("a", &serve[..]), ("b", &["/bin/sleep", "100000"]), ("c", &["/bin/sleep", "100000"])];
        spec(json!({"containers": all.map(|(name, command)| container(name, command, probed))}))
    };
    let mut shares = Vec::new();
    for probed in [false, true] {
        let names: HashSet<_> = (0..PROBED_PODS).map(|index| format!("probed-{probed}-{index}")).collect();
        start(client, &names, &of(probed)).await?;
        shares.push(share(server).await?);
        end(server, client, &names).await?;
    }
    let one = (shares[1] - shares[0]).max(0.0) / (PROBED_PODS * PROBES_PER_POD) as f64;
    Ok(Figure::ours(
        format!("{PROBES_A_SECOND} probes a second, from {}", PROBED_PODS * PROBES_PER_POD),
        "% of a core",
        vec![one * PROBES_A_SECOND * 100.0],
    ))
}

/// Part of a core that all our processes take.
async fn share(server: &Server) -> anyhow::Result<f64> {
    let before = server.all_cpu_s()?;
    let started = Instant::now();
    tokio::time::sleep(SPAN).await;
    Ok((server.all_cpu_s()? - before) / started.elapsed().as_secs_f64())
}

/// Many pods at once, and what they cost while they run.
async fn running(server: &Server, client: &Client, many: usize) -> anyhow::Result<Vec<Figure>> {
    ensure!(many > 0, "--many must be more than 0");
    let idle = server.memory_mib("Pss")?;
    let names: HashSet<_> = (0..many).map(|index| format!("many-{index}")).collect();
    let cpu_before = server.all_cpu_s()?;
    let took_s = start(client, &names, &spec(json!({}))).await?.as_secs_f64();
    let cpu_s = server.all_cpu_s()? - cpu_before;
    // What follows the start (events, endpoints) is over.
    tokio::time::sleep(SPAN).await;
    let full = server.memory_mib("Pss")?;
    let idle_share = share(server).await?;
    let ended_s = end(server, client, &names).await?.as_secs_f64();
    let ours = |title: &str, unit, value| Figure::ours(format!("{many} {title}"), unit, vec![value]);
    Ok(vec![
        ours("pods at once, all Ready", "s", took_s),
        ours("pods at once: processor time of ours", "s", cpu_s),
        ours("running pods: PSS of ours a pod", "KiB", (full.all - idle.all) / many as f64 * 1024.0),
        ours("running pods: RSS of the supervisor", "MiB", full.supervisor_rss),
        ours("running pods: of that its own, the program's text apart", "MiB", full.supervisor_own),
        ours("running pods, nothing happening", "% of a core", idle_share * 100.0),
        ours("pods deleted at once, all gone", "s", ended_s),
    ])
}
