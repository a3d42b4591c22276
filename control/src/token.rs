//! Tokens that hosts join with: `K10<SHA-256 of the authority's certificate>::<id>.<secret>`.
//!
//! What follows the `::` is a Kubernetes bootstrap token, kept as a Secret in `kube-system`; what stands before it lets the host
//! tell the cluster's servers from others.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, anyhow, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, Subcommand};
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};
use rand::RngExt as _;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use sha2::{Digest, Sha256};

/// Where the Secrets are.
pub(crate) const NAMESPACE: &str = "kube-system";
/// What anybody may read: the authority and where its servers are, as kubeadm has it.
pub(crate) const INFO_NAMESPACE: &str = "kube-public";
/// Name of the ConfigMap.
pub(crate) const INFO_NAME: &str = "cluster-info";
/// The member of its data.
pub(crate) const INFO_MEMBER: &str = "kubeconfig";

const TYPE: &str = "bootstrap.kubernetes.io/token";
const PREFIX: &str = "K10";
const ID_CHARS: usize = 6;
const SECRET_CHARS: usize = 16;

/// Options of `coracle token`.
#[derive(Clone, Debug, Args)]
pub(crate) struct TokenArgs {
    #[command(subcommand)]
    command: TokenCommand,
    /// The administrator's kubeconfig
    #[arg(
        long,
        global = true,
        env = "KUBECONFIG",
        default_value = "/etc/coracle/kubeconfig.yaml",
        value_name = "FILE"
    )]
    kubeconfig: PathBuf,
}

#[derive(Clone, Debug, Subcommand)]
enum TokenCommand {
    /// Make a token and print it
    Create {
        /// How long hosts may join with it, such as 30m, 24h or 7d; 0 for ever
        #[arg(long, default_value = "24h")]
        ttl: String,
        /// What it is for
        #[arg(long, default_value = "")]
        description: String,
    },
    /// Print all tokens without their secrets
    List,
    /// Remove tokens: no host joins with them any more, those that have stay
    Delete {
        /// The six characters before the dot, or a whole token
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

/// Runs the command.
pub(crate) fn run(arguments: TokenArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let path = &arguments.kubeconfig;
        let advice =
            || format!("read {}: run this on a server, or give a kubeconfig with --kubeconfig", path.display());
        let kubeconfig = Kubeconfig::read_from(path).with_context(advice)?;
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
        let config = config.with_context(advice)?;
        let authority = config.root_cert.iter().flatten().next().cloned();
        let secrets: Api<Secret> = Api::namespaced(Client::try_from(config)?, NAMESPACE);
        match &arguments.command {
            TokenCommand::Create { ttl, description } => {
                let authority = authority.with_context(|| format!("{} names no authority", path.display()))?;
                let token = Bootstrap::random();
                let secret = token.secret(description, end(ttl, Timestamp::now())?);
                secrets.create(&PostParams::default(), &secret).await.context("store the token")?;
                println!("{PREFIX}{}::{token}", hex::encode(Sha256::digest(&authority)));
            }
            TokenCommand::List => {
                print!("{}", table(&secrets.list(&ListParams::default()).await?.items, Timestamp::now()))
            }
            TokenCommand::Delete { ids } => {
                for given in ids {
                    let id = given.rsplit("::").next().and_then(|token| token.split('.').next()).unwrap_or(given);
                    let deleted = secrets.delete(&secret_name(id), &DeleteParams::default()).await;
                    deleted.with_context(|| format!("remove the token {id}"))?;
                    println!("token {id} removed");
                }
            }
        }
        Ok(())
    })
}

fn secret_name(id: &str) -> String {
    format!("bootstrap-token-{id}")
}

/// When a token made now ends.
fn end(ttl: &str, now: Timestamp) -> anyhow::Result<Option<Timestamp>> {
    let (number, unit) = ttl.split_at(ttl.find(|c: char| !c.is_ascii_digit()).unwrap_or(ttl.len()));
    let seconds = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => bail!("--ttl {ttl} is not of the form 30m, 24h or 7d"),
    };
    let number: i64 = number.parse().with_context(|| format!("--ttl {ttl} is not of the form 30m, 24h or 7d"))?;
    if number == 0 {
        return Ok(None);
    }
    let length = SignedDuration::from_secs(number.saturating_mul(seconds));
    let end = now.checked_add(length).with_context(|| format!("--ttl {ttl} is too long"))?;
    Ok(Some(Timestamp::from_second(end.as_second())?))
}

fn table(secrets: &[Secret], now: Timestamp) -> String {
    let mut text = format!("{:<8}  {:<22}  {}\n", "TOKEN", "ENDS", "DESCRIPTION");
    for secret in secrets.iter().filter(|secret| secret.type_.as_deref() == Some(TYPE)) {
        let data = |member: &str| {
            let bytes = secret.data.iter().flatten().find(|(key, _)| *key == member).map(|(_, value)| value.0.clone());
            bytes.and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_default()
        };
        let end = data("expiration");
        let ended = end.parse::<Timestamp>().is_ok_and(|end| end <= now);
        let ends = match (end.is_empty(), ended) {
            (true, _) => "never".to_owned(),
            (_, true) => "has ended".to_owned(),
            _ => end,
        };
        text.push_str(&format!("{:<8}  {ends:<22}  {}\n", data("token-id"), data("description")));
    }
    text
}

/// A bootstrap token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bootstrap {
    id: String,
    secret: String,
}

impl std::fmt::Display for Bootstrap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.id, self.secret)
    }
}

impl Bootstrap {
    fn random() -> Self {
        const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
        let mut random = rand::rng();
        let mut text = |chars: usize| {
            (0..chars).map(|_| char::from(DIGITS[random.random_range(0..DIGITS.len())])).collect::<String>()
        };
        Self { id: text(ID_CHARS), secret: text(SECRET_CHARS) }
    }

