//! A root full of symlinks, then paths to find or make in it: nothing outside the root is found, made or changed. The first
//! byte of a line says what it is: `l NAME TARGET` makes a symlink, `d` and `f` followed by a path a folder or a file.
#![no_main]

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use libfuzzer_sys::fuzz_target;

const MAX_LINES: usize = 32;

fuzz_target!(|data: &[u8]| {
    let outside = tempfile::tempdir().expect("a folder");
    let root = outside.path().join("root");
    std::fs::create_dir(&root).expect("a root");
    let open = std::fs::File::open(&root).expect("a root");
    for line in data.split(|byte| *byte == b'\n').take(MAX_LINES) {
        let Ok(text) = std::str::from_utf8(line) else { continue };
        let Some((kind, rest)) = text.split_once(' ') else { continue };
        match (kind, rest.split_once(' ')) {
            ("l", Some((name, target))) if !name.contains('/') && !matches!(name, "" | "." | "..") => {
                // What is there stays.
                let _ = std::os::unix::fs::symlink(target, root.join(name));
            }
            ("d" | "f", _) => {
                let Ok(path) = CString::new(rest) else { continue };
                if let Ok(place) = coracle_runtime::fuzz::place(open.as_fd(), &path, kind == "f") {
                    let link = format!("/proc/self/fd/{}", place.as_raw_fd());
                    let found = std::fs::read_link(link).expect("a path");
                    assert!(found.starts_with(&root), "{text:?} led to {}", found.display());
                }
            }
            _ => {}
        }
    }
    let names = |folder: &Path| std::fs::read_dir(folder).expect("a folder").count();
    assert_eq!(names(outside.path()), 1, "something was made beside the root");
});
