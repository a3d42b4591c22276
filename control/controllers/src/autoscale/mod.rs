//! HorizontalPodAutoscaler: as many replicas as its metrics ask for. Source: autoscaling/v2, "Horizontal Pod Autoscaling".

mod metrics;
mod pace;
mod replicas;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use coracle_api::informer::Informer;
use coracle_api::selector::LabelSelector;
use coracle_api::server::ApiServer;
use k8s_openapi::api::autoscaling::v2::{
    ContainerResourceMetricStatus, ExternalMetricStatus, HPAScalingRules, HorizontalPodAutoscaler,
    HorizontalPodAutoscalerCondition, HorizontalPodAutoscalerStatus, MetricSpec, MetricStatus, MetricTarget,
    MetricValueStatus, ObjectMetricStatus, PodsMetricStatus, ResourceMetricStatus,
};
use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};
use parking_lot::Mutex;

use self::metrics::{Metrics, milli};
use self::pace::{History, pace};
use self::replicas::{Proposal, Target, Tolerance};
use crate::common::labelled::Labelled;
use crate::common::pods;
use crate::common::scale::{self, Scaled};
use crate::machine::{Controller, Error, Host, Key, Outcome, Sources};

/// How often metrics are looked at.
const SYNC: Duration = Duration::from_secs(15);
/// By how much use may differ from its target without a change, where the autoscaler does not say.
const TOLERANCE: f64 = 0.1;

pub(crate) struct Autoscalers {
    api: Arc<ApiServer>,
    host: Host,
    autoscalers: Arc<Informer<HorizontalPodAutoscaler>>,
    labelled: Arc<Labelled>,
    /// One entry for each autoscaler.
    memory: Mutex<HashMap<Key, Memory>>,
}

#[derive(Default)]
struct Memory {
    history: History,
    /// The pods that it scales, which no other autoscaler should.
    selector: String,
}

/// Why a number cannot be said: reason and message.
type Blind = (String, String);

/// The status that is being written, and the events to tell.
struct View {
    status: HorizontalPodAutoscalerStatus,
    events: Vec<(EventType, String, String)>,
}

impl View {
    fn condition(&mut self, type_: &str, holds: bool, (reason, message): (&str, &str)) {
        let status = if holds { "True" } else { "False" };
        let conditions = self.status.conditions.get_or_insert_default();
        let index = conditions.iter().position(|condition| condition.type_ == type_).unwrap_or_else(|| {
            conditions.push(HorizontalPodAutoscalerCondition { type_: type_.into(), ..Default::default() });
            conditions.len() - 1
        });
        let condition = &mut conditions[index];
        if condition.status != status {
            condition.last_transition_time = Some(pods::now());
        }
        condition.status = status.into();
        condition.reason = Some(reason.into());
        condition.message = Some(message.into());
    }

    fn warn(&mut self, reason: &str, message: String) {
        self.events.push((EventType::Warning, reason.into(), message));
    }
}

fn quantity(milli: i64) -> Quantity {
    let thousandths = format!("{milli}m");
    let canonical = coracle_api::kinds::quantity::Quantity::parse(&thousandths);
    Quantity(canonical.map_or(thousandths, |quantity| quantity.to_string()))
}

fn value(target: Option<&Quantity>) -> Option<i64> {
    milli(&target?.0).filter(|milli| *milli > 0)
}

/// What a pod, or one container of it, requests of a resource, in thousandths.
fn requested(pod: &Pod, container: Option<&str>, resource: &str) -> Result<i64, String> {
    let Some(spec) = &pod.spec else { return Ok(0) };
    let whole = spec.resources.as_ref().and_then(|resources| resources.requests.as_ref()?.get(resource));
    if let (None, Some(whole)) = (container, whole) {
        return milli(&whole.0).ok_or_else(|| format!("unreadable request {}", whole.0));
    }
    let sidecar = |container: &&Container| container.restart_policy.as_deref() == Some("Always");
    let counted = spec.containers.iter().chain(spec.init_containers.iter().flatten().filter(sidecar));
    counted.filter(|one| container.is_none_or(|name| one.name == name)).try_fold(0, |sum, one| {
        let request = one.resources.as_ref().and_then(|resources| resources.requests.as_ref()?.get(resource));
        let amount = request.and_then(|request| milli(&request.0));
        amount.map(|amount| sum + amount).ok_or_else(|| {
            format!("missing request for {resource} in container {} of Pod {}", one.name, pod.name_any())
        })
    })
}

