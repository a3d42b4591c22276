//! What can go wrong with images, one variant per failed step.

use std::io;
use std::path::{Path, PathBuf};

/// A failed step of the image store, of an import or of a pull.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The name does not follow the grammar of image references.
    #[error("invalid image reference {reference:?}: {reason}")]
    Reference { reference: String, reason: String },
    /// No image of that name is in the store.
    #[error("image {reference:?} not found")]
    NotFound { reference: String },
    /// A shortened image ID that several images share.
    #[error("image ID {reference:?} is ambiguous: {count} images begin with it")]
    Ambiguous { reference: String, count: usize },
    /// A file operation of the store failed.
    #[error("cannot {step} {}: {source}", path.display())]
    Io { step: &'static str, path: PathBuf, source: io::Error },
    /// The file system of the store is full. Whatever was half-written has been removed.
    #[error("disk full while {step} {}: free space under it, or run `coracle image prune`", path.display())]
    DiskFull { step: &'static str, path: PathBuf },
    /// Content does not have the digest it was announced with.
    #[error("{what} has digest {actual}, not {expected} as announced: the content was refused")]
    DigestMismatch { what: String, expected: String, actual: String },
    /// Content does not have the size it was announced with.
    #[error("{what} has {actual} bytes, not {expected} as announced: the content was refused")]
    SizeMismatch { what: String, expected: u64, actual: u64 },
    /// A digest of an algorithm that cannot be checked, or that is malformed.
    #[error("unsupported digest {digest:?}: only sha256 and sha512 can be checked")]
    Digest { digest: String },
    /// A document of the image (manifest, index, configuration) is malformed.
    #[error("invalid {what}: {reason}")]
    Document { what: String, reason: String },
    /// No entry of an index fits this host.
    #[error("{what} has no image for platform {platform}; it has: {available}")]
    Platform { what: String, platform: String, available: String },
    /// An archive that is neither a docker-archive nor an OCI layout.
    #[error("{} is neither a docker-archive nor an OCI image layout: {reason}", path.display())]
    NotAnImage { path: PathBuf, reason: String },
    /// A path in a layer leads out of the layer's root.
    #[error("layer {layer} was refused: entry {entry:?} leads out of the root")]
    Escape { layer: String, entry: String },
    /// A layer entry that cannot be made.
    #[error("layer {layer}: cannot unpack {entry:?}: {reason}")]
    Entry { layer: String, entry: String, reason: String },
    /// A layer that is larger than any honest layer: a decompression bomb.
    #[error("layer {layer} was refused as a decompression bomb: {reason}")]
    Bomb { layer: String, reason: String },
    /// A layer's stream is broken.
    #[error("layer {layer} is damaged: {source}")]
    Damaged { layer: String, source: io::Error },
    /// The image is in use.
    #[error("image {reference:?} is used by container {container}: remove that first")]
    InUse { reference: String, container: String },
    /// The registry answered with an error.
    #[error("registry {host}: {method} {path} answered {status}: {message}")]
    Registry { host: String, method: String, path: String, status: u16, message: String },
    /// The registry could not be reached or the connection broke.
    #[error("registry {host}: {reason}")]
    Transport { host: String, reason: String },
    /// The registry wants credentials that we do not have, or refused those that we have.
    #[error("pull access denied for {repository} at {host}: {reason}")]
    Unauthorized { host: String, repository: String, reason: String },
    /// The registry configuration file is malformed.
    #[error("invalid registry configuration {}: {reason}", path.display())]
    Config { path: PathBuf, reason: String },
    /// A bound of the store was reached.
    #[error("{what} exceeds the limit of {limit}")]
    TooMany { what: &'static str, limit: usize },
    /// The blocking task that did the work died.
    #[error("image task failed: {0}")]
    Task(String),
}

impl ImageError {
    /// An IO error of `step` at `path`; a full disk becomes its own variant, for it has its own advice.
    pub(crate) fn io(step: &'static str, path: impl AsRef<Path>, source: impl Into<io::Error>) -> Self {
        let (path, source) = (path.as_ref().to_owned(), source.into());
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { step, path },
            _ => Self::Io { step, path, source },
        }
    }

    /// A malformed document.
    pub(crate) fn document(what: impl Into<String>, reason: impl ToString) -> Self {
        Self::Document { what: what.into(), reason: reason.to_string() }
    }
}

/// Attaches a step and a path to an IO error.
pub(crate) trait IoContext<T> {
    fn step(self, step: &'static str, path: impl AsRef<Path>) -> Result<T, ImageError>;
}

impl<T, E: Into<io::Error>> IoContext<T> for Result<T, E> {
    fn step(self, step: &'static str, path: impl AsRef<Path>) -> Result<T, ImageError> {
        self.map_err(|source| ImageError::io(step, path, source))
    }
}
