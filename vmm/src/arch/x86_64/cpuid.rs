//! What CPUID tells the guest: the host's answers as KVM supports them, cut to a baseline or by
//! name, with the topology of the machine (Intel SDM volume 2, CPUID; AMD APM volume 3 appendix E;
//! `Documentation/virt/kvm/x86/cpuid.rst`).

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use pericarp_protocol::machine::CpuMode;

use super::{
    features::{DEPENDENT, FEATURES, Feature, Level, find},
    machine::KvmError,
};

/// A register of a CPUID answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Why there is no CPU to show.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CpuidError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The list names what the table does not know.
    #[error("Machine.cpu_features: {0:?} is no '+' or '-' with the name of a CPU feature")]
    Unknown(String),
    /// The host cannot do it.
    #[error("Machine.cpu_features: this host cannot give {0}")]
    NotSupported(&'static str),
    /// The host is below the baseline.
    #[error("Machine.cpu: this host lacks {0}, which the baseline requires")]
    BelowBaseline(&'static str),
}

/// Answers common to all vCPUs of a machine.
#[derive(Debug, Clone)]
pub(crate) struct Template {
    entries: Vec<kvm_cpuid_entry2>,
    vcpus: u32,
}

/// Makes the common answers.
pub(crate) fn template(
    kvm: &Kvm,
    mode: CpuMode,
    list: &str,
    vcpus: u16,
) -> Result<Template, CpuidError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmError::at("supported CPUID"))?;
    let mut template = Template {
        entries: supported.as_slice().to_vec(),
        vcpus: u32::from(vcpus),
    };
    // KVM leaves these two to us: both are emulated by its local APIC.
    template.give("tsc_deadline_timer");
    template.give("x2apic");
    template.give("hypervisor");
    let host = template.clone();
    template.cut(mode)?;
    template.apply(&host, list)?;
    template.hide_performance_counters();
    // No range register says anything here, all memory being write-back; a kernel that sees none
    // reads none of the 35, over and over. PAT does not depend on them.
    template.take("mtrr");
    Ok(template)
}

impl Template {
    fn register(&mut self, feature: &Feature) -> Option<&mut u32> {
        let entry = self
            .entries
            .iter_mut()
            .find(|e| e.function == feature.leaf && e.index == feature.subleaf)?;
        Some(match feature.register {
            Register::Eax => &mut entry.eax,
            Register::Ebx => &mut entry.ebx,
            Register::Ecx => &mut entry.ecx,
            Register::Edx => &mut entry.edx,
        })
    }

    fn has(&mut self, feature: &Feature) -> bool {
        self.register(feature)
            .is_some_and(|value| *value >> feature.bit & 1 == 1)
    }

    fn give(&mut self, name: &str) {
        let feature = find(name).expect("a name of the table");
        if let Some(value) = self.register(feature) {
            *value |= 1 << feature.bit;
        }
    }

    fn take(&mut self, name: &str) {
        let feature = find(name).expect("a name of the table");
        if let Some(value) = self.register(feature) {
            *value &= !(1 << feature.bit);
        }
        let dependents = DEPENDENT.iter().find(|(needed, _)| *needed == name);
        for dependent in dependents.map_or(&[][..], |(_, names)| names) {
            self.take(dependent);
        }
        if name == "xsave" {
            // Without the instruction its state components are nowhere to be kept.
            for entry in self.entries.iter_mut().filter(|e| e.function == 0xd) {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
        }
    }

    /// Cuts the feature words of the table to what a baseline has.
    fn cut(&mut self, mode: CpuMode) -> Result<(), CpuidError> {
        let keep = match mode {
            CpuMode::Host => return Ok(()),
            CpuMode::BaselineV2 => Level::V2,
            CpuMode::BaselineV3 => Level::V3,
        };
        for feature in FEATURES {
            let required = feature.level != Level::System && feature.level <= keep;
            if required && !self.has(feature) {
                return Err(CpuidError::BelowBaseline(feature.name));
            }
        }
        for feature in FEATURES {
            let mut mask = 0;
            for other in FEATURES
                .iter()
                .filter(|o| same_word(o, feature) && o.level <= keep)
            {
                mask |= 1 << other.bit;
            }
            if let Some(value) = self.register(feature) {
                *value &= mask;
            }
        }
        if keep < Level::V3 {
            self.take("xsave");
        }
        Ok(())
    }

    /// Applies a list such as `-xsave,+avx2`.
    fn apply(&mut self, host: &Self, list: &str) -> Result<(), CpuidError> {
        for item in list
            .split(',')
            .map(str::trim)
            .filter(|item| !item.is_empty())
        {
            let unknown = || CpuidError::Unknown(item.to_owned());
            let (sign, name) = item.split_at_checked(1).ok_or_else(unknown)?;
            let feature = find(name).ok_or_else(unknown)?;
            match sign {
                "-" => self.take(feature.name),
                "+" if host.clone().has(feature) => self.give(feature.name),
                "+" => return Err(CpuidError::NotSupported(feature.name)),
                _ => return Err(unknown()),
            }
        }
        Ok(())
    }

    /// Performance counters would let a pod watch its neighbours, and their absence is what a
    /// kernel expects of a guest.
    fn hide_performance_counters(&mut self) {
        const COUNTERS: [u32; 3] = [0xa, 0x8000_0022, 0x23];
        for entry in self
            .entries
            .iter_mut()
            .filter(|e| COUNTERS.contains(&e.function))
        {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        self.take("perfctr_core");
    }

    /// The answers of one vCPU.
    pub(crate) fn of_vcpu(&self, id: u16) -> Result<CpuId, KvmError> {
        let mut entries = self.entries.clone();
        // Replaced below by ours, whatever levels the host has.
        entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f | 0x8000_0026));
        for entry in &mut entries {
            self.set_topology(entry, u32::from(id));
        }
        entries.extend(self.extended_topology(u32::from(id)));
        CpuId::from_entries(&entries).map_err(|_| KvmError {
            step: "CPUID entries",
            source: kvm_ioctls::Error::new(libc::E2BIG),
        })
    }

