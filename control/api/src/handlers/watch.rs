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
use super::frames::{self, Change, Form};
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
    let as_stored = answer::is_answer(&call.kind);
    let untouched = format == Format::Json && call.media.shape == Shape::Plain && as_stored;
    let state = Watcher {
        view: View {
            api: call.api.clone(),
            form: Form { kind: call.kind.clone(), media: call.media },
            now: call.now,
            as_stored,
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
    form: Form,
    now: jiff::Timestamp,
    /// Stored objects are in the watcher's version.
    as_stored: bool,
    /// Stored bytes are what the watcher gets.
    untouched: bool,
    /// A Table with column definitions has been sent.
    headed: bool,
}

impl View {
    /// The frame of a change that all watchers see, as it is in the store.
    async fn shared(&mut self, change: Change, entry: &Entry) -> Result<Bytes, Status> {
        let shared = self.form.is_shared();
        if let Some(frame) = shared.then(|| self.api.frames.frame(change, entry, &self.form)).flatten() {
            return Ok(frame);
        }
        let frame = if self.untouched {
            frames::json(change, &entry.value)
        } else {
            let value = self.api.frames.value(entry)?;
            if self.as_stored {
                self.encode(change.as_str(), &value)?
            } else {
                let value = to_version(&self.form.kind, Value::clone(&value)).await?;
                self.encode(change.as_str(), &value)?
            }
        };
        if shared {
            self.api.frames.keep(change, entry, &self.form, &frame);
        }
        Ok(frame)
    }

    /// The frame of an object that this watcher alone sees so.
    async fn own(&mut self, change: Change, entry: &Entry) -> Result<Bytes, Status> {
        if self.untouched {
            return Ok(frames::json(change, &entry.value));
        }
        let value = to_version(&self.form.kind, wire::parse_stored(&entry.value)?).await?;
        self.encode(change.as_str(), &value)
    }

    fn encode(&mut self, change: &str, value: &Value) -> Result<Bytes, Status> {
        let (kind, media) = (&self.form.kind, self.form.media);
        if media.shape != Shape::Table {
            return wire::watch_event(change, &answer::seen(value, media), media.format);
        }
        let version = crate::object::text(value, "/metadata/resourceVersion").to_owned();
        let head = !std::mem::replace(&mut self.headed, true);
        let rows = if change == "BOOKMARK" { &[] } else { std::slice::from_ref(value) };
        let table = table::table(kind, rows, media, json!({"resourceVersion": version}), head, self.now);
        wire::watch_event(change, &table, media.format)
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
                wire::watch_event("ERROR", &status.to_value(), self.view.form.media.format).ok()
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
                chunk.extend_from_slice(&self.view.own(Change::Added, &entry).await?);
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

    /// Whether an object of the store is selected.
    async fn matches(&self, entry: &Entry) -> Result<bool, Status> {
        let value = self.view.api.frames.value(entry)?;
        if self.view.as_stored || self.selection.fields.is_empty() {
            return Ok(self.selection.matches(&value));
        }
        let value = to_version(&self.view.form.kind, Value::clone(&value)).await?;
        Ok(self.selection.matches(&value))
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
                Some(prev) => self.matches(prev).await?,
                None => false,
            };
            (before, event.kind == EventKind::Put && self.matches(&event.entry).await?)
        };
        match (before, now) {
            (false, false) => Ok(None),
            (false, true) => self.view.shared(Change::Added, &event.entry).await.map(Some),
            (true, true) => self.view.shared(Change::Modified, &event.entry).await.map(Some),
            (true, false) if event.kind == EventKind::Delete => {
                self.view.shared(Change::Deleted, &event.entry).await.map(Some)
            }
            (true, false) => {
                // It left the selection: its last matching state, at the revision of the change.
                let prev = event.prev.as_ref().map(|prev| prev.at_revision(event.entry.revision));
                match prev {
                    Some(prev) => self.view.own(Change::Deleted, &prev).await.map(Some),
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
            "kind": self.view.form.kind.kind, "apiVersion": self.view.form.kind.api_version(), "metadata": metadata,
        });
        self.view.encode("BOOKMARK", &object)
    }
}
