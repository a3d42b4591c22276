//! `corun` beside the runtimes on this machine: `run` and `exec` of `/bin/true`, the price of a system call under the usual
//! seccomp profile, many containers at once, and many that live.

mod bundle;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::host::CGROUPS;
use crate::peers::{Contestant, beside, find, interleave};
use crate::report::{Figure, Samples};

/// The namespaces and a root, and nothing else: `src/bin/floor.rs`.
const FLOOR: &str = "floor";
/// Peak memory hardly varies; more runs would say no more.
const PEAK_RUNS: usize = 5;
/// Bytes that dd copies one by one, with two system calls each.
const COPIED: u32 = 400_000;
const SYSCALL_RUNS: usize = 5;
const AT_ONCE: usize = 200;
const ALIVE: usize = 1_000;

pub(crate) fn measure(corun: &Path, runs: usize) -> anyhow::Result<Vec<Figure>> {
    ensure!(corun.is_file(), "{} is not there: build it, or name another with --corun", corun.display());
    let folder = tempfile::tempdir().context("make a folder")?;
    let folder = folder.path();
    let root = bundle::root(folder)?;
    let stock = bundle::bundle(folder, "true", &["/bin/true"], None)?;
    let sleeping = bundle::bundle(folder, "sleep", &["/bin/sleep", "1000000"], None)?;
    let mut runtimes = vec![Runtime::new("corun", corun.to_owned(), folder)];
    runtimes.extend(["runc", "crun"].iter().filter_map(|name| Some(Runtime::new(name, find(name)?, folder))));
    let floor = beside(FLOOR)?;

    let run = |take: fn(Command) -> Result<f64, String>| {
        let stock = stock.as_path();
        let mut all = each(&runtimes, move |runtime| {
            let id = runtime.id();
            take(runtime.command(&["run", "--bundle"], &[stock], &id)).map_err(|failure| runtime.clean(&id, failure))
        });
        let (floor, root) = (&floor, &root);
        let sample = move || {
            let mut command = Command::new(floor);
            command.arg(root).arg("/bin/true");
            take(command)
        };
        all.push(Contestant { name: FLOOR.to_owned(), sample: Box::new(sample) });
        all
    };
    let mut figures = vec![
        Figure::compare("oci run /bin/true", "ms", &interleave(run(wall_ms), runs)),
        Figure::compare("oci run, peak RSS", "MiB", &interleave(run(peak_mib), runs.min(PEAK_RUNS))),
    ];
    let targets: Vec<_> = runtimes.iter().map(|runtime| runtime.start_one(&sleeping)).collect();
    let exec = runtimes.iter().zip(&targets).map(|(runtime, target)| {
        let sample = move || {
            let target = target.as_ref().map_err(String::clone)?;
            let mut command = runtime.command(&["exec"], &[], target);
            command.arg("/bin/true");
            wall_ms(command)
        };
        Contestant { name: runtime.name.to_owned(), sample: Box::new(sample) }
    });
    figures.push(Figure::compare("oci exec /bin/true", "ms", &interleave(exec.collect(), runs)));
    for (runtime, target) in runtimes.iter().zip(&targets) {
        let _ = target.as_ref().map(|target| runtime.remove(target));
    }
    figures.push(syscalls(folder, &runtimes)?);
    let at_once = runtimes.iter().map(|runtime| (runtime.name.to_owned(), runtime.at_once(&sleeping)));
    figures.push(Figure::compare(format!("oci, {AT_ONCE} containers at once"), "ms", &at_once.collect::<Vec<_>>()));
    let alive: Vec<_> = runtimes.iter().map(|runtime| (runtime.name.to_owned(), runtime.alive(&sleeping))).collect();
    let part = |take: fn(&(f64, f64)) -> f64| -> Vec<Samples> {
        alive
            .iter()
            .map(|(name, got)| (name.clone(), got.as_ref().map(|got| vec![take(got)]).map_err(String::clone)))
            .collect()
    };
    figures.push(Figure::compare(format!("oci, start of {ALIVE} that live"), "ms each", &part(|got| got.0)));
    figures.push(Figure::compare(format!("oci, memory of {ALIVE} that live"), "KiB each", &part(|got| got.1)));
    Ok(figures)
}

/// Each runtime as a contestant.
fn each<'a>(
    runtimes: &'a [Runtime],
    sample: impl Fn(&'a Runtime) -> Result<f64, String> + Copy + 'a,
) -> Vec<Contestant<'a>> {
    let contestant =
        |runtime: &'a Runtime| Contestant { name: runtime.name.to_owned(), sample: Box::new(move || sample(runtime)) };
    runtimes.iter().map(contestant).collect()
}

