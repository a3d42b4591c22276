//! What a SPDY client sends: frames and their header blocks never panic, and whole frames survive writing.
#![no_main]

use bytes::BytesMut;
use coracle_kubelet::streaming::spdy::{Frame, HeaderCodec, parse_frame};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut buffer = BytesMut::from(data);
    let mut codec = HeaderCodec::default();
    while let Ok(Some(frame)) = parse_frame(&mut buffer) {
        let mut wire = BytesMut::new();
        frame.write(&mut wire);
        assert_eq!(parse_frame(&mut wire).expect("our own frame"), Some(frame.clone()));
        if let Frame::SynStream { block, .. } | Frame::Headers { block, .. } = frame
            && codec.decode(&block).is_none()
        {
            return;
        }
    }
});
