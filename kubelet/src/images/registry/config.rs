//! The registry configuration file, in the form that k3s users know: `/etc/coracle/registries.yaml`.
//!
//! ```yaml
//! mirrors:
//!   docker.io:
//!     endpoint: ["https://mirror.example.com", "http://127.0.0.1:5000"]
//! configs:
//!   mirror.example.com:
//!     auth: { username: u, password: p }
//!     tls: { ca_file: /etc/ssl/mirror.pem }
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::super::error::{ImageError, IoContext};
use super::credentials::Credentials;

/// Mirrors, credentials and certificates, by registry.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegistryConfig {
    /// Where to look for the images of a registry, by its name in references; `*` is for all without an entry.
    #[serde(default)]
    pub mirrors: BTreeMap<String, Mirror>,
    /// How to talk to a host, by host name and port as in an endpoint or reference; `*` as above.
    #[serde(default)]
    pub configs: BTreeMap<String, HostConfig>,
}

/// `mirrors.<registry>`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mirror {
    /// URLs tried in order, before the registry itself. `http://` makes plain HTTP. Without a path, `/v2` is meant.
    #[serde(default, alias = "endpoints")]
    pub endpoint: Vec<String>,
    /// Do not fall back to the registry itself.
    #[serde(default)]
    pub only: bool,
}

/// `configs.<host>`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// Credentials used where a pod brings none.
    pub auth: Option<Auth>,
    /// Certificates.
    pub tls: Option<TlsConfig>,
}

/// `configs.<host>.auth`
#[derive(Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Auth {
    /// User name.
    pub username: Option<String>,
    /// Password.
    pub password: Option<String>,
    /// `base64(user:password)`
    pub auth: Option<String>,
    /// A refresh token.
    pub identity_token: Option<String>,
}

impl fmt::Debug for Auth {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Auth(…)")
    }
}

/// `configs.<host>.tls`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// Certificates to trust instead of the host's, PEM.
    pub ca_file: Option<PathBuf>,
    /// Client certificate, PEM.
    pub cert_file: Option<PathBuf>,
    /// Its key, PEM.
    pub key_file: Option<PathBuf>,
    /// Any certificate will do. For tests of one's own.
    #[serde(default)]
    pub insecure_skip_verify: bool,
}

impl RegistryConfig {
    /// Reads the file; an absent one means no configuration.
    ///
    /// # Errors
    /// When it cannot be read or does not have the form above.
    pub fn load(path: &Path) -> Result<Self, ImageError> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error).step("read", path),
        };
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        serde_saphyr::from_str(&text)
            .map_err(|error| ImageError::Config { path: path.to_owned(), reason: error.to_string() })
    }

    /// The settings of a host.
    pub(super) fn host(&self, host: &str) -> Option<&HostConfig> {
        self.configs.get(host).or_else(|| self.configs.get("*"))
    }

    /// The configured credentials of a host.
    pub(super) fn credentials(&self, host: &str) -> Option<Credentials> {
        let auth = self.host(host)?.auth.as_ref()?;
        Credentials::from_parts(
            auth.username.clone(),
            auth.password.clone(),
            auth.auth.as_deref(),
            auth.identity_token.clone(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_known_file_form_is_read() {
        let text = "mirrors:\n  docker.io:\n    endpoint:\n      - http://127.0.0.1:5000\nconfigs:\n  \"127.0.0.1:5000\":\n    auth: {username: u, password: p}\n    tls: {insecure_skip_verify: true}\n";
        let config: RegistryConfig = serde_saphyr::from_str(text).expect("valid");
        assert_eq!(config.mirrors["docker.io"].endpoint, ["http://127.0.0.1:5000"]);
        assert!(config.credentials("127.0.0.1:5000").is_some());
        assert!(!format!("{config:?}").contains("password: Some"));
        assert!(serde_saphyr::from_str::<RegistryConfig>("mirror: {}").is_err(), "unknown fields are refused");
    }
}
