//! Where `corun` begins, ahead of the C library.
//!
//! A command that starts a process in a container runs from a mount of its own file that cannot be written to, for which
//! it executes itself once more. Starting the C library is the dearest part of a short program (in a virtual machine each
//! `cpuid` of it is a trip to the hypervisor), so that is done before: this way it starts once. Nothing of the library may
//! be used here: it is not relocated, and thread-local storage does not exist. What fails here is left to the program
//! itself, which looks again and has a way for every kernel.

use core::arch::{asm, naked_asm};

/// The commands that start a process in a container; as flags' values they do no harm.
const COMMANDS: [u64; 3] = [word(b"run"), word(b"create"), word(b"exec")];

const fn word(text: &[u8]) -> u64 {
    let (mut value, mut at) = (0, text.len());
    while at > 0 {
        at -= 1;
        value = value << 8 | text[at] as u64;
    }
    value
}

/// The entry point of the program (`build.rs` of the runtime names it to the linker).
///
/// # Safety
/// For the kernel alone: it expects the stack of a new program (System V ABI, process initialisation).
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn coracle_entry() -> ! {
    // The C library's own entry needs the stack pointer and rdx as the kernel left them.
    naked_asm!(
        "mov rbx, rsp",
        "mov r12, rdx",
        "mov rdi, rsp",
        "and rsp, -16",
        "call {reexecute}",
        "mov rsp, rbx",
        "mov rdx, r12",
        "xor ebx, ebx",
        "xor r12d, r12d",
        "jmp _start",
        reexecute = sym reexecute,
    )
}

/// One argument of up to seven bytes; longer ones are no command.
///
/// # Safety
/// `text` points to a string that ends with a null byte.
unsafe fn argument(text: *const u8) -> u64 {
    let (mut value, mut at) = (0, 0);
    while at < 8 {
        // SAFETY: not beyond the null byte. Volatile, lest the compiler make a call of the C library of it.
        let byte = unsafe { text.wrapping_add(at).read_volatile() };
        if byte == 0 {
            return value;
        }
        value |= u64::from(byte) << (8 * at);
        at += 1;
    }
    0
}

/// # Safety
/// `stack` is the initial stack: the number of arguments, the arguments, a null, the environment, a null.
unsafe extern "C" fn reexecute(stack: *const usize) {
    // SAFETY: by contract.
    let (count, arguments) = unsafe { (*stack, stack.wrapping_add(1)) };
    let mut wanted = false;
    let mut at = 1;
    while at < count {
        // SAFETY: one of the arguments, which are strings.
        let value = unsafe { argument(*arguments.wrapping_add(at) as *const u8) };
        wanted |= value == COMMANDS[0] || value == COMMANDS[1] || value == COMMANDS[2];
        at += 1;
    }
    if !wanted {
        return;
    }
    const OPEN_TREE_CLONE: usize = 1;
    let (here, own) = (libc::AT_FDCWD as usize, c"/proc/self/exe".as_ptr() as usize);
    let mut about = core::mem::MaybeUninit::<libc::statfs64>::uninit();
    // SAFETY: the kernel reads a string and fills the structure.
    if unsafe { call(libc::SYS_statfs, [own, about.as_mut_ptr() as usize, 0, 0, 0]) } < 0 {
        return;
    }
    // SAFETY: filled above.
    if unsafe { about.assume_init_ref() }.f_flags as u64 & libc::ST_RDONLY != 0 {
        return;
    }
    // SAFETY: reads a string and makes a descriptor.
    let tree = unsafe { call(libc::SYS_open_tree, [here, own, OPEN_TREE_CLONE, 0, 0]) };
    if tree < 0 {
        return;
    }
    let readonly = [crate::mount::MOUNT_ATTR_RDONLY, 0, 0, 0];
    let (tree, empty) = (tree as usize, c"".as_ptr() as usize);
    let (at_empty, size) = (libc::AT_EMPTY_PATH as usize, size_of_val(&readonly));
    // SAFETY: reads a string and a `struct mount_attr` of this size.
    let sealed =
        unsafe { call(libc::SYS_mount_setattr, [tree, empty, at_empty, readonly.as_ptr() as usize, size]) } == 0;
    // A caller without standard streams would find the mount in their place.
    if sealed && tree > libc::STDERR_FILENO as usize {
        let environment = arguments.wrapping_add(count + 1);
        // SAFETY: both arrays are as the kernel made them. Returns only when it could not.
        unsafe { call(libc::SYS_execveat, [tree, empty, arguments as usize, environment as usize, at_empty]) };
    }
    // SAFETY: the descriptor made above.
    unsafe { call(libc::SYS_close, [tree, 0, 0, 0, 0]) };
}

/// A system call without the C library, whose wrapper keeps `errno` in thread-local storage.
///
/// # Safety
/// That of the system call.
unsafe fn call(number: libc::c_long, arguments: [usize; 5]) -> isize {
    let answer: isize;
    // SAFETY: the kernel's calling convention; it clobbers rcx and r11 only.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => answer,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            in("r8") arguments[4],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    answer
}
