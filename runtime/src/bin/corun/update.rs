//! `update`: new limits for a container, from flags or from a file of resources.

use crate::Context;
use anyhow::{Context as _, Result, bail};
use coracle_runtime::state::Status;
use coracle_runtime::{device, spec, systemd};
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

/// Flags with lines for the schemata of Intel RDT.
const SCHEMATA: [&str; 2] = ["l3-cache-schema", "mem-bw-schema"];

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

/// What changes, in the shape of the specification's resources.
fn changes(context: &Context) -> Result<Value> {
    if let Some(path) = context.flags.value("resources") {
        let path = Path::new(if path == "-" { "/proc/self/fd/0" } else { path });
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
    if document.as_object().is_some_and(serde_json::Map::is_empty)
        && !SCHEMATA.iter().any(|flag| context.flags.value(flag).is_some())
    {
        bail!("nothing to change: give a limit or --resources FILE");
    }
    Ok(document)
}

/// Lays `changes` over `known`, member by member. A zero or an empty text stands for "as before", as with runc.
fn lay_over(known: &mut Value, changes: &Value) {
    let (Value::Object(known), Value::Object(changes)) = (&mut *known, changes) else {
        if !matches!(changes, Value::Null) && changes != &json!(0) && changes != &json!("") {
            *known = changes.clone();
        }
        return;
    };
    for (key, change) in changes {
        lay_over(known.entry(key).or_insert(Value::Null), change);
    }
}

pub(crate) fn update(context: &Context) -> Result<i32> {
    let (folder, state) = context.container()?;
    if state.status(&folder) == Status::Stopped {
        bail!("container {:?} is not running", state.id);
    }
    let changes = changes(context)?;
    // Refused before anything is touched when it is not of the right shape.
    let _: LinuxResources = serde_json::from_value(changes.clone()).context("the resources")?;
    for flag in SCHEMATA {
        if let Some(line) = context.flags.value(flag) {
            let group = state.resctrl.as_ref();
            group.with_context(|| format!("--{flag}: the container asked for no group of Intel RDT"))?.limit(line)?;
        }
    }
    if changes.as_object().is_some_and(serde_json::Map::is_empty) {
        return Ok(0);
    }
    let mut document: Value = folder.load_json()?;
    let known = &mut document["linux"]["resources"];
    if known.is_null() {
        *known = json!({});
    }
    // A zero says "idle no more" there.
    let idle = changes["cpu"]["idle"].clone();
    lay_over(known, &changes);
    if !idle.is_null() {
        known["cpu"]["idle"] = idle;
    }
    // Limits that hang together (quota and period, memory and swap) are written together; groups that nothing is said
    // about stay as they are.
    let mut touched = known.clone();
    if let (Some(touched), Some(changes)) = (touched.as_object_mut(), changes.as_object()) {
        touched.retain(|group, _| changes.contains_key(group));
    }
    let resources: LinuxResources = serde_json::from_value(touched)?;
    let cgroup = state.need_cgroup()?;
    if let Some(unit) = &state.unit {
        systemd::set(unit, &resources)?;
    }
    cgroup.set(&resources)?;
    if let Some(rules) = resources.devices().as_deref().filter(|rules| !rules.is_empty()) {
        cgroup.replace_devices(&device::rules(rules)?)?;
    }
    folder.save_json(&document)?;
    Ok(0)
}
