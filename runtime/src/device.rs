//! Device nodes that every container has, and device rules as a program for the cgroup.

use crate::error::{Error, Result};
use coracle_sys::bpf::Instruction;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

/// Nodes that the specification promises: name below `/dev`, major, minor.
pub(crate) const DEFAULT_NODES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

const MKNOD: u8 = 1;
const READ: u8 = 2;
const WRITE: u8 = 4;
const ALL: u8 = MKNOD | READ | WRITE;

/// A device's number in one word: the minor in as many low bits, the major above.
const MINOR_BITS: u32 = 20;
/// As many devices are compared in a row; a jump has 15 bits for its distance.
const MAX_ROW: usize = 1 << 10;

/// What the kernel calls the two kinds of device (`BPF_DEVCG_DEV_*`).
const BLOCK: u8 = 1;
const CHARACTER: u8 = 2;

/// One rule: the last one that fits a request decides, for each kind of access by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    pub allow: bool,
    /// 1 block, 2 character, `None` both.
    pub kind: Option<u8>,
    pub major: Option<u32>,
    pub minor: Option<u32>,
    /// Sum of 1 make, 2 read, 4 write.
    pub access: u8,
}

impl Rule {
    const fn allow(kind: u8, major: Option<u32>, minor: Option<u32>, access: u8) -> Self {
        Self { allow: true, kind: Some(kind), major, minor, access }
    }

    /// Reads a rule of the specification.
    pub fn parse(rule: &LinuxDeviceCgroup) -> Result<Self> {
        let number = |value: Option<i64>| match value {
            None | Some(-1) => Ok(None),
            Some(value) => u32::try_from(value)
                .map(Some)
                .map_err(|_| Error::config("linux.resources.devices", format!("{value} is not a device number"))),
        };
        let mut access = 0;
        for letter in rule.access().as_deref().unwrap_or("").chars() {
            access |= match letter {
                'm' => MKNOD,
                'r' => READ,
                'w' => WRITE,
                other => {
                    return Err(Error::config("linux.resources.devices.access", format!("{other:?} is not r, w or m")));
                }
            };
        }
        let kind = match rule.typ() {
            None | Some(LinuxDeviceType::A) => None,
            Some(LinuxDeviceType::B) => Some(BLOCK),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
            Some(LinuxDeviceType::P) => {
                return Err(Error::config("linux.resources.devices.type", "a fifo is not subject to device rules"));
            }
        };
        Ok(Self {
            allow: rule.allow(),
            kind,
            major: number(rule.major())?,
            minor: number(rule.minor())?,
            access: if access == 0 { ALL } else { access },
        })
    }

    fn is_total(&self) -> bool {
        self.kind.is_none() && self.major.is_none() && self.minor.is_none() && self.access == ALL
    }

    /// Kind and number of the one device that it allows all of, the number as the kernel puts it into one word.
    fn key(&self) -> Option<(u8, i32)> {
        // A comparison extends the sign of what stands in the instruction.
        const MAJORS: u32 = 1 << (31 - MINOR_BITS);
        match (self.kind, self.major, self.minor) {
            (Some(kind), Some(major), Some(minor)) if major < MAJORS && minor < 1 << MINOR_BITS => {
                (self.allow && self.access == ALL).then_some((kind, (major << MINOR_BITS | minor) as i32))
            }
            _ => None,
        }
    }
}

/// Allowed in every container whatever its rules say: making nodes, and use of the default devices and ptys.
const ALWAYS: [Rule; 10] = [
    Rule { allow: true, kind: None, major: None, minor: None, access: MKNOD },
    Rule::allow(CHARACTER, Some(136), None, ALL),
    // Those that name one device each stand together: see `Rule::key`.
    Rule::allow(CHARACTER, Some(1), Some(3), ALL),
    Rule::allow(CHARACTER, Some(1), Some(8), ALL),
    Rule::allow(CHARACTER, Some(1), Some(7), ALL),
    Rule::allow(CHARACTER, Some(5), Some(0), ALL),
    Rule::allow(CHARACTER, Some(1), Some(5), ALL),
    Rule::allow(CHARACTER, Some(1), Some(9), ALL),
    Rule::allow(CHARACTER, Some(5), Some(2), ALL),
    Rule::allow(CHARACTER, Some(10), Some(200), ALL),
];

