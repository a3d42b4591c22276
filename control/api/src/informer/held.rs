//! Objects as the cache holds them: the store's own bytes, decoded when somebody looks, and kept decoded for a while.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use coracle_store::Entry;
use memchr::memmem;
use parking_lot::Mutex;

use super::Cached;

/// Most JSON whose objects are kept decoded, of one kind; a pod takes 18 KiB for 3.4 of JSON. Enough for ten thousand of
/// them: what controllers work on is decoded once, the rest of a large cluster costs no more than its bytes.
const DECODED_BYTES: usize = 32 << 20;
/// Most objects of one kind that are kept decoded.
const DECODED_OBJECTS: usize = 1 << 16;

/// One version of an object.
pub(super) struct Held<K> {
    entry: Entry,
    decoded: Mutex<Decoded<K>>,
}

enum Decoded<K> {
    Not,
    Is(Arc<K>),
    /// The bytes are no object of this kind.
    Never,
}

impl<K: Cached> Held<K> {
    pub(super) fn new(entry: Entry) -> Arc<Self> {
        Arc::new(Self { entry, decoded: Mutex::new(Decoded::Not) })
    }

    pub(super) fn revision(&self) -> u64 {
        self.entry.revision
    }

    /// The object, kept decoded for whoever looks next.
    pub(super) fn object(self: &Arc<Self>, recent: &Recent<K>) -> Option<Arc<K>> {
        let mut decoded = self.decoded.lock();
        match &*decoded {
            Decoded::Is(object) => return Some(object.clone()),
            Decoded::Never => return None,
            Decoded::Not => {}
        }
        let object = self.decode();
        *decoded = object.clone().map_or(Decoded::Never, Decoded::Is);
        drop(decoded);
        if object.is_some() {
            recent.add(self);
        }
        object
    }

    /// The object, for one look.
    pub(super) fn glance(&self) -> Option<Arc<K>> {
        match &*self.decoded.lock() {
            Decoded::Is(object) => return Some(object.clone()),
            Decoded::Never => return None,
            Decoded::Not => {}
        }
        self.decode()
    }

    /// An object that does not decode is left out and named, as one that was stored by a newer version.
    fn decode(&self) -> Option<Arc<K>> {
        match serde_json::from_slice(&without_managed_fields(&self.entry)) {
            Ok(object) => Some(Arc::new(object)),
            Err(error) => {
                tracing::error!(key = %self.entry.key, %error, "a stored object is not of its kind and is left out");
                None
            }
        }
    }

    fn forget(&self) {
        *self.decoded.lock() = Decoded::Not;
    }
}

/// The objects that are decoded, the oldest first; those that nobody else holds any more are gone already.
pub(super) struct Recent<K> {
    ring: Mutex<Ring<K>>,
    most_bytes: usize,
}

struct Ring<K> {
    held: VecDeque<(Weak<Held<K>>, usize)>,
    bytes: usize,
}

impl<K> Default for Recent<K> {
    fn default() -> Self {
        Self { ring: Mutex::new(Ring { held: VecDeque::new(), bytes: 0 }), most_bytes: DECODED_BYTES }
    }
}

impl<K: Cached> Recent<K> {
    fn add(&self, held: &Arc<Held<K>>) {
        let mut surplus = Vec::new();
        let mut ring = self.ring.lock();
        let size = held.entry.value.len();
        ring.held.push_back((Arc::downgrade(held), size));
        ring.bytes += size;
        while let Some((oldest, size)) = ring.held.pop_front() {
            let within = ring.bytes <= self.most_bytes && ring.held.len() < DECODED_OBJECTS;
            if within && oldest.strong_count() > 0 {
                ring.held.push_front((oldest, size));
                break;
            }
            ring.bytes -= size;
            surplus.extend(oldest.upgrade());
        }
        drop(ring);
        surplus.iter().for_each(|held| held.forget());
    }
}

/// Objects of the cache as of one moment, each decoded when its turn comes.
pub struct Objects<K> {
    held: std::vec::IntoIter<Arc<Held<K>>>,
    recent: Arc<Recent<K>>,
}

impl<K> Objects<K> {
    pub(super) fn new(held: Vec<Arc<Held<K>>>, recent: &Arc<Recent<K>>) -> Self {
        Self { held: held.into_iter(), recent: recent.clone() }
    }

    /// How many are left.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether none is left.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<K: Cached> Iterator for Objects<K> {
    type Item = Arc<K>;

