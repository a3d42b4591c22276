//! A server that a measurement starts, and takes down with everything that it made.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::net::UnixDatagram;
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// Time for the server to say that it is ready, and to end when told to.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) const NODE: &str = "bench";

pub(crate) struct Server {
    program: PathBuf,
    flags: Vec<String>,
    folder: tempfile::TempDir,
    cgroup: String,
    child: Child,
    pub(crate) started: Instant,
}

impl Server {
    /// Starts `coracle server` with more flags; returns when it tells its service manager that it is ready (sd_notify(3)).
    pub(crate) async fn start(program: &Path, flags: &[&str]) -> anyhow::Result<Self> {
        ensure!(program.is_file(), "{} is not there: build it, or name another with --coracle", program.display());
        let folder = tempfile::tempdir().context("make a folder")?;
        let cgroup = format!("coracle-bench-{}", std::process::id());
        let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let started = Instant::now();
        let (child, ready) = spawn(program, folder.path(), &cgroup, &flags)?;
        let mut server = Self { program: program.to_owned(), flags, folder, cgroup, child, started };
        if let Err(error) = server.ready(&ready).await {
            let log = server.log();
            server.stop().await.with_context(|| format!("{error}, and could not be taken down"))?;
            bail!("{error}\n{log}");
        }
        Ok(server)
    }

    /// Ends the server and starts it anew on the same folders.
    pub(crate) async fn restart(&mut self) -> anyhow::Result<()> {
        self.end().await?;
        self.started = Instant::now();
        let (child, ready) = spawn(&self.program, self.folder.path(), &self.cgroup, &self.flags)?;
        self.child = child;
        self.ready(&ready).await
    }

    /// Waits until the server says that it is ready.
    async fn ready(&mut self, ready: &UnixDatagram) -> anyhow::Result<()> {
        let mut message = [0; 256];
        tokio::select! {
            told = timeout(PATIENCE, ready.recv(&mut message)) => match told {
                Ok(received) => received.map(drop).context("hear from the server"),
                Err(_) => Err(anyhow::anyhow!("the server was not ready in {} s", PATIENCE.as_secs())),
            },
            status = self.child.wait() => Err(anyhow::anyhow!("the server ended: {}", status?)),
        }
    }

    async fn end(&mut self) -> anyhow::Result<()> {
        if let Some(id) = self.child.id() {
            kill(Pid::from_raw(i32::try_from(id)?), Signal::SIGTERM).context("tell the server to stop")?;
        }
        timeout(PATIENCE, self.child.wait()).await.context("the server does not stop")??;
        Ok(())
    }

    /// A client with a connection of its own, as the administrator.
    pub(crate) async fn client(&self) -> anyhow::Result<Client> {
        let file = self.folder.path().join("kubeconfig");
        let kubeconfig = Kubeconfig::read_from(&file).with_context(|| format!("read {}", file.display()))?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        Ok(Client::try_from(config)?)
    }

    pub(crate) async fn import(&self, image: &coracle_testkit::Image) -> anyhow::Result<()> {
        let archive = self.folder.path().join("image.tar");
        image.write(&archive).context("write an image")?;
        let data = self.folder.path().join("data");
        run(Command::new(&self.program).args(["image", "--data-dir"]).arg(data).arg("import").arg(archive)).await
    }

    /// Prints a token that hosts join with.
    pub(crate) async fn token(&self) -> anyhow::Result<String> {
        let mut command = Command::new(&self.program);
        command.args(["token", "create"]).env("KUBECONFIG", self.folder.path().join("kubeconfig"));
        let output = command.output().await.context("make a token")?;
        ensure!(output.status.success(), "make a token: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    /// Ids of every process of ours: the server's and its supervisor's, with whether it is the latter.
    fn processes(&self) -> anyhow::Result<Vec<(PathBuf, bool)>> {
        let folder = self.folder.path().display().to_string();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").context("read /proc")? {
            let process = entry?.path();
            // A process may end while we look: then it is none of ours.
            let Ok(command) = std::fs::read(process.join("cmdline")) else { continue };
            let command = String::from_utf8_lossy(&command);
            let ours = std::fs::read_link(process.join("exe")).is_ok_and(|exe| exe == self.program);
            if ours && command.contains(&folder) {
                found.push((process, command.contains("\0supervisor\0")));
            }
        }
        ensure!(!found.is_empty(), "no process of {} was found", self.program.display());
        Ok(found)
    }

    /// Memory of every process of ours by `field` of proc_pid_smaps(5), such as `Rss`.
    pub(crate) fn memory_mib(&self, field: &str) -> anyhow::Result<Memory> {
        let mut memory = Memory::default();
        for (process, is_supervisor) in self.processes()? {
            let Ok(rollup) = std::fs::read_to_string(process.join("smaps_rollup")) else { continue };
            let of = |field: &str| {
                let line = rollup.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
                line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok())
                    .with_context(|| format!("smaps_rollup names no {field}"))
            };
            memory.all += of(field)? / 1024.0;
            if is_supervisor {
                memory.supervisor_rss += of("Rss")? / 1024.0;
                memory.supervisor_own += of("Anonymous")? / 1024.0;
            }
        }
        Ok(memory)
    }