/// All rules of a container in order: those of the specification, then the ones that always hold.
pub fn rules(wanted: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>> {
    let mut rules: Vec<Rule> = wanted.iter().map(Rule::parse).collect::<Result<_>>()?;
    rules.extend(ALWAYS);
    Ok(rules)
}

/// The program for these rules, or `None` when they allow everything.
///
/// Rules are looked at from the last to the first; each takes away the kinds of access that it allows, and refuses when
/// it denies one that is still asked for. What remains at the end is refused.
pub fn compile(rules: &[Rule]) -> Option<Vec<Instruction>> {
    if rules.iter().rev().find(|rule| rule.is_total() || !rule.allow).is_some_and(|rule| rule.allow) {
        return None;
    }
    // Registers: 1 context, 2 kind, 3 access still asked for, 4 major, 5 minor, 6 scratch, 7 both numbers, 0 answer.
    let mut program = vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(MOVE, 3, 2, 0, 0),
        instruction(AND_IMMEDIATE, 2, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT_IMMEDIATE, 3, 0, 0, 16),
        instruction(LOAD_WORD, 4, 1, 4, 0),
        instruction(LOAD_WORD, 5, 1, 8, 0),
        instruction(MOVE, 7, 4, 0, 0),
        instruction(SHIFT_LEFT_IMMEDIATE, 7, 0, 0, MINOR_BITS as i32),
        instruction(OR, 7, 5, 0, 0),
    ];
    let mut left = rules;
    while let Some((rule, earlier)) = left.split_last() {
        left = earlier;
        if let Some((kind, key)) = rule.key() {
            // One comparison for each of the neighbours of this kind: each branch is another way for the verifier to go.
            let same = |other: &&Rule| other.key().is_some_and(|(of, _)| of == kind);
            let more: Vec<i32> =
                left.iter().rev().take(MAX_ROW).take_while(same).filter_map(Rule::key).map(|(_, key)| key).collect();
            left = &left[..left.len() - more.len()];
            let count = more.len() as i16;
            program.push(instruction(JUMP_NOT_EQUAL, 2, 0, count + 3, kind.into()));
            program.extend(
                more.iter().zip((1..=count).rev()).map(|(key, distance)| instruction(JUMP_EQUAL, 7, 0, distance, *key)),
            );
            program.push(instruction(JUMP_NOT_EQUAL, 7, 0, 2, key));
            program.extend(answer(true));
            continue;
        }
        if rule.is_total() {
            program.extend(answer(rule.allow));
            return Some(program);
        }
        let mut body = Vec::new();
        if rule.allow && rule.access == ALL {
            // Takes all away that could still be asked for. Said plainly, it spares the verifier two states a rule.
        } else if rule.allow {
            body.push(instruction(AND_IMMEDIATE, 3, 0, 0, i32::from(!rule.access & ALL)));
            body.push(instruction(JUMP_NOT_EQUAL, 3, 0, 2, 0));
        } else {
            body.push(instruction(MOVE, 6, 3, 0, 0));
            body.push(instruction(AND_IMMEDIATE, 6, 0, 0, i32::from(rule.access)));
            body.push(instruction(JUMP_EQUAL, 6, 0, 2, 0));
        }
        body.extend(answer(rule.allow));
        let checks: Vec<(u8, u32)> = [(2, rule.kind.map(u32::from)), (4, rule.major), (5, rule.minor)]
            .into_iter()
            .filter_map(|(register, value)| value.map(|value| (register, value)))
            .collect();
        for (position, (register, value)) in checks.iter().enumerate() {
            let distance = checks.len() - position - 1 + body.len();
            program.push(instruction(JUMP_NOT_EQUAL, *register, 0, distance as i16, *value as i32));
        }
        program.extend(body);
    }
    program.extend(answer(false));
    Some(program)
}

// Opcodes of extended BPF (linux/bpf.h).
const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xbf;
const MOVE_IMMEDIATE: u8 = 0xb7;
const AND_IMMEDIATE: u8 = 0x57;
const OR: u8 = 0x4f;
const SHIFT_LEFT_IMMEDIATE: u8 = 0x67;
const SHIFT_RIGHT_IMMEDIATE: u8 = 0x77;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_NOT_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: destination | source << 4, offset, immediate }
}

