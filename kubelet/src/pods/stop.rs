//! The end of containers and pods: hooks, signals, grace periods, and the order in which all is taken down.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod};
use kube::Api;
use kube::api::{DeleteParams, Preconditions};
use kube::runtime::events::EventType;
use tokio::time::{Instant, timeout_at};

use super::context::Context;
use super::hooks;
use super::mirror;
use super::resolved::{self, is_sidecar};
use super::status::Incarnation;
use super::worker::{Next, RETRY, Wanted, Worker};
use crate::cri::ContainerState;
use crate::names::PodKey;

/// Time that a container gets after its preStop hook used its grace period up (`minimumGracePeriodInSeconds`).
const LEAST_GRACE: Duration = Duration::from_secs(2);

/// Time that the pod has to end.
pub(super) fn grace(pod: &Pod) -> Duration {
    let spec = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
    let seconds = pod.metadata.deletion_grace_period_seconds.or(spec).unwrap_or(30);
    Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
}

/// A container that is to end.
pub(super) struct Stop<'a> {
    pub(super) pod: &'a Pod,
    pub(super) container: &'a Container,
    pub(super) current: &'a Incarnation,
    pub(super) ips: &'a [IpAddr],
    /// What the event says, if not the usual.
    pub(super) why: Option<String>,
    /// Whether the preStop hook is to run: not a second time when the end is hurried.
    pub(super) with_hook: bool,
}

impl Stop<'_> {
    /// preStop hook, stop signal, and at `deadline` the end.
    pub(super) async fn run(self, context: &Context, deadline: Instant) {
        let Stop { pod, container, current, .. } = self;
        let hook = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref());
        let note = self.why.unwrap_or_else(|| format!("Stopping container {}", container.name));
        context.event_of(pod, &container.name, EventType::Normal, "Killing", note);
        let mut left = deadline.saturating_duration_since(Instant::now());
        if let Some(hook) = hook.filter(|_| self.with_hook && !left.is_zero()) {
            let ips: Vec<IpAddr> = if self.ips.is_empty() { pod_ips(pod) } else { self.ips.to_vec() };
            match timeout_at(deadline, hooks::run(context, hook, container, &current.id, &ips)).await {
                Ok(Ok(())) => {}
                Ok(Err(message)) => {
                    let note = format!("PreStopHook failed: {message}");
                    context.event_of(pod, &container.name, EventType::Warning, "FailedPreStopHook", note);
                }
                Err(_) => tracing::debug!(container = %container.name, "the preStop hook took the whole grace period"),
            }
            left = deadline.saturating_duration_since(Instant::now()).max(LEAST_GRACE);
        }
        if let Err(error) = context.runtime.stop_container(&current.id, left).await {
            tracing::warn!(container = %container.name, %error, "a container is not stopped");
        }
    }
}

fn pod_ips(pod: &Pod) -> Vec<IpAddr> {
    let ips = pod.status.as_ref().and_then(|status| status.pod_ips.as_ref());
    ips.into_iter().flatten().filter_map(|ip| ip.ip.parse().ok()).collect()
}

impl Worker {
    /// Stops what runs: app containers at once, then sidecars in reverse order.
    async fn stop_containers(&mut self, pod: &Arc<Pod>, deadline: Instant, with_hook: bool) {
        let observed = self.observe(pod).await;
        let running = |container: &Container| {
            let current = observed.containers.get(&container.name)?.current.clone()?;
            (!matches!(current.state, ContainerState::Exited | ContainerState::Unknown)).then_some(current)
        };
        let spec = pod.spec.clone().unwrap_or_default();
        let mut first: Vec<Container> = spec.containers.clone();
        first.extend(spec.ephemeral_containers.iter().flatten().map(resolved::ephemeral));
        first.extend(spec.init_containers.iter().flatten().filter(|container| !is_sidecar(container)).cloned());
        let context = &self.context;
        let stop = async |container: &Container, current: Incarnation| {
            let stop = Stop { pod, container, current: &current, ips: &[], why: None, with_hook };
            stop.run(context, deadline).await;
        };
        let stops = first.iter().filter_map(|container| Some(stop(container, running(container)?)));
        futures::future::join_all(stops).await;
        for sidecar in spec.init_containers.iter().flatten().rev().filter(|container| is_sidecar(container)) {
            if let Some(current) = running(sidecar) {
                stop(sidecar, current).await;
            }
        }
    }

    /// Ends the containers of a pod that has failed as a whole.
    pub(super) async fn end(&mut self, pod: &Arc<Pod>, grace: Duration) {
        self.monitors.stop_all();
        self.stop_containers(pod, Instant::now() + grace, true).await;
    }

    /// A pod that has ended: sidecars stop, and its network, devices and volumes go.
    pub(super) async fn wind_up(&mut self, pod: &Arc<Pod>) -> Next {
        self.end(pod, grace(pod)).await;
        if let Some(sandbox) = self.sandbox().await.filter(|sandbox| sandbox.ready)
            && let Err(error) = self.context.runtime.stop_pod_sandbox(&sandbox.id).await
        {
            tracing::warn!(pod = %self.key, %error, "the sandbox of a finished pod is not stopped");
            return Next::At(Instant::now() + RETRY);
        }
        if let Err(error) = self.context.dra.unprepare(&self.key.uid).await {
            tracing::warn!(pod = %self.key, %error, "devices of a finished pod are not taken back");
            return Next::At(Instant::now() + RETRY);
        }
        self.context.devices.release(&self.key.uid);
        // Others may wait for them, on other nodes too.
        self.volumes = None;
        if let Err(error) = self.context.volumes.teardown(&self.key.uid).await {
            tracing::warn!(pod = %self.key, %error, "volumes of a finished pod are not let go");
            return Next::At(Instant::now() + RETRY);
        }
        self.context.table.was_final(pod, &self.key);
        Next::Wait
    }

