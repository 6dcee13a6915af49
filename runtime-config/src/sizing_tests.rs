//! Tables of demands and the VMs that they become.

use std::path::Path;

use super::*;
use crate::Config;

const HOST: HostCapacity = HostCapacity {
    cpus: 16,
    memory_bytes: 32 << 30,
};

fn vm(text: &str) -> Vm {
    let text = format!("[vm]\n{text}");
    Config::from_texts([(Path::new("c.toml"), text.as_str())])
        .unwrap()
        .settings
        .vm
}

fn demand(period: &str, quota: &str, shares: &str, memory: &str) -> Result<Demand, SizingError> {
    let pairs = [
        (CPU_PERIOD_ANNOTATION, period),
        (CPU_QUOTA_ANNOTATION, quota),
        (CPU_SHARES_ANNOTATION, shares),
        (MEMORY_ANNOTATION, memory),
    ];
    let present = pairs.into_iter().filter(|(_, text)| !text.is_empty());
    Demand::from_annotations(
        &present
            .map(|(name, text)| (name.into(), text.into()))
            .collect(),
    )
}

#[test]
fn vcpus_follow_limit_then_request_then_default() {
    let table = [
        // period, quota, shares, default_vcpus -> vCPUs
        ("", "", "", 1, 1),
        ("", "", "", 2, 2),
        ("100000", "0", "2", 2, 2),
        ("100000", "-1", "0", 2, 2),
        ("100000", "50000", "512", 2, 1),
        ("100000", "100000", "1024", 2, 1),
        ("100000", "100001", "1024", 1, 2),
        ("100000", "350000", "0", 1, 4),
        ("", "350000", "", 1, 4),
        ("0", "350000", "", 1, 4),
        ("50000", "200000", "", 1, 4),
        ("100000", "0", "3072", 1, 3),
        ("100000", "0", "3073", 1, 4),
        // The limit counts, not the request.
        ("100000", "200000", "8192", 1, 2),
        // A limit above what the host has is lawful.
        ("100000", "6400000", "", 1, 16),
        ("1", "9223372036854775807", "", 1, 16),
    ];
    for (period, quota, shares, default, expected) in table {
        let vm = vm(&format!("default_vcpus = {default}"));
        let sizing = Sizing::of(&vm, &demand(period, quota, shares, "").unwrap(), HOST).unwrap();
        assert_eq!(sizing.vcpus, expected, "{period} {quota} {shares}");
    }
}

#[test]
fn memory_is_limit_or_default_with_reserve_in_whole_pages() {
    let table: &[(&str, &str, u64)] = &[
        ("", "", 576 * MIB),
        ("", "0", 576 * MIB),
        ("", "-1", 576 * MIB),
        ("default_memory_mib = 192", "", 256 * MIB),
        ("", "134217728", 192 * MIB),
        ("", "134217729", 194 * MIB),
        ("huge_pages = '1G'", "134217728", 1 << 30),
        ("guest_reserve_mib = 0", "134217728", 128 * MIB),
        ("", "8388608", 72 * MIB),
        // Above the host's memory: lawful, and cut.
        ("", "1099511627776", 32 << 30),
        ("", "9223372036854775807", 32 << 30),
    ];
    for (text, memory, expected) in table {
        let demand = demand("", "", "", memory).unwrap();
        let sizing = Sizing::of(&vm(text), &demand, HOST).unwrap();
        assert_eq!(sizing.memory_bytes, *expected, "{text} {memory}");
    }
}

#[test]
fn refusals_name_the_field_and_the_bound() {
    let refuse = |text: &str, quota: &str, memory: &str| {
        let demand = demand("", quota, "", memory).unwrap();
        Sizing::of(&vm(text), &demand, HOST)
            .unwrap_err()
            .to_string()
    };
    let small = refuse("", "", "4194304");
    for part in [
        "resources.limits.memory",
        "4194304 bytes",
        "least is 8388608 bytes",
        "vm.min_memory_mib",
    ] {
        assert!(small.contains(part), "{small}");
    }
    let small = refuse("default_memory_mib = 7", "", "");
    assert!(
        small.starts_with("`vm.default_memory_mib` is 7340032 bytes"),
        "{small}"
    );
    let large = refuse("max_memory_mib = 1024", "", "1073741824");
    assert!(large.contains("`vm.max_memory_mib` = 1024"), "{large}");
    let wide = refuse("max_vcpus = 2", "300000", "");
    assert_eq!(
        wide,
        "the pod's CPU limit (resources.limits.cpu) needs 3 vCPUs, more than `vm.max_vcpus` = 2"
    );
    let wrong = demand("", "1e5", "", "").unwrap_err().to_string();
    assert!(
        wrong.contains(CPU_QUOTA_ANNOTATION) && wrong.contains("\"1e5\""),
        "{wrong}"
    );
}

#[test]
fn a_host_that_reports_nonsense_still_gives_a_vm_that_boots() {
    let host = HostCapacity {
        cpus: 0,
        memory_bytes: 0,
    };
    let sizing = Sizing::of(&vm(""), &Demand::default(), host).unwrap();
    assert_eq!(
        sizing,
        Sizing {
            vcpus: 1,
            memory_bytes: 72 * MIB
        }
    );
}

proptest::proptest! {
    #[test]
    fn every_size_is_bounded_aligned_and_large_enough(
        quota in proptest::option::of(0u64..), period in proptest::option::of(0u64..),
        shares in proptest::option::of(0u64..), memory in proptest::option::of(0u64..),
    ) {
        let demand = Demand { cpu_quota_us: quota, cpu_period_us: period,
            cpu_shares: shares, memory_limit_bytes: memory };
        if let Ok(sizing) = Sizing::of(&vm(""), &demand, HOST) {
            proptest::prop_assert!((1..=HOST.cpus).contains(&sizing.vcpus));
            proptest::prop_assert!((72 * MIB..=HOST.memory_bytes).contains(&sizing.memory_bytes));
            proptest::prop_assert_eq!(sizing.memory_bytes % (2 << 20), 0);
        }
    }
}
