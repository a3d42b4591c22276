//! Pseudo terminals.

use crate::{Result, check, own};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// Unlocks the other side of a pty whose master was just opened.
pub fn unlock(master: BorrowedFd<'_>) -> Result<()> {
    let unlocked: i32 = 0;
    // SAFETY: TIOCSPTLCK reads one int.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) }.into())?;
    Ok(())
}

/// Opens the other side of a pty through its master: no path is looked up, so none can be redirected.
pub fn peer(master: BorrowedFd<'_>) -> Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags and returns a new descriptor.
    own(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) }.into())
}

/// Lets what is printed end its lines as it does, without a carriage return put before.
pub fn keep_line_ends(terminal: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: termios is plain data for which all zeroes is valid.
    let mut modes: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: both take a terminal and a termios, which outlives the calls.
    unsafe {
        check(libc::tcgetattr(terminal.as_raw_fd(), &raw mut modes).into())?;
        modes.c_oflag &= !libc::ONLCR;
        check(libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, &raw const modes).into())?;
    }
    Ok(())
}

/// Makes a terminal the controlling one of this session.
pub fn set_controlling(terminal: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: takes an integer only.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) }.into())?;
    Ok(())
}

/// Rows and columns of a terminal.
pub fn set_size(terminal: BorrowedFd<'_>, rows: u16, columns: u16) -> Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }.into())?;
    Ok(())
}

/// Rows and columns of a terminal, as it says itself.
pub fn size(terminal: BorrowedFd<'_>) -> Result<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) }.into())?;
    Ok((size.ws_row, size.ws_col))
}
