//! Objects as answers: stored bytes as they are when nothing else was asked for.

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
fn is_answer(kind: &Kind) -> bool {
    kind.is_storage_version() && !kind.defaults_when_read
}

/// Answers with an object in the shape that was asked for.
pub(crate) fn shaped(call: &Call, code: u16, value: Value) -> Result<Response, Status> {
    let value = match call.media.shape {
        Shape::Plain => value,
        Shape::Table => {
            let version = crate::object::text(&value, "/metadata/resourceVersion").to_owned();
            table::table(&call.kind, &[value], call.media.include, json!({"resourceVersion": version}), true, call.now)
        }
        Shape::Partial => partial(&value),
        Shape::PartialList => return Err(Status::not_acceptable(&crate::http::SERVED)),
    };
    plain(call.media, code, &value)
}

/// Answers with a value that is already in its shape.
pub(crate) fn plain(media: Media, code: u16, value: &Value) -> Result<Response, Status> {
    let bytes = wire::encode(value, media.format, media.pretty)?;
    Ok(bytes_response(code, media.content_type(), bytes))
}

/// The metadata alone.
pub(crate) fn partial(object: &Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
        "metadata": object.get("metadata").cloned().unwrap_or_else(|| json!({})),
    })
}

/// Kind of the answer's list.
pub(crate) fn list_head(kind: &Kind, shape: Shape) -> (String, String) {
    match shape {
        Shape::PartialList | Shape::Partial => ("PartialObjectMetadataList".into(), "meta.k8s.io/v1".into()),
        _ => (kind.list_kind.clone(), kind.api_version()),
    }
}
