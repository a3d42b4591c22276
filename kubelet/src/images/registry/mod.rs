//! Talking to image registries: OCI distribution-spec v1.1 (pull), docker's token authentication.
//!
//! Made on hyper and hyper-rustls, which `kube` brings along anyway: the ready-made registry clients rest on reqwest (a
//! second HTTP client in the binary) and neither resume a broken blob nor try mirrors.

mod challenge;
mod client;
mod config;
mod credentials;
mod providers;

pub use config::{Auth, HostConfig, Mirror, RegistryConfig, TlsConfig};
pub use credentials::{Credentials, Keyring};
pub use providers::CredentialProviders;

pub(super) use client::{Client, Endpoint, Fetch};
