//! Lists as bytes, put together item by item: a list of many objects never stands in memory as values.

use bytes::{BufMut as _, Bytes, BytesMut};
use coracle_schema::protobuf;
use coracle_store::Entry;
use serde_json::Value;

use super::answer;
use super::call::{Call, all_to_version};
use crate::http::{Format, Media, Response, Shape, pieces_response};
use crate::status::Status;
use crate::{table, wire};

/// Bytes of a list that are put together at once: the first of them leave before the last are touched.
const PIECE_BYTES: usize = 64 << 10;
/// Objects that are brought into the version of the request at once.
const PAGE: usize = 500;
/// Indentation of an item of a list.
const INDENT: &[u8] = b"    ";

/// What stands around the items.
struct Frame {
    head: Vec<u8>,
    separator: &'static [u8],
    tail: Vec<u8>,
}

impl Frame {
    /// JSON members before the list, and the list's name.
    fn json(members: &[(&str, &Value)], list: &str, pretty: bool, empty: bool) -> Self {
        let mut head = vec![b'{'];
        let (line, colon): (&[u8], &[u8]) = if pretty { (b"\n  ", b": ") } else { (b"", b":") };
        for (name, value) in members {
            head.extend_from_slice(line);
            head.extend_from_slice(format!("{name:?}").as_bytes());
            head.extend_from_slice(colon);
            head.extend_from_slice(&text(value, pretty, b"  "));
            head.push(b',');
        }
        head.extend_from_slice(line);
        head.extend_from_slice(format!("{list:?}").as_bytes());
        head.extend_from_slice(colon);
        head.push(b'[');
        let (separator, tail): (&[u8], &[u8]) = match (pretty, empty) {
            (false, _) => (b",", b"]}"),
            (true, true) => (b"", b"]\n}\n"),
            (true, false) => (b",\n    ", b"\n  ]\n}\n"),
        };
        if pretty && !empty {
            head.push(b'\n');
            head.extend_from_slice(INDENT);
        }
        Self { head, separator, tail: tail.into() }
    }
}

/// A value as JSON; all lines but the first are indented.
fn text(value: &Value, pretty: bool, indent: &[u8]) -> Vec<u8> {
    if !pretty {
        return value.to_string().into_bytes();
    }
    let mut out = Vec::new();
    for (at, line) in format!("{value:#}").split_inclusive('\n').enumerate() {
        if at > 0 {
            out.extend_from_slice(indent);
        }
        out.extend_from_slice(line.as_bytes());
    }
    out
}

/// Answers with these objects.
pub(super) async fn respond(call: &Call, entries: Vec<Entry>, metadata: Value) -> Result<Response, Status> {
    let media = call.media;
    let (kind, api_version) = answer::list_head(&call.kind, media);
    let (kind_value, version_value) = (Value::from(kind.as_str()), Value::from(api_version.as_str()));
    match media.format {
        Format::Json if media.shape == Shape::Table => {
            let columns = Value::from(table::columns(&call.kind));
            let members = [
                ("kind", &kind_value),
                ("apiVersion", &version_value),
                ("metadata", &metadata),
                ("columnDefinitions", &columns),
            ];
            let frame = Frame::json(&members, "rows", media.pretty, entries.is_empty());
            let row = |item: &Value, out: &mut Vec<u8>| {
                let row = table::row(&call.kind, item, media, call.now);
                out.extend_from_slice(&text(&row, media.pretty, INDENT));
            };
            let items = encoded(call, &entries, row, frame.separator).await?;
            Ok(answer(media, frame, items))
        }
        Format::Json => {
            let members = [("kind", &kind_value), ("apiVersion", &version_value), ("metadata", &metadata)];
            let frame = Frame::json(&members, "items", media.pretty, entries.is_empty());
            if media.shape == Shape::Plain && !media.pretty && answer::is_answer(&call.kind) {
                return Ok(as_stored(media, frame, entries));
            }
            let item = |item: &Value, out: &mut Vec<u8>| {
                let item = answer::seen(item, media);
                out.extend_from_slice(&text(&item, media.pretty, INDENT));
            };
            let items = encoded(call, &entries, item, frame.separator).await?;
            Ok(answer(media, frame, items))
        }
        Format::Protobuf if media.shape != Shape::Table => {
            let list = protobuf::List::new(&api_version, &kind).map_err(Status::internal)?;
            let item = |item: &Value, out: &mut Vec<u8>| list.item(&answer::seen(item, media), out);
            let items = encoded(call, &entries, item, b"").await?;
            let (head, tail) = list.around(&metadata, items.iter().map(Bytes::len).sum());
            Ok(answer(media, Frame { head, separator: b"", tail }, items))
        }
        Format::Yaml | Format::Protobuf => {
            let items: Result<Vec<Value>, Status> =
                entries.iter().map(|entry| wire::parse_stored(&entry.value)).collect();
            let items = all_to_version(&call.kind, items?).await?;
            answer::list(call, &items, metadata)
        }
    }
}

