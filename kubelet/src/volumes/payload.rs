//! The files of configMap, secret, downwardAPI and projected volumes as values.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use k8s_openapi::api::core::v1::KeyToPath;

use super::error::VolumeError;

/// The mode of files where nothing says otherwise.
pub(super) const DEFAULT_MODE: u32 = 0o644;
/// Files of one volume.
const MAX_FILES: usize = 20_000;

/// One file.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct FileEntry {
    pub(super) bytes: Vec<u8>,
    pub(super) mode: u32,
    /// Owner, where it is not root.
    pub(super) owner: Option<u32>,
}

/// Files by path relative to the volume.
pub(super) type Payload = BTreeMap<String, FileEntry>;

/// A mode of the API (an `i32` of permission bits).
pub(super) fn mode(given: Option<i32>, default: u32) -> u32 {
    given.and_then(|mode| u32::try_from(mode).ok()).map_or(default, |mode| mode & 0o777)
}

/// Refuses paths that are absolute, climb, or take the names that the atomic writer needs.
pub(super) fn check_path(path: &str, volume: &str) -> Result<(), VolumeError> {
    let bad =
        |reason: &str| VolumeError::Invalid { volume: volume.to_owned(), reason: format!("path {path:?} {reason}") };
    if path.is_empty() || path.contains('\0') {
        return Err(bad("is empty or holds a zero byte"));
    }
    if path.len() > 4096 {
        return Err(bad("is too long"));
    }
    if !Path::new(path).components().all(|component| matches!(component, Component::Normal(_) | Component::CurDir)) {
        return Err(bad("must be relative and not contain \"..\""));
    }
    if path.starts_with("..") {
        return Err(bad("must not begin with \"..\""));
    }
    Ok(())
}

/// Adds the keys of an object: all of them, or those that `items` names under the paths it gives.
pub(super) fn add_items(
    payload: &mut Payload,
    data: &BTreeMap<String, Vec<u8>>,
    items: Option<&[KeyToPath]>,
    default_mode: u32,
    optional: bool,
    kind: &'static str,
    volume: &str,
) -> Result<(), VolumeError> {
    match items.filter(|items| !items.is_empty()) {
        None => {
            for (key, bytes) in data {
                insert(payload, key, FileEntry { bytes: bytes.clone(), mode: default_mode, owner: None }, volume)?;
            }
        }
        Some(items) => {
            for item in items {
                let Some(bytes) = data.get(&item.key) else {
                    if optional {
                        continue;
                    }
                    return Err(VolumeError::MissingKey { kind, key: item.key.clone() });
                };
                let entry = FileEntry { bytes: bytes.clone(), mode: mode(item.mode, default_mode), owner: None };
                insert(payload, &item.path, entry, volume)?;
            }
        }
    }
    Ok(())
}

/// Adds one file.
pub(super) fn insert(payload: &mut Payload, path: &str, entry: FileEntry, volume: &str) -> Result<(), VolumeError> {
    check_path(path, volume)?;
    if payload.len() >= MAX_FILES {
        return Err(VolumeError::TooMany { what: "number of files in a volume", limit: MAX_FILES });
    }
    payload.insert(path.to_owned(), entry);
    Ok(())
}
