//! RBAC: roles and bindings from the store, held in memory as an index by subject.
//!
//! Source: `plugin/pkg/auth/authorizer/rbac`. Aggregated cluster roles hold what their selectors select at once, whatever the
//! controller has written into them so far.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use coracle_store::{ListOptions, Store};
use parking_lot::RwLock;
use serde_json::Value;

use crate::authz::{Attributes, Authorizer, Decision};
use crate::kinds::edit::{list, text};
use crate::kinds::meta;
use crate::user::UserInfo;

const PREFIX: &str = "/registry/rbac.authorization.k8s.io/";

/// One rule of a role.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    pub verbs: Vec<String>,
    pub groups: Vec<String>,
    pub resources: Vec<String>,
    /// Names that the rule is limited to; empty for all.
    pub names: Vec<String>,
    /// Paths that are no resources; such a rule has no groups and resources.
    pub urls: Vec<String>,
}

fn strings(v: &Value, field: &str) -> Vec<String> {
    list(v, field).iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn any(list: &[String], word: &str) -> bool {
    list.iter().any(|w| w == "*" || w == word)
}

impl Rule {
    pub fn parse(v: &Value) -> Rule {
        Rule {
            verbs: strings(v, "verbs"),
            groups: strings(v, "apiGroups"),
            resources: strings(v, "resources"),
            names: strings(v, "resourceNames"),
            urls: strings(v, "nonResourceURLs"),
        }
    }

    /// All rules of a role object.
    pub fn parse_all(role: &Value) -> Vec<Rule> {
        list(role, "rules").iter().map(Rule::parse).collect()
    }

    fn resource_matches(&self, resource: &str, subresource: &str) -> bool {
        self.resources.iter().any(|r| match r.as_str() {
            "*" => true,
            r if subresource.is_empty() => r == resource,
            r => match r.split_once('/') {
                Some((a, b)) => (a == "*" || a == resource) && b == subresource,
                None => false,
            },
        })
    }

    fn url_matches(&self, path: &str) -> bool {
        self.urls.iter().any(|u| u == "*" || u == path || u.strip_suffix('*').is_some_and(|p| path.starts_with(p)))
    }

    /// Whether the rule allows a request.
    pub fn allows(&self, a: &Attributes<'_>) -> bool {
        if !any(&self.verbs, a.verb) {
            return false;
        }
        if !a.is_resource {
            return self.url_matches(a.path);
        }
        any(&self.groups, a.group)
            && self.resource_matches(a.resource, a.subresource)
            && (self.names.is_empty() || self.names.iter().any(|n| n == a.name))
    }

    /// The rule taken apart into rules of one verb, group, resource and name each, so that each can be looked for.
    fn parts(&self) -> Vec<Rule> {
        let mut out = Vec::new();
        let one = |s: &String| vec![s.clone()];
        for verb in &self.verbs {
            for url in &self.urls {
                out.push(Rule { verbs: one(verb), urls: one(url), ..Rule::default() });
            }
            for group in &self.groups {
                for resource in &self.resources {
                    let base =
                        Rule { verbs: one(verb), groups: one(group), resources: one(resource), ..Rule::default() };
                    if self.names.is_empty() {
                        out.push(base);
                    } else {
                        out.extend(self.names.iter().map(|n| Rule { names: one(n), ..base.clone() }));
                    }
                }
            }
        }
        out
    }

    /// Whether this rule grants everything that `part` (of one thing each) does.
    fn covers(&self, part: &Rule) -> bool {
        let all = |have: &[String], want: &[String]| want.iter().all(|w| any(have, w));
        let resource = |w: &String| {
            self.resources.iter().any(|h| {
                h == "*" || h == w || h.strip_prefix('*').is_some_and(|s| s.starts_with('/') && w.ends_with(s))
            })
        };
        let url = |w: &String| {
            self.urls.iter().any(|h| h == "*" || h == w || h.strip_suffix('*').is_some_and(|p| w.starts_with(p)))
        };
        all(&self.verbs, &part.verbs)
            && all(&self.groups, &part.groups)
            && part.resources.iter().all(resource)
            && part.urls.iter().all(url)
            && (self.names.is_empty() || (!part.names.is_empty() && part.names.iter().all(|n| self.names.contains(n))))
    }

    /// As the API's messages show a rule: `{APIGroups:["apps"], Resources:["deployments"], Verbs:["get"]}`.
    fn describe(&self) -> String {
        let mut out = Vec::new();
        for (name, words) in [
            ("APIGroups", &self.groups),
            ("Resources", &self.resources),
            ("ResourceNames", &self.names),
            ("NonResourceURLs", &self.urls),
            ("Verbs", &self.verbs),
        ] {
            if !words.is_empty() {
                let quoted: Vec<String> = words.iter().map(|w| format!("{w:?}")).collect();
                out.push(format!("{name}:[{}]", quoted.join(" ")));
            }
        }
        format!("{{{}}}", out.join(", "))
    }
}

/// What `wanted` grants beyond `held`, in words, one line a rule; empty when everything is covered.
pub fn missing(held: &[Rule], wanted: &[Rule]) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for rule in wanted {
        let mut lost: Option<Rule> = None;
        for part in rule.parts() {
            if held.iter().any(|h| h.covers(&part)) {
                continue;
            }
            // Verbs of one resource stand together, as people read it.
            match &mut lost {
                Some(l)
                    if l.groups == part.groups
                        && l.resources == part.resources
                        && l.names == part.names
                        && l.urls == part.urls =>
                {
                    l.verbs.extend(part.verbs);
                }
                _ => {
                    lines.extend(lost.take().map(|l| l.describe()));
                    lost = Some(part);
                }
            }
        }
        lines.extend(lost.map(|l| l.describe()));
    }
    lines.sort();
    lines.dedup();
    lines
}

