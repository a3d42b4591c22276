//! Life cycle hooks, and the way a container is asked to end.

use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, HTTPGetAction, LifecycleHandler, Pod, Probe};
use kube::runtime::events::EventType;
use tokio::time::Instant;

use super::context::Context;
use super::status::Incarnation;
use crate::names::ContainerId;
use crate::probes::{Answer, Target, ask};

/// Time that a container gets after its preStop hook used its grace period up (`minimumGracePeriodInSeconds`).
const LEAST_GRACE: Duration = Duration::from_secs(2);
/// Longest that a hook may take when nothing else bounds it.
const HOOK_LIMIT: Duration = Duration::from_secs(3600);

/// Whom a probe or hook of a container asks.
pub(super) fn target(context: &Context, container: &Container, id: &ContainerId, ips: &[IpAddr]) -> Target {
    let ports = container
        .ports
        .iter()
        .flatten()
        .filter_map(|port| Some((port.name.clone()?, u16::try_from(port.container_port).ok()?)));
    Target {
        ip: ips.first().or(context.config.node_ips.first()).copied().unwrap_or(IpAddr::from([127, 0, 0, 1])),
        container: id.clone(),
        ports: ports.collect(),
        runtime: context.runtime.clone(),
    }
}

/// Runs a hook; why it failed otherwise.
pub(super) async fn run(
    context: &Context,
    hook: &LifecycleHandler,
    container: &Container,
    id: &ContainerId,
    ips: &[IpAddr],
) -> Result<(), String> {
    if let Some(sleep) = &hook.sleep {
        tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or_default())).await;
        return Ok(());
    }
    let http_get = hook.http_get.clone().map(|get| HTTPGetAction { ..get });
    let question = Probe { exec: hook.exec.clone(), http_get, tcp_socket: hook.tcp_socket.clone(), ..Probe::default() };
    match ask(&question, &target(context, container, id, ips), HOOK_LIMIT).await {
        Answer::Success(_) => Ok(()),
        Answer::Failure(message) | Answer::Unknown(message) => Err(message),
    }
}

/// Ends a container: preStop hook, stop signal, and after `limit` the end.
pub(super) async fn stop(
    context: &Context,
    pod: &Pod,
    container: &Container,
    current: &Incarnation,
    limit: Duration,
    ips: &[IpAddr],
) {
    let started = Instant::now();
    let hook = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref());
    context
        .event_of(pod, &container.name, EventType::Normal, "Killing", format!("Stopping container {}", container.name))
        .await;
    let mut left = limit;
    if let Some(hook) = hook.filter(|_| !limit.is_zero()) {
        let ips: Vec<IpAddr> = if ips.is_empty() { pod_ips(pod) } else { ips.to_vec() };
        match tokio::time::timeout(limit, run(context, hook, container, &current.id, &ips)).await {
            Ok(Ok(())) => {}
            Ok(Err(message)) => {
                context
                    .event_of(
                        pod,
                        &container.name,
                        EventType::Warning,
                        "FailedPreStopHook",
                        format!("PreStopHook failed: {message}"),
                    )
                    .await;
            }
            Err(_) => tracing::debug!(container = %container.name, "the preStop hook took the whole grace period"),
        }
        left = limit.saturating_sub(started.elapsed()).max(LEAST_GRACE);
    }
    if let Err(error) = context.runtime.stop_container(&current.id, left).await {
        tracing::warn!(container = %container.name, %error, "a container is not stopped");
    }
}

fn pod_ips(pod: &Pod) -> Vec<IpAddr> {
    let ips = pod.status.as_ref().and_then(|status| status.pod_ips.as_ref());
    ips.into_iter().flatten().filter_map(|ip| ip.ip.parse().ok()).collect()
}
