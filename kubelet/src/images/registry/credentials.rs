//! Credentials from image pull secrets, matched as the kubelet's credential provider matches them.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::super::error::ImageError;
use super::super::reference::Reference;

/// What a registry or its token server wants to see. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// User name and password.
    Password {
        /// User name.
        username: String,
        /// Password.
        password: String,
    },
    /// A refresh token, exchanged at the token server.
    Identity(String),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Credentials(…)")
    }
}

impl Credentials {
    /// From the four fields of a docker configuration entry; `None` if they say nothing.
    pub fn from_parts(
        username: Option<String>,
        password: Option<String>,
        auth: Option<&str>,
        identity: Option<String>,
    ) -> Option<Self> {
        if let Some(token) = identity.filter(|token| !token.is_empty()) {
            return Some(Self::Identity(token));
        }
        if let Some(username) = username.filter(|name| !name.is_empty()) {
            return Some(Self::Password { username, password: password.unwrap_or_default() });
        }
        let decoded = STANDARD.decode(auth?.trim()).ok()?;
        let text = String::from_utf8(decoded).ok()?;
        let (username, password) = text.split_once(':')?;
        Some(Self::Password { username: username.to_owned(), password: password.trim_end_matches('\0').to_owned() })
    }

    /// The `Authorization: Basic` value, where this is a password.
    pub(super) fn basic(&self) -> Option<String> {
        match self {
            Self::Password { username, password } => {
                Some(format!("Basic {}", STANDARD.encode(format!("{username}:{password}"))))
            }
            Self::Identity(_) => None,
        }
    }
}

/// Credentials by registry, as pull secrets hold them.
#[derive(Clone, Debug, Default)]
pub struct Keyring {
    /// Pattern and credentials, the most specific pattern first.
    entries: Vec<(String, Credentials)>,
}

#[derive(Deserialize)]
struct DockerEntry {
    username: Option<String>,
    password: Option<String>,
    auth: Option<String>,
    identitytoken: Option<String>,
}

#[derive(Deserialize)]
struct DockerConfigJson {
    auths: BTreeMap<String, DockerEntry>,
}

impl Keyring {
    /// Adds the content of a `kubernetes.io/dockerconfigjson` secret.
    ///
    /// # Errors
    /// When it is not of that form.
    pub fn add_docker_config_json(&mut self, json: &[u8]) -> Result<(), ImageError> {
        // The parser's message could quote the secret, so it is not passed on.
        let config: DockerConfigJson = serde_json::from_slice(json)
            .map_err(|_| ImageError::document("pull secret", "it is not a docker config.json"))?;
        self.add(config.auths);
        Ok(())
    }

    /// Adds the content of a `kubernetes.io/dockercfg` secret.
    ///
    /// # Errors
    /// When it is not of that form.
    pub fn add_dockercfg(&mut self, json: &[u8]) -> Result<(), ImageError> {
        let entries =
            serde_json::from_slice(json).map_err(|_| ImageError::document("pull secret", "it is not a .dockercfg"))?;
        self.add(entries);
        Ok(())
    }

    /// Adds the content of a pull secret of either type; other types hold no credentials.
    ///
    /// # Errors
    /// When it is not of the form that its type promises.
    pub fn add_secret(&mut self, secret_type: &str, data: &BTreeMap<String, Vec<u8>>) -> Result<(), ImageError> {
        match secret_type {
            "kubernetes.io/dockerconfigjson" => {
                data.get(".dockerconfigjson").map_or(Ok(()), |json| self.add_docker_config_json(json))
            }
            "kubernetes.io/dockercfg" => data.get(".dockercfg").map_or(Ok(()), |json| self.add_dockercfg(json)),
            _ => Ok(()),
        }
    }

