//! A line of a container's log: parsing never panics, and the parts are those of the line.
#![no_main]

use coracle_kubelet::logs::parse;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some(line) = parse(data) else { return };
    assert!(data.ends_with(line.text));
    let _time = line.timestamp();
});
