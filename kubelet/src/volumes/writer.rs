//! Writing a set of files so that a reader sees either the old set or the new one, never a mixture.
//!
//! ```text
//! ..2026_01_31_12_00_00.abc/key     the files
//! ..data -> ..2026_01_31_12_00_00.abc
//! key -> ..data/key                 what programs open
//! ```
//! The swap is one rename of `..data`. Source: kubernetes `pkg/volume/util/atomic_writer.go`, whose layout programs rely on.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use super::error::{IoContext, VolumeError};
use super::payload::Payload;

const DATA: &str = "..data";
const DATA_TMP: &str = "..data_tmp";

/// Brings the files in `folder` to `payload`. Returns whether anything changed.
pub(super) fn write(folder: &Path, payload: &Payload, group: Option<u32>) -> Result<bool, VolumeError> {
    DirBuilder::new().recursive(true).mode(0o755).create(folder).step("create folder", folder)?;
    fs::set_permissions(folder, fs::Permissions::from_mode(if group.is_some() { 0o2775 } else { 0o777 }))
        .step("set mode of", folder)?;
    if let Some(group) = group {
        chown(folder, None, Some(group)).step("set group of", folder)?;
        fs::set_permissions(folder, fs::Permissions::from_mode(0o2777)).step("set mode of", folder)?;
    }
    let data = folder.join(DATA);
    let old = match fs::read_link(&data) {
        Ok(target) => Some(folder.join(target)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).step("read link", &data),
    };
    let unchanged = match &old {
        Some(old) => same(old, payload, group)?,
        None => false,
    };
    if !unchanged {
        let name = format!("{}.", jiff::Zoned::now().strftime("..%Y_%m_%d_%H_%M_%S"));
        let fresh = tempfile::Builder::new().prefix(&name).tempdir_in(folder).step("create folder in", folder)?;
        fill(fresh.path(), payload, group)?;
        let target = fresh.keep();
        let link = folder.join(DATA_TMP);
        remove_if_there(&link)?;
        symlink(target.file_name().unwrap_or_default(), &link).step("create link", &link)?;
        fs::rename(&link, &data).step("rename to", &data)?;
    }
    // Also when nothing changed: a crash may have come between the swap and these.
    link_names(folder, payload)?;
    clear_old(folder)?;
    Ok(!unchanged)
}

/// Whether the folder holds exactly the payload.
fn same(folder: &Path, payload: &Payload, group: Option<u32>) -> Result<bool, VolumeError> {
    let mut found = 0;
    let mut pending = vec![folder.to_owned()];
    while let Some(path) = pending.pop() {
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error).step("read folder", &path),
        };
        for entry in entries {
            let path = entry.step("read folder", &path)?.path();
            let meta = fs::symlink_metadata(&path).step("look at", &path)?;
            if meta.is_dir() {
                pending.push(path);
                continue;
            }
            let name = path.strip_prefix(folder).unwrap_or(&path).to_string_lossy().into_owned();
            let Some(wanted) = payload.get(&name).or_else(|| payload.get(&format!("./{name}"))) else {
                return Ok(false);
            };
            let same_attributes = meta.mode() & 0o777 == effective_mode(wanted.mode, group)
                && meta.uid() == wanted.owner.unwrap_or(0)
                && group.is_none_or(|group| meta.gid() == group);
            if !same_attributes
                || meta.len() != wanted.bytes.len() as u64
                || fs::read(&path).step("read", &path)? != wanted.bytes
            {
                return Ok(false);
            }
            found += 1;
        }
    }
    Ok(found == payload.len())
}

/// A volume with a group is readable by that group, as for every volume that fsGroup applies to.
fn effective_mode(mode: u32, group: Option<u32>) -> u32 {
    if group.is_some() { mode | 0o440 } else { mode }
}

fn fill(folder: &Path, payload: &Payload, group: Option<u32>) -> Result<(), VolumeError> {
    let folder_mode = if group.is_some() { 0o2755 } else { 0o755 };
    let own = |path: &Path| -> Result<(), VolumeError> {
        if let Some(group) = group {
            chown(path, None, Some(group)).step("set group of", path)?;
        }
        fs::set_permissions(path, fs::Permissions::from_mode(folder_mode)).step("set mode of", path)
    };
    own(folder)?;
    let mut made = BTreeSet::new();
    for (name, entry) in payload {
        let path = folder.join(name);
        let parents: Vec<&Path> = path.ancestors().skip(1).take_while(|parent| *parent != folder).collect();
        for parent in parents.into_iter().rev() {
            if made.insert(parent.to_owned()) {
                DirBuilder::new().recursive(true).mode(0o755).create(parent).step("create folder", parent)?;
                own(parent)?;
            }
        }
        let mut file: File =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).step("create", &path)?;
        file.write_all(&entry.bytes).step("write", &path)?;
        if entry.owner.is_some() || group.is_some() {
            std::os::unix::fs::fchown(&file, entry.owner, group).step("set owner of", &path)?;
        }
        // Exactly, whatever the umask.
        let mode = fs::Permissions::from_mode(effective_mode(entry.mode, group));
        file.set_permissions(mode).step("set mode of", &path)?;
    }
    Ok(())
}

