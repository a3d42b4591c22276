//! What a cgroup and its processes have used, read at one moment.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::api;

/// Processes of one cgroup that are looked at one by one.
const MAX_PROCESSES: usize = 10_000;
/// Microseconds to nanoseconds.
const NS_PER_US: u64 = 1000;

/// Received and sent: bytes, packets, errors, dropped packets of an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Traffic {
    pub(super) received: [u64; 4],
    pub(super) sent: [u64; 4],
}

/// Memory in bytes and faults in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Memory {
    pub(super) usage: u64,
    pub(super) working_set: u64,
    pub(super) rss: u64,
    pub(super) cache: u64,
    pub(super) mapped: u64,
    pub(super) kernel: u64,
    pub(super) swap: u64,
    pub(super) peak: u64,
    pub(super) faults: u64,
    pub(super) major_faults: u64,
    pub(super) limit_hits: u64,
    pub(super) oom_kills: u64,
}

/// Processes, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Processes {
    pub(super) count: u64,
    pub(super) threads: u64,
    pub(super) threads_max: u64,
    pub(super) descriptors: u64,
    pub(super) sockets: u64,
    /// Soft limit of open files of the first one.
    pub(super) open_files_soft: Option<u64>,
}

/// A cgroup's folder, and what is in its files.
pub(super) struct Cgroup {
    folder: PathBuf,
}

impl Cgroup {
    /// The cgroup at `path`, relative to the cgroup2 mount.
    pub(super) fn at(path: &Path) -> Self {
        Self { folder: crate::cgroups::mount_point().join(path.strip_prefix("/").unwrap_or(path)) }
    }

    fn text(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.folder.join(file)).ok()
    }

    fn number(&self, file: &str) -> Option<u64> {
        self.text(file)?.trim().parse().ok()
    }

    /// A flat-keyed file, such as `cpu.stat`.
    pub(super) fn keys(&self, file: &str) -> BTreeMap<String, u64> {
        let text = self.text(file).unwrap_or_default();
        text.lines()
            .filter_map(|line| line.split_once(' '))
            .filter_map(|(k, v)| Some((k.into(), v.parse().ok()?)))
            .collect()
    }

    /// `io.stat`: by device `major:minor` the counters `rbytes`, `wbytes`, `rios`, `wios`.
    pub(super) fn io(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        let text = self.text("io.stat").unwrap_or_default();
        text.lines()
            .filter_map(|line| {
                let mut words = line.split(' ');
                let device = words.next()?.to_owned();
                let pair = |word: &str| word.split_once('=').and_then(|(k, v)| Some((k.to_owned(), v.parse().ok()?)));
                Some((device, words.filter_map(pair).collect()))
            })
            .collect()
    }

    /// Huge pages in use, by page size.
    pub(super) fn huge_pages(&self) -> Vec<(String, u64)> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
                (!size.contains('.')).then_some(())?;
                Some((size.to_owned(), self.number(&name)?))
            })
            .collect()
    }

    /// Pressure stall information of `cpu`, `memory` or `io`; `None` where the kernel keeps none.
    pub(super) fn pressure(&self, of: &str) -> Option<api::PsiStats> {
        pressure(&self.text(&format!("{of}.pressure"))?)
    }

    /// The processes of this cgroup and those below it.
    pub(super) fn pids(&self) -> Vec<u32> {
        let mut found = Vec::new();
        let mut folders = vec![self.folder.clone()];
        while let Some(folder) = folders.pop() {
            let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            found.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
            if found.len() > MAX_PROCESSES {
                break;
            }
            // A cgroup that goes away meanwhile has no processes.
            let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
            folders.extend(entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
        }
        found.truncate(MAX_PROCESSES);
        found
    }

    /// Memory as the controller counts it, or, on a host without that, the sum over the processes.
    pub(super) fn memory(&self) -> Memory {
        let Some(usage) = self.number("memory.current") else { return of_processes(&self.pids()) };
        let stat = self.keys("memory.stat");
        let events = self.keys("memory.events");
        let get = |map: &BTreeMap<String, u64>, key: &str| map.get(key).copied().unwrap_or(0);
        Memory {
            usage,
            working_set: usage.saturating_sub(get(&stat, "inactive_file")),
            rss: get(&stat, "anon"),
            cache: get(&stat, "file"),
            mapped: get(&stat, "file_mapped"),
            kernel: get(&stat, "kernel"),
            swap: self.number("memory.swap.current").unwrap_or(0),
            peak: self.number("memory.peak").unwrap_or(usage),
            faults: get(&stat, "pgfault"),
            major_faults: get(&stat, "pgmajfault"),
            limit_hits: get(&events, "max"),
            oom_kills: get(&events, "oom_kill"),
        }
    }

    /// The processes of this cgroup, looked at one by one.
    pub(super) fn processes(&self) -> Processes {
        let pids = self.pids();
        let system_max = || fs::read_to_string("/proc/sys/kernel/threads-max").ok()?.trim().parse().ok();
        let mut all = Processes {
            threads_max: self.number("pids.max").or_else(system_max).unwrap_or(0),
            open_files_soft: pids.first().and_then(|pid| open_files(*pid)),
            ..Processes::default()
        };
        for pid in &pids {
            // One that ends meanwhile does not count.
            let Some(status) = status(*pid) else { continue };
            all.count += 1;
            all.threads += status.get("Threads").copied().unwrap_or(1);
            for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
                all.descriptors += 1;
                let target = fs::read_link(entry.path()).unwrap_or_default();
                all.sockets += u64::from(target.to_string_lossy().starts_with("socket:"));
            }
        }
        all
    }

    /// CPU time in nanoseconds: all, of user space, of the kernel.
    pub(super) fn cpu(&self) -> [u64; 3] {
        let stat = self.keys("cpu.stat");
        ["usage_usec", "user_usec", "system_usec"].map(|key| stat.get(key).copied().unwrap_or(0) * NS_PER_US)
    }
}

