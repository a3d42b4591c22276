//! A structural schema and an object, one JSON document a line: pruning, defaults, validation, rules.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| coracle_schema::fuzz::custom(data));
