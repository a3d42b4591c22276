//! Who asks: a client certificate signed by the cluster's CA, or a bearer token that the API server vouches for.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::{Api, Client, api::PostParams};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use x509_parser::prelude::FromDer;

/// How long an answer of the API server about a token counts.
const TOKEN_TTL: Duration = Duration::from_secs(120);
/// Tokens remembered.
const MAX_TOKENS: usize = 1024;
/// A token longer than this is none.
const MAX_TOKEN_BYTES: usize = 16 << 10;

/// A user of the API.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Identity {
    /// `system:serviceaccount:…`, a certificate's common name, …
    pub username: String,
    /// UID, if known.
    pub uid: String,
    /// Groups; a certificate's organizations.
    pub groups: Vec<String>,
    /// Further attributes of a token's user.
    pub extra: BTreeMap<String, Vec<String>>,
}

/// The user that a certificate names; the TLS layer has verified it.
pub(super) fn of_certificate(der: &[u8]) -> Option<Identity> {
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(der).ok()?;
    let subject = certificate.subject();
    let username = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let groups = subject.iter_organization().filter_map(|name| name.as_str().ok().map(str::to_owned)).collect();
    Some(Identity { username, groups, ..Identity::default() })
}

/// A token's user, if it is valid, and until when that counts.
type Answer = (Option<Identity>, Instant);

/// Answers about tokens, by the token's hash: a look-up that compares no secret bytes.
pub(super) struct Tokens {
    client: Client,
    known: Mutex<HashMap<[u8; 32], Answer>>,
}

impl Tokens {
    pub(super) fn new(client: Client) -> Self {
        Self { client, known: Mutex::default() }
    }

    /// The user of a token; `Ok(None)` if it is not valid, `Err` if nobody could be asked.
    pub(super) async fn review(&self, token: &str) -> Result<Option<Identity>, String> {
        if token.len() > MAX_TOKEN_BYTES {
            return Ok(None);
        }
        let hash: [u8; 32] = Sha256::digest(token).into();
        if let Some((identity, until)) = self.known.lock().get(&hash)
            && Instant::now() < *until
        {
            return Ok(identity.clone());
        }
        let review = TokenReview {
            spec: TokenReviewSpec { token: token.to_owned(), audiences: None },
            ..TokenReview::default()
        };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let answer = api.create(&PostParams::default(), &review).await.map_err(|error| error.to_string())?;
        let status = answer.status.unwrap_or_default();
        let user = status.user.filter(|_| status.authenticated == Some(true)).map(|user| Identity {
            username: user.username.unwrap_or_default(),
            uid: user.uid.unwrap_or_default(),
            groups: user.groups.unwrap_or_default(),
            extra: user.extra.unwrap_or_default(),
        });
        let identity = user.filter(|user| !user.username.is_empty());
        let mut known = self.known.lock();
        if known.len() >= MAX_TOKENS {
            let now = Instant::now();
            known.retain(|_, (_, until)| *until > now);
            if known.len() >= MAX_TOKENS {
                known.clear();
            }
        }
        known.insert(hash, (identity.clone(), Instant::now() + TOKEN_TTL));
        Ok(identity)
    }
}
