//! Pod workers on a kernel and an API server that are not there, in time that does not pass: whatever fails and whenever the
//! daemon dies, no container is doubled or comes too early, and what is wanted comes about in the end. What a run does follows
//! from its seed.

mod api;
mod kernel;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use coracle_testkit::Image;
use serde_json::{Value, json};
use tokio::sync::{Notify, Semaphore};

use self::api::Api;
use self::kernel::Kernel;
use super::{Context, IdRanges, PodManager, PodTable};
use crate::Config;
use crate::cgroups::Hierarchy;
use crate::csi::Csi;
use crate::devices::Devices;
use crate::dra::Dra;
use crate::events::Events;
use crate::images::{ImageStore, ImportSource, StoreOptions};
use crate::names::Layout;
use crate::node::Facts;
use crate::volumes::{ObjectCache, Volumes, VolumesConfig};

const IMAGE: &str = "docker.io/library/nothing:1";
const RUNS: u64 = 12;
const PODS: u64 = 6;
/// Lives of the daemon in one run; the last one has no faults.
const LIVES: u64 = 4;
/// Longest that what is wanted may take once nothing fails any more: restarts back off for 5 minutes.
const PATIENCE: Duration = Duration::from_secs(1800);

/// Numbers that follow from a seed (SplitMix64).
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

/// How a pod is to be in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Runs,
    Phase(&'static str),
    Gone,
}

struct Case {
    name: String,
    end: End,
}

impl Case {
    /// A pod of this number that has two init containers and a main one.
    fn make(random: &mut Random, number: u64) -> (Self, Value) {
        let name = format!("p{number}");
        let container = |name: &str, command: Value| json!({"name": name, "image": IMAGE, "imagePullPolicy": "Never", "command": command});
        let ends = |code: u64, random: &mut Random| json!(["exit", code.to_string(), random.below(30).to_string()]);
        let (policy, command, end) = match random.below(4) {
            0 => ("Always", json!(["run"]), End::Runs),
            1 => ("Never", ends(0, random), End::Phase("Succeeded")),
            2 => ("Never", ends(3, random), End::Phase("Failed")),
            _ => ("OnFailure", ends(0, random), End::Phase("Succeeded")),
        };
        let inits = [("init-0", ends(0, random)), ("init-1", ends(0, random))];
        let spec = json!({
            "nodeName": "n", "restartPolicy": policy, "terminationGracePeriodSeconds": 5, "enableServiceLinks": false,
            "initContainers": inits.map(|(name, command)| container(name, command)),
            "containers": [container("main", command)],
        });
        let uid = format!("uid-{name}");
        let metadata = json!({"name": name, "namespace": "default", "uid": uid, "generation": 1, "creationTimestamp": "2026-01-01T00:00:00Z"});
        (Self { name, end }, json!({"metadata": metadata, "spec": spec, "status": {"phase": "Pending"}}))
    }

    fn is_so(&self, api: &Api, kernel: &Kernel) -> bool {
        let uid = format!("uid-{}", self.name);
        let pod = api.pod(&self.name);
        let phase = pod.as_ref().and_then(|pod| pod["status"]["phase"].as_str());
        match self.end {
            End::Gone => pod.is_none() && !kernel.knows(&uid),
            End::Runs => phase == Some("Running") && kernel.runs(&uid, "main"),
            End::Phase(wanted) => phase == Some(wanted) && !kernel.runs(&uid, "main"),
        }
    }
}