fn tolerance(autoscaler: &HorizontalPodAutoscaler) -> Tolerance {
    let behavior = autoscaler.spec.behavior.as_ref();
    let of = |rules: Option<&HPAScalingRules>| {
        let set = rules.and_then(|rules| milli(&rules.tolerance.as_ref()?.0));
        set.map_or(TOLERANCE, |milli| milli as f64 / 1000.0)
    };
    Tolerance {
        down: of(behavior.and_then(|behavior| behavior.scale_down.as_ref())),
        up: of(behavior.and_then(|behavior| behavior.scale_up.as_ref())),
    }
}

impl Autoscalers {
    pub(crate) fn new(api: &Arc<ApiServer>, labelled: &Arc<Labelled>) -> Self {
        let mut host = Host::new(api, Self::NAME);
        let autoscalers = host.informer();
        // The machine waits for the cache that the labels are read from.
        host.informer::<Pod>();
        Self { api: api.clone(), autoscalers, labelled: labelled.clone(), memory: Mutex::default(), host }
    }

    /// The pods of a target, unless they cannot be told from those of another.
    fn selected(&self, key: &Key, selector: &str) -> Result<Vec<Arc<Pod>>, (&'static str, String)> {
        if selector.is_empty() {
            return Err(("InvalidSelector", "the HPA target's scale is missing a selector".into()));
        }
        let parse = |text: &str| LabelSelector::parse(text);
        let parsed = parse(selector).map_err(|error| {
            (
                "InvalidSelector",
                format!("couldn't convert selector into a corresponding internal selector object: {error}"),
            )
        })?;
        let matches = |selector: &LabelSelector, labels: &BTreeMap<String, String>| {
            selector.matches(|label| labels.get(label).map(String::as_str))
        };
        let found: Vec<_> = self.labelled.select(&key.namespace, |labels| matches(&parsed, labels)).collect();
        let mut memory = self.memory.lock();
        memory.entry(key.clone()).or_default().selector = selector.into();
        let others = memory.iter().filter(|(other, _)| other.namespace == key.namespace && *other != key);
        let mut rivals: Vec<String> = others
            .filter(|(_, of)| {
                parse(&of.selector).is_ok_and(|other| found.iter().any(|pod| matches(&other, pod.labels())))
            })
            .filter(|(_, of)| !of.selector.is_empty())
            .map(|(other, _)| other.to_string())
            .collect();
        if !rivals.is_empty() {
            rivals.push(key.to_string());
            rivals.sort();
            let message =
                format!("pods by selector {selector} are controlled by multiple HPAs: [{}]", rivals.join(" "));
            return Err(("AmbiguousSelector", message));
        }
        Ok(found)
    }

