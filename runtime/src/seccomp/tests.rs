//! The compiled program against the naive reading, over a corpus that proptest makes.

use super::*;
use coracle_sys::seccomp::Instruction;
use oci_spec::runtime::LinuxSeccomp;
use proptest::prelude::*;
use std::collections::HashSet;

/// Runs a program of classic BPF as the kernel would: every jump forward, every load within the data.
fn run(program: &[Instruction], audit: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let mut data = Vec::new();
    data.extend(number.to_ne_bytes());
    data.extend(audit.to_ne_bytes());
    data.extend(0_u64.to_ne_bytes());
    for argument in arguments {
        data.extend(argument.to_ne_bytes());
    }
    let (mut counter, mut accumulator) = (0_usize, 0_u32);
    loop {
        let instruction = program[counter];
        counter += 1;
        let mut branch = |taken: bool| {
            counter += usize::from(if taken { instruction.jump_true } else { instruction.jump_false });
        };
        match instruction.code {
            0x20 => {
                let at = instruction.value as usize;
                accumulator = u32::from_ne_bytes(data[at..at + 4].try_into().expect("four bytes"));
            }
            0x05 => counter += instruction.value as usize,
            0x15 => branch(accumulator == instruction.value),
            0x25 => branch(accumulator > instruction.value),
            0x35 => branch(accumulator >= instruction.value),
            0x54 => accumulator &= instruction.value,
            0x06 => return instruction.value,
            other => panic!("opcode {other:#x}"),
        }
    }
}

fn values() -> impl Strategy<Value = u64> {
    // Values that meet at the seams: equal halves, carries between halves, extremes.
    prop_oneof![
        Just(0_u64),
        Just(1),
        Just(u64::from(u32::MAX)),
        Just(1 << 32),
        Just((1 << 32) + 1),
        Just(u64::MAX),
        Just(u64::MAX - 1),
        0_u64..8,
        any::<u64>(),
    ]
}

fn condition() -> impl Strategy<Value = serde_json::Value> {
    let operators = ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"];
    (0_usize..6, values(), values(), prop::sample::select(operators.to_vec())).prop_map(|(index, value, two, op)| {
        serde_json::json!({"index": index, "value": value, "valueTwo": two & value, "op": format!("SCMP_CMP_{op}")})
    })
}

const NAMES: [&str; 12] = [
    "read",
    "write",
    "open",
    "clone",
    "clone3",
    "socket",
    "mount",
    "waitpid",
    "mmap2",
    "statx",
    "mseal",
    "no_such_call",
];

fn rule() -> impl Strategy<Value = serde_json::Value> {
    let actions = ["ALLOW", "ERRNO", "KILL", "KILL_PROCESS", "KILL_THREAD", "TRAP", "LOG", "TRACE"];
    (
        prop::collection::vec(prop::sample::select(NAMES.to_vec()), 1..4),
        prop::sample::select(actions.to_vec()),
        prop::collection::vec(condition(), 0..4),
        0_u32..4096,
    )
        .prop_map(|(names, action, args, errno)| {
            let mut rule = serde_json::json!({"names": names, "action": format!("SCMP_ACT_{action}"), "args": args});
            if ["ERRNO", "TRACE"].contains(&action) {
                rule["errnoRet"] = errno.into();
            }
            rule
        })
}

fn profile() -> impl Strategy<Value = LinuxSeccomp> {
    let architectures = prop::sample::subsequence(vec!["X86_64", "X86", "X32", "AARCH64", "RISCV64"], 0..=5);
    let defaults = prop::sample::select(vec![
        ("ERRNO", Some(38)),
        ("ERRNO", Some(1)),
        ("TRACE", Some(5)),
        ("ALLOW", None),
        ("KILL", None),
    ]);
    (prop::collection::vec(rule(), 0..12), architectures, defaults).prop_map(|(rules, architectures, default)| {
        serde_json::from_value(serde_json::json!({
            "defaultAction": format!("SCMP_ACT_{}", default.0),
            "defaultErrnoRet": default.1,
            "architectures": architectures.iter().map(|name| format!("SCMP_ARCH_{name}")).collect::<Vec<_>>(),
            "syscalls": rules,
        }))
        .expect("a profile")
    })
}

fn audits() -> impl Strategy<Value = u32> {
    prop::sample::select(vec![0xc000_003e_u32, 0x4000_0003, 0xc000_00b7, 0xc000_00f3, 0xc000_0016])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(160))]

    #[test]
    fn program_answers_what_the_profile_says(
        profile in profile(),
        calls in prop::collection::vec(
            (audits(), prop::sample::select(NAMES.to_vec()), any::<bool>(), -1_i32..2,
             prop::array::uniform6(values())),
            64,
        ),
    ) {
        let filter = compile(&profile).expect("compiles");
        for (audit, name, x32, offset, arguments) in calls {
            // The call itself and its neighbours, also with the x32 bit where it does not belong.
            let number = [Architecture::X86_64, Architecture::X86, Architecture::Aarch64, Architecture::Riscv64]
                .into_iter()
                .find(|architecture| architecture.audit() == audit)
                .and_then(|architecture| architecture.number(name))
                .unwrap_or(7);
            let number = number.wrapping_add_signed(offset) | if x32 { 0x4000_0000 } else { 0 };
            let wanted = naive(&profile, audit, number, arguments).expect("a valid profile");
            prop_assert_eq!(run(&filter.program, audit, number, arguments), wanted);
        }
    }
}

#[test]
fn every_call_of_the_default_profile_has_the_naive_answer() {
    for capabilities in [HashSet::new(), HashSet::from([oci_spec::runtime::Capability::SysAdmin])] {
        let profile = default_profile(&capabilities);
        let filter = compile(&profile).expect("compiles");
        for audit in [0xc000_003e, 0x4000_0003] {
            for number in (0..600).chain(0x4000_0000..0x4000_0260) {
                for arguments in [[0; 6], [40; 6], [0x7e02_0000; 6], [u64::MAX; 6]] {
                    assert_eq!(
                        run(&filter.program, audit, number, arguments),
                        naive(&profile, audit, number, arguments).expect("valid"),
                        "call {number:#x} of {audit:#x}"
                    );
                }
            }
        }
    }
}

#[test]
fn default_profile_refuses_what_reaches_out_and_allows_the_rest() {
    let filter = compile(&default_profile(&HashSet::new())).expect("compiles");
    let answer = |name: &str, first| {
        run(&filter.program, 0xc000_003e, Architecture::X86_64.number(name).expect(name), [first, 0, 0, 0, 0, 0])
    };
    const ALLOW: u32 = 0x7fff_0000;
    for name in ["read", "openat2", "epoll_pwait2", "futex", "clone", "rseq", "pidfd_open", "socket", "personality"] {
        assert_eq!(answer(name, 0), ALLOW, "{name}");
    }
    for name in ["mount", "bpf", "keyctl", "io_uring_setup", "kexec_load", "open_by_handle_at", "setns"] {
        assert_eq!(answer(name, 0), 0x0005_0001, "{name}");
    }
    assert_eq!(answer("clone", 0x1000_0000), 0x0005_0001);
    assert_eq!(answer("clone3", 0), 0x0005_0026);
    assert_eq!(answer("socket", 40), 0x0005_0001);
    assert_eq!(run(&filter.program, 0xc000_003e, 4000, [0; 6]), 0x0005_0026);
}

#[test]
fn numbers_are_sorted_for_the_search() {
    assert!(numbers::NUMBERS.is_sorted_by(|a, b| a.0 < b.0));
}