/// A binding as the index holds it.
#[derive(Debug)]
struct Binding {
    /// Empty for cluster role bindings.
    namespace: String,
    name: String,
    role_kind: String,
    role: String,
    /// `User "bob"`, for the reason.
    subject: String,
}

#[derive(Default)]
struct Index {
    /// Rules by namespace (empty for cluster roles) and name.
    roles: HashMap<(String, String), Arc<Vec<Rule>>>,
    /// Bindings by subject: `u:name` or `g:name`.
    bindings: HashMap<String, Vec<Arc<Binding>>>,
}

impl Index {
    /// Builds the index from the objects by their key in the store.
    fn build(objects: &HashMap<String, Value>) -> Index {
        let mut out = Index::default();
        for (key, o) in objects {
            let rest = key.strip_prefix(PREFIX).unwrap_or(key);
            let (ns, name) = (crate::object::namespace(o), crate::object::name(o));
            match rest.split('/').next().unwrap_or_default() {
                "roles" | "clusterroles" => {
                    let mut rules = Rule::parse_all(o);
                    for s in o
                        .pointer("/aggregationRule/clusterRoleSelectors")
                        .and_then(Value::as_array)
                        .into_iter()
                        .flatten()
                    {
                        let none = Value::Null;
                        rules.extend(
                            objects
                                .iter()
                                .filter(|(k, _)| k[PREFIX.len().min(k.len())..].starts_with("clusterroles/"))
                                .filter(|(_, r)| meta::selects(s, r.pointer("/metadata/labels").unwrap_or(&none)))
                                .flat_map(|(_, r)| Rule::parse_all(r)),
                        );
                    }
                    out.roles.insert((ns.to_owned(), name.to_owned()), Arc::new(rules));
                }
                "rolebindings" | "clusterrolebindings" => {
                    for s in list(o, "subjects") {
                        let n = text(s, "name");
                        let (key, shown) = match text(s, "kind") {
                            "User" => (format!("u:{n}"), format!("User {n:?}")),
                            "Group" => (format!("g:{n}"), format!("Group {n:?}")),
                            "ServiceAccount" => {
                                let at = if text(s, "namespace").is_empty() { ns } else { text(s, "namespace") };
                                (format!("u:system:serviceaccount:{at}:{n}"), format!("ServiceAccount \"{n}/{at}\""))
                            }
                            _ => continue,
                        };
                        let role = o.get("roleRef").cloned().unwrap_or_default();
                        out.bindings.entry(key).or_default().push(Arc::new(Binding {
                            namespace: ns.to_owned(),
                            name: name.to_owned(),
                            role_kind: text(&role, "kind").to_owned(),
                            role: text(&role, "name").to_owned(),
                            subject: shown,
                        }));
                    }
                }
                _ => {}
            }
        }
        out
    }