/// The first components of all paths.
fn top_names(payload: &Payload) -> BTreeSet<String> {
    payload
        .keys()
        .filter_map(|path| path.split('/').find(|part| !part.is_empty() && *part != "."))
        .map(str::to_owned)
        .collect()
}

fn link_names(folder: &Path, payload: &Payload) -> Result<(), VolumeError> {
    let wanted = top_names(payload);
    for entry in fs::read_dir(folder).step("read folder", folder)? {
        let path = entry.step("read folder", folder)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !name.starts_with("..") && !wanted.contains(&name) {
            remove_if_there(&path)?;
        }
    }
    for name in wanted {
        let link = folder.join(&name);
        match symlink(PathBuf::from(DATA).join(&name), &link) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).step("create link", &link),
        }
    }
    Ok(())
}

/// Removes what `..data` no longer leads to.
fn clear_old(folder: &Path) -> Result<(), VolumeError> {
    let data = folder.join(DATA);
    let current = fs::read_link(&data).step("read link", &data)?;
    for entry in fs::read_dir(folder).step("read folder", folder)? {
        let path = entry.step("read folder", folder)?.path();
        let name = path.file_name().unwrap_or_default();
        let text = name.to_string_lossy();
        if text.starts_with("..") && text != DATA && Some(name) != current.file_name() {
            match fs::symlink_metadata(&path).step("look at", &path)?.is_dir() {
                true => fs::remove_dir_all(&path).step("remove", &path)?,
                false => remove_if_there(&path)?,
            }
        }
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> Result<(), VolumeError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).step("remove", path),
    }
}

#[cfg(test)]
mod tests {
    use super::super::payload::FileEntry;
    use super::*;
    use proptest::prelude::*;

    fn payload(files: &[(&str, &str)]) -> Payload {
        files
            .iter()
            .map(|(path, text)| {
                ((*path).to_owned(), FileEntry { bytes: text.as_bytes().to_vec(), mode: 0o644, owner: None })
            })
            .collect()
    }

    fn read(folder: &Path) -> std::collections::BTreeMap<String, String> {
        let mut files = std::collections::BTreeMap::new();
        let mut pending: Vec<PathBuf> = fs::read_dir(folder)
            .expect("folder")
            .map(|entry| entry.expect("entry").path())
            .filter(|path| !path.file_name().expect("name").to_string_lossy().starts_with(".."))
            .collect();
        while let Some(path) = pending.pop() {
            if path.is_dir() {
                pending.extend(fs::read_dir(&path).expect("folder").map(|entry| entry.expect("entry").path()));
            } else {
                let name = path.strip_prefix(folder).expect("below").to_string_lossy().into_owned();
                files.insert(name, fs::read_to_string(&path).expect("file"));
            }
        }
        files
    }

    #[test]
    fn a_reader_of_the_old_set_keeps_it_until_the_swap() {
        let dir = tempfile::tempdir().expect("temp folder");
        assert!(write(dir.path(), &payload(&[("a", "1"), ("d/b", "1")]), None).expect("write"));
        let before = fs::read_link(dir.path().join(DATA)).expect("link");
        assert!(!write(dir.path(), &payload(&[("a", "1"), ("d/b", "1")]), None).expect("write"), "nothing changed");
        assert_eq!(fs::read_link(dir.path().join(DATA)).expect("link"), before);
        assert!(write(dir.path(), &payload(&[("a", "2")]), None).expect("write"));
        assert_eq!(read(dir.path()), [("a".to_owned(), "2".to_owned())].into());
        assert!(!dir.path().join(before).exists(), "the old set is gone");
    }

    #[test]
    fn attributes_are_exact() {
        let dir = tempfile::tempdir().expect("temp folder");
        let mut files = payload(&[("key", "x")]);
        files.get_mut("key").expect("key").mode = 0o400;
        write(dir.path(), &files, None).expect("write");
        assert_eq!(fs::metadata(dir.path().join("key")).expect("meta").mode() & 0o7777, 0o400);
        write(dir.path(), &files, Some(1234)).expect("write");
        let meta = fs::metadata(dir.path().join("key")).expect("meta");
        assert_eq!((meta.mode() & 0o7777, meta.gid()), (0o440, 1234));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Whatever was there before, afterwards exactly the payload is.
        #[test]
        fn any_sequence_ends_in_the_last_set(sets in prop::collection::vec(
            prop::collection::btree_map("[a-c](/[x-z])?", "[0-9]{0,3}", 0..4), 1..4)) {
            let dir = tempfile::tempdir().expect("temp folder");
            for set in &sets {
                // A file cannot be a folder at the same time.
                let mut files = Payload::new();
                for (path, text) in set {
                    if !set.keys().any(|other| other.starts_with(&format!("{path}/"))) {
                        files.insert(path.clone(), FileEntry { bytes: text.as_bytes().to_vec(), mode: 0o644, owner: None });
                    }
                }
                write(dir.path(), &files, None).expect("write");
                let expected: std::collections::BTreeMap<String, String> = files
                    .iter()
                    .map(|(path, entry)| (path.clone(), String::from_utf8(entry.bytes.clone()).expect("text")))
                    .collect();
                prop_assert_eq!(read(dir.path()), expected);
            }
        }
    }
}
