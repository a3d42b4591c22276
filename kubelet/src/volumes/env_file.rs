//! `fileKeyRef`: a variable from a file that a container of the pod has left in an emptyDir (KEP-3721).

use std::fs::File;
use std::io::Read;
use std::path::Path;

use k8s_openapi::api::core::v1::FileKeySelector;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;

/// Bytes of a file of variables.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// The variable that `wanted` names in the volume at `root`; `None` if it is optional and absent.
pub(super) fn read(root: &Path, wanted: &FileKeySelector) -> Result<Option<String>, String> {
    let (key, path) = (&wanted.key, &wanted.path);
    let found = match text(root, path).map_err(|error| format!("environment file {path:?}: {error}"))? {
        Some(text) => value(&text, key).map_err(|error| format!("environment file {path:?}: {error}"))?,
        None => None,
    };
    match found {
        None if wanted.optional != Some(true) => {
            Err(format!("environment variable key {key:?} not found in file {path:?}"))
        }
        found => Ok(found),
    }
}

/// The file's text; `None` if there is no file. Whoever fills the volume is not trusted: no link leads out of it.
fn text(root: &Path, path: &str) -> Result<Option<String>, String> {
    let folder = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    // A pipe would keep the one who opens it waiting.
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let how = OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let opened = open(root, folder, Mode::empty()).and_then(|root| openat2(&root, path, how));
    let file = match opened {
        Ok(file) => File::from(file),
        Err(Errno::ENOENT) => return Ok(None),
        Err(errno) => return Err(errno.to_string()),
    };
    if !file.metadata().map_err(|error| error.to_string())?.is_file() {
        return Err("it is no file".into());
    }
    let mut text = String::new();
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(|error| error.to_string())?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("it has more than {MAX_FILE_BYTES} bytes"));
    }
    Ok(Some(text))
}

/// The value of a key in lines `KEY=value`, `KEY='value'` (over several lines if need be), blank ones and comments. The last
/// of equal keys counts.
fn value(text: &str, key: &str) -> Result<Option<String>, String> {
    let mut found = None;
    let mut rest = text;
    while !rest.is_empty() {
        let (line, after) = rest.split_once('\n').unwrap_or((rest, ""));
        let trimmed = line.trim();
        if trimmed.is_empty() || trimmed.starts_with('#') {
            rest = after;
            continue;
        }
        let (name, begun) =
            rest.split_once('=').filter(|(name, _)| !name.contains('\n')).ok_or("a line without \"=\"")?;
        let value = match begun.strip_prefix('\'') {
            Some(quoted) => {
                let (value, after) = quoted.split_once('\'').ok_or("a quote that does not end")?;
                rest = after.split_once('\n').map_or("", |(_, next)| next);
                value
            }
            None => {
                rest = after;
                begun.split('\n').next().unwrap_or_default().trim()
            }
        };
        if name.trim() == key {
            found = Some(value.to_owned());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_plain_or_quoted() {
        let text = "# said first\nA=1\n\nB='two # words\nand a line'\n C =3 \nA=4";
        let of = |key: &str| value(text, key).expect("well formed");
        assert_eq!(of("A").as_deref(), Some("4"));
        assert_eq!(of("B").as_deref(), Some("two # words\nand a line"));
        assert_eq!(of("C").as_deref(), Some("3"));
        assert_eq!(of("D"), None);
        assert!(value("A='1", "A").is_err() && value("A", "A").is_err());
    }

    #[test]
    fn a_file_outside_of_the_volume_is_not_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path().join("volume");
        std::fs::create_dir(&root).expect("made");
        std::fs::write(folder.path().join("secret"), "A=1").expect("written");
        std::os::unix::fs::symlink("../secret", root.join("link")).expect("linked");
        std::fs::write(root.join("env"), "A=2").expect("written");
        let wanted = |path: &str, key: &str, optional: Option<bool>| {
            let (path, key) = (path.to_owned(), key.to_owned());
            read(&root, &FileKeySelector { path, key, optional, volume_name: "v".into() })
        };
        assert_eq!(wanted("env", "A", None), Ok(Some("2".into())));
        assert!(wanted("link", "A", Some(true)).is_err());
        assert!(wanted("env", "B", None).is_err() && wanted("none", "A", None).is_err());
        assert_eq!((wanted("env", "B", Some(true)), wanted("none", "A", Some(true))), (Ok(None), Ok(None)));
    }
}
