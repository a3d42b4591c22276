//! Acting as somebody else: with all that they may do, or for some actions alone (KEP-5284).
//!
//! Source: `k8s.io/apiserver/pkg/endpoints/filters/impersonation`.

use std::sync::Arc;

use http::HeaderMap;

use super::with_authenticated;
use crate::authz::{Attributes, Authorizer, Decision};
use crate::handlers::denied;
use crate::kinds::names;
use crate::status::Status;
use crate::user::{SYSTEM_ANONYMOUS, SYSTEM_MASTERS, SYSTEM_UNAUTHENTICATED, UserInfo};

/// Prefix of the headers.
const HEADERS: &str = "impersonate-";
/// From so many groups or further facts on, one right to all of them will do.
const MANY: usize = 4;
/// The fact that tells on which node a service account's pod is.
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const GROUP: &str = "authentication.k8s.io";

/// Whom a request acts as.
pub(crate) struct Acting {
    pub(crate) user: Arc<UserInfo>,
    /// The verb that allowed it for this action; `None` when all actions are allowed.
    pub(crate) constraint: Option<&'static str>,
}

/// A way to act as somebody for some actions alone.
#[derive(Clone, Copy)]
enum Mode {
    AssociatedNode,
    ArbitraryNode,
    ServiceAccount,
    UserInfo,
}

impl Mode {
    /// In the order in which they are tried.
    const ALL: [Self; 4] = [Self::AssociatedNode, Self::ArbitraryNode, Self::ServiceAccount, Self::UserInfo];

    /// The verb of the right to be somebody.
    fn verb(self) -> &'static str {
        match self {
            Self::AssociatedNode => "impersonate:associated-node",
            Self::ArbitraryNode => "impersonate:arbitrary-node",
            Self::ServiceAccount => "impersonate:serviceaccount",
            Self::UserInfo => "impersonate:user-info",
        }
    }

    /// The verb of the right to do something as somebody.
    fn verb_on(self, action: &str) -> String {
        self.verb().replace("impersonate:", "impersonate-on:") + ":" + action
    }

    fn applies(self, sender: &UserInfo, wanted: &UserInfo) -> bool {
        let name_alone = wanted.uid.is_empty() && wanted.groups.is_empty() && wanted.extra.is_empty();
        let (node, account) = (node(&wanted.name), account(&wanted.name));
        match self {
            Self::AssociatedNode => {
                let on = sender.extra.get(NODE_NAME).filter(|nodes| nodes.len() == 1).map(|nodes| nodes[0].as_str());
                name_alone && node.is_some() && node == on && self::account(&sender.name).is_some()
            }
            Self::ArbitraryNode => name_alone && node.is_some(),
            Self::ServiceAccount => name_alone && account.is_some(),
            Self::UserInfo => node.is_none() && account.is_none(),
        }
    }
}

/// The user that `Impersonate-*` headers name, when the sender may act as them in the request that is asked; `None` without
/// such headers.
pub(crate) fn impersonate(
    authorizer: &dyn Authorizer,
    headers: &HeaderMap,
    asked: &Attributes<'_>,
) -> Result<Option<Acting>, Status> {
    let Some(wanted) = wanted(headers)? else { return Ok(None) };
    let rights = Rights { authorizer, asked };
    let mut first = None;
    for mode in Mode::ALL.into_iter().filter(|mode| mode.applies(asked.user, &wanted)) {
        match rights.constrained(mode, &wanted) {
            Ok(user) => return Ok(Some(Acting { user: Arc::new(user), constraint: Some(mode.verb()) })),
            Err(status) => first = first.or(Some(status)),
        }
    }
    match rights.identity(None, &wanted) {
        Ok(user) => Ok(Some(Acting { user: Arc::new(user), constraint: None })),
        Err(status) => Err(first.unwrap_or(status)),
    }
}

/// What the headers say.
fn wanted(headers: &HeaderMap) -> Result<Option<UserInfo>, Status> {
    let mut user = UserInfo::default();
    let mut any = false;
    for (header, value) in headers {
        let Some(part) = header.as_str().strip_prefix(HEADERS) else { continue };
        let Ok(value) = value.to_str() else { continue };
        let value = value.to_owned();
        match part {
            "user" if user.name.is_empty() => user.name = value,
            "uid" if user.uid.is_empty() => user.uid = value,
            "group" => user.groups.push(value),
            _ => {
                let Some(key) = part.strip_prefix("extra-") else { continue };
                let query = crate::http::Query::parse(Some(&format!("k={key}")));
                user.extra.entry(query.get("k").unwrap_or(key).to_owned()).or_default().push(value);
            }
        }
        any = true;
    }
    if any && user.name.is_empty() && (!user.uid.is_empty() || !user.groups.is_empty() || !user.extra.is_empty()) {
        return Err(Status::bad_request(format!("requested {} without impersonating a user name", as_go(&user))));
    }
    Ok((!user.name.is_empty()).then_some(user))
}

/// A user as a Go program prints one.
fn as_go(user: &UserInfo) -> String {
    let list = |values: &[String]| format!("[]string{{{}}}", format!("{values:?}").trim_matches(['[', ']']));
    let groups = if user.groups.is_empty() { "[]string(nil)".to_owned() } else { list(&user.groups) };
    let extra: Vec<String> = user.extra.iter().map(|(key, values)| format!("{key:?}:{}", list(values))).collect();
    let extra = if extra.is_empty() { "(nil)".to_owned() } else { format!("{{{}}}", extra.join(", ")) };
    format!(
        "&user.DefaultInfo{{Name:{:?}, UID:{:?}, Groups:{groups}, Extra:map[string][]string{extra}}}",
        user.name, user.uid
    )
}