    fn next(&mut self) -> Option<Arc<K>> {
        self.held.by_ref().find_map(|held| held.object(&self.recent))
    }
}

/// The JSON of an object but for its managed fields, which take more memory than all the rest and which nobody in here reads.
/// A write that comes without them leaves them as they are.
fn without_managed_fields(entry: &Entry) -> std::borrow::Cow<'_, [u8]> {
    const NAME: &[u8] = b"\"managedFields\":[";
    let json = &*entry.value;
    // They stand before the revision, as names are sorted, and in the same object.
    let before = &json[..entry.splice as usize];
    let Some(start) = memmem::rfind(before, NAME) else { return json.into() };
    let Some(end) = closed(&json[start + NAME.len()..]).map(|end| start + NAME.len() + end) else { return json.into() };
    if json.get(end) != Some(&b',') || end > before.len() || closed(&before[end..]).is_some() {
        return json.into();
    }
    [&json[..start], &json[end + 1..]].concat().into()
}

/// The offset behind the bracket that closes what stands open before this JSON.
fn closed(json: &[u8]) -> Option<usize> {
    let (mut depth, mut at) = (0_usize, 0);
    while let Some(byte) = json.get(at) {
        at += 1;
        match byte {
            b'{' | b'[' => depth += 1,
            b'}' | b']' if depth == 0 => return Some(at),
            b'}' | b']' => depth -= 1,
            b'"' => {
                while json.get(at).is_some_and(|byte| *byte != b'"') {
                    at += if json[at] == b'\\' { 2 } else { 1 };
                }
                at += 1;
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use coracle_store::Draft;
    use k8s_openapi::api::core::v1::ConfigMap;
    use serde_json::{Value, json};

    use super::*;

    fn entry(object: &Value) -> Entry {
        let draft = Draft::encode(object).expect("an object");
        let json = [&draft.json[..draft.splice], b"7", &draft.json[draft.splice..]].concat();
        let splice = u32::try_from(draft.splice).expect("a small object");
        Entry { key: "/r/n/a".into(), revision: 7, create_revision: 7, value: json.into(), splice }
    }

    #[test]
    fn managed_fields_are_not_decoded() {
        let owners = json!([{"manager": "a \"]\\", "fieldsV1": {"f:data": {"k:{\"x\":[1]}": {}}}}, {}]);
        let fields = |metadata: Value, data: Value| json!({"data": data, "kind": "ConfigMap", "metadata": metadata});
        for metadata in [
            json!({"managedFields": owners, "name": "a", "ownerReferences": [{"name": "o"}], "resourceVersion": "7", "uid": "u"}),
            json!({"annotations": {"a": "\"managedFields\":[]"}, "managedFields": owners, "resourceVersion": "7"}),
            json!({"name": "a", "resourceVersion": "7"}),
        ] {
            for data in [json!({}), json!({"metadata": {"managedFields": [1], "name": "b"}})] {
                let mut expected = fields(metadata.clone(), data.clone());
                let left = without_managed_fields(&entry(&expected)).into_owned();
                expected["metadata"].as_object_mut().expect("metadata").remove("managedFields");
                assert_eq!(serde_json::from_slice::<Value>(&left).expect("JSON"), expected);
            }
        }
    }

    #[test]
    fn what_is_decoded_is_shared_and_forgotten_in_turn() {
        let recent = Recent::<ConfigMap> { most_bytes: 3000, ..Recent::default() };
        let big = json!({"data": {"k": "v".repeat(1000)}, "metadata": {"name": "a"}});
        let all = [Held::new(entry(&big)), Held::new(entry(&big)), Held::new(entry(&big))];
        let first = all[0].object(&recent).expect("an object");
        assert!(Arc::ptr_eq(&first, &all[0].object(&recent).expect("an object")));
        for held in &all[1..] {
            held.object(&recent).expect("an object");
        }
        assert!(matches!(*all[0].decoded.lock(), Decoded::Not), "room was made");
        assert!(matches!(*all[2].decoded.lock(), Decoded::Is(_)));
        assert_eq!(all[0].glance().expect("an object"), first);
        assert!(matches!(*all[0].decoded.lock(), Decoded::Not), "a glance leaves nothing");
        drop(all);
        Held::new(entry(&json!({"metadata": {"name": "b"}}))).object(&recent).expect("an object");
        assert_eq!(recent.ring.lock().held.len(), 1, "what nobody holds takes no room");
    }
}
