//! The view of a layer being unpacked on top of those below it, as overlayfs will show it, without mounting anything.
//!
//! Layers are unpacked each into a folder of its own. Now and then an entry needs what lies below: a file whose parent
//! folder is not in this layer (it must get the attributes of the folder below, or be put where a symbolic link below
//! points), or a hard link to a file below. No symbolic link is ever followed by the kernel here: links are read and
//! resolved inside the root, so nothing can lead out of it.

use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2, readlinkat};
use nix::sys::stat::{SFlag, fstatat};

/// Symbolic links followed in one path, as the kernel bounds it.
const MAX_LINKS: usize = 40;
/// Components of one path, after links are expanded.
const MAX_COMPONENTS: usize = 4096;

/// The extended attribute that hides what is below a folder.
pub(super) const OPAQUE: &str = "trusted.overlay.opaque";

/// Layers, the one being unpacked first.
pub(super) struct Merged {
    layers: Vec<OwnedFd>,
}

/// What a path means in the merged view.
pub(super) enum Seen {
    /// Nothing there.
    Absent,
    /// A folder; the layer is the uppermost that has it.
    Folder { layer: usize },
    /// A symbolic link.
    Link(OsString),
    /// Anything else.
    Other { layer: usize },
}

impl Merged {
    /// `top` is being unpacked, `below` goes downwards.
    pub(super) fn new(top: OwnedFd, below: Vec<OwnedFd>) -> Self {
        let mut layers = vec![top];
        layers.extend(below);
        Self { layers }
    }

    /// The root of a layer; 0 is the one being unpacked.
    pub(super) fn root(&self, layer: usize) -> &OwnedFd {
        &self.layers[layer]
    }

    /// Looks at a path whose parent holds no symbolic links in the merged view.
    pub(super) fn look(&self, path: &Path) -> Result<Seen, Errno> {
        if path.as_os_str().is_empty() {
            return Ok(Seen::Folder { layer: 0 });
        }
        for (layer, root) in self.layers.iter().enumerate() {
            let how = OpenHow::new()
                .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
                .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
            match openat2(root, path, how) {
                Ok(found) => {
                    let stat = fstatat(&found, "", AtFlags::AT_EMPTY_PATH)?;
                    return Ok(match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
                        SFlag::S_IFDIR => Seen::Folder { layer },
                        SFlag::S_IFLNK => Seen::Link(readlinkat(root, path)?),
                        SFlag::S_IFCHR if stat.st_rdev == 0 => Seen::Absent,
                        _ => Seen::Other { layer },
                    });
                }
                Err(Errno::ENOENT) if !self.hides_below(layer, path)? => {}
                // A file, link or whiteout in place of one of the parents, or an opaque parent: what is below is hidden.
                // With RESOLVE_NO_SYMLINKS a final link fails like one on the way; tell them apart.
                Err(Errno::ELOOP) => {
                    return match self.final_link(layer, path)? {
                        Some(target) => Ok(Seen::Link(target)),
                        None => Ok(Seen::Absent),
                    };
                }
                Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(Seen::Absent),
                Err(errno) => return Err(errno),
            }
        }
        Ok(Seen::Absent)
    }

    fn final_link(&self, layer: usize, path: &Path) -> Result<Option<OsString>, Errno> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(None);
        };
        match self.open_folder(layer, parent) {
            Ok(folder) => match readlinkat(&folder, name) {
                Ok(target) => Ok(Some(target)),
                Err(Errno::EINVAL | Errno::ENOENT) => Ok(None),
                Err(errno) => Err(errno),
            },
            Err(Errno::ELOOP | Errno::ENOTDIR | Errno::ENOENT) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// Whether one of the parents of `path` in `layer` is marked opaque.
    fn hides_below(&self, layer: usize, path: &Path) -> Result<bool, Errno> {
        for parent in path.ancestors().skip(1) {
            if parent.as_os_str().is_empty() {
                break;
            }
            match self.open_folder(layer, parent) {
                Ok(folder) => {
                    if is_opaque(&folder)? {
                        return Ok(true);
                    }
                }
                Err(Errno::ENOENT) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(false)
    }

    /// Opens a real folder of one layer, without following links.
    pub(super) fn open_folder(&self, layer: usize, path: &Path) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        openat2(&self.layers[layer], path, how)
    }

    /// The real place of a folder: links on the way are resolved inside the root. What does not exist stays as written.
    pub(super) fn resolve(&self, path: &Path) -> Result<PathBuf, Errno> {
        let mut pending: Vec<OsString> = components(path.as_os_str());
        pending.reverse();
        let mut real = PathBuf::new();
        let mut links = 0;
        let mut steps = 0;
        while let Some(name) = pending.pop() {
            steps += 1;
            if steps > MAX_COMPONENTS {
                return Err(Errno::ENAMETOOLONG);
            }
            if name == ".." {
                real.pop();
                continue;
            }
            real.push(&name);
            match self.look(&real)? {
                Seen::Folder { .. } | Seen::Absent => {}
                Seen::Link(target) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::ELOOP);
                    }
                    real.pop();
                    if target.as_bytes().starts_with(b"/") {
                        real.clear();
                    }
                    pending.extend(components(&target).into_iter().rev());
                }
                Seen::Other { .. } => return Err(Errno::ENOTDIR),
            }
        }
        Ok(real)
    }
}