/// Namespace and name of a service account's user.
fn account(user: &str) -> Option<(&str, &str)> {
    user.strip_prefix("system:serviceaccount:")?.split_once(':').filter(|(_, name)| !name.contains(':'))
}

/// The node of a node's user.
fn node(user: &str) -> Option<&str> {
    user.strip_prefix("system:node:").filter(|name| names::dns1123_subdomain(name).is_empty())
}

/// What the sender may do.
struct Rights<'a> {
    authorizer: &'a dyn Authorizer,
    asked: &'a Attributes<'a>,
}

impl Rights<'_> {
    fn check(&self, attributes: &Attributes<'_>) -> Result<(), Status> {
        match self.authorizer.authorize(attributes) {
            Decision::Allow(_) => Ok(()),
            Decision::Deny(reason) | Decision::NoOpinion(reason) => Err(denied(attributes, &reason)),
        }
    }

    /// For this action alone.
    fn constrained(&self, mode: Mode, wanted: &UserInfo) -> Result<UserInfo, Status> {
        self.check(&Attributes { verb: &mode.verb_on(self.asked.verb), ..*self.asked })?;
        self.identity(Some(mode), wanted)
    }

    /// Whether the sender may be this user, part by part; the user as the server completes it.
    fn identity(&self, mode: Option<Mode>, wanted: &UserInfo) -> Result<UserInfo, Status> {
        let verb = mode.map_or("impersonate", Mode::verb);
        let part = |group: &'static str| Attributes {
            user: self.asked.user,
            verb,
            is_resource: true,
            group,
            version: "v1",
            resource: "",
            subresource: "",
            namespace: "",
            name: "",
            path: "",
        };
        // Users and groups of the older verb are resources of no group.
        let named = part(if mode.is_some() { GROUP } else { "" });
        let facts = part(GROUP);
        let mut user = wanted.clone();
        match (account(&wanted.name), node(&wanted.name).filter(|_| mode.is_some())) {
            (Some((namespace, name)), _) => {
                self.check(&Attributes { resource: "serviceaccounts", namespace, name, ..named })?;
                if user.groups.is_empty() {
                    user.groups = vec!["system:serviceaccounts".into(), format!("system:serviceaccounts:{namespace}")];
                }
            }
            (None, Some(node)) => {
                // Who may be the own node may be it on every node.
                let name = if matches!(mode, Some(Mode::AssociatedNode)) { "*" } else { node };
                self.check(&Attributes { resource: "nodes", name, ..named })?;
                user.groups = vec!["system:nodes".into()];
            }
            (None, None) => self.check(&Attributes { resource: "users", name: &wanted.name, ..named })?,
        }
        if !wanted.uid.is_empty() {
            self.check(&Attributes { resource: "uids", name: &wanted.uid, ..facts })?;
        }
        self.groups(mode, wanted, &Attributes { resource: "groups", ..named })?;
        self.extra(mode, wanted, &Attributes { resource: "userextras", ..facts })?;
        if user.name == SYSTEM_ANONYMOUS && !user.is_in(SYSTEM_UNAUTHENTICATED) {
            user.groups.push(SYSTEM_UNAUTHENTICATED.into());
        }
        Ok(if user.is_in(SYSTEM_UNAUTHENTICATED) { user } else { with_authenticated(user) })
    }

    fn groups(&self, mode: Option<Mode>, wanted: &UserInfo, groups: &Attributes<'_>) -> Result<(), Status> {
        if mode.is_some() {
            if wanted.is_in("") {
                return Err(denied(groups, "impersonating the empty string group is not allowed"));
            }
            if wanted.is_in(SYSTEM_MASTERS) {
                let masters = Attributes { name: SYSTEM_MASTERS, ..*groups };
                return Err(denied(&masters, "impersonating the system:masters group is not allowed"));
            }
            if wanted.groups.len() >= MANY && self.check(&Attributes { name: "*", ..*groups }).is_ok() {
                return Ok(());
            }
        }
        wanted.groups.iter().try_for_each(|name| self.check(&Attributes { name, ..*groups }))
    }

    fn extra(&self, mode: Option<Mode>, wanted: &UserInfo, extra: &Attributes<'_>) -> Result<(), Status> {
        if mode.is_some() {
            if let Some(why) = wanted.extra.iter().find_map(|(key, values)| invalid_extra(key, values)) {
                return Err(denied(extra, &why));
            }
            let count: usize = wanted.extra.values().map(Vec::len).sum();
            if count >= MANY && self.check(&Attributes { subresource: "*", name: "*", ..*extra }).is_ok() {
                return Ok(());
            }
        }
        wanted.extra.iter().try_for_each(|(key, values)| {
            values.iter().try_for_each(|name| self.check(&Attributes { subresource: key, name, ..*extra }))
        })
    }
}

/// Why further facts may not be claimed; the older verb takes any.
fn invalid_extra(key: &str, values: &[String]) -> Option<String> {
    if key.is_empty() {
        return Some("impersonating the empty string key in extra is not allowed".into());
    }
    let in_path = |c: char| c.is_ascii_alphanumeric() || "/-._~%!$&'()*+,;=:".contains(c);
    let prefixed = key.split_once('/').is_some_and(|(host, path)| {
        names::dns1123_subdomain(host).is_empty() && !path.is_empty() && path.chars().all(in_path)
    });
    if !prefixed {
        return Some(format!(
            "impersonating an invalid key in extra is not allowed: extra.key: Invalid value: {key:?}: must be a \
             domain-prefixed path (such as \"acme.io/foo\")"
        ));
    }
    if key.chars().any(char::is_uppercase) {
        return Some(format!("impersonating a non-lowercase key in extra is not allowed: {key:?}"));
    }
    values.iter().any(String::is_empty).then(|| "impersonating the empty string value in extra is not allowed".into())
}
