//! The sockets of the DNS server.

use std::io;
use std::net::{SocketAddr, TcpListener as StdTcp, UdpSocket as StdUdp};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::Record;
use parking_lot::{Mutex, RwLock};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::cache::Cache;
use super::forward::Upstreams;
use super::metrics::{Metrics, count};
use super::response::{Step, encode, reply, step};
use super::zone::Zone;
use crate::Config;
use crate::error::Error;

/// Questions that wait for other resolvers at once; more are dropped, and askers ask again.
const FORWARDS_MAX: usize = 1024;
/// TCP connections at once.
const CONNECTIONS_MAX: usize = 256;
/// How long a TCP connection may be idle.
const IDLE: Duration = Duration::from_secs(10);
/// The longest question.
const QUESTION_MAX_BYTES: usize = 4096;
/// Questions answered in a row before other tasks of the thread have a turn.
const TURN_QUESTIONS: usize = 64;
/// Receive buffer of the UDP socket, for bursts.
const RECEIVE_BUFFER_BYTES: usize = 1024 * 1024;

/// The DNS server: sockets bound, not yet served.
pub(crate) struct Server {
    shared: Arc<Shared>,
    sockets: Mutex<Vec<(StdUdp, StdTcp)>>,
}

struct Shared {
    zone: RwLock<Zone>,
    cache: Cache,
    upstreams: Upstreams,
    metrics: Metrics,
    forwards: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

impl Server {
    /// Binds the server's sockets in the network namespace of the calling thread.
    pub(crate) fn bind(config: &Config) -> Result<Self, Error> {
        let mut sockets = Vec::new();
        for address in &config.dns_ips {
            let address = SocketAddr::new(*address, config.dns_port);
            sockets.push(bind(address).map_err(|source| Error::Dns { address, source })?);
        }
        let shared = Shared {
            zone: RwLock::new(Zone::new(config)),
            cache: Cache::default(),
            upstreams: Upstreams::new(config),
            metrics: Metrics::default(),
            forwards: Arc::new(Semaphore::new(FORWARDS_MAX)),
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        };
        Ok(Self { shared: Arc::new(shared), sockets: Mutex::new(sockets) })
    }

    /// Changes the zone; the next question sees it.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Zone)) {
        change(&mut self.shared.zone.write());
    }

    /// The counters.
    pub(crate) fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Answers until the future is dropped; of several calls only the first has the sockets.
    pub(crate) async fn serve(&self) -> io::Result<()> {
        let sockets = std::mem::take(&mut *self.sockets.lock());
        let mut tasks = JoinSet::new();
        for (udp, tcp) in sockets {
            let (udp, tcp) = (UdpSocket::from_std(udp)?, TcpListener::from_std(tcp)?);
            tasks.spawn(serve_udp(Arc::clone(&self.shared), Arc::new(udp)));
            tasks.spawn(serve_tcp(Arc::clone(&self.shared), tcp));
        }
        while let Some(ended) = tasks.join_next().await {
            ended.map_err(io::Error::other)?;
        }
        Ok(())
    }
}

/// Binds, giving an earlier daemon that is on its way out a moment to leave.
fn bind(address: SocketAddr) -> io::Result<(StdUdp, StdTcp)> {
    const TRIES: usize = 20;
    const PAUSE: Duration = Duration::from_millis(50);
    for _ in 1..TRIES {
        match try_bind(address) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => std::thread::sleep(PAUSE),
            result => return result,
        }
    }
    try_bind(address)
}

fn try_bind(address: SocketAddr) -> io::Result<(StdUdp, StdTcp)> {
    let udp = StdUdp::bind(address)?;
    nix::sys::socket::setsockopt(&udp, nix::sys::socket::sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES)?;
    udp.set_nonblocking(true)?;
    let tcp = StdTcp::bind(address)?;
    tcp.set_nonblocking(true)?;
    Ok((udp, tcp))
}

