//! The benchmark harness: us and the peers found on this host, side by side in one run.
#![forbid(unsafe_code)]

fn main() {}
