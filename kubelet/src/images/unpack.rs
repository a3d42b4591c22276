//! Unpacking one layer's tar stream into a folder that overlayfs can use as lower directory.
//!
//! Sources: OCI image-spec `layer.md` (entries, whiteouts), kernel `Documentation/filesystems/overlayfs.rst`
//! (whiteout = character device 0:0, opaque = `trusted.overlay.opaque`).

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{
    FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmod, fchmodat, fstatat, futimens, makedev, mkdirat, mknodat,
    utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, LinkatFlags, Uid, UnlinkatFlags, fchown, fchownat, linkat, symlinkat, unlinkat};
use tar::EntryType;
use xattr::FileExt;

use super::error::ImageError;
use super::guard::Guard;
use super::merged::{Merged, OPAQUE, Seen, errno_of, normalize};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE_WHITEOUT: &[u8] = b".wh..wh..opq";
/// Names that begin so were bookkeeping of aufs and mean nothing in a layer.
const AUFS_METADATA: &[u8] = b".wh..wh.";
/// Attributes that only overlayfs itself may set: a layer could otherwise redirect a path to somewhere else.
const FORBIDDEN_XATTRS: [&str; 2] = ["trusted.overlay.", "user.overlay."];
/// PAX records with this prefix carry extended attributes.
const PAX_XATTR: &str = "SCHILY.xattr.";
/// Extended attributes of one entry.
const MAX_XATTRS: usize = 256;
/// Buffer for file contents.
const COPY_BUFFER_BYTES: usize = 128 << 10;

/// What a layer turned out to hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Unpacked {
    /// Bytes of file contents.
    pub(super) bytes: u64,
    /// Entries made.
    pub(super) inodes: u64,
}

/// Ownership, mode, times and extended attributes of an entry.
struct Attributes {
    uid: u32,
    gid: u32,
    mode: u32,
    mtime: TimeSpec,
    xattrs: Vec<(OsString, Vec<u8>)>,
}

/// One unpacking.
pub(super) struct Unpacker<'a> {
    layer: &'a str,
    merged: Merged,
    /// Folders' times are set at the end, for every entry made in a folder changes them.
    folder_times: HashMap<PathBuf, TimeSpec>,
    /// The folder of the previous entry, which most often is that of the next.
    last_folder: Option<(PathBuf, OwnedFd)>,
    buffer: Vec<u8>,
    done: Unpacked,
}

impl<'a> Unpacker<'a> {
    /// `layer` names the layer in errors.
    pub(super) fn new(layer: &'a str, merged: Merged) -> Self {
        Self {
            layer,
            merged,
            folder_times: HashMap::new(),
            last_folder: None,
            buffer: vec![0; COPY_BUFFER_BYTES],
            done: Unpacked::default(),
        }
    }

    /// Unpacks the whole stream. The stream stands behind the archive's end marker afterwards.
    pub(super) fn run(mut self, stream: &mut dyn Read, guard: &Guard) -> Result<Unpacked, ImageError> {
        let mut archive = tar::Archive::new(stream);
        let damaged = |source: io::Error| match guard.verdict() {
            Some(reason) => ImageError::Bomb { layer: self.layer.to_owned(), reason: reason.to_owned() },
            None => ImageError::Damaged { layer: self.layer.to_owned(), source },
        };
        guard.headers();
        let entries = archive.entries().map_err(damaged)?;
        let mut count = 0;
        for entry in entries {
            let mut entry = entry.map_err(|error| self.damaged(guard, error))?;
            guard.body();
            count += 1;
            guard.entry(count).map_err(|error| self.damaged(guard, error))?;
            self.entry(&mut entry, guard)?;
            // What is left of the content must not count as headers of the next entry.
            io::copy(&mut entry, &mut io::sink()).map_err(|error| self.damaged(guard, error))?;
            guard.headers();
        }
        guard.body();
        for (path, mtime) in std::mem::take(&mut self.folder_times) {
            match self.merged.open_folder(0, &path) {
                Ok(folder) => {
                    futimens(&folder, &mtime, &mtime).map_err(|errno| self.failed(&path, "set times", errno))?
                }
                // Replaced by something else later in the archive.
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {}
                Err(errno) => return Err(self.failed(&path, "open", errno)),
            }
        }
        Ok(self.done)
    }

