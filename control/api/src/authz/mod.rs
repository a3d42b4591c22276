//! Authorisation: who may do what.

pub mod node;
pub mod rbac;

use std::sync::Arc;

use crate::server::ApiServer;
use crate::user::UserInfo;

/// What is asked: `k8s.io/apiserver/pkg/authorization/authorizer.Attributes`.
#[derive(Clone, Copy, Debug)]
pub struct Attributes<'a> {
    /// Who asks.
    pub user: &'a UserInfo,
    /// `get list watch create update patch delete deletecollection`, special verbs, or the HTTP method in lower case.
    pub verb: &'a str,
    /// Whether it is about a resource; otherwise only `path` counts.
    pub is_resource: bool,
    /// API group.
    pub group: &'a str,
    /// API version.
    pub version: &'a str,
    /// Plural resource.
    pub resource: &'a str,
    /// Subresource, empty for none.
    pub subresource: &'a str,
    /// Namespace, empty for none or all.
    pub namespace: &'a str,
    /// Name, empty for none.
    pub name: &'a str,
    /// Path of the URL.
    pub path: &'a str,
}

/// What an authoriser says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Yes; the reason goes to the audit log.
    Allow(String),
    /// No, whatever others say.
    Deny(String),
    /// Not my business; the reason joins the message when nobody allows.
    NoOpinion(String),
}

/// Decides from memory: it must not wait for anything.
pub trait Authorizer: Send + Sync + 'static {
    /// Whether the request may go on.
    fn authorize(&self, request: &Attributes<'_>) -> Decision;

    /// The rules that a user has in a namespace, as far as the authoriser works by rules.
    fn rules_for(&self, _user: &UserInfo, _namespace: &str) -> Vec<rbac::Rule> {
        Vec::new()
    }

    /// The rules of a role (a cluster role, when the namespace is empty).
    fn role(&self, _namespace: &str, _name: &str) -> Option<Arc<Vec<rbac::Rule>>> {
        None
    }
}

/// Authorisers one after the other: the first that allows or denies decides.
pub struct Chain(pub Vec<Arc<dyn Authorizer>>);

impl Authorizer for Chain {
    fn authorize(&self, request: &Attributes<'_>) -> Decision {
        let mut reasons = Vec::new();
        for a in &self.0 {
            match a.authorize(request) {
                Decision::NoOpinion(why) if why.is_empty() => {}
                Decision::NoOpinion(why) => reasons.push(why),
                decided => return decided,
            }
        }
        Decision::NoOpinion(reasons.join("\n"))
    }

    fn rules_for(&self, user: &UserInfo, namespace: &str) -> Vec<rbac::Rule> {
        self.0.iter().flat_map(|a| a.rules_for(user, namespace)).collect()
    }

    fn role(&self, namespace: &str, name: &str) -> Option<Arc<Vec<rbac::Rule>>> {
        self.0.iter().find_map(|a| a.role(namespace, name))
    }
}

/// Members of `system:masters` may do everything.
pub struct Masters;

impl Authorizer for Masters {
    fn authorize(&self, request: &Attributes<'_>) -> Decision {
        if request.user.is_in(crate::user::SYSTEM_MASTERS) {
            Decision::Allow(String::new())
        } else {
            Decision::NoOpinion(String::new())
        }
    }
}

/// The authoriser of a server: system:masters, Node, RBAC, in this order.
pub fn authorizer(api: &Arc<ApiServer>) -> Arc<dyn Authorizer> {
    Arc::new(Chain(vec![
        Arc::new(Masters),
        Arc::new(node::Nodes::new(api)),
        rbac::Policy::follow(Arc::clone(&api.store)),
    ]))
}
