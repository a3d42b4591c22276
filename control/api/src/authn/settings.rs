//! Who is trusted to say who somebody is: the token file, and the file of `AuthenticationConfiguration`.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::oidc::Issuer;
use crate::user::UserInfo;

/// Most issuers of one file, as a real server has it.
const ISSUERS: usize = 64;

/// Sources of identity beside client certificates, service accounts and bootstrap tokens.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Static tokens and their users (`--token-auth-file`).
    pub tokens: Vec<(String, UserInfo)>,
    /// Trusted issuers of OpenID Connect tokens (`--authentication-config`).
    pub issuers: Vec<Issuer>,
    /// Who may come without credentials.
    pub anonymous: Anonymous,
}

/// Requests without credentials; RBAC then decides what they may do, which by default is to ask for health and version.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Anonymous {
    /// Whether they are taken at all.
    pub enabled: bool,
    /// The only paths for which they are, when there are any.
    #[serde(default)]
    pub conditions: Vec<AnonymousPath>,
}

/// A path of [`Anonymous`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct AnonymousPath {
    /// The whole path.
    pub path: String,
}

impl Default for Anonymous {
    fn default() -> Self {
        Self { enabled: true, conditions: Vec::new() }
    }
}

impl Anonymous {
    /// Whether a request for `path` may come without credentials.
    pub(super) fn admits(&self, path: &str) -> bool {
        self.enabled && (self.conditions.is_empty() || self.conditions.iter().any(|one| one.path == path))
    }
}

/// A file that does not say what it should.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// It cannot be read.
    #[error("read {}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Its content is wrong.
    #[error("{}: {why}", path.display())]
    Content {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    api_version: String,
    kind: String,
    #[serde(default)]
    jwt: Vec<Value>,
    #[serde(default)]
    anonymous: Anonymous,
}

impl Settings {
    /// Reads the files that are given.
    pub fn read(token_file: Option<&Path>, configuration: Option<&Path>) -> Result<Self, SettingsError> {
        let mut settings = Self::default();
        if let Some(path) = token_file {
            settings.tokens = tokens(&text(path)?).map_err(|why| SettingsError::Content { path: path.into(), why })?;
        }
        if let Some(path) = configuration {
            (settings.issuers, settings.anonymous) =
                parse(&text(path)?).map_err(|why| SettingsError::Content { path: path.into(), why })?;
        }
        Ok(settings)
    }
}

fn text(path: &Path) -> Result<String, SettingsError> {
    std::fs::read_to_string(path).map_err(|source| SettingsError::Read { path: path.into(), source })
}

/// Lines of `token,user,uid` and, if there are any, the groups as one quoted column: `"a,b"`.
fn tokens(text: &str) -> Result<Vec<(String, UserInfo)>, String> {
    let mut all: Vec<(String, UserInfo)> = Vec::new();
    for (number, line) in text.lines().enumerate().map(|(at, line)| (at + 1, line.trim())) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let columns = columns(line).ok_or_else(|| format!("line {number}: a quote is not closed"))?;
        let [token, name, uid, rest @ ..] = columns.as_slice() else {
            return Err(format!("line {number}: it needs a token, a user name and a user uid"));
        };
        if token.is_empty() || all.iter().any(|(known, _)| known == token) {
            return Err(format!("line {number}: the token is empty or stands there twice"));
        }
        let groups: Vec<&str> = rest.first().map(String::as_str).unwrap_or_default().split(',').collect();
        let groups: Vec<&str> = groups.into_iter().map(str::trim).filter(|group| !group.is_empty()).collect();
        let user = UserInfo { uid: uid.clone(), ..UserInfo::new(name.as_str(), &groups) };
        all.push((token.clone(), user));
    }
    Ok(all)
}

