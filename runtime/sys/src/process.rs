//! Making, replacing, signalling and awaiting processes: `clone3`, `execve`, pidfds, `waitid`.

use crate::{Result, check, own};
use std::ffi::{CStr, CString, c_char};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

pub const CLONE_NEWTIME: u64 = 0x80;
pub const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const P_PIDFD: libc::c_uint = 3;

/// What [`clone3`] makes beside the process itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct CloneRequest<'fd> {
    /// `CLONE_NEW*` and other flags; `CLONE_PIDFD` and `CLONE_INTO_CGROUP` are added by [`clone3`].
    pub flags: u64,
    /// Directory of the cgroup (v2) in which the child begins its life.
    pub cgroup: Option<BorrowedFd<'fd>>,
}

/// A child process: its id here and a descriptor that no reuse of the id can redirect.
#[derive(Debug)]
pub struct Child {
    pub pid: i32,
    pub pidfd: OwnedFd,
}

/// Never returns control to the caller's frames in a cloned process, not even by a panic.
struct ExitGuard;

impl Drop for ExitGuard {
    fn drop(&mut self) {
        exit_now(127)
    }
}

/// Clones the calling process; `child` runs in the copy and its return value becomes the exit status.
///
/// The copy has only the calling thread. When other threads exist, `child` must not allocate or take locks; all
/// wrappers of this crate keep to that.
pub fn clone3(request: CloneRequest<'_>, child: impl FnOnce() -> i32) -> Result<Child> {
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain data for which all zeroes is valid.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = request.flags | libc::CLONE_PIDFD as u64;
    args.pidfd = &raw mut pidfd as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = request.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM the child gets its own copy of this address space and stack, as fork(2) gives; args and
    // pidfd outlive the call.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) })?;
    if pid == 0 {
        let _guard = ExitGuard;
        let status = child();
        exit_now(status);
    }
    // SAFETY: CLONE_PIDFD made the kernel store a fresh descriptor there.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Child { pid: pid as i32, pidfd })
}

/// Clones a process whose parent is the caller's parent and returns its id; `child` as in [`clone3`].
///
/// Used by the short-lived usher that has joined a user namespace: the process it makes must be the runtime's child.
pub fn clone3_sibling(request: CloneRequest<'_>, child: impl FnOnce() -> i32) -> Result<i32> {
    let with_parent = CloneRequest { flags: request.flags | libc::CLONE_PARENT as u64, ..request };
    // SAFETY: clone_args is plain data for which all zeroes is valid.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = with_parent.flags;
    if let Some(cgroup) = request.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: as in clone3; CLONE_PARENT takes the exit signal from the caller's own, so exit_signal stays zero.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) })?;
    if pid == 0 {
        let _guard = ExitGuard;
        let status = child();
        exit_now(status);
    }
    Ok(pid as i32)
}

/// Ends the process at once: no destructors, no handlers, no buffers.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: _exit(2) has no preconditions and does not return.
    unsafe { libc::_exit(status) }
}

/// A null-terminated array of C strings in the form in which `execve` takes it, built before the clone.
#[derive(Debug)]
pub struct StringArray {
    strings: Vec<CString>,
    pointers: Vec<*const c_char>,
}

// SAFETY: the pointers point into heap buffers of `strings`, which are never changed after construction.
unsafe impl Send for StringArray {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for StringArray {}

impl StringArray {
    pub fn new(strings: Vec<CString>) -> Self {
        let pointers = strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect();
        Self { strings, pointers }
    }

    pub fn strings(&self) -> &[CString] {
        &self.strings
    }

    /// Runs `work` with the string at `index` replaced, which costs no memory.
    pub fn with_replaced<T>(&mut self, index: usize, string: &CStr, work: impl FnOnce(&Self) -> T) -> T {
        let original = std::mem::replace(&mut self.pointers[index], string.as_ptr());
        let answer = work(self);
        self.pointers[index] = original;
        answer
    }
}

impl Clone for StringArray {
    fn clone(&self) -> Self {
        Self::new(self.strings.clone())
    }
}

/// Replaces the program; returns only to report why it could not.
pub fn execve(path: &CStr, arguments: &StringArray, environment: &StringArray) -> crate::Errno {
    // SAFETY: both arrays are null-terminated and outlive the call (StringArray's invariant).
    unsafe { libc::execve(path.as_ptr(), arguments.pointers.as_ptr(), environment.pointers.as_ptr()) };
    crate::Errno::last()
}

/// Replaces the program by the file behind a descriptor (`AT_EMPTY_PATH`).
pub fn execve_fd(file: BorrowedFd<'_>, arguments: &StringArray, environment: &StringArray) -> crate::Errno {
    // SAFETY: as in execve; the path is the empty string.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            file.as_raw_fd(),
            c"".as_ptr(),
            arguments.pointers.as_ptr(),
            environment.pointers.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    crate::Errno::last()
}

/// A descriptor for a running process (or unreaped child) by its id.
pub fn pidfd_open(pid: i32) -> Result<OwnedFd> {
    // SAFETY: takes integers only.
    own(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// Sends a signal through a pidfd.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> Result<()> {
    // SAFETY: a null siginfo asks for the same one that kill(2) makes.
    check(unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0)
    })?;
    Ok(())
}

