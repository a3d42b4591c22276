//! The node's certificates: asked for by CertificateSigningRequest, kept in one file each, renewed before they end while
//! connections are made with them (as kubelet's `rotateCertificates` and `serverTLSBootstrap`).

mod identity;
mod manager;

pub use identity::NodeCertificate;
pub use manager::{CertificateError, Manager, Use};
