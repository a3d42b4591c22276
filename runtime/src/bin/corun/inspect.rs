//! `state`, `list`, `ps`, `events`.

use crate::Context;
use anyhow::{Context as _, Result, bail};
use coracle_runtime::cgroup;
use coracle_runtime::state::{Folder, State, Status};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What `state` and `list` tell, in the order in which others tell it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Description {
    oci_version: String,
    id: String,
    pid: i32,
    status: String,
    bundle: PathBuf,
    rootfs: PathBuf,
    created: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
    owner: String,
}

fn describe(folder: &Folder, state: State) -> Description {
    let status = state.status(folder);
    Description {
        pid: if status == Status::Stopped { 0 } else { state.pid },
        status: status.to_string(),
        oci_version: state.oci_version,
        id: state.id,
        bundle: state.bundle,
        rootfs: state.rootfs,
        created: state.created,
        annotations: state.annotations.into_iter().collect(),
        owner: state.owner,
    }
}

pub(crate) fn state(context: &Context) -> Result<i32> {
    let (folder, state) = context.container()?;
    println!("{}", serde_json::to_string_pretty(&describe(&folder, state))?);
    Ok(0)
}

pub(crate) fn list(context: &Context) -> Result<i32> {
    let mut rows = Vec::new();
    for folder in Folder::list(&context.root)? {
        match folder.load() {
            Ok(state) => rows.push(describe(&folder, state)),
            // In the making, or just deleted.
            Err(coracle_runtime::Error::NoContainer(_)) => {}
            Err(error) => eprintln!("corun: {error}"),
        }
    }
    if context.flags.has("quiet") {
        for row in &rows {
            println!("{}", row.id);
        }
        return Ok(0);
    }
    match context.flags.value("format").unwrap_or("table") {
        "json" => println!("{}", serde_json::to_string(&rows)?),
        "table" => {
            println!("{:<24} {:<10} {:<10} {:<40} {:<32} OWNER", "ID", "PID", "STATUS", "BUNDLE", "CREATED");
            for row in &rows {
                let bundle = row.bundle.display();
                println!(
                    "{:<24} {:<10} {:<10} {:<40} {:<32} {}",
                    row.id, row.pid, row.status, bundle, row.created, row.owner
                );
            }
        }
        other => bail!("--format: {other:?} is not table or json"),
    }
    Ok(0)
}

pub(crate) fn ps(context: &Context) -> Result<i32> {
    let mut words = context.words.clone();
    let mut format = context.flags.value("format").unwrap_or("table").to_string();
    if let Some(at) = words.iter().position(|word| ["-f", "--format", "-format"].contains(&word.as_str())) {
        // Behind the id, as people type it.
        if let Some(value) = words.get(at + 1).filter(|value| ["json", "table"].contains(&value.as_str())) {
            format = value.clone();
            words.drain(at..at + 2);
        }
    }
    let (_, state) = context.container()?;
    let pids = state.need_cgroup()?.processes()?;
    if format == "json" {
        println!("{}", json!(pids));
        return Ok(0);
    }
    let options = if words.len() > 1 { words[1..].to_vec() } else { vec!["-ef".to_string()] };
    let output = std::process::Command::new("ps").args(&options).output().context("cannot run ps")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    let column = header
        .split_whitespace()
        .position(|title| title == "PID")
        .context("ps shows no PID column with these options")?;
    println!("{header}");
    for line in lines {
        let pid = line.split_whitespace().nth(column).and_then(|text| text.parse::<i32>().ok());
        if pid.is_some_and(|pid| pids.contains(&pid)) {
            println!("{line}");
        }
    }
    Ok(0)
}

