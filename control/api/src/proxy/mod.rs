//! Requests that go on to a kubelet, a pod or a service: log, exec, attach, portforward, proxy.
//!
//! The kubelet's own paths and parameters are those of `k8s.io/kubernetes/pkg/kubelet/server`: `/containerLogs/…`, `/exec/…`
//! with `input output error tty command`, and so on. Upgraded connections are passed through byte for byte.

mod forward;
mod links;
mod target;

use std::sync::Arc;

use serde_json::{Value, json};

use crate::context::{Context, Operation};
use crate::http::{Query, ReqBody, ResourceRoute, Response, Verb};
use crate::kinds::Kind;
use crate::object;
use crate::server::ApiServer;
use crate::status::Status;
use crate::user::UserInfo;

pub(crate) use forward::{Way, forward, hold};
pub(crate) use target::endpoint;

/// Whether requests for a subresource last as long as somebody wants, so that they take nobody's seat.
pub(crate) fn stays_open(subresource: &str) -> bool {
    matches!(subresource, "log" | "exec" | "attach" | "portforward" | "proxy")
}

/// Whether a subresource is passed on.
pub(crate) fn is_streaming(kind: &Kind, subresource: &str) -> bool {
    kind.group.is_empty()
        && match kind.resource.as_str() {
            "pods" => stays_open(subresource),
            "nodes" | "services" => subresource == "proxy",
            _ => false,
        }
}

/// Passes a request on.
pub(crate) async fn connect(
    api: &Arc<ApiServer>,
    user: Arc<UserInfo>,
    kind: Arc<Kind>,
    route: ResourceRoute,
    parts: http::request::Parts,
    query: Query,
    body: ReqBody,
) -> Result<Response, Status> {
    let sub = kind.subresource(&route.subresource).ok_or_else(Status::no_such_resource)?;
    let passed_on = route.verb == Verb::Options && route.subresource == "proxy";
    if !passed_on && !sub.verbs.iter().any(|verb| verb == route.verb.as_str()) {
        return Err(Status::no_such_method());
    }
    if route.subresource != "log" {
        admit(api, user, &kind, &route, &query, &sub.kind).await?;
    }
    if route.subresource == "proxy" {
        return target::proxy(api, &kind, &route, parts, body).await;
    }
    let pod =
        api.get(&kind, &route.namespace, &route.name).await?.ok_or_else(|| Status::not_found(&kind, &route.name))?;
    let node = object::text(&pod, "/spec/nodeName");
    if node.is_empty() {
        return match route.subresource.as_str() {
            // A pod that waits for a node has no log yet.
            "log" => Ok(crate::http::text_response(200, "")),
            _ => Err(Status::bad_request(format!("pod {} does not have a host assigned", route.name))),
        };
    }
    let path = kubelet_path(&route, &pod, &query)?;
    let stream = api.config.nodes.connect(node).await?;
    forward(stream, Way { path, host: node.to_owned(), ..Way::default() }, parts, body).await
}

/// Path and query that the kubelet understands.
fn kubelet_path(route: &ResourceRoute, pod: &Value, query: &Query) -> Result<String, Status> {
    let mut parameters: Vec<(&str, &str)> = Vec::new();
    let mut copy = |from: &'static str, to: &'static str| {
        for value in query.all(from) {
            parameters.push((to, value));
        }
    };
    let action = match route.subresource.as_str() {
        "log" => {
            for name in
                ["follow", "previous", "sinceSeconds", "sinceTime", "timestamps", "tailLines", "limitBytes", "stream"]
            {
                copy(name, name);
            }
            check_log(query)?;
            "containerLogs"
        }
        action @ ("exec" | "attach") => {
            for (from, to) in
                [("stdin", "input"), ("stdout", "output"), ("stderr", "error"), ("tty", "tty"), ("command", "command")]
            {
                copy(from, to);
            }
            action
        }
        _ => {
            copy("ports", "port");
            return Ok(with_query(&format!("/portForward/{}/{}", route.namespace, route.name), &flags(parameters)));
        }
    };
    let container = container(route, pod, query.get("container"))?;
    Ok(with_query(&format!("/{action}/{}/{}/{container}", route.namespace, route.name), &flags(parameters)))
}

/// The kubelet wants `1` for the streams of exec and attach.
fn flags<'a>(parameters: Vec<(&'a str, &'a str)>) -> Vec<(&'a str, &'a str)> {
    parameters
        .into_iter()
        .filter_map(|(name, value)| match (name, value) {
            ("input" | "output" | "error" | "tty", "true" | "1") => Some((name, "1")),
            ("input" | "output" | "error" | "tty", _) => None,
            other => Some(other),
        })
        .collect()
}

fn check_log(query: &Query) -> Result<(), Status> {
    let invalid = |field: &str, why: &str| {
        Err(Status::new(422, "Invalid", format!("PodLogOptions \"\" is invalid: {field}: {why}")))
    };
    for (name, least) in [("tailLines", 0), ("sinceSeconds", 1), ("limitBytes", 1)] {
        if let Some(text) = query.get(name) {
            match text.parse::<i64>() {
                Ok(n) if n >= least => {}
                _ if least == 0 => {
                    return invalid(name, &format!("Invalid value: {text}: must be greater than or equal to 0"));
                }
                _ => return invalid(name, &format!("Invalid value: {text}: must be greater than 0")),
            }
        }
    }
    if query.get("sinceSeconds").is_some() && query.get("sinceTime").is_some() {
        return invalid("sinceSeconds", "Forbidden: at most one of `sinceTime` or `sinceSeconds` may be specified");
    }
    Ok(())
}

