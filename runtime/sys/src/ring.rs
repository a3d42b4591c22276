//! One io_uring that waits for file descriptors to become ready.
//!
//! Only polls are ever queued: no operation refers to memory of the caller, so the interface is safe whatever the caller does
//! with its descriptors afterwards (a closed one completes with `EBADF` or not at all). The ring is created disabled, restricted
//! to the operations used here, then enabled (`io_uring_register(2)`, `IORING_REGISTER_RESTRICTIONS`).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};

/// Submissions held before the kernel is told.
const SUBMISSIONS: u32 = 256;
/// Completions the kernel holds without its overflow list.
const COMPLETIONS: u32 = 2048;
/// Token of the ring's own operations, whose completions nobody waits for.
const INTERNAL: u64 = u64::MAX;

/// What to wait for; the bits of `poll(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest(u32);

impl Interest {
    /// There is something to read, or the other side has hung up.
    pub const READ: Self = Self(libc::POLLIN as u32);
    /// There is room to write.
    pub const WRITE: Self = Self(libc::POLLOUT as u32);
    /// An exceptional condition: a changed kernel file such as `memory.events`.
    pub const PRIORITY: Self = Self(libc::POLLPRI as u32);
}

/// One completed poll.
#[derive(Clone, Copy, Debug)]
pub struct Ready {
    /// The token given to [`Ring::poll`].
    pub token: u64,
    /// Whether there is something to read.
    pub readable: bool,
    /// Whether there is room to write.
    pub writable: bool,
    /// Whether the other side has hung up (data may be left).
    pub hung_up: bool,
    /// The errno of a poll that failed, e.g. `ECANCELED`.
    pub error: Option<i32>,
    /// Whether the poll goes on; if not, it must be queued again.
    pub armed: bool,
}

/// The ring.
pub struct Ring {
    inner: IoUring,
}

impl Ring {
    /// Creates, restricts and enables a ring.
    ///
    /// # Errors
    /// `EPERM` where `kernel.io_uring_disabled` forbids rings, `ENOSYS` where the kernel has none.
    pub fn new() -> io::Result<Self> {
        let inner = IoUring::builder()
            .dontfork()
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_cqsize(COMPLETIONS)
            .build(SUBMISSIONS)?;
        inner.submitter().register_restrictions(&mut [
            Restriction::sqe_op(opcode::PollAdd::CODE),
            Restriction::sqe_op(opcode::PollRemove::CODE),
            Restriction::register_op(libc_register_enable()),
        ])?;
        inner.submitter().register_enable_rings()?;
        Ok(Self { inner })
    }

    /// Waits for `interest` on `fd`, again and again until [`Self::cancel`] or an error; each change is reported once
    /// (edge-triggered), so the caller takes all there is or remembers that it did not.
    ///
    /// # Errors
    /// Those of `io_uring_enter(2)`.
    pub fn poll(&mut self, fd: BorrowedFd<'_>, interest: Interest, token: u64) -> io::Result<()> {
        debug_assert_ne!(token, INTERNAL);
        self.push(&opcode::PollAdd::new(Fd(fd.as_raw_fd()), interest.0).multi(true).build().user_data(token))
    }

    /// The same, reported once only.
    ///
    /// # Errors
    /// Those of `io_uring_enter(2)`.
    pub fn poll_once(&mut self, fd: BorrowedFd<'_>, interest: Interest, token: u64) -> io::Result<()> {
        debug_assert_ne!(token, INTERNAL);
        self.push(&opcode::PollAdd::new(Fd(fd.as_raw_fd()), interest.0).build().user_data(token))
    }

    /// Ends the poll of this token. A completion with `ECANCELED` follows if it was still armed. Must be called before the
    /// descriptor is closed: a poll keeps its file alive.
    ///
    /// # Errors
    /// Those of `io_uring_enter(2)`.
    pub fn cancel(&mut self, token: u64) -> io::Result<()> {
        self.push(&opcode::PollRemove::new(token).build().user_data(INTERNAL))
    }

