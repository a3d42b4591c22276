//! Which requests are written down, and how much of them: `audit.k8s.io/v1` Policy.

use serde::Deserialize;

use crate::http::Route;
use crate::user::UserInfo;

/// How much of a request is written down.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    /// Nothing.
    #[default]
    None,
    /// Who did what when.
    Metadata,
    /// And what was sent.
    Request,
    /// And what was answered.
    RequestResponse,
}

impl Level {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Metadata => "Metadata",
            Self::Request => "Request",
            Self::RequestResponse => "RequestResponse",
        }
    }
}

/// Moments of a request.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub(super) enum Stage {
    /// Before anything was done.
    RequestReceived,
    /// A watch has begun.
    ResponseStarted,
    /// The answer is there.
    ResponseComplete,
    /// Something went wrong inside.
    Panic,
}

impl Stage {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::RequestReceived => "RequestReceived",
            Self::ResponseStarted => "ResponseStarted",
            Self::ResponseComplete => "ResponseComplete",
            Self::Panic => "Panic",
        }
    }
}

/// A policy: the first rule that takes a request in decides.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Policy {
    api_version: String,
    kind: String,
    #[serde(default)]
    #[expect(dead_code, reason = "a policy file is an object and may have a name")]
    metadata: serde_json::Value,
    rules: Vec<Rule>,
    #[serde(default)]
    omit_stages: Vec<Stage>,
    #[serde(default)]
    omit_managed_fields: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Rule {
    level: Level,
    #[serde(default)]
    users: Vec<String>,
    #[serde(default)]
    user_groups: Vec<String>,
    #[serde(default)]
    verbs: Vec<String>,
    #[serde(default)]
    resources: Vec<Resources>,
    #[serde(default)]
    namespaces: Vec<String>,
    #[serde(default, rename = "nonResourceURLs")]
    non_resource_urls: Vec<String>,
    #[serde(default)]
    omit_stages: Vec<Stage>,
    omit_managed_fields: Option<bool>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Resources {
    #[serde(default)]
    group: String,
    #[serde(default)]
    resources: Vec<String>,
    #[serde(default)]
    resource_names: Vec<String>,
}

/// What a policy says of a request.
#[derive(Clone, Debug, Default)]
pub(super) struct Verdict {
    pub(super) level: Level,
    pub(super) omit_stages: Vec<Stage>,
    pub(super) omit_managed_fields: bool,
}

impl Policy {
    /// Reads a policy in YAML or JSON.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let policy: Self = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
        if policy.api_version != "audit.k8s.io/v1" || policy.kind != "Policy" {
            return Err(format!(
                "it holds {}, Kind={}, not audit.k8s.io/v1, Kind=Policy",
                policy.api_version, policy.kind
            ));
        }
        if policy.rules.is_empty() {
            return Err("loaded illegal policy with 0 rules".into());
        }
        for (at, rule) in policy.rules.iter().enumerate() {
            let of_resources = !rule.resources.is_empty() || !rule.namespaces.is_empty();
            if of_resources && !rule.non_resource_urls.is_empty() {
                return Err(format!(
                    "rules[{at}].nonResourceURLs: rules cannot apply to both regular resources and non-resource URLs"
                ));
            }
        }
        Ok(policy)
    }

    pub(super) fn judge(&self, user: &UserInfo, route: &Route) -> Verdict {
        let Some(rule) = self.rules.iter().find(|rule| rule.takes(user, route)) else { return Verdict::default() };
        let mut omit_stages = self.omit_stages.clone();
        omit_stages.extend(&rule.omit_stages);
        let omit_managed_fields = rule.omit_managed_fields.unwrap_or(self.omit_managed_fields);
        Verdict { level: rule.level, omit_stages, omit_managed_fields }
    }
}

impl Rule {
    fn takes(&self, user: &UserInfo, route: &Route) -> bool {
        let any = |list: &[String], word: &str| list.is_empty() || list.iter().any(|one| one == word);
        if !any(&self.users, &user.name)
            || !(self.user_groups.is_empty() || self.user_groups.iter().any(|group| user.is_in(group)))
            || !any(&self.verbs, route.verb)
        {
            return false;
        }
        match &route.resource {
            Some(r) => {
                let whole = if r.subresource.is_empty() {
                    r.resource.clone()
                } else {
                    format!("{}/{}", r.resource, r.subresource)
                };
                self.non_resource_urls.is_empty()
                    && any(&self.namespaces, &r.namespace)
                    && (self.resources.is_empty()
                        || self.resources.iter().any(|one| {
                            one.group == r.group
                                && any(&one.resource_names, &r.name)
                                && (one.resources.is_empty()
                                    || one.resources.iter().any(|name| {
                                        name == "*"
                                            || *name == whole
                                            || name.strip_prefix("*/").is_some_and(|sub| sub == r.subresource)
                                            || name.strip_suffix("/*").is_some_and(|resource| resource == r.resource)
                                    }))
                        }))
            }
            None => {
                self.resources.is_empty()
                    && self.namespaces.is_empty()
                    && (self.non_resource_urls.is_empty()
                        || self.non_resource_urls.iter().any(|url| match url.strip_suffix('*') {
                            Some(prefix) => route.path.starts_with(prefix),
                            None => route.path == *url,
                        }))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use http::Method;

    use super::*;
    use crate::http::Query;

    #[test]
    fn the_first_rule_that_fits_decides() {
        let policy = Policy::parse(
            "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules:\n\
             - {level: None, users: ['system:kube-proxy'], verbs: [watch]}\n\
             - {level: RequestResponse, resources: [{group: '', resources: [pods]}]}\n\
             - {level: Request, resources: [{group: '', resources: ['pods/*', '*/status'], resourceNames: [a]}]}\n\
             - {level: Metadata, nonResourceURLs: ['/healthz*']}\n",
        )
        .expect("well formed");
        let level = |user: &str, path: &str, query: &str| {
            let route = Route::parse(&Method::GET, path, &Query::parse(Some(query)));
            policy.judge(&UserInfo::new(user, &[]), &route).level
        };
        assert_eq!(level("system:kube-proxy", "/api/v1/pods", "watch=1"), Level::None);
        assert_eq!(level("jane", "/api/v1/pods", "watch=1"), Level::RequestResponse);
        assert_eq!(level("jane", "/api/v1/namespaces/n/pods/a/log", ""), Level::Request);
        assert_eq!(level("jane", "/api/v1/namespaces/n/pods/b/log", ""), Level::None);
        assert_eq!(level("jane", "/api/v1/nodes/a/status", ""), Level::Request);
        assert_eq!(level("jane", "/healthz/ping", ""), Level::Metadata);
        assert_eq!(level("jane", "/apis", ""), Level::None);
        for bad in [
            "apiVersion: v1\nkind: Policy\nrules: [{level: None}]",
            "apiVersion: audit.k8s.io/v1\nkind: Policy\nrules: []",
        ] {
            assert!(Policy::parse(bad).is_err(), "{bad}");
        }
    }
}
