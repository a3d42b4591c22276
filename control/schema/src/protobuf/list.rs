//! Lists whose items are encoded one by one.

use std::sync::Arc;

use serde_json::Value;

use super::{MAGIC, ProtobufError, schema_for, wire, write};
use crate::schema::{Schema, SchemaRef, Slot};

/// A list of a built-in kind.
pub struct List {
    api_version: String,
    kind: String,
    schema: Arc<Schema>,
}

impl List {
    /// A list by its own `apiVersion` and `kind`, such as `v1` and `PodList`.
    pub fn new(api_version: &str, kind: &str) -> Result<Self, ProtobufError> {
        let schema = schema_for(api_version, kind)?;
        Ok(Self { api_version: api_version.into(), kind: kind.into(), schema })
    }

    /// Appends one item.
    pub fn item(&self, item: &Value, out: &mut Vec<u8>) {
        for wire in &self.schema.wire {
            let Slot::Field(at) = &wire.slot else { continue };
            let field = &self.schema.fields[usize::from(*at)];
            if field.name == "items"
                && let Some(schema) = field.schema.get().items.as_ref().map(SchemaRef::get)
            {
                write::one(out, wire.number, item, schema);
            }
        }
    }

    /// What stands before and after items of so many bytes in all.
    pub fn around(&self, metadata: &Value, items_bytes: usize) -> (Vec<u8>, Vec<u8>) {
        // The metadata comes first, as the field with the lowest number.
        let before = write::message(&serde_json::json!({"metadata": metadata}), &self.schema);
        let mut head = MAGIC.to_vec();
        wire::nested(&mut head, 1, |out| {
            wire::bytes(out, 1, self.api_version.as_bytes());
            wire::bytes(out, 2, self.kind.as_bytes());
        });
        wire::open(&mut head, 2, before.len() + items_bytes);
        head.extend_from_slice(&before);
        let mut tail = Vec::new();
        wire::bytes(&mut tail, 3, b"");
        wire::bytes(&mut tail, 4, b"");
        (head, tail)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_list_is_as_if_it_had_been_encoded_whole() {
        for (kind, items) in [
            ("ConfigMapList", vec![]),
            ("ConfigMapList", vec![json!({"metadata": {"name": "a"}}), json!({"data": {"k": "v".repeat(200)}})]),
            ("NamespaceList", vec![json!({"metadata": {"name": "a"}, "status": {"phase": "Active"}})]),
        ] {
            let metadata = json!({"resourceVersion": "7", "continue": "c", "remainingItemCount": 3});
            let list = List::new("v1", kind).expect("a list");
            let mut encoded = Vec::new();
            items.iter().for_each(|item| list.item(item, &mut encoded));
            let (head, tail) = list.around(&metadata, encoded.len());
            let whole = json!({"apiVersion": "v1", "kind": kind, "metadata": metadata, "items": items});
            assert_eq!([head, encoded, tail].concat(), super::super::encode(&whole).expect("a list"));
        }
    }
}
