//! The supervisor: one small single-threaded process per node that is the parent of every container.
//!
//! It clones containers (so clone never happens in a threaded process), holds their pipes, writes their logs in CRI format, sees
//! their exits. It keeps nothing but what the kernel would take away with it; the daemon holds duplicates of every descriptor
//! and hands them to the next supervisor if this one dies, and the other way round.

pub mod client;
pub mod container;
pub mod frame;
pub mod journal;
pub mod link;
pub mod logfile;
pub mod protocol;
pub mod serve;
pub mod stream;

pub use client::Client;

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{SigSet, Signal};

/// What the supervisor prints when its socket can be connected to.
pub const READY_LINE: &str = "ready";

/// Why the supervisor ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its arguments are wrong.
    #[error("usage: supervisor SOCKET")]
    Usage,
    /// A system call failed.
    #[error("{step} {}: {source}", path.display())]
    Io {
        /// What was being done.
        step: &'static str,
        /// With what.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
}

/// Whether this kernel has the io_uring operations that a supervisor needs.
///
/// # Errors
/// Why a ring cannot be made.
pub fn probe() -> io::Result<()> {
    coracle_sys::ring::Ring::new().map(drop)
}

/// Runs the supervisor; `arguments` is the path of its socket, below a folder that exists.
///
/// # Errors
/// When it cannot start, or its ring fails.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> Result<(), Error> {
    let mut arguments = arguments.into_iter();
    let (Some(socket), None) = (arguments.next(), arguments.next()) else { return Err(Error::Usage) };
    let socket = PathBuf::from(socket);
    let error = |step: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| Error::Io { step, path, source }
    };
    // Held until the process ends, however it ends; a predecessor that is just dying is waited for.
    let lock_path = socket.with_extension("lock");
    let lock = fs::File::create(&lock_path).map_err(error("create", &lock_path))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| error("lock", &lock_path)(e.into()))?;
    // Containers outlive the daemon's terminal and whoever signals the daemon's group.
    if let Err(errno) = coracle_sys::namespace::setsid() {
        tracing::debug!(%errno, "already leads a session");
    }
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGPIPE] {
        signals.add(signal);
    }
    signals.thread_block().map_err(|e| error("block signals for", &socket)(e.into()))?;
    let supervisor = serve::Supervisor::new(&socket).map_err(error("listen at", &socket))?;
    // Whoever started us waits for this line before connecting.
    writeln!(io::stdout(), "{READY_LINE}").map_err(error("tell readiness of", &socket))?;
    supervisor.run().map_err(error("serve", &socket))
}
