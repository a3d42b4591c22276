//! `update`: new limits for a container, from flags or from a file of resources.

use crate::Context;
use anyhow::{Context as _, Result, bail};
use coracle_runtime::state::Status;
use coracle_runtime::{Cgroup, device, spec};
use oci_spec::runtime::LinuxResources;
use serde_json::{Value, json};
use std::path::Path;

/// Flags with numbers, and where the specification has them.
const NUMBERS: [(&str, &str, &str); 12] = [
    ("blkio-weight", "blockIO", "weight"),
    ("cpu-period", "cpu", "period"),
    ("cpu-quota", "cpu", "quota"),
    ("cpu-burst", "cpu", "burst"),
    ("cpu-share", "cpu", "shares"),
    ("cpu-rt-period", "cpu", "realtimePeriod"),
    ("cpu-rt-runtime", "cpu", "realtimeRuntime"),
    ("cpu-idle", "cpu", "idle"),
    ("memory", "memory", "limit"),
    ("memory-reservation", "memory", "reservation"),
    ("memory-swap", "memory", "swap"),
    ("pids-limit", "pids", "limit"),
];
const TEXTS: [(&str, &str, &str); 2] = [("cpuset-cpus", "cpu", "cpus"), ("cpuset-mems", "cpu", "mems")];

/// A number of bytes, possibly with k, m, g or t behind it.
fn amount(text: &str) -> Result<i64> {
    let lower = text.to_ascii_lowercase();
    let bare = lower.trim_end_matches('b');
    let (digits, shift) = match bare.chars().last() {
        Some('k') => (&bare[..bare.len() - 1], 10),
        Some('m') => (&bare[..bare.len() - 1], 20),
        Some('g') => (&bare[..bare.len() - 1], 30),
        Some('t') => (&bare[..bare.len() - 1], 40),
        _ => (bare, 0),
    };
    let number: i64 = digits.parse().with_context(|| format!("{text:?} is not an amount"))?;
    number.checked_mul(1 << shift).with_context(|| format!("{text:?} is too much"))
}

fn resources(context: &Context) -> Result<LinuxResources> {
    if let Some(path) = context.flags.value("resources") {
        let path = Path::new(if path == "-" { "/dev/stdin" } else { path });
        return Ok(spec::parse(path, &spec::read_bounded(path)?)?);
    }
    let mut document = json!({});
    for (flag, group, field) in NUMBERS {
        if let Some(text) = context.flags.value(flag) {
            document[group][field] = amount(text).with_context(|| format!("--{flag}"))?.into();
        }
    }
    for (flag, group, field) in TEXTS {
        if let Some(text) = context.flags.value(flag) {
            document[group][field] = Value::from(text);
        }
    }
    if document.as_object().is_some_and(serde_json::Map::is_empty) {
        bail!("nothing to change: give a limit or --resources FILE");
    }
    Ok(serde_json::from_value(document)?)
}

pub(crate) fn update(context: &Context) -> Result<i32> {
    let (folder, state) = context.container()?;
    if state.status(&folder) == Status::Stopped {
        bail!("container {:?} is not running", state.id);
    }
    let resources = resources(context)?;
    let cgroup = Cgroup::open(&state.cgroup)?;
    cgroup.set(&resources)?;
    if let Some(rules) = resources.devices().as_deref().filter(|rules| !rules.is_empty()) {
        cgroup.replace_devices(&device::rules(rules)?)?;
    }
    Ok(0)
}
