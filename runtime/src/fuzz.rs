//! What fuzz targets reach of the inside.

use std::ffi::CStr;
use std::os::fd::{BorrowedFd, OwnedFd};

use oci_spec::runtime::LinuxIdMapping;

use crate::error::Result;
use crate::resolve::{Kind, find_or_make};

/// The place that a path names in a root, made where it is missing.
///
/// # Errors
/// What the kernel says.
pub fn place(root: BorrowedFd<'_>, path: &CStr, file: bool) -> coracle_sys::Result<OwnedFd> {
    find_or_make(root, path, if file { Kind::File } else { Kind::Folder })
}

/// The text of an id map.
///
/// # Errors
/// When the kernel would refuse it.
pub fn id_map(mappings: &[LinuxIdMapping]) -> Result<String> {
    crate::idmap::text("uidMappings", mappings)
}
