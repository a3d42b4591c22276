//! The cluster's DNS as a pod meets it, beside other servers that answer the same name from memory.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::net::{Here, inside, service};
use crate::peers::{self, Contestant, interleave};
use crate::report::Figure;
use crate::stats::quantile;

/// What everybody is asked for, and the answer: the first Service of many.
const NAME: &str = "service-0.default.svc.cluster.local";
const ANSWER: Ipv4Addr = Ipv4Addr::new(10, 43, 0, 11);
pub(crate) const OURS: Ipv4Addr = Ipv4Addr::new(10, 43, 0, 10);
/// Questions that are on their way at once, and how long they are asked.
const WINDOW: usize = 32;
const RUN: Duration = Duration::from_millis(700);
/// Questions asked one after the other.
const QUESTIONS: usize = 2000;
/// Services with names.
const SERVICES: u32 = 10_000;
/// Time for a server to give its first answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A server of DNS: where it answers, and the threads that do.
struct Answering {
    name: String,
    address: SocketAddr,
    /// Folder of its threads in /proc.
    tasks: String,
    /// What ends it.
    process: Option<Child>,
}

impl Drop for Answering {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            // One that has ended already is what is wanted.
            drop(process.kill());
            drop(process.wait());
        }
    }
}

/// Answers a second of a processor, and the time for one answer, of everybody.
pub(crate) fn measure(rounds: usize) -> anyhow::Result<Vec<Figure>> {
    let here = Here::new()?;
    here.update((0..SERVICES).map(service).collect())?;
    let pod = here.pod("asker")?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let (tell, told) = std::sync::mpsc::channel();
    let network = here.network.clone();
    let serving = std::thread::spawn(move || -> anyhow::Result<()> {
        tell.send(nix::unistd::gettid().as_raw())?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            tokio::select! {
                result = network.serve_dns() => result.context("serve"),
                _ = stopped => Ok(()),
            }
        })
    });
    let thread = told.recv().context("the server's thread")?;
    let ours = Answering {
        name: "coracle".into(),
        address: (OURS, 53).into(),
        tasks: format!("/proc/self/task/{thread}"),
        process: None,
    };
    let folder = tempfile::tempdir().context("make a folder")?;
    let mut all = vec![ours];
    all.extend(others(folder.path())?);
    let figures = inside(&pod.netns, || compare(&all, rounds))?;
    drop(all);
    drop(stop);
    serving.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
    here.end()?;
    figures
}

/// Waits for a server that has just been started.
fn answers(server: &Answering) -> anyhow::Result<()> {
    let (started, socket) = (Instant::now(), client(server.address)?);
    while let Err(error) = ask(&socket) {
        if started.elapsed() > PATIENCE {
            return Err(error.context("no answer"));
        }
    }
    Ok(())
}

fn compare(all: &[Answering], rounds: usize) -> anyhow::Result<Vec<Figure>> {
    let run = |what: fn(&Answering) -> anyhow::Result<f64>| {
        let contestants = all.iter().map(|server| Contestant {
            name: server.name.clone(),
            sample: Box::new(move || answers(server).and_then(|()| what(server)).map_err(|error| format!("{error:#}"))),
        });
        interleave(contestants.collect(), rounds)
    };
    Ok(vec![
        Figure::compare("DNS answers a second of a processor", "per s", &run(rate)),
        Figure::compare(
            "DNS answer to a pod, p50 of each round",
            "ms",
            &run(|server| Ok(quantile(&waits(server)?, 0.5))),
        ),
        Figure::compare(
            "DNS answer to a pod, p99 of each round",
            "ms",
            &run(|server| Ok(quantile(&waits(server)?, 0.99))),
        ),
    ])
}

impl Answering {
    /// Seconds that the server's threads have computed (`schedstat`: nanoseconds on a processor first).
    fn cpu_s(&self) -> anyhow::Result<f64> {
        let mut total_ns = 0.0;
        let own = self.process.is_none().then(|| self.tasks.clone().into());
        let threads = match own {
            Some(own) => vec![own],
            None => std::fs::read_dir(&self.tasks)?.map(|entry| Ok(entry?.path())).collect::<anyhow::Result<_>>()?,
        };
        for thread in threads {
            let text = std::fs::read_to_string(thread.join("schedstat")).context("read the server's time")?;
            total_ns += text.split(' ').next().unwrap_or_default().parse::<f64>().context("read the server's time")?;
        }
        Ok(total_ns / 1e9)
    }
}