fn answer(allow: bool) -> [Instruction; 2] {
    [instruction(MOVE_IMMEDIATE, 0, 0, 0, i32::from(allow)), instruction(EXIT, 0, 0, 0, 0)]
}

/// `st_mode` type bits and number of a device of the specification.
pub(crate) fn node(device: &LinuxDevice) -> Result<(u32, u64)> {
    let kind = match device.typ() {
        LinuxDeviceType::B => libc::S_IFBLK,
        LinuxDeviceType::C | LinuxDeviceType::U => libc::S_IFCHR,
        LinuxDeviceType::P => libc::S_IFIFO,
        LinuxDeviceType::A => {
            return Err(Error::config("linux.devices.type", "one of b, c, u, p is needed to make a device"));
        }
    };
    let part = |value: i64| {
        u32::try_from(value).map_err(|_| Error::config("linux.devices", format!("{value} is not a device number")))
    };
    let number = if kind == libc::S_IFIFO { 0 } else { libc::makedev(part(device.major())?, part(device.minor())?) };
    Ok((kind, number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(program: &[Instruction], kind: u8, access: u8, major: u32, minor: u32) -> bool {
        let context = [u32::from(kind) | u32::from(access) << 16, major, minor];
        let (mut registers, mut counter) = ([0_u64; 11], 0_usize);
        loop {
            let now = program[counter];
            counter += 1;
            let (to, from) = (usize::from(now.registers & 15), usize::from(now.registers >> 4));
            let immediate = i64::from(now.immediate) as u64;
            match now.code {
                LOAD_WORD => registers[to] = context[now.offset as usize / 4].into(),
                MOVE => registers[to] = registers[from],
                MOVE_IMMEDIATE => registers[to] = immediate,
                AND_IMMEDIATE => registers[to] &= immediate,
                OR => registers[to] |= registers[from],
                SHIFT_LEFT_IMMEDIATE => registers[to] <<= immediate,
                SHIFT_RIGHT_IMMEDIATE => registers[to] >>= immediate,
                JUMP_EQUAL if registers[to] == immediate => counter += now.offset as usize,
                JUMP_NOT_EQUAL if registers[to] != immediate => counter += now.offset as usize,
                JUMP_EQUAL | JUMP_NOT_EQUAL => {}
                EXIT => return registers[0] != 0,
                other => panic!("opcode {other:#x}"),
            }
        }
    }

    /// Each kind of access asked for must be allowed by the last rule that speaks of it.
    fn naive(rules: &[Rule], kind: u8, access: u8, major: u32, minor: u32) -> bool {
        [MKNOD, READ, WRITE].into_iter().filter(|bit| access & bit != 0).all(|bit| {
            rules
                .iter()
                .rfind(|rule| {
                    rule.access & bit != 0
                        && rule.kind.is_none_or(|wanted| wanted == kind)
                        && rule.major.is_none_or(|wanted| wanted == major)
                        && rule.minor.is_none_or(|wanted| wanted == minor)
                })
                .is_some_and(|rule| rule.allow)
        })
    }

    fn rule() -> impl Strategy<Value = Rule> {
        let small = || prop::option::of(0_u32..3);
        (any::<bool>(), prop::option::of(1_u8..3), small(), small(), 1_u8..8)
            .prop_map(|(allow, kind, major, minor, access)| Rule { allow, kind, major, minor, access })
    }

    proptest! {
        #[test]
        fn program_decides_as_the_last_fitting_rule(rules in prop::collection::vec(rule(), 0..8)) {
            let program = compile(&rules);
            for kind in [BLOCK, CHARACTER] {
                for access in 1..8 {
                    for (major, minor) in (0..4).flat_map(|major| (0..4).map(move |minor| (major, minor))) {
                        let wanted = naive(&rules, kind, access, major, minor);
                        let got = program.as_ref().is_none_or(|program| run(program, kind, access, major, minor));
                        prop_assert_eq!(got, wanted, "{} {} {}:{}", kind, access, major, minor);
                    }
                }
            }
        }
    }
}
