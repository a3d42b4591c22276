//! Image references: the grammar of `distribution/reference`, with Docker Hub's defaults.
//!
//! `nginx` means `docker.io/library/nginx:latest`; a digest pins the content, and then a tag beside it is only a remark.

use std::fmt;
use std::str::FromStr;

use oci_spec::distribution::Reference as Parsed;

use super::error::ImageError;

/// The longest reference that is looked at: name 255, tag 128, digest 136 and what joins them.
const MAX_REFERENCE_BYTES: usize = 1024;
/// Docker Hub's name in references, and the host that serves it.
const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_HOST: &str = "registry-1.docker.io";
/// Hexadecimal digits below which a string is not taken for a shortened image ID.
pub(super) const MIN_SHORT_ID: usize = 7;

/// A fully qualified image reference.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    /// `docker.io`, `localhost:5000`, …
    pub registry: String,
    /// `library/nginx`
    pub repository: String,
    /// `latest`; absent if only a digest was given.
    pub tag: Option<String>,
    /// `sha256:…`
    pub digest: Option<String>,
}

impl Reference {
    /// The host (and port) that serves this reference's registry when no mirror is configured.
    pub fn host(&self) -> &str {
        if self.registry == DOCKER_HUB { DOCKER_HUB_HOST } else { &self.registry }
    }

    /// `docker.io/library/nginx`
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// `docker.io/library/nginx:latest`, if there is a tag and no digest.
    pub fn tagged(&self) -> Option<String> {
        match (&self.tag, &self.digest) {
            (Some(tag), None) => Some(format!("{}:{tag}", self.name())),
            _ => None,
        }
    }

    /// What stands in the path of a manifest request: the digest, else the tag.
    pub fn selector(&self) -> &str {
        self.digest.as_deref().or(self.tag.as_deref()).unwrap_or("latest")
    }

    /// The same repository at a digest.
    pub fn at(&self, digest: &str) -> String {
        format!("{}@{digest}", self.name())
    }
}

impl FromStr for Reference {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self, ImageError> {
        let refuse = |reason: String| ImageError::Reference {
            reference: text.chars().take(MAX_REFERENCE_BYTES).collect(),
            reason,
        };
        if text.len() > MAX_REFERENCE_BYTES {
            return Err(refuse(format!("longer than {MAX_REFERENCE_BYTES} bytes")));
        }
        // Sixty-four hexadecimal digits are an image ID and never a name.
        if text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(refuse("cannot specify 64-byte hexadecimal strings".into()));
        }
        let parsed: Parsed = text.parse().map_err(|error| refuse(format!("{error}")))?;
        if parsed.repository().bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(refuse("repository name must be lowercase".into()));
        }
        let digest = parsed.digest().map(str::to_owned);
        // The library adds `latest` where no tag is given; beside a digest that would be an invention.
        let tag = parsed.tag().map(str::to_owned);
        let tag = if digest.is_none() { Some(tag.unwrap_or_else(|| "latest".into())) } else { tag };
        Ok(Self { registry: parsed.registry().to_owned(), repository: parsed.repository().to_owned(), tag, digest })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}", self.name())?;
        if let Some(tag) = &self.tag {
            write!(out, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(out, "@{digest}")?;
        }
        Ok(())
    }
}

/// The hexadecimal digits of an image ID, complete or shortened, if `text` can be one.
pub(super) fn image_id(text: &str) -> Option<&str> {
    let (hex, least) = match text.strip_prefix("sha256:") {
        Some(hex) => (hex, 1),
        None => (text, MIN_SHORT_ID),
    };
    let fits =
        (least..=64).contains(&hex.len()) && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    fits.then_some(hex)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn defaults_are_docker_hubs() {
        for (given, whole) in [
            ("nginx", "docker.io/library/nginx:latest"),
            ("nginx:1.27", "docker.io/library/nginx:1.27"),
            ("bitnami/redis", "docker.io/bitnami/redis:latest"),
            ("localhost/x", "localhost/x:latest"),
            ("localhost:5000/a/b:v1", "localhost:5000/a/b:v1"),
            ("127.0.0.1:5000/a", "127.0.0.1:5000/a:latest"),
            ("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10"),
            ("docker.io/nginx", "docker.io/library/nginx:latest"),
            ("index.docker.io/nginx", "docker.io/library/nginx:latest"),
        ] {
            let reference: Reference = given.parse().expect(given);
            assert_eq!(reference.to_string(), whole, "{given}");
        }
    }

    #[test]
    fn digests_pin_without_a_tag() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let reference: Reference = format!("nginx@{digest}").parse().expect("digest reference");
        assert_eq!(reference.to_string(), format!("docker.io/library/nginx@{digest}"));
        assert_eq!(reference.selector(), digest);
        let both: Reference = format!("nginx:1@{digest}").parse().expect("tag and digest");
        assert_eq!(both.selector(), digest);
        assert_eq!(both.tagged(), None);
    }

    #[test]
    fn malformed_references_are_refused() {
        let hex = "0123456789abcdef".repeat(4);
        let long = "a".repeat(2000);
        for bad in
            ["", "UPPER/x", "a b", "x:", "x@sha256:12", ":tag", "/x", "x//y", "http://x/y", hex.as_str(), long.as_str()]
        {
            assert!(bad.parse::<Reference>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn ids_are_told_from_names() {
        assert_eq!(image_id("sha256:ab"), Some("ab"));
        assert_eq!(image_id("abcdef1"), Some("abcdef1"));
        assert_eq!(image_id("abc"), None);
        assert_eq!(image_id("nginx"), None);
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_is_stable(text in "\\PC{0,80}") {
            if let Ok(reference) = text.parse::<Reference>() {
                let again: Reference = reference.to_string().parse().expect("what was printed parses");
                prop_assert_eq!(again, reference);
            }
        }

        #[test]
        fn plain_names_always_parse(name in "[a-z][a-z0-9]{0,20}(/[a-z][a-z0-9-]{0,10}[a-z0-9]){0,3}", tag in "[A-Za-z0-9_][A-Za-z0-9_.-]{0,30}") {
            let reference: Reference = format!("{name}:{tag}").parse().expect("valid");
            prop_assert_eq!(reference.tag.as_deref(), Some(tag.as_str()));
        }
    }
}
