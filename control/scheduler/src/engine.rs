//! The scheduler without its surroundings: updates of objects go in, what is to be done about pods comes out. It does no
//! IO and knows no clock but the one it is given.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::Delta;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::time::Instant;

use crate::config::{Config, Profile};
use crate::cycle::{Cycles, Failure, World};
use crate::plugins::{Binding, ClaimChoice, Context, Event, PLUGINS, VolumeChoice, choose_devices, choose_volumes};
use crate::queue::Queue;
use crate::state::{Cache, Cluster, PodState, Shapes, takes_room};
use crate::update::Update;

/// What is to be done about a pod.
#[derive(Debug)]
pub enum Action {
    /// Bind it to the node. The pod counts there already; the outcome goes to [`Engine::bound`].
    Bind(Bind),
    /// Say why it has no node, and make room if that helps.
    Report(Report),
}

/// A pod and its node.
#[derive(Debug)]
pub struct Bind {
    pub(crate) pod: Arc<PodState>,
    pub(crate) volumes: VolumeChoice,
    pub(crate) devices: Vec<ClaimChoice>,
    pub(crate) bind_timeout: Duration,
    /// Name of the node.
    pub node: String,
}

/// A pod without a node.
#[derive(Debug)]
pub struct Report {
    pub(crate) pod: Arc<PodState>,
    /// Why it has none, as users know it.
    pub message: String,
    /// The node on which room is made; empty to take an earlier promise back; `None` to leave it as it is.
    pub(crate) nominated: Option<String>,
    /// Pods that must leave.
    pub(crate) victims: Vec<Arc<PodState>>,
    /// Pods that lose the room that was made for them.
    pub(crate) displaced: Vec<Arc<PodState>>,
}

impl Bind {
    /// Name of the pod.
    pub fn pod(&self) -> &str {
        &self.pod.name
    }
}

impl Report {
    /// Name of the pod.
    pub fn pod(&self) -> &str {
        &self.pod.name
    }

    /// Names of the pods that must leave.
    pub fn victims(&self) -> impl Iterator<Item = &str> {
        self.victims.iter().map(|victim| &*victim.name)
    }
}

/// The scheduler.
pub struct Engine {
    config: Config,
    pub(crate) cache: Cache,
    pub(crate) cluster: Cluster,
    shapes: Shapes,
    pub(crate) queue: Queue,
    cycles: Cycles,
    /// Pods that count on a node on which they have not been seen yet, by UID.
    assumed: HashSet<Arc<str>>,
    random: SmallRng,
}

impl Engine {
    /// A scheduler that knows nothing yet; `seed` decides among nodes that are equally good.
    pub fn new(config: Config, seed: u64) -> Self {
        let queue = Queue::new(Duration::from_secs(config.backoff_first_s), Duration::from_secs(config.backoff_most_s));
        Self {
            config,
            cache: Cache::default(),
            cluster: Cluster::default(),
            shapes: Shapes::default(),
            queue,
            cycles: Cycles::default(),
            assumed: HashSet::new(),
            random: SmallRng::seed_from_u64(seed),
        }
    }

