//! A control plane with many nodes and pods, and no host behind them: what Leases cost, how long a Deployment takes.

mod nodes;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::wait::await_condition;
use kube::{Api, Client, Config};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::report::Figure;
use crate::server::Server;
use nodes::Nodes;

/// Time for any one thing to come about.
const PATIENCE: Duration = Duration::from_secs(600);
/// Time over which the cost of Leases is taken: three renewals of each.
const LEASES_FOR: Duration = Duration::from_secs(30);
const NAME: &str = "hollow";

/// Hollow nodes of a server that runs already, until they are told to stop.
pub(crate) async fn serve(kubeconfig: &PathBuf, count: usize) -> anyhow::Result<()> {
    let read = Kubeconfig::read_from(kubeconfig).with_context(|| format!("read {}", kubeconfig.display()))?;
    let client = Client::try_from(Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await?)?;
    let nodes = Nodes::new(client, count);
    nodes.register().await?;
    println!("{count} hollow nodes are registered; they run until interrupted");
    tokio::select! {
        ended = nodes.run() => ended,
        stopped = tokio::signal::ctrl_c() => stopped.context("wait for an interrupt"),
    }
}

/// Figures of a server of the measurement's own.
pub(crate) async fn measure(coracle: &Path, count: usize, replicas: usize) -> anyhow::Result<Vec<Figure>> {
    let server = Server::start(coracle, &["--disable-agent"]).await?;
    let measured = on(&server, count, replicas).await;
    server.stop().await.context("take the server down")?;
    measured
}

async fn on(server: &Server, count: usize, replicas: usize) -> anyhow::Result<Vec<Figure>> {
    let client = server.client().await?;
    let accounts: Api<ServiceAccount> = Api::default_namespaced(client.clone());
    let exists = |account: Option<&ServiceAccount>| account.is_some();
    timeout(PATIENCE, await_condition(accounts, "default", exists)).await.context("no default account")??;
    let nodes = Nodes::new(client.clone(), count);
    let started = Instant::now();
    nodes.register().await?;
    let register_s = started.elapsed().as_secs_f64();
    let figures = async {
        tokio::time::sleep(LEASES_FOR / 3).await;
        let (before, since) = (server.cpu_s()?, Instant::now());
        tokio::time::sleep(LEASES_FOR).await;
        let leases_percent = (server.cpu_s()? - before) / since.elapsed().as_secs_f64() * 100.0;
        let empty_mib = server.rss_mib()?;
        let api: Api<Deployment> = Api::default_namespaced(client);
        let (before, started) = (server.cpu_s()?, Instant::now());
        api.create(&PostParams::default(), &serde_json::from_value(deployment(replicas))?).await?;
        rolled_out(&api, replicas).await?;
        let create_s = started.elapsed().as_secs_f64();
        let create_cpu_s = server.cpu_s()? - before;
        let full_mib = server.rss_mib()?;
        let (before, started) = (server.cpu_s()?, Instant::now());
        let change = json!({"spec": {"template": {"metadata": {"annotations": {"round": "2"}}}}});
        api.patch(NAME, &PatchParams::default(), &Patch::Merge(change)).await?;
        rolled_out(&api, replicas).await?;
        let update_s = started.elapsed().as_secs_f64();
        let update_cpu_s = server.cpu_s()? - before;
        tokio::time::sleep(LEASES_FOR / 3).await;
        let (before, since) = (server.cpu_s()?, Instant::now());
        tokio::time::sleep(LEASES_FOR).await;
        let idle_percent = (server.cpu_s()? - before) / since.elapsed().as_secs_f64() * 100.0;
        api.delete(NAME, &DeleteParams::background()).await?;
        let kib_a_pod = (full_mib - empty_mib) * 1024.0 / replicas as f64;
        let ms_a_pod = |cpu_s: f64| cpu_s * 1000.0 / replicas as f64;
        let ours = |name: String, unit, sample| Figure::ours(name, unit, vec![sample]);
        anyhow::Ok(vec![
            ours(format!("Hollow: {count} nodes registered"), "s", register_s),
            ours(format!("Hollow: leases of {count} nodes"), "% of a core", leases_percent),
            ours(format!("Hollow: Deployment of {replicas}, create to available"), "s", create_s),
            ours(format!("Hollow: Deployment of {replicas}, rolling update"), "s", update_s),
            ours("Hollow: server's time for a pod that is made".into(), "ms of a core", ms_a_pod(create_cpu_s)),
            ours("Hollow: server's time for a pod that is replaced".into(), "ms of a core", ms_a_pod(update_cpu_s)),
            ours(format!("Hollow: idle with {replicas} pods"), "% of a core", idle_percent),
            ours("Hollow: server memory a pod".into(), "KiB", kib_a_pod),
        ])
    };
    tokio::select! {
        ended = nodes.run() => ended.and(Err(anyhow::anyhow!("the hollow nodes ended"))),
        figures = figures => figures,
    }
}

fn deployment(replicas: usize) -> Value {
    json!({"metadata": {"name": NAME}, "spec": {
        "replicas": replicas, "selector": {"matchLabels": {"app": NAME}}, "progressDeadlineSeconds": 3600,
        "template": {"metadata": {"labels": {"app": NAME}}, "spec": {"containers": [
            {"name": "c", "image": "none", "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}}}]}}}})
}

/// Waits until every replica is of the newest template and available.
async fn rolled_out(api: &Api<Deployment>, replicas: usize) -> anyhow::Result<()> {
    let wanted = i32::try_from(replicas)?;
    let done = move |deployment: Option<&Deployment>| {
        deployment.and_then(|deployment| {
            let status = deployment.status.as_ref()?;
            Some(
                status.observed_generation == deployment.metadata.generation
                    && status.updated_replicas == Some(wanted)
                    && status.available_replicas == Some(wanted)
                    && status.replicas == Some(wanted),
            )
        }) == Some(true)
    };
    timeout(PATIENCE, await_condition(api.clone(), NAME, done)).await.context("the Deployment is not rolled out")??;
    Ok(())
}
