//! User and group id maps.

use crate::error::{Error, Result};
use oci_spec::runtime::LinuxIdMapping;
use std::ffi::CString;
use std::fmt::Write;

/// More lines than this the kernel refuses (`UID_GID_MAP_MAX_EXTENTS`).
const MAX_EXTENTS: usize = 340;

/// Where the maps of an id-mapped mount come from.
#[derive(Clone, Debug)]
pub(crate) enum Maps {
    /// The specification, in the text that the kernel takes.
    Listed { uid_map: String, gid_map: String },
    /// The user namespace of this path, which the container joins.
    OfNamespace(CString),
}

/// The text that `uid_map` and `gid_map` take.
pub(crate) fn text(field: &str, mappings: &[LinuxIdMapping]) -> Result<String> {
    if mappings.is_empty() || mappings.len() > MAX_EXTENTS {
        return Err(Error::config(field, format!("needs 1 to {MAX_EXTENTS} mappings, has {}", mappings.len())));
    }
    let mut text = String::new();
    for (position, mapping) in mappings.iter().enumerate() {
        let ends = |start: u32| start.checked_add(mapping.size()).filter(|_| mapping.size() > 0);
        if ends(mapping.host_id()).is_none() || ends(mapping.container_id()).is_none() {
            return Err(Error::config(field, format!("mapping {position} is empty or goes beyond the last id")));
        }
        let overlap = |a: u32, b: u32, other: &LinuxIdMapping| {
            u64::from(a) < u64::from(b) + u64::from(other.size())
                && u64::from(b) < u64::from(a) + u64::from(mapping.size())
        };
        if mappings[..position].iter().any(|other| {
            overlap(mapping.host_id(), other.host_id(), other)
                || overlap(mapping.container_id(), other.container_id(), other)
        }) {
            return Err(Error::config(field, format!("mapping {position} overlaps an earlier one")));
        }
        let _ = writeln!(text, "{} {} {}", mapping.container_id(), mapping.host_id(), mapping.size());
    }
    Ok(text)
}