/// The columns of a line of comma-separated values; `None` when a quote stays open.
fn columns(line: &str) -> Option<Vec<String>> {
    let mut all = vec![String::new()];
    let mut quoted = false;
    let mut letters = line.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            '"' if quoted && letters.peek() == Some(&'"') => {
                letters.next();
                all.last_mut()?.push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => all.push(String::new()),
            other => all.last_mut()?.push(other),
        }
    }
    (!quoted).then(|| all.into_iter().map(|column| column.trim().to_owned()).collect())
}

/// An `AuthenticationConfiguration` in YAML or JSON.
fn parse(text: &str) -> Result<(Vec<Issuer>, Anonymous), String> {
    let file: File = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
    if !matches!(file.api_version.as_str(), "apiserver.config.k8s.io/v1" | "apiserver.config.k8s.io/v1beta1")
        || file.kind != "AuthenticationConfiguration"
    {
        return Err(format!(
            "it holds {}, Kind={}, not apiserver.config.k8s.io/v1, Kind=AuthenticationConfiguration",
            file.api_version, file.kind
        ));
    }
    if file.jwt.len() > ISSUERS {
        return Err(format!("jwt: Too many: {}: must have at most {ISSUERS} items", file.jwt.len()));
    }
    if !file.anonymous.enabled && !file.anonymous.conditions.is_empty() {
        return Err("anonymous.conditions: enabled should be set to true when conditions are defined".into());
    }
    let mut issuers: Vec<Issuer> = Vec::new();
    for (at, entry) in file.jwt.into_iter().enumerate() {
        let issuer = Issuer::compile(entry).map_err(|why| format!("jwt[{at}].{why}"))?;
        if issuers.iter().any(|known| known.url() == issuer.url()) {
            return Err(format!("jwt[{at}].issuer.url: Duplicate value: {:?}", issuer.url()));
        }
        issuers.push(issuer);
    }
    Ok((issuers, file.anonymous))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_files_hold_users_and_groups() {
        let all = tokens("# who\nabc,jane,7,\"dev, ops\"\n\ndef, bob ,8\n").expect("well formed");
        assert_eq!((all[0].0.as_str(), all[0].1.name.as_str(), all[0].1.uid.as_str()), ("abc", "jane", "7"));
        assert_eq!(all[0].1.groups, ["dev", "ops", "system:authenticated"]);
        assert_eq!((all[1].1.name.as_str(), all[1].1.groups.len()), ("bob", 1));
        for bad in ["abc,jane", "a,b,c\na,d,e", "a,b,c,\"d"] {
            assert!(tokens(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn configurations_are_checked() {
        let file = |rest: &str| {
            parse(&format!("apiVersion: apiserver.config.k8s.io/v1\nkind: AuthenticationConfiguration\n{rest}"))
        };
        let (issuers, anonymous) = file(
            "anonymous: {enabled: true, conditions: [{path: /livez}]}\njwt:\n- issuer: {url: 'https://id.example', audiences: [a]}\n  claimMappings: {username: {expression: 'claims.sub'}}\n",
        )
        .expect("well formed");
        assert_eq!(issuers[0].url(), "https://id.example");
        assert!(anonymous.admits("/livez") && !anonymous.admits("/api"));
        for (bad, why) in [
            (
                "jwt: [{issuer: {url: 'http://a', audiences: [a]}, claimMappings: {username: {claim: sub, prefix: ''}}}]",
                "https",
            ),
            (
                "jwt: [{issuer: {url: 'https://a', audiences: []}, claimMappings: {username: {claim: sub, prefix: ''}}}]",
                "audiences",
            ),
            ("jwt: [{issuer: {url: 'https://a', audiences: [a]}, claimMappings: {username: {claim: sub}}}]", "prefix"),
            (
                "jwt: [{issuer: {url: 'https://a', audiences: [a]}, claimMappings: {username: {expression: 'claims.'}}}]",
                "compilation failed",
            ),
            ("nonsense: 1", "nonsense"),
        ] {
            let error = file(bad).expect_err(bad);
            assert!(error.contains(why), "{error}");
        }
    }
}
