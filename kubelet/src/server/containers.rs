//! Finding containers by the names that URLs carry, and their logs.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use http::{StatusCode, header};
use serde::Deserialize;
use tokio_stream::wrappers::ReceiverStream;

use super::router::Node;
use crate::cri::{ContainerRuntime, ContainerState, ContainerStatus};
use crate::logs::{self, LogOptions, StreamFilter};
use crate::streaming::{Kind, serve_reader};

/// An answer in plain words.
pub(super) struct Refused(pub(super) StatusCode, pub(super) String);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        (self.0, format!("{}\n", self.1)).into_response()
    }
}

impl Refused {
    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self(StatusCode::NOT_FOUND, message.into())
    }

    pub(super) fn bad(message: impl Into<String>) -> Self {
        Self(StatusCode::BAD_REQUEST, message.into())
    }

    pub(super) fn internal(message: impl ToString) -> Self {
        Self(StatusCode::INTERNAL_SERVER_ERROR, message.to_string())
    }
}

/// The incarnations of a container, newest first.
pub(super) async fn incarnations(
    runtime: &Arc<dyn ContainerRuntime>,
    namespace: &str,
    pod: &str,
    uid: Option<&str>,
    container: &str,
) -> Result<Vec<ContainerStatus>, Refused> {
    let all = runtime.list_containers().await.map_err(Refused::internal)?;
    let mut found: Vec<ContainerStatus> = all
        .into_iter()
        .filter(|status| status.pod.namespace == namespace && status.pod.name == pod && status.config.name == container)
        .filter(|status| uid.is_none_or(|uid| status.pod.uid == uid))
        .collect();
    // A pod that was replaced by one of the same name: the newest counts.
    found.sort_by_key(|status| std::cmp::Reverse((status.created_at, status.config.attempt)));
    if let Some(newest) = found.first().map(|status| status.pod.uid.clone()) {
        found.retain(|status| status.pod.uid == newest);
    }
    Ok(found)
}

/// The running container.
pub(super) async fn running(
    node: &Node,
    namespace: &str,
    pod: &str,
    uid: Option<&str>,
    container: &str,
) -> Result<ContainerStatus, Refused> {
    let found = incarnations(&node.state.runtime(), namespace, pod, uid, container).await?;
    match found.into_iter().next() {
        Some(status) if status.state == ContainerState::Running => Ok(status),
        Some(_) => Err(Refused::bad(format!("container {container} is not running"))),
        None if node.state.pod(namespace, pod).is_none() => Err(Refused::not_found(format!("pod {pod:?} not found"))),
        None => Err(Refused::not_found(format!("container not found ({container:?})"))),
    }
}

/// `PodLogOptions` as query parameters.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct LogQuery {
    follow: Option<String>,
    previous: Option<String>,
    timestamps: Option<String>,
    since_seconds: Option<i64>,
    since_time: Option<String>,
    tail_lines: Option<i64>,
    limit_bytes: Option<i64>,
    stream: Option<String>,
}

/// Query parameters say yes as `true`, `1` or nothing at all.
pub(super) fn yes(value: &Option<String>) -> bool {
    value.as_deref().is_some_and(|value| !matches!(value, "false" | "0"))
}

