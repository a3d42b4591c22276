//! A CEL expression over a small object.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| coracle_schema::fuzz::expression(data));
