//! `/exec`, `/attach`, `/run`, `/portForward`.

use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};

use super::containers::{Refused, running};
use super::router::Node;
use crate::cri::{ContainerStatus, NamespaceMode};
use crate::streaming::{Kind, Request, forward_spdy, forward_websocket, serve};

/// Words of one command.
const MAX_COMMAND_WORDS: usize = 4096;

/// What a request names in its path.
#[derive(serde::Deserialize)]
pub(super) struct Target {
    namespace: String,
    pod: String,
    #[serde(default)]
    uid: Option<String>,
    #[serde(default)]
    container: String,
}

impl Target {
    async fn running(&self, node: &Node) -> Result<ContainerStatus, Refused> {
        running(node, &self.namespace, &self.pod, self.uid.as_deref(), &self.container).await
    }
}

/// A query in its order.
type Pairs = Vec<(String, String)>;

/// The API server says `input`, `output`, `error`; people say `stdin`, `stdout`, `stderr`.
fn wanted(pairs: &[(String, String)]) -> Result<Request, Refused> {
    let yes = |names: [&str; 2]| {
        pairs.iter().any(|(key, value)| names.contains(&key.as_str()) && matches!(value.as_str(), "1" | "true"))
    };
    let mut request = Request {
        stdin: yes(["input", "stdin"]),
        stdout: yes(["output", "stdout"]),
        stderr: yes(["error", "stderr"]),
        tty: yes(["tty", "tty"]),
    };
    // A terminal has one output.
    if request.tty {
        request.stderr = false;
    }
    if !request.stdin && !request.stdout && !request.stderr {
        return Err(Refused::bad("you must specify at least 1 of stdin, stdout, stderr"));
    }
    Ok(request)
}

/// `/exec/{namespace}/{pod}[/{uid}]/{container}`
pub(super) async fn exec(
    State(node): State<Arc<Node>>,
    Path(target): Path<Target>,
    Query(pairs): Query<Pairs>,
    request: axum::extract::Request,
) -> Result<Response, Refused> {
    let wanted = wanted(&pairs)?;
    let command: Vec<String> = pairs.into_iter().filter(|(key, _)| key == "command").map(|(_, value)| value).collect();
    if command.is_empty() || command.len() > MAX_COMMAND_WORDS {
        return Err(Refused::bad("you must specify a command"));
    }
    let status = target.running(&node).await?;
    let runtime = node.state.runtime();
    let start = crate::streaming::exec(runtime, status.id, command, wanted);
    Ok(serve(request, wanted, start).await)
}

/// `/attach/{namespace}/{pod}[/{uid}]/{container}`
pub(super) async fn attach(
    State(node): State<Arc<Node>>,
    Path(target): Path<Target>,
    Query(pairs): Query<Pairs>,
    request: axum::extract::Request,
) -> Result<Response, Refused> {
    let mut wanted = wanted(&pairs)?;
    let status = target.running(&node).await?;
    // Whether there is a terminal the container says, not the client.
    wanted.tty = status.config.stdio.tty;
    wanted.stderr &= !wanted.tty;
    wanted.stdin &= status.config.stdio.stdin;
    let runtime = node.state.runtime();
    let start = crate::streaming::attach(runtime, status, wanted);
    Ok(serve(request, wanted, start).await)
}

/// `/run/{namespace}/{pod}/{container}`: a command's output as the answer.
pub(super) async fn run(
    State(node): State<Arc<Node>>,
    Path(target): Path<Target>,
    Query(pairs): Query<Pairs>,
) -> Result<Response, Refused> {
    let command = pairs.iter().find(|(key, _)| key == "cmd").map(|(_, value)| value.clone()).unwrap_or_default();
    let command: Vec<String> = command.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect();
    if command.is_empty() {
        return Err(Refused::bad("you must specify a command as cmd"));
    }
    let status = target.running(&node).await?;
    let output = node.state.runtime().exec_sync(&status.id, &command, None).await.map_err(Refused::internal)?;
    let mut text = output.stdout;
    text.extend(output.stderr);
    if output.exit_code != 0 {
        let message = format!("command exited with {}: {}", output.exit_code, String::from_utf8_lossy(&text));
        return Err(Refused::internal(message));
    }
    Ok(text.into_response())
}

/// `/portForward/{namespace}/{pod}[/{uid}]`
pub(super) async fn port_forward(
    State(node): State<Arc<Node>>,
    Path(Target { namespace, pod, uid, .. }): Path<Target>,
    Query(pairs): Query<Pairs>,
    request: axum::extract::Request,
) -> Result<Response, Refused> {
    let sandboxes = node.state.runtime().list_pod_sandboxes().await.map_err(Refused::internal)?;
    let sandbox = sandboxes
        .into_iter()
        .filter(|sandbox| {
            let key = sandbox.config.pod.as_ref();
            key.is_some_and(|key| {
                key.namespace == namespace && key.name == pod && uid.as_ref().is_none_or(|uid| key.uid == *uid)
            })
        })
        .filter(|sandbox| sandbox.ready)
        .max_by_key(|sandbox| sandbox.created_at);
    let Some(sandbox) = sandbox else { return Err(Refused::not_found(format!("pod {pod:?} is not running"))) };
    let target = match (sandbox.config.network, sandbox.network_namespace) {
        (NamespaceMode::Node, _) => None,
        (_, Some(path)) => Some(path),
        (_, None) => return Err(Refused::internal(format!("pod {pod:?} has no network"))),
    };
    match Kind::of(request.headers()) {
        Some(Kind::Spdy) => Ok(forward_spdy(request, target)),
        Some(Kind::WebSocket) => {
            let ports: Option<Vec<u16>> = pairs
                .iter()
                .filter(|(key, _)| matches!(key.as_str(), "port" | "ports"))
                .flat_map(|(_, value)| value.split(','))
                .map(|port| port.parse().ok().filter(|port| *port > 0))
                .collect();
            let Some(ports) = ports else { return Err(Refused::bad("a port is a number from 1 to 65535")) };
            Ok(forward_websocket(request, target, ports).await)
        }
        None => Err(Refused::bad("you must specify an Upgrade header: WebSocket or SPDY/3.1")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded_in_order() {
        let uri = http::Uri::from_static("/?command=sh&command=-c&command=echo%20a%2Bb+c&output=1&tty");
        let Query(pairs) = Query::<Pairs>::try_from_uri(&uri).expect("a query");
        let words: Vec<&str> =
            pairs.iter().filter(|(key, _)| key == "command").map(|(_, value)| value.as_str()).collect();
        assert_eq!(words, ["sh", "-c", "echo a+b c"]);
        assert_eq!(wanted(&pairs).map_err(|refused| refused.1), Ok(Request { stdout: true, ..Request::default() }));
        assert!(wanted(&[]).is_err());
    }
}