    /// What one metric asks for: the number, the metric's name, and its status.
    async fn metric(
        &self,
        spec: &MetricSpec,
        pods: &[Arc<Pod>],
        selector: &str,
        scaled: &Scaled,
        metrics: &Metrics<'_>,
        tolerance: Tolerance,
    ) -> Result<(i32, String, MetricStatus), Blind> {
        let (current, running, now) = (scaled.wanted(), scaled.running(), Timestamp::now());
        let ready = || pods.iter().filter(|pod| pods::phase(pod) == "Running" && pods::is_ready(pod)).count();
        let mut status = MetricStatus { type_: spec.type_.clone(), ..MetricStatus::default() };
        // Use of a resource by pods or by one container of each.
        let resource = async |resource: &str, container: Option<&str>, target: &MetricTarget| {
            let against = match (value(target.average_value.as_ref()), target.average_utilization) {
                (Some(average), _) => Target::Average(average),
                (None, Some(percent)) => {
                    let requests = pods.iter().map(|pod| Ok((pod.name_any(), requested(pod, container, resource)?)));
                    Target::Utilization { percent, requests: requests.collect::<Result<_, String>>()? }
                }
                (None, None) => {
                    return Err(
                        "invalid resource metric source: neither an average utilization target nor an average value \
                                target was set"
                            .to_owned(),
                    );
                }
            };
            let samples = metrics.resource(resource, container, selector).await;
            let samples = samples.map_err(|error| format!("unable to get metrics for resource {resource}: {error}"))?;
            let found = replicas::of_pods(current, pods, &samples, &against, resource == "cpu", tolerance, now)?;
            Ok((found, found.percent.map_or("", |_| " utilization (percentage of request)")))
        };
        let shown = |found: &Proposal, whole: bool| MetricValueStatus {
            average_utilization: found.percent,
            average_value: (!whole).then(|| quantity(found.milli)),
            value: whole.then(|| quantity(found.milli)),
        };
        // One value, held against a value for all or a share for each pod.
        let single = |milli: i64, target: &MetricTarget| match (
            value(target.value.as_ref()),
            value(target.average_value.as_ref()),
        ) {
            (Some(whole), _) if target.type_ == "Value" => {
                Ok((replicas::of_value(current, ready(), milli, whole, tolerance), true))
            }
            (_, Some(share)) => Ok((replicas::of_share(running, milli, share, tolerance), false)),
            _ => Err("neither a value target nor an average value target was set".to_owned()),
        };
        let missing = || format!("the metric source of type {} is not set", spec.type_);
        let found = match spec.type_.as_str() {
            "Resource" => {
                async {
                    let source = spec.resource.as_ref().ok_or_else(missing)?;
                    let fail = |error| format!("failed to get {} utilization: {error}", source.name);
                    let (found, kind) = resource(&source.name, None, &source.target).await.map_err(fail)?;
                    status.resource =
                        Some(ResourceMetricStatus { name: source.name.clone(), current: shown(&found, false) });
                    Ok((found.replicas, format!("{} resource{kind}", source.name)))
                }
                .await
            }
            "ContainerResource" => {
                async {
                    let source = spec.container_resource.as_ref().ok_or_else(missing)?;
                    let fail = |error| format!("failed to get {} utilization: {error}", source.name);
                    let (found, kind) =
                        resource(&source.name, Some(&source.container), &source.target).await.map_err(fail)?;
                    status.container_resource = Some(ContainerResourceMetricStatus {
                        name: source.name.clone(),
                        container: source.container.clone(),
                        current: shown(&found, false),
                    });
                    Ok((found.replicas, format!("{} container resource{kind}", source.name)))
                }
                .await
            }
            "Pods" => {
                async {
                    let source = spec.pods.as_ref().ok_or_else(missing)?;
                    let name = &source.metric.name;
                    let fail = |error| format!("failed to get pods metric value: unable to get metric {name}: {error}");
                    let target = value(source.target.average_value.as_ref()).ok_or_else(missing)?;
                    let samples = metrics.pods(&source.metric, selector).await.map_err(fail)?;
                    let target = Target::Average(target);
                    let found =
                        replicas::of_pods(current, pods, &samples, &target, false, tolerance, now).map_err(fail)?;
                    status.pods =
                        Some(PodsMetricStatus { metric: source.metric.clone(), current: shown(&found, false) });
                    Ok((found.replicas, format!("pods metric {name}")))
                }
                .await
            }
            "Object" => {
                async {
                    let source = spec.object.as_ref().ok_or_else(missing)?;
                    let (name, of) = (&source.metric.name, &source.described_object);
                    let fail = |error| {
                        format!(
                            "failed to get object metric value: unable to get metric {name}: {error} on {} {}/{}",
                            of.kind, metrics.namespace, of.name
                        )
                    };
                    let version = of.api_version.as_deref().unwrap_or_default();
                    let row = scale::row(&self.api, version, &of.kind).map_err(fail)?;
                    let dot = if row.group.is_empty() { "" } else { "." };
                    let resource = format!("{}{dot}{}", row.resource, row.group);
                    let milli = metrics.object(&resource, &of.name, &source.metric).await.map_err(fail)?;
                    let (found, whole) = single(milli, &source.target).map_err(fail)?;
                    status.object = Some(ObjectMetricStatus {
                        metric: source.metric.clone(),
                        current: shown(&found, whole),
                        described_object: of.clone(),
                    });
                    Ok((found.replicas, format!("{} metric {name}", of.kind)))
                }
                .await
            }
            "External" => async {
                let source = spec.external.as_ref().ok_or_else(missing)?;
                let name = &source.metric.name;
                let fail = |error| {
                    format!(
                        "failed to get {name} external metric value: unable to get external metric {}/{name}: {error}",
                        metrics.namespace
                    )
                };
                let milli = metrics.external(&source.metric).await.map_err(fail)?;
                let (found, whole) = single(milli, &source.target).map_err(fail)?;
                status.external =
                    Some(ExternalMetricStatus { metric: source.metric.clone(), current: shown(&found, whole) });
                Ok((found.replicas, format!("external metric {name}")))
            }
            .await,
            other => return Err(("InvalidMetricSourceType".into(), format!("unknown metric source type \"{other}\""))),
        };
        match found {
            Ok((replicas, name)) => Ok((replicas, name, status)),
            Err(message) => Err((format!("FailedGet{}Metric", spec.type_), message)),
        }
    }

