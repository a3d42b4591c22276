//! What only a whole cluster shows: a host that joins, from the start of its agent until its node is Ready; and a change of endpoints, from the
//! request until its name has the new address.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::wait::await_condition;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::dns::{OURS, asking};
use crate::pod_start::node_ready;
use crate::report::Figure;
use crate::server::{Server, folders, run};

const PATIENCE: Duration = Duration::from_secs(60);
/// The server's address on the network of all hosts; the others have those after it.
const SERVER: &str = "10.99.0.1";

/// Hosts that join, one after the other.
pub(crate) async fn join(coracle: &Path, hosts: usize) -> anyhow::Result<Figure> {
    sh("ip link add hosts0 type bridge && ip address add 10.99.0.1/24 dev hosts0 && ip link set hosts0 up").await?;
    let server = Server::start(coracle, &["--node-ip", SERVER]).await?;
    let mut seconds = Ok(Vec::new());
    for number in 0..hosts {
        match (joined(&server, coracle, number).await, &mut seconds) {
            (Ok(taken), Ok(all)) => all.push(taken),
            (Err(error), _) => {
                seconds = Err(error);
                break;
            }
            (Ok(_), Err(_)) => break,
        }
    }
    server.stop().await.context("take the server down")?;
    sh("ip link delete hosts0").await?;
    Ok(Figure::ours("host joins, agent started to node Ready", "s", seconds?))
}

async fn joined(server: &Server, coracle: &Path, number: usize) -> anyhow::Result<f64> {
    let (token, nodes) = (server.token().await?, Api::<Node>::all(server.client().await?));
    let name = format!("joined-{number}");
    let folder = tempfile::tempdir().context("make a folder")?;
    let cgroup = format!("coracle-bench-{}-{name}", std::process::id());
    let mut host = Command::new("unshare")
        .args(["--net", "sh", "-c", "ip link set lo up && echo made && exec sleep 600"])
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("start unshare")?;
    let mut line = String::new();
    BufReader::new(host.stdout.take().context("no output")?).read_line(&mut line).await?;
    let id = host.id().context("the host has ended")?;
    let inside = |program: &Path| {
        let mut command = Command::new("nsenter");
        command.args(["--target", &id.to_string(), "--net"]).arg(program);
        command
    };
    sh(&format!("ip link add host{number} master hosts0 up type veth peer name eth0 netns {id}")).await?;
    let link = format!(
        "ip address add 10.99.0.{}/24 dev eth0 && ip link set eth0 up && ip route add default via {SERVER}",
        number + 2
    );
    run(inside(Path::new("sh")).args(["-ec", &link])).await?;
    let log = std::fs::File::create(folder.path().join("log")).context("make a log")?;
    let mut agent = inside(coracle);
    agent.args(["--log", "warn", "agent"]).args(folders(folder.path(), &cgroup));
    agent.args(["--node-name", &name, "--server", &format!("https://{SERVER}:6443"), "--token", &token]);
    let started = Instant::now();
    let mut agent = agent.stderr(log).spawn().context("start the agent")?;
    let ready = tokio::select! {
        ready = timeout(PATIENCE, await_condition(nodes, &name, node_ready)) => ready.is_ok_and(|ready| ready.is_ok()),
        _ = agent.wait() => false,
    };
    let taken = started.elapsed().as_secs_f64();
    if !ready {
        let log = std::fs::read_to_string(folder.path().join("log")).unwrap_or_default();
        agent.kill().await.context("end the agent")?;
        bail!("{name} was not Ready:\n{log}");
    }
    end(&mut agent).await?;
    run(inside(coracle).arg("cleanup").args(folders(folder.path(), &cgroup))).await?;
    host.kill().await.context("end the host")?;
    Ok(taken)
}

async fn end(agent: &mut Child) -> anyhow::Result<()> {
    let id = agent.id().context("the agent has ended")?;
    kill(Pid::from_raw(i32::try_from(id)?), Signal::SIGTERM).context("tell the agent to stop")?;
    timeout(PATIENCE, agent.wait()).await.context("the agent does not stop")??;
    Ok(())
}

async fn sh(script: &str) -> anyhow::Result<()> {
    run(Command::new("sh").args(["-ec", script])).await
}

/// From a change of a headless Service's endpoints, sent to the API, until its name has the new address.
pub(crate) async fn follow(coracle: &Path, changes: u8) -> anyhow::Result<Figure> {
    let server = Server::start(coracle, &[]).await?;
    let measured = followed(&server, changes).await;
    server.stop().await.context("take the server down")?;
    Ok(Figure::ours("change of endpoints to DNS", "ms", measured?))
}

async fn followed(server: &Server, changes: u8) -> anyhow::Result<Vec<f64>> {
    let client = server.client().await?;
    let services: Api<Service> = Api::default_namespaced(client.clone());
    let slices: Api<EndpointSlice> = Api::default_namespaced(client);
    let spec = json!({"metadata": {"name": "moving"}, "spec": {"clusterIP": "None", "ports": [{"port": 80}]}});
    services.create(&PostParams::default(), &serde_json::from_value(spec)?).await?;
    let slice = json!({"metadata": {"name": "moving", "labels": {"kubernetes.io/service-name": "moving"}},
        "addressType": "IPv4", "endpoints": [], "ports": []});
    slices.create(&PostParams::default(), &serde_json::from_value(slice)?).await?;
    let socket = tokio::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    socket.connect((OURS, 53)).await?;
    let question = asking("moving.default.svc.cluster.local");
    let mut buffer = [0; 512];
    let mut waits = Vec::new();
    for last in 1..=changes {
        let address = Ipv4Addr::new(10, 42, 7, last);
        let patch = json!({"endpoints": [{"addresses": [address.to_string()]}]});
        let started = Instant::now();
        slices.patch("moving", &PatchParams::default(), &Patch::Merge(patch)).await?;
        loop {
            socket.send(&question).await?;
            let len = tokio::time::timeout(PATIENCE, socket.recv(&mut buffer)).await.context("no answer")??;
            if buffer[..len].windows(4).any(|bytes| bytes == address.octets()) {
                break;
            }
            anyhow::ensure!(started.elapsed() < PATIENCE, "the name never got {address}");
        }
        waits.push(started.elapsed().as_secs_f64() * 1e3);
    }
    Ok(waits)
}
