//! The floor under every runtime: clones the namespaces of a container, enters a root, mounts the least that programs
//! need, executes and waits. `floor ROOT PROGRAM`
#![forbid(unsafe_code)]

use std::ffi::CString;
use std::os::fd::AsFd;

use coracle_sys::mount::{self, Attributes, Context};
use coracle_sys::process::{self, CloneRequest, StringArray};
use coracle_sys::{Result, path};

const FAILED: i32 = 126;

fn main() {
    let words: Vec<_> = std::env::args().skip(1).filter_map(|word| CString::new(word).ok()).collect();
    let [root, program] = words.as_slice() else {
        eprintln!("usage: floor ROOT PROGRAM");
        std::process::exit(FAILED);
    };
    let (arguments, environment) = (StringArray::new(vec![program.clone()]), StringArray::new(Vec::new()));
    let enter = || -> Result<()> {
        let top = path::open(c"/", libc::O_PATH | libc::O_DIRECTORY)?;
        let private = Attributes { propagation: libc::MS_PRIVATE, ..Attributes::default() };
        mount::set_attributes(top.as_fd(), &private, true)?;
        let tree = mount::clone_tree(None, root, true)?;
        mount::attach(tree.as_fd(), top.as_fd())?;
        path::fchdir(tree.as_fd())?;
        mount::pivot_to_cwd()?;
        mount::detach(c".")?;
        for (kind, place) in [(c"proc", c"/proc"), (c"tmpfs", c"/dev")] {
            let place = path::open(place, libc::O_PATH | libc::O_DIRECTORY)?;
            mount::attach(Context::new(kind)?.mount(0)?.as_fd(), place.as_fd())?;
        }
        Ok(())
    };
    let flags = libc::CLONE_NEWPID
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    let ended = process::clone3(CloneRequest { flags: flags as u64, cgroup: None }, || {
        if enter().is_ok() {
            process::execve(program, &arguments, &environment);
        }
        FAILED
    })
    .and_then(|child| process::wait(child.pidfd.as_fd(), true));
    std::process::exit(match ended {
        Ok(exit) => exit.map_or(FAILED, process::Exit::code),
        Err(errno) => {
            eprintln!("floor: {errno}");
            FAILED
        }
    });
}
