//! `GetContainerEvents`: what happens to containers and sandboxes, each time with the whole pod as it is then.

use std::sync::Arc;

use futures::{Stream, StreamExt};
use tokio::sync::broadcast;
use tokio_stream::wrappers::BroadcastStream;
use tonic::Status;

use super::{api, seen};
use crate::cri::{ContainerEvent, ContainerRuntime, ContainerStatus, SandboxStatus};
use crate::images::ImageStore;
use crate::supervisor::container::now;

/// Events that a slow client may lag behind before its stream ends; it lists and asks again.
const EVENT_QUEUE: usize = 4096;

/// Where events go; cheap to clone.
#[derive(Clone)]
pub(super) struct Events {
    verbs: Arc<dyn ContainerRuntime>,
    images: Arc<ImageStore>,
    sender: broadcast::Sender<api::ContainerEventResponse>,
}

impl Events {
    pub(super) fn new(verbs: Arc<dyn ContainerRuntime>, images: Arc<ImageStore>) -> Self {
        Self { verbs, images, sender: broadcast::Sender::new(EVENT_QUEUE) }
    }

    /// Tells of a sandbox; its id stands for the container that other runtimes have for it.
    pub(super) fn sandbox(&self, sandbox: &SandboxStatus, what: api::ContainerEventType) {
        self.send(api::ContainerEventResponse {
            container_id: sandbox.id.to_string(),
            container_event_type: what as i32,
            created_at: now(),
            pod_sandbox_status: Some(seen::sandbox_status(sandbox)),
            containers_statuses: Vec::new(),
        });
    }

    /// Tells of a container, with its pod as it is now.
    pub(super) async fn container(&self, status: &ContainerStatus, what: api::ContainerEventType) {
        if self.sender.receiver_count() == 0 {
            return;
        }
        // A pod that is gone already has nothing to be told of.
        let sandbox = self.verbs.pod_sandbox_status(&status.sandbox).await.ok();
        let all = self.verbs.list_containers().await.unwrap_or_default();
        let members = all.iter().filter(|container| container.sandbox == status.sandbox);
        self.send(api::ContainerEventResponse {
            container_id: status.id.to_string(),
            container_event_type: what as i32,
            created_at: now(),
            pod_sandbox_status: sandbox.as_ref().map(seen::sandbox_status),
            containers_statuses: members.map(|c| seen::container_status(c, &self.images)).collect(),
        });
    }

    fn send(&self, event: api::ContainerEventResponse) {
        // Nobody listening is no error.
        drop(self.sender.send(event));
    }

    /// Passes the ends of containers on, until dropped.
    pub(super) async fn follow(self) {
        let mut events = self.verbs.events();
        loop {
            match events.recv().await {
                Ok(ContainerEvent::Stopped { id, .. }) => {
                    if let Ok(status) = self.verbs.container_status(&id).await {
                        self.container(&status, api::ContainerEventType::Stopped).await;
                    }
                }
                Ok(ContainerEvent::Oom { .. }) => {}
                Err(broadcast::error::RecvError::Lagged(missed)) => {
                    tracing::warn!(missed, "ends of containers were not told to clients of the interface");
                }
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    }

    /// What happens from now on.
    pub(super) fn stream(&self) -> impl Stream<Item = Result<api::ContainerEventResponse, Status>> + use<> {
        BroadcastStream::new(self.sender.subscribe()).map(|event| {
            event.map_err(|lag| Status::data_loss(format!("the client is too slow: {lag}; list and ask again")))
        })
    }
}
