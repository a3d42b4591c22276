//! Tokens of OpenID Connect issuers: keys from their discovery, claims to a user by name or by CEL.
//!
//! Source: KEP-3331, `k8s.io/apiserver/pkg/apis/apiserver.JWTAuthenticator`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_schema::cel::{Budget, Program, Scope, Val, Variable};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Mutex;

use super::keys::{Signed, verify_with};
use crate::outbound;
use crate::server::ApiServer;
use crate::user::UserInfo;

/// Keys are asked for again after this time.
const KEYS_LIVE: Duration = Duration::from_secs(3600);
/// A key that is not known makes the set be asked for again, but not more often than this.
const KEYS_PAUSE: Duration = Duration::from_secs(10);
/// Time for an issuer to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Names that an issuer may not give anybody.
const RESERVED: &str = "system:";

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Jwt {
    issuer: JwtIssuer,
    #[serde(default)]
    claim_validation_rules: Vec<ClaimRule>,
    claim_mappings: Mappings,
    #[serde(default)]
    user_validation_rules: Vec<UserRule>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct JwtIssuer {
    url: String,
    #[serde(rename = "discoveryURL", default)]
    discovery_url: String,
    #[serde(default)]
    certificate_authority: String,
    audiences: Vec<String>,
    #[serde(default)]
    audience_match_policy: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ClaimRule {
    #[serde(default)]
    claim: String,
    #[serde(default)]
    required_value: String,
    #[serde(default)]
    expression: String,
    #[serde(default)]
    message: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct UserRule {
    expression: String,
    #[serde(default)]
    message: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mappings {
    username: Mapping,
    #[serde(default)]
    groups: Mapping,
    #[serde(default)]
    uid: Mapping,
    #[serde(default)]
    extra: Vec<Extra>,
}

/// A claim with a prefix, or an expression.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mapping {
    #[serde(default)]
    claim: String,
    prefix: Option<String>,
    #[serde(default)]
    expression: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Extra {
    key: String,
    value_expression: String,
}

/// A trusted issuer, its expressions compiled.
#[derive(Clone, Debug)]
pub struct Issuer {
    jwt: Arc<Jwt>,
    programs: Arc<BTreeMap<String, Program>>,
    keys: Arc<Mutex<Keys>>,
}

#[derive(Debug, Default)]
struct Keys {
    set: Value,
    asked: Option<Instant>,
}

impl Issuer {
    /// Reads one entry of `jwt`; the error begins with the field.
    pub(super) fn compile(entry: Value) -> Result<Self, String> {
        let jwt: Jwt = serde_json::from_value(entry).map_err(|error| error.to_string())?;
        let (issuer, mappings) = (&jwt.issuer, &jwt.claim_mappings);
        for (field, url) in [("url", &issuer.url), ("discoveryURL", &issuer.discovery_url)] {
            let unset = field == "discoveryURL" && url.is_empty();
            if !unset && !url.starts_with("https://") {
                return Err(format!("issuer.{field}: Invalid value: {url:?}: URL scheme must be https"));
            }
        }
        if issuer.audiences.is_empty() || issuer.audiences.iter().any(String::is_empty) {
            return Err("issuer.audiences: Required value: at least one jwt[].issuer.audiences is required".into());
        }
        let known = match issuer.audience_match_policy.as_str() {
            "MatchAny" => true,
            policy => policy.is_empty() && issuer.audiences.len() == 1,
        };
        if !known {
            return Err("issuer.audienceMatchPolicy: Invalid value: must be MatchAny for multiple audiences".into());
        }
        let username = &mappings.username;
        if username.claim.is_empty() == username.expression.is_empty() {
            return Err("claimMappings.username: Required value: either claim or expression is required".into());
        }
        for (field, mapping) in [("username", username), ("groups", &mappings.groups)] {
            if !mapping.claim.is_empty() && mapping.prefix.is_none() {
                return Err(format!(
                    "claimMappings.{field}.prefix: Required value: prefix is required when claim is set. It can be set to an empty string to disable prefixing"
                ));
            }
            if !mapping.claim.is_empty() && !mapping.expression.is_empty() {
                return Err(format!("claimMappings.{field}: Invalid value: claim and expression can't both be set"));
            }
        }
        let mut programs = BTreeMap::new();
        let mut compile = |field: &str, source: &str, variable: &str| {
            if source.is_empty() || programs.contains_key(source) {
                return Ok(());
            }
            let program = Program::compile(source, &[Variable { name: variable, schema: None }])
                .map_err(|why| format!("{field}: Invalid value: {source:?}: compilation failed: {why}"))?;
            programs.insert(source.to_owned(), program);
            Ok::<(), String>(())
        };
        compile("claimMappings.username.expression", &username.expression, "claims")?;
        compile("claimMappings.groups.expression", &mappings.groups.expression, "claims")?;
        compile("claimMappings.uid.expression", &mappings.uid.expression, "claims")?;
        for extra in &mappings.extra {
            if !extra.key.contains('/') || extra.key.to_lowercase() != extra.key {
                return Err(format!(
                    "claimMappings.extra.key: Invalid value: {:?}: must be a domain-prefixed path in lower case",
                    extra.key
                ));
            }
            compile("claimMappings.extra.valueExpression", &extra.value_expression, "claims")?;
        }
        for rule in &jwt.claim_validation_rules {
            if rule.claim.is_empty() == rule.expression.is_empty() {
                return Err("claimValidationRules: Required value: claim or expression is required".into());
            }
            compile("claimValidationRules.expression", &rule.expression, "claims")?;
        }
        for rule in &jwt.user_validation_rules {
            compile("userValidationRules.expression", &rule.expression, "user")?;
        }
        Ok(Self { jwt: Arc::new(jwt), programs: Arc::new(programs), keys: Arc::default() })
    }

    /// `iss` of its tokens.
    pub fn url(&self) -> &str {
        &self.jwt.issuer.url
    }

    /// The user of a token of this issuer, or why it is nobody's.
    pub(super) async fn user(&self, api: &Arc<ApiServer>, token: &Signed<'_>) -> Result<UserInfo, String> {
        let claims = &token.claims;
        let audiences: Vec<&str> = match &claims["aud"] {
            Value::String(one) => vec![one],
            Value::Array(list) => list.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        if !self.jwt.issuer.audiences.iter().any(|wanted| audiences.contains(&wanted.as_str())) {
            return Err(format!("expected one of the audiences {:?}, got {audiences:?}", self.jwt.issuer.audiences));
        }
        if !self.is_signed(api, token).await? {
            return Err("failed to verify id token signature".into());
        }
        self.map(claims)
    }

    /// Whether one of the issuer's keys signed the token; its keys are asked for when they are old or lack this one.
    async fn is_signed(&self, api: &Arc<ApiServer>, token: &Signed<'_>) -> Result<bool, String> {
        let mut keys = self.keys.lock().await;
        let age = keys.asked.map(|at| at.elapsed());
        if age.is_some_and(|age| age < KEYS_LIVE) && verify_with(&keys.set, token) {
            return Ok(true);
        }
        if age.is_some_and(|age| age < KEYS_PAUSE) {
            return Ok(false);
        }
        keys.asked = Some(Instant::now());
        keys.set = tokio::time::timeout(PATIENCE, self.fetch(api))
            .await
            .unwrap_or_else(|_| Err("no answer in time".into()))
            .map_err(|why| format!("fetch the keys of {}: {why}", self.url()))?;
        Ok(verify_with(&keys.set, token))
    }

    async fn fetch(&self, api: &Arc<ApiServer>) -> Result<Value, String> {
        let issuer = &self.jwt.issuer;
        let ca = issuer.certificate_authority.as_bytes();
        let discovery = match issuer.discovery_url.as_str() {
            "" => format!("{}/.well-known/openid-configuration", issuer.url.trim_end_matches('/')),
            url => url.to_owned(),
        };
        let document = outbound::get_json(api, &discovery, ca).await?;
        if document["issuer"] != issuer.url.as_str() {
            return Err(format!("oidc: issuer did not match the issuer returned by provider: {}", document["issuer"]));
        }
        let at = document["jwks_uri"].as_str().ok_or("the discovery document names no jwks_uri")?;
        outbound::get_json(api, at, ca).await
    }

    /// The user that claims describe.
    fn map(&self, claims: &Value) -> Result<UserInfo, String> {
        let budget = Budget::of_object();
        let eval = |source: &str, variable: &str, value: &Value| -> Result<Value, String> {
            let program = self.programs.get(source).ok_or("the expression was not compiled")?;
            let mut scope = Scope::new();
            scope.value(variable, Val::from_json(value, None));
            let value = program.eval(&scope, &budget).map_err(|error| error.to_string())?;
            value.to_json().ok_or_else(|| format!("{source:?} has no JSON form"))
        };
        for rule in &self.jwt.claim_validation_rules {
            if rule.expression.is_empty() {
                if claims[&rule.claim] != rule.required_value.as_str() {
                    return Err(format!("oidc: the claim {} is not {:?}", rule.claim, rule.required_value));
                }
            } else if eval(&rule.expression, "claims", claims)? != Value::Bool(true) {
                return Err(format!("oidc: validation expression '{}' failed: {}", rule.expression, rule.message));
            }
        }
        let mappings = &self.jwt.claim_mappings;
        let one = |mapping: &Mapping| -> Result<Value, String> {
            if mapping.expression.is_empty() {
                return Ok(claims.get(&mapping.claim).cloned().unwrap_or_default());
            }
            eval(&mapping.expression, "claims", claims)
        };
        let prefixed =
            |mapping: &Mapping, name: &str| format!("{}{name}", mapping.prefix.as_deref().unwrap_or_default());
        let name = one(&mappings.username)?;
        let name = name.as_str().filter(|name| !name.is_empty()).ok_or("oidc: the token has no user name")?;
        // An address that nobody has confirmed is no name.
        if mappings.username.claim == "email" && claims.get("email_verified").is_some_and(|v| v != &Value::Bool(true)) {
            return Err("oidc: email not verified".into());
        }
        let mut user = UserInfo { name: prefixed(&mappings.username, name), ..UserInfo::default() };
        if !mappings.uid.claim.is_empty() || !mappings.uid.expression.is_empty() {
            user.uid = one(&mappings.uid)?.as_str().ok_or("oidc: the uid is no string")?.to_owned();
        }
        if !mappings.groups.claim.is_empty() || !mappings.groups.expression.is_empty() {
            user.groups = texts(one(&mappings.groups)?)?.iter().map(|g| prefixed(&mappings.groups, g)).collect();
        }
        for extra in &mappings.extra {
            let values = texts(eval(&extra.value_expression, "claims", claims)?)?;
            if !values.is_empty() {
                user.extra.insert(extra.key.clone(), values);
            }
        }
        let seen = json!({"username": user.name, "uid": user.uid, "groups": user.groups, "extra": user.extra});
        for rule in &self.jwt.user_validation_rules {
            if eval(&rule.expression, "user", &seen)? != Value::Bool(true) {
                return Err(format!("oidc: user validation failed: {}", rule.message));
            }
        }
        if user.name.starts_with(RESERVED) || user.groups.iter().any(|group| group.starts_with(RESERVED)) {
            return Err(format!("oidc: names and groups of an issuer must not begin with {RESERVED}"));
        }
        Ok(super::with_authenticated(user))
    }
}

/// A string, a list of strings or nothing, as a list without empty ones.
fn texts(value: Value) -> Result<Vec<String>, String> {
    let list = match value {
        Value::Null => Vec::new(),
        Value::Array(list) => list,
        one => vec![one],
    };
    let texts: Option<Vec<String>> = list.iter().map(|one| one.as_str().map(str::to_owned)).collect();
    let texts = texts.ok_or("oidc: expected a string or a list of strings")?;
    Ok(texts.into_iter().filter(|text| !text.is_empty()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn issuer(mappings: Value, rules: Value) -> Issuer {
        let mut entry = json!({"issuer": {"url": "https://id", "audiences": ["a"]}, "claimMappings": mappings});
        entry.as_object_mut().expect("an object").extend(rules.as_object().expect("an object").clone());
        Issuer::compile(entry).expect("well formed")
    }

    #[test]
    fn claims_become_a_user() {
        let mappings = json!({
            "username": {"claim": "sub", "prefix": "id:"},
            "groups": {"expression": "claims.roles.split(',')"},
            "uid": {"claim": "oid"},
            "extra": [{"key": "example.com/tenant", "valueExpression": "claims.?tenant.orValue('')"}],
        });
        let user = issuer(mappings, json!({}))
            .map(&json!({"sub": "jane", "roles": "dev,ops", "oid": "7", "tenant": "t"}))
            .expect("a user");
        assert_eq!((user.name.as_str(), user.uid.as_str()), ("id:jane", "7"));
        assert_eq!(user.groups, ["dev", "ops", "system:authenticated"]);
        assert_eq!(user.extra["example.com/tenant"], ["t"]);
    }

    #[test]
    fn rules_refuse() {
        let name = json!({"username": {"claim": "sub", "prefix": ""}});
        let rules = json!({
            "claimValidationRules": [{"expression": "claims.exp - claims.nbf <= 86400", "message": "too long"}],
            "userValidationRules": [{"expression": "!user.username.startsWith('root')", "message": "no root"}],
        });
        let issuer = issuer(name, rules);
        assert!(issuer.map(&json!({"sub": "jane", "exp": 2, "nbf": 1})).is_ok());
        for (claims, why) in [
            (json!({"sub": "jane", "exp": 100_000, "nbf": 1}), "too long"),
            (json!({"sub": "root2", "exp": 2, "nbf": 1}), "no root"),
            (json!({"sub": "system:admin", "exp": 2, "nbf": 1}), "system:"),
            (json!({"exp": 2, "nbf": 1}), "no user name"),
        ] {
            let error = issuer.map(&claims).expect_err("refused");
            assert!(error.contains(why), "{error}");
        }
    }
}
