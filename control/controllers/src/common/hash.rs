//! Stable short hashes of templates, in the alphabet of generated Kubernetes names.

use std::hash::Hasher;

use serde::Serialize;

/// Letters that form no words and are not mistaken for one another (apimachinery `rand`).
const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// FNV-1a with 32 bits, as `hash/fnv.New32a`.
struct Fnv32(u32);

impl Hasher for Fnv32 {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
        }
    }
    fn finish(&self) -> u64 {
        u64::from(self.0)
    }
}

/// The hash of a value and a collision count: of its JSON with sorted keys, so the same for equal values on any host.
///
/// # Errors
/// When the value has no JSON form.
pub(crate) fn of(value: &impl Serialize, collisions: i32) -> Result<String, serde_json::Error> {
    // A Value sorts the keys of maps.
    let json = serde_json::to_vec(&serde_json::to_value(value)?)?;
    let mut hasher = Fnv32(0x811c_9dc5);
    hasher.write(&json);
    if collisions > 0 {
        hasher.write(&u64::from(collisions.unsigned_abs()).to_le_bytes());
    }
    Ok(encode(&hasher.finish().to_string()))
}

/// The hash of a revision's data and a collision count (kubernetes `HashControllerRevision`): FNV-1 with 32 bits, as `hash/fnv.New32`,
/// of the JSON that Go writes, so that the name of a revision is the one that Kubernetes gives it.
///
/// # Errors
/// When the value has no JSON form.
pub(crate) fn of_revision(data: &serde_json::Value, collisions: Option<i32>) -> Result<String, serde_json::Error> {
    let mut bytes = Vec::new();
    coracle_store::json::append(&mut bytes, data)?;
    bytes.extend(collisions.iter().flat_map(|count| count.to_string().into_bytes()));
    let hash = bytes.iter().fold(0x811c_9dc5_u32, |hash, byte| hash.wrapping_mul(0x0100_0193) ^ u32::from(*byte));
    Ok(encode(&hash.to_string()))
}

/// Each byte as one letter of the alphabet (apimachinery `SafeEncodeString`).
pub(crate) fn encode(text: &str) -> String {
    text.bytes().map(|byte| char::from(ALPHABET[usize::from(byte) % ALPHABET.len()])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_stable_short_and_in_the_alphabet() {
        let hash = of(&serde_json::json!({"b": 1, "a": [true]}), 0).expect("JSON");
        assert_eq!(hash, of(&serde_json::json!({"a": [true], "b": 1}), 0).expect("JSON"));
        assert_ne!(hash, of(&serde_json::json!({"a": [true], "b": 1}), 1).expect("JSON"));
        assert!(hash.len() <= 10 && hash.bytes().all(|byte| ALPHABET.contains(&byte)), "{hash}");
    }

    #[test]
    fn revisions_are_hashed_as_kubernetes_does() {
        // FNV-1 with 32 bits of `{"a":"\u003c"}` and of the same followed by `0`.
        let data = serde_json::json!({"a": "<"});
        assert_eq!(of_revision(&data, None).expect("JSON"), encode("2645724287"));
        assert_eq!(of_revision(&data, Some(0)).expect("JSON"), encode("3205704669"));
    }

    #[test]
    fn digits_are_encoded_as_kubernetes_does() {
        // '0' is byte 48; 48 % 27 = 21, the letter at that place.
        assert_eq!(encode("0123456789"), "456789bcdf");
    }
}
