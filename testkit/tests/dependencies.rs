//! What we build on: licences that an Apache-2.0 product may carry, and one version of each library.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

/// Licences that may be linked into an Apache-2.0 binary.
const LICENCES: &[&str] = &[
    "Apache-2.0",
    "MIT",
    "MIT-0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "0BSD",
    "BSL-1.0",
    "Unlicense",
    "CC0-1.0",
    "Unicode-3.0",
    "MPL-2.0",
    "CDLA-Permissive-2.0",
    "Apache-2.0 WITH LLVM-exception",
];

/// Libraries of which two versions are linked, each with the one that holds the older back.
const DUPLICATES: &[(&str, &str)] = include!("duplicates.in");

fn packages() -> Vec<serde_json::Value> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("testkit lies in the workspace");
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--offline", "--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(root)
        .output()
        .expect("cargo starts");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let resolved: BTreeSet<String> = metadata["resolve"]["nodes"]
        .as_array()
        .expect("nodes")
        .iter()
        .map(|node| node["id"].as_str().expect("an id").to_owned())
        .collect();
    metadata["packages"]
        .as_array()
        .expect("packages")
        .iter()
        .filter(|package| resolved.contains(package["id"].as_str().expect("an id")))
        .cloned()
        .collect()
}

/// Whether an SPDX expression can be satisfied by the allowed licences: `OR` needs one side, `AND` both.
fn satisfiable(expression: &str) -> bool {
    let expression = expression.replace('/', " OR ").replace(['(', ')'], "");
    expression.split(" OR ").any(|side| side.split(" AND ").all(|licence| LICENCES.contains(&licence.trim())))
}

#[test]
fn licences_allow_what_we_do() {
    let packages = packages();
    assert!(packages.len() > 100, "only {} packages seen", packages.len());
    for package in packages {
        let licence = package["license"].as_str().unwrap_or("none");
        assert!(satisfiable(licence), "{} has licence {licence}", package["name"]);
    }
}

#[test]
fn one_version_of_each_library() {
    let mut versions: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in packages() {
        let name = package["name"].as_str().expect("a name").to_owned();
        versions.entry(name).or_default().insert(package["version"].as_str().expect("a version").to_owned());
    }
    let known: BTreeSet<_> = DUPLICATES.iter().map(|(name, _)| *name).collect();
    let several: BTreeSet<_> =
        versions.iter().filter(|(_, versions)| versions.len() > 1).map(|(name, _)| name.as_str()).collect();
    let new: Vec<_> = several.difference(&known).collect();
    assert!(
        new.is_empty(),
        "two versions of {new:?}: unify them, or add a row that names what holds the older one back"
    );
    let gone: Vec<_> = known.difference(&several).collect();
    assert!(gone.is_empty(), "{gone:?} have one version now: remove their rows");
}

#[test]
fn licence_expressions_are_read_right() {
    assert!(satisfiable("MIT OR GPL-3.0"));
    assert!(satisfiable("MIT/Apache-2.0"));
    assert!(satisfiable("(MIT OR Apache-2.0) AND Unicode-3.0"));
    assert!(!satisfiable("GPL-3.0-only"));
    assert!(!satisfiable("MIT AND GPL-3.0-only"));
}
