//! An answer of the kernel about links, routes and connections, as damaged as can be: reading never panics and always ends.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| coracle_netns::fuzzing::netlink_answer(data));
