//! Resolving paths and working relative to descriptors.

use crate::{Result, check, own};
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

pub const RESOLVE_NO_XDEV: u64 = 0x01;
pub const RESOLVE_NO_MAGICLINKS: u64 = 0x02;
pub const RESOLVE_NO_SYMLINKS: u64 = 0x04;
pub const RESOLVE_BENEATH: u64 = 0x08;
pub const RESOLVE_IN_ROOT: u64 = 0x10;

/// `fstatfs` magic numbers, from `linux/magic.h`.
pub const PROC_SUPER_MAGIC: i64 = 0x9fa0;
pub const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;
pub const DEVPTS_SUPER_MAGIC: i64 = 0x1cd1;
pub const SYSFS_MAGIC: i64 = 0x6265_6572;
pub const TMPFS_MAGIC: i64 = 0x0102_1994;

/// How often a resolution is repeated when a rename elsewhere raced with it (`EAGAIN`).
const RESOLVE_ATTEMPTS: u32 = 128;

#[repr(C)]
struct OpenHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

/// Opens `path` relative to `folder` under the rules `resolve`; close-on-exec is always set.
pub fn openat2(folder: BorrowedFd<'_>, path: &CStr, flags: i32, mode: u32, resolve: u64) -> Result<OwnedFd> {
    let how = OpenHow { flags: (flags | libc::O_CLOEXEC) as u64, mode: u64::from(mode), resolve };
    let mut attempts = 0;
    loop {
        // SAFETY: path and how outlive the call, the size is that of the structure.
        let answer = own(unsafe {
            libc::syscall(libc::SYS_openat2, folder.as_raw_fd(), path.as_ptr(), &raw const how, size_of::<OpenHow>())
        });
        match answer {
            Err(crate::Errno::EAGAIN | crate::Errno::EINTR) if attempts < RESOLVE_ATTEMPTS => attempts += 1,
            other => return other,
        }
    }
}

/// Opens a path of this process's own mount namespace; close-on-exec is always set.
pub fn open(path: &CStr, flags: i32) -> Result<OwnedFd> {
    // SAFETY: path is a C string.
    own(unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags | libc::O_CLOEXEC, 0) })
}

/// Opens `path` relative to a folder without following a last symlink's rules other than the kernel's own.
pub fn openat(folder: BorrowedFd<'_>, path: &CStr, flags: i32, mode: u32) -> Result<OwnedFd> {
    // SAFETY: path is a C string.
    own(unsafe { libc::syscall(libc::SYS_openat, folder.as_raw_fd(), path.as_ptr(), flags | libc::O_CLOEXEC, mode) })
}

pub fn mkdirat(folder: BorrowedFd<'_>, path: &CStr, mode: u32) -> Result<()> {
    // SAFETY: path is a C string.
    check(unsafe { libc::syscall(libc::SYS_mkdirat, folder.as_raw_fd(), path.as_ptr(), mode) })?;
    Ok(())
}

pub fn mknodat(folder: BorrowedFd<'_>, path: &CStr, mode: u32, device: u64) -> Result<()> {
    // SAFETY: path is a C string.
    check(unsafe { libc::syscall(libc::SYS_mknodat, folder.as_raw_fd(), path.as_ptr(), mode, device) })?;
    Ok(())
}

pub fn symlinkat(target: &CStr, folder: BorrowedFd<'_>, path: &CStr) -> Result<()> {
    // SAFETY: both are C strings.
    check(unsafe { libc::syscall(libc::SYS_symlinkat, target.as_ptr(), folder.as_raw_fd(), path.as_ptr()) })?;
    Ok(())
}

pub fn unlinkat(folder: BorrowedFd<'_>, path: &CStr, flags: i32) -> Result<()> {
    // SAFETY: path is a C string.
    check(unsafe { libc::syscall(libc::SYS_unlinkat, folder.as_raw_fd(), path.as_ptr(), flags) })?;
    Ok(())
}

/// Owner of the entry `path` (or, when empty, of the folder itself); a last symlink is not followed.
pub fn chownat(folder: BorrowedFd<'_>, path: &CStr, uid: u32, gid: u32) -> Result<()> {
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_EMPTY_PATH;
    // SAFETY: path is a C string.
    check(unsafe { libc::syscall(libc::SYS_fchownat, folder.as_raw_fd(), path.as_ptr(), uid, gid, flags) })?;
    Ok(())
}

/// Mode of the entry `path`, which must not be a symlink that leads elsewhere (the caller has just made it).
pub fn chmodat(folder: BorrowedFd<'_>, path: &CStr, mode: u32) -> Result<()> {
    // SAFETY: path is a C string.
    check(unsafe { libc::syscall(libc::SYS_fchmodat, folder.as_raw_fd(), path.as_ptr(), mode) })?;
    Ok(())
}

/// Type, device and inode of what a descriptor (also `O_PATH`) refers to.
pub fn stat(fd: BorrowedFd<'_>) -> Result<libc::stat> {
    // SAFETY: stat is plain data for which all zeroes is valid.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: stat outlives the call.
    check(unsafe { libc::fstat(fd.as_raw_fd(), &raw mut stat) }.into())?;
    Ok(stat)
}