/// What a daemon is made of, anew with each of its lives.
fn context(root: &Path, images: &Arc<ImageStore>, api: &Api, kernel: &Kernel) -> Arc<Context> {
    let layout = Layout::below(root);
    let config = Arc::new(Config { layout: layout.clone(), ..Config::new("n") });
    let facts = Facts { cpu_millis: 4000, memory_bytes: 1 << 34, disk_bytes: 1 << 40, ..Facts::default() };
    let client = api.client();
    let news = Arc::new(Notify::new());
    let csi = Csi::new(layout.clone(), client.clone(), "n", "boot", news.clone());
    let allocatable = super::allocatable(&config, &facts);
    let volumes = Volumes::new(
        VolumesConfig {
            layout: layout.clone(),
            images: images.clone(),
            csi: csi.clone(),
            allocatable: Arc::new(move || allocatable.clone()),
        },
        ObjectCache::new(client.clone()),
    );
    Arc::new(Context {
        runtime: Arc::new(kernel.clone()),
        images: images.clone(),
        volumes,
        csi,
        devices: Devices::open(layout.clone(), news.clone()).expect("devices"),
        dra: Dra::open(&layout, client.clone(), "n").expect("claims"),
        news,
        table: Arc::new(PodTable::default()),
        cgroups: Hierarchy::nowhere(),
        facts,
        events: Events::new(client.clone(), "n"),
        id_ranges: IdRanges::open(10, &[]).expect("ids"),
        pressure: Default::default(),
        services: kube::runtime::reflector::store().0,
        pulls: Semaphore::new(1),
        image_ids: Default::default(),
        probes: Default::default(),
        shutdown: Default::default(),
        metrics: Default::default(),
        config,
        client,
    })
}

async fn run(seed: u64, root: &Path, images: &Arc<ImageStore>) {
    let (api, kernel) = (Api::new(seed), Kernel::new(seed ^ 0xface));
    let mut random = Random(seed ^ 0xbeef);
    let mut cases = Vec::new();
    for life in 1..=LIVES {
        if life == LIVES {
            api.heal();
            kernel.heal();
        }
        let daemon = tokio::spawn(PodManager::new(context(root, images, &api, &kernel)).run());
        if life < LIVES {
            // Pods come and go while it lives.
            for _ in 0..PODS / (LIVES - 1) {
                let (case, pod) = Case::make(&mut random, cases.len() as u64);
                api.create(pod);
                cases.push(case);
                tokio::time::sleep(Duration::from_millis(random.below(20_000))).await;
            }
            let index = random.below(cases.len() as u64 * 2) as usize;
            if let Some(case) = cases.get_mut(index) {
                api.delete(&case.name, 5);
                case.end = End::Gone;
            }
            tokio::time::sleep(Duration::from_millis(random.below(20_000))).await;
            // It dies without warning.
            daemon.abort();
            drop(daemon.await);
            continue;
        }
        let all_so = async {
            while !cases.iter().all(|case| case.is_so(&api, &kernel)) {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        let settled = tokio::time::timeout(PATIENCE, all_so).await.is_ok();
        let wrong: Vec<_> = cases.iter().filter(|case| !case.is_so(&api, &kernel)).collect();
        let told = |case: &&Case| format!("{} is not {:?}: {:?}", case.name, case.end, api.pod(&case.name));
        assert!(settled, "seed {seed}: {:#?}", wrong.iter().map(told).collect::<Vec<_>>());
        daemon.abort();
        drop(daemon.await);
    }
    assert!(kernel.faults() > 0, "seed {seed}: nothing went wrong");
    assert_eq!(kernel.violations(), Vec::<String>::new(), "seed {seed}");
}

#[test]
fn whatever_fails_no_container_is_doubled_and_what_is_wanted_comes_about() {
    let given = std::env::var("CORACLE_SEED").ok().map(|seed| seed.parse().expect("CORACLE_SEED is a number"));
    let now = k8s_openapi::jiff::Timestamp::now().as_microsecond().unsigned_abs();
    // The same ones each time, and one that nobody has seen yet.
    let seeds = given.map_or_else(|| (0..RUNS).chain([now]).collect(), |seed| vec![seed]);
    for seed in seeds {
        println!("seed {seed} (CORACLE_SEED={seed} runs it alone)");
        let folder = tempfile::tempdir().expect("a folder");
        let images = ImageStore::open(&folder.path().join("images"), StoreOptions::default()).expect("a store");
        let archive = folder.path().join("image.tar");

        let image =
            Image { tag: IMAGE.into(), files: vec![("/etc/passwd".into(), "/nothing".into())], ..Image::default() };
        image.write(&archive).expect("an archive");
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().start_paused(true).build().expect("a runtime");
        runtime.block_on(async {
            images.import(ImportSource::Path(archive), None).await.expect("imported");
            run(seed, folder.path(), &images).await;
        });
    }
}
