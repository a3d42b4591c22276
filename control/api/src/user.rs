//! Who makes a request, as authentication found it.

use std::collections::BTreeMap;

/// Group of whoever may do everything.
pub const SYSTEM_MASTERS: &str = "system:masters";
/// Group of every authenticated user.
pub const SYSTEM_AUTHENTICATED: &str = "system:authenticated";
/// Group of requests without credentials.
pub const SYSTEM_UNAUTHENTICATED: &str = "system:unauthenticated";
/// User of requests without credentials.
pub const SYSTEM_ANONYMOUS: &str = "system:anonymous";

/// The authenticated (or impersonated) user of a request: `k8s.io/apiserver/pkg/authentication/user.Info`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserInfo {
    /// Unique name, such as `system:serviceaccount:default:builder`.
    pub name: String,
    /// UID, empty when the authenticator knows none.
    pub uid: String,
    /// Groups, with `system:authenticated` already in.
    pub groups: Vec<String>,
    /// Further facts, such as `authentication.kubernetes.io/pod-name`.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl UserInfo {
    /// A user with groups; `system:authenticated` is added.
    pub fn new(name: impl Into<String>, groups: &[&str]) -> Self {
        let mut groups: Vec<String> = groups.iter().map(|&g| g.to_owned()).collect();
        if !groups.iter().any(|g| g == SYSTEM_AUTHENTICATED) {
            groups.push(SYSTEM_AUTHENTICATED.into());
        }
        Self { name: name.into(), groups, ..Self::default() }
    }

    /// The server's own identity: `system:apiserver` in `system:masters`.
    pub fn apiserver() -> Self {
        Self::new("system:apiserver", &[SYSTEM_MASTERS])
    }

    /// A built-in controller's identity: the service account `name` of `kube-system`, with the RBAC rules of that controller.
    pub fn controller(name: &str) -> Self {
        Self::new(
            format!("system:serviceaccount:kube-system:{name}"),
            &["system:serviceaccounts", "system:serviceaccounts:kube-system"],
        )
    }

    /// A node's identity: `system:node:<name>` in `system:nodes`.
    pub fn node(name: &str) -> Self {
        Self::new(format!("system:node:{name}"), &["system:nodes"])
    }

    /// The user of requests without credentials.
    pub fn anonymous() -> Self {
        Self { name: SYSTEM_ANONYMOUS.into(), groups: vec![SYSTEM_UNAUTHENTICATED.into()], ..Self::default() }
    }

    /// Whether the user is in a group.
    pub fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }
}
