//! CPU features by the names of `/proc/cpuinfo`: one table for the baselines and for the list of
//! the machine description.

use super::cpuid::Register::{self, Eax, Ebx, Ecx, Edx};

/// When a baseline keeps a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    /// Part of every baseline where the host has it: what kernels use and moves between hosts.
    System,
    /// Required by x86-64-v2 (or v1) of the x86-64 psABI.
    V2,
    /// Required by x86-64-v3.
    V3,
    /// Of mode `host` only.
    Host,
}

/// One feature bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Feature {
    pub(super) name: &'static str,
    pub(super) leaf: u32,
    pub(super) subleaf: u32,
    pub(super) register: Register,
    pub(super) bit: u32,
    pub(super) level: Level,
}

const fn f(
    name: &'static str,
    (leaf, subleaf, register): (u32, u32, Register),
    bit: u32,
    level: Level,
) -> Feature {
    Feature {
        name,
        leaf,
        subleaf,
        register,
        bit,
        level,
    }
}

const L1C: (u32, u32, Register) = (1, 0, Ecx);
const L1D: (u32, u32, Register) = (1, 0, Edx);
const L7B: (u32, u32, Register) = (7, 0, Ebx);
const L7C: (u32, u32, Register) = (7, 0, Ecx);
const L7D: (u32, u32, Register) = (7, 0, Edx);
const LDA: (u32, u32, Register) = (0xd, 1, Eax);
const E1C: (u32, u32, Register) = (0x8000_0001, 0, Ecx);
const E1D: (u32, u32, Register) = (0x8000_0001, 0, Edx);
const E8B: (u32, u32, Register) = (0x8000_0008, 0, Ebx);

use Level::{Host, System, V2, V3};

