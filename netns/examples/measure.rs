//! Figures of the network on this host, in a network namespace of its own: run as root, best with `--release`.
//!
//! `cargo run --release -p coracle-netns --example measure`

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use coracle_netns::model::{Change, Endpoint, EndpointPort, EndpointSlice, ObjectKey, Service, ServicePort};
use coracle_netns::{Config, Network, PodKey, PodNet, Protocol};

const PODS: usize = 200;
const SERVICES: u32 = 10_000;
const ENDPOINTS: u32 = 5;
const CHANGES: u32 = 400;

fn main() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET | nix::sched::CloneFlags::CLONE_NEWNS)
        .expect("run as root");
    nix::mount::mount(
        None::<&str>,
        "/",
        None::<&str>,
        nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .expect("run as root");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let network = Network::new(Config::new(folder.path(), "node")).expect("the network starts");
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let mut make = Vec::new();
    for n in 0..PODS {
        let key = PodKey { uid: format!("uid-{n}"), namespace: "default".into(), name: format!("p{n}") };
        let start = Instant::now();
        runtime.block_on(network.setup_pod(key, PodNet::default())).expect("a pod");
        make.push(start.elapsed());
    }
    report("pod network made, one after the other", make);
    let start = Instant::now();
    (0..PODS).for_each(|n| network.teardown_pod(&format!("uid-{n}")));
    let asked = start.elapsed();
    network.settle();
    println!("{PODS} pods removed: asked for in {asked:?}, gone after {:?}", start.elapsed());

    throughput(&network, &runtime);
    let pod = runtime
        .block_on(network.setup_pod(
            PodKey { uid: "uid-z".into(), namespace: "default".into(), name: "z".into() },
            PodNet::default(),
        ))
        .expect("a pod");
    names(&network, &runtime, &pod.netns);
    let listener = inside(&pod.netns, || TcpListener::bind((pod.ips[0], 8080)).expect("a port"));
    std::thread::spawn(move || listener.incoming().for_each(drop));
    let front = vec![
        Change::Service(
            ObjectKey::new("default", "front"),
            Some(Service {
                cluster_ips: vec![FRONT.into()],
                ports: vec![ServicePort { port: 80, ..ServicePort::default() }],
                ..Service::default()
            }),
        ),
        Change::Slice(
            ObjectKey::new("default", "front"),
            Some(EndpointSlice {
                service: ObjectKey::new("default", "front"),
                ports: vec![EndpointPort { name: String::new(), protocol: Protocol::Tcp, port: 8080 }],
                endpoints: vec![Endpoint::ready(pod.ips[0], Some("node"))],
            }),
        ),
    ];
    runtime.block_on(network.update(front)).expect("the rules");
    let with_one = connections();
    let before = resident_kib();
    let all: Vec<Change> = (0..SERVICES).flat_map(|n| [service(n), slice(n, 0)]).collect();
    let start = Instant::now();
    runtime.block_on(network.update(all)).expect("the rules");
    println!(
        "{SERVICES} services x {ENDPOINTS} endpoints, first sync: {:?}; memory grew by {} KiB",
        start.elapsed(),
        resident_kib() - before
    );
    let with_all = connections();
    println!(
        "new connections a second: {with_one:.0} with one service, {with_all:.0} with {SERVICES} (ratio {:.2})",
        with_all / with_one
    );
    let mut change = Vec::new();
    for n in 0..CHANGES {
        let start = Instant::now();
        runtime.block_on(network.update(vec![slice(n * 7 % SERVICES, 1 + n / SERVICES)])).expect("the rules");
        change.push(start.elapsed());
    }
    report("one endpoint of 50,000 changed, rule live", change);
    let start = Instant::now();
    let gone = (0..SERVICES).map(|n| Change::Service(key(n), None)).collect();
    runtime.block_on(network.update(gone)).expect("the rules");
    println!("{SERVICES} services vanish: {:?}", start.elapsed());
    network.destroy().expect("all is removed");
}

fn key(n: u32) -> ObjectKey {
    ObjectKey::new("default", &format!("service-{n}"))
}

fn service(n: u32) -> Change {
    let address = IpAddr::V4(Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 43, 0, 11)) + n));
    let ports = vec![ServicePort { port: 80, ..ServicePort::default() }];
    Change::Service(key(n), Some(Service { cluster_ips: vec![address], ports, ..Service::default() }))
}

fn slice(n: u32, generation: u32) -> Change {
    let address =
        |e: u32| IpAddr::V4(Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 42, 0, 2)) + (n * ENDPOINTS + e) % 60_000));
    let mut endpoints: Vec<Endpoint> = (0..ENDPOINTS).map(|e| Endpoint::ready(address(e), Some("node"))).collect();
    if generation > 0 {
        endpoints[2] = Endpoint::ready(
            IpAddr::V4(Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 44, 0, 0)) + n + generation)),
            Some("node"),
        );
    }
    let ports = vec![EndpointPort { name: String::new(), protocol: Protocol::Tcp, port: 8080 }];
    Change::Slice(key(n), Some(EndpointSlice { service: key(n), ports, endpoints }))
}

fn report(what: &str, mut all: Vec<Duration>) {
    all.sort();
    let at = |percent: usize| all[(all.len() - 1) * percent / 100];
    println!("{what}: p50 {:?}, p90 {:?}, p99 {:?}", at(50), at(90), at(99));
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or_default()
}

