//! Seccomp: from a profile of the specification to a program of classic BPF.

mod compile;
mod numbers;
mod profile;
#[cfg(test)]
mod tests;

pub use compile::{Filter, compile, naive};
pub use profile::default_profile;

/// An architecture on whose system calls a filter can decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    X86_64,
    X86,
    X32,
    Aarch64,
    Riscv64,
}

/// Marks an x32 call among those of x86_64.
const X32_BIT: u32 = 0x4000_0000;

impl Architecture {
    /// The machine that this program was built for.
    #[cfg(target_arch = "x86_64")]
    pub const NATIVE: Self = Self::X86_64;
    #[cfg(target_arch = "aarch64")]
    pub const NATIVE: Self = Self::Aarch64;
    #[cfg(target_arch = "riscv64")]
    pub const NATIVE: Self = Self::Riscv64;

    /// The `AUDIT_ARCH_*` value that the kernel shows to a filter.
    pub fn audit(self) -> u32 {
        match self {
            Self::X86_64 | Self::X32 => 0xc000_003e,
            Self::X86 => 0x4000_0003,
            Self::Aarch64 => 0xc000_00b7,
            Self::Riscv64 => 0xc000_00f3,
        }
    }

    /// The number that the kernel shows to a filter for a call, if this architecture has it.
    pub fn number(self, name: &str) -> Option<u32> {
        let row = numbers::NUMBERS.binary_search_by_key(&name, |(name, _)| name).ok()?;
        let number = u32::try_from(numbers::NUMBERS[row].1[self as usize]).ok()?;
        Some(if self == Self::X32 { number | X32_BIT } else { number })
    }
}

/// Whether any architecture has a call of this name.
pub fn is_known(name: &str) -> bool {
    numbers::NUMBERS.binary_search_by_key(&name, |(name, _)| name).is_ok()
}
