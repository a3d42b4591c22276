//! Keeping volumes up to date: when an object changes, when a token ages, when a pod's labels change.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::manager::{LivePod, LiveVolume, Manager};
use super::objects::ObjectKey;

/// When a refresh failed, how soon it is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// Wake-up when nothing is scheduled.
const IDLE: Duration = Duration::from_secs(3600);

/// Runs until dropped.
pub(super) async fn run(manager: Arc<Manager>) {
    let changes = manager.objects.changes();
    loop {
        let due = next_due(&manager).unwrap_or_else(|| Instant::now() + IDLE);
        tokio::select! {
            keys = changes.next() => refresh_users(&manager, &keys),
            () = manager.schedule.notified() => {}
            () = tokio::time::sleep_until(due) => refresh_due(&manager),
        }
    }
}

fn pods(manager: &Manager) -> Vec<Arc<LivePod>> {
    manager.pods.lock().values().cloned().collect()
}

fn next_due(manager: &Manager) -> Option<Instant> {
    pods(manager)
        .iter()
        .filter_map(|pod| pod.volumes.lock().values().filter_map(|volume| volume.refresh_at).min())
        .min()
}

fn refresh_users(manager: &Arc<Manager>, keys: &[ObjectKey]) {
    refresh_all(manager, |volume| volume.uses.iter().any(|used| keys.contains(used.key())));
}

fn refresh_due(manager: &Arc<Manager>) {
    let now = Instant::now();
    refresh_all(manager, |volume| volume.refresh_at.take_if(|at| *at <= now).is_some());
}

/// Refreshes volumes, each pod by itself: a driver that takes its time holds up no other pod.
fn refresh_all(manager: &Arc<Manager>, mut which: impl FnMut(&mut LiveVolume) -> bool) {
    for live in pods(manager) {
        let mut volumes = live.volumes.lock();
        let names: Vec<String> =
            volumes.iter_mut().filter_map(|(name, volume)| which(volume).then(|| name.clone())).collect();
        drop(volumes);
        if names.is_empty() {
            continue;
        }
        let manager = manager.clone();
        tokio::spawn(async move {
            for name in names {
                refresh(&manager, &live, &name).await;
            }
        });
    }
}

async fn refresh(manager: &Arc<Manager>, live: &LivePod, name: &str) {
    let _turn = live.turn.lock().await;
    let pod = live.pod.lock().clone();
    // Torn down meanwhile.
    if !live.volumes.lock().contains_key(name) {
        return;
    }
    let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.as_deref()).unwrap_or_default();
    let Some(volume) = volumes.iter().find(|volume| volume.name == name) else { return };
    if let Err(error) = manager.refresh(live, &pod, volume, None).await {
        // The old content stays, as a running container needs it.
        tracing::warn!(pod = pod.metadata.name, volume = name, %error, "cannot bring volume up to date");
        if let Some(volume) = live.volumes.lock().get_mut(name) {
            volume.refresh_at = Some(Instant::now() + RETRY_AFTER);
        }
        manager.schedule.notify_one();
    }
}
