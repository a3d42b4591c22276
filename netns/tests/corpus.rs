//! The fuzzers' entry points with their checked-in corpus: a reply is a reply, and nothing panics.

use std::fs;
use std::path::Path;

use coracle_netns::fuzzing::{dns_question, netlink_answer};

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let all: Vec<Vec<u8>> =
        fs::read_dir(folder).unwrap().map(|entry| fs::read(entry.unwrap().path()).unwrap()).collect();
    assert!(!all.is_empty());
    all
}

/// An input, cut short everywhere and with each bit flipped once.
fn damaged(input: &[u8]) -> Vec<Vec<u8>> {
    let cut = (0..input.len()).map(|len| input[..len].to_vec());
    let flipped = (0..input.len() * 8).map(|bit| {
        let mut bytes = input.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        bytes
    });
    cut.chain(flipped).chain([input.to_vec()]).collect()
}

#[test]
fn damaged_questions_get_replies_or_none() {
    for reply in corpus("dns_question").iter().flat_map(|input| damaged(input)).filter_map(|input| dns_question(&input))
    {
        assert!(reply.len() >= 12 && reply[2] & 0x80 != 0);
        assert_eq!(dns_question(&reply), None);
    }
}

#[test]
fn damaged_answers_of_the_kernel_are_read() {
    corpus("netlink_answer").iter().flat_map(|input| damaged(input)).for_each(|input| netlink_answer(&input));
}
