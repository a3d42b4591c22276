//! Image archives as a set of named files: a folder, or a tar stream (plain or compressed, also from a pipe).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use tar::EntryType;

use super::blobs::{read_document, spool};
use super::digest::{Digest, Digesting};
use super::error::{ImageError, IoContext};
use super::layers::decompress;
use super::layout::Stage;
use super::merged::normalize;

/// Members of one archive.
const MAX_MEMBERS: usize = 100_000;
/// Links from one member to another, one after the other.
const MAX_ALIASES: usize = 8;

/// Where the files of an archive are.
pub(super) enum Archive {
    /// In a folder.
    Folder(PathBuf),
    /// Unpacked member by member into the staging area, for members come in any order and are needed in another.
    Spooled { origin: PathBuf, members: BTreeMap<PathBuf, Member> },
}

pub(super) enum Member {
    File {
        path: PathBuf,
    },
    /// Older archives store a layer once and link to it.
    Alias(PathBuf),
}

impl Archive {
    /// Opens a folder, or spools a tar.
    pub(super) fn open(path: &Path, stage: &Stage) -> Result<Self, ImageError> {
        if path.is_dir() {
            return Ok(Self::Folder(path.to_owned()));
        }
        let file = File::open(path).step("open", path)?;
        Self::spool(file, path, stage)
    }

    /// Spools a tar stream; `origin` names it in errors.
    pub(super) fn spool(stream: impl Read, origin: &Path, stage: &Stage) -> Result<Self, ImageError> {
        let not_an_image = |reason: String| ImageError::NotAnImage { path: origin.to_owned(), reason };
        let stream = decompress(stream).step("read", origin)?;
        let mut archive = tar::Archive::new(stream);
        let mut members = BTreeMap::new();
        let entries = archive.entries().step("read", origin)?;
        for (number, entry) in entries.enumerate() {
            let mut entry = entry.map_err(|error| not_an_image(format!("not a tar archive: {error}")))?;
            if number >= MAX_MEMBERS {
                return Err(ImageError::TooMany { what: "number of files in an archive", limit: MAX_MEMBERS });
            }
            let raw = entry.path_bytes().into_owned();
            let climbs = || ImageError::Escape {
                layer: origin.display().to_string(),
                entry: String::from_utf8_lossy(&raw).into(),
            };
            let name = normalize(&raw).ok_or_else(climbs)?;
            let kind = entry.header().entry_type();
            match kind {
                EntryType::Regular | EntryType::Continuous => {
                    let path = stage.path().join(format!("member-{number}"));
                    spool(&mut entry, &path)?;
                    members.insert(name, Member::File { path });
                }
                EntryType::Symlink | EntryType::Link => {
                    let target = entry.link_name_bytes().unwrap_or_default().into_owned();
                    let base =
                        if kind == EntryType::Symlink { name.parent().unwrap_or(Path::new("")) } else { Path::new("") };
                    let mut whole = base.as_os_str().as_encoded_bytes().to_vec();
                    whole.push(b'/');
                    whole.extend(target);
                    members.insert(name, Member::Alias(normalize(&whole).ok_or_else(climbs)?));
                }
                _ => {}
            }
        }
        if members.is_empty() {
            return Err(not_an_image("the archive is empty".into()));
        }
        Ok(Self::Spooled { origin: origin.to_owned(), members })
    }

    /// What to call it in errors.
    pub(super) fn origin(&self) -> &Path {
        match self {
            Self::Folder(path) => path,
            Self::Spooled { origin, .. } => origin,
        }
    }

    /// The file of that name.
    fn locate(&self, name: &str) -> Result<Option<PathBuf>, ImageError> {
        let Some(mut wanted) = normalize(name.as_bytes()) else {
            return Err(ImageError::Escape { layer: self.origin().display().to_string(), entry: name.to_owned() });
        };
        match self {
            Self::Folder(root) => {
                let path = root.join(wanted);
                Ok(path.is_file().then_some(path))
            }
            Self::Spooled { members, .. } => {
                for _ in 0..=MAX_ALIASES {
                    match members.get(&wanted) {
                        Some(Member::File { path }) => return Ok(Some(path.clone())),
                        Some(Member::Alias(other)) => wanted = other.clone(),
                        None => return Ok(None),
                    }
                }
                Err(ImageError::TooMany { what: "chain of links in an archive", limit: MAX_ALIASES })
            }
        }
    }

    /// The content of a small file, if it is there.
    pub(super) fn document(&self, name: &str) -> Result<Option<Vec<u8>>, ImageError> {
        let Some(path) = self.locate(name)? else {
            return Ok(None);
        };
        read_document(File::open(&path).step("open", &path)?, Path::new(name)).map(Some)
    }

    /// The same, where it must be there.
    pub(super) fn require(&self, name: &str) -> Result<Vec<u8>, ImageError> {
        self.document(name)?.ok_or_else(|| self.lacks(name))
    }

    fn lacks(&self, name: &str) -> ImageError {
        ImageError::NotAnImage { path: self.origin().to_owned(), reason: format!("{name} is missing") }
    }

    /// Puts a file into the staging area, verified against `expected` if that is known; returns where, its digest and
    /// its size.
    pub(super) fn stage(
        &self,
        name: &str,
        expected: Option<&Digest>,
        stage: &Stage,
    ) -> Result<(PathBuf, Digest, u64), ImageError> {
        let from = self.locate(name)?.ok_or_else(|| self.lacks(name))?;
        let to =
            tempfile::Builder::new().prefix("blob-").tempfile_in(stage.path()).step("create file in", stage.path())?;
        let hasher = expected.map_or_else(super::digest::Hasher::sha256, Digest::hasher);
        let mut writer = Digesting::new(to.as_file(), hasher);
        let mut reader = File::open(&from).step("open", &from)?;
        std::io::copy(&mut reader, &mut writer).step("write", to.path())?;
        writer.flush().step("write", to.path())?;
        let (_, digest, bytes) = writer.finish();
        if let Some(expected) = expected
            && *expected != digest
        {
            return Err(ImageError::DigestMismatch {
                what: name.to_owned(),
                expected: expected.to_string(),
                actual: digest.to_string(),
            });
        }
        let (_, path) = to.keep().map_err(|error| ImageError::io("keep", stage.path(), error.error))?;
        // The spooled copy has served unless another image of the archive shares it.
        if let Self::Spooled { .. } = self {
            fs::metadata(&from).step("look at", &from)?;
        }
        Ok((path, digest, bytes))
    }
}
