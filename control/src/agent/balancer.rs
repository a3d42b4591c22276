//! The way to whichever server is alive: connections to a port of loopback go to one of the servers that are known.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use anyhow::Context;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

/// Time for a server to take a connection before the next is tried.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A connection whose other end says nothing for so long is cut, so that whoever uses it comes to another server.
const SILENCE: Duration = Duration::from_secs(15);
/// Seconds between two questions to a silent server.
const PROBE_INTERVAL_S: u32 = 5;
/// Connections at once.
const CONNECTIONS: usize = 1024;
/// Pause when the host is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The servers, and which was good last.
pub(super) struct Balancer {
    /// `host:port`, those that the operator gave last.
    servers: watch::Sender<Vec<String>>,
    given: Vec<String>,
    good: AtomicUsize,
    file: PathBuf,
}

impl Balancer {
    /// Knows the servers that were given, and those that an earlier start wrote to `file`.
    pub(super) fn new(given: Vec<String>, file: PathBuf) -> Arc<Self> {
        let remembered = std::fs::read_to_string(&file).unwrap_or_default();
        let servers = together(remembered.lines().map(str::to_owned), &given);
        Arc::new(Self { servers: watch::Sender::new(servers), given, good: AtomicUsize::new(0), file })
    }

    /// The servers as they change.
    pub(super) fn subscribe(&self) -> watch::Receiver<Vec<String>> {
        self.servers.subscribe()
    }

    /// Passes connections on until dropped.
    pub(super) async fn run(self: Arc<Self>, listener: TcpListener) -> anyhow::Result<()> {
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let place = places.clone().acquire_owned().await.context("take a connection")?;
            let Ok((mut near, _)) = listener.accept().await else {
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let this = self.clone();
            tokio::spawn(async move {
                let _place = place;
                let Some(mut far) = this.connect().await else { return };
                if let Err(error) = near.set_nodelay(true) {
                    tracing::debug!(%error, "set nodelay");
                }
                if let Err(error) = tokio::io::copy_bidirectional(&mut near, &mut far).await {
                    tracing::debug!(%error, "a connection to a server ended");
                }
            });
        }
    }

    /// A connection to the first server that takes it, beginning with the one that did last.
    async fn connect(&self) -> Option<TcpStream> {
        let servers = self.servers.borrow().clone();
        let first = self.good.load(Relaxed);
        for step in 0..servers.len() {
            let place = (first + step) % servers.len();
            match connect(&servers[place]).await {
                Ok(stream) => {
                    self.good.store(place, Relaxed);
                    return Some(stream);
                }
                Err(error) => tracing::debug!(server = %servers[place], %error, "a server is not reached"),
            }
        }
        None
    }

    /// Learns the servers from the endpoints of the service `kubernetes` until dropped.
    pub(super) async fn follow(self: Arc<Self>, client: Client) -> anyhow::Result<()> {
        let slices: Api<EndpointSlice> = Api::namespaced(client, "default");
        let wanted = watcher::Config::default().labels("kubernetes.io/service-name=kubernetes");
        let mut events = watcher(slices, wanted).default_backoff().applied_objects().boxed();
        loop {
            match events.try_next().await {
                Ok(Some(slice)) => self.learn(endpoints(&slice)),
                Ok(None) => return Ok(()),
                Err(error) => tracing::debug!(%error, "watching the servers again"),
            }
        }
    }

    fn learn(&self, found: Vec<String>) {
        // Without any the slice is being rewritten; the old ones are better than none.
        if found.is_empty() {
            return;
        }
        let servers = together(found, &self.given);
        let changed = self.servers.send_if_modified(|known| {
            let changed = *known != servers;
            known.clone_from(&servers);
            changed
        });
        if changed {
            tracing::info!(?servers, "the servers of this cluster");
            self.good.store(0, Relaxed);
            if let Err(error) = std::fs::write(&self.file, servers.join("\n")) {
                tracing::warn!(file = %self.file.display(), %error, "the servers are not remembered");
            }
        }
    }
}

/// A connection that notices when the other end is gone.
pub(super) async fn connect(server: &str) -> std::io::Result<TcpStream> {
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(server)).await??;
    stream.set_nodelay(true)?;
    setsockopt(&stream, sockopt::KeepAlive, &true)?;
    setsockopt(&stream, sockopt::TcpKeepIdle, &PROBE_INTERVAL_S)?;
    setsockopt(&stream, sockopt::TcpKeepInterval, &PROBE_INTERVAL_S)?;
    setsockopt(&stream, sockopt::TcpUserTimeout, &u32::try_from(SILENCE.as_millis()).unwrap_or(u32::MAX))?;
    Ok(stream)
}

fn together(found: impl IntoIterator<Item = String>, given: &[String]) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for server in found.into_iter().chain(given.iter().cloned()).filter(|server| !server.is_empty()) {
        if !all.contains(&server) {
            all.push(server);
        }
    }
    all
}

fn endpoints(slice: &EndpointSlice) -> Vec<String> {
    let ports = slice.ports.iter().flatten().filter_map(|port| port.port);
    let ports: Vec<i32> = ports.collect();
    let ready = slice
        .endpoints
        .iter()
        .flatten()
        .filter(|endpoint| endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true));
    ready
        .flat_map(|endpoint| endpoint.addresses.iter())
        .flat_map(|address| ports.iter().map(move |port| host_port(address, *port)))
        .collect()
}

fn host_port(address: &str, port: i32) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// A server that says its name and hangs up.
    async fn server(name: u8) -> (String, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let task = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.expect("a connection");
                stream.write_all(&[name]).await.expect("it is said");
            }
        });
        (address, task)
    }

    async fn ask(address: std::net::SocketAddr) -> Option<u8> {
        TcpStream::connect(address).await.expect("the balancer listens").read_u8().await.ok()
    }

    #[tokio::test]
    async fn connections_go_to_a_server_that_lives_and_the_list_is_remembered() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("servers");
        let ((a, a_task), (b, _b_task)) = (server(b'a').await, server(b'b').await);
        let balancer = Balancer::new(vec![a.clone()], file.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(balancer.clone().run(listener));
        assert_eq!(ask(address).await, Some(b'a'));
        balancer.learn(vec![a.clone(), b.clone()]);
        a_task.abort();
        assert!(a_task.await.is_err());
        assert_eq!(ask(address).await, Some(b'b'));
        balancer.learn(Vec::new());
        assert_eq!(*Balancer::new(vec!["c:1".into()], file).subscribe().borrow(), [a, b, "c:1".into()]);
    }

    #[test]
    fn endpoints_of_both_families_are_read() {
        let slice = serde_json::from_value(serde_json::json!({
            "metadata": {}, "addressType": "IPv6", "ports": [{"port": 6443}],
            "endpoints": [{"addresses": ["fd00::1"]}, {"addresses": ["fd00::2"], "conditions": {"ready": false}}],
        }));
        assert_eq!(endpoints(&slice.expect("a slice")), ["[fd00::1]:6443"]);
    }
}