    fn damaged(&self, guard: &Guard, source: io::Error) -> ImageError {
        match guard.verdict() {
            Some(reason) => ImageError::Bomb { layer: self.layer.to_owned(), reason: reason.to_owned() },
            None => ImageError::Damaged { layer: self.layer.to_owned(), source },
        }
    }

    fn failed(&self, path: &Path, step: &'static str, errno: Errno) -> ImageError {
        if matches!(errno, Errno::ENOSPC | Errno::EDQUOT) {
            return ImageError::DiskFull { step: "unpacking", path: path.to_owned() };
        }
        ImageError::Entry {
            layer: self.layer.to_owned(),
            entry: path.display().to_string(),
            reason: format!("cannot {step}: {}", io::Error::from(errno)),
        }
    }

    fn refused(&self, path: &Path, reason: impl Into<String>) -> ImageError {
        ImageError::Entry { layer: self.layer.to_owned(), entry: path.display().to_string(), reason: reason.into() }
    }

    fn escape(&self, path: &[u8]) -> ImageError {
        ImageError::Escape { layer: self.layer.to_owned(), entry: String::from_utf8_lossy(path).into_owned() }
    }

    fn entry<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>, guard: &Guard) -> Result<(), ImageError> {
        let kind = entry.header().entry_type();
        if kind == EntryType::XGlobalHeader {
            return Ok(());
        }
        let raw = entry.path_bytes().into_owned();
        let path = normalize(&raw).ok_or_else(|| self.escape(&raw))?;
        let attributes = self.attributes(entry, &path)?;
        let Some(name) = path.file_name().map(OsStr::to_owned) else {
            if kind.is_dir() {
                let root = self.merged.open_folder(0, Path::new("")).map_err(|e| self.failed(&path, "open", e))?;
                self.apply_to_folder(&root, &path, &attributes)?;
            }
            return Ok(());
        };
        let parent = self.parent(path.parent().unwrap_or(Path::new("")))?;
        let path = parent.join(&name);
        if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT) {
            return self.whiteout(&parent, name.as_bytes(), OsStr::from_bytes(hidden));
        }
        self.done.inodes += 1;
        match kind {
            EntryType::Directory => self.folder(&path, &name, &attributes),
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.clear(&path, &name)?;
                self.file(&path, &name, entry, &attributes, guard)
            }
            EntryType::Symlink => {
                let target = self.link_target(entry, &path)?;
                self.clear(&path, &name)?;
                symlinkat(OsStr::from_bytes(&target), self.here(), name.as_os_str())
                    .map_err(|errno| self.failed(&path, "make symbolic link", errno))?;
                self.apply_by_name(&path, &name, &attributes, None)
            }
            EntryType::Link => {
                let raw = self.link_target(entry, &path)?;
                let target = normalize(&raw).ok_or_else(|| self.escape(&raw))?;
                self.hard_link(&path, &name, &target)
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                let device = self.device(entry, &path, kind)?;
                self.clear(&path, &name)?;
                let node = match kind {
                    EntryType::Char => SFlag::S_IFCHR,
                    EntryType::Block => SFlag::S_IFBLK,
                    _ => SFlag::S_IFIFO,
                };
                mknodat(self.here(), name.as_os_str(), node, Mode::from_bits_truncate(0o600), device)
                    .map_err(|errno| self.failed(&path, "make device node", errno))?;
                self.apply_by_name(&path, &name, &attributes, Some(attributes.mode))
            }
            other => Err(self
                .refused(&path, format!("entries of type {:?} are not allowed in a layer", other.as_byte() as char))),
        }
    }

    /// The folder that [`Unpacker::parent`] opened.
    fn here(&self) -> &OwnedFd {
        match &self.last_folder {
            Some((_, folder)) => folder,
            None => self.merged.root(0),
        }
    }

    fn link_target<R: Read>(&self, entry: &tar::Entry<'_, R>, path: &Path) -> Result<Vec<u8>, ImageError> {
        match entry.link_name_bytes() {
            Some(target) if !target.is_empty() && !target.contains(&0) => Ok(target.into_owned()),
            _ => Err(self.refused(path, "a link without a target")),
        }
    }

    fn device<R: Read>(
        &self,
        entry: &tar::Entry<'_, R>,
        path: &Path,
        kind: EntryType,
    ) -> Result<nix::libc::dev_t, ImageError> {
        if kind == EntryType::Fifo {
            return Ok(0);
        }
        let header = entry.header();
        match (header.device_major(), header.device_minor()) {
            (Ok(Some(major)), Ok(Some(minor))) => Ok(makedev(u64::from(major), u64::from(minor))),
            _ => Err(self.refused(path, "a device without numbers")),
        }
    }

    fn attributes<R: Read>(&self, entry: &mut tar::Entry<'_, R>, path: &Path) -> Result<Attributes, ImageError> {
        let bad = |error: io::Error| ImageError::Entry {
            layer: self.layer.to_owned(),
            entry: path.display().to_string(),
            reason: format!("malformed header: {error}"),
        };
        let header = entry.header();
        let id = |value: io::Result<u64>| -> Result<u32, ImageError> {
            u32::try_from(value.map_err(bad)?).map_err(|_| self.refused(path, "an owner beyond 32 bits"))
        };
        let mut attributes = Attributes {
            uid: id(header.uid())?,
            gid: id(header.gid())?,
            mode: header.mode().map_err(bad)? & 0o7777,
            mtime: TimeSpec::new(i64::try_from(header.mtime().map_err(bad)?).unwrap_or(i64::MAX), 0),
            xattrs: Vec::new(),
        };
        let Some(extensions) = entry.pax_extensions().map_err(bad)? else {
            return Ok(attributes);
        };
        for extension in extensions {
            let extension = extension.map_err(bad)?;
            let key = extension.key().map_err(|_| self.refused(path, "a PAX record whose key is not UTF-8"))?;
            let number = || extension.value().ok().and_then(|text| text.parse::<u32>().ok());
            match key {
                "uid" => attributes.uid = number().ok_or_else(|| self.refused(path, "a malformed PAX uid"))?,
                "gid" => attributes.gid = number().ok_or_else(|| self.refused(path, "a malformed PAX gid"))?,
                "mtime" => {
                    let text = extension.value().unwrap_or_default();
                    attributes.mtime = pax_time(text).ok_or_else(|| self.refused(path, "a malformed PAX mtime"))?;
                }
                _ => {
                    let Some(name) = key.strip_prefix(PAX_XATTR) else {
                        continue;
                    };
                    if FORBIDDEN_XATTRS.iter().any(|prefix| name.starts_with(prefix)) {
                        return Err(self.refused(path, format!("the extended attribute {name} belongs to overlayfs")));
                    }
                    if attributes.xattrs.len() == MAX_XATTRS {
                        return Err(self.refused(path, format!("more than {MAX_XATTRS} extended attributes")));
                    }
                    attributes.xattrs.push((name.into(), extension.value_bytes().to_owned()));
                }
            }
        }
        Ok(attributes)
    }

    /// Opens the folder of an entry, making it like the one below (or like a plain folder of root's) if this layer lacks
    /// it. Returns its real path in the layer.
    fn parent(&mut self, path: &Path) -> Result<PathBuf, ImageError> {
        if let Some((last, _)) = &self.last_folder
            && last == path
        {
            return Ok(path.to_owned());
        }
        let (path, folder) = match self.merged.open_folder(0, path) {
            Ok(folder) => (path.to_owned(), folder),
            Err(Errno::ENOENT | Errno::ELOOP | Errno::ENOTDIR) => {
                let real = self.merged.resolve(path).map_err(|errno| self.failed(path, "resolve", errno))?;
                self.make_like_below(&real)?;
                let folder = self.merged.open_folder(0, &real).map_err(|errno| self.failed(&real, "open", errno))?;
                (real, folder)
            }
            Err(errno) => return Err(self.failed(path, "open", errno)),
        };
        self.last_folder = Some((path.clone(), folder));
        Ok(path)
    }

    /// Makes every missing folder on the way to `path`, each with the attributes of the one it will hide.
    fn make_like_below(&mut self, path: &Path) -> Result<(), ImageError> {
        let mut ways: Vec<&Path> = path.ancestors().filter(|way| !way.as_os_str().is_empty()).collect();
        ways.reverse();
        let mut made_inodes = 0;
        for way in ways {
            let fail = |step, errno| self.failed(way, step, errno);
            let layer = match self.merged.look(way).map_err(|errno| fail("look at", errno))? {
                Seen::Folder { layer: 0 } => continue,
                Seen::Folder { layer } => Some(layer),
                Seen::Absent => None,
                Seen::Link(_) | Seen::Other { .. } => {
                    return Err(fail("make folder", Errno::ENOTDIR));
                }
            };
            let (Some(name), Some(above)) = (way.file_name(), way.parent()) else {
                continue;
            };
            let above = self.merged.open_folder(0, above).map_err(|errno| fail("open folder of", errno))?;
            let replaced = make_folder(&above, name).map_err(|errno| fail("make folder", errno))?;
            made_inodes += 1;
            let made = self.merged.open_folder(0, way).map_err(|errno| fail("open", errno))?;
            if replaced {
                set_xattr(&made, OPAQUE.as_ref(), b"y").map_err(|errno| fail("mark opaque", errno))?;
            }
            if let Some(layer) = layer {
                let model = self.merged.open_folder(layer, way).map_err(|errno| fail("open below", errno))?;
                let mtime = copy_attributes(&model, &made).map_err(|errno| fail("copy attributes of", errno))?;
                self.folder_times.insert(way.to_owned(), mtime);
            }
        }
        self.done.inodes += made_inodes;
        Ok(())
    }

    fn folder(&mut self, path: &Path, name: &OsStr, attributes: &Attributes) -> Result<(), ImageError> {
        let exists = match fstatat(self.here(), name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits(),
            Err(Errno::ENOENT) => false,
            Err(errno) => return Err(self.failed(path, "look at", errno)),
        };
        let mut opaque = false;
        if !exists {
            let was_whiteout = self.is_whiteout(name);
            self.clear(path, name)?;
            mkdirat(self.here(), name, Mode::from_bits_truncate(0o755))
                .map_err(|e| self.failed(path, "make folder", e))?;
            opaque = was_whiteout;
        }
        let folder = openat(
            self.here(),
            name,
            OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
            Mode::empty(),
        )
        .map_err(|errno| self.failed(path, "open", errno))?;
        if opaque {
            // The layer both removed and remade it: nothing from below may show through.
            set_xattr(&folder, OPAQUE.as_ref(), b"y").map_err(|errno| self.failed(path, "mark opaque", errno))?;
        }
        self.apply_to_folder(&folder, path, attributes)
    }

    fn apply_to_folder(&mut self, folder: &OwnedFd, path: &Path, attributes: &Attributes) -> Result<(), ImageError> {
        self.apply_to_fd(folder, path, attributes)?;
        self.folder_times.insert(path.to_owned(), attributes.mtime);
        Ok(())
    }

    fn file<R: Read>(
        &mut self,
        path: &Path,
        name: &OsStr,
        content: &mut tar::Entry<'_, R>,
        attributes: &Attributes,
        guard: &Guard,
    ) -> Result<(), ImageError> {
        let file = openat(
            self.here(),
            name,
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
            Mode::from_bits_truncate(0o600),
        )
        .map_err(|errno| self.failed(path, "create", errno))?;
        let mut file = File::from(file);
        loop {
            let count = match content.read(&mut self.buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.damaged(guard, error)),
            };
            io::Write::write_all(&mut file, &self.buffer[..count])
                .map_err(|error| self.failed(path, "write", errno_of(error)))?;
            self.done.bytes += count as u64;
        }
        self.apply_to_fd(&file, path, attributes)?;
        futimens(&file, &attributes.mtime, &attributes.mtime).map_err(|errno| self.failed(path, "set times of", errno))
    }

    /// Owner first (a change of owner clears setuid and capabilities), then mode, then attributes.
    fn apply_to_fd(&self, fd: impl AsFd, path: &Path, attributes: &Attributes) -> Result<(), ImageError> {
        fchown(&fd, Some(Uid::from_raw(attributes.uid)), Some(Gid::from_raw(attributes.gid)))
            .map_err(|errno| self.failed(path, "set owner of", errno))?;
        fchmod(&fd, Mode::from_bits_truncate(attributes.mode))
            .map_err(|errno| self.failed(path, "set mode of", errno))?;
        for (name, value) in &attributes.xattrs {
            set_xattr(&fd, name, value).map_err(|errno| self.failed(path, "set an extended attribute of", errno))?;
        }
        Ok(())
    }

    /// For what cannot be opened: links, devices, pipes. Nobody else writes in the staging area, so the name is still
    /// what was just made.
    fn apply_by_name(
        &self,
        path: &Path,
        name: &OsStr,
        attributes: &Attributes,
        mode: Option<u32>,
    ) -> Result<(), ImageError> {
        let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
        fchownat(self.here(), name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
            .map_err(|errno| self.failed(path, "set owner of", errno))?;
        if let Some(mode) = mode {
            fchmodat(self.here(), name, Mode::from_bits_truncate(mode), FchmodatFlags::FollowSymlink)
                .map_err(|errno| self.failed(path, "set mode of", errno))?;
        }
        for (key, value) in &attributes.xattrs {
            let by_fd = PathBuf::from(format!("/proc/self/fd/{}", self.here().as_raw_fd())).join(name);
            xattr::set(&by_fd, key, value)
                .map_err(|error| self.failed(path, "set an extended attribute of", errno_of(error)))?;
        }
        utimensat(self.here(), name, &attributes.mtime, &attributes.mtime, UtimensatFlags::NoFollowSymlink)
            .map_err(|errno| self.failed(path, "set times of", errno))
    }

    fn hard_link(&mut self, path: &Path, name: &OsStr, target: &Path) -> Result<(), ImageError> {
        let parent = target.parent().unwrap_or(Path::new(""));
        let Some(target_name) = target.file_name() else {
            return Err(self.refused(path, "a hard link to the root"));
        };
        let real =
            self.merged.resolve(parent).map_err(|errno| self.failed(target, "resolve", errno))?.join(target_name);
        if real == path {
            return Ok(());
        }
        match self.merged.look(&real).map_err(|errno| self.failed(&real, "look at", errno))? {
            Seen::Absent => {
                return Err(self.refused(path, format!("a hard link to {}, which does not exist", target.display())));
            }
            Seen::Folder { .. } => return Err(self.refused(path, "a hard link to a folder")),
            Seen::Other { layer, .. } if layer > 0 => self.copy_up(layer, &real)?,
            Seen::Link(_) | Seen::Other { .. } => {}
        }
        let from = self
            .merged
            .open_folder(0, real.parent().unwrap_or(Path::new("")))
            .map_err(|errno| self.failed(&real, "open folder of", errno))?;
        self.clear(path, name)?;
        linkat(&from, target_name, self.here(), name, LinkatFlags::empty())
            .map_err(|errno| self.failed(path, "make hard link", errno))
    }

    /// Copies a regular file of a layer below into this one, as overlayfs does when a file is linked.
    fn copy_up(&mut self, layer: usize, path: &Path) -> Result<(), ImageError> {
        let fail = |step: &'static str| move |this: &Self, errno| this.failed(path, step, errno);
        let (parent, Some(name)) = (path.parent().unwrap_or(Path::new("")), path.file_name()) else {
            return Ok(());
        };
        self.make_like_below(parent)?;
        let below = self.merged.open_folder(layer, parent).map_err(|e| fail("open below")(self, e))?;
        let here = self.merged.open_folder(0, parent).map_err(|e| fail("open")(self, e))?;
        let nofollow = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let model =
            openat(&below, name, OFlag::O_RDONLY | nofollow, Mode::empty()).map_err(|e| fail("open below")(self, e))?;
        let mut model = File::from(model);
        if !model.metadata().map_err(|e| fail("look at")(self, errno_of(e)))?.is_file() {
            return Err(self.refused(path, "a hard link to a special file of a layer below"));
        }
        let made = openat(
            &here,
            name,
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | nofollow,
            Mode::from_bits_truncate(0o600),
        )
        .map_err(|e| fail("create")(self, e))?;
        let mut made = File::from(made);
        self.done.bytes += io::copy(&mut model, &mut made).map_err(|e| fail("copy up")(self, errno_of(e)))?;
        self.done.inodes += 1;
        let mtime = copy_attributes(&model, &made).map_err(|e| fail("copy attributes of")(self, e))?;
        futimens(&made, &mtime, &mtime).map_err(|e| fail("set times of")(self, e))
    }

    fn is_whiteout(&self, name: &OsStr) -> bool {
        fstatat(self.here(), name, AtFlags::AT_SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFCHR.bits() && stat.st_rdev == 0)
    }

    fn whiteout(&mut self, parent: &Path, name: &[u8], hidden: &OsStr) -> Result<(), ImageError> {
        let path = parent.join(hidden);
        if name == OPAQUE_WHITEOUT {
            return set_xattr(self.here(), OPAQUE.as_ref(), b"y")
                .map_err(|errno| self.failed(parent, "mark opaque", errno));
        }
        if name.starts_with(AUFS_METADATA) {
            return Ok(());
        }
        if hidden.is_empty() || hidden == "." || hidden == ".." {
            return Err(self.refused(&path, "a whiteout without a name"));
        }
        // A whiteout speaks of the layers below; what this layer itself brings stays, whatever the order of entries.
        match fstatat(self.here(), hidden, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) if stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits() => {
                let folder = self.merged.open_folder(0, &path).map_err(|errno| self.failed(&path, "open", errno))?;
                set_xattr(&folder, OPAQUE.as_ref(), b"y").map_err(|errno| self.failed(&path, "mark opaque", errno))
            }
            Ok(_) => Ok(()),
            Err(Errno::ENOENT) => mknodat(self.here(), hidden, SFlag::S_IFCHR, Mode::empty(), 0)
                .map_err(|errno| self.failed(&path, "make whiteout", errno)),
            Err(errno) => Err(self.failed(&path, "look at", errno)),
        }
    }

    /// Removes what an earlier entry of this layer made at the same place.
    fn clear(&mut self, path: &Path, name: &OsStr) -> Result<(), ImageError> {
        match unlinkat(self.here(), name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(Errno::EISDIR | Errno::EPERM) => {
                self.folder_times.retain(|folder, _| !folder.starts_with(path));
                remove_tree(self.here(), name).map_err(|errno| self.failed(path, "replace folder", errno))
            }
            Err(errno) => Err(self.failed(path, "replace", errno)),
        }
    }
}

