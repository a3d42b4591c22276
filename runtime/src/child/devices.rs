//! Filling `/dev`: nodes, links, the console.

use super::message::At;
use super::{Failure, Message, Note, Prepared};
use crate::error::Step;
use crate::plan::{Plan, ProcessPlan, below_root};
use crate::resolve::{self, Kind};
use coracle_sys::path::{DEVPTS_SUPER_MAGIC, RESOLVE_IN_ROOT, RESOLVE_NO_SYMLINKS};
use coracle_sys::{Errno, channel, mount, path, tty};
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Links that the specification promises.
const LINKS: [(&CStr, &CStr); 4] = [
    (c"/proc/self/fd", c"fd"),
    (c"/proc/self/fd/0", c"stdin"),
    (c"/proc/self/fd/1", c"stdout"),
    (c"/proc/self/fd/2", c"stderr"),
];

pub(super) fn make(plan: &Plan, prepared: &mut Prepared) -> Result<(), Failure> {
    let root = prepared.root.as_fd();
    let mut last: Option<(&CStr, OwnedFd)> = None;
    for (step, node) in plan.devices.iter().zip(&mut prepared.nodes) {
        // Nearly all are in the same one.
        let folder = match last.take() {
            Some((name, folder)) if name == step.folder.as_c_str() => folder,
            _ => {
                resolve::find_or_make(root, below_root(&step.folder), Kind::Folder).on(Step::MakeDevice, &step.path)?
            }
        };
        let (_, folder) = last.insert((&step.folder, folder));
        let node = match node.take() {
            None if plan.namespaces.has_user() => {
                Some(mount::clone_tree(None, &step.path, false).on(Step::OpenSource, &step.path)?)
            }
            node => node,
        };
        if let Some(node) = node {
            let target = bind_target(folder.as_fd(), &step.name).on(Step::MakeDevice, &step.path)?;
            mount::attach(node.as_fd(), target.as_fd()).on(Step::MakeDevice, &step.path)?;
            continue;
        }
        let mode = step.kind | step.mode;
        match path::mknodat(folder.as_fd(), &step.name, mode, step.number) {
            Ok(()) => {}
            Err(Errno::EEXIST) => {
                // The image brought one along. Only the very same device may stay.
                let there = path::openat(folder.as_fd(), &step.name, libc::O_PATH | libc::O_NOFOLLOW, 0)
                    .on(Step::MakeDevice, &step.path)?;
                let stat = path::stat(there.as_fd()).on(Step::MakeDevice, &step.path)?;
                if stat.st_mode & libc::S_IFMT != step.kind || stat.st_rdev != step.number {
                    path::unlinkat(folder.as_fd(), &step.name, 0).on(Step::MakeDevice, &step.path)?;
                    path::mknodat(folder.as_fd(), &step.name, mode, step.number).on(Step::MakeDevice, &step.path)?;
                }
            }
            Err(errno) => return Err(Failure::new(Step::MakeDevice, &step.path, errno)),
        }
        if step.uid != 0 || step.gid != 0 {
            path::chownat(folder.as_fd(), &step.name, step.uid, step.gid).on(Step::MakeDevice, &step.path)?;
        }
    }
    let dev = resolve::find_or_make(root, c"dev", Kind::Folder).on(Step::Resolve, c"/dev")?;
    for (target, name) in LINKS {
        match path::symlinkat(target, dev.as_fd(), name) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(Failure::new(Step::MakeLink, name, errno)),
        }
    }
    // A ptmx that the image brought along would be the host's.
    match path::unlinkat(dev.as_fd(), c"ptmx", 0) {
        Ok(()) | Err(Errno::ENOENT) => {}
        Err(errno) => return Err(Failure::new(Step::MakeLink, c"/dev/ptmx", errno)),
    }
    path::symlinkat(c"pts/ptmx", dev.as_fd(), c"ptmx").on(Step::MakeLink, c"/dev/ptmx")
}

/// An ordinary file to mount over, never one that a link leads to.
fn bind_target(folder: BorrowedFd<'_>, name: &CStr) -> coracle_sys::Result<OwnedFd> {
    match path::mknodat(folder, name, libc::S_IFREG | 0o600, 0) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(errno) => return Err(errno),
    }
    path::openat2(folder, name, libc::O_PATH | libc::O_NOFOLLOW, 0, RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS)
}

/// The container's terminal as `/dev/console`, when it has one; the master side goes to the parent.
pub(super) fn console(plan: &Plan, prepared: &Prepared) -> Result<Option<OwnedFd>, Failure> {
    if plan.process.terminal.is_none() {
        return Ok(None);
    }
    let root = prepared.root.as_fd();
    let terminal = open_terminal(root, &plan.process, prepared.sync.as_fd())?;
    if plan.own_dev {
        let dev = resolve::find(root, c"dev").on(Step::Terminal, c"/dev")?;
        let target = bind_target(dev.as_fd(), c"console").on(Step::Terminal, c"/dev/console")?;
        // From the descriptor that the kernel gave, not from a path that could lead elsewhere by now.
        let tree = mount::clone_tree(Some(terminal.as_fd()), c"", false).on(Step::Terminal, c"/dev/console")?;
        mount::attach(tree.as_fd(), target.as_fd()).on(Step::Terminal, c"/dev/console")?;
    }
    Ok(Some(terminal))
}

/// Opens a new terminal of the container's own devpts below `root` and hands its master side over.
pub(crate) fn open_terminal(
    root: BorrowedFd<'_>,
    plan: &ProcessPlan,
    sync: BorrowedFd<'_>,
) -> Result<OwnedFd, Failure> {
    let flags = libc::O_RDWR | libc::O_NOCTTY;
    let ptmx = c"dev/pts/ptmx";
    let master = path::openat2(root, ptmx, flags, 0, RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS).on(Step::Terminal, ptmx)?;
    if path::filesystem_magic(master.as_fd()).on(Step::Terminal, ptmx)? != DEVPTS_SUPER_MAGIC {
        return Err(Failure::new(Step::Terminal, c"dev/pts/ptmx (it is not of a devpts)", Errno::ENODEV));
    }
    tty::unlock(master.as_fd()).at(Step::Terminal)?;
    let terminal = tty::peer(master.as_fd()).at(Step::Terminal)?;
    if plan.plain_line_ends {
        tty::keep_line_ends(terminal.as_fd()).at(Step::Terminal)?;
    }
    if let Some((rows, columns)) = plan.terminal.filter(|size| *size != (0, 0)) {
        tty::set_size(terminal.as_fd(), rows, columns).at(Step::Terminal)?;
    }
    if plan.uid != 0 {
        path::chownat(terminal.as_fd(), c"", plan.uid, u32::MAX).at(Step::Terminal)?;
    }
    channel::send(sync, &Message::note(Note::Terminal).encode(), Some(master.as_fd())).at(Step::Terminal)?;
    Ok(terminal)
}
