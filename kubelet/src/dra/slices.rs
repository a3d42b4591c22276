//! ResourceSlices of this node whose drivers are gone: nobody else would remove them. A node may delete its own, not read them.

use std::time::Duration;

use k8s_openapi::api::resource::v1::ResourceSlice;
use kube::api::{DeleteParams, ListParams};
use kube::{Api, Client};

/// Time for a driver to come back: after a start of the node, or an update of the driver.
const GRACE: Duration = Duration::from_secs(30);
/// Pause after a removal that failed.
const RETRY: Duration = Duration::from_secs(10);

/// Once after the start: what was published by drivers that have not registered since.
pub(super) async fn remove_stale(client: &Client, node: &str, registered: impl Fn() -> Vec<String>) {
    tokio::time::sleep(GRACE).await;
    remove(client, || {
        let others: String = registered().iter().map(|driver| format!(",spec.driver!={driver}")).collect();
        Some(format!("spec.nodeName={node}{others}"))
    })
    .await;
}

/// Those of a driver that is gone, unless it comes back soon.
pub(super) async fn remove_of(client: &Client, node: &str, driver: &str, is_back: impl Fn() -> bool) {
    tokio::time::sleep(GRACE).await;
    remove(client, || (!is_back()).then(|| format!("spec.nodeName={node},spec.driver={driver}"))).await;
}

async fn remove(client: &Client, which: impl Fn() -> Option<String>) {
    let api: Api<ResourceSlice> = Api::all(client.clone());
    while let Some(fields) = which() {
        match api.delete_collection(&DeleteParams::default(), &ListParams::default().fields(&fields)).await {
            Ok(_) => return,
            Err(error) => tracing::warn!(%error, "slices of drivers that are gone are not removed yet"),
        }
        tokio::time::sleep(RETRY).await;
    }
}
