//! Controllers that are killed again and again while users, scheduler and nodes go on: whatever the order, the end is the same.
//! The seed is printed; `CORACLE_SEED` runs one again, `CORACLE_SEEDS` many.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use coracle_testkit::assert_eventually_async;
use k8s_openapi::api::core::v1::{
    Endpoints, Node, PersistentVolume, PersistentVolumeClaim, Pod, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng};
use serde_json::json;
use support::{Cluster, made, seeds};

/// Steps of one run.
const STEPS: usize = 150;
/// Names of each kind that come and go.
const NAMES: usize = 5;
/// Seconds in which everything must have settled once nobody changes anything.
const SETTLE_S: u32 = 60;

struct World {
    cluster: Cluster,
    random: StdRng,
    services: Api<Service>,
    pods: Api<Pod>,
    claims: Api<PersistentVolumeClaim>,
    volumes: Api<PersistentVolume>,
    next_ip: u8,
}

impl World {
    fn any(&mut self) -> usize {
        self.random.random_range(0..NAMES)
    }

    /// One change of somebody; what is not possible just now is left.
    async fn step(&mut self) {
        let index = self.any();
        let (service, pod, claim) = (format!("s{index}"), format!("p{index}"), format!("c{index}"));
        let (new, merge, now) =
            (PostParams::default(), PatchParams::default(), DeleteParams::default().grace_period(0));
        match self.random.random_range(0..100) {
            0..10 => {
                let app = format!("a{}", self.any() % 2);
                let object =
                    json!({"metadata": {"name": service}, "spec": {"selector": {"app": app}, "ports": [{"port": 80}]}});
                let _ = self.services.create(&new, &made(object)).await;
            }
            10..15 => drop(self.services.delete(&service, &DeleteParams::default()).await),
            15..40 => {
                let app = format!("a{}", self.any() % 2);
                let object = json!({"metadata": {"name": pod, "labels": {"app": app}}, "spec": {"nodeName": "node",
                    "containers": [{"name": "c", "image": "i"}], "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": claim}}]}});
                let _ = self.pods.create(&new, &made(object)).await;
                self.next_ip = self.next_ip.wrapping_add(1).max(1);
                let ready = if self.random.random_bool(0.7) { "True" } else { "False" };
                let status = json!({"status": {"phase": "Running", "podIPs": [{"ip": format!("10.0.0.{}", self.next_ip)}], "podIP": format!("10.0.0.{}", self.next_ip),
                    "conditions": [{"type": "Ready", "status": ready}]}});
                let _ = self.pods.patch_status(&pod, &merge, &Patch::Merge(status)).await;
            }
            40..55 => drop(self.pods.delete(&pod, &now).await),
            55..75 => {
                let object = json!({"metadata": {"name": claim}, "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}});
                let _ = self.claims.create(&new, &made(object)).await;
                let select = json!({"metadata": {"annotations": {"volume.kubernetes.io/selected-node": "node"}}});
                let _ = self.claims.patch(&claim, &merge, &Patch::Merge(select)).await;
            }
            75..85 => drop(self.claims.delete(&claim, &DeleteParams::default()).await),
            // A crash: every task of every controller ends at whatever it waits for.
            85..95 => self.cluster.control().await,
            _ => tokio::time::sleep(Duration::from_millis(self.random.random_range(0..30))).await,
        }
    }

    /// What does not fit together; empty when all has settled.
    async fn faults(&self) -> Vec<String> {
        let all = ListParams::default();
        let pods = self.pods.list(&all).await.expect("listed").items;
        let services = self.services.list(&all).await.expect("listed").items;
        let slices = self.cluster.ns::<EndpointSlice>("n").list(&all).await.expect("listed").items;
        let endpoints = self.cluster.ns::<Endpoints>("n").list(&all).await.expect("listed").items;
        let claims = self.claims.list(&all).await.expect("listed").items;
        let volumes = self.volumes.list(&all).await.expect("listed").items;
        let mut faults = Vec::new();
        for service in &services {
            let name = service.name_any();
            let selector = service.spec.clone().and_then(|spec| spec.selector).unwrap_or_default();
            let serves = |pod: &&Pod| {
                pod.labels().get("app") == selector.get("app") && pod.metadata.deletion_timestamp.is_none()
            };
            let ready = |pod: &Pod| {
                let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
                conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
            };
            let ip = |pod: &Pod| pod.status.as_ref().and_then(|status| status.pod_ip.clone());
            let wanted: BTreeMap<String, bool> =
                pods.iter().filter(serves).filter_map(|pod| Some((ip(pod)?, ready(pod)))).collect();
            let of = slices.iter().filter(|slice| slice.labels().get("kubernetes.io/service-name") == Some(&name));
            let mut sliced = BTreeMap::new();
            for endpoint in of.flat_map(|slice| slice.endpoints.iter().flatten()) {
                let ready = endpoint.conditions.as_ref().and_then(|conditions| conditions.ready) == Some(true);
                if sliced.insert(endpoint.addresses[0].clone(), ready).is_some() {
                    faults.push(format!("{name}: an address is in two slices"));
                }
            }
            let subsets = endpoints
                .iter()
                .filter(|found| found.name_any() == name)
                .flat_map(|found| found.subsets.iter().flatten());
            let mut listed = BTreeMap::new();
            for subset in subsets {
                listed.extend(subset.addresses.iter().flatten().map(|address| (address.ip.clone(), true)));
                listed.extend(subset.not_ready_addresses.iter().flatten().map(|address| (address.ip.clone(), false)));
            }
            if sliced != wanted || listed != wanted {
                faults.push(format!("{name}: pods {wanted:?}, slices {sliced:?}, Endpoints {listed:?}"));
            }
        }
        let names: BTreeSet<_> = services.iter().map(|service| service.name_any()).collect();
        faults.extend(
            slices
                .iter()
                .filter_map(|slice| slice.labels().get("kubernetes.io/service-name"))
                .filter(|of| !names.contains(*of))
                .map(|of| format!("a slice of {of}, which is gone")),
        );
        faults.extend(
            endpoints
                .iter()
                .map(|found| found.name_any())
                .filter(|of| !names.contains(of))
                .map(|of| format!("Endpoints of {of}, which is gone")),
        );
        for claim in &claims {
            let name = claim.name_any();
            let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone());
            let phase = claim.status.as_ref().and_then(|status| status.phase.clone()).unwrap_or_default();
            // One that goes is only waited for.
            let selected = claim.metadata.deletion_timestamp.is_none()
                && claim.annotations().contains_key("volume.kubernetes.io/selected-node");
            if selected && phase != "Bound" {
                faults.push(format!("claim {name} is {phase}"));
            }
            let held = volumes.iter().find(|found| Some(found.name_any()) == volume);
            let of = held.and_then(|found| found.spec.as_ref()?.claim_ref.as_ref()?.uid.clone());
            if volume.is_some() && of != claim.uid() {
                faults.push(format!("claim {name} and its volume do not name each other"));
            }
            let used = pods.iter().any(|pod| pod.name_any() == name.replace('c', "p"));
            if claim.metadata.deletion_timestamp.is_some() && !used {
                faults.push(format!("claim {name} is held by nobody"));
            }
        }
        for volume in &volumes {
            let of = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref()?.uid.clone());
            if !claims.iter().any(|claim| claim.uid() == of) {
                faults.push(format!("volume {} outlived its claim", volume.name_any()));
            }
        }
        faults
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_killed_at_any_point_comes_to_the_same_end() {
    for seed in seeds() {
        run(seed).await;
    }
}

async fn run(seed: u64) {
    let cluster = Cluster::start().await;
    cluster.namespace("n").await;
    let accounts: Api<ServiceAccount> = cluster.ns("n");
    assert_eventually_async!(
        20,
        accounts.get_opt("default").await.expect("asked").is_some(),
        "the namespace has its account"
    );
    cluster
        .create(
            &cluster.all::<Node>(),
            json!({"metadata": {"name": "node", "annotations": {"coracle.io/local-volumes": "/v"}}}),
        )
        .await;
    let ready =
        json!({"conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": "2099-01-01T00:00:00Z"}]});
    cluster.patch_status(&cluster.all::<Node>(), "node", ready).await;
    let mut world = World {
        services: cluster.ns("n"),
        pods: cluster.ns("n"),
        claims: cluster.ns("n"),
        volumes: cluster.all(),
        random: StdRng::seed_from_u64(seed),
        next_ip: 0,
        cluster,
    };
    for _ in 0..STEPS {
        world.step().await;
    }
    assert_eventually_async!(SETTLE_S, world.faults().await.is_empty(), "seed {seed}: {:#?}", world.faults().await);
}
