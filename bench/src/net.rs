//! The network of a node alone, in this process: pods' networks beside the bare netlink messages, rules of ten thousand Services, new connections
//! through a Service, and what passes between two pods beside a bare bridge.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use coracle_netns::bare::Bare;
use coracle_netns::model::{Change, Endpoint, EndpointPort, EndpointSlice, ObjectKey, Service, ServicePort};
use coracle_netns::{Config, Network, PodKey, PodNet, PodNetwork, Protocol};
use nix::sched::{CloneFlags, setns};
use nix::time::{ClockId, clock_gettime};
use tokio::runtime::Runtime;

use crate::peers::{Contestant, interleave};
use crate::report::Figure;

const SERVICES: u32 = 10_000;
const ENDPOINTS: u32 = 5;
/// Endpoints changed, one after the other.
const CHANGES: u32 = 500;
/// The Service that is connected to, and how long a run connects or sends.
const FRONT: Ipv4Addr = Ipv4Addr::new(10, 43, 0, 2);
const RUN: Duration = Duration::from_millis(700);
/// MTU of all links here.
const MTU: u32 = 1500;
const NODE: &str = "node";

/// A node's network, and the runtime that drives it.
pub(crate) struct Here {
    pub(crate) network: Arc<Network>,
    runtime: Runtime,
    folder: tempfile::TempDir,
}

impl Here {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir().context("make a folder")?;
        let config = Config { mtu: Some(MTU), ..Config::new(folder.path(), NODE) };
        let network = Network::new(config).context("start the network")?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
        Ok(Self { network, runtime, folder })
    }

    pub(crate) fn pod(&self, name: &str) -> anyhow::Result<PodNetwork> {
        let key = PodKey { uid: format!("uid-{name}"), namespace: "default".into(), name: name.into() };
        self.runtime.block_on(self.network.setup_pod(key, PodNet::default())).context("make a pod's network")
    }

    pub(crate) fn update(&self, changes: Vec<Change>) -> anyhow::Result<()> {
        self.runtime.block_on(self.network.update(changes)).context("change the rules")
    }

    pub(crate) fn end(self) -> anyhow::Result<()> {
        self.network.destroy().context("take the network down")
    }
}

/// All figures, of so many pods and rounds.
pub(crate) fn measure(pods: usize, rounds: usize) -> anyhow::Result<Vec<Figure>> {
    let mut figures = links(pods.min(usize::from(u8::MAX) / 3)).context("pods' networks")?;
    figures.extend(rules(rounds).context("rules")?);
    figures.push(throughput(rounds).context("throughput")?);
    Ok(figures)
}

/// Pods made and removed, in turns with the bare messages.
fn links(pods: usize) -> anyhow::Result<Vec<Figure>> {
    let here = Here::new()?;
    let bare = Bare::new(Config { link_prefix: "bar".into(), ..here.network.config().clone() }, MTU)?;
    let pin = |n: u8| here.folder.path().join(format!("bare-{n}"));
    let (mut ours, mut floor) = (0_usize, 0_u8);
    let make = || {
        let started = Instant::now();
        here.pod(&ours.to_string()).map_err(|error| format!("{error:#}"))?;
        ours += 1;
        Ok(millis(started))
    };
    let make_bare = || {
        let started = Instant::now();
        bare.make(floor, &pin(floor)).map_err(|error| error.to_string())?;
        floor += 1;
        Ok(millis(started))
    };
    let made = interleave(
        vec![
            Contestant { name: "coracle".into(), sample: Box::new(make) },
            Contestant { name: "bare netlink messages".into(), sample: Box::new(make_bare) },
        ],
        pods,
    );
    let mut asked_us = Vec::new();
    let started = Instant::now();
    for n in 0..ours {
        let asked = Instant::now();
        here.network.teardown_pod(&format!("uid-{n}"));
        asked_us.push(asked.elapsed().as_secs_f64() * 1e6);
    }
    here.network.settle();
    let gone_ms = millis(started);
    bare.remove(&(0..floor).map(pin).collect::<Vec<_>>())?;
    here.end()?;
    Ok(vec![
        Figure::compare("network of a pod made", "ms", &made),
        Figure::ours("network of a pod to be removed: wait of who asks", "us", asked_us),
        Figure::ours(format!("networks of {ours} pods removed"), "ms", vec![gone_ms]),
    ])
}

