//! How a host becomes a node: it learns the authority that its token names, and asks for a certificate of its own.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use coracle_kubelet::certificates::{CertificateError, Manager, NodeCertificate};
use http::Uri;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;

use super::{RETRY, client};
use crate::cli::AgentOptions;
use crate::token::{self, JoinToken};

/// Makes sure that the node has a certificate; returns the authority, PEM.
pub(super) async fn join(
    options: &AgentOptions,
    folder: &Path,
    url: &Uri,
    own: &Arc<Manager>,
) -> anyhow::Result<String> {
    let token = match (&options.token, &options.token_file) {
        (Some(text), _) => Some(text.clone()),
        (None, Some(file)) => {
            Some(std::fs::read_to_string(file).with_context(|| format!("read the token file {}", file.display()))?)
        }
        (None, None) => None,
    };
    let token = token.map(|text| text.parse::<JoinToken>()).transpose()?;
    let file = folder.join("ca.crt");
    let authority = match (&options.server_ca_file, std::fs::read_to_string(&file)) {
        (Some(given), _) => {
            std::fs::read_to_string(given).with_context(|| format!("read the authority {}", given.display()))?
        }
        // A node that has joined knows its authority, whatever token it is started with.
        (None, Ok(known)) if own.certificate().is_set() => known,
        _ => authority(url, token.as_ref()).await?,
    };
    std::fs::write(&file, &authority).with_context(|| format!("write {}", file.display()))?;
    if own.certificate().is_set() {
        return Ok(authority);
    }
    let Some(token) = token else {
        bail!("this host has not joined yet: give it a token (coracle token create on a server)");
    };
    let tls = client::tls(&authority, Arc::new(NodeCertificate::default()))?;
    let bearer = token.bootstrap.to_string();
    let client = client::client(url, &tls, Some(&bearer))?;
    // The first question tells a token that nobody knows from a server that is not there.
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), token::INFO_NAMESPACE);
    patiently("use the token", || maps.get_opt(token::INFO_NAME)).await?;
    loop {
        match own.obtain(&client).await {
            Ok(()) => return Ok(authority),
            Err(error @ (CertificateError::Api { .. } | CertificateError::Unsigned { .. })) => {
                tracing::warn!(%error, "no certificate for this node yet");
                tokio::time::sleep(RETRY).await;
            }
            Err(error) => return Err(error).context("get a certificate for this node"),
        }
    }
}

/// The authority that a server names, if it is the token's.
async fn authority(url: &Uri, token: Option<&JoinToken>) -> anyhow::Result<String> {
    let Some(pin) = token.and_then(|token| token.authority) else {
        bail!(
            "which authority to trust is not known: give a whole token (coracle token create on a server), or --server-ca-file"
        );
    };
    // Nothing that this connection says is believed but what has the token's hash.
    let tls = coracle_api::unverified_tls(None).context("prepare TLS")?;
    let client = client::client(url, &tls, None)?;
    let maps: Api<ConfigMap> = Api::namespaced(client, token::INFO_NAMESPACE);
    let map = patiently("ask for the cluster's authority", || maps.get(token::INFO_NAME)).await?;
    let info = map.data.and_then(|mut data| data.remove(token::INFO_MEMBER));
    token::authority_of(&info.context("the server does not tell its authority")?, pin)
}

/// How long a token may be unknown: another server, or one that has just started, learns of it a moment after it is made.
const UNKNOWN_PATIENCE: Duration = Duration::from_secs(10);

/// Asks until a server answers. A server that has just started says for a moment that the right or the object is
/// not there (403, 404) or that it is busy (429), and for a bounded time that it does not know the token (401); any other no
/// is final.
pub(super) async fn patiently<T, F: Future<Output = Result<T, kube::Error>>>(
    step: &'static str,
    ask: impl Fn() -> F,
) -> anyhow::Result<T> {
    let mut told = false;
    let mut unknown_since = None;
    loop {
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(kube::Error::Api(status))
                if status.code == 401
                    && unknown_since.get_or_insert_with(Instant::now).elapsed() >= UNKNOWN_PATIENCE =>
            {
                bail!("{step}: the token is not known or has ended: make another (coracle token create on a server)")
            }
            Err(kube::Error::Api(status))
                if (400..500).contains(&status.code) && !matches!(status.code, 401 | 403 | 404 | 429) =>
            {
                return Err(kube::Error::Api(status)).context(step);
            }
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%error, "cannot {step} yet, trying on: is --server right, and can this host reach it?");
                }
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}
