//! Where a container's terminal and exit status go: to a console socket, or to the terminal that `corun` runs in.

use anyhow::{Context as _, Result};
use coracle_runtime::{Exit, Init};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

const COPY_BYTES: usize = 16 * 1024;

/// Sends the master side of a terminal to whoever listens on a socket.
pub(crate) fn hand_over(socket: &Path, master: &OwnedFd) -> Result<()> {
    let stream = UnixStream::connect(socket)
        .with_context(|| format!("cannot connect to console socket {}", socket.display()))?;
    coracle_sys::channel::send(stream.as_fd(), b"terminal", Some(master.as_fd()))
        .with_context(|| format!("cannot send the terminal to {}", socket.display()))
}

/// Sends a pidfd to whoever listens on a socket.
pub(crate) fn hand_over_pidfd(socket: &Path, init: &Init) -> Result<()> {
    let stream =
        UnixStream::connect(socket).with_context(|| format!("cannot connect to pidfd socket {}", socket.display()))?;
    coracle_sys::channel::send(stream.as_fd(), b"pidfd", Some(init.pidfd()))
        .with_context(|| format!("cannot send the pidfd to {}", socket.display()))
}

/// All signals of this process as a descriptor; blocked before the container starts so that none is lost.
pub(crate) fn take_signals() -> Result<SignalFd> {
    let all = SigSet::all();
    all.thread_block().context("cannot block signals")?;
    SignalFd::with_flags(&all, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context("cannot read signals")
}

/// The user's terminal in raw mode; restored when dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> Option<Self> {
        let stdin = coracle_sys::process::borrow_standard(0);
        let saved = tcgetattr(stdin).ok()?;
        let mut raw = saved.clone();
        cfmakeraw(&mut raw);
        // The container's terminal leaves line ends to this one.
        raw.output_flags.insert(OutputFlags::OPOST);
        tcsetattr(stdin, SetArg::TCSANOW, &raw).ok()?;
        Some(Self(saved))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // The terminal may have gone away together with its user.
        let _ = tcsetattr(coracle_sys::process::borrow_standard(0), SetArg::TCSANOW, &self.0);
    }
}

fn resize(master: &OwnedFd) {
    if let Ok((rows, columns)) = coracle_sys::tty::size(coracle_sys::process::borrow_standard(0)) {
        // A terminal that has just closed needs no size.
        let _ = coracle_sys::tty::set_size(master.as_fd(), rows, columns);
    }
}

/// Waits for the end of a process, passing signals on to it and, with a terminal, what is typed and printed.
pub(crate) fn attend(init: &mut Init, signals: &SignalFd, master: Option<OwnedFd>) -> Result<Exit> {
    let raw = master.as_ref().and_then(|_| Raw::enter());
    if let (Some(master), Some(_)) = (&master, &raw) {
        resize(master);
    }
    let mut input_open = master.is_some();
    let mut output_open = master.is_some();
    loop {
        let stdin = coracle_sys::process::borrow_standard(0);
        let mut polled =
            vec![PollFd::new(init.pidfd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if let Some(master) = &master {
            polled.push(PollFd::new(master.as_fd(), if output_open { PollFlags::POLLIN } else { PollFlags::empty() }));
            polled.push(PollFd::new(stdin, if input_open { PollFlags::POLLIN } else { PollFlags::empty() }));
        }
        match poll(&mut polled, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => other.context("cannot wait for the container")?,
        };
        let ready: Vec<bool> = polled.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty())).collect();
        drop(polled);
        if ready[1] {
            while let Ok(Some(info)) = signals.read_signal() {
                pass_on(init, info.ssi_signo as i32, master.as_ref());
            }
        }
        if let Some(master) = &master {
            if output_open && ready[2] {
                output_open = copy(master.as_fd(), coracle_sys::process::borrow_standard(1));
            }
            if input_open && ready[3] {
                input_open = copy(stdin, master.as_fd());
            }
        }
        if ready[0] {
            // What the program printed last is still in the terminal.
            while output_open
                && master.as_ref().is_some_and(|master| {
                    coracle_runtime::wait_readable(master.as_fd(), Some(std::time::Duration::ZERO)).unwrap_or(false)
                })
            {
                output_open = master
                    .as_ref()
                    .is_some_and(|master| copy(master.as_fd(), coracle_sys::process::borrow_standard(1)));
            }
            return Ok(init.wait()?);
        }
    }
}

fn pass_on(init: &Init, signal: i32, master: Option<&OwnedFd>) {
    const OURS: [Signal; 2] = [Signal::SIGCHLD, Signal::SIGURG];
    if OURS.iter().any(|ours| *ours as i32 == signal) {
        return;
    }
    if signal == Signal::SIGWINCH as i32 {
        if let Some(master) = master {
            resize(master);
        }
        return;
    }
    // Gone between the signal and now: its end is seen next.
    let _ = init.signal(signal);
}

/// Copies what is there; false at the end.
fn copy(from: std::os::fd::BorrowedFd<'_>, to: std::os::fd::BorrowedFd<'_>) -> bool {
    let mut buffer = [0; COPY_BYTES];
    let Ok(length) = coracle_sys::path::read(from, &mut buffer) else { return false };
    let mut rest = &buffer[..length];
    while !rest.is_empty() {
        match coracle_sys::path::write(to, rest) {
            Ok(written) => rest = &rest[written..],
            Err(coracle_sys::Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
    length > 0
}
