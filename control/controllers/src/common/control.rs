//! Making and removing the pods of a workload, with the events that its users read.

use std::sync::Arc;

use futures::stream::{self, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};

use super::owned::Owner;
use crate::machine::{Error, Host};

/// Most pods one reconciliation makes or removes; the next one goes on.
pub(crate) const BURST: usize = 500;
/// Calls to the API under way at once for one owner.
const PARALLEL: usize = 16;

/// Runs the calls, a bounded number at once; the first failure is reported after all have ended.
pub(crate) async fn collect<F: Future<Output = Result<(), Error>>>(
    calls: impl IntoIterator<Item = F>,
) -> Result<(), Error> {
    stream::iter(calls).buffer_unordered(PARALLEL).fold(Ok(()), |all, one| async move { all.and(one) }).await
}

/// Makes the pods: the first alone, as where a quota or webhook refuses one, it refuses all.
pub(crate) async fn create_all<O: Owner>(host: &Host, owner: &O, api: &Api<Pod>, pods: Vec<Pod>) -> Result<(), Error> {
    let mut pods = pods.into_iter();
    if let Some(first) = pods.next() {
        create(host, owner, api, &first).await?;
    }
    collect(pods.map(|pod| async move { create(host, owner, api, &pod).await })).await
}

/// Makes one pod.
pub(crate) async fn create<O: Owner>(host: &Host, owner: &O, api: &Api<Pod>, pod: &Pod) -> Result<(), Error> {
    match host.create(api, pod).await {
        Ok(made) => {
            let note = format!("Created pod: {}", made.name_any());
            host.event(owner, EventType::Normal, "SuccessfulCreate", "Create", note).await;
            Ok(())
        }
        // The namespace is going, and everything in it.
        Err(error) if error.in_terminating_namespace() => Ok(()),
        Err(error) => {
            let note = format!("Error creating: {}", error.message());
            host.event(owner, EventType::Warning, "FailedCreate", "Create", note).await;
            Err(error)
        }
    }
}

/// Removes pods.
pub(crate) async fn delete_all<O: Owner>(
    host: &Host,
    owner: &O,
    api: &Api<Pod>,
    pods: impl IntoIterator<Item = Arc<Pod>>,
) -> Result<(), Error> {
    collect(pods.into_iter().take(BURST).map(|pod| async move { delete(host, owner, api, &pod).await })).await
}

/// Removes one pod.
pub(crate) async fn delete<O: Owner>(host: &Host, owner: &O, api: &Api<Pod>, pod: &Pod) -> Result<(), Error> {
    match host.delete(api, pod).await {
        Ok(()) => {
            let note = format!("Deleted pod: {}", pod.name_any());
            host.event(owner, EventType::Normal, "SuccessfulDelete", "Delete", note).await;
            Ok(())
        }
        Err(error) => {
            let note = format!("Error deleting: {}", error.message());
            host.event(owner, EventType::Warning, "FailedDelete", "Delete", note).await;
            Err(error)
        }
    }
}
