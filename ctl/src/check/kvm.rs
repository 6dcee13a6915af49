//! Processor and KVM.

use kvm_ioctls::{Cap, Kvm};

use super::Host;
use super::finding::Report;

const DEVICE: &str = "/dev/kvm";
/// KVM_GET_API_VERSION has answered 12 since Linux 2.6.22 and never will answer another
/// (Documentation/virt/kvm/api.rst, 4.1).
const API_VERSION: i32 = 12;

/// Capabilities without which the VMM does not start, with what each is for.
const REQUIRED: &[(Cap, &str, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "guest memory"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID", "the guest's CPUID"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP", "interrupt controllers"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING", "MSI-X"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI", "MSI-X"),
    (Cap::Irqfd, "KVM_CAP_IRQFD", "interrupts of devices"),
    (
        Cap::Ioeventfd,
        "KVM_CAP_IOEVENTFD",
        "notifications of devices",
    ),
    (
        Cap::ImmediateExit,
        "KVM_CAP_IMMEDIATE_EXIT",
        "stopping vCPUs",
    ),
];

/// Capabilities that make guests faster.
const WELCOME: &[(Cap, &str, &str)] = &[
    (
        Cap::TscDeadlineTimer,
        "KVM_CAP_TSC_DEADLINE_TIMER",
        "cheap timers",
    ),
    (
        Cap::SplitIrqchip,
        "KVM_CAP_SPLIT_IRQCHIP",
        "a smaller interrupt controller in the kernel",
    ),
    (Cap::X2ApicApi, "KVM_CAP_X2APIC_API", "more than 254 vCPUs"),
];

/// What `/proc/cpuinfo` says of virtualisation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Processor {
    /// Intel VT-x.
    vmx: bool,
    /// AMD-V.
    svm: bool,
    /// This machine is a guest itself.
    guest: bool,
}

impl Processor {
    fn of(cpuinfo: &str) -> Self {
        let flags = cpuinfo
            .lines()
            .find(|line| line.starts_with("flags"))
            .unwrap_or_default();
        let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
        Self {
            vmx: has("vmx"),
            svm: has("svm"),
            guest: has("hypervisor"),
        }
    }

    fn can(self) -> bool {
        self.vmx || self.svm
    }

    fn missing_action(self) -> &'static str {
        match (self.can(), self.guest) {
            (true, _) if self.vmx => "modprobe kvm_intel",
            (true, _) => "modprobe kvm_amd",
            (false, true) => {
                "this node is a virtual machine: turn on nested virtualisation where it runs, or \
                    use another node"
            }
            (false, false) => "turn on VT-x or AMD-V in the firmware's settings",
        }
    }
}

pub(super) fn check(host: Host<'_>, report: &mut Report) {
    let processor = Processor::of(&host.text("/proc/cpuinfo").unwrap_or_default());
    processor_finding(processor, host.exists(DEVICE), report);
    match Kvm::new() {
        Ok(kvm) => device(&kvm, report),
        Err(error) => {
            let action = match error.errno() {
                nix::libc::EACCES | nix::libc::EPERM => "run this as root; a shim runs as root",
                nix::libc::EBUSY => "another hypervisor holds the processor: stop it",
                _ => processor.missing_action(),
            };
            report.fail(
                "kvm.device",
                format!("cannot open {DEVICE}: {error}"),
                action,
            );
        }
    }
}

fn processor_finding(processor: Processor, device: bool, report: &mut Report) {
    let nested = if processor.guest {
        "; this node is a virtual machine, so pods run nested and start slower"
    } else {
        ""
    };
    let name = if processor.vmx { "VT-x" } else { "AMD-V" };
    match (processor.can(), device) {
        (true, _) => report.ok("cpu.virtualisation", format!("{name}{nested}")),
        // Some clouds offer a KVM that runs only kernels made for it.
        (false, true) => report.fail(
            "cpu.virtualisation",
            format!(
                "neither vmx nor svm in /proc/cpuinfo, and yet there is {DEVICE}: no stock \
                kernel boots on it"
            ),
            "use a node with VT-x, AMD-V or nested virtualisation",
        ),
        (false, false) => report.fail(
            "cpu.virtualisation",
            "neither vmx nor svm in /proc/cpuinfo",
            processor.missing_action(),
        ),
    }
}

fn device(kvm: &Kvm, report: &mut Report) {
    let version = kvm.get_api_version();
    if version != API_VERSION {
        let found = format!("{DEVICE} speaks API version {version}, not {API_VERSION}");
        return report.fail("kvm.device", found, "use a kernel with KVM of Linux's own");
    }
    let found = format!(
        "API version {version}, at most {} vCPUs a VM",
        kvm.get_max_vcpus()
    );
    report.ok("kvm.device", found);
    let missing = |list: &[(Cap, &str, &str)]| -> Vec<String> {
        let absent = list.iter().filter(|(cap, ..)| !kvm.check_extension(*cap));
        absent
            .map(|(_, name, purpose)| format!("{name} ({purpose})"))
            .collect()
    };
    capabilities(&missing(REQUIRED), &missing(WELCOME), report);
}

fn capabilities(required: &[String], welcome: &[String], report: &mut Report) {
    if !required.is_empty() {
        let found = format!("missing: {}", required.join(", "));
        report.fail(
            "kvm.capabilities",
            found,
            "use a newer kernel or a full KVM",
        );
    } else if !welcome.is_empty() {
        let found = format!("missing: {}", welcome.join(", "));
        report.warn(
            "kvm.capabilities",
            found,
            "pods run without; a newer kernel may have them",
        );
    } else {
        report.ok(
            "kvm.capabilities",
            format!("all {}", REQUIRED.len() + WELCOME.len()),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::finding::Level;

    #[test]
    fn processors_are_judged_and_the_way_out_is_named() {
        let table = [
            ("flags\t\t: fpu vmx sse\n", true, Level::Ok, ""),
            ("flags\t\t: fpu svm hypervisor\n", true, Level::Ok, ""),
            ("flags\t\t: fpu\n", true, Level::Fail, "nested"),
            ("flags\t\t: fpu vmxnet\n", false, Level::Fail, "firmware"),
            ("flags\t\t: fpu hypervisor\n", false, Level::Fail, "nested"),
            ("", false, Level::Fail, "firmware"),
        ];
        for (cpuinfo, device, level, action) in table {
            let mut report = Report::default();
            processor_finding(Processor::of(cpuinfo), device, &mut report);
            assert_eq!(report.findings[0].level, level, "{cpuinfo}");
            assert!(report.findings[0].action.contains(action), "{cpuinfo}");
        }
        assert_eq!(
            Processor::of("flags : svm").missing_action(),
            "modprobe kvm_amd"
        );
    }

    #[test]
    fn a_missing_capability_is_named() {
        let level = |required: &[String], welcome: &[String]| {
            let mut report = Report::default();
            capabilities(required, welcome, &mut report);
            report.findings[0].level
        };
        let some = ["KVM_CAP_X (y)".to_owned()];
        assert_eq!(level(&[], &[]), Level::Ok);
        assert_eq!(level(&[], &some), Level::Warn);
        assert_eq!(level(&some, &some), Level::Fail);
    }
}