/// Whether a folder is marked opaque.
fn is_opaque(folder: &OwnedFd) -> Result<bool, Errno> {
    use xattr::FileExt;
    let file = std::fs::File::from(folder.try_clone().map_err(errno_of)?);
    Ok(file.get_xattr(OPAQUE).map_err(errno_of)?.as_deref() == Some(b"y"))
}

pub(super) fn errno_of(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO))
}

fn components(path: &OsStr) -> Vec<OsString> {
    Path::new(path)
        .components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        })
        .collect()
}

/// A path of an archive as a relative path without `.` and `..`; `None` if it leads out of the root. An absolute path
/// is meant from the root.
pub(super) fn normalize(path: &[u8]) -> Option<PathBuf> {
    let mut clean = PathBuf::new();
    if path.contains(&0) {
        return None;
    }
    for component in Path::new(OsStr::from_bytes(path)).components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                if !clean.pop() {
                    return None;
                }
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    Some(clean)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn climbing_paths_have_no_normal_form() {
        assert_eq!(normalize(b"a/./b"), Some("a/b".into()));
        assert_eq!(normalize(b"/etc/passwd"), Some("etc/passwd".into()));
        assert_eq!(normalize(b"a/../b"), Some("b".into()));
        assert_eq!(normalize(b"./"), Some("".into()));
        assert_eq!(normalize(b"../x"), None);
        assert_eq!(normalize(b"a/../../x"), None);
        assert_eq!(normalize(b"a\0b"), None);
    }

    proptest! {
        /// Against the obvious model: count depth component by component.
        #[test]
        fn normalize_agrees_with_counting(parts in prop::collection::vec(prop::sample::select(vec!["a", "b", "..", ".", ""]), 0..12)) {
            let text = parts.join("/");
            let mut stack = Vec::new();
            let mut escapes = false;
            for part in &parts {
                match *part {
                    ".." => escapes |= stack.pop().is_none(),
                    "." | "" => {}
                    name => stack.push(name),
                }
            }
            let expected = (!escapes).then(|| stack.iter().collect::<PathBuf>());
            prop_assert_eq!(normalize(text.as_bytes()), expected);
        }
    }

    #[test]
    fn links_resolve_inside_the_root() {
        let dir = tempfile::tempdir().expect("temp folder");
        let (top, low) = (dir.path().join("top"), dir.path().join("low"));
        fs::create_dir_all(low.join("usr/lib")).expect("mkdir");
        fs::create_dir_all(&top).expect("mkdir");
        symlink("usr/lib", low.join("lib")).expect("link");
        symlink("../../../../../..", low.join("out")).expect("link");
        symlink("/loop", low.join("loop")).expect("link");
        let open = |path: &Path| OwnedFd::from(fs::File::open(path).expect("open"));
        let merged = Merged::new(open(&top), vec![open(&low)]);
        assert_eq!(merged.resolve(Path::new("lib/modules")), Ok("usr/lib/modules".into()));
        assert_eq!(merged.resolve(Path::new("out/etc")), Ok("etc".into()));
        assert_eq!(merged.resolve(Path::new("loop/x")), Err(Errno::ELOOP));
        // A folder of the layer being unpacked hides the link below.
        fs::create_dir(top.join("lib")).expect("mkdir");
        assert_eq!(merged.resolve(Path::new("lib/modules")), Ok("lib/modules".into()));
    }
}
