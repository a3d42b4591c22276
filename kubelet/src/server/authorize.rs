//! Whether somebody may: asked of the API server as access to a subresource of this node.
//! Source: kubernetes.io "Kubelet authentication/authorization", KEP-2862 (fine-grained authorisation).

use std::collections::HashMap;
use std::time::{Duration, Instant};

use http::Method;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::{Api, Client, api::PostParams};
use parking_lot::Mutex;

use super::auth::Identity;

/// How long a yes and a no count.
const ALLOWED_TTL: Duration = Duration::from_secs(300);
const DENIED_TTL: Duration = Duration::from_secs(30);
/// Answers remembered.
const MAX_ANSWERS: usize = 4096;

/// The subresources of the node that allow a path, any of which will do.
pub(super) fn subresources(path: &str) -> &'static [&'static str] {
    let below = |prefix: &str| path == prefix || path.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('/'));
    if below("/stats") {
        &["stats"]
    } else if below("/metrics") {
        &["metrics"]
    } else if below("/logs") {
        &["log"]
    } else if below("/checkpoint") {
        &["checkpoint"]
    } else if below("/healthz") {
        &["healthz", "proxy"]
    } else if below("/pods") || below("/runningpods") {
        &["pods", "proxy"]
    } else if below("/configz") {
        &["configz", "proxy"]
    } else {
        &["proxy"]
    }
}

/// The verb of a method.
pub(super) fn verb(method: &Method) -> &'static str {
    match *method {
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "get",
    }
}

type Question = (Identity, &'static str, &'static str);

/// Asks and remembers.
pub(super) struct Authorizer {
    client: Client,
    node: String,
    known: Mutex<HashMap<Question, (bool, Instant)>>,
}

impl Authorizer {
    pub(super) fn new(client: Client, node: String) -> Self {
        Self { client, node, known: Mutex::default() }
    }

    /// Whether the user may; `Err` if nobody could be asked.
    pub(super) async fn allows(&self, who: &Identity, method: &Method, path: &str) -> Result<bool, String> {
        for subresource in subresources(path) {
            if self.ask(who, verb(method), subresource).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn ask(&self, who: &Identity, verb: &'static str, subresource: &'static str) -> Result<bool, String> {
        let question = (who.clone(), verb, subresource);
        if let Some((allowed, until)) = self.known.lock().get(&question)
            && Instant::now() < *until
        {
            return Ok(*allowed);
        }
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(who.username.clone()),
                uid: Some(who.uid.clone()).filter(|uid| !uid.is_empty()),
                groups: Some(who.groups.clone()),
                extra: Some(who.extra.clone()).filter(|extra| !extra.is_empty()),
                resource_attributes: Some(ResourceAttributes {
                    version: Some("v1".into()),
                    resource: Some("nodes".into()),
                    subresource: Some(subresource.into()),
                    name: Some(self.node.clone()),
                    verb: Some(verb.into()),
                    ..ResourceAttributes::default()
                }),
                non_resource_attributes: None,
            },
            ..SubjectAccessReview::default()
        };
        let api: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let answer = api.create(&PostParams::default(), &review).await.map_err(|error| error.to_string())?;
        let allowed = answer.status.is_some_and(|status| status.allowed && status.denied != Some(true));
        let mut known = self.known.lock();
        if known.len() >= MAX_ANSWERS {
            let now = Instant::now();
            known.retain(|_, (_, until)| *until > now);
            if known.len() >= MAX_ANSWERS {
                known.clear();
            }
        }
        known.insert(question, (allowed, Instant::now() + if allowed { ALLOWED_TTL } else { DENIED_TTL }));
        Ok(allowed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_map_to_subresources() {
        for (path, expected) in [
            ("/stats/summary", "stats"),
            ("/metrics", "metrics"),
            ("/metrics/cadvisor", "metrics"),
            ("/logs/syslog", "log"),
            ("/pods", "pods"),
            ("/healthz", "healthz"),
            ("/exec/a/b/c", "proxy"),
            ("/containerLogs/a/b/c", "proxy"),
            ("/metricsx", "proxy"),
        ] {
            assert_eq!(subresources(path)[0], expected, "{path}");
        }
    }
}