/// Makes a folder, in place of a whiteout if one is there (then `true`).
fn make_folder(above: &OwnedFd, name: &OsStr) -> Result<bool, Errno> {
    let mode = Mode::from_bits_truncate(0o755);
    match mkdirat(above, name, mode) {
        Err(Errno::EEXIST) => {
            unlinkat(above, name, UnlinkatFlags::NoRemoveDir)?;
            mkdirat(above, name, mode).map(|()| true)
        }
        other => other.map(|()| false),
    }
}

/// Removes a folder with all it holds, through descriptors, never following a link.
fn remove_tree(parent: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let folder = openat(parent, name, flags, Mode::empty())?;
    let mut listing = nix::dir::Dir::from_fd(folder.try_clone().map_err(errno_of)?)?;
    for entry in listing.iter() {
        let entry = entry?;
        let child = OsStr::from_bytes(entry.file_name().to_bytes());
        if child == "." || child == ".." {
            continue;
        }
        match unlinkat(&folder, child, UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR | Errno::EPERM) => remove_tree(&folder, child)?,
            other => other?,
        }
    }
    unlinkat(parent, name, UnlinkatFlags::RemoveDir)
}

/// Sets an extended attribute. File systems without the namespace of a security label are no obstacle: the label would
/// mean nothing there.
fn set_xattr(fd: impl AsFd, name: &OsStr, value: &[u8]) -> Result<(), Errno> {
    let file = File::from(fd.as_fd().try_clone_to_owned().map_err(errno_of)?);
    match file.set_xattr(name, value).map_err(errno_of) {
        Err(Errno::ENOTSUP) if name.as_bytes().starts_with(b"security.") && name != "security.capability" => Ok(()),
        other => other,
    }
}

