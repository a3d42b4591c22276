//! Building the container's root from the plan, sealing and entering it.

use super::message::{At, listen};
use super::{Failure, Message, Prepared, Word, copy_up, devices};
use crate::error::Step;
use crate::plan::{MountStep, Plan, Source, below_root};
use crate::resolve::{self, Kind};
use coracle_sys::mount::{
    self, Attributes, Context, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY,
};
use coracle_sys::{Errno, channel, path};
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Files of procfs over which a mount does no harm: numbers that a file system like lxcfs shows for one container.
const HARMLESS_IN_PROC: [&CStr; 11] = [
    c"/proc/cpuinfo",
    c"/proc/diskstats",
    c"/proc/meminfo",
    c"/proc/stat",
    c"/proc/swaps",
    c"/proc/uptime",
    c"/proc/loadavg",
    c"/proc/slabinfo",
    c"/proc/net/dev",
    c"/proc/sys/kernel/ns_last_pid",
    c"/proc/sys/crypto/fips_enabled",
];

/// Attaches the root and all that the plan mounts in it.
pub(super) fn build(plan: &Plan, prepared: &mut Prepared) -> Result<(), Failure> {
    // The root is stacked upon the old one, where no path of the host is needed to reach it. Without a mount namespace
    // that would be the host's own; then it stands where it lies.
    let place = if plan.mounts_apart() { c"/" } else { plan.root.as_c_str() };
    let top = path::open(place, libc::O_PATH | libc::O_DIRECTORY).on(Step::OpenRoot, place)?;
    if plan.mounts_apart() {
        let quiet = Attributes { propagation: quiet_propagation(plan), ..Attributes::default() };
        mount::set_attributes(top.as_fd(), &quiet, true).at(Step::RootPropagation)?;
    }
    if !prepared.privileged {
        prepared.root = root_tree(plan).on(Step::OpenRoot, &plan.root)?;
    }
    if let Some(own) = prepared.own_mount.take().filter(|_| plan.namespaces.new & libc::CLONE_NEWNS as u64 != 0) {
        // Over any file of the old root, with which it goes.
        let spot = path::open(c"/proc/version", libc::O_PATH).on(Step::OpenProc, c"/proc/version")?;
        mount::attach(own.as_fd(), spot.as_fd()).on(Step::AttachMount, c"/proc/version")?;
    }
    mount::attach(prepared.root.as_fd(), top.as_fd()).on(Step::AttachRoot, &plan.root)?;
    for (index, step) in plan.mounts.iter().enumerate() {
        let source = match (prepared.sources[index].take(), &step.source) {
            (None, Source::Bind { path, .. }) if step.id_map.is_some() => Some(ask_for_source(prepared, index, path)?),
            (None, Source::Bind { path, within_root, recursive }) => {
                let found = within_root
                    .as_deref()
                    .map(|below| resolve::find(prepared.root.as_fd(), below).on(Step::OpenSource, path))
                    .transpose()?;
                Some(open_source(step, found, path, *recursive)?)
            }
            (source, _) => source,
        };
        let made = mount_one(prepared.root.as_fd(), step, source)?;
        prepared.made[index] = made;
    }
    if plan.own_dev {
        devices::make(plan, prepared)?;
    }
    // Programs are promised their working directory.
    resolve::find_or_make(prepared.root.as_fd(), below_root(&plan.process.cwd), Kind::Folder)
        .on(Step::WorkingDirectory, &plan.process.cwd)?;
    Ok(())
}

fn quiet_propagation(plan: &Plan) -> u64 {
    if plan.root_propagation.0 == libc::MS_PRIVATE { libc::MS_PRIVATE } else { libc::MS_SLAVE }
}

/// The container's root as a detached mount, without its mounts' events going back to where it comes from.
pub(crate) fn root_tree(plan: &Plan) -> coracle_sys::Result<OwnedFd> {
    let tree = mount::clone_tree(None, &plan.root, true)?;
    let quiet = Attributes { propagation: quiet_propagation(plan), ..Attributes::default() };
    mount::set_attributes(tree.as_fd(), &quiet, true)?;
    Ok(tree)
}