    /// Calls `f` with each binding of the user that counts in `namespace`, and its rules, until it says stop.
    fn visit(&self, user: &UserInfo, namespace: &str, mut f: impl FnMut(&Binding, &[Rule]) -> bool) {
        let keys = std::iter::once(format!("u:{}", user.name)).chain(user.groups.iter().map(|g| format!("g:{g}")));
        for key in keys {
            for b in self.bindings.get(&key).into_iter().flatten() {
                if !b.namespace.is_empty() && b.namespace != namespace {
                    continue;
                }
                let at = if b.role_kind == "Role" { b.namespace.clone() } else { String::new() };
                if let Some(rules) = self.roles.get(&(at, b.role.clone()))
                    && !f(b, rules)
                {
                    return;
                }
            }
        }
    }
}

/// The authoriser, kept current by a task that ends with it.
pub struct Policy {
    index: RwLock<Arc<Index>>,
}

impl Policy {
    /// Starts following the store; needs a running tokio runtime.
    pub fn follow(store: Arc<dyn Store>) -> Arc<Policy> {
        let policy = Arc::new(Policy { index: RwLock::new(Arc::new(Index::default())) });
        tokio::spawn(run(store, Arc::downgrade(&policy)));
        policy
    }

    /// An authoriser over fixed objects, by their store key.
    pub fn fixed(objects: &HashMap<String, Value>) -> Policy {
        Policy { index: RwLock::new(Arc::new(Index::build(objects))) }
    }

    /// Every rule that the user has in a namespace (empty: cluster-wide ones).
    pub fn rules_for(&self, user: &UserInfo, namespace: &str) -> Vec<Rule> {
        let index = Arc::clone(&self.index.read());
        let mut out = Vec::new();
        index.visit(user, namespace, |_, rules| {
            out.extend_from_slice(rules);
            true
        });
        out
    }

    /// Rules of a role by reference; `None` when it is not there.
    pub fn role(&self, namespace: &str, name: &str) -> Option<Arc<Vec<Rule>>> {
        self.index.read().roles.get(&(namespace.to_owned(), name.to_owned())).cloned()
    }
}

impl Authorizer for Policy {
    fn authorize(&self, request: &Attributes<'_>) -> Decision {
        let index = Arc::clone(&self.index.read());
        let mut answer = Decision::NoOpinion(String::new());
        index.visit(request.user, request.namespace, |b, rules| {
            if !rules.iter().any(|r| r.allows(request)) {
                return true;
            }
            answer = Decision::Allow(if b.namespace.is_empty() {
                format!(
                    "RBAC: allowed by ClusterRoleBinding {:?} of {} {:?} to {}",
                    b.name, b.role_kind, b.role, b.subject
                )
            } else {
                format!(
                    "RBAC: allowed by RoleBinding \"{}/{}\" of {} {:?} to {}",
                    b.name, b.namespace, b.role_kind, b.role, b.subject
                )
            });
            false
        });
        answer
    }

