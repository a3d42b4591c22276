//! The two things that a runtime does to network interfaces: bring `lo` up, and know an interface's number.

use crate::{Result, check, own};
use std::ffi::CStr;
use std::os::fd::{AsRawFd, OwnedFd};

fn request(name: &CStr) -> Result<libc::ifreq> {
    // SAFETY: ifreq is plain data for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let bytes = name.to_bytes();
    if bytes.len() >= request.ifr_name.len() {
        return Err(crate::Errno::ENAMETOOLONG);
    }
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok(request)
}

fn socket() -> Result<OwnedFd> {
    // SAFETY: takes integers only.
    own(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) }.into())
}

/// Brings an interface of the calling thread's network namespace up.
pub fn bring_up(name: &CStr) -> Result<()> {
    let socket = socket()?;
    let mut request = request(name)?;
    // SAFETY: both calls read and write one ifreq; the flags member is valid after SIOCGIFFLAGS.
    unsafe {
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request).into())?;
        request.ifr_ifru.ifru_flags |= (libc::IFF_UP | libc::IFF_RUNNING) as i16;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request).into())?;
    }
    Ok(())
}

/// The number of an interface of the calling thread's network namespace.
pub fn index(name: &CStr) -> Result<i32> {
    let socket = socket()?;
    let mut request = request(name)?;
    // SAFETY: reads and writes one ifreq; the index member is valid afterwards.
    unsafe {
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFINDEX, &raw mut request).into())?;
        Ok(request.ifr_ifru.ifru_ifindex)
    }
}
