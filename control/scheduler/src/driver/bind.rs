//! Binding: volumes first, then the pod, then the news of it.

use std::time::Duration;

use coracle_api::informer::Informer;
use k8s_openapi::api::core::v1::{
    Binding as PodBinding, ObjectReference, PersistentVolume, PersistentVolumeClaim, Pod,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;
use tokio::sync::OwnedSemaphorePermit;

use super::{Outcome, Writer, devices, report};
use crate::engine::Bind;
use crate::plugins::{Binding, SELECTED_NODE, bound_to};

/// Says of a volume that it was bound by machine.
const BOUND_BY_CONTROLLER: &str = "pv.kubernetes.io/bound-by-controller";

/// Binds a pod. The permit is one of the writes under way; who waits for volumes or devices gives it back meanwhile.
pub(super) async fn run(writer: Writer, mut bind: Bind, permit: OwnedSemaphorePermit) {
    let mut permit = Some(permit);
    let mut result = Ok(());
    if !bind.pod.shape.volume_claims.is_empty() {
        permit = None;
        result = bind_volumes(&writer, &bind).await;
    }
    if result.is_ok() && !bind.devices.is_empty() {
        permit = None;
        result = devices::bind(&writer, &mut bind).await.map_err(Failed::Error);
    }
    if result.is_ok() && permit.is_none() {
        permit = writer.writes.clone().acquire_owned().await.ok();
    }
    if result.is_ok() {
        result = bind_pod(&writer, &bind).await;
    }
    drop(permit);
    let (pod, node) = (bind.pod.clone(), bind.node.clone());
    let succeeded = result.is_ok();
    if let Err(Failed::Error(message)) = result {
        tracing::warn!(pod = %pod.name, %node, error = %message, "binding failed, trying again");
        // Before the pod may be tried again: what comes of that is the later news.
        let turn = writer.turns.take(&pod.uid);
        report::failed(&writer, &pod, &turn, "SchedulerError", message, None).await;
    }
    // The loop ends only with the process.
    let _ = writer.outcomes.send(Outcome::Bound(Box::new(bind), succeeded));
    if succeeded {
        report::scheduled(&writer, &pod, &node).await;
    }
}

/// Why a pod was not bound.
enum Failed {
    /// The pod is no more.
    Gone,
    Error(String),
}

async fn bind_pod(writer: &Writer, bind: &Bind) -> Result<(), Failed> {
    let (namespace, name) = (&*bind.pod.shape.namespace, &*bind.pod.name);
    let binding = PodBinding {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(namespace.to_owned()),
            uid: Some(bind.pod.uid.to_string()),
            ..ObjectMeta::default()
        },
        target: ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Node".into()),
            name: Some(bind.node.clone()),
            ..ObjectReference::default()
        },
    };
    let request = || -> Result<http::Request<Vec<u8>>, kube::Error> {
        let body = serde_json::to_vec(&binding).map_err(kube::Error::SerdeError)?;
        http::Request::post(format!("/api/v1/namespaces/{namespace}/pods/{name}/binding"))
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(body)
            .map_err(kube::Error::HttpError)
    };
    let answer = match request() {
        Ok(request) => writer.client.request::<serde_json::Value>(request).await.map(drop),
        Err(error) => Err(error),
    };
    answer.map_err(|error| match &error {
        kube::Error::Api(status) if status.code == 404 => Failed::Gone,
        error => Failed::Error(format!("binding rejected: {error}")),
    })
}

/// Says in the API where the pod's volumes are to be, and waits until they are.
async fn bind_volumes(writer: &Writer, bind: &Bind) -> Result<(), Failed> {
    let namespace = bind.pod.shape.namespace.to_string();
    let failed = |error: kube::Error| {
        Failed::Error(format!("running PreBind plugin \"VolumeBinding\": binding volumes: {error}"))
    };
    let parameters = PatchParams { field_manager: Some("kube-scheduler".into()), ..PatchParams::default() };
    let mut storage = writer.storage.subscribe();
    let mut selected = Vec::new();
    for binding in &bind.volumes {
        match binding {
            Binding::Volume(claim, volume) => {
                let patch = json!({
                    "metadata": {
                        "resourceVersion": volume.metadata.resource_version,
                        "annotations": {BOUND_BY_CONTROLLER: "yes"},
                    },
                    "spec": {"claimRef": {
                        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": namespace,
                        "name": claim.name_any(), "uid": claim.uid(),
                        "resourceVersion": claim.metadata.resource_version,
                    }},
                });
                let volumes: Api<PersistentVolume> = Api::all(writer.client.clone());
                volumes.patch(&volume.name_any(), &parameters, &Patch::Merge(patch)).await.map_err(failed)?;
            }
            Binding::Provision(claim) => {
                let patch = json!({"metadata": {
                    "resourceVersion": claim.metadata.resource_version,
                    "annotations": {SELECTED_NODE: bind.node},
                }});
                let claims: Api<PersistentVolumeClaim> = Api::namespaced(writer.client.clone(), &namespace);
                let written =
                    claims.patch(&claim.name_any(), &parameters, &Patch::Merge(patch)).await.map_err(failed)?;
                let revision = written.resource_version().and_then(|revision| revision.parse().ok());
                selected.push((claim.name_any(), revision.unwrap_or_default()));
            }
        }
    }
    for (_, revision) in &selected {
        writer.claims.reached(*revision).await;
    }
    let names: Vec<&String> = bind.pod.shape.volume_claims.iter().map(|(name, _)| name).collect();
    let wait = async {
        loop {
            let state = |name: &String| ClaimState::of(&writer.claims, &namespace, name);
            let states: Vec<ClaimState> = names.iter().map(|name| state(name)).collect();
            if states.iter().all(|state| state.bound) {
                return Ok(());
            }
            if let Some((name, _)) = names.iter().zip(&states).find(|(_, state)| state.gone) {
                return Err(format!("persistentvolumeclaim {name:?} not found"));
            }
            // Whoever makes volumes takes the node away when it cannot make one there.
            if selected.iter().any(|(name, _)| !state(name).bound && !state(name).selected) {
                return Err("provisioning failed for the selected node".to_owned());
            }
            if pod_is_gone(&writer.pods, bind) {
                return Err("the pod was deleted while its volumes were bound".to_owned());
            }
            // The sender lives as long as the writer.
            let _ = tokio::time::timeout(RECHECK, storage.changed()).await;
        }
    };
    let words = match tokio::time::timeout(bind.bind_timeout, wait).await {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(words)) => words,
        Err(_) => "context deadline exceeded".to_owned(),
    };
    Err(Failed::Error(format!("running PreBind plugin \"VolumeBinding\": binding volumes: {words}")))
}

/// How often who waits for volumes or devices looks whether its pod is still there.
pub(super) const RECHECK: Duration = Duration::from_secs(5);

pub(super) fn pod_is_gone(pods: &Informer<Pod>, bind: &Bind) -> bool {
    let pod = pods.get(&bind.pod.shape.namespace, &bind.pod.name);
    pod.is_none_or(|pod| pod.metadata.uid.as_deref() != Some(&*bind.pod.uid))
}

struct ClaimState {
    gone: bool,
    bound: bool,
    selected: bool,
}

impl ClaimState {
    fn of(claims: &Informer<PersistentVolumeClaim>, namespace: &str, name: &str) -> Self {
        let claim = claims.get(namespace, name);
        Self {
            gone: claim.is_none(),
            bound: claim.as_ref().is_some_and(|claim| bound_to(claim).is_some()),
            selected: claim.is_some_and(|claim| claim.annotations().contains_key(SELECTED_NODE)),
        }
    }
}
