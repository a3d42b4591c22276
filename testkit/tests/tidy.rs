//! The house rules that no compiler checks: file length, dead files, left-overs, panics outside tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A source file beyond this is two concepts in one; test files may be longer.
const MAX_LINES: usize = 1_000;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("testkit lies in the workspace").to_path_buf()
}

/// Every Rust source of the workspace that git knows or would add.
fn sources() -> Vec<(PathBuf, String)> {
    let listing = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard", "*.rs"])
        .current_dir(root())
        .output()
        .expect("git starts");
    assert!(listing.status.success(), "git ls-files failed");
    let files: Vec<_> = String::from_utf8(listing.stdout)
        .expect("paths are UTF-8")
        .lines()
        .map(PathBuf::from)
        .filter(|path| root().join(path).exists())
        .map(|path| {
            let text = fs::read_to_string(root().join(&path)).expect("a listed file is readable");
            (path, text)
        })
        .collect();
    assert!(files.len() > 20, "the listing is implausibly short: {} files", files.len());
    files
}

fn is_test(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str() == "tests" || part.as_os_str() == "testkit")
        || path.file_stem().is_some_and(|stem| stem == "tests")
}

/// The text before the unit tests, without comment lines. Unit tests in a file of their own (`mod tests;`) end nothing.
fn product_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut following = text.lines().skip(1);
    text.lines()
        .enumerate()
        .take_while(move |(_, line)| {
            let next = following.next().unwrap_or_default().trim();
            !line.trim_start().starts_with("#[cfg(test)]") || next.ends_with(';')
        })
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
        .map(|(index, line)| (index + 1, line))
}

fn report(broken: &[String], rule: &str) {
    assert!(broken.is_empty(), "{rule}:\n  {}", broken.join("\n  "));
}

#[test]
fn files_hold_one_concept() {
    let long: Vec<_> = sources()
        .iter()
        .filter(|(path, _)| !is_test(path))
        .map(|(path, text)| (path, product_lines(text).last().map_or(0, |(number, _)| number)))
        .filter(|(_, lines)| *lines > MAX_LINES)
        .map(|(path, lines)| format!("{}: {lines} lines", path.display()))
        .collect();
    report(&long, &format!("files of more than {MAX_LINES} lines, tests apart"));
}

#[test]
fn nothing_is_left_behind() {
    // Spelled apart so that this file does not find itself.
    let left_overs = [
        concat!("todo", "!("),
        concat!("unimplemented", "!("),
        concat!("dbg", "!("),
        concat!("FIX", "ME"),
        concat!("XX", "X:"),
    ];
    let broken: Vec<_> = sources()
        .iter()
        .flat_map(|(path, text)| {
            text.lines().enumerate().filter_map(move |(index, line)| {
                left_overs
                    .iter()
                    .find(|word| line.contains(**word))
                    .map(|word| format!("{}:{}: {word}", path.display(), index + 1))
            })
        })
        .collect();
    report(&broken, "unfinished work in the sources");
}

#[test]
fn panics_stay_in_tests() {
    let words = [concat!(".unwr", "ap()"), concat!("panic", "!(\"\")")];
    let broken: Vec<_> = sources()
        .iter()
        // Fuzz targets and the comparison of storage engines are harnesses outside the workspace: they may stop at once.
        .filter(|(path, _)| !is_test(path) && !path.starts_with("fuzz") && !path.starts_with("bench/engines"))
        .filter(|(path, _)| !path.ends_with("build.rs"))
        .flat_map(|(path, text)| {
            product_lines(text)
                .filter(|(_, line)| words.iter().any(|word| line.contains(word)))
                .map(move |(number, line)| format!("{}:{number}: {}", path.display(), line.trim()))
        })
        .collect();
    report(&broken, "unwrap outside tests: return an error, or expect() with the reason why it cannot fail");
}

#[test]
fn lints_are_silenced_with_a_reason() {
    let broken: Vec<_> = sources()
        .iter()
        .flat_map(|(path, text)| {
            let lines: Vec<_> = text.lines().collect();
            (0..lines.len())
                .filter(|&index| {
                    let line = lines[index].trim_start();
                    (line.starts_with("#[allow(") || line.starts_with("#![allow("))
                        && !lines[index..lines.len().min(index + 5)].iter().any(|line| line.contains("reason"))
                })
                .map(|index| format!("{}:{}", path.display(), index + 1))
                .collect::<Vec<_>>()
        })
        .collect();
    report(&broken, "#[allow] without a reason");
}

#[test]
fn every_file_is_part_of_the_build() {
    let files = sources();
    let dead: Vec<_> = files
        .iter()
        .map(|(path, _)| path)
        .filter(|path| {
            let parts: Vec<_> = path.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
            let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
            let entry = ["main", "lib", "build"].contains(&stem.as_str())
                || parts.iter().rev().nth(1).is_some_and(|folder| {
                    ["bin", "tests", "examples", "benches", "fuzz_targets"].contains(&folder.as_str())
                });
            if entry {
                return false;
            }
            let name = if stem == "mod" { parts.iter().rev().nth(1).cloned().unwrap_or_default() } else { stem };
            !files.iter().any(|(_, text)| {
                text.lines().any(|line| {
                    let line = line.trim();
                    line.ends_with(&format!("mod {name};"))
                        || line.ends_with(&format!("mod r#{name};"))
                        || line.ends_with(&format!("mod {name} {{"))
                        || (line.starts_with("#[path") && line.contains(&format!("{name}.rs")))
                })
            })
        })
        .map(|path| path.display().to_string())
        .collect();
    report(&dead, "files that no mod line names");
}