    /// Returns when the newest status is written; false if the pod's object goes before.
    pub(super) async fn told_or_gone(&mut self) -> bool {
        let mut wanted = self.wanted.clone();
        tokio::select! {
            () = self.reporter.flushed() => true,
            _ = wanted.wait_for(|wanted| matches!(wanted, Wanted::Gone(_))) => false,
        }
    }

    /// Time that the pod has to end, and the node leaves it.
    fn grace(&self, pod: &Pod) -> Duration {
        let given = self.context.table.verdict(&self.key.uid).and_then(|verdict| verdict.grace);
        given.map_or_else(|| grace(pod), |given| given.min(grace(pod)))
    }

    /// Ends a pod: containers, sandbox, volumes, files, object.
    pub(super) async fn remove(&mut self, pod: &Arc<Pod>, gone: bool) -> Next {
        let pod = &self.latest(pod);
        self.monitors.stop_all();
        let with_hook = self.deadline.is_none();
        let limit = if gone { Duration::ZERO } else { self.grace(pod) };
        let deadline = self.deadline.map_or(Instant::now() + limit, |known| known.min(Instant::now() + limit));
        self.deadline = Some(deadline);
        let mut wanted = self.wanted.clone();
        wanted.borrow_and_update();
        let (wake, table, uid) = (self.wake.clone(), self.context.table.clone(), self.key.uid.clone());
        let hurried = {
            let stopping = self.stop_containers(pod, deadline, with_hook);
            tokio::pin!(stopping);
            loop {
                tokio::select! {
                    () = &mut stopping => break false,
                    changed = wanted.changed() => {
                        // A shorter grace period that comes meanwhile takes effect at once; other news change nothing.
                        let sooner = match &*wanted.borrow_and_update() {
                            Wanted::Gone(_) => true,
                            Wanted::Pod(pod) => Instant::now() + grace(pod) < deadline,
                        };
                        if changed.is_err() || sooner {
                            break true;
                        }
                    }
                    () = wake.notified() => {
                        let given = table.verdict(&uid).and_then(|verdict| verdict.grace);
                        if given.is_some_and(|given| Instant::now() + given < deadline) {
                            break true;
                        }
                    }
                }
            }
        };
        if hurried {
            return Next::At(Instant::now());
        }
        if !gone {
            self.report(pod).await;
            let (context, key) = (self.context.clone(), self.key.clone());
            // The network can go meanwhile; what the status is made of stays until it is written.
            let (written, stopped) = tokio::join!(self.told_or_gone(), stop_sandboxes(&context, &key));
            if !written {
                return Next::At(Instant::now());
            }
            if let Err(message) = stopped {
                tracing::warn!(pod = %self.key, message, "the pod's sandbox is not stopped yet");
            }
        }
        let taken_down = tear_down(&self.context, &self.key).await;
        if let Err(message) = taken_down {
            tracing::warn!(pod = %self.key, message, "the pod is not taken down yet");
            return Next::At(Instant::now() + RETRY);
        }
        if gone {
            return Next::Finished;
        }
        let api: Api<Pod> = Api::namespaced(self.context.client.clone(), &self.key.namespace);
        if mirror::source(pod).is_some() {
            return match mirror::remove(&api, &self.key.name).await {
                Ok(()) => Next::Finished,
                Err(error) => {
                    tracing::warn!(pod = %self.key, %error, "the mirror of a static pod is not removed yet");
                    Next::At(Instant::now() + RETRY)
                }
            };
        }
        let parameters = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions { uid: Some(self.key.uid.clone()), resource_version: None }),
            ..DeleteParams::default()
        };
        match api.delete(&self.key.name, &parameters).await {
            Ok(_) => Next::Finished,
            Err(kube::Error::Api(answer)) if answer.code == 404 || answer.code == 409 => Next::Finished,
            Err(error) => {
                tracing::warn!(pod = %self.key, %error, "the pod's object is not removed yet");
                Next::At(Instant::now() + RETRY)
            }
        }
    }
}

/// Ends what the containers of a pod shared.
async fn stop_sandboxes(context: &Context, key: &PodKey) -> Result<(), String> {
    for sandbox in context.runtime.sandboxes_of(&key.uid).await.map_err(|error| error.to_string())? {
        context.runtime.stop_pod_sandbox(&sandbox.id).await.map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Removes sandboxes, volumes and files of a pod whose containers have ended.
async fn tear_down(context: &Context, key: &PodKey) -> Result<(), String> {
    // Also one that was never ready may have a network.
    stop_sandboxes(context, key).await?;
    for sandbox in context.runtime.sandboxes_of(&key.uid).await.map_err(|error| error.to_string())? {
        context.runtime.remove_pod_sandbox(&sandbox.id).await.map_err(|error| error.to_string())?;
    }
    context.dra.unprepare(&key.uid).await.map_err(|error| error.to_string())?;
    context.devices.release(&key.uid);
    context.volumes.teardown(&key.uid).await.map_err(|error| error.to_string())?;
    context.remove_files(key).map_err(|error| error.to_string())
}