impl LogQuery {
    fn options(&self) -> Result<LogOptions, Refused> {
        let positive = |name: &str, value: Option<i64>, least: i64| match value {
            Some(value) if value < least => Err(Refused(
                StatusCode::UNPROCESSABLE_ENTITY,
                format!("{name}: Invalid value: {value}: must be greater than or equal to {least}"),
            )),
            other => Ok(other.map(i64::unsigned_abs)),
        };
        let since = match (&self.since_time, positive("sinceSeconds", self.since_seconds, 1)?) {
            (Some(_), Some(_)) => {
                return Err(Refused::bad("at most one of sinceTime or sinceSeconds may be specified"));
            }
            (Some(text), None) => Some(text.parse().map_err(|error| Refused::bad(format!("sinceTime: {error}")))?),
            (None, Some(seconds)) => {
                let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
                Some(
                    jiff::Timestamp::from_second(jiff::Timestamp::now().as_second().saturating_sub(seconds))
                        .unwrap_or(jiff::Timestamp::MIN),
                )
            }
            (None, None) => None,
        };
        let stream = match self.stream.as_deref().unwrap_or_default() {
            "" | "All" => StreamFilter::All,
            "Stdout" => StreamFilter::Stdout,
            "Stderr" => StreamFilter::Stderr,
            other => {
                return Err(Refused::bad(format!(
                    "stream: Unsupported value: {other:?}: supported values: \"All\", \"Stderr\", \"Stdout\""
                )));
            }
        };
        Ok(LogOptions {
            follow: yes(&self.follow),
            since,
            tail: positive("tailLines", self.tail_lines, 0)?,
            timestamps: yes(&self.timestamps),
            limit_bytes: positive("limitBytes", self.limit_bytes, 1)?,
            stream,
        })
    }
}

/// `GET /containerLogs/{namespace}/{pod}/{container}`
pub(super) async fn container_logs(
    State(node): State<Arc<Node>>,
    Path((namespace, pod, container)): Path<(String, String, String)>,
    Query(query): Query<LogQuery>,
    request: axum::extract::Request,
) -> Result<Response, Refused> {
    let mut options = query.options()?;
    let runtime = node.state.runtime();
    let found = incarnations(&runtime, &namespace, &pod, None, &container).await?;
    let known = node.state.pod(&namespace, &pod);
    if found.is_empty() {
        let Some(known) = known else { return Err(Refused::not_found(format!("pod {pod:?} does not exist"))) };
        return Err(not_started(&known, &pod, &container));
    }
    let previous = yes(&query.previous);
    let status = match previous {
        false => found.into_iter().next(),
        true => found.into_iter().nth(1),
    };
    let Some(status) = status else {
        return Err(Refused::bad(format!("previous terminated container {container:?} in pod {pod:?} not found")));
    };
    // A container that has ended does not write any more; what it wrote is all there.
    options.follow &= !previous && matches!(status.state, ContainerState::Running | ContainerState::Created);
    let pieces =
        logs::read(status.config.log_path.clone(), options, crate::streaming::ended(runtime, status.id.clone()));
    let pieces = ReceiverStream::new(pieces).map(|piece| {
        if let Err(error) = &piece {
            tracing::warn!(%error, "reading a container's log failed");
        }
        piece
    });
    if Kind::of(request.headers()) == Some(Kind::WebSocket) {
        return Ok(serve_reader(request.into_parts().0, pieces).await);
    }
    Ok(([(header::CONTENT_TYPE, "text/plain")], Body::from_stream(pieces)).into_response())
}

/// Why a container has no log yet, in the words of a kubelet.
fn not_started(pod: &k8s_openapi::api::core::v1::Pod, name: &str, container: &str) -> Refused {
    let spec = pod.spec.as_ref();
    let exists = spec.is_some_and(|spec| {
        spec.containers.iter().chain(spec.init_containers.iter().flatten()).any(|known| known.name == container)
            || spec.ephemeral_containers.iter().flatten().any(|known| known.name == container)
    });
    if !exists {
        return Refused::bad(format!("container {container} is not valid for pod {name}"));
    }
    let status = pod.status.as_ref();
    let statuses = status.into_iter().flat_map(|status| {
        status
            .container_statuses
            .iter()
            .chain(&status.init_container_statuses)
            .chain(&status.ephemeral_container_statuses)
            .flatten()
    });
    let reason = statuses
        .filter(|status| status.name == container)
        .find_map(|status| status.state.as_ref()?.waiting.as_ref()?.reason.clone())
        .unwrap_or_else(|| "ContainerCreating".into());
    Refused::bad(format!("container {container:?} in pod {name:?} is waiting to start: {reason}"))
}
