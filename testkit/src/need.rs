//! Programs that tests run against: found on the PATH, or installed from Debian's packages.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

/// apt allows one run at a time; tests of one process take turns here, those of several at apt's own lock.
static APT: Mutex<()> = Mutex::new(());

/// Seconds that apt waits for another run of it to finish.
const APT_LOCK_WAIT_S: u32 = 300;

/// The path of `program`, installed from the Debian package `package` if it is missing.
///
/// # Panics
/// When the package cannot be installed: a test that needs it must fail, not skip.
pub fn need(program: &str, package: &str) -> PathBuf {
    if let Some(path) = find(program) {
        return path;
    }
    let _turn = APT.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if find(program).is_none() {
        apt(&["update", "-qq"]);
        apt(&["install", "-y", "-qq", "--no-install-recommends", package]);
    }
    find(program).unwrap_or_else(|| panic!("package {package} is installed but has no program {program}"))
}

pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}

fn apt(arguments: &[&str]) {
    let output = Command::new("apt-get")
        .args(["-o", &format!("DPkg::Lock::Timeout={APT_LOCK_WAIT_S}")])
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .output()
        .expect("apt-get starts");
    assert!(output.status.success(), "apt-get {arguments:?} failed: {}", String::from_utf8_lossy(&output.stderr));
}