    /// Submits what is queued, waits until something completes or `timeout` passes, and appends the completions to `ready`.
    ///
    /// # Errors
    /// Those of `io_uring_enter(2)`, except `EINTR` and `ETIME`.
    pub fn wait(&mut self, timeout: Option<Duration>, ready: &mut Vec<Ready>) -> io::Result<()> {
        let result = if !self.inner.completion().is_empty() {
            self.inner.submit().map(drop)
        } else if let Some(timeout) = timeout {
            let time = Timespec::from(timeout);
            self.inner.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&time)).map(drop)
        } else {
            self.inner.submit_and_wait(1).map(drop)
        };
        match result {
            Err(error) if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::ETIME | libc::EBUSY)) => {
                return Err(error);
            }
            _ => {}
        }
        for entry in self.inner.completion() {
            if entry.user_data() == INTERNAL {
                continue;
            }
            let result = entry.result();
            let bits = if result < 0 { 0 } else { result };
            ready.push(Ready {
                token: entry.user_data(),
                readable: bits & i32::from(libc::POLLIN | libc::POLLPRI) != 0,
                writable: bits & i32::from(libc::POLLOUT) != 0,
                hung_up: bits & i32::from(libc::POLLHUP | libc::POLLERR) != 0,
                error: (result < 0).then_some(-result),
                armed: io_uring::cqueue::more(entry.flags()),
            });
        }
        Ok(())
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: only PollAdd and PollRemove are pushed; neither refers to memory of this process, so nothing has to
            // outlive the operation. The kernel takes its own reference to the file.
            if unsafe { self.inner.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.inner.submit()?;
        }
    }
}

/// `IORING_REGISTER_ENABLE_RINGS`, the one registration still allowed.
const fn libc_register_enable() -> u8 {
    12
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_pipe_is_reported_at_each_write_and_at_the_end() {
        let (mut reader, mut writer) = io::pipe().expect("pipe");
        let mut ring = Ring::new().expect("ring");
        ring.poll(reader.as_fd(), Interest::READ, 7).expect("poll");
        let mut ready = Vec::new();
        ring.wait(Some(Duration::ZERO), &mut ready).expect("wait");
        assert!(ready.is_empty());
        for _ in 0..2 {
            // Twice without reading in between: an edge each time.
            writer.write_all(b"x").expect("write");
            ring.wait(Some(Duration::from_secs(5)), &mut ready).expect("wait");
            let event = ready.pop().expect("an event");
            assert!(event.token == 7 && event.readable && event.armed, "{event:?}");
        }
        let mut two = [0; 2];
        reader.read_exact(&mut two).expect("read");
        drop(writer);
        ring.wait(Some(Duration::from_secs(5)), &mut ready).expect("wait");
        assert!(ready.pop().expect("an event").hung_up);
    }

    #[test]
    fn polls_that_complete_together_beyond_the_rings_room_are_all_told_and_end_unarmed() {
        let (reader, mut writer) = io::pipe().expect("pipe");
        let mut ring = Ring::new().expect("ring");
        let polls = u64::from(COMPLETIONS) + 100;
        for token in 0..polls {
            ring.poll(reader.as_fd(), Interest::READ, token).expect("poll");
        }
        let mut ready = Vec::new();
        ring.wait(Some(Duration::ZERO), &mut ready).expect("wait");
        assert!(ready.is_empty());
        writer.write_all(b"x").expect("write");
        while (ready.len() as u64) < polls {
            let before = ready.len();
            ring.wait(Some(Duration::from_secs(5)), &mut ready).expect("wait");
            assert!(ready.len() > before, "{before} of {polls} were told");
        }
        assert!(ready.iter().any(|event| !event.armed && event.error.is_none()), "whoever polls must arm again");
    }

    #[test]
    fn a_cancelled_poll_ends() {
        let (reader, _writer) = io::pipe().expect("pipe");
        let mut ring = Ring::new().expect("ring");
        ring.poll(reader.as_fd(), Interest::READ, 7).expect("poll");
        ring.cancel(7).expect("cancel");
        let mut ready = Vec::new();
        ring.wait(Some(Duration::from_secs(5)), &mut ready).expect("wait");
        assert_eq!(ready.pop().expect("an event").error, Some(libc::ECANCELED));
    }
}
