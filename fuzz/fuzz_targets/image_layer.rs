//! A layer's tar stream, compressed or not: unpacking never panics and never writes outside its folder.
#![no_main]

use coracle_kubelet::images::fuzz_unpack;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let outer = std::env::temp_dir().join(format!("fuzz-layer-{}", std::process::id()));
    let inner = outer.join("layer");
    std::fs::create_dir_all(&inner).expect("a temporary folder");
    // Refusals are fine; what counts is what was written, and where.
    let _refused = fuzz_unpack(data, &inner);
    let beside = std::fs::read_dir(&outer).expect("the folder is there").count();
    assert_eq!(beside, 1, "something was written beside the layer");
    std::fs::remove_dir_all(&outer).expect("the folder is ours");
});
