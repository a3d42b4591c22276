//! Which crate may depend on which: the layers of docs/architecture.md, read from cargo's own graph.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

/// Allowed direct edges between crates of the workspace, tests apart. A crate that is not named may have none.
const ALLOWED: &[(&str, &[&str])] = &[
    ("coracle-sys", &[]),
    ("coracle-runtime", &["coracle-sys"]),
    ("coracle-netns", &["coracle-sys"]),
    ("coracle-kubelet", &["coracle-runtime", "coracle-netns", "coracle-sys"]),
    ("coracle-store", &[]),
    ("coracle-schema", &[]),
    ("coracle-api", &["coracle-store", "coracle-schema"]),
    ("coracle-scheduler", &["coracle-api", "coracle-store", "coracle-schema"]),
    ("coracle-controllers", &["coracle-api", "coracle-store"]),
    (
        "coracle",
        &[
            "coracle-api",
            "coracle-controllers",
            "coracle-kubelet",
            "coracle-netns",
            "coracle-runtime",
            "coracle-scheduler",
            "coracle-store",
        ],
    ),
    (
        "coracle-bench",
        &["coracle-testkit", "coracle-scheduler", "coracle-api", "coracle-netns", "coracle-runtime", "coracle-sys"],
    ),
    ("coracle-testkit", &[]),
    ("coracle-hello", &[]),
    ("coracle-fuzz", &["coracle-kubelet", "coracle-netns", "coracle-runtime", "coracle-schema"]),
];

fn metadata() -> serde_json::Value {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("testkit lies in the workspace");
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(root)
        .output()
        .expect("cargo starts");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo prints JSON")
}

fn text(value: &serde_json::Value) -> &str {
    value.as_str().expect("a string")
}

#[test]
fn crates_depend_downwards_only() {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().expect("packages");
    let ours: BTreeSet<_> = packages.iter().map(|package| text(&package["name"])).collect();
    let allowed: BTreeMap<_, _> = ALLOWED.iter().copied().collect();
    let mut edges = 0;
    for package in packages {
        let name = text(&package["name"]);
        let allowed = allowed.get(name).unwrap_or_else(|| panic!("{name} has no row in the table of layers"));
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let to = text(&dependency["name"]);
            if dependency["kind"] == "dev" || !ours.contains(to) {
                continue;
            }
            edges += 1;
            assert!(allowed.contains(&to), "{name} must not depend on {to}");
        }
    }
    assert!(edges > 10, "only {edges} edges seen");
}

#[test]
fn the_runtime_knows_nothing_of_kubernetes() {
    let metadata = metadata();
    for package in metadata["packages"].as_array().expect("packages") {
        if !["coracle-sys", "coracle-runtime"].contains(&text(&package["name"])) {
            continue;
        }
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let to = text(&dependency["name"]);
            assert!(!["kube", "k8s-openapi", "tokio", "hyper"].contains(&to), "{} depends on {to}", package["name"]);
        }
    }
}

#[test]
fn unsafe_code_is_in_sys_alone() {
    let metadata = metadata();
    for package in metadata["packages"].as_array().expect("packages") {
        // The entry of libFuzzer is a function that C++ calls.
        if ["coracle-sys", "coracle-fuzz"].contains(&text(&package["name"])) {
            continue;
        }
        for target in package["targets"].as_array().expect("targets") {
            let kind = text(&target["kind"][0]);
            if !["lib", "bin"].contains(&kind) {
                continue;
            }
            let path = text(&target["src_path"]);
            let source = std::fs::read_to_string(path).expect("a source file");
            assert!(source.contains("#![forbid(unsafe_code)]"), "{path} does not forbid unsafe code");
        }
    }
}