/// The container that a request means: the named one, or the only one.
fn container(route: &ResourceRoute, pod: &Value, asked: Option<&str>) -> Result<String, Status> {
    let names = |member: &str| -> Vec<String> {
        let list = pod.pointer(&format!("/spec/{member}")).and_then(Value::as_array);
        list.into_iter().flatten().map(|c| object::text(c, "/name").to_owned()).collect()
    };
    let (main, init, ephemeral) = (names("containers"), names("initContainers"), names("ephemeralContainers"));
    if let Some(name) = asked {
        if [&main, &init, &ephemeral].iter().any(|list| list.iter().any(|known| known == name)) {
            return Ok(name.to_owned());
        }
        return Err(Status::bad_request(format!("container {name} is not valid for pod {}", route.name)));
    }
    if let [only] = main.as_slice() {
        return Ok(only.clone());
    }
    if main.is_empty() {
        return Err(Status::bad_request(format!("a container name must be specified for pod {}", route.name)));
    }
    let mut message =
        format!("a container name must be specified for pod {}, choose one of: [{}]", route.name, main.join(" "));
    if !init.is_empty() {
        message.push_str(&format!(" or one of the init containers: [{}]", init.join(" ")));
    }
    Err(Status::bad_request(message))
}

/// A path with encoded parameters.
fn with_query(path: &str, parameters: &[(&str, &str)]) -> String {
    let mut text = path.to_owned();
    for (at, (name, value)) in parameters.iter().enumerate() {
        text.push(if at == 0 { '?' } else { '&' });
        text.push_str(name);
        text.push('=');
        text.push_str(&crate::http::encode(value));
    }
    text
}

/// Admission of a connect.
async fn admit(
    api: &Arc<ApiServer>,
    user: Arc<UserInfo>,
    kind: &Arc<Kind>,
    route: &ResourceRoute,
    query: &Query,
    options_kind: &str,
) -> Result<(), Status> {
    let mut options = json!({"kind": options_kind, "apiVersion": "v1"});
    for name in ["stdin", "stdout", "stderr", "tty"] {
        if query.has(name) {
            options[name] = query.flag(name).into();
        }
    }
    for name in ["container", "path"] {
        if let Some(value) = query.get(name) {
            options[name] = value.into();
        }
    }
    let command: Vec<&str> = query.all("command").collect();
    if !command.is_empty() {
        options["command"] = json!(command);
    }
    let ctx = Context {
        api: api.clone(),
        user,
        kind: kind.clone(),
        namespace: route.namespace.clone(),
        name: route.name.clone(),
        subresource: route.subresource.clone(),
        operation: Operation::Connect,
        dry_run: false,
        field_manager: String::new(),
        now: jiff::Timestamp::now(),
        options: Value::Null,
        warnings: parking_lot::Mutex::default(),
        annotations: parking_lot::Mutex::default(),
    };
    let plugins = || api.chain.get().into_iter().flatten().filter(|plugin| plugin.handles(&ctx));
    for plugin in plugins() {
        plugin.admit(&ctx, &mut options, None).await?;
    }
    for plugin in plugins() {
        plugin.validate(&ctx, &options, None).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(subresource: &str) -> ResourceRoute {
        ResourceRoute {
            verb: Verb::Get,
            group: String::new(),
            version: "v1".into(),
            namespace: "n".into(),
            resource: "pods".into(),
            name: "p".into(),
            subresource: subresource.into(),
            rest: String::new(),
        }
    }

    #[test]
    fn paths_are_the_kubelets() {
        let pod = json!({"spec": {"containers": [{"name": "a"}], "initContainers": [{"name": "i"}]}});
        let path = |sub: &str, query: &str| kubelet_path(&route(sub), &pod, &Query::parse(Some(query)));
        let exec = path("exec", "stdin=true&stdout=1&stderr=false&command=sh&command=-c&command=echo+a%26b");
        assert_eq!(exec.as_deref(), Ok("/exec/n/p/a?input=1&output=1&command=sh&command=-c&command=echo%20a%26b"));
        assert_eq!(
            path("log", "follow=true&tailLines=5").as_deref(),
            Ok("/containerLogs/n/p/a?follow=true&tailLines=5")
        );
        assert_eq!(path("log", "container=i").as_deref(), Ok("/containerLogs/n/p/i"));
        assert_eq!(path("portforward", "ports=80").as_deref(), Ok("/portForward/n/p?port=80"));
        let wrong = path("log", "container=x").expect_err("there is none");
        assert_eq!(wrong.message, "container x is not valid for pod p");
        let two = json!({"spec": {"containers": [{"name": "a"}, {"name": "b"}]}});
        let wrong = kubelet_path(&route("exec"), &two, &Query::default()).expect_err("which one");
        assert_eq!(wrong.message, "a container name must be specified for pod p, choose one of: [a b]");
    }
}