async fn serve_udp(shared: Arc<Shared>, socket: Arc<UdpSocket>) {
    let mut buffer = [0; QUESTION_MAX_BYTES];
    let mut turn = 0;
    loop {
        let (len, peer) = match socket.try_recv_from(&mut buffer) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                turn = 0;
                if let Err(error) = socket.readable().await {
                    tracing::error!(%error, "the DNS socket is lost");
                    return;
                }
                continue;
            }
            // An answer that could not be delivered comes back here; it is the asker's loss.
            Err(error) => {
                tracing::debug!(%error, "DNS over UDP");
                continue;
            }
        };
        count(&shared.metrics.udp);
        let next = step(&shared.zone.read(), &buffer[..len]);
        match next {
            Step::Silence => count(&shared.metrics.malformed),
            Step::Reply { message, size } => {
                if let Some(bytes) = encode(&message, size, true, &shared.metrics) {
                    send(&socket, &bytes, peer).await;
                }
            }
            Step::Forward { request, question, before } => {
                let Ok(permit) = Arc::clone(&shared.forwards).try_acquire_owned() else {
                    count(&shared.metrics.dropped);
                    continue;
                };
                let (shared, socket) = (Arc::clone(&shared), Arc::clone(&socket));
                tokio::spawn(async move {
                    let _permit = permit;
                    let edns = request.edns.as_ref().map(|edns| edns.max_payload());
                    let message = forward(&shared, &request, &question, before).await;
                    if let Some(bytes) = encode(&message, edns, true, &shared.metrics) {
                        send(&socket, &bytes, peer).await;
                    }
                });
            }
        }
        turn += 1;
        if turn >= TURN_QUESTIONS {
            turn = 0;
            tokio::task::yield_now().await;
        }
    }
}

async fn send(socket: &UdpSocket, bytes: &[u8], peer: SocketAddr) {
    if let Err(error) = socket.send_to(bytes, peer).await {
        tracing::debug!(%peer, %error, "cannot send a DNS answer");
    }
}

async fn serve_tcp(shared: Arc<Shared>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let Ok(permit) = Arc::clone(&shared.connections).try_acquire_owned() else {
                    count(&shared.metrics.dropped);
                    continue;
                };
                let shared = Arc::clone(&shared);
                tokio::spawn(async move {
                    let _permit = permit;
                    if let Err(error) = converse(&shared, stream).await {
                        tracing::debug!(%peer, %error, "DNS over TCP");
                    }
                });
            }
            Err(error) => {
                // Out of file descriptors, most likely: others have to close theirs first.
                const PAUSE: Duration = Duration::from_millis(100);
                tracing::warn!(%error, "cannot accept a DNS connection");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Answers the questions of one connection, one after the other (RFC 7766).
async fn converse(shared: &Shared, mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; QUESTION_MAX_BYTES];
    loop {
        let len = match timeout(IDLE, stream.read_u16()).await {
            Ok(Ok(len)) => usize::from(len),
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Ok(Err(error)) => return Err(error),
            Err(_) => return Ok(()),
        };
        let Some(question) = buffer.get_mut(..len) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a question too long"));
        };
        timeout(IDLE, stream.read_exact(question)).await??;
        count(&shared.metrics.tcp);
        let next = step(&shared.zone.read(), question);
        let message = match next {
            Step::Silence => return Ok(()),
            Step::Reply { message, .. } => message,
            Step::Forward { request, question, before } => forward(shared, &request, &question, before).await,
        };
        let Some(bytes) = encode(&message, None, false, &shared.metrics) else { return Ok(()) };
        let len = u16::try_from(bytes.len()).map_err(io::Error::other)?;
        timeout(IDLE, stream.write_all(&[&len.to_be_bytes()[..], &bytes].concat())).await??;
    }
}

/// The answer of the cache or of another resolver.
async fn forward(shared: &Shared, request: &Message, question: &Query, before: Vec<Record>) -> Message {
    let dnssec = (request.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok), request.metadata.checking_disabled);
    let found = match shared.cache.get(question, dnssec, Instant::now()) {
        Some(found) => {
            count(&shared.metrics.cache_hits);
            Some(found)
        }
        None if !shared.upstreams.has(question) => None,
        None => {
            count(&shared.metrics.cache_misses);
            count(&shared.metrics.forwarded);
            match shared.upstreams.ask(question, dnssec).await {
                Ok(response) => {
                    shared.cache.put(question, dnssec, &response, Instant::now());
                    Some((response.metadata.response_code, response.answers, response.authorities))
                }
                Err(error) => {
                    count(&shared.metrics.forward_failed);
                    tracing::debug!(%error, name = %question.name, "no resolver answers");
                    None
                }
            }
        }
    };
    let Some((code, answers, authorities)) = found else {
        return reply(request, ResponseCode::ServFail);
    };
    let mut message = reply(request, code);
    message.answers = before;
    message.answers.extend(answers);
    message.authorities = authorities;
    message
}
