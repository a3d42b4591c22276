//! A host of our own on this one: private mounts, a private network, and cgroup v2 alone whatever the host mounts.

use std::process::Command;

use anyhow::{Context, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// Where cgroups are mounted.
pub(crate) const CGROUPS: &str = "/sys/fs/cgroup";

/// Moves this process there. To be called before any thread starts: threads that run stay behind.
pub(crate) fn enter() -> anyhow::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).context("make namespaces: run as root")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .context("make mounts private")?;
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    let targets = mounts.lines().rev().filter_map(|line| line.split(' ').nth(1));
    for target in targets.filter(|target| target.starts_with(CGROUPS)) {
        umount2(target, MntFlags::MNT_DETACH).with_context(|| format!("unmount {target}"))?;
    }
    mount(Some("none"), CGROUPS, Some("cgroup2"), MsFlags::empty(), None::<&str>).context("mount cgroup2")?;
    let status =
        Command::new("ip").args(["link", "set", "lo", "up"]).status().context("start ip (Debian: iproute2)")?;
    ensure!(status.success(), "ip link set lo up: {status}");
    Ok(())
}
