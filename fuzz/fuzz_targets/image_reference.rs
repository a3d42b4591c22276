//! An image reference: parsing never panics, and what it accepts comes back from its own text.
#![no_main]

use coracle_kubelet::images::Reference;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(reference) = text.parse::<Reference>() else { return };
    let again: Reference = reference.to_string().parse().expect("a reference's own text is a reference");
    assert_eq!(again, reference);
});
