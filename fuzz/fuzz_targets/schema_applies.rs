//! A live object and a configuration, one JSON document a line: server-side apply and ownership.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| coracle_schema::fuzz::applies(data));
