//! `hostPath` volumes with their checks of type.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::{Component, Path};

use async_trait::async_trait;

use super::error::{IoContext, VolumeError};
use super::plugin::{Context, Plugin, Ready};

/// A path of the node.
pub(super) struct HostPathVolume;

#[async_trait]
impl Plugin for HostPathVolume {
    fn folder(&self) -> &'static str {
        "kubernetes.io~host-path"
    }

    async fn setup(&self, context: &Context<'_>) -> Result<Ready, VolumeError> {
        let Some(source) = &context.volume.host_path else { return Err(context.invalid("it is no hostPath")) };
        let path = Path::new(&source.path);
        check(path, source.type_.as_deref().unwrap_or_default()).map_err(|error| match error {
            Refused::Path(reason) => context.invalid(reason),
            Refused::Volume(error) => error,
        })?;
        Ok(Ready::at(path))
    }
}

/// Why a path was refused.
pub(super) enum Refused {
    Path(String),
    Volume(VolumeError),
}

impl From<VolumeError> for Refused {
    fn from(error: VolumeError) -> Self {
        Self::Volume(error)
    }
}

/// Checks that the path is of the type asked for, making it where the type says so.
pub(super) fn check(path: &Path, kind: &str) -> Result<(), Refused> {
    if !path.is_absolute() || path.components().any(|component| component == Component::ParentDir) {
        return Err(Refused::Path(format!("hostPath {} must be absolute and not contain \"..\"", path.display())));
    }
    let meta = match fs::metadata(path) {
        Ok(meta) => Some(meta),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            return Err(Refused::Volume(VolumeError::Io { step: "look at", path: path.to_owned(), source: error }));
        }
    };
    let file_type = meta.map(|meta| meta.file_type());
    let (wanted, fits) = match kind {
        // No check; a folder is made when nothing is there, as container runtimes do for the source of a bind mount.
        "" => {
            if file_type.is_none() {
                DirBuilder::new().recursive(true).mode(0o755).create(path).step("create folder", path)?;
            }
            return Ok(());
        }
        "DirectoryOrCreate" => {
            if file_type.is_none() {
                DirBuilder::new().recursive(true).mode(0o755).create(path).step("create folder", path)?;
                return Ok(());
            }
            ("directory", file_type.is_some_and(|t| t.is_dir()))
        }
        "FileOrCreate" => {
            if file_type.is_none() {
                OpenOptions::new().write(true).create_new(true).mode(0o644).open(path).step("create", path)?;
                return Ok(());
            }
            ("file", file_type.is_some_and(|t| t.is_file()))
        }
        "Directory" => ("directory", file_type.is_some_and(|t| t.is_dir())),
        "File" => ("file", file_type.is_some_and(|t| t.is_file())),
        "Socket" => ("socket file", file_type.is_some_and(|t| t.is_socket())),
        "CharDevice" => ("character device", file_type.is_some_and(|t| t.is_char_device())),
        "BlockDevice" => ("block device", file_type.is_some_and(|t| t.is_block_device())),
        other => return Err(Refused::Path(format!("{other} is an invalid hostPath type"))),
    };
    if fits { Ok(()) } else { Err(Refused::Volume(VolumeError::HostPathType { path: path.to_owned(), wanted })) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_checked() {
        let dir = tempfile::tempdir().expect("temp folder");
        let at = |name: &str| dir.path().join(name);
        let ok = |path: &Path, kind: &str| check(path, kind).is_ok();
        assert!(ok(&at("made"), "DirectoryOrCreate") && at("made").is_dir());
        assert!(ok(&at("file"), "FileOrCreate") && at("file").is_file());
        assert!(ok(&at("file"), "File") && !ok(&at("file"), "Directory"));
        assert!(ok(&at("made"), "Directory") && !ok(&at("made"), "File"));
        assert!(!ok(&at("none"), "Directory") && !ok(&at("none"), "Socket"));
        assert!(ok(Path::new("/dev/null"), "CharDevice") && !ok(Path::new("/dev/null"), "BlockDevice"));
        assert!(!ok(Path::new("relative"), "") && !ok(Path::new("/a/../b"), ""));
        assert!(!ok(&at("file"), "Bogus"));
    }
}
