//! Which schema a request falls under.

use std::collections::HashMap;
use std::sync::Arc;

use http::HeaderValue;
use k8s_openapi::api::flowcontrol::v1::{
    FlowSchema, NonResourcePolicyRule, PolicyRulesWithSubjects, ResourcePolicyRule, Subject,
};

use crate::http::{ResourceRoute, Route};
use crate::user::UserInfo;

/// A schema in force.
pub(crate) struct Schema {
    pub(crate) name: String,
    /// Name of its priority level.
    pub(crate) level: Arc<str>,
    pub(super) uid: HeaderValue,
    pub(super) level_uid: HeaderValue,
    rules: Vec<PolicyRulesWithSubjects>,
    /// `ByUser`, `ByNamespace` or nothing.
    distinguish: String,
}

/// All schemas in the order in which they are asked.
#[derive(Default)]
pub(super) struct Schemas(Vec<Arc<Schema>>);

impl Schemas {
    /// `levels` are the UIDs of the levels that exist; a schema whose level does not is out of force.
    pub(super) fn new(schemas: &[Arc<FlowSchema>], levels: &HashMap<Arc<str>, String>) -> Self {
        let header = |uid: &str| HeaderValue::from_str(uid).unwrap_or(HeaderValue::from_static(""));
        let mut found: Vec<(i32, Arc<Schema>)> = Vec::new();
        for schema in schemas {
            let Some(spec) = &schema.spec else { continue };
            let level: Arc<str> = spec.priority_level_configuration.name.as_str().into();
            let Some(level_uid) = levels.get(&level) else { continue };
            let made = Schema {
                name: schema.metadata.name.clone().unwrap_or_default(),
                uid: header(schema.metadata.uid.as_deref().unwrap_or_default()),
                level_uid: header(level_uid),
                level,
                rules: spec.rules.clone().unwrap_or_default(),
                distinguish: spec.distinguisher_method.as_ref().map(|m| m.type_.clone()).unwrap_or_default(),
            };
            found.push((spec.matching_precedence.unwrap_or_default(), Arc::new(made)));
        }
        found.sort_by(|(a, x), (b, y)| (a, &x.name).cmp(&(b, &y.name)));
        Self(found.into_iter().map(|(_, schema)| schema).collect())
    }

    /// The first that takes the request in; the last (`catch-all`) takes what nobody wants.
    pub(super) fn find(&self, user: &UserInfo, route: &Route) -> Option<Arc<Schema>> {
        self.0.iter().find(|schema| schema.matches(user, route)).or(self.0.last()).cloned()
    }
}

impl Schema {
    fn matches(&self, user: &UserInfo, route: &Route) -> bool {
        self.rules.iter().any(|rule| {
            rule.subjects.iter().any(|subject| is_subject(subject, user))
                && match &route.resource {
                    Some(resource) => rule.resource_rules.iter().flatten().any(|rule| is_resource(rule, resource)),
                    None => rule.non_resource_rules.iter().flatten().any(|rule| is_path(rule, route)),
                }
        })
    }

    /// What tells the flows of the schema apart.
    pub(super) fn distinguisher<'a>(&self, user: &'a UserInfo, route: &'a Route) -> &'a str {
        match self.distinguish.as_str() {
            "ByUser" => &user.name,
            "ByNamespace" => route.resource.as_ref().map(|r| r.namespace.as_str()).unwrap_or_default(),
            _ => "",
        }
    }
}

fn is_subject(subject: &Subject, user: &UserInfo) -> bool {
    if let Some(wanted) = &subject.user {
        return wanted.name == "*" || wanted.name == user.name;
    }
    if let Some(wanted) = &subject.group {
        return wanted.name == "*" || user.is_in(&wanted.name);
    }
    let Some(wanted) = &subject.service_account else { return false };
    let account = user.name.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
    account.is_some_and(|(ns, name)| ns == wanted.namespace && (wanted.name == "*" || name == wanted.name))
}

fn has(list: &[String], word: &str) -> bool {
    list.iter().any(|one| one == "*" || one == word)
}

fn is_resource(rule: &ResourcePolicyRule, route: &ResourceRoute) -> bool {
    let resource = if route.subresource.is_empty() {
        has(&rule.resources, &route.resource)
    } else {
        has(&rule.resources, &format!("{}/{}", route.resource, route.subresource))
    };
    let scope = if route.namespace.is_empty() {
        rule.cluster_scope == Some(true)
    } else {
        has(rule.namespaces.as_deref().unwrap_or_default(), &route.namespace)
    };
    has(&rule.verbs, route.verb.as_str()) && has(&rule.api_groups, &route.group) && resource && scope
}

fn is_path(rule: &NonResourcePolicyRule, route: &Route) -> bool {
    let url = |wanted: &String| {
        wanted == "*" || *wanted == route.path || wanted.strip_suffix('*').is_some_and(|p| route.path.starts_with(p))
    };
    has(&rule.verbs, route.verb) && rule.non_resource_urls.iter().any(url)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::http::Query;

    fn schema(name: &str, precedence: i32, rules: &serde_json::Value) -> Arc<FlowSchema> {
        let value = json!({"metadata": {"name": name, "uid": name}, "spec": {"matchingPrecedence": precedence,
            "priorityLevelConfiguration": {"name": "level"}, "distinguisherMethod": {"type": "ByUser"}, "rules": [rules]}});
        Arc::new(serde_json::from_value(value).expect("a FlowSchema"))
    }

    #[test]
    fn the_lowest_precedence_that_matches_decides() {
        let all =
            json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "clusterScope": true, "namespaces": ["*"]});
        let bot = json!([{"kind": "ServiceAccount", "serviceAccount": {"namespace": "n", "name": "*"}}]);
        let everyone = json!([{"kind": "Group", "group": {"name": "system:authenticated"}}]);
        let status = json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods/status"], "namespaces": ["n"]});
        let paths = json!([{"verbs": ["get"], "nonResourceURLs": ["/healthz", "/apis/*"]}]);
        let schemas = [
            schema("catch-all", 10_000, &json!({"subjects": everyone, "resourceRules": [all]})),
            schema("bots", 500, &json!({"subjects": bot, "resourceRules": [status], "nonResourceRules": paths})),
        ];
        let levels = HashMap::from([("level".into(), "uid".to_owned())]);
        let found = |user: &str, path: &str| {
            let route = Route::parse(&http::Method::GET, path, &Query::default());
            let user = UserInfo::new(user, &[]);
            Schemas::new(&schemas, &levels).find(&user, &route).expect("one").name.clone()
        };
        let bot = "system:serviceaccount:n:b";
        assert_eq!(found(bot, "/api/v1/namespaces/n/pods/p/status"), "bots");
        assert_eq!(found(bot, "/api/v1/namespaces/n/pods/p"), "catch-all");
        assert_eq!(found(bot, "/api/v1/namespaces/m/pods/p/status"), "catch-all");
        assert_eq!(found("system:serviceaccount:m:b", "/api/v1/namespaces/n/pods/p/status"), "catch-all");
        assert_eq!((found(bot, "/apis/apps"), found(bot, "/version")), ("bots".into(), "catch-all".into()));
        assert!(Schemas::new(&schemas, &HashMap::new()).0.is_empty(), "a schema without its level is out of force");
    }
}