/// What a call costs in a container with the default profile, and without one.
fn syscalls(folder: &Path, runtimes: &[Runtime]) -> anyhow::Result<Figure> {
    let profile = serde_json::to_value(coracle_runtime::seccomp::default_profile(&Default::default()))?;
    let dd = |name: &str, count: u32, profile| {
        let count = format!("count={count}");
        bundle::bundle(folder, name, &["/bin/dd", "if=/dev/zero", "of=/dev/null", "bs=1", &count], profile)
    };
    let filtered = (dd("many", COPIED, Some(&profile))?, dd("none", 0, Some(&profile))?);
    let plain = (dd("many-plain", COPIED, None)?, dd("none-plain", 0, None)?);
    let cost = |runtime: &Runtime, (many, none): &(PathBuf, PathBuf)| {
        let time = |bundle: &PathBuf| wall_ms(runtime.command(&["run", "--bundle"], &[bundle], &runtime.id()));
        Ok((time(many)? - time(none)?) * 1e6 / f64::from(2 * COPIED))
    };
    let mut all = each(runtimes, |runtime| cost(runtime, &filtered));
    if let Some(first) = runtimes.first() {
        all.push(Contestant { name: "no profile".into(), sample: Box::new(|| cost(first, &plain)) });
    }
    Ok(Figure::compare("oci, system call under the default profile", "ns", &interleave(all, SYSCALL_RUNS)))
}

/// How one runtime is called.
struct Runtime {
    name: &'static str,
    program: PathBuf,
    state: PathBuf,
}

impl Runtime {
    fn new(name: &'static str, program: PathBuf, folder: &Path) -> Self {
        Self { name, program, state: folder.join(format!("state-{name}")) }
    }

    fn id(&self) -> String {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        format!("coracle-bench-{}-{}", std::process::id(), SERIAL.fetch_add(1, Ordering::Relaxed))
    }

    fn command(&self, words: &[&str], paths: &[&Path], id: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(&self.state).args(words).args(paths).arg(id).stdin(Stdio::null());
        command
    }

    /// Begins to start a container that stays.
    fn detached(&self, bundle: &Path, id: &str) -> std::io::Result<Child> {
        // Its streams stay open, so they must not be pipes that somebody reads to the end.
        let mut command = self.command(&["run", "--detach", "--bundle"], &[bundle], id);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()
    }

    fn start_one(&self, bundle: &Path) -> Result<String, String> {
        let id = self.id();
        let started =
            self.detached(bundle, &id).and_then(|mut child| child.wait()).map_err(|error| error.to_string())?;
        if started.success() { Ok(id) } else { Err(self.clean(&id, format!("run --detach: {started}"))) }
    }

    /// The time in which as many start that were begun together.
    fn at_once(&self, bundle: &Path) -> Result<Vec<f64>, String> {
        let ids: Vec<_> = (0..AT_ONCE).map(|_| self.id()).collect();
        let started = Instant::now();
        let children: Vec<_> = ids.iter().map(|id| self.detached(bundle, id)).collect();
        let ended = children.into_iter().map(|child| child.and_then(|mut child| child.wait()));
        let failed = ended.filter(|end| !end.as_ref().is_ok_and(std::process::ExitStatus::success)).count();
        let took = started.elapsed().as_secs_f64() * 1e3;
        ids.iter().try_for_each(|id| self.remove(id))?;
        if failed == 0 { Ok(vec![took]) } else { Err(format!("{failed} of {AT_ONCE} failed")) }
    }

    /// Time and memory for each of many that live together.
    fn alive(&self, bundle: &Path) -> Result<(f64, f64), String> {
        let (before, started) = (settled_kib()?, Instant::now());
        let ids: Vec<_> = (0..ALIVE).map(|_| self.start_one(bundle)).collect();
        let (took, after) = (started.elapsed().as_secs_f64() * 1e3, available_kib()?);
        let removed = ids.iter().flatten().try_for_each(|id| self.remove(id));
        ids.into_iter().collect::<Result<Vec<_>, _>>()?;
        removed?;
        Ok((took / ALIVE as f64, (before - after) / ALIVE as f64))
    }

    /// Removes what a failed run may have left, and says what stays.
    fn clean(&self, id: &str, failure: String) -> String {
        self.remove(id).err().map_or(failure.clone(), |left| format!("{failure}; {left}"))
    }

    /// Removes a container: its state, if it got so far, and its cgroup.
    fn remove(&self, id: &str) -> Result<(), String> {
        // Fails where the run left no state, which is as well; the cgroup is looked at either way.
        let deleted = succeed(&mut self.command(&["delete", "--force"], &[], id));
        match std::fs::remove_dir(Path::new(CGROUPS).join(id)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(format!("its cgroup {id} stays: {error} ({deleted:?})"))
            }
            _ => Ok(()),
        }
    }
}

/// What is available once the kernel has freed what earlier containers left, which it does by and by.
fn settled_kib() -> Result<f64, String> {
    const STEP: Duration = Duration::from_millis(500);
    const STEPS: usize = 120;
    const STILL_KIB: f64 = 4096.0;
    let mut last = available_kib()?;
    for _ in 0..STEPS {
        std::thread::sleep(STEP);
        let now = available_kib()?;
        if now - last < STILL_KIB {
            return Ok(now);
        }
        last = now;
    }
    Err("memory does not settle".into())
}

fn available_kib() -> Result<f64, String> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(|error| error.to_string())?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).ok_or_else(|| "no MemAvailable".into())
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