    /// Takes `abcdef.0123456789abcdef` apart.
    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        text.split_once('.')
            .filter(|(id, secret)| id.len() == ID_CHARS && secret.len() == SECRET_CHARS && plain(id) && plain(secret))
            .map(|(id, secret)| Self { id: id.into(), secret: secret.into() })
            .ok_or_else(|| anyhow!("the token is not of the form abcdef.0123456789abcdef (small letters and digits)"))
    }

    /// The Secret that the API knows it by.
    pub(crate) fn secret(&self, description: &str, end: Option<Timestamp>) -> Secret {
        let mut data = vec![
            ("token-id", self.id.clone()),
            ("token-secret", self.secret.clone()),
            ("usage-bootstrap-authentication", "true".into()),
            ("auth-extra-groups", "system:bootstrappers:coracle:default-node-token".into()),
        ];
        data.extend((!description.is_empty()).then(|| ("description", description.to_owned())));
        data.extend(end.map(|end| ("expiration", end.to_string())));
        Secret {
            metadata: ObjectMeta { name: Some(secret_name(&self.id)), ..ObjectMeta::default() },
            type_: Some(TYPE.into()),
            string_data: Some(data.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
            ..Secret::default()
        }
    }
}

/// What a host joins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct JoinToken {
    /// SHA-256 of the authority's certificate (DER).
    pub(crate) authority: Option<[u8; 32]>,
    pub(crate) bootstrap: Bootstrap,
}

impl FromStr for JoinToken {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let text = text.trim();
        let Some((pin, rest)) = text.split_once("::") else {
            return Ok(Self { authority: None, bootstrap: Bootstrap::parse(text)? });
        };
        let pin = pin.strip_prefix(PREFIX).and_then(|digits| hex::decode(digits).ok()?.try_into().ok());
        let pin = pin.context("the token does not begin with K10 and 64 hexadecimal digits: copy all of it")?;
        Ok(Self { authority: Some(pin), bootstrap: Bootstrap::parse(rest)? })
    }
}

/// The kubeconfig of the cluster's authority and address, without a user.
pub(crate) fn info(ca_pem: &str, server: &str) -> String {
    let ca = STANDARD.encode(ca_pem);
    format!(
        "apiVersion: v1\nkind: Config\nclusters:\n- name: \"\"\n  cluster:\n    server: {server}\n    \
         certificate-authority-data: {ca}\n"
    )
}

/// The authority of such a kubeconfig, PEM, if it is the one with the hash.
pub(crate) fn authority_of(info: &str, pin: [u8; 32]) -> anyhow::Result<String> {
    let kubeconfig = Kubeconfig::from_yaml(info).context("read the cluster's information")?;
    let encoded = kubeconfig.clusters.into_iter().next().and_then(|named| named.cluster?.certificate_authority_data);
    let pem = STANDARD.decode(encoded.context("the cluster's information names no authority")?)?;
    let der = CertificateDer::from_pem_slice(&pem).context("read the authority's certificate")?;
    if <[u8; 32]>::from(Sha256::digest(&der)) != pin {
        bail!("the server's authority is not the one that the token names: is --server the right one?");
    }
    Ok(String::from_utf8(pem)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_read_as_they_are_printed() {
        let made = Bootstrap::random();
        assert_eq!(Bootstrap::parse(&made.to_string()).expect("a token"), made);
        let whole: JoinToken = format!("K10{}::{made}\n", "ab".repeat(32)).parse().expect("a token");
        assert_eq!(whole, JoinToken { authority: Some([0xab; 32]), bootstrap: made.clone() });
        assert_eq!(made.to_string().parse::<JoinToken>().expect("a token").authority, None);
        for bad in [
            "",
            "abcdef.short",
            "ABCDEF.0123456789abcdef",
            "K10aa::abcdef.0123456789abcdef",
            "x::abcdef.0123456789abcdef",
        ] {
            assert!(bad.parse::<JoinToken>().is_err(), "{bad}");
        }
    }

    #[test]
    fn tokens_end_when_they_should() {
        let now = Timestamp::from_second(1_000_000).expect("a time");
        let after = |ttl: &str| end(ttl, now).expect("a length").map(|end| end.as_second() - now.as_second());
        assert_eq!(
            [after("90"), after("30m"), after("24h"), after("7d"), after("0")],
            [Some(90), Some(1800), Some(86_400), Some(604_800), None]
        );
        assert!(["", "h", "1w", "-1h", "99999999999999999999h"].into_iter().all(|bad| end(bad, now).is_err()));
        let mut secret = Bootstrap::random().secret("for tests", end("1h", now).expect("a length"));
        let data = secret.string_data.take().expect("data");
        secret.data = Some(data.into_iter().map(|(k, v)| (k, k8s_openapi::ByteString(v.into_bytes()))).collect());
        assert!(table(std::slice::from_ref(&secret), now).contains("1970-01-12T14:46:40Z"));
        assert!(table(&[secret], now + SignedDuration::from_hours(2)).contains("has ended"));
    }

    #[test]
    fn an_authority_must_have_the_hash_of_the_token() {
        let key = rcgen::generate_simple_self_signed(vec!["ca".into()]).expect("a certificate");
        let text = info(&key.cert.pem(), "https://10.0.0.1:6443");
        let pin: [u8; 32] = Sha256::digest(key.cert.der()).into();
        assert_eq!(authority_of(&text, pin).expect("the authority"), key.cert.pem());
        assert!(authority_of(&text, [0; 32]).expect_err("another").to_string().contains("not the one"));
    }
}