    /// Resident memory of every process of ours, in MiB.
    pub(crate) fn rss_mib(&self) -> anyhow::Result<f64> {
        Ok(self.memory_mib("Rss")?.all)
    }

    /// The control group of a pod.
    pub(crate) fn cgroup_of(&self, uid: &str) -> anyhow::Result<PathBuf> {
        let folders =
            |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let root = Path::new(crate::host::CGROUPS).join(&self.cgroup);
        let mut all =
            folders(&root).flat_map(|class| std::iter::once(class.clone()).chain(folders(&class).collect::<Vec<_>>()));
        all.find(|folder| folder.is_dir() && folder.to_string_lossy().contains(uid))
            .with_context(|| format!("no control group of pod {uid} in {}", root.display()))
    }

    /// Time that all our processes have computed, in seconds.
    pub(crate) fn all_cpu_s(&self) -> anyhow::Result<f64> {
        let all = self.processes()?;
        // One that has ended meanwhile is not counted.
        Ok(all.iter().filter_map(|(process, _)| cpu_s(process).ok()).sum())
    }

    /// Time that the server itself has computed, in seconds.
    pub(crate) fn cpu_s(&self) -> anyhow::Result<f64> {
        let id = self.child.id().context("the server has ended")?;
        cpu_s(Path::new(&format!("/proc/{id}")))
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_else(|error| format!("no log: {error}"))
    }

    /// Ends the server, and its pods with everything around them.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        self.end().await?;
        let arguments = folders(self.folder.path(), &self.cgroup);
        run(Command::new(&self.program).arg("cleanup").args(arguments)).await
    }
}

/// Memory in MiB.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Memory {
    /// Of all our processes, by the field that was asked for.
    pub(crate) all: f64,
    pub(crate) supervisor_rss: f64,
    /// Without what it shares with the server: the program's text.
    pub(crate) supervisor_own: f64,
}

/// Time that a process has computed, in seconds.
fn cpu_s(process: &Path) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(process.join("stat")).context("read a process' times")?;
    // proc(5): user and system time are the 14th and 15th field; the name before may hold spaces.
    let fields = stat.rsplit_once(')').context("read a process' times")?.1;
    let ticks: u64 = fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Ok(ticks as f64 / 100.0)
}

/// Starts the program, and opens the socket on which it says that it is ready.
fn spawn(program: &Path, folder: &Path, cgroup: &str, flags: &[String]) -> anyhow::Result<(Child, UnixDatagram)> {
    let notify = folder.join("notify");
    if notify.exists() {
        std::fs::remove_file(&notify).context("remove the socket of an earlier start")?;
    }
    let ready = UnixDatagram::bind(&notify).context("make a socket")?;
    let log = std::fs::File::create(folder.join("log")).context("make a log")?;
    let child = Command::new(program)
        .args(["--log", "warn", "server"])
        .args(folders(folder, cgroup))
        .args(["--node-name", NODE, "--https-listen-port", "6443", "--write-kubeconfig"])
        .arg(folder.join("kubeconfig"))
        .args(flags)
        .env("NOTIFY_SOCKET", &notify)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .with_context(|| format!("start {}", program.display()))?;
    Ok((child, ready))
}

pub(crate) fn folders(root: &Path, cgroup: &str) -> Vec<String> {
    let of = |name: &str| root.join(name).display().to_string();
    let flags = [("--data-dir", of("data")), ("--run-dir", of("run")), ("--pod-log-dir", of("log-pods"))];
    let folders = flags.into_iter().flat_map(|(flag, folder)| [flag.to_owned(), folder]);
    folders.chain(["--cgroup-root".to_owned(), cgroup.to_owned()]).collect()
}

pub(crate) async fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().await?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
