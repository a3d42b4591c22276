//! subPath and subPathExpr: a part of a volume, opened so that no symbolic link can lead out of it, also not one that
//! a running container swaps in at the wrong moment.

use std::fs::{self, DirBuilder, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::{Mode, SFlag, fchmod, fstat, mkdirat};

use super::error::{IoContext, VolumeError};
use super::mounts;

/// Symbolic links may point within the volume; nothing may leave it.
fn inside() -> ResolveFlag {
    ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS
}

/// Opens `path` in the volume at `root`, making folders that are missing (with the mode of the volume's root).
fn open_inside(root: &Path, path: &Path, refuse: impl Fn(String) -> VolumeError) -> Result<OwnedFd, VolumeError> {
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let base =
        open(root, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).step("open volume", root)?;
    let how = || OpenHow::new().flags(flags).resolve(inside());
    let explain = |errno: Errno| match errno {
        Errno::EXDEV => refuse("it leads out of the volume".into()),
        Errno::ELOOP => refuse("it holds too many symbolic links".into()),
        Errno::ENOTDIR => refuse("a part of it is not a folder".into()),
        other => refuse(std::io::Error::from(other).to_string()),
    };
    match openat2(&base, path, how()) {
        Ok(found) => return Ok(found),
        Err(Errno::ENOENT) => {}
        Err(errno) => return Err(explain(errno)),
    }
    let mode = Mode::from_bits_truncate(fs::metadata(root).step("look at", root)?.mode() & 0o7777);
    let mut here = base;
    let folder = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut walked = PathBuf::new();
    for component in path.components() {
        let Component::Normal(name) = component else { continue };
        walked.push(name);
        // From the root each time: a relative link may go up and down again, as long as it stays inside.
        let base = open(root, folder, Mode::empty()).step("open volume", root)?;
        here = match openat2(&base, &walked, OpenHow::new().flags(folder).resolve(inside())) {
            Ok(found) => found,
            Err(Errno::ENOENT) => {
                match mkdirat(&here, name, Mode::from_bits_truncate(0o700)) {
                    Ok(()) | Err(Errno::EEXIST) => {}
                    Err(errno) => return Err(explain(errno)),
                }
                let how = OpenHow::new()
                    .flags(folder | OFlag::O_NOFOLLOW)
                    .resolve(inside() | ResolveFlag::RESOLVE_NO_SYMLINKS);
                let made = openat2(&here, name, how).map_err(explain)?;
                fchmod(&made, mode).map_err(explain)?;
                made
            }
            Err(errno) => return Err(explain(errno)),
        };
    }
    Ok(here)
}

/// Binds a part of a volume to `target`, from where it is mounted into the container, and returns `target`.
pub(super) fn expose(volume: &str, root: &Path, path: &str, target: &Path) -> Result<PathBuf, VolumeError> {
    let refuse = |reason: String| VolumeError::SubPath { volume: volume.to_owned(), path: path.to_owned(), reason };
    let wanted = Path::new(path);
    if wanted.is_absolute() || wanted.components().any(|part| part == Component::ParentDir) || path.contains('\0') {
        return Err(refuse("it must be relative and not contain \"..\"".into()));
    }
    let found = open_inside(root, wanted, refuse)?;
    mounts::unmount(target)?;
    let parent = target.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o750).create(parent).step("create folder", parent)?;
    let is_folder = fstat(&found).step("look at", root)?.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits();
    match fs::symlink_metadata(target) {
        Ok(meta) if meta.is_dir() == is_folder => {}
        Ok(meta) if meta.is_dir() => fs::remove_dir(target).step("remove", target)?,
        Ok(_) => fs::remove_file(target).step("remove", target)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).step("look at", target),
    }
    if is_folder {
        DirBuilder::new().recursive(true).mode(0o750).create(target).step("create folder", target)?;
    } else {
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o640).open(target).step("create", target)?;
    }
    // What was opened is what gets bound, whatever the name means by now.
    mounts::bind(Path::new(&format!("/proc/self/fd/{}", found.as_raw_fd())), target)?;
    Ok(target.to_owned())
}

/// Replaces `$(NAME)` by the environment's values; `$$` is a dollar. A name without a value is an error here, other than
/// in commands.
pub(super) fn expand(text: &str, environment: &[(String, String)]) -> Result<String, String> {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        let tail = &rest[at + 1..];
        if let Some(after) = tail.strip_prefix('$') {
            expanded.push('$');
            rest = after;
        } else if let Some((name, after)) = tail.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            // The last of equal names counts, as in the process's environment.
            let value = environment.iter().rev().find(|(known, _)| known == name);
            expanded.push_str(&value.ok_or_else(|| format!("missing value for {name:?}"))?.1);
            rest = after;
        } else {
            expanded.push('$');
            rest = tail;
        }
    }
    expanded.push_str(rest);
    Ok(expanded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::symlink;

    fn refuse(reason: String) -> VolumeError {
        VolumeError::SubPath { volume: "v".into(), path: "p".into(), reason }
    }

    #[test]
    fn links_out_of_the_volume_are_refused() {
        let dir = tempfile::tempdir().expect("temp folder");
        let root = dir.path().join("volume");
        fs::create_dir_all(root.join("in")).expect("mkdir");
        fs::write(dir.path().join("secret"), "x").expect("write");
        symlink("../secret", root.join("up")).expect("link");
        symlink("/etc", root.join("absolute")).expect("link");
        symlink("in", root.join("fine")).expect("link");
        for bad in ["up", "absolute", "absolute/passwd", "fine/../../secret"] {
            assert!(open_inside(&root, Path::new(bad), refuse).is_err(), "{bad}");
        }
        for good in ["in", "fine", "new/deep/folder", "fine/new"] {
            open_inside(&root, Path::new(good), refuse).expect(good);
        }
        assert!(root.join("in/new").is_dir() && root.join("new/deep/folder").is_dir());
        assert!(!dir.path().join("passwd").exists());
    }

    #[test]
    fn expressions_expand() {
        let environment =
            [("A".to_owned(), "1".to_owned()), ("B".to_owned(), "x/y".to_owned()), ("A".to_owned(), "2".to_owned())];
        assert_eq!(expand("$(A)/$(B)", &environment), Ok("2/x/y".into()));
        assert_eq!(expand("$$(A)$", &environment), Ok("$(A)$".into()));
        assert!(expand("$(NONE)", &environment).is_err());
    }

    proptest! {
        #[test]
        fn text_without_dollars_stays(text in "[^$]{0,40}") {
            prop_assert_eq!(expand(&text, &[]), Ok(text));
        }

        #[test]
        fn expanding_never_panics(text in "[$()A-C]{0,30}") {
            let _outcome = expand(&text, &[("A".into(), String::new())]);
        }
    }
}
