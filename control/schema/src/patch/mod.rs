//! The three patch formats: JSON patch (RFC 6902), merge patch (RFC 7396) and Kubernetes' strategic merge patch.

pub mod json;
pub mod merge;
pub mod strategic;

/// Why a patch could not be applied. The texts are the server's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatchError {
    /// The patch itself cannot be read: `400 BadRequest`, the text is the message.
    #[error("{0}")]
    Malformed(String),
    /// Too many operations: `413 RequestEntityTooLarge`.
    #[error("{0}")]
    TooLarge(String),
    /// The patch does not fit the object: `422 Invalid`; a server shows a generic message in place of this text.
    #[error("{0}")]
    Failed(String),
}