/// Gives a detached mount the attributes and the propagation of its step.
pub(crate) fn apply(step: &MountStep, tree: BorrowedFd<'_>) -> coracle_sys::Result<()> {
    for (attributes, recursive) in [(&step.attributes, false), (&step.recursive_attributes, true)] {
        if !attributes.is_empty() {
            mount::set_attributes(tree, attributes, recursive)?;
        }
    }
    step.propagation.iter().try_for_each(|(flag, recursive)| {
        mount::set_attributes(tree, &Attributes { propagation: *flag, ..Attributes::default() }, *recursive)
    })
}

/// A source that an earlier mount has brought and whose ids only the parent may map.
fn ask_for_source(prepared: &Prepared, index: usize, path: &CStr) -> Result<(OwnedFd, bool), Failure> {
    let sync = prepared.sync.as_fd();
    channel::send(sync, &Message::needs_source(index).encode(), None).at(Step::Synchronize)?;
    let tree = listen(sync, Word::Go)?.ok_or_else(|| Failure::new(Step::OpenSource, path, Errno::EBADF))?;
    let kind = path::stat(tree.as_fd()).on(Step::OpenSource, path)?.st_mode & libc::S_IFMT;
    Ok((tree, kind == libc::S_IFDIR))
}

/// A copy of a bind source in this process's mount namespace, or of what was found in the root, and whether it is a folder.
fn open_source(
    step: &MountStep,
    found: Option<OwnedFd>,
    path: &CStr,
    recursive: bool,
) -> Result<(OwnedFd, bool), Failure> {
    let tree = match &found {
        Some(found) => mount::clone_tree(Some(found.as_fd()), c"", recursive),
        None => mount::clone_tree(None, path, recursive),
    }
    .on(Step::OpenSource, path)?;
    apply(step, tree.as_fd()).on(Step::MountAttributes, path)?;
    let kind = path::stat(tree.as_fd()).on(Step::OpenSource, path)?.st_mode & libc::S_IFMT;
    Ok((tree, kind == libc::S_IFDIR))
}

/// Makes one mount; a new file system that must become read-only later is handed back.
fn mount_one(
    root: BorrowedFd<'_>,
    step: &MountStep,
    source: Option<(OwnedFd, bool)>,
) -> Result<Option<OwnedFd>, Failure> {
    let is_proc = step.is_filesystem(b"proc");
    let kind = match &source {
        Some((_, false)) => Kind::File,
        _ => Kind::Folder,
    };
    let relative = below_root(&step.target);
    let covered = match &step.source {
        Source::New { options, .. } if step.is_filesystem(b"tmpfs") => mode_to_keep(root, relative, options),
        _ => None,
    };
    let target = if is_proc || step.is_filesystem(b"sysfs") {
        // A symlink here could make masked paths and security labels refer to another place than this mount.
        match resolve::find_plain(root, relative) {
            Err(Errno::ENOENT) => resolve::find_or_make(root, relative, kind).and_then(|made| {
                drop(made);
                resolve::find_plain(root, relative)
            }),
            other => other,
        }
    } else {
        resolve::find_or_make(root, relative, kind)
    }
    .on(Step::Resolve, &step.target)?;
    refuse_over_proc(step, &target, source.as_ref().map(|(tree, _)| tree))?;
    match (&step.source, source) {
        (_, Some((tree, _))) => {
            mount::attach(tree.as_fd(), target.as_fd()).on(Step::AttachMount, &step.target)?;
            Ok(None)
        }
        (Source::New { filesystem, options }, None) => {
            let made = new_filesystem(filesystem, options, covered, step)?;
            if step.copy_up {
                copy_up::copy(target.as_fd(), made.as_fd()).on(Step::CopyUp, &step.target)?;
            }
            mount::attach(made.as_fd(), target.as_fd()).on(Step::AttachMount, &step.target)?;
            for (flag, recursive) in &step.propagation {
                let change = Attributes { propagation: *flag, ..Attributes::default() };
                mount::set_attributes(made.as_fd(), &change, *recursive).on(Step::MountAttributes, &step.target)?;
            }
            Ok(step.readonly_late.then_some(made))
        }
        (Source::Bind { path, .. }, None) => Err(Failure::new(Step::OpenSource, path, Errno::EBADF)),
    }
}

