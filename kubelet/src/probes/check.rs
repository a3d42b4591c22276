//! One question to a container: by command, HTTP, TCP or gRPC.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Probe;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::net::TcpStream;

use super::{grpc, http};
use crate::cri::{ContainerRuntime, RuntimeError};
use crate::names::ContainerId;

/// Bytes of a command's output that an event shows.
const OUTPUT_LIMIT_BYTES: usize = 10 << 10;

/// What came of a question, with what an event says about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is well.
    Success(String),
    /// It is not.
    Failure(String),
    /// The question could not be asked.
    Unknown(String),
}

/// Whom to ask.
#[derive(Clone)]
pub struct Target {
    /// The pod's address.
    pub ip: IpAddr,
    /// The container.
    pub container: ContainerId,
    /// Its named ports.
    pub ports: HashMap<String, u16>,
    /// How commands are run in it.
    pub runtime: Arc<dyn ContainerRuntime>,
}

impl Target {
    /// A port by number or name.
    pub fn port(&self, port: &IntOrString) -> Option<u16> {
        match port {
            IntOrString::Int(number) => u16::try_from(*number).ok().filter(|number| *number > 0),
            IntOrString::String(name) => self.ports.get(name).copied().or_else(|| name.parse().ok()),
        }
    }
}

/// Asks once.
pub async fn check(probe: &Probe, target: &Target, timeout: Duration) -> Answer {
    if let Some(exec) = &probe.exec {
        return command(exec.command.as_deref().unwrap_or_default(), target, timeout).await;
    }
    let asked = async {
        if let Some(get) = &probe.http_get {
            return http::get(get, target).await;
        }
        if let Some(socket) = &probe.tcp_socket {
            let Some(port) = target.port(&socket.port) else { return no_port(&socket.port) };
            let host = socket.host.clone().filter(|host| !host.is_empty()).unwrap_or_else(|| target.ip.to_string());
            return match TcpStream::connect((host.as_str(), port)).await {
                Ok(_) => Answer::Success(String::new()),
                Err(error) => Answer::Failure(format!("dial tcp {host}:{port}: {error}")),
            };
        }
        if let Some(call) = &probe.grpc {
            let port = u16::try_from(call.port).unwrap_or_default();
            return grpc::check(SocketAddr::new(target.ip, port), call.service.as_deref().unwrap_or_default()).await;
        }
        Answer::Unknown("the probe names no way to ask".into())
    };
    match tokio::time::timeout(timeout, asked).await {
        Ok(answer) => answer,
        Err(_) => Answer::Failure("context deadline exceeded".into()),
    }
}

/// A port by a name that the container does not have.
pub(super) fn no_port(port: &IntOrString) -> Answer {
    match port {
        IntOrString::String(name) => Answer::Unknown(format!("couldn't find port: {name}")),
        IntOrString::Int(number) => Answer::Unknown(format!("invalid port number: {number}")),
    }
}

async fn command(command: &[String], target: &Target, timeout: Duration) -> Answer {
    match target.runtime.exec_sync(&target.container, command, Some(timeout)).await {
        Ok(output) => {
            let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.push_str(&String::from_utf8_lossy(&output.stderr));
            let mut end = text.len().min(OUTPUT_LIMIT_BYTES);
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            text.truncate(end);
            if output.exit_code == 0 { Answer::Success(text) } else { Answer::Failure(text) }
        }
        Err(error @ RuntimeError::DeadlineExceeded { .. }) => Answer::Failure(error.to_string()),
        Err(error) => Answer::Unknown(error.to_string()),
    }
}