/// Answers a second of the server's computing, with some questions on their way at any time.
fn rate(server: &Answering) -> anyhow::Result<f64> {
    let socket = client(server.address)?;
    let (question, mut buffer) = (question(), [0; 512]);
    let (before, started, mut count) = (server.cpu_s()?, Instant::now(), 0_usize);
    while started.elapsed() < RUN {
        for _ in 0..WINDOW {
            socket.send(&question)?;
        }
        for _ in 0..WINDOW {
            socket.recv(&mut buffer).context("an answer is lost")?;
        }
        count += WINDOW;
    }
    Ok(count as f64 / (server.cpu_s()? - before))
}

/// How long each answer took, one question after the other, in milliseconds.
fn waits(server: &Answering) -> anyhow::Result<Vec<f64>> {
    let socket = client(server.address)?;
    let one = || {
        let started = Instant::now();
        ask(&socket)?;
        Ok(started.elapsed().as_secs_f64() * 1e3)
    };
    (0..QUESTIONS).map(|_| one()).collect()
}

fn client(server: SocketAddr) -> anyhow::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("a socket")?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    Ok(socket)
}

fn question() -> Vec<u8> {
    asking(NAME)
}

/// A question for the address of a name.
pub(crate) fn asking(name: &str) -> Vec<u8> {
    let mut question = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        // Labels have at most 63 bytes.
        question.push(label.len() as u8);
        question.extend(label.bytes());
    }
    question.extend([0, 0, 1, 0, 1]);
    question
}

/// Asks once; the answer must hold the address.
fn ask(socket: &UdpSocket) -> anyhow::Result<()> {
    let mut buffer = [0; 512];
    socket.send(&question())?;
    let len = socket.recv(&mut buffer)?;
    if !buffer[..len].windows(4).any(|bytes| bytes == ANSWER.octets()) {
        bail!("not the address of {NAME}");
    }
    Ok(())
}

/// The other servers that this machine has, each at an address of its own with the same names.
fn others(folder: &Path) -> anyhow::Result<Vec<Answering>> {
    let mut all = Vec::new();
    let addresses = (0..SERVICES).map(|n| (format!("service-{n}.default.svc.cluster.local"), u32::from(ANSWER) + n));
    let names: Vec<(String, Ipv4Addr)> = addresses.map(|(name, address)| (name, address.into())).collect();
    if let Some(program) = peers::find("dnsmasq") {
        let hosts = folder.join("hosts");
        let lines: String = names.iter().map(|(name, address)| format!("{address} {name}\n")).collect();
        std::fs::write(&hosts, lines).context("write names")?;
        let mut command = Command::new(program);
        command.args([
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--bind-interfaces",
        ]);
        command.args(["--user=root", "--pid-file=", "--addn-hosts"]).arg(&hosts);
        all.push(started("dnsmasq", Ipv4Addr::new(192, 0, 2, 1), |address| {
            command.arg(format!("--listen-address={address}"));
            command
        })?);
    }
    if let Some(program) = peers::find("unbound") {
        let file = folder.join("unbound.conf");
        let data: String =
            names.iter().map(|(name, address)| format!("  local-data: \"{name}. A {address}\"\n")).collect();
        all.push(started("unbound", Ipv4Addr::new(192, 0, 2, 2), |address| {
            let text = format!(
                "server:\n  interface: {address}\n  access-control: 0.0.0.0/0 allow\n  username: \"\"\n  chroot: \"\"\n  directory: \"/\"\n  pidfile: \"\"\n  \
                 use-syslog: no\n  do-daemonize: no\n  num-threads: 1\n  local-zone: \"cluster.local.\" static\n{data}remote-control:\n  control-enable: no\n"
            );
            // A file that cannot be written shows when the server finds none.
            drop(std::fs::write(&file, text));
            let mut command = Command::new(program);
            command.args(["-d", "-c"]).arg(&file);
            command
        })?);
    }
    Ok(all)
}

fn started(name: &str, address: Ipv4Addr, command: impl FnOnce(Ipv4Addr) -> Command) -> anyhow::Result<Answering> {
    let status = Command::new("ip").args(["address", "add", &format!("{address}/32"), "dev", "lo"]).status();
    anyhow::ensure!(status.context("start ip")?.success(), "give the host the address {address}");
    let mut command = command(address);
    let process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let process = process.with_context(|| format!("start {name}"))?;
    let tasks = format!("/proc/{}/task", process.id());
    Ok(Answering { name: name.into(), address: (address, 53).into(), tasks, process: Some(process) })
}