    /// The largest number that any metric asks for, and which; `None` when too little is known. A metric that fails may
    /// hide a need, so without it the number only rises.
    async fn wanted(
        &self,
        key: &Key,
        autoscaler: &HorizontalPodAutoscaler,
        scaled: &Scaled,
        view: &mut View,
    ) -> Option<(i32, String)> {
        let selector = scaled.scale.status.as_ref().and_then(|status| status.selector.clone()).unwrap_or_default();
        let fail = |view: &mut View, message: &str| view.warn("FailedComputeMetricsReplicas", message.to_owned());
        let pods = match self.selected(key, &selector) {
            Ok(pods) => pods,
            Err((reason, message)) => {
                view.warn(if selector.is_empty() { "SelectorRequired" } else { reason }, message.clone());
                view.condition("ScalingActive", false, (reason, &message));
                fail(view, &message);
                return None;
            }
        };
        let specs = autoscaler.spec.metrics.as_deref().unwrap_or_default();
        let metrics = Metrics { client: &self.host.client, namespace: &key.namespace };
        let tolerance = tolerance(autoscaler);
        let (mut best, mut blind, mut failed) = (None::<(i32, String)>, None, 0);
        let mut statuses = Vec::new();
        for spec in specs {
            match self.metric(spec, &pods, &selector, scaled, &metrics, tolerance).await {
                Ok((replicas, name, status)) => {
                    statuses.push(status);
                    if best.as_ref().is_none_or(|(most, _)| replicas > *most) {
                        best = Some((replicas, name));
                    }
                }
                Err((reason, message)) => {
                    failed += 1;
                    view.warn(&reason, message.clone());
                    blind.get_or_insert((reason, message));
                }
            }
        }
        view.status.current_metrics = (!statuses.is_empty()).then_some(statuses);
        if let Some((reason, message)) = blind {
            let first = format!("invalid metrics ({failed} invalid out of {}), first error is: {message}", specs.len());
            fail(view, &first);
            if best.as_ref().is_none_or(|(replicas, _)| *replicas < scaled.wanted()) {
                let message = format!("the HPA was unable to compute the replica count: {message}");
                view.condition("ScalingActive", false, (&reason, &message));
                return None;
            }
        }
        let (_, name) = best.as_ref()?;
        let message = format!("the HPA was able to successfully calculate a replica count from {name}");
        view.condition("ScalingActive", true, ("ValidMetricFound", &message));
        best
    }