    /// Bits of an APIC id that number cores.
    fn core_bits(&self) -> u32 {
        self.vcpus.next_power_of_two().trailing_zeros()
    }

    fn set_topology(&self, entry: &mut kvm_cpuid_entry2, id: u32) {
        let others = self.vcpus - 1;
        match entry.function {
            1 => {
                let addressable = self.vcpus.next_power_of_two().min(0xff);
                entry.ebx = entry.ebx & 0xffff | addressable << 16 | (id & 0xff) << 24;
                entry.edx = entry.edx & !(1 << 28) | u32::from(others > 0) << 28;
            }
            // Deterministic cache parameters: the last level is shared by all, the others by none.
            4 if entry.eax & 0x1f != 0 => {
                entry.eax = entry.eax & 0x3fff | others.min(0x3f) << 26 | self.sharing(entry) << 14;
            }
            0x8000_001d if entry.eax & 0x1f != 0 => {
                entry.eax = entry.eax & 0x3fff | self.sharing(entry) << 14;
            }
            0x8000_0008 => {
                entry.ecx = entry.ecx & !0xf0ff | others.min(0xff) | self.core_bits() << 12;
            }
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = id & 0xff; // one thread a core
                entry.ecx = 0; // one node
            }
            _ => {}
        }
    }

    /// Number of other vCPUs that share a cache, as the leaf wants it.
    fn sharing(&self, entry: &kvm_cpuid_entry2) -> u32 {
        let level = entry.eax >> 5 & 7;
        if level >= 3 {
            (self.vcpus - 1).min(0xfff)
        } else {
            0
        }
    }

    /// Leaf 0xb: one thread a core, all cores in one package.
    fn extended_topology(&self, id: u32) -> [kvm_cpuid_entry2; 3] {
        const SIGNIFICANT_INDEX: u32 = 1;
        let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: SIGNIFICANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: index | kind << 8,
            edx: id,
            ..Default::default()
        };
        [
            level(0, 0, 1, 1),
            level(1, self.core_bits(), self.vcpus, 2),
            level(2, 0, 0, 0),
        ]
    }
}

fn same_word(left: &Feature, right: &Feature) -> bool {
    (left.leaf, left.subleaf, left.register) == (right.leaf, right.subleaf, right.register)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Template {
        let entry = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        let leaves = [
            (1, 0),
            (7, 0),
            (0xd, 0),
            (0xd, 1),
            (0x8000_0001, 0),
            (0x8000_0008, 0),
        ];
        Template {
            entries: leaves
                .map(|(function, index)| entry(function, index))
                .to_vec(),
            vcpus: 6,
        }
    }

    fn has(template: &mut Template, name: &str) -> bool {
        template.has(find(name).unwrap())
    }

    #[test]
    fn taking_xsave_takes_what_needs_it() {
        let mut template = full();
        template.apply(&full(), "-xsave").unwrap();
        for name in ["xsave", "avx", "avx2", "avx512bw", "amx_int8", "xsaves"] {
            assert!(!has(&mut template, name), "{name}");
        }
        assert!(has(&mut template, "sse4_2"));
    }

    #[test]
    fn baselines_are_nested() {
        let (mut v2, mut v3) = (full(), full());
        v2.cut(CpuMode::BaselineV2).unwrap();
        v3.cut(CpuMode::BaselineV3).unwrap();
        assert!(has(&mut v2, "popcnt") && has(&mut v2, "nx") && !has(&mut v2, "avx2"));
        assert!(has(&mut v3, "avx2") && has(&mut v3, "xsave") && !has(&mut v3, "avx512f"));
        assert!(!has(&mut v3, "svm"));
    }

    #[test]
    fn refusals_name_the_field_and_the_feature() {
        let mut poor = full();
        poor.take("popcnt");
        let below = poor.cut(CpuMode::BaselineV2).unwrap_err().to_string();
        assert!(
            below.starts_with("Machine.cpu: ") && below.contains("popcnt"),
            "{below}"
        );
        for list in ["xsave", "+nonsense", "-", "*avx"] {
            let error = full().apply(&full(), list).unwrap_err().to_string();
            assert!(error.starts_with("Machine.cpu_features: "), "{error}");
        }
        let host = poor.clone();
        assert!(matches!(
            poor.apply(&host, "+popcnt"),
            Err(CpuidError::NotSupported("popcnt"))
        ));
    }

    #[test]
    fn each_vcpu_has_its_id_and_the_same_package() {
        let template = full();
        for id in 0..6_u16 {
            let cpuid = template.of_vcpu(id).unwrap();
            let entries = cpuid.as_slice();
            let leaf = entries.iter().find(|e| e.function == 1).unwrap();
            assert_eq!(leaf.ebx >> 24, u32::from(id));
            let cores = entries
                .iter()
                .find(|e| e.function == 0xb && e.index == 1)
                .unwrap();
            assert_eq!((cores.eax, cores.ebx, cores.edx), (3, 6, u32::from(id)));
        }
    }
}
