//! What a StatefulSet does next: from the pods that there are to steps. Values to values.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::{ControllerRevision, StatefulSet, StatefulSetSpec, StatefulSetStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use super::identity::{self, ordinal};
use crate::common::intstr::scaled;
use crate::common::pods;
use crate::common::revisions::History;

/// One thing to do.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// Make the pod at this place.
    Create(i32),
    /// Make the claims that a pending pod lacks.
    Claims(Arc<Pod>),
    /// Put the labels of its name on a pod.
    Identity(Arc<Pod>),
    /// Remove a pod that has ended, so that it can be made anew.
    Replace(Arc<Pod>),
    /// Remove a pod.
    Delete(Arc<Pod>),
}

/// The places that a set has pods at.
pub(super) fn range(spec: &StatefulSetSpec) -> Range<i32> {
    let start = spec.ordinals.as_ref().and_then(|ordinals| ordinals.start).unwrap_or_default();
    start..start.saturating_add(spec.replicas.unwrap_or(1))
}

/// What one reconciliation sees.
pub(super) struct View<'a> {
    spec: &'a StatefulSetSpec,
    now: Timestamp,
    /// Pods below the partition have this one, all others the newest.
    current: Arc<ControllerRevision>,
    update: Arc<ControllerRevision>,
    current_replicas: i32,
    replicas: BTreeMap<i32, Arc<Pod>>,
    /// Beyond the range, highest first.
    condemned: Vec<Arc<Pod>>,
}

impl<'a> View<'a> {
    pub(super) fn new(
        set: &StatefulSet,
        spec: &'a StatefulSetSpec,
        history: &History,
        pods: Vec<Arc<Pod>>,
        now: Timestamp,
    ) -> Self {
        let name = set.status.as_ref().and_then(|status| status.current_revision.clone());
        let known = history.old.iter().chain([&history.current]);
        let mut named = known.filter(|revision| Some(revision.name_any()) == name);
        let current = named.next().unwrap_or(&history.current).clone();
        let range = range(spec);
        let (mut replicas, mut condemned) = (BTreeMap::new(), Vec::new());
        for pod in pods {
            match ordinal(&pod) {
                Some(ordinal) if range.contains(&ordinal) => {
                    replicas.insert(ordinal, pod);
                }
                Some(_) => condemned.push(pod),
                None => {}
            }
        }
        condemned.sort_by_key(|pod| Reverse(ordinal(pod)));
        let current_replicas = set.status.as_ref().and_then(|status| status.current_replicas).unwrap_or_default();
        Self { spec, now, current, update: history.current.clone(), current_replicas, replicas, condemned }
    }

    /// All pods of the set.
    pub(super) fn pods(&self) -> impl Iterator<Item = &Arc<Pod>> {
        self.replicas.values().chain(&self.condemned)
    }

    /// The revision that a pod at this place is made from.
    pub(super) fn revision_for(&self, ordinal: i32) -> &Arc<ControllerRevision> {
        let start = range(self.spec).start;
        let strategy = self.spec.update_strategy.as_ref();
        if strategy.and_then(|strategy| strategy.type_.as_deref()) == Some("OnDelete") {
            return &self.update;
        }
        let rolling = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
        let kept = match rolling {
            Some(rolling) => rolling.partition.unwrap_or_default(),
            None => self.current_replicas,
        };
        if ordinal < start.saturating_add(kept) { &self.current } else { &self.update }
    }

    fn available(&self, pod: &Pod) -> bool {
        !terminating(pod)
            && pods::phase(pod) == "Running"
            && pods::is_available(pod, self.spec.min_ready_seconds.unwrap_or_default(), self.now)
    }

    /// What to do next. In order: one thing at a time, each after those before it are available. In parallel: all at once.
    pub(super) fn plan(&self) -> Vec<Step> {
        let ordered = self.spec.pod_management_policy.as_deref() != Some("Parallel");
        let mut steps = Vec::new();
        for place in range(self.spec) {
            let Some(pod) = self.replicas.get(&place) else {
                steps.push(Step::Create(place));
                if ordered {
                    return steps;
                }
                continue;
            };
            if matches!(pods::phase(pod), "Failed" | "Succeeded") {
                if !terminating(pod) {
                    steps.push(Step::Replace(pod.clone()));
                }
                if ordered {
                    return steps;
                }
                continue;
            }
            if pods::phase(pod) == "Pending" && !terminating(pod) && self.has_claims() {
                steps.push(Step::Claims(pod.clone()));
            }
            if ordered && !self.available(pod) {
                return steps;
            }
            if !terminating(pod) && !identity::matches(pod) {
                steps.push(Step::Identity(pod.clone()));
            }
        }
        let before = steps.len();
        self.scale_down(ordered, &mut steps);
        // Scaling comes before updating.
        if steps.len() > before || (ordered && !self.condemned.is_empty()) {
            return steps;
        }
        self.update(&mut steps);
        steps
    }

