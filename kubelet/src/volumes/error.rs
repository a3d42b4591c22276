//! Why a volume could not be set up, in words that an event can carry.

use std::io;
use std::path::{Path, PathBuf};

/// A failed step of setting up, updating or taking down a volume.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The object that a volume is made of does not exist.
    #[error("{kind} {name:?} not found")]
    NotFound { kind: &'static str, name: String },
    /// A key named by `items` is not in the object.
    #[error("references non-existent {kind} key: {key}")]
    MissingKey { kind: &'static str, key: String },
    /// The API server could not be asked.
    #[error("cannot get {kind} {name:?}: {reason}")]
    Api { kind: &'static str, name: String, reason: String },
    /// The volume's definition makes no sense.
    #[error("volume {volume:?}: {reason}")]
    Invalid { volume: String, reason: String },
    /// A hostPath is not of the type asked for.
    #[error("hostPath type check failed: {} is not a {wanted}", path.display())]
    HostPathType { path: PathBuf, wanted: &'static str },
    /// A subPath that leads out of its volume.
    #[error("subPath {path:?} of volume {volume:?} was refused: {reason}")]
    SubPath { volume: String, path: String, reason: String },
    /// A type of volume that this node cannot provide.
    #[error("volume {volume:?}: {what}")]
    Unsupported { volume: String, what: String },
    /// The claim of a volume is not ready to be used.
    #[error("persistentvolumeclaim {claim:?} is not usable: {reason}")]
    Claim { claim: String, reason: String },
    /// An image volume's image.
    #[error(transparent)]
    Image(#[from] crate::images::ImageError),
    /// A file operation failed.
    #[error("cannot {step} {}: {source}", path.display())]
    Io { step: &'static str, path: PathBuf, source: io::Error },
    /// A helper program such as mount.nfs failed.
    #[error("{program} failed: {output}")]
    Helper { program: &'static str, output: String },
    /// A CSI driver that is not registered on this node.
    #[error("driver name {driver} not found in the list of registered CSI drivers")]
    NoDriver { driver: String },
    /// A CSI driver that did not do what it was asked.
    #[error("CSI driver {driver}, {call}: {message}")]
    Driver { driver: String, call: String, message: String },
    /// A bound was reached.
    #[error("{what} exceeds the limit of {limit}")]
    TooMany { what: &'static str, limit: usize },
    /// The blocking task that did the work died.
    #[error("volume task failed: {0}")]
    Task(String),
}

/// Attaches a step and a path to an IO error.
pub(crate) trait IoContext<T> {
    fn step(self, step: &'static str, path: impl AsRef<Path>) -> Result<T, VolumeError>;
}

impl<T, E: Into<io::Error>> IoContext<T> for Result<T, E> {
    fn step(self, step: &'static str, path: impl AsRef<Path>) -> Result<T, VolumeError> {
        self.map_err(|source| VolumeError::Io { step, path: path.as_ref().to_owned(), source: source.into() })
    }
}
