//! `run` of `/bin/true` from a bundle as `runc spec` writes it, rlimits apart (an unprivileged root may not raise them).

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::host::CGROUPS;
use crate::peers::{Contestant, find, interleave};
use crate::report::Figure;

/// What the namespaces alone cost: no root file system, no cgroup, no seccomp.
const FLOOR: &str = "floor (unshare)";

/// Times and peak memory of `corun` and of the runtimes on this machine.
pub(crate) fn measure(corun: &Path, runs: usize) -> anyhow::Result<Vec<Figure>> {
    ensure!(corun.is_file(), "{} is not there: build it, or name another with --corun", corun.display());
    let folder = tempfile::tempdir().context("make a folder")?;
    let bundle = bundle(folder.path())?;
    let mut runtimes = vec![("corun", corun.to_owned())];
    runtimes.extend(["runc", "crun"].iter().filter_map(|name| Some((*name, find(name)?))));
    let commands: Vec<_> = runtimes.into_iter().map(|(name, program)| Run::new(name, program, &bundle)).collect();

    let serial = Cell::new(0_u64);
    let all = |take: fn(Command) -> Result<f64, String>| {
        let mut all = Vec::new();
        for run in &commands {
            let serial = &serial;
            let sample = move || {
                serial.set(serial.get() + 1);
                let id = format!("coracle-bench-{}-{}", std::process::id(), serial.get());
                take(run.command(&id)).map_err(|failure| {
                    run.remove(&id).err().map_or(failure.clone(), |left| format!("{failure}; {left}"))
                })
            };
            all.push(Contestant { name: run.name.to_owned(), sample: Box::new(sample) });
        }
        if let Some(program) = find("unshare") {
            all.push(Contestant { name: FLOOR.to_owned(), sample: Box::new(move || take(floor(&program))) });
        }
        all
    };
    let times = interleave(all(wall_ms), runs);
    let memory = interleave(all(peak_mib), runs.min(PEAK_RUNS));
    Ok(vec![Figure::compare("oci run /bin/true", "ms", &times), Figure::compare("oci run, peak RSS", "MiB", &memory)])
}

/// Peak memory hardly varies; more runs would say no more.
const PEAK_RUNS: usize = 5;

/// How one runtime is called.
struct Run {
    name: &'static str,
    program: PathBuf,
    bundle: PathBuf,
    state: PathBuf,
}

impl Run {
    fn new(name: &'static str, program: PathBuf, bundle: &Path) -> Self {
        Self { name, program, bundle: bundle.to_owned(), state: bundle.join(format!("state-{name}")) }
    }

    fn command(&self, id: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(&self.state).args(["run", "--bundle"]).arg(&self.bundle).arg(id);
        command
    }

    /// Removes what a run that failed may have left: its state, if it got so far, and its cgroup.
    fn remove(&self, id: &str) -> Result<(), String> {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(&self.state).args(["delete", "--force", id]);
        // Fails where the run left no state, which is as well; the cgroup is looked at either way.
        let deleted = succeed(&mut command);
        match std::fs::remove_dir(Path::new(CGROUPS).join(id)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(format!("its cgroup {id} stays: {error} ({deleted:?})"))
            }
            _ => Ok(()),
        }
    }
}

fn floor(unshare: &Path) -> Command {
    let mut command = Command::new(unshare);
    command.args(["--fork", "--pid", "--mount", "--net", "--ipc", "--uts", "--cgroup", "/bin/true"]);
    command
}

fn wall_ms(mut command: Command) -> Result<f64, String> {
    let started = Instant::now();
    succeed(&mut command)?;
    Ok(started.elapsed().as_secs_f64() * 1e3)
}

/// The largest process among a command's, told by a fresh process that waits for it: this one's children are many.
fn peak_mib(command: Command) -> Result<f64, String> {
    let mut helper = Command::new(std::env::current_exe().map_err(|error| error.to_string())?);
    helper.args(["peak-rss", "--"]).arg(command.get_program()).args(command.get_args());
    let kib: f64 =
        succeed(&mut helper)?.trim().parse().map_err(|error| format!("peak-rss printed no number: {error}"))?;
    Ok(kib / 1024.0)
}

fn succeed(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("not started: {error}"))?;
    if !output.status.success() {
        return Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The hidden subcommand `peak-rss`: runs a command and prints the KiB of its largest process (getrusage(2)).
pub(crate) fn peak_rss(command: &[String]) -> anyhow::Result<()> {
    use nix::sys::resource::{UsageWho, getrusage};
    use std::os::unix::process::CommandExt;
    let (program, arguments) = command.split_first().context("no command")?;
    // Naming the user makes the library fork: a child of vfork would inherit this process's peak through exec.
    let output = Command::new(program).args(arguments).uid(nix::unistd::getuid().as_raw()).output()?;
    ensure!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    println!("{}", getrusage(UsageWho::RUSAGE_CHILDREN)?.max_rss());
    Ok(())
}

fn bundle(folder: &Path) -> anyhow::Result<PathBuf> {
    let root = folder.join("rootfs");
    for name in ["bin", "dev", "proc", "sys"] {
        std::fs::create_dir_all(root.join(name)).context("make a root file system")?;
    }
    let busybox = coracle_testkit::need("busybox", "busybox-static");
    std::fs::copy(&busybox, root.join("bin/true")).with_context(|| format!("copy {}", busybox.display()))?;
    std::fs::write(folder.join("config.json"), config().to_string()).context("write config.json")?;
    Ok(folder.to_owned())
}

fn config() -> Value {
    let capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    let mount = |target: &str, kind: &str, source: &str, options: &[&str]| json!({"destination": target, "type": kind, "source": source, "options": options});
    let namespaces = ["pid", "network", "ipc", "uts", "mount", "cgroup"].map(|kind| json!({"type": kind}));
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/true"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "bench",
        "mounts": [
            mount("/proc", "proc", "proc", &[]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": namespaces,
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi",
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}
