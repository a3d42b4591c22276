//! The audit webhook: events in batches, to whom a kubeconfig names.
//!
//! Source: `k8s.io/apiserver/plugin/pkg/audit/{buffered,webhook}`.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

/// Most events that wait; what comes then is left out.
const WAITING_EVENTS: usize = 10_000;
/// Most bytes that wait.
const WAITING_BYTES: usize = 64 << 20;
/// Most events of one request.
const BATCH_EVENTS: usize = 400;
/// Time for an answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Times that a batch is sent until it is given up.
const TRIES: u32 = 5;
/// Each pause before a batch is sent again by the one before.
const BACKOFF_FACTOR: f64 = 1.5;

/// The way to the webhook.
pub(super) struct Webhook {
    queue: mpsc::Sender<String>,
    waiting: Arc<AtomicUsize>,
}

impl Webhook {
    /// Reads the kubeconfig; events are sent from now on, a batch at the latest `max_wait` after its first event, and again
    /// after `backoff` if it is refused.
    pub(super) async fn open(
        file: &Path,
        (max_wait, backoff): (Duration, Duration),
        shutdown: CancellationToken,
    ) -> Result<Self, String> {
        let kubeconfig = Kubeconfig::read_from(file).map_err(|error| error.to_string())?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
        let mut config = config.map_err(|error| error.to_string())?;
        // The client would end the path of the URL with a slash.
        let path = config.cluster_url.path_and_query().map_or("/", http::uri::PathAndQuery::as_str).to_owned();
        let mut parts = config.cluster_url.into_parts();
        parts.path_and_query = Some(http::uri::PathAndQuery::from_static("/"));
        config.cluster_url = http::Uri::from_parts(parts).map_err(|error| error.to_string())?;
        config.default_retry = false;
        let client = Client::try_from(config).map_err(|error| error.to_string())?;
        let (queue, events) = mpsc::channel(WAITING_EVENTS);
        let waiting = Arc::new(AtomicUsize::new(0));
        let sender = Sender { client, path, max_wait, backoff, shutdown, waiting: waiting.clone() };
        tokio::spawn(sender.run(events));
        Ok(Self { queue, waiting })
    }

    pub(super) fn write(&self, event: String) -> Result<(), &'static str> {
        let size = event.len();
        if self.waiting.fetch_add(size, Ordering::Relaxed) + size <= WAITING_BYTES && self.queue.try_send(event).is_ok()
        {
            return Ok(());
        }
        self.waiting.fetch_sub(size, Ordering::Relaxed);
        Err("too many events wait for the audit webhook")
    }
}

struct Sender {
    client: Client,
    path: String,
    max_wait: Duration,
    backoff: Duration,
    shutdown: CancellationToken,
    waiting: Arc<AtomicUsize>,
}

impl Sender {
    async fn run(self, mut events: mpsc::Receiver<String>) {
        while let Some(first) = events.recv().await {
            let mut batch = vec![first];
            let until = Instant::now() + self.max_wait;
            while batch.len() < BATCH_EVENTS {
                tokio::select! {
                    more = timeout_at(until, events.recv()) => match more {
                        Ok(Some(event)) => batch.push(event),
                        Ok(None) | Err(_) => break,
                    },
                    // The server ends soon: what is there leaves now.
                    () = self.shutdown.cancelled() => match events.try_recv() {
                        Ok(event) => batch.push(event),
                        Err(_) => break,
                    },
                }
            }
            self.deliver(&batch).await;
            self.waiting.fetch_sub(batch.iter().map(String::len).sum(), Ordering::Relaxed);
        }
    }

    async fn deliver(&self, batch: &[String]) {
        let items = batch.join(",");
        let body =
            format!(r#"{{"kind":"EventList","apiVersion":"audit.k8s.io/v1","metadata":{{}},"items":[{items}]}}"#);
        let mut pause = self.backoff;
        for left in (0..TRIES).rev() {
            let sent = timeout(PATIENCE, self.send(body.clone())).await;
            let Err(error) = sent.unwrap_or_else(|_| Err("no answer in time".to_owned())) else { return };
            if left == 0 || self.shutdown.is_cancelled() {
                tracing::error!(error, events = batch.len(), "the audit webhook takes no events, these are lost");
                return;
            }
            tracing::warn!(error, "the audit webhook takes no events, trying again");
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.shutdown.cancelled() => {}
            }
            pause = pause.mul_f64(BACKOFF_FACTOR);
        }
    }

    async fn send(&self, body: String) -> Result<(), String> {
        let request = http::Request::post(&self.path).header(http::header::CONTENT_TYPE, "application/json");
        let request = request.body(Body::from(body.into_bytes())).map_err(|error| error.to_string())?;
        let response = self.client.send(request).await.map_err(|error| error.to_string())?;
        let code = response.status();
        if code.is_success() { Ok(()) } else { Err(format!("it answers {code}")) }
    }
}