/// The Service that is connected to.
const FRONT: Ipv4Addr = Ipv4Addr::new(10, 43, 0, 2);

/// New connections a second through the Service, one after the other: the median of some runs.
fn connections() -> f64 {
    let mut all: Vec<f64> = (0..RUNS)
        .map(|_| {
            let (start, mut count) = (Instant::now(), 0_u32);
            while start.elapsed() < RUN {
                drop(TcpStream::connect((FRONT, 80)).expect("a connection"));
                count += 1;
            }
            f64::from(count) / start.elapsed().as_secs_f64()
        })
        .collect();
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// Questions to the DNS from inside of a pod, some at a time.
fn names(network: &std::sync::Arc<Network>, runtime: &tokio::runtime::Runtime, pod: &Path) {
    const WINDOW: usize = 32;
    runtime.block_on(network.update(vec![service(0)])).expect("the rules");
    let serving = std::sync::Arc::clone(network);
    let server = runtime.spawn(async move { serving.serve_dns().await });
    let mut question = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in ["service-0", "default", "svc", "cluster", "local", ""] {
        question.push(u8::try_from(label.len()).expect("short"));
        question.extend(label.bytes());
    }
    question.extend([0, 1, 0, 1]);
    let waits = inside(pod, || {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("a port");
        socket.connect("10.43.0.10:53").expect("an address");
        let mut buffer = [0; 512];
        let start = Instant::now();
        let mut count = 0;
        while start.elapsed() < RUN * 2 {
            for _ in 0..WINDOW {
                socket.send(&question).expect("sent");
            }
            for _ in 0..WINDOW {
                socket.recv(&mut buffer).expect("an answer");
            }
            count += WINDOW;
        }
        println!(
            "DNS: {:.0} answers a second, asker and server on two cores",
            count as f64 / start.elapsed().as_secs_f64()
        );
        let mut one = Vec::new();
        for _ in 0..5000 {
            let sent = Instant::now();
            socket.send(&question).expect("sent");
            socket.recv(&mut buffer).expect("an answer");
            one.push(sent.elapsed());
        }
        one
    });
    report("DNS question from a pod, one after the other", waits);
    server.abort();
}

/// Runs of each kind, taking turns.
const RUNS: usize = 5;
/// How long one run sends.
const RUN: Duration = Duration::from_millis(700);

/// From pod to pod through the host's routing and rules, beside two namespaces on a bare bridge.
fn throughput(network: &Network, runtime: &tokio::runtime::Runtime) {
    let pods: Vec<_> = ["x", "y"]
        .iter()
        .map(|name| {
            let key = PodKey { uid: format!("uid-{name}"), namespace: "default".into(), name: (*name).into() };
            runtime.block_on(network.setup_pod(key, PodNet::default())).expect("a pod")
        })
        .collect();
    sh("mkdir -p /run/netns; mount -t tmpfs none /run/netns; ip link add sw0 type bridge; ip link set sw0 up
        for n in 1 2; do ip netns add b$n; ip link add q$n type veth peer name eth0 netns b$n; ip link set q$n master sw0 up
        ip -n b$n address add 192.168.9.$n/24 dev eth0; ip -n b$n link set eth0 up; done");
    let bridge = |n| PathBuf::from(format!("/run/netns/b{n}"));
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        ours.push(transfer(&pods[0].netns, &pods[1].netns, pods[1].ips[0]));
        bare.push(transfer(&bridge(1), &bridge(2), Ipv4Addr::new(192, 168, 9, 2).into()));
    }
    let median = |all: &mut Vec<f64>| {
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    let (ours, bare) = (median(&mut ours), median(&mut bare));
    println!("pod to pod {ours:.1} Gbit/s, bare bridge {bare:.1} Gbit/s, ratio {:.2}", ours / bare);
    sh("for n in 1 2; do ip netns delete b$n; done; ip link delete sw0; umount /run/netns");
    for name in ["x", "y"] {
        network.teardown_pod(&format!("uid-{name}"));
    }
    network.settle();
}

fn transfer(from: &Path, to: &Path, address: IpAddr) -> f64 {
    let listener = inside(to, || TcpListener::bind((address, 0)).expect("a port"));
    let target = listener.local_addr().expect("a bound socket");
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let (mut stream, _) = listener.accept().expect("a connection");
            let (mut buffer, mut total) = (vec![0; 256 * 1024], 0_u64);
            let start = Instant::now();
            while let Ok(len @ 1..) = stream.read(&mut buffer) {
                total += len as u64;
            }
            total as f64 * 8.0 / start.elapsed().as_secs_f64() / 1e9
        });
        inside(from, || {
            let mut stream = TcpStream::connect(target).expect("a connection");
            let buffer = vec![0; 256 * 1024];
            let start = Instant::now();
            while start.elapsed() < RUN {
                stream.write_all(&buffer).expect("the reader reads");
            }
        });
        reader.join().expect("the reader does not panic")
    })
}

fn inside<T: Send>(namespace: &Path, work: impl FnOnce() -> T + Send) -> T {
    let namespace = std::fs::File::open(namespace).expect("the namespace is there");
    std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).expect("root may enter");
            work()
        });
        run.join().expect("the work does not panic")
    })
}

fn sh(command: &str) {
    let status = std::process::Command::new("sh").args(["-ec", command]).status().expect("a shell");
    assert!(status.success(), "{command}");
}
