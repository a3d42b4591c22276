//! Hosts of a test's own: threads in private network and mount namespaces, and what is said inside of pods.
#![allow(dead_code, reason = "each test file uses a part")]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use coracle_netns::model::{Change, Endpoint, EndpointPort, EndpointSlice, ObjectKey, Service, ServicePort};
use coracle_netns::{Config, Network, PodKey, PodNet, PodNetwork, Protocol, ProxyMode};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

/// Longest wait for a packet that is to come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3);
/// Wait that shows that a packet does not come.
pub(crate) const IMPATIENCE: Duration = Duration::from_millis(300);

/// Runs `test` on a thread with a network and a mount namespace of its own, loopback up.
pub(crate) fn on_own_host<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    for (program, package) in [("nft", "nftables"), ("ip", "iproute2"), ("conntrack", "conntrack")] {
        coracle_testkit::need(program, package);
    }
    thread::scope(|scope| {
        let run = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("root may make namespaces");
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
            sh("ip link set lo up");
            let result = test();
            assert_nothing_left();
            result
        });
        run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The same, once for each of the ways in which rules are carried out.
pub(crate) fn in_both_modes(test: impl Fn(ProxyMode) + Send + Sync) {
    coracle_testkit::need("iptables-restore", "iptables");
    for mode in [ProxyMode::Nftables, ProxyMode::Iptables] {
        on_own_host(|| test(mode));
    }
}

/// Every test takes its network down; then no link, route or namespace of ours is there, and no rule.
fn assert_nothing_left() {
    let left = sh(
        "ip -o link; ip route show proto 67; ip -6 route show proto 67; grep '/netns/uid-' /proc/self/mounts || true",
    );
    let ours = left.lines().find(|line| !line.contains(": lo:") && !OTHERS.iter().any(|other| line.contains(other)));
    assert_eq!(ours, None, "left behind");
    assert_no_rules();
}

/// Links that tests make themselves.
const OTHERS: [&str; 6] = [": up0@", ": sw:", ": p1@", ": p2@", ": eth0@", ": cni0:"];

/// Nothing of ours is in the rules.
pub(crate) fn assert_no_rules() {
    let left = sh("nft list ruleset; iptables-save; ip6tables-save");
    assert!(!left.to_lowercase().contains("coracle"), "{left}");
}

/// Runs a shell command and returns what it printed.
pub(crate) fn sh(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs `work` inside of a network namespace.
pub(crate) fn inside<T: Send>(namespace: &Path, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let run = scope.spawn(|| {
            setns(File::open(namespace).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A runtime on this thread, whose helper threads are in its namespaces.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

pub(crate) struct Node {
    network: Option<Arc<Network>>,
    pub(crate) runtime: tokio::runtime::Runtime,
    pub(crate) folder: tempfile::TempDir,
}

impl Node {
    pub(crate) fn start(change: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::new(folder.path(), "node-1");
        change(&mut config);
        let runtime = runtime();
        let network = Some(Network::new(config).unwrap());
        Self { network, runtime, folder }
    }

    pub(crate) fn network(&self) -> &Arc<Network> {
        self.network.as_ref().unwrap()
    }

    /// Another daemon after this one has gone.
    pub(crate) fn restart(&mut self) {
        let config = self.network().config().clone();
        self.network = None;
        self.network = Some(Network::new(config).unwrap());
    }

    pub(crate) fn pod(&self, name: &str) -> PodNetwork {
        self.pod_with(name, PodNet::default())
    }

    pub(crate) fn pod_with(&self, name: &str, net: PodNet) -> PodNetwork {
        self.runtime.block_on(self.network().setup_pod(pod_key(name), net)).unwrap()
    }

    pub(crate) fn update(&self, changes: Vec<Change>) {
        self.runtime.block_on(self.network().update(changes)).unwrap();
    }
}

pub(crate) fn pod_key(name: &str) -> PodKey {
    PodKey { uid: format!("uid-{name}"), namespace: "default".into(), name: name.into() }
}

/// Serves one line, `name`, to every TCP connection and UDP packet at a port inside of a namespace, until the process ends.
pub(crate) fn serve(namespace: &Path, port: u16, name: &str) {
    let name = name.to_owned();
    let (tcp, udp) = inside(namespace, || {
        (
            TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port))).unwrap(),
            UdpSocket::bind(("0.0.0.0", port)).unwrap(),
        )
    });
    let said = name.clone();
    thread::spawn(move || {
        for stream in tcp.incoming() {
            let Ok(mut stream) = stream else { return };
            let peer = stream.peer_addr().map(|peer| peer.ip().to_canonical().to_string()).unwrap_or_default();
            if writeln!(stream, "{said} {peer}").is_err() {
                continue;
            }
        }
    });
    thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, peer)) = udp.recv_from(&mut buffer) {
            if udp.send_to(format!("{name} {}", peer.ip()).as_bytes(), peer).is_err() {
                return;
            }
        }
    });
}

/// The line that a server says over TCP: its name and the address that it saw.
pub(crate) fn ask(to: SocketAddr, wait: Duration) -> std::io::Result<(String, IpAddr)> {
    let mut stream = TcpStream::connect_timeout(&to, wait)?;
    stream.set_read_timeout(Some(wait))?;
    let mut line = String::new();
    stream.read_to_string(&mut line)?;
    Ok(parse(&line))
}

/// The same over UDP.
pub(crate) fn ask_udp(to: SocketAddr, wait: Duration) -> std::io::Result<(String, IpAddr)> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(wait))?;
    socket.send(b"?")?;
    let mut buffer = [0; 128];
    let len = socket.recv(&mut buffer)?;
    Ok(parse(std::str::from_utf8(&buffer[..len]).unwrap()))
}

fn parse(line: &str) -> (String, IpAddr) {
    let mut words = line.split_whitespace();
    (
        words.next().unwrap_or_default().to_owned(),
        words.next().and_then(|word| word.parse().ok()).unwrap_or(Ipv4Addr::UNSPECIFIED.into()),
    )
}

pub(crate) fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn socket(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub(crate) fn key(name: &str) -> ObjectKey {
    ObjectKey::new("default", name)
}

/// A Service of TCP port 80.
pub(crate) fn service(cluster_ip: &str) -> Service {
    Service {
        cluster_ips: vec![address(cluster_ip)],
        ports: vec![ServicePort { port: 80, ..ServicePort::default() }],
        ..Service::default()
    }
}

/// The slice of a Service with these endpoints at TCP port 8080.
pub(crate) fn slice(service: &str, endpoints: Vec<Endpoint>) -> Change {
    let ports = vec![EndpointPort { name: String::new(), protocol: Protocol::Tcp, port: 8080 }];
    Change::Slice(key(&format!("{service}-1")), Some(EndpointSlice { service: key(service), ports, endpoints }))
}
