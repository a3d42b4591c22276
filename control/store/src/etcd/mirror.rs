//! Follows all changes in etcd into the local log, across broken connections, without a gap.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tonic::Streaming;

use super::proto::{Change, Client, DELETE, RangeRequest, WatchCreateRequest, WatchResponse};
use super::{entry, etcd_key, from_etcd, scope_end, to_etcd};
use crate::hub::{Bounds, Ledger};
use crate::{Error, Event, OpenError};

/// How many revisions before now a new server reads, so that clients of another one can go on with it.
const BACKLOG_REVISIONS: u64 = 10_000;

/// Waits between attempts to reach etcd again: doubled from the first to the last.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LAST: Duration = Duration::from_secs(5);

/// Longest wait for the word that a watch begins too far back.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

/// The history is kept to this fraction of its duration exactly.
const STEPS: u32 = 10;

/// Connects and begins to follow.
pub(super) async fn start(
    client: Client,
    bounds: Bounds,
    history: Duration,
) -> Result<(Arc<Ledger>, JoinHandle<()>), OpenError> {
    let refused = |status: tonic::Status| OpenError::Etcd(status.to_string());
    let request = RangeRequest { key: etcd_key("/"), count_only: true, ..RangeRequest::default() };
    let newest = client.range(request).await.map_err(refused)?.header.map_or(0, |header| from_etcd(header.revision));
    let after = newest.saturating_sub(BACKLOG_REVISIONS).max(1);
    let ledger = Arc::new(Ledger::new(after, bounds));
    let mut follower = Follower { client, ledger: ledger.clone() };
    let stream = follower.open().await.map_err(|error| OpenError::Etcd(error.to_string()))?;
    let task = tokio::spawn(async move {
        tokio::join!(
            compact_regularly(follower.client.clone(), follower.ledger.clone(), history),
            follower.run(stream)
        );
    });
    Ok((ledger, task))
}

struct Follower {
    client: Client,
    ledger: Arc<Ledger>,
}

impl Follower {
    async fn run(mut self, mut stream: Streaming<WatchResponse>) {
        let mut pause = RETRY_FIRST;
        loop {
            let error = loop {
                match stream.message().await {
                    Ok(Some(response)) if response.canceled => break response.cancel_reason,
                    Ok(Some(response)) => match self.take(response) {
                        Ok(()) => pause = RETRY_FIRST,
                        Err(error) => break error.to_string(),
                    },
                    Ok(None) => break "the stream ended".to_owned(),
                    Err(status) => break status.to_string(),
                }
            };
            tracing::warn!(error, "the watch of etcd broke, will go on where it stopped");
            loop {
                tokio::time::sleep(pause).await;
                match self.open().await {
                    Ok(opened) => break stream = opened,
                    Err(error) => tracing::warn!(%error, retry_ms = pause.as_millis() as u64, "etcd cannot be watched"),
                }
                pause = (pause * 2).min(RETRY_LAST);
            }
        }
    }

    /// A stream of the changes after the newest known one. When etcd has forgotten some of them, the log begins anew
    /// and all watchers have to list again.
    async fn open(&mut self) -> Result<Streaming<WatchResponse>, Error> {
        let broken = |reason: String| Error::Unavailable { step: "watch", reason };
        loop {
            let next = self.ledger.past().newest + 1;
            let create = WatchCreateRequest {
                key: etcd_key("/"),
                range_end: scope_end("/"),
                start_revision: to_etcd(next),
                progress_notify: true,
                prev_kv: true,
            };
            let mut stream = self.client.watch(create).await.map_err(|status| broken(status.to_string()))?;
            let first = stream.message().await.map_err(|status| broken(status.to_string()))?;
            let first = first.ok_or_else(|| broken("the stream ended at once".to_owned()))?;
            if !first.created {
                return Err(broken("etcd does not say that the watch was created".to_owned()));
            }
            // etcd tells of a compaction in a second message, sent at once; without one the changes come later.
            if first.compact_revision == 0 && !first.canceled {
                let compacted = self.compacted_at(next).await?;
                if compacted.is_none() {
                    return Ok(stream);
                }
            }
            let mut oldest = first.compact_revision;
            if oldest == 0 {
                let second = tokio::time::timeout(CANCEL_TIMEOUT, stream.message()).await;
                let second = second.map_err(|_| broken("etcd does not say what it has compacted".to_owned()))?;
                oldest = second.ok().flatten().map_or(0, |second| second.compact_revision);
            }
            if oldest == 0 {
                return Err(broken(first.cancel_reason));
            }
            self.ledger.restart(from_etcd(oldest));
        }
    }

    /// Whether etcd has forgotten changes after `next - 1`, which a read at this revision tells.
    async fn compacted_at(&self, next: u64) -> Result<Option<()>, Error> {
        let request = RangeRequest {
            key: etcd_key("/"),
            count_only: true,
            revision: to_etcd(next - 1),
            ..RangeRequest::default()
        };
        match self.client.range(request).await {
            Ok(_) => Ok(None),
            Err(status) if status.message().contains("revision has been compacted") => Ok(Some(())),
            Err(status) => Err(Error::Unavailable { step: "watch", reason: status.to_string() }),
        }
    }

    fn take(&self, response: WatchResponse) -> Result<(), Error> {
        // Only a message without changes promises that there is nothing else up to its revision.
        let mut newest = match &response.header {
            Some(header) if response.events.is_empty() && !response.created => from_etcd(header.revision),
            _ => 0,
        };
        let known = self.ledger.past().newest;
        let mut events = Vec::with_capacity(response.events.len());
        for change in &response.events {
            let event = event(change)?;
            newest = newest.max(event.revision());
            if event.revision() > known {
                events.push(Arc::new(event));
            }
        }
        self.ledger.publish(&events, newest).wake();
        Ok(())
    }
}

fn event(change: &Change) -> Result<Event, Error> {
    let incomplete = || Error::Unavailable { step: "watch", reason: "a change has no object".to_owned() };
    let pair = change.kv.as_ref().ok_or_else(incomplete)?;
    let prev = change.prev_kv.as_ref().map(entry).transpose()?;
    if change.kind == DELETE {
        return Ok(Event::delete(prev.ok_or_else(incomplete)?, from_etcd(pair.mod_revision)));
    }
    Ok(Event::put(entry(pair)?, prev))
}

/// Compacts etcd to the revision that was the newest `history` ago. Each of several servers does; the later ones find
/// it done.
async fn compact_regularly(client: Client, ledger: Arc<Ledger>, history: Duration) {
    let step = history / STEPS;
    let mut marks: VecDeque<(Instant, u64)> = VecDeque::new();
    loop {
        tokio::time::sleep(step).await;
        marks.push_back((Instant::now(), ledger.past().newest));
        let mut due = None;
        while let Some((_, revision)) = marks.pop_front_if(|(at, _)| at.elapsed() >= history) {
            due = Some(revision);
        }
        let Some(revision) = due else { continue };
        match client.compact(to_etcd(revision)).await {
            Ok(()) => {}
            Err(status) if status.message().contains("compacted") => {}
            Err(status) => tracing::warn!(%status, revision, "cannot compact etcd now"),
        }
        ledger.forget_slowly(revision).await;
    }
}
