//! A virtual machine with Debian's kernel for clouds: the oldest that is supported, with what this host's kernel may lack. It is emulated: a boot takes
//! seconds, a process tens of milliseconds.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::{eventually, need};

/// The root folder of a machine to be: programs, scripts and modules are copied into it, and `boot` runs its `/init`.
pub struct Machine {
    image: PathBuf,
    root: PathBuf,
}

impl Machine {
    /// A machine whose root lies in `folder`, with busybox as its shell.
    ///
    /// # Panics
    /// When this host lacks what a machine needs: a test that needs it must fail, not skip.
    pub fn new(folder: &Path) -> Self {
        let root = folder.join("root");
        let busybox = need("busybox", "busybox-static");
        std::fs::create_dir_all(root.join("bin")).expect("makes");
        std::fs::copy(&busybox, root.join("bin/busybox")).expect("copies");
        std::os::unix::fs::symlink("busybox", root.join("bin/sh")).expect("links");
        Self { image: kernel(), root }
    }

    /// Where its files go.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Copies a program to `/bin`, and the libraries that it loads to the places where it looks for them.
    pub fn add_program(&self, program: &Path, name: &str) {
        let listed = run("ldd", &[&program.display().to_string()], &self.root);
        for library in listed.split_whitespace().filter(|word| word.starts_with('/')) {
            let target = self.root.join(library.trim_start_matches('/').trim_start_matches("usr/"));
            std::fs::create_dir_all(target.parent().expect("a folder")).expect("makes");
            std::fs::copy(library, target).expect("copies");
        }
        std::fs::copy(program, self.root.join("bin").join(name)).expect("copies");
    }

    /// Writes a program of words.
    pub fn add_script(&self, name: &str, text: &str) {
        use std::os::unix::fs::PermissionsExt;
        std::fs::write(self.root.join(name), text).expect("writes");
        std::fs::set_permissions(self.root.join(name), PermissionsExt::from_mode(0o755)).expect("permissions");
    }

    /// The kernel's modules, below `kernel/`.
    pub fn modules(&self) -> PathBuf {
        self.image.parent().and_then(Path::parent).expect("a folder").join("lib/modules").join(self.release())
    }

    /// Copies parts of the modules, for `modprobe` and the kernel to load.
    pub fn add_modules(&self, parts: &[&str]) {
        let target = self.root.join("lib/modules").join(self.release()).join("kernel");
        for part in parts {
            let target = target.join(part);
            std::fs::create_dir_all(target.parent().expect("a folder")).expect("makes");
            let from = self.modules().join("kernel").join(part);
            run("cp", &["-r", &from.display().to_string(), &target.display().to_string()], &self.root);
        }
        std::fs::create_dir_all(self.root.join("sbin")).expect("makes");
        std::os::unix::fs::symlink("/bin/busybox", self.root.join("sbin/modprobe")).expect("links");
        run("busybox", &["depmod", "-b", &self.root.display().to_string(), &self.release()], &self.root);
    }

    fn release(&self) -> String {
        let name = self.image.file_name().expect("a name").to_string_lossy().into_owned();
        name.trim_start_matches("vmlinuz-").to_owned()
    }

    /// Runs it until it is off, and returns what its console said.
    ///
    /// # Panics
    /// When it is not off in time.
    pub fn boot(&self, memory_mib: u32, limit: Duration) -> String {
        let qemu = need("qemu-system-x86_64", "qemu-system-x86");
        let (archive, console) = (self.root.with_file_name("initrd"), self.root.with_file_name("console"));
        let packed = Command::new("sh")
            .args(["-c", "find . | busybox cpio -o -H newc 2>/dev/null | gzip -1"])
            .current_dir(&self.root)
            .stdout(std::fs::File::create(&archive).expect("a file"))
            .status();
        assert!(packed.expect("packs").success());
        let mut machine = Command::new(qemu)
            .args(["-accel", "tcg", "-smp", "2", "-m", &memory_mib.to_string()])
            .args(["-nographic", "-no-reboot", "-nic", "none", "-kernel"])
            .arg(&self.image)
            .arg("-initrd")
            .arg(&archive)
            .args(["-append", "console=ttyS0 quiet panic=-1"])
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&console).expect("a file"))
            .stderr(Stdio::inherit())
            .spawn()
            .expect("the machine starts");
        let ended = eventually(limit, || machine.try_wait().expect("waits"));
        if ended.is_none() {
            machine.kill().expect("kills");
            machine.wait().expect("it ends");
        }
        let text = String::from_utf8_lossy(&std::fs::read(&console).expect("reads")).into_owned();
        if let Some(path) = std::env::var_os("CORACLE_TEST_CONSOLE") {
            std::fs::write(path, &text).expect("writes");
        }
        assert!(ended.is_some(), "the machine did not come to the end: {text}");
        text
    }
}

/// A folder that survives the run, so that packages are fetched once.
fn cache() -> PathBuf {
    let home = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    home.unwrap_or_else(std::env::temp_dir).join("coracle-tests")
}

fn run(program: &str, arguments: &[&str], folder: &Path) -> String {
    let output = Command::new(program).args(arguments).current_dir(folder).output().expect("it runs");
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Debian's kernel for clouds, unpacked but not installed.
fn kernel() -> PathBuf {
    let folder = cache().join("kernel");
    let found = || {
        let entries = std::fs::read_dir(folder.join("boot")).ok()?;
        entries.flatten().map(|entry| entry.path()).find(|path| path.to_string_lossy().contains("vmlinuz"))
    };
    if let Some(image) = found() {
        return image;
    }
    std::fs::create_dir_all(cache()).expect("makes");
    // Several tests may come here at once; the first to finish counts.
    let parts = cache().join(format!("kernel-{}", std::process::id()));
    std::fs::create_dir_all(&parts).expect("makes");
    run("apt-get", &["update", "-qq"], &parts);
    let depends = run("apt-cache", &["depends", "linux-image-cloud-amd64"], &parts);
    let package = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: ")).expect("a kernel").to_string();
    run("apt-get", &["-o", "APT::Sandbox::User=root", "download", &package], &parts);
    let file = std::fs::read_dir(&parts).expect("reads").flatten().next().expect("a package").path();
    let unpacked = parts.join("unpacked");
    run("dpkg", &["-x", &file.display().to_string(), &unpacked.display().to_string()], &parts);
    if let Err(error) = std::fs::rename(&unpacked, &folder) {
        assert!(found().is_some(), "{error}");
    }
    std::fs::remove_dir_all(&parts).expect("removes");
    found().expect("the package has a kernel")
}