/// Copies a descriptor out of another process.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: RawFd) -> Result<OwnedFd> {
    // SAFETY: takes integers only.
    own(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal(i32),
}

impl Exit {
    /// The shell's convention: the code, or 128 plus the signal.
    pub fn code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

/// Reaps the child behind a pidfd; with `block` false, `None` when it still runs.
pub fn wait(pidfd: BorrowedFd<'_>, block: bool) -> Result<Option<Exit>> {
    loop {
        // SAFETY: siginfo_t is plain data for which all zeroes is valid.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let options = libc::WEXITED | if block { 0 } else { libc::WNOHANG };
        // SAFETY: info outlives the call.
        let answer = unsafe { libc::waitid(P_PIDFD, pidfd.as_raw_fd() as u32, &raw mut info, options) };
        match check(answer.into()) {
            Err(crate::Errno::EINTR) => continue,
            Err(error) => return Err(error),
            Ok(_) => {}
        }
        // SAFETY: waitid has filled the SIGCHLD members (or left them zero when nothing was there to reap).
        let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
        return Ok(match (pid, info.si_code) {
            (0, _) => None,
            (_, libc::CLD_EXITED) => Some(Exit::Code(status)),
            _ => Some(Exit::Signal(status)),
        });
    }
}

/// Marks every descriptor from `first` on close-on-exec.
pub fn close_on_exec_from(first: RawFd) -> Result<()> {
    const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;
    // SAFETY: only sets a flag; descriptors stay open.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, CLOSE_RANGE_CLOEXEC) })?;
    Ok(())
}

/// Closes every descriptor from `first` on but the kept ones (negative ones are none).
pub fn close_from<const N: usize>(mut first: RawFd, mut kept: [RawFd; N]) -> Result<()> {
    kept.sort_unstable();
    for fd in kept.into_iter().chain([RawFd::MAX]).filter(|fd| *fd >= 0) {
        if first < fd {
            // SAFETY: for a fresh child, in which nobody uses the descriptors of its maker any more.
            check(unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) })?;
        }
        first = first.max(fd.saturating_add(1));
    }
    Ok(())
}

/// Makes `to` a copy of `from` that survives exec.
pub fn dup_onto(from: RawFd, to: RawFd) -> Result<()> {
    // SAFETY: the runtime uses this in a fresh child only, to place the standard streams; whatever `to` was before is
    // owned by nobody there.
    check(unsafe { libc::dup2(from, to) }.into())?;
    Ok(())
}

/// A borrowed view of a descriptor that is known to be open for as long as the process lives (the standard streams).
pub fn borrow_standard(fd: RawFd) -> BorrowedFd<'static> {
    assert!((0..=2).contains(&fd), "only 0, 1 and 2 are open for ever");
    // SAFETY: the standard streams are never closed by us.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// Takes over a descriptor that this process was given by number (socket activation, preserved descriptors).
pub fn adopt(fd: RawFd) -> Result<OwnedFd> {
    // SAFETY: F_GETFD only reads a flag.
    check(unsafe { libc::fcntl(fd, libc::F_GETFD) }.into())?;
    // SAFETY: it is open (checked above) and by contract the caller hands over ownership.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether a descriptor is closed when this process executes a program.
pub fn set_close_on_exec(fd: BorrowedFd<'_>, close: bool) -> Result<()> {
    let flags = if close { libc::FD_CLOEXEC } else { 0 };
    // SAFETY: only sets a flag.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, flags) }.into())?;
    Ok(())
}

/// The descriptor through which this program was executed ([`execve_fd`]): the kernel names it `/dev/fd/N`.
pub fn executed_descriptor() -> Option<RawFd> {
    // SAFETY: takes an integer only.
    let name = unsafe { libc::getauxval(libc::AT_EXECFN) } as *const c_char;
    if name.is_null() {
        return None;
    }
    // SAFETY: the kernel put a C string there, which stays as long as the process.
    unsafe { CStr::from_ptr(name) }.to_str().ok()?.strip_prefix("/dev/fd/")?.parse().ok()
}

/// `prctl` with integer arguments.
pub fn prctl(option: i32, a: u64, b: u64, c: u64, d: u64) -> Result<i64> {
    const TAKES_POINTER: [i32; 3] = [libc::PR_SET_MM, libc::PR_SET_NAME, libc::PR_GET_NAME];
    assert!(!TAKES_POINTER.contains(&option), "integers only");
    // SAFETY: options that take pointers are refused above.
    check(unsafe { libc::syscall(libc::SYS_prctl, option, a, b, c, d) })
}

/// Resets every signal to its default action and unblocks all.
pub fn reset_signals() -> Result<()> {
    // SAFETY: sigaction and sigset_t are plain data; SIG_DFL installs no code of ours.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = libc::SIG_DFL;
        for signal in 1..=libc::SIGRTMAX() {
            if ![libc::SIGKILL, libc::SIGSTOP].contains(&signal) {
                // The C library keeps two real-time signals to itself and answers EINVAL for them.
                libc::sigaction(signal, &raw const action, std::ptr::null_mut());
            }
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        check(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()).into())?;
    }
    Ok(())
}

/// Closes a descriptor by number: a copy that a new process got of one that belongs to its parent.
pub fn close(fd: RawFd) {
    // SAFETY: used in a fresh process only, on the copy of a descriptor that no value there owns.
    unsafe { libc::close(fd) };
}
