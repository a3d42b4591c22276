//! Blobs: bytes named by their digest. What carries a digest as name has been checked against it.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use super::digest::{Digest, Digesting, Hasher};
use super::error::{ImageError, IoContext};
use super::layout::{Layout, sync_folder};

/// The largest manifest, index or configuration that is read: registries refuse larger ones too.
pub(super) const MAX_DOCUMENT_BYTES: u64 = 4 << 20;
/// Copy buffer.
const COPY_BUFFER_BYTES: usize = 128 << 10;

impl Layout {
    /// Whether the blob is there.
    pub(super) fn has_blob(&self, digest: &Digest) -> bool {
        self.blob(digest).is_file()
    }

    /// The content of a small blob.
    pub(super) fn read_document(&self, digest: &Digest) -> Result<Vec<u8>, ImageError> {
        let path = self.blob(digest);
        let file = File::open(&path).step("open", &path)?;
        read_document(file, &path)
    }

    /// Opens a blob for reading.
    pub(super) fn open_blob(&self, digest: &Digest) -> Result<File, ImageError> {
        let path = self.blob(digest);
        File::open(&path).step("open", &path)
    }

    /// Stores a small blob and returns its digest.
    pub(super) fn put_document(&self, bytes: &[u8]) -> Result<Digest, ImageError> {
        let digest = Digest::of(bytes);
        if !self.has_blob(&digest) {
            super::layout::replace(&self.blob(&digest), bytes)?;
        }
        Ok(digest)
    }

    /// Moves a complete file of the staging area, whose digest the caller has verified, to its name.
    pub(super) fn adopt_blob(&self, staged: &Path, digest: &Digest) -> Result<(), ImageError> {
        let path = self.blob(digest);
        if path.is_file() {
            return fs::remove_file(staged).step("remove", staged);
        }
        File::open(staged).and_then(|file| file.sync_all()).step("sync", staged)?;
        fs::rename(staged, &path).step("rename to", &path)?;
        sync_folder(path.parent().unwrap_or(self.root()))
    }
}

/// Reads at most [`MAX_DOCUMENT_BYTES`].
pub(super) fn read_document(reader: impl Read, path: &Path) -> Result<Vec<u8>, ImageError> {
    let mut bytes = Vec::new();
    reader.take(MAX_DOCUMENT_BYTES + 1).read_to_end(&mut bytes).step("read", path)?;
    if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
        return Err(ImageError::document(
            path.display().to_string(),
            format!("larger than {MAX_DOCUMENT_BYTES} bytes"),
        ));
    }
    Ok(bytes)
}

/// Writes `reader` to a new file at `path`, returning its SHA-256 digest and size.
pub(super) fn spool(reader: &mut dyn Read, path: &Path) -> Result<(Digest, u64), ImageError> {
    let file = File::create_new(path).step("create", path)?;
    let mut writer = Digesting::new(io::BufWriter::with_capacity(COPY_BUFFER_BYTES, file), Hasher::sha256());
    copy(reader, &mut writer, path)?;
    writer.flush().step("write", path)?;
    let (_, digest, bytes) = writer.finish();
    Ok((digest, bytes))
}

/// Copies all of `reader`; an error names `path`, which is what is being written.
fn copy(reader: &mut dyn Read, writer: &mut dyn Write, path: &Path) -> Result<u64, ImageError> {
    let mut buffer = vec![0; COPY_BUFFER_BYTES];
    let mut total = 0;
    loop {
        let count = match reader.read(&mut buffer) {
            Ok(0) => return Ok(total),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(ImageError::io("read source of", path, error)),
        };
        writer.write_all(&buffer[..count]).step("write", path)?;
        total += count as u64;
    }
}
