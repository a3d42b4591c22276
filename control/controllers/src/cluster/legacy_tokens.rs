//! Tokens in secrets that were made for accounts by themselves, as clusters before v1.24 did (KEP-2799): one that nobody has used
//! for a year is marked as invalid, and removed a year later.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use coracle_api::authn::{INVALID_SINCE, LAST_USED};
use coracle_api::informer::Informer;
use coracle_api::server::ApiServer;
use coracle_api::user::UserInfo;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::civil::Date;
use k8s_openapi::jiff::{Timestamp, ToSpan as _, tz::TimeZone};
use kube::api::PostParams;
use kube::{Api, Client, ResourceExt};
use serde_json::json;

use super::token_secrets::{ACCOUNT_UID, account_of};
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources};

/// Says since when uses of such tokens are written down.
const TRACKING: &str = "kube-apiserver-legacy-service-account-token-tracking";
const SINCE: &str = "since";
const SYSTEM: &str = "kube-system";
/// Days without use after which a token is invalid, and days of that after which it goes
/// (`--legacy-service-account-token-clean-up-period`).
const UNUSED_DAYS: i64 = 365;
/// How often tokens are looked at.
const PERIOD: Duration = Duration::from_secs(24 * 3600);

pub(crate) struct LegacyTokens {
    host: Host,
    /// Of the API server, which keeps the record of uses.
    server: Client,
    secrets: Arc<Informer<Secret>>,
    accounts: Arc<Informer<ServiceAccount>>,
    pods: Arc<Informer<Pod>>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Verdict {
    Keep,
    Mark,
    Delete,
}

fn day(time: Timestamp) -> Date {
    time.to_zoned(TimeZone::UTC).date()
}

/// What is to be done about a token that was made by itself and that no pod mounts.
fn verdict(secret: &Secret, today: Date) -> Verdict {
    let limit = today.saturating_sub(UNUSED_DAYS.days());
    let is_new = secret.creation_timestamp().is_none_or(|time| day(time.0) >= limit);
    // Who wrote a date that is none meant something that is not known here.
    let used = secret
        .labels()
        .get(LAST_USED)
        .is_some_and(|date| date.parse().is_ok_and(|date: Date| date >= limit) || date.parse::<Date>().is_err());
    if is_new || used || secret.metadata.deletion_timestamp.is_some() {
        return Verdict::Keep;
    }
    match secret.labels().get(INVALID_SINCE).map(|date| date.parse::<Date>()) {
        Some(Ok(since)) if since >= limit => Verdict::Keep,
        Some(Ok(_)) => Verdict::Delete,
        Some(Err(_)) | None => Verdict::Mark,
    }
}

/// Names of the secrets that a pod uses.
fn mounted(pod: &Pod) -> Vec<String> {
    let Some(spec) = &pod.spec else { return Vec::new() };
    let volumes = spec.volumes.iter().flatten().flat_map(|volume| {
        let own = volume.secret.as_ref().and_then(|secret| secret.secret_name.clone());
        let projected = volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten());
        own.into_iter().chain(projected.filter_map(|source| source.secret.as_ref().map(|secret| secret.name.clone())))
    });
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let variables = containers.flat_map(|container| {
        let all = container
            .env_from
            .iter()
            .flatten()
            .filter_map(|from| from.secret_ref.as_ref().map(|secret| secret.name.clone()));
        let sources = container.env.iter().flatten().filter_map(|variable| variable.value_from.as_ref());
        all.chain(sources.filter_map(|source| source.secret_key_ref.as_ref().map(|secret| secret.name.clone())))
    });
    volumes.chain(variables).collect()
}

impl LegacyTokens {
    pub(crate) fn new(api: &Arc<ApiServer>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        let server = api.client(UserInfo::apiserver());
        Self { secrets: host.informer(), accounts: host.informer(), pods: host.informer(), server, host }
    }

