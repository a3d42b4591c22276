//! The body of an API request: any bytes, as any format, of a kind that the first byte chooses. Decoding never panics, and
//! what it accepts survives pruning, defaulting and validation, and comes back the same from its own JSON.
#![no_main]

use coracle_schema::Schema;
use coracle_schema::decode::{Format, decode, sniff};
use libfuzzer_sys::fuzz_target;

const KINDS: &[&str] = &[
    "io.k8s.api.core.v1.Pod",
    "io.k8s.api.core.v1.Service",
    "io.k8s.api.apps.v1.Deployment",
    "io.k8s.api.core.v1.ConfigMap",
    "io.k8s.api.networking.v1.NetworkPolicy",
    "io.k8s.api.autoscaling.v2.HorizontalPodAutoscaler",
];

fuzz_target!(|data: &[u8]| {
    let Some((first, body)) = data.split_first() else { return };
    let Some(schema) = Schema::builtin(KINDS[usize::from(*first) % KINDS.len()]) else { panic!("a built-in kind") };
    for format in [sniff(body), Format::Json, Format::Yaml, Format::Protobuf] {
        let Ok(decoded) = decode(body, format, &schema) else { continue };
        let json = serde_json::to_vec(&decoded.value).expect("a value has a JSON form");
        let again = decode(&json, Format::Json, &schema).expect("what was accepted is accepted again");
        assert_eq!(again.value, decoded.value, "decoding its own JSON changed the object");
    }
});
