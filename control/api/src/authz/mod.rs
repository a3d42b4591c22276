//! Authorisation: who may do what.

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
}

/// The authoriser of a server: system:masters, Node, RBAC, in this order.
pub fn authorizer(_api: &Arc<ApiServer>) -> Arc<dyn Authorizer> {
    struct Masters;
    impl Authorizer for Masters {
        fn authorize(&self, request: &Attributes<'_>) -> Decision {
            if request.user.is_in(crate::user::SYSTEM_MASTERS) {
                Decision::Allow(String::new())
            } else {
                Decision::NoOpinion(String::new())
            }
        }
    }
    Arc::new(Masters)
}
