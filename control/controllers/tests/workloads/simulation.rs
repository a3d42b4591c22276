//! Controllers that are killed again and again while templates and sizes change and the store makes trouble: no step goes
//! beyond what a rollout may take, and the end is what was asked for. The seed is printed; `CORACLE_SEED` runs one again,
//! `CORACLE_SEEDS` many.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use coracle_testkit::assert_eventually_async;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::ListParams;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng};
use serde_json::json;

use crate::control_plane::seeds;
use crate::faults::Faulty;
use crate::support::{Cluster, ended, running, template};

const SIZE: usize = 6;
const SURGE: usize = 2;
const UNAVAILABLE: usize = 1;
/// Changes and crashes of one run.
const STEPS: usize = 40;
const SETTLE_S: u32 = 90;

fn counts(pod: &Pod, app: &str) -> bool {
    pod.labels().get("app").is_some_and(|label| label == app) && pod.metadata.deletion_timestamp.is_none()
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Follows every change of a pod and of a ReplicaSet; notes what must never be. Surge is what the ReplicaSets are told in sum,
/// as with Kubernetes: pods of one that was told to shrink may be there a moment longer.
fn watch(cluster: &Cluster) -> Arc<Mutex<Vec<String>>> {
    let faults = Arc::new(Mutex::new(Vec::new()));
    let (noted, pods, sets) = (faults.clone(), cluster.api().informer::<Pod>(), cluster.api().informer::<ReplicaSet>());
    tokio::spawn(async move {
        let (mut of_pods, mut of_sets) = (pods.subscribe(), sets.subscribe());
        let mut is_up = false;
        while tokio::select! {
            delta = of_pods.next() => delta.is_some(),
            delta = of_sets.next() => delta.is_some(),
        } {
            let all = pods.list();
            let of: Vec<_> = all.filter(|pod| counts(pod, "d")).collect();
            let ready = of.iter().filter(|pod| is_ready(pod)).count();
            is_up |= ready == SIZE;
            let told: i32 = sets.list().filter_map(|set| set.spec.as_ref()?.replicas).sum();
            if usize::try_from(told).is_ok_and(|told| told > SIZE + SURGE) {
                noted.lock().push(format!("{told} pods of {SIZE} and {SURGE} are asked for"));
            }
            if is_up && ready + UNAVAILABLE < SIZE {
                noted.lock().push(format!("{ready} available pods of {SIZE}, {UNAVAILABLE} may be missing"));
            }
        }
    });
    faults
}

/// How the controllers come to an end.
#[derive(Clone, Copy, PartialEq)]
enum End {
    /// At once, wherever they are.
    Crash,
    /// They go on for a moment beside those that took over.
    Late,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rollouts_stay_within_bounds_through_crashes_and_end() {
    for seed in seeds() {
        run(seed, End::Crash).await;
    }
}

/// Two that lead at once may make a pod too many or end one too early, as with Kubernetes; what comes of it in the end is right.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_leads_no_longer_and_does_not_know_does_no_lasting_harm() {
    for seed in seeds() {
        run(seed, End::Late).await;
    }
}

async fn run(seed: u64, end: End) {
    let mut random = StdRng::seed_from_u64(seed);
    let trouble = Arc::new(AtomicBool::new(false));
    let (on, salt) = (trouble.clone(), random.random());
    let mut cluster = Cluster::start_on(move |store| Faulty::over(store, salt, on)).await;
    cluster.behave(|pod| if counts(pod, "j") { running(pod).map(|_| ended("Succeeded", 0)) } else { running(pod) });
    for node in ["n1", "n2"] {
        cluster.node(node, json!({})).await;
    }
    let faults = watch(&cluster);
    let of = |app: &str| json!({"matchLabels": {"app": app}});
    let mut pods = template("d", "v0");
    pods["spec"]["nodeName"] = "n1".into();
    let rolling = json!({"maxSurge": SURGE, "maxUnavailable": UNAVAILABLE});
    cluster.make::<Deployment>(json!({"metadata": {"name": "d"}, "spec": {"replicas": SIZE, "selector": of("d"), "template": pods, "strategy": {"rollingUpdate": rolling}}})).await;
    cluster.make::<StatefulSet>(json!({"metadata": {"name": "s"}, "spec": {"replicas": 3, "serviceName": "s", "selector": of("s"), "template": template("s", "v0")}})).await;
    cluster
        .make::<DaemonSet>(
            json!({"metadata": {"name": "e"}, "spec": {"selector": of("e"), "template": template("e", "v0")}}),
        )
        .await;
    let mut once = template("j", "v0");
    once["spec"]["restartPolicy"] = "Never".into();
    cluster.make::<Job>(json!({"metadata": {"name": "j"}, "spec": {"completions": 12, "parallelism": 3, "completionMode": "Indexed", "template": once}})).await;
    trouble.store(true, Ordering::Relaxed);
    let mut image = "v0".to_owned();
    let mut size = 3;
    for step in 0..STEPS {
        match random.random_range(0..10) {
            0..2 => {
                image = format!("v{step}");
                let change = json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": image}]}}}});
                cluster.patch::<Deployment>("d", change.clone()).await;
                cluster.patch::<StatefulSet>("s", change.clone()).await;
                cluster.patch::<DaemonSet>("e", change).await;
            }
            2 => {
                size = random.random_range(1..5);
                cluster.patch::<StatefulSet>("s", json!({"spec": {"replicas": size}})).await;
            }
            3..7 if end == End::Crash => cluster.crash().await,
            3..5 => cluster.take_over(Duration::from_millis(random.random_range(0..100))).await,
            _ => tokio::time::sleep(Duration::from_millis(random.random_range(0..150))).await,
        }
    }
    trouble.store(false, Ordering::Relaxed);
    let settled = async || {
        let all = cluster.of::<Pod>().list(&ListParams::default()).await.expect("listed").items;
        let with = |app: &str| all.iter().filter(|pod| counts(pod, app)).cloned().collect::<Vec<_>>();
        let new = |pods: &[Pod]| {
            let of = |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.containers[0].image.clone());
            pods.iter().all(|pod| of(pod).as_ref() == Some(&image) && is_ready(pod))
        };
        let (d, s, e) = (with("d"), with("s"), with("e"));
        let ordinals: BTreeSet<String> = s.iter().map(ResourceExt::name_any).collect();
        let nodes: BTreeSet<_> =
            e.iter().filter_map(|pod| pod.spec.as_ref()?.affinity.clone()).map(|a| format!("{a:?}")).collect();
        let job = cluster.of::<Job>().get("j").await.expect("there").status.unwrap_or_default();
        let sets: BTreeSet<_> = cluster
            .of::<ReplicaSet>()
            .list(&ListParams::default())
            .await
            .expect("listed")
            .items
            .iter()
            .filter_map(ResourceExt::uid)
            .collect();
        [
            (d.len() == SIZE && new(&d), format!("{} pods of the Deployment", d.len())),
            (d.iter().all(|pod| sets.contains(&pod.owner_references()[0].uid)), "an orphan".to_owned()),
            (ordinals == (0..size).map(|at| format!("s-{at}")).collect() && new(&s), format!("{ordinals:?}")),
            (e.len() == 2 && nodes.len() == 2 && new(&e), format!("{} daemons on {} nodes", e.len(), nodes.len())),
            (job.succeeded == Some(12) && job.completed_indexes.as_deref() == Some("0-11"), format!("{job:?}")),
        ]
        .into_iter()
        .filter_map(|(holds, fault)| (!holds).then_some(fault))
        .collect::<Vec<_>>()
    };
    assert_eventually_async!(SETTLE_S, settled().await.is_empty(), "seed {seed}: {:?}", settled().await);
    assert!(end == End::Late || faults.lock().is_empty(), "seed {seed}: {:?}", faults.lock());
}