    fn profile<'a>(config: &'a Config, pod: &PodState) -> Option<&'a Profile> {
        config.profiles.iter().find(|profile| profile.name == pod.shape.scheduler)
    }

    /// Takes a change of an object.
    pub fn update(&mut self, update: &Update, now: Instant) {
        match update {
            Update::Node(delta) => self.node_changed(delta, now),
            Update::Pod(delta) => self.pod_changed(delta, now),
            other => {
                let Some(event) = other.apply(&mut self.cluster, &mut self.cache) else { return };
                self.event(event, now);
            }
        }
    }

    /// Lets pods be tried again that an event can help.
    fn raise(config: &Config, cache: &Cache, cluster: &Cluster, queue: &mut Queue, event: Event<'_>, now: Instant) {
        if !queue.has_hopeless() {
            return;
        }
        let helps = |pod: &PodState, rejectors: u32| {
            let Some(profile) = Self::profile(config, pod) else { return false };
            let context = Context { cache, cluster, args: &profile.args };
            let mut plugins = (0_u32..).zip(PLUGINS).filter(|(bit, _)| rejectors & (1 << bit) != 0);
            plugins.any(|(_, row)| (row.helps)(pod, event, &context))
        };
        queue.event(helps, now);
    }

    fn event(&mut self, event: Event<'_>, now: Instant) {
        Self::raise(&self.config, &self.cache, &self.cluster, &mut self.queue, event, now);
    }

    fn node_event(&mut self, name: &str, now: Instant) {
        if let Some(node) = self.cache.slot(name).and_then(|slot| self.cache.node(slot)) {
            Self::raise(&self.config, &self.cache, &self.cluster, &mut self.queue, Event::Node(node), now);
        }
    }

    fn left(&mut self, pod: &PodState, node: &str, now: Instant) {
        let node = self.cache.slot(node).and_then(|slot| self.cache.node(slot));
        Self::raise(&self.config, &self.cache, &self.cluster, &mut self.queue, Event::PodLeft(pod, node), now);
    }

    fn node_changed(&mut self, delta: &Delta<Node>, now: Instant) {
        match (&delta.old, &delta.new) {
            (old, Some(node)) => {
                let status = |node: &Node| node.status.as_ref().map(|status| status.allocatable.clone());
                let news = old.as_ref().is_none_or(|old| {
                    old.spec != node.spec || old.metadata.labels != node.metadata.labels || status(old) != status(node)
                });
                let images = |node: &Node| node.status.as_ref().and_then(|status| status.images.clone());
                if news || old.as_ref().is_some_and(|old| images(old) != images(node)) {
                    self.cache.set_node(node);
                }
                if news {
                    self.node_event(&node.name_any(), now);
                }
            }
            (Some(gone), None) => {
                self.cache.remove_node(&gone.name_any());
                self.event(Event::NodeGone, now);
            }
            (None, None) => {}
        }
    }

    fn pod_changed(&mut self, delta: &Delta<Pod>, now: Instant) {
        // A name that was deleted and made again in one delta is two pods.
        let gone = delta.old.as_ref().filter(|old| delta.new.as_ref().is_none_or(|new| new.uid() != old.uid()));
        if let Some(gone) = gone {
            let state = PodState::new(gone, &mut self.shapes);
            self.forget(&state, now);
        }
        let Some(pod) = &delta.new else { return };
        let state = PodState::new(pod, &mut self.shapes);
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).filter(|name| !name.is_empty());
        match node {
            _ if !takes_room(pod) => self.forget(&state, now),
            Some(node) => self.seen_on_node(&state, node, now),
            None if self.cache.node_of(&state).is_some() => {
                // Its binding is under way.
                self.queue.add(state, false, now);
            }
            None if state.is_terminating || Self::profile(&self.config, &state).is_none() => {
                self.forget(&state, now);
            }
            None => {
                let gates = pod.spec.as_ref().and_then(|spec| spec.scheduling_gates.as_ref());
                let is_new = self.queue.get(&state.uid).is_none();
                if let Some(node) = state.nominated.as_deref().filter(|_| is_new) {
                    self.cache.nominate(&state, Some(node));
                }
                self.queue.add(state, gates.is_some_and(|gates| !gates.is_empty()), now);
            }
        }
    }

    fn seen_on_node(&mut self, pod: &Arc<PodState>, node: &str, now: Instant) {
        self.queue.remove(&pod.uid);
        self.assumed.remove(&pod.uid);
        let before = self.cache.node_of(pod).cloned();
        let old = before.as_ref().and_then(|before| {
            let slot = self.cache.slot(before)?;
            self.cache.node(slot)?.pods.get(&pod.uid).cloned()
        });
        self.cache.place(pod.clone(), node);
        match old {
            Some(old) if before.as_deref() == Some(node) => {
                if !Arc::ptr_eq(&old.shape, &pod.shape) || old.is_terminating != pod.is_terminating {
                    self.left(&old, node, now);
                    self.event(Event::PodCame(pod), now);
                }
            }
            _ => self.event(Event::PodCame(pod), now),
        }
    }

    /// Drops a pod; the room it had may be what others wait for.
    fn forget(&mut self, pod: &Arc<PodState>, now: Instant) {
        self.queue.remove(&pod.uid);
        self.assumed.remove(&pod.uid);
        let promised = self.cache.nominated(&pod.uid).map(ToOwned::to_owned);
        if let Some(node) = promised {
            self.cache.nominate(pod, None);
            self.left(pod, &node, now);
        }
        if let Some(node) = self.cache.node_of(pod).cloned() {
            self.cache.remove_pod(pod);
            self.left(pod, &node, now);
        }
    }

    /// Schedules the next pod that is ready.
    pub fn step(&mut self, now: Instant) -> Option<Action> {
        loop {
            let pod = self.queue.pop(now)?;
            let Some(profile) = Self::profile(&self.config, &pod) else {
                self.queue.remove(&pod.uid);
                continue;
            };
            let mut world = World { cache: &mut self.cache, cluster: &self.cluster, profile };
            let bind_timeout = Duration::from_secs(profile.args.bind_timeout_s);
            return Some(match self.cycles.schedule(&pod, &mut world, &mut self.random) {
                Ok(slot) => self.assume(pod, slot, bind_timeout, now),
                Err(failed) => {
                    let (failure, candidate) = *failed;
                    self.report(pod, &failure, candidate, now)
                }
            });
        }
    }

    fn assume(&mut self, pod: Arc<PodState>, slot: u32, bind_timeout: Duration, now: Instant) -> Action {
        let found = self.cache.node(slot).map(|node| {
            let volumes = choose_volumes(&pod.shape, node, &self.cluster).unwrap_or_default();
            let devices = choose_devices(&pod.shape, node, &self.cluster).unwrap_or_default();
            (node.name().to_owned(), volumes, devices)
        });
        let (node, volumes, devices) = found.unwrap_or_default();
        for choice in &devices {
            if let (Some(allocation), Some(uid)) = (&choice.allocation, &choice.claim.metadata.uid) {
                self.cluster.assumed_claims.insert(uid.clone(), allocation.clone());
            }
        }
        self.assume_volumes(&volumes, true);
        self.cache.place(pod.clone(), &node);
        self.assumed.insert(pod.uid.clone());
        self.event(Event::PodCame(&pod), now);
        Action::Bind(Bind { pod, node, volumes, devices, bind_timeout })
    }

    fn assume_volumes(&mut self, volumes: &VolumeChoice, assume: bool) {
        for binding in volumes {
            let Binding::Volume(claim, volume) = binding else { continue };
            let name = volume.name_any();
            if assume {
                let owner = (claim.namespace().unwrap_or_default(), claim.name_any());
                self.cluster.assumed_volumes.insert(name, owner);
            } else {
                self.cluster.assumed_volumes.remove(&name);
            }
            self.cluster.assumed_version += 1;
        }
    }

    /// Takes the outcome of a binding: a pod that was not bound counts no longer and is tried again.
    pub fn bound(&mut self, bind: &Bind, succeeded: bool, now: Instant) {
        self.assume_volumes(&bind.volumes, false);
        if succeeded || !self.assumed.remove(&bind.pod.uid) {
            return;
        }
        for choice in bind.devices.iter().filter(|choice| choice.allocation.is_some()) {
            self.cluster.assumed_claims.remove(choice.claim.metadata.uid.as_deref().unwrap_or_default());
        }
        self.cache.remove_pod(&bind.pod);
        self.left(&bind.pod, &bind.node, now);
        self.queue.failed(&bind.pod.uid, now);
    }

    fn report(
        &mut self,
        pod: Arc<PodState>,
        failure: &Failure,
        candidate: Option<crate::cycle::Candidate>,
        now: Instant,
    ) -> Action {
        let message = failure.to_string();
        let promised = self.cache.nominated(&pod.uid).is_some() || pod.nominated.is_some();
        let (mut victims, mut displaced) = (Vec::new(), Vec::new());
        let mut nominated = (promised && !failure.keeps_nomination).then(String::new);
        if let Some(candidate) = candidate
            && let Some(node) = self.cache.node(candidate.slot)
        {
            let name = node.name().to_owned();
            let below = |other: &&Arc<PodState>| other.shape.priority < pod.shape.priority;
            displaced = node.nominated.iter().filter(below).cloned().collect();
            self.cache.nominate(&pod, Some(&name));
            victims = candidate.victims;
            nominated = Some(name);
        } else if nominated.is_some() {
            self.cache.nominate(&pod, None);
        }
        self.queue.unschedulable(&pod.uid, failure.rejectors, now);
        for other in &displaced {
            self.cache.nominate(other, None);
            self.queue.wake(&other.uid, now);
        }
        Action::Report(Report { pod, message, nominated, victims, displaced })
    }

    /// Lets a hopeless pod be tried again: making room for it failed.
    pub(crate) fn retry(&mut self, uid: &Arc<str>, now: Instant) {
        self.queue.wake(uid, now);
    }

    /// When a pod may be tried again by itself.
    pub fn next_due(&self) -> Option<Instant> {
        self.queue.next_due()
    }
}