type Options = [(std::ffi::CString, Option<std::ffi::CString>)];

/// The mode of a folder that a tmpfs covers, for the tmpfs to have, too, unless its options name one.
fn mode_to_keep(root: BorrowedFd<'_>, place: &CStr, options: &Options) -> Option<u32> {
    if options.iter().any(|(key, _)| key.as_c_str() == c"mode") {
        return None;
    }
    // What is not there yet is made with the file system's own default.
    let stat = path::stat(resolve::find(root, place).ok()?.as_fd()).ok()?;
    Some(stat.st_mode & 0o7777)
}

/// A number of four octal digits, without anything being allocated.
fn octal(number: u32) -> [u8; 5] {
    let digit = |shift: u32| b'0' + ((number >> shift) & 7) as u8;
    [digit(9), digit(6), digit(3), digit(0), 0]
}

fn new_filesystem(
    filesystem: &CStr,
    options: &Options,
    mode: Option<u32>,
    step: &MountStep,
) -> Result<OwnedFd, Failure> {
    let context = Context::new(filesystem).on(Step::MakeFilesystem, filesystem)?;
    for (key, value) in options {
        match value {
            Some(value) => context.string(key, value),
            None => context.flag(key),
        }
        .on(Step::MountOption, key)?;
    }
    if let Some(text) = mode.map(octal) {
        let value = CStr::from_bytes_until_nul(&text).unwrap_or(c"0755");
        context.string(c"mode", value).on(Step::MountOption, c"mode")?;
    }
    let made = context.mount(step.attributes.set).on(Step::MakeFilesystem, filesystem)?;
    if !step.recursive_attributes.is_empty() {
        mount::set_attributes(made.as_fd(), &step.recursive_attributes, true)
            .on(Step::MountAttributes, &step.target)?;
    }
    Ok(made)
}

/// Only procfs may cover procfs, lest labels and masks be written to or read from a false one.
fn refuse_over_proc(step: &MountStep, target: &OwnedFd, source: Option<&OwnedFd>) -> Result<(), Failure> {
    let is = |fd: &OwnedFd| path::filesystem_magic(fd.as_fd()).map(|magic| magic == path::PROC_SUPER_MAGIC);
    let lexically_root = step.target.as_c_str() == c"/proc";
    let inside = is(target).on(Step::Resolve, &step.target)? || step.target.to_bytes().starts_with(b"/proc/");
    if !inside && !lexically_root {
        return Ok(());
    }
    let harmless = HARMLESS_IN_PROC.contains(&step.target.as_c_str());
    let brings_proc = match source {
        Some(tree) => is(tree).on(Step::Resolve, &step.target)?,
        None => step.is_filesystem(b"proc"),
    };
    if (lexically_root && brings_proc) || (harmless && step.is_bind()) {
        Ok(())
    } else {
        Err(Failure::new(Step::RefuseTarget, &step.target, Errno::EPERM))
    }
}

