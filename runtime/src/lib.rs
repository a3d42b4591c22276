//! An OCI runtime as a library: from a specification (runtime-spec 1.3) to a running container.
//!
//! [`Plan::compile`] turns a specification into a list of steps and checks all that can be checked without touching the
//! system. [`spawn`] clones the container's first process as a child of the caller; [`Init`] follows it through its
//! set-up to the running program without blocking. [`exec`] adds processes to a container. [`Cgroup`] limits, measures,
//! freezes and kills. Files are kept for the `corun` command only ([`state`]).
#![forbid(unsafe_code)]

pub mod capability;
pub mod cgroup;
mod child;
pub mod device;
mod error;
pub mod exec;
pub mod features;
pub mod fuzz;
pub mod hooks;
mod idmap;
mod net_device;
mod plan;
pub mod resctrl;
mod resolve;
pub mod sealed;
pub mod seccomp;
mod spawn;
pub mod spec;
pub mod state;
pub mod systemd;
mod usher;

pub use cgroup::Cgroup;
pub use coracle_sys::process::Exit;
pub use error::{Error, Result, Step};
pub use plan::{Gate, Options, Plan};
pub use spawn::{Given, Init, Stage, Stdio, spawn, spawn_gated, start_waiting};

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// Waits until a descriptor is readable; false when the limit passed.
pub fn wait_readable(fd: BorrowedFd<'_>, limit: Option<Duration>) -> std::io::Result<bool> {
    wait_for(fd, nix::poll::PollFlags::POLLIN, limit)
}

pub(crate) fn wait_for(
    fd: BorrowedFd<'_>,
    flags: nix::poll::PollFlags,
    limit: Option<Duration>,
) -> std::io::Result<bool> {
    use nix::poll::{PollFd, PollTimeout, poll};
    let end = limit.map(|limit| Instant::now() + limit);
    loop {
        let timeout = match end {
            None => PollTimeout::NONE,
            Some(end) => {
                let left = end.saturating_duration_since(Instant::now()).as_millis() + 1;
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
        };
        match poll(&mut [PollFd::new(fd, flags)], timeout) {
            Ok(0) if end.is_some_and(|end| Instant::now() >= end) => return Ok(false),
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno.into()),
        }
    }
}