    fn has_claims(&self) -> bool {
        self.spec.volume_claim_templates.as_ref().is_some_and(|templates| !templates.is_empty())
    }

    fn scale_down(&self, ordered: bool, steps: &mut Vec<Step>) {
        // The lowest pod that is not available may go even in order, else a broken one would block for ever.
        let first_unhealthy = self
            .replicas
            .values()
            .chain(self.condemned.iter().rev())
            .find(|pod| !self.available(pod))
            .and_then(|pod| pod.uid());
        for pod in &self.condemned {
            if terminating(pod) {
                if ordered {
                    return;
                }
                continue;
            }
            if ordered {
                if self.available(pod) || pod.uid() == first_unhealthy {
                    steps.push(Step::Delete(pod.clone()));
                }
                return;
            }
            steps.push(Step::Delete(pod.clone()));
        }
    }

    /// Removes pods of other revisions, highest first, as many as may be unavailable. One that is not available anyway
    /// costs nothing.
    fn update(&self, steps: &mut Vec<Step>) {
        let strategy = self.spec.update_strategy.as_ref();
        if strategy.and_then(|strategy| strategy.type_.as_deref()) == Some("OnDelete") {
            return;
        }
        let rolling = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
        let range = range(self.spec);
        let from = range.start.saturating_add(rolling.and_then(|rolling| rolling.partition).unwrap_or_default());
        let most = rolling
            .and_then(|rolling| rolling.max_unavailable.as_ref())
            .and_then(|most| scaled(most, self.spec.replicas.unwrap_or(1), true))
            .map_or(1, |most| most.max(1));
        let available = self.replicas.values().filter(|pod| self.available(pod)).count();
        let missing = range.len() - available;
        let mut budget = usize::try_from(most).unwrap_or_default().saturating_sub(missing);
        for (_, pod) in self.replicas.range(from..).rev() {
            if terminating(pod) || identity::revision(pod) == Some(&*self.update.name_any()) {
                continue;
            }
            if self.available(pod) {
                if budget == 0 {
                    return;
                }
                budget -= 1;
            }
            steps.push(Step::Delete(pod.clone()));
        }
    }

    /// The status that the pods amount to before the steps.
    pub(super) fn status(&self, set: &StatefulSet, history: &History) -> StatefulSetStatus {
        let created: Vec<_> = self.pods().filter(|pod| !pods::phase(pod).is_empty()).collect();
        let count = |keep: &dyn Fn(&Pod) -> bool| {
            i32::try_from(created.iter().filter(|pod| keep(pod)).count()).unwrap_or(i32::MAX)
        };
        let ready = |pod: &Pod| pods::phase(pod) == "Running" && pods::is_ready(pod);
        let min_ready = self.spec.min_ready_seconds.unwrap_or_default();
        let at = |revision: &ControllerRevision| {
            count(&|pod| !terminating(pod) && identity::revision(pod) == Some(&*revision.name_any()))
        };
        StatefulSetStatus {
            observed_generation: set.metadata.generation,
            replicas: count(&|_| true),
            ready_replicas: non_zero(count(&ready)),
            available_replicas: Some(count(&|pod| ready(pod) && pods::is_available(pod, min_ready, self.now))),
            current_replicas: non_zero(at(&self.current)),
            updated_replicas: non_zero(at(&self.update)),
            current_revision: Some(self.current.name_any()),
            update_revision: Some(self.update.name_any()),
            collision_count: history.collisions,
            conditions: set.status.as_ref().and_then(|status| status.conditions.clone()),
        }
    }

    /// Takes from the counts by revision what the steps remove.
    pub(super) fn account_for(&self, steps: &[Step], status: &mut StatefulSetStatus) {
        for step in steps {
            let (Step::Delete(pod) | Step::Replace(pod)) = step else { continue };
            for (revision, count) in
                [(&self.current, &mut status.current_replicas), (&self.update, &mut status.updated_replicas)]
            {
                if identity::revision(pod) == Some(&*revision.name_any()) {
                    *count = non_zero(count.unwrap_or_default() - 1);
                }
            }
        }
    }
}

/// Ends a rolling update whose pods are all of the newest revision and ready.
pub(super) fn complete(set: &StatefulSet, status: &mut StatefulSetStatus) {
    let spec = set.spec.as_ref();
    let strategy = spec.and_then(|spec| spec.update_strategy.as_ref()).and_then(|strategy| strategy.type_.as_deref());
    let wanted = spec.and_then(|spec| spec.replicas).unwrap_or(1);
    let all = [status.replicas, status.ready_replicas.unwrap_or_default(), status.updated_replicas.unwrap_or_default()];
    if strategy != Some("OnDelete") && all.iter().all(|count| *count == wanted) {
        status.current_replicas = status.updated_replicas;
        status.current_revision.clone_from(&status.update_revision);
    }
}

fn terminating(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// Go leaves zero counts out.
fn non_zero(count: i32) -> Option<i32> {
    (count > 0).then_some(count)
}
