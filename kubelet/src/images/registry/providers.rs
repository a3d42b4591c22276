//! Credential provider plug-ins of the kubelet (`CredentialProviderConfig` v1): programs that are asked for the credentials of
//! an image, by JSON on standard input and output. Source: `k8s.io/kubelet/pkg/apis/credentialprovider/v1`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use kube::core::Duration as GoDuration;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use super::super::error::{ImageError, IoContext};
use super::super::reference::Reference;
use super::credentials::{Credentials, matches};

/// What a program may take for an answer, as with the kubelet.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest answer.
const ANSWER_LIMIT_BYTES: u64 = 1 << 20;
/// Answers kept of all programs together.
const MAX_CACHED: usize = 1024;
/// Version of the configuration and of the protocol.
const CONFIG_VERSION: &str = "kubelet.config.k8s.io/v1";
const PROTOCOL_VERSION: &str = "credentialprovider.kubelet.k8s.io/v1";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    kind: String,
    api_version: String,
    #[serde(default)]
    providers: Vec<Provider>,
}

/// `CredentialProvider`
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Provider {
    name: String,
    match_images: Vec<String>,
    default_cache_duration: GoDuration,
    api_version: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<Variable>,
    token_attributes: Option<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Variable {
    name: String,
    value: String,
}

/// `CredentialProviderResponse`
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    kind: String,
    api_version: String,
    #[serde(default)]
    cache_key_type: CacheKey,
    cache_duration: Option<GoDuration>,
    #[serde(default)]
    auth: BTreeMap<String, Login>,
}

#[derive(Clone, Deserialize)]
struct Login {
    username: String,
    password: String,
}

/// What an answer is good for.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
enum CacheKey {
    #[default]
    Image,
    Registry,
    Global,
}

/// Pattern and credentials, the most specific first.
type Answer = Vec<(String, Credentials)>;
/// Number of the program, kind of key, key.
type Key = (usize, CacheKey, String);

/// The configured programs and what they have answered lately.
#[derive(Debug)]
pub struct CredentialProviders {
    folder: PathBuf,
    providers: Vec<Provider>,
    cache: Mutex<BTreeMap<Key, (Instant, Answer)>>,
}

impl CredentialProviders {
    /// Reads the configuration; the programs lie in `folder`.
    ///
    /// # Errors
    /// When the file does not have the form of `CredentialProviderConfig` v1, or a program is missing.
    pub fn load(config: &Path, folder: &Path) -> Result<Self, ImageError> {
        let refuse = |reason: String| ImageError::Config { path: config.to_owned(), reason };
        let text = fs::read_to_string(config).step("read", config)?;
        let file: File = serde_saphyr::from_str(&text).map_err(|error| refuse(error.to_string()))?;
        if file.kind != "CredentialProviderConfig" || file.api_version != CONFIG_VERSION {
            return Err(refuse(format!("it is no CredentialProviderConfig of {CONFIG_VERSION}")));
        }
        for provider in &file.providers {
            let name = &provider.name;
            if name.is_empty() || name.contains(['/', ' ']) || name == "." || name == ".." {
                return Err(refuse(format!("{name:?} cannot name a credential provider")));
            }
            if provider.api_version != PROTOCOL_VERSION {
                return Err(refuse(format!("provider {name}: apiVersion must be {PROTOCOL_VERSION}")));
            }
            if provider.match_images.is_empty() {
                return Err(refuse(format!("provider {name}: matchImages is required")));
            }
            if provider.default_cache_duration.is_negative() {
                return Err(refuse(format!("provider {name}: defaultCacheDuration must not be negative")));
            }
            if provider.token_attributes.is_some() {
                return Err(refuse(format!("provider {name}: tokenAttributes are not supported")));
            }
            if !folder.join(name).is_file() {
                return Err(refuse(format!("provider {name}: there is no program {}", folder.join(name).display())));
            }
        }
        Ok(Self { folder: folder.to_owned(), providers: file.providers, cache: Mutex::default() })
    }

