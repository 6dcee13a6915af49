//! Names of capabilities to bit masks.

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};
use serde::{Deserialize, Serialize};

/// The five sets of capabilities(7), bit n standing for capability number n.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::container) struct CapabilitySets {
    pub(in crate::container) bounding: u64,
    pub(in crate::container) effective: u64,
    pub(in crate::container) inheritable: u64,
    pub(in crate::container) permitted: u64,
    pub(in crate::container) ambient: u64,
}

/// The sets of `process.capabilities`; a process without them gets none at all, as in runc.
pub(super) fn of(capabilities: Option<&LinuxCapabilities>) -> CapabilitySets {
    let Some(capabilities) = capabilities else {
        return CapabilitySets::default();
    };
    CapabilitySets {
        bounding: mask(capabilities.bounding().as_ref()),
        effective: mask(capabilities.effective().as_ref()),
        inheritable: mask(capabilities.inheritable().as_ref()),
        permitted: mask(capabilities.permitted().as_ref()),
        ambient: mask(capabilities.ambient().as_ref()),
    }
}

fn mask(set: Option<&Capabilities>) -> u64 {
    set.into_iter()
        .flatten()
        .fold(0, |mask, capability| mask | 1 << number(*capability))
}

/// uapi/linux/capability.h.
fn number(capability: Capability) -> u32 {
    match capability {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}

/// `CAP_SYS_ADMIN`, which a process without `no_new_privs` needs to install a system call filter.
pub(in crate::container) const SYS_ADMIN: u64 = 1 << 21;
