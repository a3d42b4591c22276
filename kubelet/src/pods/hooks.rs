//! Life cycle hooks.

use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, LifecycleHandler, Probe};

use super::context::Context;
use crate::names::ContainerId;
use crate::probes::{Answer, Target, ask};

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
    let http_get = hook.http_get.clone();
    let question = Probe { exec: hook.exec.clone(), http_get, tcp_socket: hook.tcp_socket.clone(), ..Probe::default() };
    match ask(&question, &target(context, container, id, ips), HOOK_LIMIT).await {
        Answer::Success(_) => Ok(()),
        Answer::Failure(message) | Answer::Unknown(message) => Err(message),
    }
}