/// Copies owner, mode and extended attributes; returns the time of change, to be set last.
pub(super) fn copy_attributes(model: impl AsFd, made: impl AsFd) -> Result<TimeSpec, Errno> {
    let stat = nix::sys::stat::fstat(&model)?;
    fchown(&made, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    fchmod(&made, Mode::from_bits_truncate(stat.st_mode & 0o7777))?;
    let model = File::from(model.as_fd().try_clone_to_owned().map_err(errno_of)?);
    for name in model.list_xattr().map_err(errno_of)? {
        if FORBIDDEN_XATTRS.iter().any(|prefix| name.as_bytes().starts_with(prefix.as_bytes())) {
            continue;
        }
        if let Some(value) = model.get_xattr(&name).map_err(errno_of)? {
            set_xattr(&made, &name, &value)?;
        }
    }
    Ok(TimeSpec::new(stat.st_mtime, stat.st_mtime_nsec))
}

/// `seconds[.fraction]` as POSIX pax writes times.
fn pax_time(text: &str) -> Option<TimeSpec> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanoseconds: i64 = format!("{:0<9}", fraction.get(..fraction.len().min(9))?).parse().ok()?;
    if whole.starts_with('-') && nanoseconds > 0 {
        return Some(TimeSpec::new(seconds - 1, 1_000_000_000 - nanoseconds));
    }
    Some(TimeSpec::new(seconds, nanoseconds))
}
