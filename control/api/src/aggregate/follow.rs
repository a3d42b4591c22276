//! Follows the APIServices: who serves what, and whether they can be asked.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};

use super::availability;
use super::backend::Backend;
use crate::informer::Informer;
use crate::server::ApiServer;
use crate::user::UserInfo;

/// Services are asked again after this time, those that failed sooner.
const CHECK: Duration = Duration::from_secs(30);
const CHECK_FAILED: Duration = Duration::from_secs(1);
/// Services that are asked at once.
const PARALLEL: usize = 16;

/// Starts to follow them; ends with the server.
pub(crate) fn start(api: &Arc<ApiServer>) {
    let api = api.clone();
    tokio::spawn(async move {
        let shutdown = api.shutdown.clone();
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = follow(&api) => {}
        }
    });
}

async fn follow(api: &Arc<ApiServer>) {
    let informer = api.informer::<APIService>();
    let client = Api::<APIService>::all(api.client(UserInfo::apiserver()));
    let mut deltas = informer.subscribe();
    let mut rows = api.registry.changes();
    informer.synced().await;
    loop {
        while deltas.try_next().is_some() {}
        rows.mark_unchanged();
        if let Err(error) = super::local::sync(api, &client, &informer).await {
            tracing::warn!(%error, "keep the APIServices of custom resources");
        }
        let healthy = refresh(api, &client, &informer).await;
        let pause = async {
            match healthy {
                Some(true) => tokio::time::sleep(CHECK).await,
                Some(false) => tokio::time::sleep(CHECK_FAILED).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = pause => {}
            _ = deltas.next() => {}
            changed = rows.changed() => if changed.is_err() { return },
        }
    }
}

/// Checks all services. `None` when there is nothing to check, else whether all can be asked.
async fn refresh(api: &Arc<ApiServer>, client: &Api<APIService>, informer: &Arc<Informer<APIService>>) -> Option<bool> {
    let known = api.aggregated.all();
    let mut all: Vec<(Arc<APIService>, Backend)> = Vec::new();
    for object in informer.list() {
        let Ok(value) = serde_json::to_value(&*object) else { continue };
        let Some(mut backend) = Backend::of(&value) else { continue };
        if let Some(old) = known.iter().find(|old| old.name == backend.name) {
            backend.condition = old.condition.clone();
            backend.documents = old.documents.clone();
        }
        all.push((object, backend));
    }
    all.sort_by(|(_, a), (_, b)| {
        (b.priority.0, &a.group, b.priority.1, &a.version).cmp(&(a.priority.0, &b.group, a.priority.1, &b.version))
    });
    // What an APIService claims is not ours from now on, whether it answers or not.
    api.aggregated.replace(all.iter().map(|(_, backend)| Arc::new(backend.clone())).collect());
    let checked: Vec<Arc<Backend>> = futures::stream::iter(all.into_iter().map(|(object, mut backend)| async move {
        let (condition, documents) = availability::check(api, &backend).await;
        backend.condition = condition;
        if let Some(documents) = documents {
            backend.documents = Arc::new(documents);
        }
        if let Err(error) = write(client, &object, &backend).await {
            tracing::debug!(%error, name = backend.name, "write the condition of an APIService");
        }
        Arc::new(backend)
    }))
    .buffered(PARALLEL)
    .collect()
    .await;
    let healthy = checked.iter().all(|backend| backend.condition.is_available());
    let none = checked.is_empty();
    api.aggregated.replace(checked);
    (!none).then_some(healthy)
}

/// Writes the condition when it changed; other conditions stay.
async fn write(client: &Api<APIService>, object: &APIService, backend: &Backend) -> Result<(), kube::Error> {
    let value = serde_json::to_value(object).map_err(kube::Error::SerdeError)?;
    let mut conditions = value.pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default();
    let mut wanted = backend.condition.value();
    wanted["lastTransitionTime"] = crate::time::seconds(jiff::Timestamp::now()).into();
    match conditions.iter_mut().find(|known| known["type"] == "Available") {
        Some(known) => {
            let same = |member: &str| known[member] == wanted[member];
            if same("status") && same("reason") && same("message") {
                return Ok(());
            }
            if same("status") {
                wanted["lastTransitionTime"] = known["lastTransitionTime"].clone();
            }
            *known = wanted;
        }
        None => conditions.push(wanted),
    }
    let patch = json!({
        "metadata": {"resourceVersion": object.metadata.resource_version},
        "status": {"conditions": conditions},
    });
    client.patch_status(&backend.name, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)
}
