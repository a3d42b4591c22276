//! The controllers: loops that read the shared caches of the API server and write through its own path, each with its own
//! identity. A controller is one file and one row in [`run`].
#![forbid(unsafe_code)]

mod autoscale;
mod batch;
mod certificates;
mod cluster;
mod common;
mod garbage;
mod machine;
mod network;
mod policy;
mod storage;
mod workloads;

use std::sync::Arc;

use common::labelled::Labelled;
use common::owned::Owned;
use common::replica::Replicas;
use coracle_api::server::ApiServer;
use k8s_openapi::api::apps::v1::{ControllerRevision, ReplicaSet};
use k8s_openapi::api::core::v1::{Pod, ReplicationController};
use tokio::task::JoinSet;

pub use machine::WorkQueue;

/// Runs every controller until the future is dropped. At most one process of a cluster may do so at a time.
pub async fn run(api: Arc<ApiServer>) {
    if let Err(error) = coracle_api::bootstrap::local_storage_class(&api).await {
        tracing::error!(%error, "the default class of volumes was not made; the next start tries again");
    }
    let mut running = JoinSet::new();
    running.spawn(machine::run(cluster::accounts::Accounts::new(&api)));
    running.spawn(machine::run(cluster::root_ca::RootCa::new(&api)));
    running.spawn(machine::run(cluster::token_secrets::TokenSecrets::new(&api)));
    running.spawn(machine::run(cluster::legacy_tokens::LegacyTokens::new(&api)));
    running.spawn(machine::run(cluster::bootstrap_tokens::BootstrapTokens::new(&api)));
    running.spawn(cluster::events::run(api.clone()));
    running.spawn(machine::run(cluster::aggregation::Aggregation::new(&api)));
    running.spawn(machine::run(cluster::policy_status::PolicyStatus::new(&api)));
    running.spawn(machine::run(cluster::resource_claims::ResourceClaims::new(&api)));
    running.spawn(machine::run(cluster::namespaces::Namespaces::new(&api)));
    running.spawn(machine::run(cluster::quota::Quotas::new(&api)));
    running.spawn(machine::run(cluster::node_ipam::NodeIpam::new(&api)));
    let on_node = Arc::new(api.informer::<Pod>().index(common::pods::node_of));
    let labelled = Arc::new(Labelled::new(&api));
    let users = Arc::new(api.informer::<Pod>().index(common::pods::claims_of));
    running.spawn(machine::run(cluster::node_lifecycle::NodeLifecycle::new(&api, &on_node)));
    running.spawn(machine::run(cluster::taint_eviction::TaintEviction::new(&api, &on_node)));
    running.spawn(machine::run(cluster::device_taints::DeviceTaints::new(&api)));
    running.spawn(machine::run(cluster::pod_gc::PodGc::new(&api, &on_node)));
    running.spawn(machine::run(certificates::approve::Approver::new(&api)));
    running.spawn(machine::run(certificates::sign::Signer::new(&api)));
    running.spawn(machine::run(certificates::clean::Cleaner::new(&api)));
    running.spawn(machine::run(network::endpoints::EndpointsController::new(&api, &labelled)));
    running.spawn(machine::run(network::endpoint_slice::EndpointSlices::new(&api, &labelled)));
    running.spawn(machine::run(network::mirror::Mirror::new(&api)));
    running.spawn(machine::run(network::service_cidrs::ServiceCidrs::new(&api)));
    running.spawn(machine::run(network::balancer::Balancer::new(&api)));
    running.spawn(machine::run(storage::bind::Binder::new(&api)));
    running.spawn(machine::run(storage::ephemeral::Ephemeral::new(&api)));
    running.spawn(machine::run(storage::protect::Claims::new(&api, &users)));
    running.spawn(machine::run(storage::protect::Volumes::new(&api)));
    running.spawn(machine::run(storage::protect::AttributeClasses::new(&api)));
    running.spawn(machine::run(storage::attach::Attach::new(&api, &on_node, &users)));
    let pods = Arc::new(Owned::<Pod>::new(&api));
    let replicas = Arc::new(Replicas::new(&api));
    running.spawn(machine::run(workloads::replica_set::Sets::<ReplicationController>::new(&api, &replicas)));
    running.spawn(machine::run(workloads::replica_set::Sets::<ReplicaSet>::new(&api, &replicas)));
    let revisions = Arc::new(Owned::<ControllerRevision>::new(&api));
    running.spawn(machine::run(workloads::stateful_set::StatefulSets::new(&api, &pods, &revisions)));
    running.spawn(machine::run(workloads::daemon_set::DaemonSets::new(&api, &pods, &revisions)));
    running.spawn(machine::run(batch::job::Jobs::new(&api, &pods)));
    running.spawn(machine::run(batch::ttl::TtlAfterFinished::new(&api)));
    running.spawn(machine::run(batch::cron_job::CronJobs::new(&api)));
    running.spawn(machine::run(workloads::deployment::Deployments::new(&api, &pods)));
    running.spawn(machine::run(autoscale::Autoscalers::new(&api, &labelled)));
    running.spawn(machine::run(policy::disruption::Budgets::new(&api, &labelled)));
    running.spawn(garbage::run(api));
    while let Some(ended) = running.join_next().await {
        if let Err(error) = ended {
            tracing::error!(%error, "a controller ended");
        }
    }
}
