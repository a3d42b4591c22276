//! What a session is about: a program to run in a container, or the container's own streams.

use std::sync::Arc;

use tokio::sync::{broadcast, oneshot};

use super::session::{Exit, Job};
use super::upgrade::Request;
use crate::cri::{ContainerEvent, ContainerRuntime, ContainerState, ContainerStatus, ExecRequest, ExecSession};
use crate::names::ContainerId;

/// Starts a program in a container.
pub(crate) async fn exec(
    runtime: Arc<dyn ContainerRuntime>,
    id: ContainerId,
    command: Vec<String>,
    wanted: Request,
) -> Result<Job, String> {
    let program =
        ExecRequest { command, tty: wanted.tty, stdin: wanted.stdin, stdout: wanted.stdout, stderr: wanted.stderr };
    let started = runtime.exec(&id, program).await;
    let ExecSession { streams, exit, pid } =
        started.map_err(|error| format!("error executing command in container: {error}"))?;
    Ok(Job { streams, exit: Exit::Code(exit), pid: Some(pid), input: None })
}

/// Joins a container's own streams.
pub(crate) async fn attach(
    runtime: Arc<dyn ContainerRuntime>,
    status: ContainerStatus,
    wanted: Request,
) -> Result<Job, String> {
    let mut streams = runtime
        .attach(&status.id, wanted.stdin)
        .await
        .map_err(|error| format!("error attaching to container: {error}"))?;
    if !wanted.stdout {
        streams.stdout = None;
    }
    if !wanted.stderr {
        streams.stderr = None;
    }
    let stdio = status.config.stdio;
    let (input, over) = oneshot::channel::<()>();
    let (mut sender, told) = oneshot::channel();
    tokio::spawn(async move {
        let end = ended(runtime.clone(), status.id.clone());
        tokio::pin!(end);
        tokio::select! {
            () = &mut end => {}
            () = sender.closed(), if !wanted.stdin => return,
            // Nothing is ever sent: the end of the sender is the message.
            _dropped = over, if wanted.stdin => {
                // A container that reads its input once sees its end, and the client sees the container's; any other's input stays
                // open for the next client, and this one has nothing more to do here.
                if stdio.stdin_once && !stdio.tty {
                    if let Err(error) = runtime.close_stdin(&status.id).await {
                        tracing::debug!(container = %status.id, %error, "standard input is closed already");
                    }
                    tokio::select! {
                        () = end => {}
                        () = sender.closed() => return,
                    }
                }
            }
        }
        // The session may be gone already.
        let _told = sender.send(());
    });
    Ok(Job { streams, exit: Exit::Told(told), pid: None, input: Some(input) })
}

/// Becomes ready when the container has ended.
pub(crate) async fn ended(runtime: Arc<dyn ContainerRuntime>, id: ContainerId) {
    // Listening begins before looking, so that no end falls in between.
    let mut events = runtime.events();
    loop {
        match runtime.container_status(&id).await {
            Ok(status) if matches!(status.state, ContainerState::Running | ContainerState::Created) => {}
            _ => return,
        }
        loop {
            match events.recv().await {
                Ok(ContainerEvent::Stopped { id: stopped, .. }) if stopped == id => return,
                Ok(_) => {}
                Err(broadcast::error::RecvError::Lagged(_)) => break,
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    }
}
