//! WATCH: a stream of changes, with initial events, bookmarks and an end.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use coracle_store::{Entry, Error, Event, EventKind, ListOptions, Watch};
use futures::stream;
use rand::RngExt as _;
use serde_json::{Value, json};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};

use super::answer;
use super::call::{Call, to_version};
use super::frames::{self, Change};
use super::read::{Selection, parse_revision};
use crate::http::{BoxError, Format, Response, Shape, no_cache};
use crate::status::Status;
use crate::{table, wire};

/// Time between bookmarks.
const BOOKMARK_EVERY: Duration = Duration::from_secs(60);
/// A watch without `timeoutSeconds` lasts this long and up to twice as long.
const SHORTEST: Duration = Duration::from_secs(1800);
/// Bytes of initial events that are put together at once.
const CHUNK_BYTES: usize = 64 << 10;
/// Annotation of the bookmark that ends the initial events.
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

/// Answers a watch.
pub(super) async fn watch(call: &mut Call) -> Result<Response, Status> {
    let selection = Selection::parse(call)?;
    let scope = selection.scope(call);
    let bookmarks = call.query.flag("allowWatchBookmarks");
    let initial = call.query.flag("sendInitialEvents");
    let version = call.query.get("resourceVersion").unwrap_or_default().to_owned();
    check_initial(call, initial, bookmarks)?;
    let timeout = match call.query.get("timeoutSeconds").map(str::parse::<u64>) {
        Some(Ok(seconds)) if seconds > 0 => Duration::from_secs(seconds),
        Some(Err(_)) => return Err(Status::bad_request("timeoutSeconds: must be a non-negative integer")),
        _ => SHORTEST.mul_f64(rand::rng().random_range(1.0..2.0)),
    };
    let asked = if version.is_empty() { 0 } else { parse_revision(&version)? };
    let store = call.api.store.clone();
    let mut first = Vec::new();
    let mut after = asked;
    if initial || (asked == 0 && call.query.get("sendInitialEvents").is_none()) {
        let listing = store.list(&scope, ListOptions::default()).await?;
        after = listing.revision;
        if !selection.nothing {
            first = listing.entries;
        }
    } else if asked == 0 {
        after = store.revision().await?;
    }
    let opened = match store.watch(&scope, after).await {
        Ok(watch) => Ok(watch),
        Err(Error::Compacted { requested, oldest }) => {
            Err(Status::expired(format!("too old resource version: {requested} ({oldest})")))
        }
        Err(Error::Future { requested, newest }) => {
            return Err(Status::new(
                504,
                "Timeout",
                format!("Too large resource version: {requested}, current: {newest}"),
            ));
        }
        Err(other) => return Err(other.into()),
    };
    let format = call.media.format;
    let content_type = match format {
        Format::Json => "application/json",
        Format::Protobuf => "application/vnd.kubernetes.protobuf;stream=watch",
        Format::Yaml => {
            return Err(Status::not_acceptable(&["application/json", "application/vnd.kubernetes.protobuf"]));
        }
    };
    let untouched = format == Format::Json
        && call.media.shape == Shape::Plain
        && call.kind.is_storage_version()
        && call.kind.crd.is_none();
    let state = Watcher {
        view: View {
            api: call.api.clone(),
            kind: call.kind.clone(),
            media: call.media,
            now: call.now,
            untouched,
            headed: false,
        },
        selection,
        first: first.into_iter(),
        initial_end: initial.then_some(after),
        watch: None,
        failed: None,
        bookmarks: bookmarks.then(bookmark_timer),
        deadline: Instant::now() + timeout,
        shutdown: call.api.shutdown.clone(),
        at: after,
    };
    let state = match opened {
        Ok(watch) => Watcher { watch: Some(watch), ..state },
        Err(status) => Watcher { failed: Some(status), first: Vec::new().into_iter(), initial_end: None, ..state },
    };
    // A watch does not count among the requests in flight once it has begun.
    call.seat = None;
    let chunks = stream::unfold(state, |mut state| async move {
        let chunk = state.next().await?;
        Some((Ok::<Bytes, BoxError>(chunk), state))
    });
    let mut response = http::Response::new(crate::http::stream(chunks));
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    no_cache(response.headers_mut());
    Ok(response)
}

fn check_initial(call: &Call, initial: bool, bookmarks: bool) -> Result<(), Status> {
    let invalid =
        |why: &str| Err(Status::new(422, "Invalid", format!("ListOptions.meta.k8s.io \"\" is invalid: {why}")));
    let matching = call.query.get("resourceVersionMatch");
    if initial && matching != Some("NotOlderThan") {
        return invalid(
            "resourceVersionMatch: Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
        );
    }
    if !call.query.has("sendInitialEvents") && matching.is_some() {
        return invalid(
            "resourceVersionMatch: Forbidden: resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
        );
    }
    let _ = bookmarks;
    Ok(())
}

fn bookmark_timer() -> Interval {
    let mut timer = interval(BOOKMARK_EVERY);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    timer.reset();
    timer
}

/// How objects look to this watcher.
struct View {
    api: Arc<crate::server::ApiServer>,
    kind: Arc<crate::kinds::Kind>,
    media: crate::http::Media,
    now: jiff::Timestamp,
    /// Stored bytes are what the watcher gets.
    untouched: bool,
    /// A Table with column definitions has been sent.
    headed: bool,
}

impl View {
    async fn frame(&mut self, change: Change, entry: &Entry, shared: bool) -> Result<Bytes, Status> {
        if self.untouched {
            return Ok(if shared { self.api.frames.json(change, entry) } else { frames::json(change, &entry.value) });
        }
        let value = to_version(&self.kind, wire::parse_stored(&entry.value)?).await?;
        self.encode(change.as_str(), value)
    }

