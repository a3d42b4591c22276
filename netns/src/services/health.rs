//! Health check node ports: load balancers ask each node whether it has endpoints of a Service that keeps connections on the node
//! (`spec.healthCheckNodePort`), and get the answer in kube-proxy's shape.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::model::ObjectKey;

/// How long an asker may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Askers of a port at once.
const CONNECTIONS_MAX: usize = 64;
/// The longest request head that is read.
const HEAD_MAX_BYTES: usize = 4096;

/// The ports that are answered at.
#[derive(Default)]
pub(crate) struct HealthPorts(BTreeMap<ObjectKey, Port>);

struct Port {
    number: u16,
    endpoints: Arc<AtomicUsize>,
    task: AbortHandle,
}

impl Drop for Port {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl HealthPorts {
    /// Answers for a Service at a port with its number of local endpoints; `None`: not any more. Must be called inside of a runtime.
    pub(crate) fn set(&mut self, key: &ObjectKey, wanted: Option<(u16, usize)>) {
        let Some((number, endpoints)) = wanted else {
            self.0.remove(key);
            return;
        };
        if let Some(port) = self.0.get(key).filter(|port| port.number == number) {
            port.endpoints.store(endpoints, Relaxed);
            return;
        }
        self.0.remove(key);
        match bind(number) {
            Ok(listener) => {
                let endpoints = Arc::new(AtomicUsize::new(endpoints));
                let task = Handle::current().spawn(serve(listener, key.clone(), Arc::clone(&endpoints))).abort_handle();
                self.0.insert(key.clone(), Port { number, endpoints, task });
            }
            Err(error) => {
                tracing::error!(service = %key, port = number, %error, "cannot answer at the health check node port")
            }
        }
    }

    /// Answers nowhere any more.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}

/// Listens at every address, of both families where the host has both.
fn bind(port: u16) -> io::Result<TcpListener> {
    let both = StdListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)));
    let listener = both.or_else(|_| StdListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))))?;
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

async fn serve(listener: TcpListener, key: ObjectKey, endpoints: Arc<AtomicUsize>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            // Out of file descriptors, most likely: others have to close theirs first.
            tokio::time::sleep(PATIENCE / 50).await;
            continue;
        };
        let response = response(&key, endpoints.load(Relaxed));
        tokio::spawn(async move {
            let _place = place;
            match timeout(PATIENCE, answer(stream, &response)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "health check"),
                Err(_) => tracing::debug!("a health check took too long"),
            }
        });
    }
}

fn response(key: &ObjectKey, endpoints: usize) -> String {
    let body = json!({
        "service": { "namespace": &*key.namespace, "name": &*key.name },
        "localEndpoints": endpoints,
        "serviceProxyHealthy": true,
    })
    .to_string();
    let status = if endpoints > 0 { "200 OK" } else { "503 Service Unavailable" };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nX-Content-Type-Options: nosniff\r\n\
         X-Load-Balancing-Endpoint-Weight: {endpoints}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

async fn answer(mut stream: TcpStream, response: &str) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") && head.len() < HEAD_MAX_BYTES {
        if stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    stream.write_all(response.as_bytes()).await?;
    stream.shutdown().await
}
