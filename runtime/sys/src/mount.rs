//! The mount interface of descriptors: detached trees, file-system contexts, attributes, `pivot_root`.

use crate::{Result, check, own};
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

pub const MOUNT_ATTR_RDONLY: u64 = 0x01;
pub const MOUNT_ATTR_NOSUID: u64 = 0x02;
pub const MOUNT_ATTR_NODEV: u64 = 0x04;
pub const MOUNT_ATTR_NOEXEC: u64 = 0x08;
/// Mask of the access-time modes; to set one, this must be cleared too.
pub const MOUNT_ATTR__ATIME: u64 = 0x70;
pub const MOUNT_ATTR_RELATIME: u64 = 0x00;
pub const MOUNT_ATTR_NOATIME: u64 = 0x10;
pub const MOUNT_ATTR_STRICTATIME: u64 = 0x20;
pub const MOUNT_ATTR_NODIRATIME: u64 = 0x80;
pub const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;
pub const MOUNT_ATTR_NOSYMFOLLOW: u64 = 0x0020_0000;

const OPEN_TREE_CLONE: u32 = 1;
const AT_RECURSIVE: u32 = 0x8000;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 0x04;
const MOVE_MOUNT_T_EMPTY_PATH: u32 = 0x40;

/// Changes to the attributes of a mount, as `mount_setattr` takes them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    pub set: u64,
    pub clear: u64,
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE`, `MS_UNBINDABLE` or 0 to leave it.
    pub propagation: u64,
    /// User namespace whose map the mount gets (with `MOUNT_ATTR_IDMAP`).
    pub userns_fd: u64,
}

impl Attributes {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A detached copy of the mount (and, if asked, all below it) that contains `path`.
pub fn clone_tree(folder: Option<BorrowedFd<'_>>, path: &CStr, recursive: bool) -> Result<OwnedFd> {
    let flags = OPEN_TREE_CLONE
        | libc::O_CLOEXEC as u32
        | libc::AT_EMPTY_PATH as u32
        | if recursive { AT_RECURSIVE } else { 0 };
    let folder = folder.map_or(libc::AT_FDCWD, |fd| fd.as_raw_fd());
    // SAFETY: path is a C string.
    own(unsafe { libc::syscall(libc::SYS_open_tree, folder, path.as_ptr(), flags) })
}

/// Attaches a detached mount at the place that `target` refers to.
pub fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: both paths are the empty C string.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            target.as_raw_fd(),
            c"".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        )
    })?;
    Ok(())
}

/// Changes attributes of the mount behind `mount` (its root), and of all below it if `recursive`.
pub fn set_attributes(mount: BorrowedFd<'_>, attributes: &Attributes, recursive: bool) -> Result<()> {
    let flags = libc::AT_EMPTY_PATH as u32 | if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: the path is the empty C string, attributes outlives the call and has the size given.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<Attributes>(),
        )
    })?;
    Ok(())
}

/// A context in which a new instance of a file system is configured.
#[derive(Debug)]
pub struct Context(OwnedFd);

impl Context {
    pub fn new(filesystem: &CStr) -> Result<Self> {
        const FSOPEN_CLOEXEC: u32 = 1;
        // SAFETY: filesystem is a C string.
        own(unsafe { libc::syscall(libc::SYS_fsopen, filesystem.as_ptr(), FSOPEN_CLOEXEC) }).map(Self)
    }

    /// Sets an option that has no value.
    pub fn flag(&self, key: &CStr) -> Result<()> {
        self.configure(0, Some(key), None)
    }

    /// Sets an option to a value.
    pub fn string(&self, key: &CStr, value: &CStr) -> Result<()> {
        self.configure(1, Some(key), Some(value))
    }

    /// Makes the instance and a detached mount of it with these attributes.
    pub fn mount(self, attributes: u64) -> Result<OwnedFd> {
        const FSCONFIG_CMD_CREATE: u32 = 6;
        const FSMOUNT_CLOEXEC: u32 = 1;
        self.configure(FSCONFIG_CMD_CREATE, None, None)?;
        // SAFETY: takes integers only.
        own(unsafe { libc::syscall(libc::SYS_fsmount, self.0.as_raw_fd(), FSMOUNT_CLOEXEC, attributes) })
    }

    fn configure(&self, command: u32, key: Option<&CStr>, value: Option<&CStr>) -> Result<()> {
        let key = key.map_or(std::ptr::null(), CStr::as_ptr);
        let value = value.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: key and value are null or C strings that outlive the call.
        check(unsafe { libc::syscall(libc::SYS_fsconfig, self.0.as_raw_fd(), command, key, value, 0) })?;
        Ok(())
    }
}

/// Makes the mount of the working directory the root of the mount namespace, with the old root stacked on top of it;
/// the caller then detaches `.` to be rid of the old one.
pub fn pivot_to_cwd() -> Result<()> {
    // SAFETY: both are C strings.
    check(unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) })?;
    Ok(())
}

/// Unmounts what is mounted at a path of this process's own namespace, lazily.
pub fn detach(path: &CStr) -> Result<()> {
    // SAFETY: path is a C string.
    check(unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) }.into())?;
    Ok(())
}

/// The classic call, for the few things that the new interface lacks (moving the root without `pivot_root`).
pub fn mount(source: &CStr, target: &CStr, filesystem: &CStr, flags: u64) -> Result<()> {
    let data = std::ptr::null();
    // SAFETY: all are C strings; no data is passed.
    let done = unsafe { libc::mount(source.as_ptr(), target.as_ptr(), filesystem.as_ptr(), flags, data) };
    check(done.into())?;
    Ok(())
}