/// Rules of one Service and of many, a new daemon each round.
fn rules(rounds: usize) -> anyhow::Result<Vec<Figure>> {
    let (mut sync_s, mut sync_cpu_s, mut memory_mib, mut change_ms) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut with_one, mut with_all, mut vanish_s) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        let one = Here::new()?;
        let (front, listener) = front(&one)?;
        one.update(front)?;
        with_one.push(connections(&listener)?);
        one.end()?;

        let all = Here::new()?;
        let (mut everything, listener) = self::front(&all)?;
        everything.extend((0..SERVICES).flat_map(|n| [service(n), slice(n, 0)]));
        let (before, computed, started) = (resident_mib()?, cpu()?, Instant::now());
        all.update(everything)?;
        sync_s.push(started.elapsed().as_secs_f64());
        sync_cpu_s.push((cpu()? - computed).as_secs_f64());
        if round == 0 {
            // Later rounds are given the memory that this one gave back.
            memory_mib.push(resident_mib()? - before);
        }
        with_all.push(connections(&listener)?);
        for n in 0..CHANGES {
            let started = Instant::now();
            all.update(vec![slice(n * 7 % SERVICES, 1)])?;
            change_ms.push(millis(started));
        }
        let started = Instant::now();
        all.update((0..SERVICES).map(|n| Change::Service(key(n), None)).collect())?;
        vanish_s.push(started.elapsed().as_secs_f64());
        all.end()?;
    }
    let many = format!("{SERVICES} services x {ENDPOINTS} endpoints");
    Ok(vec![
        Figure::ours(format!("{many}, first sync"), "s", sync_s),
        Figure::ours(format!("{many}, first sync, processor"), "s", sync_cpu_s),
        Figure::ours(format!("{many}, memory of the model"), "MiB", memory_mib),
        Figure::ours(format!("{many}, one changed, rule live"), "ms", change_ms),
        Figure::ours(format!("{SERVICES} services vanish"), "s", vanish_s),
        Figure::compare(
            "new connections through a ClusterIP",
            "per s of a processor",
            &[(format!("with {SERVICES} services"), Ok(with_all)), ("with one".into(), Ok(with_one))],
        ),
    ])
}

fn key(n: u32) -> ObjectKey {
    ObjectKey::new("default", &format!("service-{n}"))
}

/// Service number `n`, from 10.43.0.11 on.
pub(crate) fn service(n: u32) -> Change {
    let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 43, 0, 11)) + n);
    Change::Service(key(n), Some(at(address)))
}

fn at(address: Ipv4Addr) -> Service {
    let ports = vec![ServicePort { port: 80, ..ServicePort::default() }];
    Service { cluster_ips: vec![address.into()], ports, ..Service::default() }
}

fn endpoints(of: ObjectKey, endpoints: Vec<Endpoint>) -> Change {
    let ports = vec![EndpointPort { name: String::new(), protocol: Protocol::Tcp, port: 8080 }];
    Change::Slice(of.clone(), Some(EndpointSlice { service: of, ports, endpoints }))
}

/// Its endpoints; those of another generation differ by one.
fn slice(n: u32, generation: u32) -> Change {
    let address = |base: Ipv4Addr, offset: u32| IpAddr::V4(Ipv4Addr::from(u32::from(base) + offset));
    let ready = |address| Endpoint::ready(address, Some(NODE));
    let all = (0..ENDPOINTS).map(|e| ready(address(Ipv4Addr::new(10, 42, 0, 2), (n * ENDPOINTS + e) % 60_000)));
    let mut all: Vec<Endpoint> = all.collect();
    if generation > 0 {
        all[2] = ready(address(Ipv4Addr::new(10, 44, 0, 0), n + generation));
    }
    endpoints(key(n), all)
}

/// A Service with one pod, in which somebody listens.
fn front(here: &Here) -> anyhow::Result<(Vec<Change>, TcpListener)> {
    let pod = here.pod("front")?;
    let address = pod.ips[0];
    let listener = inside(&pod.netns, || TcpListener::bind((address, 8080)))?.context("listen in the pod")?;
    let name = ObjectKey::new("default", "front");
    let there = endpoints(name.clone(), vec![Endpoint::ready(address, Some(NODE))]);
    Ok((vec![Change::Service(name, Some(at(FRONT))), there], listener))
}

