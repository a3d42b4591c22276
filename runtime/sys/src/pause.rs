//! The smallest possible first process of a PID namespace: it lets the kernel reap its orphans and sleeps for ever.
//!
//! A program of its own, because a fork of ours would show its memory and its files to the containers of the pod.

use std::arch::global_asm;

#[cfg(target_arch = "x86_64")]
global_asm!(
    ".pushsection .rodata.coracle_pause, \"a\", @progbits",
    ".balign 8",
    ".globl coracle_pause_start",
    ".globl coracle_pause_end",
    "coracle_pause_start:",
    // rt_sigaction(SIGCHLD, SIG_IGN): whose parent ignores SIGCHLD is reaped by the kernel (sigaction(2)).
    "mov eax, 13",
    "mov edi, 17",
    "lea rsi, [rip + 3f]",
    "xor edx, edx",
    "mov r10d, 8",
    "syscall",
    "2:",
    "mov eax, 34",
    "syscall",
    "jmp 2b",
    ".balign 8",
    // struct kernel_sigaction: handler SIG_IGN, no flags, no restorer, empty mask.
    "3: .quad 1, 0, 0, 0",
    "coracle_pause_end:",
    ".popsection",
);

#[cfg(target_arch = "aarch64")]
global_asm!(
    ".pushsection .rodata.coracle_pause, \"a\", @progbits",
    ".balign 8",
    ".globl coracle_pause_start",
    ".globl coracle_pause_end",
    "coracle_pause_start:",
    "mov x8, #134",
    "mov x0, #17",
    "adr x1, 3f",
    "mov x2, #0",
    "mov x3, #8",
    "svc #0",
    "2:",
    // ppoll of nothing without a time limit: there is no pause(2) here.
    "mov x8, #73",
    "mov x0, #0",
    "mov x1, #0",
    "mov x2, #0",
    "mov x3, #0",
    "mov x4, #8",
    "svc #0",
    "b 2b",
    ".balign 8",
    "3: .quad 1, 0, 0, 0",
    "coracle_pause_end:",
    ".popsection",
);

unsafe extern "C" {
    static coracle_pause_start: u8;
    static coracle_pause_end: u8;
}

/// `e_machine` of this build.
const MACHINE: u16 = if cfg!(target_arch = "aarch64") { 183 } else { 62 };
/// Where the program is loaded: anywhere above `mmap_min_addr`.
const BASE: u64 = 0x40_0000;
/// Bytes of the ELF header and its one program header (`elf(5)`).
const HEADERS: u64 = 64 + 56;

/// The program as the content of an executable file.
pub fn program() -> Vec<u8> {
    // SAFETY: both symbols are defined above in one section, the second behind the first; what is between is never written.
    let code = unsafe {
        let start = &raw const coracle_pause_start;
        let end = &raw const coracle_pause_end;
        std::slice::from_raw_parts(start, end as usize - start as usize)
    };
    let size = HEADERS + code.len() as u64;
    let mut file = Vec::with_capacity(size as usize);
    // 64 bits, little endian, version 1.
    file.extend([0x7f, b'E', b'L', b'F', 2, 1, 1]);
    file.resize(16, 0);
    for half in [2, MACHINE] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1_u32.to_le_bytes());
    for word in [BASE + HEADERS, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    // PT_LOAD, readable and executable.
    for half in [1_u32, 5] {
        file.extend(half.to_le_bytes());
    }
    for word in [0, BASE, BASE, size, size, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    file.extend_from_slice(code);
    file
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn it_runs_until_it_is_killed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("pause");
        std::fs::write(&path, super::program()).expect("write");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("mode");
        let mut child = std::process::Command::new(&path).spawn().expect("the kernel takes the file");
        let ignores_children = || {
            let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
            let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).unwrap_or("0");
            u64::from_str_radix(ignored, 16).is_ok_and(|mask| mask & (1 << 16) != 0)
        };
        let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !ignores_children() && std::time::Instant::now() < end {
            std::thread::yield_now();
        }
        assert!(ignores_children(), "SIGCHLD is not ignored");
        assert!(child.try_wait().expect("wait").is_none(), "it ended by itself");
        child.kill().expect("kill");
        child.wait().expect("wait");
    }
}