    /// Decides on the number and sets it.
    async fn scale(&self, key: &Key, autoscaler: &HorizontalPodAutoscaler, view: &mut View) {
        let spec = &autoscaler.spec;
        let target = &spec.scale_target_ref;
        let named = (target.api_version.as_deref().unwrap_or_default(), target.kind.as_str(), target.name.as_str());
        let mut scaled = match scale::get(&self.api, &self.host, &key.namespace, named).await {
            Ok(scaled) => scaled,
            Err(error) => {
                view.warn("FailedGetScale", error.clone());
                let message = format!("the HPA controller was unable to get the target's current scale: {error}");
                return view.condition("AbleToScale", false, ("FailedGetScale", &message));
            }
        };
        let message = "the HPA controller was able to get the target's current scale";
        view.condition("AbleToScale", true, ("SucceededGetScale", message));
        let (current, now) = (scaled.wanted(), Timestamp::now());
        view.status.current_replicas = Some(current);
        self.memory.lock().entry(key.clone()).or_default().history.start(current, now);
        let (least, most) = (spec.min_replicas.unwrap_or(1), spec.max_replicas);
        let (wanted, why) = if current == 0 && least != 0 {
            let message = "scaling is disabled since the replica count of the target is zero";
            view.condition("ScalingActive", false, ("ScalingDisabled", message));
            (0, String::new())
        } else if current > most {
            (most, "Current number of replicas above Spec.MaxReplicas".into())
        } else if current < least {
            (least, "Current number of replicas below Spec.MinReplicas".into())
        } else {
            let Some((wanted, metric)) = self.wanted(key, autoscaler, &scaled, view).await else { return };
            let pace = {
                let mut memory = self.memory.lock();
                let history = &mut memory.entry(key.clone()).or_default().history;
                pace(history, spec.behavior.as_ref(), current, wanted, (least, most), now)
            };
            view.condition("AbleToScale", true, pace.able);
            view.condition("ScalingLimited", pace.limited.0, pace.limited.1);
            (
                pace.replicas,
                if wanted > current { format!("{metric} above target") } else { "All metrics below target".into() },
            )
        };
        view.status.desired_replicas = wanted;
        if wanted == current {
            return;
        }
        scaled.scale.spec.get_or_insert_default().replicas = Some(wanted);
        let set = scaled.objects.replace_scale(&target.name, &PostParams::default(), &scaled.scale).await;
        if let Err(error) = set {
            let error = Error::at("set the scale")(error).message();
            view.warn("FailedRescale", format!("New size: {wanted}; reason: {why}; error: {error}"));
            let message = format!("the HPA controller was unable to update the target scale: {error}");
            view.status.desired_replicas = autoscaler.status.as_ref().map_or(current, |status| status.desired_replicas);
            return view.condition("AbleToScale", false, ("FailedUpdateScale", &message));
        }
        let message = format!("the HPA controller was able to update the target scale to {wanted}");
        view.condition("AbleToScale", true, ("SucceededRescale", &message));
        view.events.push((EventType::Normal, "SuccessfulRescale".into(), format!("New size: {wanted}; reason: {why}")));
        view.status.last_scale_time = Some(pods::now());
        self.memory.lock().entry(key.clone()).or_default().history.changed(current, wanted, now);
    }
}

impl Controller for Autoscalers {
    const NAME: &'static str = "horizontal-pod-autoscaler";

    fn host(&self) -> &Host {
        &self.host
    }

    fn sources(self: &Arc<Self>, sources: &mut Sources<Self>) {
        sources.watch(&self.autoscalers, |_, delta, queue| {
            let spec = |of: &Option<Arc<HorizontalPodAutoscaler>>| of.as_ref().map(|of| of.spec.clone());
            // Its status changes with every look; that asks for none.
            if let (true, Some(of)) = (spec(&delta.old) != spec(&delta.new), delta.new.as_ref().or(delta.old.as_ref()))
            {
                queue.add(Key::of(&**of));
            }
        });
    }

    async fn reconcile(&self, key: &Key) -> Result<Outcome, Error> {
        let Some(autoscaler) = self.autoscalers.get(&key.namespace, &key.name) else {
            self.memory.lock().remove(key);
            return Ok(Outcome::Done);
        };
        let mut view = View { status: autoscaler.status.clone().unwrap_or_default(), events: Vec::new() };
        self.scale(key, &autoscaler, &mut view).await;
        for (type_, reason, message) in view.events {
            self.host.event(&*autoscaler, type_, &reason, &reason, message).await;
        }
        if autoscaler.status.as_ref() != Some(&view.status) {
            let changed = HorizontalPodAutoscaler { status: Some(view.status), ..(*autoscaler).clone() };
            self.host.replace_status(&Api::namespaced(self.host.client.clone(), &key.namespace), &changed).await?;
        }
        Ok(Outcome::After(SYNC))
    }
}