/// New connections through the Service in a second of a processor, made and taken one after the other: whatever else runs is not counted.
fn connections(listener: &TcpListener) -> anyhow::Result<f64> {
    let (started, computed, mut count) = (Instant::now(), cpu()?, 0_u32);
    while started.elapsed() < RUN {
        let stream = TcpStream::connect((FRONT, 80)).context("connect to the service")?;
        drop(listener.accept().context("take a connection")?);
        drop(stream);
        count += 1;
    }
    Ok(f64::from(count) / (cpu()? - computed).as_secs_f64())
}

/// From pod to pod through the host's routing and rules, beside two namespaces on a bare bridge.
fn throughput(rounds: usize) -> anyhow::Result<Figure> {
    let here = Here::new()?;
    let (from, to) = (here.pod("from")?, here.pod("to")?);
    sh(&format!(
        "mkdir -p /run/netns; mount -t tmpfs none /run/netns; ip link add sw0 type bridge; ip link set sw0 up
        for n in 1 2; do ip netns add b$n; ip link add q$n mtu {MTU} type veth peer name eth0 netns b$n; ip link set q$n master sw0 up
        ip -n b$n address add 192.168.9.$n/24 dev eth0; ip -n b$n link set eth0 up; done"
    ))?;
    let bridge = |n: u8| PathBuf::from(format!("/run/netns/b{n}"));
    let said = |result: anyhow::Result<f64>| result.map_err(|error| format!("{error:#}"));
    let measured = interleave(
        vec![
            Contestant {
                name: "pod to pod".into(),
                sample: Box::new(|| said(transfer(&from.netns, &to.netns, to.ips[0]))),
            },
            Contestant {
                name: "bare bridge".into(),
                sample: Box::new(|| said(transfer(&bridge(1), &bridge(2), Ipv4Addr::new(192, 168, 9, 2).into()))),
            },
        ],
        rounds,
    );
    sh("for n in 1 2; do ip netns delete b$n; done; ip link delete sw0; umount /run/netns")?;
    here.end()?;
    Ok(Figure::compare("TCP from pod to pod", "Gbit/s", &measured))
}

fn transfer(from: &Path, to: &Path, address: IpAddr) -> anyhow::Result<f64> {
    let listener = inside(to, || TcpListener::bind((address, 0)))?.context("listen")?;
    let target = listener.local_addr()?;
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || -> anyhow::Result<f64> {
            let (mut stream, _) = listener.accept()?;
            let (mut buffer, mut total) = (vec![0; 256 * 1024], 0_usize);
            let started = Instant::now();
            while let len @ 1.. = stream.read(&mut buffer)? {
                total += len;
            }
            Ok(total as f64 * 8.0 / started.elapsed().as_secs_f64() / 1e9)
        });
        let sent = inside(from, || -> anyhow::Result<()> {
            let mut stream = TcpStream::connect(target)?;
            let buffer = vec![0; 256 * 1024];
            let started = Instant::now();
            while started.elapsed() < RUN {
                stream.write_all(&buffer)?;
            }
            Ok(())
        })?;
        let read = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?;
        sent.and(read)
    })
}

/// Does some work in a network namespace.
pub(crate) fn inside<T: Send>(namespace: &Path, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
    let file = File::open(namespace).with_context(|| format!("open {}", namespace.display()))?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setns(file, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        });
        thread.join().map_err(|_| anyhow::anyhow!("the work in a namespace panicked"))?
    })
}

fn sh(script: &str) -> anyhow::Result<()> {
    let status = std::process::Command::new("sh").args(["-ec", script]).status().context("start sh")?;
    ensure!(status.success(), "{script}: {status}");
    Ok(())
}

/// What this process has computed; the kernel's work on netlink messages counts for whoever sends them.
fn cpu() -> anyhow::Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).context("read the time of the process")?.into())
}

fn resident_mib() -> anyhow::Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().context("read VmRSS")?;
    Ok(kib / 1024.0)
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
