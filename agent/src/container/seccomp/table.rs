//! System call numbers by name, per architecture.

use std::{env, str::FromStr};

/// An instruction set whose system calls a filter tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    X86_64,
    X86,
    /// Programs with 32-bit pointers on x86-64; the kernel marks their calls by a bit in the
    /// number.
    X32,
    Aarch64,
    Arm,
}

/// `__X32_SYSCALL_BIT` of uapi/asm/unistd.h.
pub(super) const X32_BIT: u32 = 0x4000_0000;

impl Architecture {
    /// That of this guest.
    pub(super) fn native() -> Self {
        match env::consts::ARCH {
            "aarch64" => Self::Aarch64,
            _ => Self::X86_64,
        }
    }

    /// `AUDIT_ARCH_*` of uapi/linux/audit.h.
    pub(super) fn audit(self) -> u32 {
        match self {
            Self::X86_64 | Self::X32 => 0xc000_003e,
            Self::X86 => 0x4000_0003,
            Self::Aarch64 => 0xc000_00b7,
            Self::Arm => 0x4000_0028,
        }
    }

    /// The number of the system call `name`, if there is one here.
    pub(super) fn number(self, name: &str) -> Option<u32> {
        let number = match self {
            Self::X86_64 | Self::X32 => of::<syscalls::x86_64::Sysno>(name)?.id(),
            Self::X86 => of::<syscalls::x86::Sysno>(name)?.id(),
            Self::Aarch64 => of::<syscalls::aarch64::Sysno>(name)?.id(),
            Self::Arm => of::<syscalls::arm::Sysno>(name)?.id(),
        };
        let number = u32::try_from(number).ok()?;
        // x32 numbers the calls that differ from x86-64 by themselves; profiles name the common
        // ones, which carry the bit.
        Some(if self == Self::X32 {
            number | X32_BIT
        } else {
            number
        })
    }
}

fn of<T: FromStr>(name: &str) -> Option<T> {
    name.parse().ok()
}