/// Intel SDM volume 2 (CPUID) and AMD APM volume 3 appendix E.
pub(super) const FEATURES: &[Feature] = &[
    f("sse3", L1C, 0, V2),
    f("pni", L1C, 0, V2),
    f("pclmulqdq", L1C, 1, System),
    f("ssse3", L1C, 9, V2),
    f("fma", L1C, 12, V3),
    f("cx16", L1C, 13, V2),
    f("pcid", L1C, 17, System),
    f("sse4_1", L1C, 19, V2),
    f("sse4_2", L1C, 20, V2),
    f("x2apic", L1C, 21, System),
    f("movbe", L1C, 22, V3),
    f("popcnt", L1C, 23, V2),
    f("tsc_deadline_timer", L1C, 24, System),
    f("aes", L1C, 25, System),
    f("xsave", L1C, 26, V3),
    f("osxsave", L1C, 27, System),
    f("avx", L1C, 28, V3),
    f("f16c", L1C, 29, V3),
    f("rdrand", L1C, 30, System),
    f("hypervisor", L1C, 31, System),
    f("vmx", L1C, 5, Host),
    f("fpu", L1D, 0, V2),
    f("vme", L1D, 1, System),
    f("de", L1D, 2, System),
    f("pse", L1D, 3, System),
    f("tsc", L1D, 4, System),
    f("msr", L1D, 5, System),
    f("pae", L1D, 6, System),
    f("mce", L1D, 7, System),
    f("cx8", L1D, 8, V2),
    f("apic", L1D, 9, System),
    f("sep", L1D, 11, System),
    f("mtrr", L1D, 12, System),
    f("pge", L1D, 13, System),
    f("mca", L1D, 14, System),
    f("cmov", L1D, 15, V2),
    f("pat", L1D, 16, System),
    f("pse36", L1D, 17, System),
    f("clflush", L1D, 19, System),
    f("mmx", L1D, 23, V2),
    f("fxsr", L1D, 24, V2),
    f("sse", L1D, 25, V2),
    f("sse2", L1D, 26, V2),
    f("ht", L1D, 28, System),
    f("fsgsbase", L7B, 0, System),
    f("tsc_adjust", L7B, 1, System),
    f("bmi1", L7B, 3, V3),
    f("hle", L7B, 4, Host),
    f("avx2", L7B, 5, V3),
    f("smep", L7B, 7, System),
    f("bmi2", L7B, 8, V3),
    f("erms", L7B, 9, System),
    f("invpcid", L7B, 10, System),
    f("rtm", L7B, 11, Host),
    f("mpx", L7B, 14, Host),
    f("avx512f", L7B, 16, Host),
    f("avx512dq", L7B, 17, Host),
    f("rdseed", L7B, 18, System),
    f("adx", L7B, 19, Host),
    f("smap", L7B, 20, System),
    f("avx512ifma", L7B, 21, Host),
    f("clflushopt", L7B, 23, System),
    f("clwb", L7B, 24, Host),
    f("avx512cd", L7B, 28, Host),
    f("sha_ni", L7B, 29, Host),
    f("avx512bw", L7B, 30, Host),
    f("avx512vl", L7B, 31, Host),
    f("avx512vbmi", L7C, 1, Host),
    f("umip", L7C, 2, System),
    f("pku", L7C, 3, Host),
    f("ospke", L7C, 4, Host),
    f("avx512_vbmi2", L7C, 6, Host),
    f("gfni", L7C, 8, Host),
    f("vaes", L7C, 9, Host),
    f("vpclmulqdq", L7C, 10, Host),
    f("avx512_vnni", L7C, 11, Host),
    f("avx512_bitalg", L7C, 12, Host),
    f("avx512_vpopcntdq", L7C, 14, Host),
    f("la57", L7C, 16, Host),
    f("rdpid", L7C, 22, Host),
    f("fsrm", L7D, 4, System),
    f("md_clear", L7D, 10, System),
    f("serialize", L7D, 14, Host),
    f("amx_bf16", L7D, 22, Host),
    f("avx512_fp16", L7D, 23, Host),
    f("amx_tile", L7D, 24, Host),
    f("amx_int8", L7D, 25, Host),
    f("spec_ctrl", L7D, 26, System),
    f("stibp", L7D, 27, System),
    f("flush_l1d", L7D, 28, System),
    f("arch_capabilities", L7D, 29, System),
    f("ssbd", L7D, 31, System),
    f("xsaveopt", LDA, 0, System),
    f("xsavec", LDA, 1, System),
    f("xgetbv1", LDA, 2, System),
    f("xsaves", LDA, 3, System),
    f("lahf_lm", E1C, 0, V2),
    f("cmp_legacy", E1C, 1, System),
    f("svm", E1C, 2, Host),
    f("cr8_legacy", E1C, 4, System),
    f("abm", E1C, 5, V3),
    f("lzcnt", E1C, 5, V3),
    f("sse4a", E1C, 6, Host),
    f("misalignsse", E1C, 7, Host),
    f("3dnowprefetch", E1C, 8, System),
    f("osvw", E1C, 9, System),
    f("topoext", E1C, 22, System),
    f("perfctr_core", E1C, 23, Host),
    f("syscall", E1D, 11, V2),
    f("nx", E1D, 20, System),
    f("mmxext", E1D, 22, System),
    f("fxsr_opt", E1D, 25, System),
    f("pdpe1gb", E1D, 26, System),
    f("rdtscp", E1D, 27, System),
    f("lm", E1D, 29, V2),
    f("clzero", E8B, 0, Host),
    f("xsaveerptr", E8B, 2, System),
    f("wbnoinvd", E8B, 9, Host),
    f("ibpb", E8B, 12, System),
    f("ibrs", E8B, 14, System),
    f("amd_ssbd", E8B, 24, System),
    f("virt_ssbd", E8B, 25, System),
];

/// Features that make no sense without another one: (needed, dependent).
pub(super) const DEPENDENT: &[(&str, &[&str])] = &[
    (
        "xsave",
        &[
            "osxsave",
            "avx",
            "xsaveopt",
            "xsavec",
            "xgetbv1",
            "xsaves",
            "pku",
            "ospke",
            "mpx",
            "amx_tile",
            "xsaveerptr",
        ],
    ),
    (
        "avx",
        &["avx2", "fma", "f16c", "vaes", "vpclmulqdq", "avx512f"],
    ),
    (
        "avx512f",
        &[
            "avx512dq",
            "avx512ifma",
            "avx512cd",
            "avx512bw",
            "avx512vl",
            "avx512vbmi",
            "avx512_vbmi2",
            "avx512_vnni",
            "avx512_bitalg",
            "avx512_vpopcntdq",
            "avx512_fp16",
        ],
    ),
    ("amx_tile", &["amx_bf16", "amx_int8"]),
];

/// A feature by name.
pub(super) fn find(name: &str) -> Option<&'static Feature> {
    FEATURES.iter().find(|feature| feature.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_dependents_are_in_the_table() {
        for (index, feature) in FEATURES.iter().enumerate() {
            assert!(feature.bit < 32);
            assert!(
                FEATURES[..index]
                    .iter()
                    .all(|other| other.name != feature.name)
            );
        }
        for (needed, dependents) in DEPENDENT {
            assert!(find(needed).is_some(), "{needed}");
            assert!(
                dependents.iter().all(|name| find(name).is_some()),
                "{needed}"
            );
        }
    }
}