/// The numbers of `/proc/<pid>/status`; sizes in kibibytes.
fn status(pid: u32) -> Option<BTreeMap<String, u64>> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    Some(pairs.filter_map(|(k, v)| Some((k.to_owned(), v.split_whitespace().next()?.parse().ok()?))).collect())
}

fn open_files(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("Max open files"))?.split_whitespace().next()?.parse().ok()
}

fn of_processes(pids: &[u32]) -> Memory {
    let mut sum = Memory::default();
    for pid in pids {
        let Some(status) = status(*pid) else { continue };
        let bytes = |key: &str| status.get(key).copied().unwrap_or(0) << 10;
        let (anonymous, file, shared) = (bytes("RssAnon"), bytes("RssFile"), bytes("RssShmem"));
        sum.rss += anonymous;
        sum.cache += file + shared;
        sum.mapped += file;
        sum.kernel += bytes("VmPTE");
        sum.swap += bytes("VmSwap");
        sum.peak += bytes("VmHWM");
        sum.usage += anonymous + file + shared + bytes("VmPTE");
        let [minor, major] = faults(*pid).unwrap_or_default();
        sum.faults += minor + major;
        sum.major_faults += major;
    }
    sum.working_set = sum.usage;
    sum.peak = sum.peak.max(sum.usage);
    sum
}

/// Minor and major faults: fields 10 and 12 of `/proc/<pid>/stat`, counted behind the name in brackets.
fn faults(pid: u32) -> Option<[u64; 2]> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_whitespace().skip(7);
    let minor = fields.next()?.parse().ok()?;
    let major = fields.nth(1)?.parse().ok()?;
    Some([minor, major])
}

fn pressure(text: &str) -> Option<api::PsiStats> {
    let line = |kind: &str| {
        let rest = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let field = |name: &str| rest.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        let average = |name: &str| field(name).and_then(|text| text.parse().ok()).unwrap_or(0.0);
        Some(api::PsiData {
            total: field("total")?.parse::<u64>().ok()? * NS_PER_US,
            avg10: average("avg10"),
            avg60: average("avg60"),
            avg300: average("avg300"),
        })
    };
    Some(api::PsiStats { full: line("full"), some: Some(line("some")?) })
}

/// The interfaces of a network namespace (`None`: the node's own), loopback left out.
pub(super) fn traffic(namespace: Option<&Path>) -> io::Result<BTreeMap<String, Traffic>> {
    let read = || fs::read_to_string("/proc/thread-self/net/dev");
    let text = match namespace {
        None => read()?,
        Some(path) => {
            let handle = fs::File::open(path)?;
            // A thread of its own: it changes its network namespace and must not be used for anything else afterwards.
            let thread = std::thread::Builder::new().name("traffic".into()).spawn(move || {
                nix::sched::setns(&handle, nix::sched::CloneFlags::CLONE_NEWNET)?;
                read()
            })?;
            thread.join().map_err(|_| io::Error::other("the thread that reads interfaces panicked"))??
        }
    };
    Ok(interfaces(&text))
}

fn interfaces(text: &str) -> BTreeMap<String, Traffic> {
    text.lines()
        .skip(2)
        .filter_map(|line| {
            let (name, numbers) = line.split_once(':')?;
            let numbers: Vec<u64> = numbers.split_whitespace().filter_map(|n| n.parse().ok()).collect();
            let four = |at: usize| numbers.get(at..at + 4)?.try_into().ok();
            let name = name.trim();
            (name != "lo").then_some(())?;
            Some((name.to_owned(), Traffic { received: four(0)?, sent: four(8)? }))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read() {
        let psi = pressure(
            "some avg10=0.12 avg60=0.00 avg300=1.50 total=42\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n",
        );
        let psi = psi.expect("pressure");
        let some = psi.some.expect("some");
        assert_eq!((some.avg10, some.avg300, some.total), (0.12, 1.5, 42_000));
        assert_eq!(psi.full.map(|full| full.total), Some(7_000));
        let head = "Inter-|   Receive\n face |bytes\n";
        let table = interfaces(&format!(
            "{head}    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 2 3 4 0 0 0 0 50 6 7 8 0 0 0 0\n"
        ));
        assert_eq!(table.len(), 1);
        assert_eq!(table["eth0"], Traffic { received: [10, 2, 3, 4], sent: [50, 6, 7, 8] });
    }

    #[test]
    fn memory_of_processes_is_that_of_their_status() {
        let own = std::process::id();
        let memory = of_processes(&[own]);
        assert!(memory.rss > 0 && memory.usage >= memory.rss && memory.peak >= memory.working_set, "{memory:?}");
        assert!(memory.faults > 0, "{memory:?}");
        assert!(open_files(own).is_some_and(|limit| limit > 0));
    }
}