    /// The credentials that the programs have for an image. A program that fails gives none; that is told in the log.
    pub(in crate::images) async fn lookup(&self, reference: &Reference) -> Vec<Credentials> {
        let mut found = Vec::new();
        for (number, provider) in self.providers.iter().enumerate() {
            let fits = |pattern: &str| matches(pattern, &reference.registry, &reference.repository);
            if !provider.match_images.iter().any(|pattern| fits(pattern)) {
                continue;
            }
            let answer = match self.cached(number, reference) {
                Some(answer) => answer,
                None => match self.ask(number, provider, reference).await {
                    Ok(answer) => answer,
                    Err(reason) => {
                        tracing::error!(provider = provider.name, image = %reference, reason, "no credentials");
                        continue;
                    }
                },
            };
            found.extend(answer.into_iter().filter(|(pattern, _)| fits(pattern)).map(|(_, credentials)| credentials));
        }
        found
    }

    fn cached(&self, number: usize, reference: &Reference) -> Option<Answer> {
        let mut cache = self.cache.lock();
        cache.retain(|_, (until, _)| *until > Instant::now());
        let kinds = [CacheKey::Image, CacheKey::Registry, CacheKey::Global];
        kinds.into_iter().find_map(|kind| cache.get(&key(number, kind, reference)).map(|(_, answer)| answer.clone()))
    }

    async fn ask(&self, number: usize, provider: &Provider, reference: &Reference) -> Result<Answer, String> {
        let request = json!({
            "kind": "CredentialProviderRequest", "apiVersion": PROTOCOL_VERSION, "image": reference.to_string(),
        });
        let output = tokio::time::timeout(ANSWER_TIMEOUT, self.run(provider, request.to_string()))
            .await
            .map_err(|_| format!("no answer within {ANSWER_TIMEOUT:?}"))??;
        // The parser's message could quote a password, so it is not passed on.
        let response: Response =
            serde_json::from_slice(&output).map_err(|_| "its answer is no CredentialProviderResponse".to_owned())?;
        if response.kind != "CredentialProviderResponse" || response.api_version != PROTOCOL_VERSION {
            return Err(format!("its answer is a {} of {}", response.kind, response.api_version));
        }
        let mut answer: Answer = response
            .auth
            .into_iter()
            .map(|(pattern, login)| {
                (pattern, Credentials::Password { username: login.username, password: login.password })
            })
            .collect();
        answer.sort_by(|(a, _), (b, _)| b.cmp(a));
        if response.cache_duration.is_some_and(|duration| duration.is_negative()) {
            return Err("its answer has a negative cacheDuration".into());
        }
        let keep = Duration::from(response.cache_duration.unwrap_or(provider.default_cache_duration));
        let mut cache = self.cache.lock();
        if !keep.is_zero() && cache.len() < MAX_CACHED {
            cache.insert(key(number, response.cache_key_type, reference), (Instant::now() + keep, answer.clone()));
        }
        Ok(answer)
    }

