//! Objects as answers: stored bytes as they are when nothing else was asked for.

use std::borrow::Cow;

use bytes::Bytes;
use serde_json::{Value, json};

use super::call::{Call, to_version};
use crate::http::{Format, Media, Response, Shape, bytes_response};
use crate::kinds::Kind;
use crate::status::Status;
use crate::{table, wire};

/// An object on its way out.
pub(crate) enum Outgoing {
    /// As stored.
    Stored(Bytes),
    /// In the version of the request.
    Value(Value),
}

/// Answers with one object of the call's kind.
pub(crate) async fn object(call: &Call, code: u16, outgoing: Outgoing) -> Result<Response, Status> {
    let media = call.media;
    if let (Outgoing::Stored(bytes), Format::Json, Shape::Plain, false, true) =
        (&outgoing, media.format, media.shape, media.pretty, is_answer(&call.kind))
    {
        return Ok(bytes_response(code, "application/json", bytes.clone()));
    }
    let value = match outgoing {
        Outgoing::Stored(bytes) => to_version(&call.kind, wire::parse_stored(&bytes)?).await?,
        Outgoing::Value(value) => value,
    };
    shaped(call, code, value)
}

/// Whether stored bytes are what a client of this version gets.
pub(super) fn is_answer(kind: &Kind) -> bool {
    kind.is_storage_version() && !kind.differs_when_read
}

/// Answers with an object in the shape that was asked for.
pub(crate) fn shaped(call: &Call, code: u16, value: Value) -> Result<Response, Status> {
    let media = call.media;
    let value = match media.shape {
        Shape::Table => {
            let version = crate::object::text(&value, "/metadata/resourceVersion").to_owned();
            table::table(&call.kind, &[value], media, json!({"resourceVersion": version}), true, call.now)
        }
        Shape::PartialList => return Err(Status::not_acceptable(&crate::http::SERVED)),
        Shape::Plain | Shape::Partial => seen(&value, media).into_owned(),
    };
    plain(media, code, &value)
}

/// Answers with objects as a list in the shape that was asked for.
pub(super) fn list(call: &Call, items: &[Value], metadata: Value) -> Result<Response, Status> {
    let media = call.media;
    let value = if media.shape == Shape::Table {
        table::table(&call.kind, items, media, metadata, true, call.now)
    } else {
        let (kind, api_version) = list_head(&call.kind, media);
        let items: Vec<_> = items.iter().map(|item| seen(item, media)).collect();
        json!({"kind": kind, "apiVersion": api_version, "metadata": metadata, "items": items})
    };
    plain(media, 200, &value)
}

/// Answers with a value that is already in its shape.
pub(crate) fn plain(media: Media, code: u16, value: &Value) -> Result<Response, Status> {
    let bytes = wire::encode(value, media.format, media.pretty)?;
    Ok(bytes_response(code, media.content_type(), bytes))
}

/// An object as an item of what was asked for: whole, or its metadata alone.
pub(super) fn seen(object: &Value, media: Media) -> Cow<'_, Value> {
    match media.shape {
        Shape::Plain | Shape::Table => Cow::Borrowed(object),
        Shape::Partial | Shape::PartialList => Cow::Owned(partial(object, media.meta)),
    }
}

/// The metadata alone, in a version of `meta.k8s.io`.
pub(crate) fn partial(object: &Value, meta: &str) -> Value {
    json!({
        "kind": "PartialObjectMetadata", "apiVersion": meta,
        "metadata": object.get("metadata").cloned().unwrap_or_else(|| json!({})),
    })
}

/// Kind and version of the answer's list.
pub(super) fn list_head(kind: &Kind, media: Media) -> (String, String) {
    match media.shape {
        Shape::Plain => (kind.list_kind.clone(), kind.api_version()),
        Shape::Table => ("Table".into(), media.meta.into()),
        Shape::PartialList | Shape::Partial => ("PartialObjectMetadataList".into(), media.meta.into()),
    }
}
