//! Keys that sign and verify tokens, and their publication as OpenID Connect discovery.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{self, EcdsaKeyPair, KeyPair as _, UnparsedPublicKey};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::http::{Response, json_response};
use crate::pki::{Pki, PkiError};
use crate::server::{ApiServer, Config};

/// A trusted issuer of OpenID Connect tokens.
#[derive(Clone, Debug)]
pub struct OidcIssuer {
    /// `iss` of its tokens.
    pub issuer: String,
    /// Accepted `aud`.
    pub audiences: Vec<String>,
    /// Claim that holds the user's name (`sub` when in doubt).
    pub username_claim: String,
    /// Put before names.
    pub username_prefix: String,
    /// Claim that holds the groups.
    pub groups_claim: String,
    /// Put before groups.
    pub groups_prefix: String,
    /// Its keys: a JSON Web Key Set.
    pub jwks: Value,
}

/// The keys of a server.
pub(super) struct Keys {
    /// `iss` of service account tokens.
    pub(super) issuer: String,
    /// Identifier of the signing key.
    pub(super) id: String,
    pair: EcdsaKeyPair,
    random: SystemRandom,
    jwk: Value,
    pub(super) oidc: Vec<OidcIssuer>,
}

impl Keys {
    pub(super) fn new(config: &Config, pki: &Pki) -> Result<Self, PkiError> {
        let random = SystemRandom::new();
        let pair = EcdsaKeyPair::from_pkcs8(&signature::ECDSA_P256_SHA256_FIXED_SIGNING, &pki.token_key, &random)
            .map_err(|error| PkiError::Crypto { step: "read service-account.key".into(), reason: error.to_string() })?;
        let public = pair.public_key().as_ref().to_vec();
        let id = URL_SAFE_NO_PAD.encode(Sha256::digest(&public));
        // An uncompressed point: 4, then x and y.
        let (x, y) = public[1..].split_at(32);
        let jwk = json!({
            "use": "sig", "kty": "EC", "kid": id, "crv": "P-256", "alg": "ES256",
            "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y),
        });
        let issuer = format!("https://kubernetes.default.svc.{}", config.cluster_domain);
        Ok(Self { issuer, id, pair, random, jwk, oidc: config.oidc.clone() })
    }

    /// A signed token.
    pub(super) fn sign(&self, claims: &Value) -> Result<String, ring::error::Unspecified> {
        let header = json!({"alg": "ES256", "kid": self.id});
        let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", encode(&header), encode(claims));
        let signature = self.pair.sign(&self.random, signed.as_bytes())?;
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref())))
    }

    /// Whether our key signed this.
    pub(super) fn is_ours(&self, signed: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_FIXED, self.pair.public_key().as_ref())
            .verify(signed, signature)
            .is_ok()
    }

    /// `/.well-known/openid-configuration` and `/openid/v1/jwks`.
    pub(super) fn discovery(&self, api: &ApiServer, path: &str) -> Option<Response> {
        let (value, content_type) = match path {
            "/.well-known/openid-configuration" => (
                json!({
                    "issuer": self.issuer,
                    "jwks_uri": format!("https://{}/openid/v1/jwks", api.config.advertise),
                    "response_types_supported": ["id_token"],
                    "subject_types_supported": ["public"],
                    "id_token_signing_alg_values_supported": ["ES256"],
                }),
                "application/json",
            ),
            "/openid/v1/jwks" => (json!({"keys": [self.jwk]}), "application/jwk-set+json"),
            _ => return None,
        };
        let mut response = json_response(200, &value);
        crate::discovery::content_type(&mut response, content_type);
        Some(response)
    }
}

/// Whether a key of a set signed this; `kid` picks the key when it is given.
pub(super) fn verify_with(jwks: &Value, algorithm: &str, kid: &str, signed: &[u8], signature: &[u8]) -> bool {
    let keys = jwks.get("keys").and_then(Value::as_array).into_iter().flatten();
    let bytes = |key: &Value, member: &str| {
        key.get(member).and_then(Value::as_str).and_then(|s| URL_SAFE_NO_PAD.decode(s).ok())
    };
    keys.filter(|key| kid.is_empty() || key["kid"].as_str().is_none_or(|id| id == kid)).any(|key| match algorithm {
        "ES256" => {
            let (Some(x), Some(y)) = (bytes(key, "x"), bytes(key, "y")) else { return false };
            let point = [&[4], x.as_slice(), &y].concat();
            UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_FIXED, point).verify(signed, signature).is_ok()
        }
        "RS256" => {
            let (Some(n), Some(e)) = (bytes(key, "n"), bytes(key, "e")) else { return false };
            signature::RsaPublicKeyComponents { n, e }
                .verify(&signature::RSA_PKCS1_2048_8192_SHA256, signed, signature)
                .is_ok()
        }
        _ => false,
    })
}