    fn rules_for(&self, user: &UserInfo, namespace: &str) -> Vec<Rule> {
        Policy::rules_for(self, user, namespace)
    }

    fn role(&self, namespace: &str, name: &str) -> Option<Arc<Vec<Rule>>> {
        Policy::role(self, namespace, name)
    }
}

/// Lists, then follows; a watch that was cut off lists again. Ends when nobody holds the policy any more.
async fn run(store: Arc<dyn Store>, policy: Weak<Policy>) {
    const RETRY: std::time::Duration = std::time::Duration::from_millis(200);
    loop {
        if let Err(error) = follow(store.as_ref(), &policy).await {
            tracing::warn!(%error, "RBAC lost its watch and reads all roles and bindings again");
        }
        if policy.strong_count() == 0 {
            return;
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn follow(store: &dyn Store, policy: &Weak<Policy>) -> Result<(), coracle_store::Error> {
    let listing = store.list(PREFIX, ListOptions::default()).await?;
    let parse = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap_or_default();
    let mut objects: HashMap<String, Value> =
        listing.entries.iter().map(|e| (e.key.to_string(), parse(&e.value))).collect();
    let mut watch = store.watch(PREFIX, listing.revision).await?;
    loop {
        let Some(p) = policy.upgrade() else { return Ok(()) };
        *p.index.write() = Arc::new(Index::build(&objects));
        drop(p);
        let mut batch = watch.next().await?;
        loop {
            for event in &batch.events {
                match &event.kind {
                    coracle_store::EventKind::Put => {
                        objects.insert(event.entry.key.to_string(), parse(&event.entry.value));
                    }
                    coracle_store::EventKind::Delete => {
                        objects.remove(event.entry.key.as_ref());
                    }
                }
            }
            // Whatever has come in the meantime goes into the same index.
            match watch.try_next()? {
                Some(more) => batch = more,
                None => break,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn key(resource: &str, o: &Value) -> String {
        let ns = crate::object::namespace(o);
        format!("{PREFIX}{resource}/{}{}{}", ns, if ns.is_empty() { "" } else { "/" }, crate::object::name(o))
    }

    fn policy(objects: &[(&str, Value)]) -> Policy {
        Policy::fixed(&objects.iter().map(|(r, o)| (key(r, o), o.clone())).collect())
    }

    fn ask<'a>(user: &'a UserInfo, verb: &'a str, resource: &'a str, ns: &'a str, name: &'a str) -> Attributes<'a> {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        Attributes {
            user,
            verb,
            is_resource: true,
            group: "",
            version: "v1",
            resource,
            subresource,
            namespace: ns,
            name,
            path: "",
        }
    }

    #[test]
    fn bindings_give_rules_to_subjects() {
        let p = policy(&[
            (
                "clusterroles",
                json!({"metadata": {"name": "view"}, "rules": [{"verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods", "*/status"]}]}),
            ),
            (
                "clusterroles",
                json!({"metadata": {"name": "all"}, "aggregationRule": {"clusterRoleSelectors": [{"matchLabels": {"a": "b"}}]}}),
            ),
            (
                "clusterroles",
                json!({"metadata": {"name": "part", "labels": {"a": "b"}}, "rules": [{"verbs": ["*"], "nonResourceURLs": ["/metrics*"]}]}),
            ),
            (
                "rolebindings",
                json!({"metadata": {"name": "rb", "namespace": "n"}, "roleRef": {"kind": "ClusterRole", "name": "view"}, "subjects": [{"kind": "ServiceAccount", "name": "sa"}]}),
            ),
            (
                "clusterrolebindings",
                json!({"metadata": {"name": "crb"}, "roleRef": {"kind": "ClusterRole", "name": "all"}, "subjects": [{"kind": "Group", "name": "g"}]}),
            ),
        ]);
        let sa = UserInfo::new("system:serviceaccount:n:sa", &[]);
        assert_eq!(
            p.authorize(&ask(&sa, "get", "pods", "n", "x")),
            Decision::Allow(
                "RBAC: allowed by RoleBinding \"rb/n\" of ClusterRole \"view\" to ServiceAccount \"sa/n\"".into()
            )
        );
        assert_eq!(p.authorize(&ask(&sa, "get", "pods", "m", "x")), Decision::NoOpinion(String::new()));
        assert!(matches!(p.authorize(&ask(&sa, "get", "deployments/status", "n", "x")), Decision::Allow(_)));
        assert!(matches!(p.authorize(&ask(&sa, "get", "pods/exec", "n", "x")), Decision::NoOpinion(_)));
        let g = UserInfo::new("u", &["g"]);
        let mut url = ask(&g, "get", "", "", "");
        url.is_resource = false;
        url.path = "/metrics/cadvisor";
        assert!(matches!(p.authorize(&url), Decision::Allow(_)));
    }

    #[test]
    fn escalation_is_seen() {
        let rule = |v: &[&str], r: &[&str]| Rule {
            verbs: v.iter().map(ToString::to_string).collect(),
            groups: vec![String::new()],
            resources: r.iter().map(ToString::to_string).collect(),
            ..Rule::default()
        };
        let held = [rule(&["get", "list"], &["pods"])];
        assert!(missing(&held, &[rule(&["get"], &["pods"])]).is_empty());
        assert_eq!(
            missing(&held, &[rule(&["get", "create", "delete"], &["pods"])]),
            ["{APIGroups:[\"\"], Resources:[\"pods\"], Verbs:[\"create\" \"delete\"]}"]
        );
        assert!(missing(&[rule(&["*"], &["*"])], &[rule(&["get"], &["pods/log"])]).is_empty());
    }

    /// The slow model: every rule of every binding, asked literally.
    fn naive(rules: &[Rule], a: &Attributes<'_>) -> bool {
        let res =
            if a.subresource.is_empty() { a.resource.to_owned() } else { format!("{}/{}", a.resource, a.subresource) };
        rules.iter().any(|r| {
            r.verbs.iter().any(|v| v == "*" || v == a.verb)
                && r.groups.iter().any(|g| g == "*" || g == a.group)
                && r.resources.iter().any(|x| {
                    x == "*" || *x == res || (!a.subresource.is_empty() && *x == format!("*/{}", a.subresource))
                })
                && (r.names.is_empty() || r.names.iter().any(|n| n == a.name))
        })
    }

    fn rule_strategy() -> impl Strategy<Value = Rule> {
        let pick = |words: &'static [&'static str]| proptest::collection::vec(proptest::sample::select(words), 1..3);
        (
            pick(&["get", "list", "*"]),
            pick(&["", "apps", "*"]),
            pick(&["pods", "pods/log", "*/log", "*"]),
            proptest::collection::vec(proptest::sample::select(&["a", "b"][..]), 0..2),
        )
            .prop_map(|(v, g, r, n)| {
                let s = |v: Vec<&str>| v.into_iter().map(str::to_owned).collect::<Vec<_>>();
                Rule { verbs: s(v), groups: s(g), resources: s(r), names: s(n), urls: vec![] }
            })
    }

    proptest! {
        #[test]
        fn agrees_with_the_naive_model(
            rules in proptest::collection::vec(rule_strategy(), 0..4),
            verb in proptest::sample::select(&["get", "list", "create"][..]),
            resource in proptest::sample::select(&["pods", "pods/log", "services"][..]),
            name in proptest::sample::select(&["a", "b", ""][..]),
        ) {
            let user = UserInfo::new("u", &[]);
            let a = ask(&user, verb, resource, "n", name);
            prop_assert_eq!(rules.iter().any(|r| r.allows(&a)), naive(&rules, &a));
            // Whoever holds rules may grant them, and what is covered is allowed.
            prop_assert!(missing(&rules, &rules).is_empty());
        }
    }
}
