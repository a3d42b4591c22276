//! The one who writes a pod's status: the newest counts, and whoever has news never waits for the API.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::context::Context;
use super::{mirror, status};
use crate::names::PodKey;

/// Pause before a status that could not be written is tried again.
const RETRY: Duration = Duration::from_secs(2);
/// How long the first word on a pod may wait for a better one: most pods run before, which saves them a write.
const FIRST_WORD: Duration = Duration::from_millis(200);

/// A status that waits to be written.
#[derive(Clone, Default)]
struct Wanted {
    number: u64,
    pod: Option<Arc<Pod>>,
    patience: Duration,
}

/// The writer of one pod's status.
pub(super) struct Reporter {
    wanted: watch::Sender<Wanted>,
    written: watch::Receiver<u64>,
    task: AbortHandle,
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Reporter {
    pub(super) fn new(context: Arc<Context>, key: PodKey) -> Self {
        let (wanted, receiver) = watch::channel(Wanted::default());
        let (sender, written) = watch::channel(0);
        let task = tokio::spawn(run(context, key, receiver, sender)).abort_handle();
        Self { wanted, written, task }
    }

    /// Has this status written, in the place of what was not written yet.
    pub(super) fn write(&self, pod: Arc<Pod>) {
        self.wanted.send_modify(|wanted| {
            let first = wanted.number == 0
                && pod.status.as_ref().is_some_and(|status| status.phase.as_deref() == Some("Pending"));
            *wanted = Wanted {
                number: wanted.number + 1,
                pod: Some(pod),
                patience: if first { FIRST_WORD } else { Duration::ZERO },
            };
        });
    }

    /// Returns when the newest status is written, or cannot be because the pod is gone.
    pub(super) async fn flushed(&mut self) {
        let number = self.wanted.borrow().number;
        // An error means that the writer has ended, and with it all hope.
        drop(self.written.wait_for(|written| *written >= number).await);
    }
}

async fn run(context: Arc<Context>, key: PodKey, mut wanted: watch::Receiver<Wanted>, written: watch::Sender<u64>) {
    let mut before: Option<PodStatus> = None;
    loop {
        let next = wanted.borrow_and_update().clone();
        let mut pause = None;
        if let Some(pod) = next.pod {
            if !next.patience.is_zero() && tokio::time::timeout(next.patience, wanted.changed()).await.is_ok() {
                continue;
            }
            match write(&context, &key, &pod, before.as_ref()).await {
                Ok(()) => {
                    before = pod.status.clone();
                    written.send_replace(next.number);
                }
                Err(error) => {
                    tracing::debug!(pod = %key, %error, "status not written");
                    pause = Some(RETRY);
                }
            }
        }
        let late = async {
            match pause {
                Some(pause) => tokio::time::sleep(pause).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            () = late => {}
        }
    }
}

async fn write(context: &Context, key: &PodKey, pod: &Pod, before: Option<&PodStatus>) -> Result<(), kube::Error> {
    let Some(wanted) = &pod.status else { return Ok(()) };
    let uid = match mirror::source(pod) {
        Some(_) => mirror::ensure(context, pod).await?,
        None => key.uid.clone(),
    };
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &key.namespace);
    let patch = json!({"metadata": {"uid": uid}, "status": patch(wanted, before)});
    let parameters = PatchParams { field_manager: Some("kubelet".into()), ..PatchParams::default() };
    match api.patch_status(&key.name, &parameters, &Patch::Strategic(patch)).await {
        // Gone, or another pod of this name: the watch will say so.
        Err(kube::Error::Api(answer)) if answer.code == 404 || answer.code == 409 => Ok(()),
        other => other.map(drop),
    }
}

/// What a strategic merge needs to bring `wanted` about: only conditions of ours, and those taken back by name.
fn patch(wanted: &PodStatus, before: Option<&PodStatus>) -> Value {
    let ours = |status: &PodStatus| -> Vec<_> {
        let all = status.conditions.clone().unwrap_or_default();
        all.into_iter().filter(|condition| status::is_own_condition(&condition.type_)).collect()
    };
    let conditions = ours(wanted);
    let held = before.map(ours).unwrap_or_default();
    let mut list: Vec<Value> = Vec::new();
    for condition in &conditions {
        let mut entry = json!(condition);
        let old = held.iter().find(|held| held.type_ == condition.type_);
        // What is merged stays unless it is taken away by name.
        for (field, before) in [("reason", old.map(|old| &old.reason)), ("message", old.map(|old| &old.message))] {
            if entry[field].is_null() && before.is_some_and(Option::is_some) {
                entry[field] = Value::Null;
            } else if entry[field].is_null()
                && let Some(entry) = entry.as_object_mut()
            {
                entry.remove(field);
            }
        }
        list.push(entry);
    }
    for type_ in status::PASSING_CONDITIONS {
        let held = |list: &[k8s_openapi::api::core::v1::PodCondition]| list.iter().any(|held| held.type_ == type_);
        if !held(&conditions) && before.is_none_or(|before| held(&ours(before))) {
            list.push(json!({"$patch": "delete", "type": type_}));
        }
    }
    let mut patch = json!(wanted);
    patch["conditions"] = list.into();
    // Lists that merge by address would keep the old one.
    for (name, old) in [
        ("podIPs", before.and_then(|before| before.pod_ips.as_ref()).map(|ips| json!(ips))),
        ("hostIPs", before.and_then(|before| before.host_ips.as_ref()).map(|ips| json!(ips))),
    ] {
        if let (Some(old), Some(list)) = (old, patch[name].as_array_mut())
            && json!(list) != old
        {
            list.insert(0, json!({"$patch": "replace"}));
        }
    }
    patch
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_ours_is_written_and_what_has_passed_is_taken_back() {
        let status = |value: Value| -> PodStatus { serde_json::from_value(value).expect("a status") };
        let condition = |type_: &str| json!({"type": type_, "status": "True"});
        let unready = json!({"type": "Ready", "status": "False", "message": "not yet"});
        let before =
            status(json!({"podIPs": [{"ip": "10.0.0.1"}], "conditions": [unready, condition("PodResizePending")]}));
        let wanted =
            status(json!({"podIPs": [{"ip": "10.0.0.2"}], "conditions": [condition("Ready"), condition("a/gate")]}));
        let patch = patch(&wanted, Some(&before));
        let ready = json!({"type": "Ready", "status": "True", "message": null});
        assert_eq!(patch["conditions"], json!([ready, {"$patch": "delete", "type": "PodResizePending"}]));
        assert_eq!(patch["podIPs"], json!([{"$patch": "replace"}, {"ip": "10.0.0.2"}]));
    }
}
