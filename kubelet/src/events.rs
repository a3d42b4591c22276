//! Events: news for people, published in the order in which they happen, without holding anybody up.

use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;

/// Events that wait for the API; more are dropped, since they are news and not state.
const QUEUE: usize = 4096;
/// Events on their way at once.
const AT_ONCE: usize = 4;
/// How long news is held back, for the statuses that come with it to be written first.
const HELD_BACK: Duration = Duration::from_millis(50);

/// Publishes events of this node. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Events(mpsc::Sender<(Instant, ObjectReference, Event)>);

impl Events {
    /// A publisher in the name of the kubelet of `node`.
    pub fn new(client: Client, node: &str) -> Self {
        let reporter = Reporter { controller: "kubelet".into(), instance: Some(node.to_owned()) };
        let recorder = Recorder::new(client, reporter);
        let (sender, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            let queue: ReceiverStream<(Instant, ObjectReference, Event)> = ReceiverStream::new(receiver);
            let due = queue.then(|(at, about, event)| async move {
                tokio::time::sleep_until(at + HELD_BACK).await;
                (about, event)
            });
            let publishing = due.for_each_concurrent(AT_ONCE, |(about, event)| {
                let recorder = &recorder;
                async move {
                    if let Err(error) = recorder.publish(&event, &about).await {
                        tracing::debug!(reason = event.reason, %error, "event not written");
                    }
                }
            });
            publishing.await;
        });
        Self(sender)
    }

    /// Has an event published.
    pub fn publish(&self, about: ObjectReference, type_: EventType, reason: &str, action: &str, note: String) {
        /// Bytes of a note that the API takes.
        const NOTE_LIMIT: usize = 1024;
        let mut end = note.len().min(NOTE_LIMIT);
        while !note.is_char_boundary(end) {
            end -= 1;
        }
        let note = Some(note[..end].to_owned());
        let event = Event { type_, reason: reason.into(), note, action: action.into(), secondary: None };
        if self.0.try_send((Instant::now(), about, event)).is_err() {
            tracing::debug!(reason, "event dropped: too many wait for the API");
        }
    }
}
