//! What a path means: `k8s.io/apiserver/pkg/endpoints/request.RequestInfo`.

use http::Method;

use super::query::{Query, decode};

/// What is done with a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    /// One object.
    Get,
    /// Many objects.
    List,
    /// Changes.
    Watch,
    /// POST.
    Create,
    /// PUT.
    Update,
    /// PATCH.
    Patch,
    /// DELETE of one.
    Delete,
    /// DELETE of many.
    DeleteCollection,
    /// OPTIONS, which only what stands behind a proxy answers; rules have no verb for it.
    Options,
}

impl Verb {
    /// As RBAC rules have it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::List => "list",
            Self::Watch => "watch",
            Self::Create => "create",
            Self::Update => "update",
            Self::Patch => "patch",
            Self::Delete => "delete",
            Self::DeleteCollection => "deletecollection",
            Self::Options => "",
        }
    }
}

/// A request's path, taken apart.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    /// Decoded path.
    pub(crate) path: String,
    /// Set when it is about a resource.
    pub(crate) resource: Option<ResourceRoute>,
    /// The verb for authorisation: of the resource, else the method in lower case.
    pub(crate) verb: &'static str,
}

/// The part of a [`Route`] that is about a resource.
#[derive(Clone, Debug)]
pub(crate) struct ResourceRoute {
    /// What is done.
    pub(crate) verb: Verb,
    /// API group, empty for core.
    pub(crate) group: String,
    /// API version.
    pub(crate) version: String,
    /// Namespace, empty for none.
    pub(crate) namespace: String,
    /// Plural resource.
    pub(crate) resource: String,
    /// Name, empty for collections.
    pub(crate) name: String,
    /// Subresource, empty for none.
    pub(crate) subresource: String,
    /// What follows the subresource (`proxy/…`), with its leading slash when there is one.
    pub(crate) rest: String,
}

impl Route {
    /// Takes a path apart.
    pub(crate) fn parse(method: &Method, raw_path: &str, query: &Query) -> Self {
        let path = decode(raw_path, false);
        let resource = resource(method, raw_path, query);
        let verb = match &resource {
            Some(route) => route.verb.as_str(),
            None => lower(method),
        };
        Self { path, resource, verb }
    }
}

fn lower(method: &Method) -> &'static str {
    match *method {
        Method::GET => "get",
        Method::POST => "post",
        Method::PUT => "put",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        Method::HEAD => "head",
        Method::OPTIONS => "options",
        _ => "",
    }
}

fn resource(method: &Method, raw_path: &str, query: &Query) -> Option<ResourceRoute> {
    let trimmed = raw_path.strip_prefix('/')?;
    let mut parts = trimmed.split('/').peekable();
    let mut consumed = 0;
    let mut next = || {
        let part = parts.next()?;
        consumed += part.len() + 1;
        Some((part, consumed))
    };
    let (group, version) = match next()?.0 {
        "api" => (String::new(), next()?.0),
        "apis" => (decode(next()?.0, false), next()?.0),
        _ => return None,
    };
    let version = version.to_owned();
    let mut first = next()?.0;
    if first.is_empty() {
        return None;
    }
    let mut watch = false;
    if first == "watch" {
        watch = true;
        first = next()?.0;
    }
    let mut namespace = String::new();
    let mut resource = decode(first, false);
    let mut name = String::new();
    let mut subresource = String::new();
    let mut rest = String::new();
    let mut in_namespace = None;
    if resource == "namespaces"
        && let Some((ns, _)) = next().filter(|(ns, _)| !ns.is_empty())
    {
        namespace = decode(ns, false);
        // `namespaces/x`, `namespaces/x/status`, `namespaces/x/finalize` are about the namespace itself.
        match next().filter(|(part, _)| !part.is_empty()) {
            None => name.clone_from(&namespace),
            Some((part @ ("status" | "finalize"), _)) if group.is_empty() => {
                name.clone_from(&namespace);
                subresource = part.to_owned();
            }
            Some((part, _)) => in_namespace = Some(decode(part, false)),
        }
    }
    if resource != "namespaces" || in_namespace.is_some() {
        if let Some(inner) = in_namespace {
            resource = inner;
        }
        if let Some((part, _)) = next().filter(|(part, _)| !part.is_empty()) {
            name = decode(part, false);
        }
        if let Some((part, end)) = next().filter(|(part, _)| !part.is_empty()) {
            subresource = decode(part, false);
            rest = raw_path.get(end..).unwrap_or_default().to_owned();
        }
    }
    let verb = match *method {
        Method::POST => Verb::Create,
        Method::PUT => Verb::Update,
        Method::PATCH => Verb::Patch,
        Method::DELETE if name.is_empty() => Verb::DeleteCollection,
        Method::DELETE => Verb::Delete,
        Method::GET | Method::HEAD if watch => Verb::Watch,
        Method::GET | Method::HEAD if name.is_empty() => {
            if query.flag("watch") {
                Verb::Watch
            } else {
                Verb::List
            }
        }
        Method::GET | Method::HEAD => Verb::Get,
        Method::OPTIONS => Verb::Options,
        _ => return None,
    };
    Some(ResourceRoute { verb, group, version, namespace, resource, name, subresource, rest })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(method: Method, path: &str, query: &str) -> Option<ResourceRoute> {
        Route::parse(&method, path, &Query::parse(Some(query))).resource
    }

    #[test]
    fn takes_paths_apart() {
        let r = parse(Method::GET, "/api/v1/namespaces/default/pods/web/proxy/a%2Fb/c/", "").expect("a resource");
        assert_eq!((r.namespace.as_str(), r.resource.as_str(), r.name.as_str()), ("default", "pods", "web"));
        assert_eq!((r.subresource.as_str(), r.rest.as_str()), ("proxy", "/a%2Fb/c/"));
        let r = parse(Method::PUT, "/api/v1/namespaces/x/finalize", "").expect("a resource");
        assert_eq!((r.resource.as_str(), r.name.as_str(), r.subresource.as_str()), ("namespaces", "x", "finalize"));
        let r = parse(Method::GET, "/apis/apps/v1/deployments", "watch=1").expect("a resource");
        assert_eq!((r.verb, r.group.as_str()), (Verb::Watch, "apps"));
        let r = parse(Method::GET, "/api/v1/watch/namespaces/x/pods", "").expect("a resource");
        assert_eq!((r.verb, r.resource.as_str(), r.namespace.as_str()), (Verb::Watch, "pods", "x"));
        let r = parse(Method::OPTIONS, "/api/v1/namespaces/n/services/s/proxy", "").expect("a resource");
        assert_eq!((r.verb.as_str(), r.subresource.as_str()), ("", "proxy"));
        let r = parse(Method::DELETE, "/api/v1/nodes", "").expect("a resource");
        assert_eq!(r.verb, Verb::DeleteCollection);
        for path in ["/api", "/api/v1", "/apis/apps/v1", "/healthz", "/", "/apis/apps"] {
            assert!(parse(Method::GET, path, "").is_none(), "{path}");
        }
    }
}
