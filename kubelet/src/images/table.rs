//! `images.json`: which images there are and what they are called.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::error::{ImageError, IoContext};
use super::layout::{Layout, replace};
use super::reference::{Reference, image_id};

/// Images in one store: more than any node holds, and a bound for the table kept in memory.
const MAX_IMAGES: usize = 10_000;

/// One image: everything derived from its configuration, plus its names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ImageRecord {
    /// The manifest that led to the configuration.
    pub(super) manifest: Digest,
    /// Digests of the layer blobs, lowest first.
    pub(super) blobs: Vec<Digest>,
    /// Chain IDs of the layers, lowest first.
    pub(super) chain: Vec<Digest>,
    /// Bytes of the blobs.
    pub(super) bytes: u64,
    /// `docker.io/library/nginx:latest`
    pub(super) tags: BTreeSet<String>,
    /// `docker.io/library/nginx@sha256:…`: the digest may be that of the index through which it was pulled.
    pub(super) digests: BTreeSet<String>,
    /// When it came, Unix seconds.
    pub(super) added_at: i64,
    /// Never collected as garbage.
    #[serde(default)]
    pub(super) pinned: bool,
}

/// All images by ID, which is the digest of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Table {
    pub(super) images: BTreeMap<Digest, ImageRecord>,
}

/// Tells whether the file was replaced: inode and time of change.
pub(super) type Version = Option<(u64, i64, i64)>;

impl Layout {
    /// The version of the table's file.
    pub(super) fn table_version(&self) -> Result<Version, ImageError> {
        let path = self.table();
        match fs::metadata(&path) {
            Ok(meta) => Ok(Some((meta.ino(), meta.ctime(), meta.ctime_nsec()))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ImageError::io("look at", &path, error)),
        }
    }

    /// Reads the table.
    pub(super) fn read_table(&self) -> Result<Table, ImageError> {
        let path = self.table();
        match fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|error| ImageError::document(path.display().to_string(), error))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Table::default()),
            Err(error) => Err(ImageError::io("read", &path, error)),
        }
    }

    /// Writes the table.
    pub(super) fn write_table(&self, table: &Table) -> Result<(), ImageError> {
        if table.images.len() > MAX_IMAGES {
            return Err(ImageError::TooMany { what: "number of images", limit: MAX_IMAGES });
        }
        let json = serde_json::to_vec_pretty(table).map_err(|error| ImageError::document("images.json", error))?;
        replace(&self.table(), &json).step("write", self.table())
    }
}

impl From<ImageError> for io::Error {
    fn from(error: ImageError) -> Self {
        match error {
            ImageError::Io { source, .. } => source,
            ImageError::DiskFull { .. } => io::ErrorKind::StorageFull.into(),
            other => io::Error::other(other.to_string()),
        }
    }
}

impl Table {
    /// The image that `text` means: an ID (complete or shortened), a tag, or a digest of a repository.
    pub(super) fn find(&self, text: &str) -> Result<Option<&Digest>, ImageError> {
        let by_id = |hex: &str| self.images.keys().filter(|id| id.hex().starts_with(hex)).collect::<Vec<_>>();
        if let Some(hex) = text.strip_prefix("sha256:").and_then(|_| image_id(text)) {
            return match by_id(hex).as_slice() {
                [] => Ok(None),
                [one] => Ok(Some(*one)),
                many => Err(ImageError::Ambiguous { reference: text.to_owned(), count: many.len() }),
            };
        }
        if let Ok(reference) = text.parse::<Reference>() {
            let found = match &reference.digest {
                Some(digest) => {
                    let name = reference.at(digest);
                    self.images.iter().find(|(_, image)| image.digests.contains(&name))
                }
                None => {
                    let name = reference.to_string();
                    self.images.iter().find(|(_, image)| image.tags.contains(&name))
                }
            };
            if let Some((id, _)) = found {
                return Ok(Some(id));
            }
        } else if image_id(text).is_none() {
            text.parse::<Reference>()?;
        }
        let Some(hex) = image_id(text) else {
            return Ok(None);
        };
        match by_id(hex).as_slice() {
            [] => Ok(None),
            [one] => Ok(Some(*one)),
            many => Err(ImageError::Ambiguous { reference: text.to_owned(), count: many.len() }),
        }
    }

    /// Adds an image or new names for one. A tag means one image: whoever had it loses it.
    pub(super) fn add(&mut self, id: Digest, mut record: ImageRecord) {
        for (other, image) in &mut self.images {
            if *other != id {
                image.tags.retain(|tag| !record.tags.contains(tag));
            }
        }
        if let Some(known) = self.images.remove(&id) {
            record.tags.extend(known.tags);
            record.digests.extend(known.digests);
            record.pinned |= known.pinned;
            record.added_at = known.added_at;
        }
        self.images.insert(id, record);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(tag: &str) -> ImageRecord {
        ImageRecord {
            manifest: Digest::of(b"m"),
            blobs: Vec::new(),
            chain: Vec::new(),
            bytes: 0,
            tags: [tag.to_owned()].into(),
            digests: [format!("docker.io/library/x@{}", Digest::of(b"m"))].into(),
            added_at: 0,
            pinned: false,
        }
    }

    #[test]
    fn every_form_of_a_name_finds_the_image() {
        let mut table = Table::default();
        let id = Digest::of(b"config");
        table.add(id.clone(), record("docker.io/library/x:latest"));
        let short = &id.hex()[..12];
        for name in ["x", "x:latest", "docker.io/x", "docker.io/library/x:latest", id.as_str(), id.hex(), short] {
            assert_eq!(table.find(name).expect(name), Some(&id), "{name}");
        }
        assert_eq!(table.find(&format!("x@{}", Digest::of(b"m"))).expect("digest"), Some(&id));
        assert_eq!(table.find(&format!("x:other@{}", Digest::of(b"m"))).expect("digest"), Some(&id));
        assert_eq!(table.find("y").expect("valid"), None);
        assert!(table.find("NOT VALID").is_err());
    }

    #[test]
    fn a_tag_moves_to_the_newest_image() {
        let mut table = Table::default();
        table.add(Digest::of(b"1"), record("docker.io/library/x:latest"));
        table.add(Digest::of(b"2"), record("docker.io/library/x:latest"));
        assert_eq!(table.find("x").expect("valid"), Some(&Digest::of(b"2")));
        assert!(table.images[&Digest::of(b"1")].tags.is_empty());
    }
}
