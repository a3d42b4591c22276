//! Keys that sign and verify tokens, and their publication as OpenID Connect discovery.

use std::collections::HashSet;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use parking_lot::Mutex;
use ring::rand::SystemRandom;
use ring::signature::{self, EcdsaKeyPair, KeyPair as _, UnparsedPublicKey};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::http::{Response, json_response};
use crate::pki::{Pki, PkiError};
use crate::server::{ApiServer, Config};

/// Signatures that are remembered as good, 32 bytes each: more than a cluster has pods that talk to it.
const VERIFIED: usize = 16_384;

/// The keys of a server.
pub(super) struct Keys {
    /// `iss` of service account tokens.
    pub(super) issuer: String,
    /// Identifier of the signing key.
    pub(super) id: String,
    pair: EcdsaKeyPair,
    random: SystemRandom,
    jwk: Value,
    /// Digests of tokens whose signature was good. A verification costs as much as a whole GET; what a token claims, how
    /// long, and whether its account still exists is looked at each time.
    verified: Mutex<HashSet<[u8; 32]>>,
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
        Ok(Self { issuer, id, pair, random, jwk, verified: Mutex::default() })
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
        let digest: [u8; 32] = Sha256::new().chain_update(signature).chain_update(signed).finalize().into();
        if self.verified.lock().contains(&digest) {
            return true;
        }
        // The signature's length is fixed, so no other pair has the same bytes in a row.
        let good = UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_FIXED, self.pair.public_key().as_ref())
            .verify(signed, signature)
            .is_ok();
        if good {
            let mut verified = self.verified.lock();
            if verified.len() >= VERIFIED {
                verified.clear();
            }
            verified.insert(digest);
        }
        good
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

/// A token, taken apart.
pub(super) struct Signed<'a> {
    /// Header and claims as they were signed.
    pub(super) text: &'a str,
    pub(super) signature: Vec<u8>,
    pub(super) header: Value,
    pub(super) claims: Value,
}

impl<'a> Signed<'a> {
    /// `None` when it is no JSON Web Token.
    pub(super) fn parse(token: &'a str) -> Option<Self> {
        let (text, signature) = token.rsplit_once('.')?;
        let (header, claims) = text.split_once('.')?;
        let parse = |part: &str| serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).ok()?).ok();
        Some(Self {
            text,
            signature: URL_SAFE_NO_PAD.decode(signature).ok()?,
            header: parse(header)?,
            claims: parse(claims)?,
        })
    }
}

/// Whether a key of a set signed this; `kid` picks the key when it is given.
pub(super) fn verify_with(jwks: &Value, token: &Signed<'_>) -> bool {
    let text = |member: &str| token.header.get(member).and_then(Value::as_str).unwrap_or_default();
    let (algorithm, kid) = (text("alg"), text("kid"));
    let rsa = match algorithm {
        "RS256" => Some(&signature::RSA_PKCS1_2048_8192_SHA256),
        "RS384" => Some(&signature::RSA_PKCS1_2048_8192_SHA384),
        "RS512" => Some(&signature::RSA_PKCS1_2048_8192_SHA512),
        "PS256" => Some(&signature::RSA_PSS_2048_8192_SHA256),
        "PS384" => Some(&signature::RSA_PSS_2048_8192_SHA384),
        "PS512" => Some(&signature::RSA_PSS_2048_8192_SHA512),
        _ => None,
    };
    let curve: Option<&dyn signature::VerificationAlgorithm> = match algorithm {
        "ES256" => Some(&signature::ECDSA_P256_SHA256_FIXED),
        "ES384" => Some(&signature::ECDSA_P384_SHA384_FIXED),
        _ => None,
    };
    let keys = jwks.get("keys").and_then(Value::as_array).into_iter().flatten();
    let bytes = |key: &Value, member: &str| {
        key.get(member).and_then(Value::as_str).and_then(|s| URL_SAFE_NO_PAD.decode(s).ok())
    };
    keys.filter(|key| kid.is_empty() || key["kid"].as_str().is_none_or(|id| id == kid)).any(|key| {
        if let (Some(rsa), Some(n), Some(e)) = (rsa, bytes(key, "n"), bytes(key, "e")) {
            return signature::RsaPublicKeyComponents { n, e }
                .verify(rsa, token.text.as_bytes(), &token.signature)
                .is_ok();
        }
        if let (Some(curve), Some(x), Some(y)) = (curve, bytes(key, "x"), bytes(key, "y")) {
            let point = [&[4], x.as_slice(), &y].concat();
            return UnparsedPublicKey::new(curve, point).verify(token.text.as_bytes(), &token.signature).is_ok();
        }
        false
    })
}
