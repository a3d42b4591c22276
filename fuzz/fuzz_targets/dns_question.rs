//! A datagram to the cluster's DNS: forged, looping, compressed, cut short. Reading never panics, and a reply is never a question.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Some(reply) = coracle_netns::fuzzing::dns_question(data) {
        assert!(reply.len() >= 12 && reply[2] & 0x80 != 0, "a reply says that it is one");
        assert!(coracle_netns::fuzzing::dns_question(&reply).is_none(), "a reply is not replied to");
    }
});
