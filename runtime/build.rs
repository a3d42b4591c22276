//! Lets `corun` begin ahead of the C library: see `coracle_sys::entry`.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|architecture| architecture == "x86_64") {
        println!("cargo::rustc-link-arg-bin=corun=-Wl,-e,coracle_entry");
    }
}