/// The id of the mount behind a path of this process's mount namespace.
pub fn mount_id(path: &CStr) -> Result<u64> {
    const STATX_MNT_ID: u32 = 0x1000;
    // SAFETY: statx is plain data for which all zeroes is valid.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: path is a C string and stat outlives the call.
    check(unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), 0, STATX_MNT_ID, &raw mut stat) }.into())?;
    Ok(stat.stx_mnt_id)
}

/// The magic number of the file system behind a descriptor.
pub fn filesystem_magic(fd: BorrowedFd<'_>) -> Result<i64> {
    // SAFETY: statfs is plain data for which all zeroes is valid.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: stat outlives the call.
    check(unsafe { libc::fstatfs(fd.as_raw_fd(), &raw mut stat) }.into())?;
    Ok(stat.f_type as i64)
}

pub fn fchdir(folder: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: takes an integer only.
    check(unsafe { libc::fchdir(folder.as_raw_fd()) }.into())?;
    Ok(())
}

pub fn chdir(path: &CStr) -> Result<()> {
    // SAFETY: path is a C string.
    check(unsafe { libc::chdir(path.as_ptr()) }.into())?;
    Ok(())
}

pub fn chroot(path: &CStr) -> Result<()> {
    // SAFETY: path is a C string.
    check(unsafe { libc::chroot(path.as_ptr()) }.into())?;
    Ok(())
}

/// Whether the working directory lies within the process's root; the kernel marks one that does not.
pub fn cwd_is_reachable() -> Result<bool> {
    let mut buffer = [0_u8; libc::PATH_MAX as usize];
    // SAFETY: pointer and length describe the buffer.
    let length = check(unsafe { libc::syscall(libc::SYS_getcwd, buffer.as_mut_ptr(), buffer.len()) })?;
    Ok(length > 0 && buffer[0] == b'/')
}

/// Whether this process may execute the file, by its effective identity.
pub fn is_executable(path: &CStr) -> Result<()> {
    // SAFETY: path is a C string.
    check(unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::X_OK, libc::AT_EACCESS) }.into())?;
    // SAFETY: stat is plain data for which all zeroes is valid.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: path is a C string and stat outlives the call.
    check(unsafe { libc::stat(path.as_ptr(), &raw mut stat) }.into())?;
    if stat.st_mode & libc::S_IFMT == libc::S_IFDIR {
        return Err(crate::Errno::EACCES);
    }
    Ok(())
}

pub fn write(fd: BorrowedFd<'_>, bytes: &[u8]) -> Result<usize> {
    // SAFETY: pointer and length describe the slice.
    check(unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) } as libc::c_long)
        .map(|length| length as usize)
}

pub fn read(fd: BorrowedFd<'_>, bytes: &mut [u8]) -> Result<usize> {
    // SAFETY: pointer and length describe the slice.
    check(unsafe { libc::read(fd.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len()) } as libc::c_long)
        .map(|length| length as usize)
}

/// Copies up to `length` bytes between two files within the kernel; 0 at the end.
pub fn sendfile(to: BorrowedFd<'_>, from: BorrowedFd<'_>, length: usize) -> Result<usize> {
    // SAFETY: a null offset uses and moves the file position.
    check(unsafe { libc::sendfile(to.as_raw_fd(), from.as_raw_fd(), std::ptr::null_mut(), length) } as libc::c_long)
        .map(|length| length as usize)
}

pub fn umask(mask: u32) -> u32 {
    // SAFETY: cannot fail.
    unsafe { libc::umask(mask) }
}

/// Reads the symlink behind an `O_PATH | O_NOFOLLOW` descriptor; `ENAMETOOLONG` when the buffer is too small.
pub fn readlink(link: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize> {
    // SAFETY: pointer and length describe the buffer; the empty path means the descriptor itself.
    let length = check(unsafe {
        libc::syscall(libc::SYS_readlinkat, link.as_raw_fd(), c"".as_ptr(), buffer.as_mut_ptr(), buffer.len())
    })? as usize;
    if length == buffer.len() { Err(crate::Errno::ENAMETOOLONG) } else { Ok(length) }
}

/// Calls `visit` with the name of every entry of a folder (but `.` and `..`), reading `N` bytes at a time.
pub fn for_each_entry<const N: usize>(
    folder: BorrowedFd<'_>,
    visit: &mut dyn FnMut(&CStr) -> Result<()>,
) -> Result<()> {
    /// Offsets within `struct linux_dirent64`.
    const LENGTH_AT: usize = 16;
    const NAME_AT: usize = 19;
    let mut buffer = [0_u8; N];
    loop {
        // SAFETY: pointer and length describe the buffer.
        let filled = check(unsafe {
            libc::syscall(libc::SYS_getdents64, folder.as_raw_fd(), buffer.as_mut_ptr(), buffer.len())
        })? as usize;
        if filled == 0 {
            return Ok(());
        }
        let mut at = 0;
        while at + NAME_AT < filled {
            let length = usize::from(u16::from_ne_bytes([buffer[at + LENGTH_AT], buffer[at + LENGTH_AT + 1]]));
            let entry = buffer.get(at..at + length).filter(|entry| entry.len() > NAME_AT).ok_or(crate::Errno::EIO)?;
            let name = CStr::from_bytes_until_nul(&entry[NAME_AT..]).map_err(|_| crate::Errno::EIO)?;
            if name != c"." && name != c".." {
                visit(name)?;
            }
            at += length;
        }
    }
}
