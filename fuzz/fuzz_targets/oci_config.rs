//! An OCI configuration: any JSON. Compiling it to a plan never panics, whatever it asks for.
#![no_main]

use std::path::Path;

use coracle_runtime::{Options, Plan};
use libfuzzer_sys::fuzz_target;
use oci_spec::runtime::Spec;

fuzz_target!(|data: &[u8]| {
    let Ok(spec) = serde_json::from_slice::<Spec>(data) else { return };
    let _ = Plan::compile(&spec, Path::new("/nonexistent/bundle"), &Options::default());
});