    async fn run(&self, provider: &Provider, request: String) -> Result<Vec<u8>, String> {
        let mut child = Command::new(self.folder.join(&provider.name))
            .args(&provider.args)
            .envs(provider.env.iter().map(|variable| (&variable.name, &variable.value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("cannot be started: {error}"))?;
        let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("has no standard streams".into());
        };
        // One that does not read its question may still answer it.
        let asked = async move {
            if let Err(error) = stdin.write_all(request.as_bytes()).await {
                tracing::debug!(%error, "a credential provider did not read its request");
            }
        };
        let mut output = Vec::new();
        let mut limited = stdout.take(ANSWER_LIMIT_BYTES);
        let ((), read) = tokio::join!(asked, limited.read_to_end(&mut output));
        read.map_err(|error| format!("cannot read its answer: {error}"))?;
        let status = child.wait().await.map_err(|error| error.to_string())?;
        if status.success() { Ok(output) } else { Err(format!("it failed with {status}")) }
    }
}

fn key(number: usize, kind: CacheKey, reference: &Reference) -> Key {
    let text = match kind {
        CacheKey::Image => reference.to_string(),
        CacheKey::Registry => reference.registry.clone(),
        CacheKey::Global => String::new(),
    };
    (number, kind, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A provider that counts how often it is asked, keeps the last question, and answers with `cache` for its key type.
    fn provider(folder: &Path, cache: &str, keep: &str) -> CredentialProviders {
        let script = format!(
            r#"#!/bin/sh
cat > {0}/question
echo x >> {0}/asked
[ "$WHO" = me ] || exit 1
echo '{{"kind":"CredentialProviderResponse","apiVersion":"{PROTOCOL_VERSION}","cacheKeyType":"{cache}",
"auth":{{"*.example.com":{{"username":"'$1'","password":"p"}},"a.example.com/team":{{"username":"team","password":"p"}}}}}}'
"#,
            folder.display()
        );
        let program = folder.join("helper");
        fs::write(&program, script).expect("written");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("executable");
        let config = folder.join("config.yaml");
        let text = format!(
            "kind: CredentialProviderConfig\napiVersion: {CONFIG_VERSION}\nproviders:\n- name: helper\n  matchImages: ['*.example.com']\n  defaultCacheDuration: {keep}\n  apiVersion: {PROTOCOL_VERSION}\n  args: [user]\n  env: [{{name: WHO, value: me}}]\n"
        );
        fs::write(&config, text).expect("written");
        CredentialProviders::load(&config, folder).expect("valid")
    }

    fn asked(folder: &Path) -> usize {
        fs::read_to_string(folder.join("asked")).unwrap_or_default().lines().count()
    }

    fn names(found: &[Credentials]) -> Vec<&str> {
        found
            .iter()
            .map(|credentials| match credentials {
                Credentials::Password { username, .. } => username.as_str(),
                Credentials::Identity(_) => "",
            })
            .collect()
    }

    #[tokio::test]
    async fn a_program_is_asked_for_what_it_is_there_for_and_its_answer_kept_as_it_says() {
        for (cache, keep, times) in
            [("Registry", "1h0m0s", 2), ("Global", "1h0m0s", 1), ("Image", "1h0m0s", 3), ("Global", "0s", 4)]
        {
            let folder = tempfile::tempdir().expect("a folder");
            let providers = provider(folder.path(), cache, keep);
            let lookup = async |image: &str| providers.lookup(&image.parse().expect("valid")).await;
            assert_eq!(names(&lookup("a.example.com/team/x:1").await), ["team", "user"], "{cache}");
            let question = fs::read_to_string(folder.path().join("question")).expect("asked");
            let question: serde_json::Value = serde_json::from_str(&question).expect("JSON");
            assert_eq!(question["image"], "a.example.com/team/x:1");
            assert_eq!(names(&lookup("a.example.com/team/x:1").await), ["team", "user"]);
            assert_eq!(names(&lookup("a.example.com/other:1").await), ["user"]);
            assert_eq!(names(&lookup("b.example.com/other:1").await), ["user"]);
            assert!(lookup("example.org/x:1").await.is_empty());
            assert_eq!(asked(folder.path()), times, "{cache} {keep}");
        }
    }

    #[tokio::test]
    async fn a_program_that_fails_gives_nothing_and_a_wrong_configuration_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let providers = provider(folder.path(), "Image", "1h0m0s");
        fs::write(folder.path().join("helper"), "#!/bin/sh\nexit 3\n").expect("written");
        assert!(providers.lookup(&"a.example.com/x:1".parse().expect("valid")).await.is_empty());
        let config = folder.path().join("config.yaml");
        let good = fs::read_to_string(&config).expect("written");
        for (from, to) in [
            ("CredentialProviderConfig", "Other"),
            ("name: helper", "name: missing"),
            ("name: helper", "name: ../helper"),
            ("args: [user]", "tokenAttributes: {}"),
            ("args: [user]", "unknown: 1"),
        ] {
            fs::write(&config, good.replacen(from, to, 1)).expect("written");
            assert!(CredentialProviders::load(&config, folder.path()).is_err(), "{to}");
        }
    }
}