/// Masks, makes read-only, and gives the root its own attributes: nothing is made inside afterwards.
pub(super) fn seal(plan: &Plan, prepared: &mut Prepared) -> Result<(), Failure> {
    let root = prepared.root.as_fd();
    let readonly = Attributes { set: MOUNT_ATTR_RDONLY, ..Attributes::default() };
    for made in prepared.made.iter().flatten() {
        mount::set_attributes(made.as_fd(), &readonly, false).at(Step::MountAttributes)?;
    }
    for name in &plan.readonly {
        let target = match resolve::find(root, below_root(name)) {
            Ok(target) => target,
            Err(Errno::ENOENT | Errno::ENOTDIR) => continue,
            Err(errno) => return Err(Failure::new(Step::ReadonlyPath, name, errno)),
        };
        let tree = mount::clone_tree(Some(target.as_fd()), c"", true).on(Step::ReadonlyPath, name)?;
        mount::set_attributes(tree.as_fd(), &readonly, true).on(Step::ReadonlyPath, name)?;
        mount::attach(tree.as_fd(), target.as_fd()).on(Step::ReadonlyPath, name)?;
    }
    mask(plan, root)?;
    if plan.root_readonly {
        mount::set_attributes(root, &readonly, false).on(Step::MountAttributes, c"/")?;
    }
    Ok(())
}

/// Hides files behind the null device and folders behind one empty, read-only file system.
fn mask(plan: &Plan, root: BorrowedFd<'_>) -> Result<(), Failure> {
    let mut null: Option<OwnedFd> = None;
    let mut empty: Option<OwnedFd> = None;
    for name in &plan.masked {
        let target = match resolve::find(root, below_root(name)) {
            Ok(target) => target,
            Err(Errno::ENOENT | Errno::ENOTDIR) => continue,
            Err(errno) => return Err(Failure::new(Step::MaskPath, name, errno)),
        };
        let kind = path::stat(target.as_fd()).on(Step::MaskPath, name)?.st_mode & libc::S_IFMT;
        if kind == libc::S_IFDIR {
            let cover = match &empty {
                // A detached file system cannot be copied, an attached one can.
                Some(first) => mount::clone_tree(Some(first.as_fd()), c"", false).on(Step::MaskPath, name)?,
                None => empty_filesystem().on(Step::MaskPath, name)?,
            };
            mount::attach(cover.as_fd(), target.as_fd()).on(Step::MaskPath, name)?;
            empty.get_or_insert(cover);
        } else {
            if null.is_none() {
                null = Some(null_device(root)?);
            }
            let device = null.as_ref().map(AsFd::as_fd);
            let cover = mount::clone_tree(device, c"", false).on(Step::MaskPath, name)?;
            mount::attach(cover.as_fd(), target.as_fd()).on(Step::MaskPath, name)?;
        }
    }
    Ok(())
}

fn empty_filesystem() -> coracle_sys::Result<OwnedFd> {
    let context = Context::new(c"tmpfs")?;
    context.string(c"mode", c"0555")?;
    context.mount(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC)
}

/// The container's null device, checked to be it: an image may have put anything else there.
fn null_device(root: BorrowedFd<'_>) -> Result<OwnedFd, Failure> {
    let device = resolve::find_plain(root, c"dev/null").on(Step::MaskPath, c"/dev/null")?;
    let stat = path::stat(device.as_fd()).on(Step::MaskPath, c"/dev/null")?;
    if stat.st_mode & libc::S_IFMT == libc::S_IFCHR && stat.st_rdev == libc::makedev(1, 3) {
        Ok(device)
    } else {
        Err(Failure::new(Step::MaskPath, c"/dev/null (it is not the null device)", Errno::ENODEV))
    }
}

/// Makes the built root the root, and lets go of the old one.
pub(super) fn enter(plan: &Plan, prepared: &Prepared) -> Result<(), Failure> {
    let root = prepared.root.as_fd();
    path::fchdir(root).at(Step::Pivot)?;
    if !plan.mounts_apart() || plan.options.no_pivot {
        // It is stacked upon the old root already, or stands in the host's tree.
        path::chroot(c".").at(Step::Pivot)?;
    } else {
        mount::pivot_to_cwd().at(Step::Pivot)?;
        mount::detach(c".").at(Step::DetachOld)?;
    }
    path::chdir(c"/").at(Step::Pivot)?;
    if plan.root_propagation.1 {
        let change = Attributes { propagation: plan.root_propagation.0, ..Attributes::default() };
        mount::set_attributes(root, &change, false).at(Step::RootPropagation)?;
    }
    Ok(())
}