fn usage(stats: &cgroup::Stats) -> Value {
    const NANOSECONDS: u64 = 1_000;
    let cpu = |key: &str| stats.cpu.get(key).copied().unwrap_or(0);
    let entry = |usage: Option<u64>, max: Option<u64>, limit: Option<u64>| {
        json!({"usage": usage.unwrap_or(0), "max": max.unwrap_or(0), "limit": limit.unwrap_or(u64::MAX),
               "failcnt": stats.memory_events.get("max").copied().unwrap_or(0)})
    };
    let pressure = |pressure: &Option<cgroup::Pressure>| {
        pressure.map(|pressure| {
            let part = |averages: [f64; 3], total: u64| {
                json!({"avg10": averages[0], "avg60": averages[1], "avg300": averages[2], "total": total})
            };
            json!({"some": part(pressure.some, pressure.some_total_us), "full": part(pressure.full, pressure.full_total_us)})
        })
    };
    let mut io = Vec::new();
    for (device, keys) in &stats.io {
        let (major, minor) = device.split_once(':').unwrap_or((device, "0"));
        for (key, op) in [("rbytes", "Read"), ("wbytes", "Write")] {
            if let Some(value) = keys.get(key) {
                io.push(json!({"major": major.parse::<u64>().unwrap_or(0), "minor": minor.parse::<u64>().unwrap_or(0),
                               "op": op, "value": value}));
            }
        }
    }
    json!({
        "cpu": {
            "usage": {
                "total": cpu("usage_usec") * NANOSECONDS,
                "kernel": cpu("system_usec") * NANOSECONDS,
                "user": cpu("user_usec") * NANOSECONDS,
            },
            "throttling": {
                "periods": cpu("nr_periods"),
                "throttledPeriods": cpu("nr_throttled"),
                "throttledTime": cpu("throttled_usec") * NANOSECONDS,
            },
            "psi": pressure(&stats.cpu_pressure),
        },
        "memory": {
            "cache": stats.memory.get("file").copied().unwrap_or(0),
            "usage": entry(stats.memory_current, stats.memory_peak, stats.memory_max),
            "swap": entry(stats.swap_current, None, stats.swap_max),
            "raw": stats.memory,
            "psi": pressure(&stats.memory_pressure),
        },
        "pids": {"current": stats.pids_current.unwrap_or(0), "limit": stats.pids_max.unwrap_or(0)},
        "blkio": {"ioServiceBytesRecursive": io, "psi": pressure(&stats.io_pressure)},
        "hugetlb": stats.hugetlb.iter().map(|(size, (now, failed))| {
            (size.clone(), json!({"usage": now, "failcnt": failed}))
        }).collect::<serde_json::Map<_, _>>(),
    })
}

pub(crate) fn events(context: &Context) -> Result<i32> {
    let (folder, state) = context.container()?;
    if state.status(&folder) == Status::Stopped {
        bail!("container {:?} is not running", state.id);
    }
    let group = state.need_cgroup()?;
    let usage = |group: &coracle_runtime::Cgroup| {
        let mut usage = usage(&group.stats());
        if let Some(resctrl) = &state.resctrl {
            let (schemata, counted) = resctrl.usage();
            let line = |start: &str| schemata.iter().find(|line| line.starts_with(start));
            let all = |keys: &[&str]| -> Value {
                counted
                    .values()
                    .map(|counts| {
                        keys.iter().map(|key| ((*key).to_string(), json!(counts.get(*key)))).collect::<Value>()
                    })
                    .collect()
            };
            usage["intel_rdt"] = json!({
                "l3_cache_schema": line("L3:"),
                "mem_bw_schema": line("MB:"),
                "mbm_stats": all(&["mbm_total_bytes", "mbm_local_bytes"]),
                "cmt_stats": all(&["llc_occupancy"]),
            });
        }
        usage
    };
    let show = |kind: &str, data: Value| {
        let data = if data.is_null() { String::new() } else { format!(",\"data\":{data}") };
        println!("{{\"type\":{kind:?},\"id\":{}{data}}}", json!(state.id));
    };
    if context.flags.has("stats") {
        show("stats", usage(&group));
        return Ok(0);
    }
    let interval = duration(context.flags.value("interval").unwrap_or("5s"))?;
    let mut kills = group.oom_kills();
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).context("cannot watch for events")?;
    if kills.is_some() {
        let file = group.folder().join("memory.events");
        watch.add_watch(&file, AddWatchFlags::IN_MODIFY).with_context(|| format!("cannot watch {}", file.display()))?;
    }
    let mut next = Instant::now() + interval;
    while let Some(pidfd) = state.pidfd() {
        let left = next.saturating_duration_since(Instant::now()).as_millis() + 1;
        let mut polled = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN), PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => other.context("cannot wait for events")?,
        };
        if polled[1].any() == Some(true) {
            // What changed is looked up; the events themselves say no more.
            while watch.read_events().is_ok_and(|events| !events.is_empty()) {}
        }
        let ended = polled[0].any() == Some(true);
        let now = group.oom_kills();
        if now > kills {
            show("oom", Value::Null);
        }
        kills = now;
        if ended {
            break;
        }
        if Instant::now() >= next {
            show("stats", usage(&group));
            next = Instant::now() + interval;
        }
    }
    Ok(0)
}

/// A duration as Go writes it: `5s`, `100ms`, `1m`.
fn duration(text: &str) -> Result<Duration> {
    let split = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor_ms = match unit {
        "ms" => 1,
        "s" | "" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => bail!("--interval: {text:?} is not a duration like 5s"),
    };
    let number: u64 = number.parse().with_context(|| format!("--interval: {text:?} is not a duration like 5s"))?;
    if number == 0 {
        bail!("--interval must be more than nothing");
    }
    Ok(Duration::from_millis(number.saturating_mul(factor_ms)))
}
