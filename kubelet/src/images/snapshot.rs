//! Snapshots: the writable part of a container's root file system over an image's layers.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use super::digest::Digest;
use super::error::{ImageError, IoContext};
use super::store::{Image, ImageStore};

/// What overlayfs needs to show a container its root file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Lower directories, uppermost first, as `lowerdir=` wants them.
    pub lowerdirs: Vec<PathBuf>,
    /// Upper directory.
    pub upper: PathBuf,
    /// Work directory, on the same file system.
    pub work: PathBuf,
}

impl Snapshot {
    /// The options of mount(2): `lowerdir=…,upperdir=…,workdir=…`. Colons and commas in paths are escaped. Kernels take
    /// one page of them; an image with more than about a hundred layers needs fsconfig(2) with [`Self::lowerdirs`].
    pub fn mount_options(&self) -> String {
        format!("{},upperdir={},workdir={}", self.lower_option(), escape(&self.upper), escape(&self.work))
    }

    /// `lowerdir=…` alone, for a read-only mount.
    pub fn lower_option(&self) -> String {
        let lower: Vec<String> = self.lowerdirs.iter().map(|path| escape(path)).collect();
        format!("lowerdir={}", lower.join(":"))
    }
}

/// overlayfs separates by `:` and `,` and takes `\` as escape.
fn escape(path: &std::path::Path) -> String {
    let mut escaped = String::new();
    for character in path.to_string_lossy().chars() {
        if matches!(character, ':' | ',' | '\\') {
            escaped.push('\\');
        }
        escaped.push(character);
    }
    escaped
}

impl ImageStore {
    /// Where a container's own files lie.
    pub fn upper(&self, container: &str) -> PathBuf {
        self.layout.snapshots().join(container).join("fs")
    }

    /// Makes the writable folders for a container, or finds them: asking twice gives the same snapshot.
    ///
    /// # Errors
    /// When the container has a snapshot of another image, when the image has gone, or the folders cannot be made.
    pub fn snapshot(&self, container: &str, image: &Image) -> Result<Snapshot, ImageError> {
        check_container(container)?;
        let id: Digest = image.id.parse()?;
        let _adding = self.layout.adding()?;
        self.last_used.lock().insert(image.id.clone(), std::time::Instant::now());
        let folder = self.layout.snapshots().join(container);
        let snapshot = Snapshot {
            lowerdirs: image.layers.iter().rev().cloned().collect(),
            upper: folder.join("fs"),
            work: folder.join("work"),
        };
        match self.layout.snapshot_image(container)? {
            Some(known) if known == id => return Ok(snapshot),
            Some(known) => {
                let what = format!("snapshot of container {container}");
                return Err(ImageError::document(what, format!("it belongs to image {known}, not {id}")));
            }
            None => {}
        }
        for layer in &image.layers {
            // Removed by another process since the image was resolved.
            if !layer.is_dir() {
                return Err(ImageError::NotFound { reference: image.id.clone() });
            }
        }
        // The link to the image comes last: without it the folder counts as unfinished and is made anew.
        if folder.exists() {
            fs::remove_dir_all(&folder).step("remove unfinished", &folder)?;
        }
        for path in [&folder, &snapshot.upper, &snapshot.work] {
            DirBuilder::new().mode(0o755).create(path).step("create folder", path)?;
        }
        if let Some(top) = snapshot.lowerdirs.first() {
            // The root of the merged view is the upper one's.
            let (model, made) =
                (File::open(top).step("open", top)?, File::open(&snapshot.upper).step("open", &snapshot.upper)?);
            super::unpack::copy_attributes(&model, &made).step("copy attributes of root to", &snapshot.upper)?;
        }
        let link = folder.join("image");
        std::os::unix::fs::symlink(id.as_str(), &link).step("create", &link)?;
        Ok(snapshot)
    }

    /// Removes a container's writable folders; they must not be mounted any more. Nothing happens if there are none.
    ///
    /// # Errors
    /// When they cannot be removed.
    pub fn remove_snapshot(&self, container: &str) -> Result<(), ImageError> {
        check_container(container)?;
        let folder = self.layout.snapshots().join(container);
        match fs::remove_dir_all(&folder) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(ImageError::io("remove", &folder, error)),
        }
    }

    /// The containers that have a snapshot, or an unfinished one.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn snapshot_names(&self) -> Result<Vec<String>, ImageError> {
        let root = self.layout.snapshots();
        let entries = fs::read_dir(&root).step("read folder", &root)?;
        entries.map(|entry| Ok(entry.step("read folder", &root)?.file_name().to_string_lossy().into_owned())).collect()
    }

    /// The containers that have a snapshot, each with its image's ID.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn snapshots(&self) -> Result<Vec<(String, String)>, ImageError> {
        Ok(self.layout.read_snapshots()?.into_iter().map(|(container, id)| (container, id.to_string())).collect())
    }
}

impl super::layout::Layout {
    fn snapshot_image(&self, container: &str) -> Result<Option<Digest>, ImageError> {
        let link = self.snapshots().join(container).join("image");
        match fs::read_link(&link) {
            Ok(target) => target.to_string_lossy().parse().map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ImageError::io("read", &link, error)),
        }
    }

    /// Every finished snapshot: container and image.
    pub(super) fn read_snapshots(&self) -> Result<Vec<(String, Digest)>, ImageError> {
        let root = self.snapshots();
        let mut snapshots = Vec::new();
        for entry in fs::read_dir(&root).step("read folder", &root)? {
            let name = entry.step("read folder", &root)?.file_name().to_string_lossy().into_owned();
            if let Some(image) = self.snapshot_image(&name)? {
                snapshots.push((name, image));
            }
        }
        Ok(snapshots)
    }
}

/// A container ID becomes a folder's name.
fn check_container(container: &str) -> Result<(), ImageError> {
    let fits = (1..=128).contains(&container.len())
        && container.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
    if fits { Ok(()) } else { Err(ImageError::document("container ID", format!("{container:?} cannot name a folder"))) }
}