    /// Since when uses are written down: from the first start on.
    async fn tracked_since(&self, today: Date) -> Result<Option<Date>, Error> {
        let maps: Api<ConfigMap> = Api::namespaced(self.server.clone(), SYSTEM);
        let found = maps.get_opt(TRACKING).await.map_err(Error::at("read since when tokens are tracked"))?;
        if let Some(map) = found {
            let since = map.data.as_ref().and_then(|data| data.get(SINCE));
            return Ok(since.and_then(|date| date.parse().ok()));
        }
        let map = ConfigMap {
            metadata: ObjectMeta {
                name: Some(TRACKING.into()),
                namespace: Some(SYSTEM.into()),
                ..ObjectMeta::default()
            },
            data: Some([(SINCE.to_owned(), today.to_string())].into()),
            ..ConfigMap::default()
        };
        maps.create(&PostParams::default(), &map).await.map_err(Error::at("write since when tokens are tracked"))?;
        Ok(Some(today))
    }

    /// Whether the secret was made by itself: its account names it.
    fn is_automatic(&self, secret: &Secret) -> bool {
        let account = account_of(secret).and_then(|name| self.accounts.get(&secret.namespace()?, name));
        let uid = secret.annotations().get(ACCOUNT_UID).filter(|uid| !uid.is_empty());
        account.is_some_and(|account| {
            uid.is_none_or(|uid| account.uid().as_ref() == Some(uid))
                && account.secrets.iter().flatten().any(|named| named.name == secret.metadata.name)
        })
    }
}

impl Controller for LegacyTokens {
    const NAME: &'static str = "legacy-service-account-token-cleaner";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.queue.add(Key::new("", ""));
    }

    async fn reconcile(&self, _: &Key) -> Result<Outcome, Error> {
        let today = day(Timestamp::now());
        let since = self.tracked_since(today).await?;
        if since.is_none_or(|since| since.saturating_add((UNUSED_DAYS + 1).days()) > today) {
            return Ok(Outcome::After(PERIOD));
        }
        for secret in self.secrets.list() {
            let verdict = verdict(&secret, today);
            if verdict == Verdict::Keep || !self.is_automatic(&secret) {
                continue;
            }
            let (namespace, name) = (secret.namespace().unwrap_or_default(), secret.name_any());
            let used: HashSet<String> = self.pods.list_ns(&namespace).flat_map(|pod| mounted(&pod)).collect();
            if used.contains(&name) {
                continue;
            }
            let api: Api<Secret> = Api::namespaced(self.host.client.clone(), &namespace);
            if verdict == Verdict::Delete {
                self.host.delete(&api, &*secret).await?;
            } else {
                let labels = json!({INVALID_SINCE: today.to_string()});
                self.host.patch(&api, &name, json!({"metadata": {"uid": secret.uid(), "labels": labels}})).await?;
            }
        }
        Ok(Outcome::After(PERIOD))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn a_token_is_marked_after_a_year_without_use_and_goes_after_another() {
        let today: Date = "2026-06-01".parse().expect("a date");
        let of = |created: &str, labels: Value| {
            let secret = json!({"metadata": {"name": "s", "creationTimestamp": created, "labels": labels}});
            verdict(&serde_json::from_value(secret).expect("a secret"), today)
        };
        let old = "2020-01-01T00:00:00Z";
        assert_eq!(of("2025-07-01T00:00:00Z", json!({})), Verdict::Keep, "young");
        assert_eq!(of(old, json!({LAST_USED: "2025-06-02"})), Verdict::Keep, "used");
        assert_eq!(of(old, json!({LAST_USED: "some day"})), Verdict::Keep, "not known");
        assert_eq!(of(old, json!({})), Verdict::Mark);
        assert_eq!(of(old, json!({LAST_USED: "2025-05-01"})), Verdict::Mark);
        assert_eq!(of(old, json!({INVALID_SINCE: "2026-01-01"})), Verdict::Keep, "marked not long ago");
        assert_eq!(of(old, json!({INVALID_SINCE: "2025-01-01"})), Verdict::Delete);
    }
}
