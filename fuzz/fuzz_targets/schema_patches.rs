//! An object and a patch, one JSON document a line: JSON patch, merge patch and strategic merge patch.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| coracle_schema::fuzz::patches(data));