    fn encode(&mut self, change: &str, value: Value) -> Result<Bytes, Status> {
        let value = match self.media.shape {
            Shape::Plain => value,
            Shape::Table => {
                let version = crate::object::text(&value, "/metadata/resourceVersion").to_owned();
                let head = !std::mem::replace(&mut self.headed, true);
                let rows = if change == "BOOKMARK" { Vec::new() } else { vec![value] };
                table::table(&self.kind, &rows, self.media.include, json!({"resourceVersion": version}), head, self.now)
            }
            Shape::Partial | Shape::PartialList => answer::partial(&value),
        };
        wire::watch_event(change, &value, self.media.format)
    }
}

struct Watcher {
    view: View,
    selection: Selection,
    first: std::vec::IntoIter<Entry>,
    /// Revision of the bookmark that ends the initial events.
    initial_end: Option<u64>,
    watch: Option<Watch>,
    failed: Option<Status>,
    bookmarks: Option<Interval>,
    deadline: Instant,
    shutdown: tokio_util::sync::CancellationToken,
    at: u64,
}

impl Watcher {
    /// The next bytes; `None` at the end.
    async fn next(&mut self) -> Option<Bytes> {
        match self.step().await {
            Ok(chunk) => chunk,
            Err(status) => {
                self.watch = None;
                self.first = Vec::new().into_iter();
                self.initial_end = None;
                wire::watch_event("ERROR", &status.to_value(), self.view.media.format).ok()
            }
        }
    }

    async fn step(&mut self) -> Result<Option<Bytes>, Status> {
        if let Some(status) = self.failed.take() {
            return Err(status);
        }
        let mut chunk = BytesMut::new();
        while chunk.len() < CHUNK_BYTES
            && let Some(entry) = self.first.next()
        {
            if self.selection.matches_stored(&entry.value).await? {
                chunk.extend_from_slice(&self.view.frame(Change::Added, &entry, false).await?);
            }
        }
        if self.first.len() == 0
            && let Some(revision) = self.initial_end.take()
        {
            chunk.extend_from_slice(&self.bookmark(revision, true)?);
        }
        if !chunk.is_empty() {
            return Ok(Some(chunk.freeze()));
        }
        loop {
            let Some(watch) = &mut self.watch else { return Ok(None) };
            let tick = async {
                match &mut self.bookmarks {
                    Some(timer) => timer.tick().await,
                    None => std::future::pending().await,
                }
            };
            let batch = tokio::select! {
                batch = watch.next() => batch,
                _ = tick => {
                    let revision = watch.progress();
                    self.at = self.at.max(revision);
                    return self.bookmark(self.at, false).map(Some);
                }
                () = tokio::time::sleep_until(self.deadline) => {
                    let revision = watch.progress();
                    self.watch = None;
                    if self.bookmarks.is_some() {
                        return self.bookmark(self.at.max(revision), false).map(Some);
                    }
                    return Ok(None);
                }
                () = self.shutdown.cancelled() => return Ok(None),
            };
            let batch = match batch {
                Ok(batch) => batch,
                Err(Error::Closed) => return Ok(None),
                Err(Error::TooSlow { at, oldest }) => {
                    return Err(Status::expired(format!("too old resource version: {at} ({oldest})")));
                }
                Err(other) => return Err(other.into()),
            };
            self.at = batch.revision;
            if let [event] = batch.events.as_slice() {
                if let Some(frame) = self.event(event).await? {
                    return Ok(Some(frame));
                }
                continue;
            }
            let mut chunk = BytesMut::new();
            for event in &batch.events {
                if let Some(frame) = self.event(event).await? {
                    chunk.extend_from_slice(&frame);
                }
            }
            if !chunk.is_empty() {
                return Ok(Some(chunk.freeze()));
            }
        }
    }

    /// What a change is to this watcher: an object that no longer matches has been deleted for it, and so on.
    async fn event(&mut self, event: &Event) -> Result<Option<Bytes>, Status> {
        if self.selection.nothing {
            return Ok(None);
        }
        let (before, now) = if self.selection.takes_all() {
            (event.prev.is_some(), event.kind == EventKind::Put)
        } else {
            let before = match &event.prev {
                Some(prev) => self.selection.matches_stored(&prev.value).await?,
                None => false,
            };
            let now = event.kind == EventKind::Put && self.selection.matches_stored(&event.entry.value).await?;
            (before, now)
        };
        match (before, now) {
            (false, false) => Ok(None),
            (false, true) => self.view.frame(Change::Added, &event.entry, true).await.map(Some),
            (true, true) => self.view.frame(Change::Modified, &event.entry, true).await.map(Some),
            (true, false) if event.kind == EventKind::Delete => {
                self.view.frame(Change::Deleted, &event.entry, true).await.map(Some)
            }
            (true, false) => {
                // It left the selection: its last matching state, at the revision of the change.
                let prev = event.prev.as_ref().map(|prev| prev.at_revision(event.entry.revision));
                match prev {
                    Some(prev) => self.view.frame(Change::Deleted, &prev, false).await.map(Some),
                    None => Ok(None),
                }
            }
        }
    }

    fn bookmark(&mut self, revision: u64, end: bool) -> Result<Bytes, Status> {
        let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
        if end {
            metadata["annotations"] = json!({INITIAL_EVENTS_END: "true"});
        }
        let object = json!({
            "kind": self.view.kind.kind, "apiVersion": self.view.kind.api_version(), "metadata": metadata,
        });
        self.view.encode("BOOKMARK", object)
    }
}