/// The objects, encoded and joined, in pieces.
async fn encoded(
    call: &Call,
    entries: &[Entry],
    encode: impl Fn(&Value, &mut Vec<u8>),
    separator: &[u8],
) -> Result<Vec<Bytes>, Status> {
    let (mut pieces, mut piece) = (Vec::new(), Vec::new());
    let mut first = true;
    for page in entries.chunks(PAGE) {
        let items: Result<Vec<Value>, Status> = page.iter().map(|entry| wire::parse_stored(&entry.value)).collect();
        for item in all_to_version(&call.kind, items?).await? {
            if !std::mem::take(&mut first) {
                piece.extend_from_slice(separator);
            }
            encode(&item, &mut piece);
            if piece.len() >= PIECE_BYTES {
                pieces.push(std::mem::take(&mut piece).into());
            }
        }
        // A long list is not to keep others from this thread.
        tokio::task::yield_now().await;
    }
    pieces.push(piece.into());
    Ok(pieces)
}

fn answer(media: Media, frame: Frame, items: Vec<Bytes>) -> Response {
    let length = frame.head.len() + items.iter().map(Bytes::len).sum::<usize>() + frame.tail.len();
    let pieces = std::iter::once(frame.head.into()).chain(items).chain(std::iter::once(frame.tail.into()));
    pieces_response(media.content_type(), pieces, length)
}

/// The stored bytes, one after the other, copied when they are about to leave.
fn as_stored(media: Media, frame: Frame, entries: Vec<Entry>) -> Response {
    let length = frame.head.len()
        + entries.iter().map(|entry| entry.value.len() + frame.separator.len()).sum::<usize>()
        - if entries.is_empty() { 0 } else { frame.separator.len() }
        + frame.tail.len();
    let mut entries = entries.into_iter().enumerate();
    let mut open = Some(frame);
    let pieces = std::iter::from_fn(move || {
        let frame = open.as_mut()?;
        let mut piece = BytesMut::with_capacity(PIECE_BYTES.min(length));
        piece.put_slice(&std::mem::take(&mut frame.head));
        while piece.len() < PIECE_BYTES {
            let Some((at, entry)) = entries.next() else {
                piece.put_slice(&frame.tail);
                open = None;
                break;
            };
            if at > 0 {
                piece.put_slice(frame.separator);
            }
            piece.put_slice(&entry.value);
        }
        Some(piece.freeze())
    });
    pieces_response(media.content_type(), pieces, length)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pretty_list_is_as_if_it_had_been_encoded_whole() {
        let (kind, metadata) = (json!("PodList"), json!({"resourceVersion": "7"}));
        for items in [vec![], vec![json!({"a": {"b": [1, "\n"]}})], vec![json!({"a": 1}), json!({})]] {
            for pretty in [false, true] {
                let frame =
                    Frame::json(&[("kind", &kind), ("metadata", &metadata)], "records", pretty, items.is_empty());
                let mut made = frame.head.clone();
                for (at, item) in items.iter().enumerate() {
                    if at > 0 {
                        made.extend_from_slice(frame.separator);
                    }
                    made.extend_from_slice(&text(item, pretty, INDENT));
                }
                made.extend_from_slice(&frame.tail);
                let whole = json!({"kind": kind, "metadata": metadata, "records": items});
                let format = Format::Json;
                assert_eq!(made, wire::encode(&whole, format, pretty).expect("JSON"));
            }
        }
    }
}
