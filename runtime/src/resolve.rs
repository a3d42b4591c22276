//! Finding and making places inside a root that its owner may change at any moment. Every step is one `openat2` that
//! cannot leave the root, and the answer is a descriptor, never a string to be looked up again. Allocates nothing.

use coracle_sys::path::{self, RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS};
use coracle_sys::{Errno, Result};
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// As many as the kernel itself follows.
const MAX_SYMLINKS: u32 = 40;
const FOLDER_MODE: u32 = 0o755;
const FILE_MODE: u32 = 0o644;
const BUFFER_BYTES: usize = libc::PATH_MAX as usize;

/// What to make when the last part of a path is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Folder,
    File,
}

/// The place in `root` that `path` (relative) names, symlinks read as within the root; `O_PATH`.
pub(crate) fn find(root: BorrowedFd<'_>, path: &CStr) -> Result<OwnedFd> {
    path::openat2(root, path, libc::O_PATH, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
}

/// The same without following any symlink.
pub(crate) fn find_plain(root: BorrowedFd<'_>, path: &CStr) -> Result<OwnedFd> {
    path::openat2(root, path, libc::O_PATH, 0, RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS)
}

/// As [`find`], making what is missing. A dangling symlink is made whole within the root.
pub(crate) fn find_or_make(root: BorrowedFd<'_>, path: &CStr, kind: Kind) -> Result<OwnedFd> {
    match find(root, path) {
        Err(Errno::ENOENT) => make(root, path, kind),
        other => other,
    }
}

/// A path in a fixed buffer, always ended by a null byte.
struct Buffer {
    bytes: [u8; BUFFER_BYTES],
    length: usize,
}

impl Buffer {
    fn new() -> Self {
        Self { bytes: [0; BUFFER_BYTES], length: 0 }
    }

    fn push(&mut self, bytes: &[u8]) -> Result<()> {
        let end = self.length + bytes.len();
        if end >= BUFFER_BYTES {
            return Err(Errno::ENAMETOOLONG);
        }
        self.bytes[self.length..end].copy_from_slice(bytes);
        self.bytes[end] = 0;
        self.length = end;
        Ok(())
    }

    fn truncate(&mut self, length: usize) {
        self.length = length;
        self.bytes[length] = 0;
    }

    fn as_c_str(&self) -> &CStr {
        if self.length == 0 { c"." } else { CStr::from_bytes_until_nul(&self.bytes).unwrap_or(c".") }
    }
}

/// Walks part by part. `done` is the way so far, free of symlinks; `rest` is what is still to be read.
fn make(root: BorrowedFd<'_>, path: &CStr, kind: Kind) -> Result<OwnedFd> {
    let (mut done, mut rest, mut symlinks) = (Buffer::new(), Buffer::new(), 0);
    rest.push(path.to_bytes())?;
    let mut start = 0;
    let mut here = find_plain(root, c".")?;
    loop {
        while rest.bytes[start] == b'/' {
            start += 1;
        }
        if start >= rest.length {
            return Ok(here);
        }
        let end =
            rest.bytes[start..rest.length].iter().position(|byte| *byte == b'/').map_or(rest.length, |at| start + at);
        let last = rest.bytes[end..rest.length].iter().all(|byte| *byte == b'/');
        match &rest.bytes[start..end] {
            b"." => {
                start = end;
                continue;
            }
            b".." => {
                let parent = done.bytes[..done.length].iter().rposition(|byte| *byte == b'/').unwrap_or(0);
                done.truncate(parent);
                here = find_plain(root, done.as_c_str())?;
                start = end;
                continue;
            }
            _ => {}
        }
        let before = done.length;
        if before > 0 {
            done.push(b"/")?;
        }
        done.push(&rest.bytes[start..end])?;
        let name_at = if before > 0 { before + 1 } else { 0 };
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        let entry = loop {
            match path::openat2(root, done.as_c_str(), flags, 0, RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS) {
                Err(Errno::ENOENT) => {
                    let name = CStr::from_bytes_until_nul(&done.bytes[name_at..]).map_err(|_| Errno::EINVAL)?;
                    let made = if last && kind == Kind::File {
                        path::mknodat(here.as_fd(), name, libc::S_IFREG | FILE_MODE, 0)
                    } else {
                        path::mkdirat(here.as_fd(), name, FOLDER_MODE)
                    };
                    match made {
                        // Somebody else was quicker: look at what it is.
                        Ok(()) | Err(Errno::EEXIST) => {}
                        Err(error) => return Err(error),
                    }
                }
                other => break other?,
            }
        };
        if path::stat(entry.as_fd())?.st_mode & libc::S_IFMT != libc::S_IFLNK {
            here = entry;
            start = end;
            continue;
        }
        symlinks += 1;
        if symlinks > MAX_SYMLINKS {
            return Err(Errno::ELOOP);
        }
        let mut next = Buffer::new();
        next.length = path::readlink(entry.as_fd(), &mut next.bytes[..BUFFER_BYTES - 1])?;
        done.truncate(if next.bytes[0] == b'/' { 0 } else { before });
        here = find_plain(root, done.as_c_str())?;
        next.push(b"/")?;
        next.push(&rest.bytes[end..rest.length])?;
        rest = next;
        start = 0;
    }
}