    fn add(&mut self, entries: BTreeMap<String, DockerEntry>) {
        for (key, entry) in entries {
            let DockerEntry { username, password, auth, identitytoken } = entry;
            if let Some(credentials) = Credentials::from_parts(username, password, auth.as_deref(), identitytoken) {
                self.entries.push((pattern(&key), credentials));
            }
        }
        self.entries.sort_by(|(a, _), (b, _)| b.cmp(a));
    }

    /// All credentials that may open a repository, the most specific first.
    pub fn lookup(&self, reference: &Reference) -> Vec<&Credentials> {
        self.entries
            .iter()
            .filter(|(pattern, _)| matches(pattern, &reference.registry, &reference.repository))
            .map(|(_, credentials)| credentials)
            .collect()
    }
}

/// Docker's own key for its hub is a URL of an API that is gone.
fn pattern(key: &str) -> String {
    let bare = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let bare = bare.trim_end_matches('/');
    let bare = bare.strip_suffix("/v1").or_else(|| bare.strip_suffix("/v2")).unwrap_or(bare);
    match bare {
        "index.docker.io" | "registry-1.docker.io" | "registry.hub.docker.com" => "docker.io".to_owned(),
        other => other.to_owned(),
    }
}

/// Host labels match one by one (`*` inside a label matches any part of it), ports are equal, the path is a prefix.
pub(super) fn matches(pattern: &str, registry: &str, repository: &str) -> bool {
    let (host, path) = pattern.split_once('/').unwrap_or((pattern, ""));
    let split = |host: &str| -> (String, Option<String>) {
        match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => (name.to_owned(), Some(port.to_owned())),
            _ => (host.to_owned(), None),
        }
    };
    let ((want, want_port), (have, have_port)) = (split(host), split(registry));
    let (want, have): (Vec<_>, Vec<_>) = (want.split('.').collect(), have.split('.').collect());
    want_port == have_port
        && want.len() == have.len()
        && want.iter().zip(&have).all(|(want, have)| glob(want.as_bytes(), have.as_bytes()))
        && repository.starts_with(path)
}

/// `*` matches any run of bytes.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => (0..=text.len()).any(|skip| glob(rest, &text[skip..])),
        Some((byte, rest)) => text.first() == Some(byte) && glob(rest, &text[1..]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(key: &str) -> Keyring {
        let mut ring = Keyring::default();
        let json = format!(r#"{{"auths":{{"{key}":{{"auth":"dTpw"}}}}}}"#);
        ring.add_docker_config_json(json.as_bytes()).expect("valid");
        ring
    }

    #[test]
    fn keys_match_as_the_kubelet_matches() {
        for (key, image, fits) in [
            ("https://index.docker.io/v1/", "nginx", true),
            ("docker.io", "nginx", true),
            ("localhost:5000", "localhost:5000/x", true),
            ("localhost:5001", "localhost:5000/x", false),
            ("*.example.com", "a.example.com/x", true),
            ("*.example.com", "a.b.example.com/x", false),
            ("reg*.example.com", "registry.example.com/x", true),
            ("example.com/team", "example.com/team/x", true),
            ("example.com/team", "example.com/other/x", false),
            ("https://example.com/v2/", "example.com/x", true),
        ] {
            let reference: Reference = image.parse().expect(image);
            assert_eq!(ring(key).lookup(&reference).len() == 1, fits, "{key} {image}");
        }
    }

    #[test]
    fn the_most_specific_key_comes_first() {
        let mut keyring = Keyring::default();
        keyring
            .add_docker_config_json(br#"{"auths":{"example.com":{"username":"a","password":"x"},"example.com/team":{"username":"b","password":"x"}}}"#)
            .expect("valid");
        let found =
            keyring.lookup(&"example.com/team/x".parse().expect("valid")).into_iter().cloned().collect::<Vec<_>>();
        assert_eq!(found[0], Credentials::Password { username: "b".into(), password: "x".into() });
        assert!(!format!("{keyring:?}").contains("\"x\""), "secrets are never printed");
    }
}
