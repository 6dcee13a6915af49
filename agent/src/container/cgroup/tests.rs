//! Conversions against the values of runc, and device programs against an interpreter and the
//! meaning of the rules.

use oci_spec::runtime::LinuxDeviceCgroup;
use pericarp_sys::bpf::Instruction;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{devices, limits};

fn settings(resources: Value) -> Vec<(String, String)> {
    let resources = serde_json::from_value(resources).unwrap();
    let settings = limits::of(&resources, |_| false).unwrap();
    settings
        .into_iter()
        .map(|setting| (setting.file, setting.value))
        .collect()
}

fn error(resources: Value) -> String {
    let resources = serde_json::from_value(resources).unwrap();
    limits::of(&resources, |_| false).unwrap_err().to_string()
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected
        .iter()
        .map(|(file, value)| ((*file).to_owned(), (*value).to_owned()))
        .collect()
}

#[test]
fn shares_become_weights_as_in_runc() {
    // opencontainers/cgroups, TestConvertCPUSharesToCgroupV2Value.
    let table = [
        (0, None),
        (1, Some(1)),
        (2, Some(1)),
        (1024, Some(100)),
        (2048, Some(174)),
        (262_144, Some(10_000)),
        (u64::MAX, Some(10_000)),
    ];
    for (shares, weight) in table {
        assert_eq!(limits::cpu_weight(shares), weight, "{shares}");
    }
}

#[test]
fn cpu() {
    assert_eq!(
        settings(json!({"cpu": {"shares": 1024, "quota": 20_000, "cpus": "0-1", "mems": "0"}})),
        pairs(&[
            ("cpu.weight", "100"),
            ("cpu.max", "20000 100000"),
            ("cpuset.cpus", "0-1"),
            ("cpuset.mems", "0"),
        ])
    );
    assert_eq!(
        settings(json!({"cpu": {"quota": -1, "period": 50_000}})),
        pairs(&[("cpu.max", "max 50000")])
    );
    assert_eq!(
        settings(json!({"cpu": {"idle": 1, "shares": 2}})),
        pairs(&[("cpu.idle", "1")])
    );
    assert!(error(json!({"cpu": {"cpus": "zero"}})).starts_with("linux.resources.cpu.cpus: "));
}

#[test]
fn what_only_the_first_version_of_cgroups_has_is_refused() {
    for (pointer, value) in [
        ("network", json!({"network": {"classID": 1}})),
        (
            "cpu.realtimeRuntime",
            json!({"cpu": {"realtimeRuntime": 1}}),
        ),
        ("cpu.realtimePeriod", json!({"cpu": {"realtimePeriod": 1}})),
        ("memory.kernel", json!({"memory": {"kernel": 1}})),
        ("memory.kernelTCP", json!({"memory": {"kernelTCP": 1}})),
        ("memory.swappiness", json!({"memory": {"swappiness": 0}})),
        (
            "memory.disableOOMKiller",
            json!({"memory": {"disableOOMKiller": true}}),
        ),
        (
            "memory.useHierarchy",
            json!({"memory": {"useHierarchy": false}}),
        ),
        ("blockIO.leafWeight", json!({"blockIO": {"leafWeight": 10}})),
        (
            "blockIO",
            json!({"blockIO": {"weightDevice": [{"major": 8, "minor": 0, "weight": 10}]}}),
        ),
        (
            "blockIO",
            json!({"blockIO": {
                "throttleReadIOPSDevice": [{"major": 8, "minor": 0, "rate": 10}]}}),
        ),
        ("unified", json!({"unified": {"memory.low": ""}})),
    ] {
        let error = error(value);
        let expected = format!("linux.resources.{pointer}: ");
        assert!(error.starts_with(&expected), "{error}");
    }
    // These ask for the default.
    let nothing = json!({"memory": {"kernel": -1, "kernelTCP": 0, "disableOOMKiller": false,
        "useHierarchy": true}, "cpu": {"realtimeRuntime": 0, "realtimePeriod": 0}});
    assert_eq!(settings(nothing), []);
}

#[test]
fn memory() {
    assert_eq!(
        settings(json!({"memory": {"limit": 1000, "swap": 1500, "reservation": 500}})),
        pairs(&[
            ("memory.swap.max", "500"),
            ("memory.max", "1000"),
            ("memory.low", "500")
        ])
    );
    assert_eq!(
        settings(json!({"memory": {"limit": -1, "swap": -1}})),
        pairs(&[("memory.swap.max", "max"), ("memory.max", "max")])
    );
    assert_eq!(settings(json!({"memory": {"limit": 0, "swap": 0}})), []);
    assert!(
        error(json!({"memory": {"swap": 5}})).starts_with("linux.resources.memory.swap: needs")
    );
}

#[test]
fn the_rest() {
    assert_eq!(
        settings(json!({"pids": {"limit": -1}})),
        pairs(&[("pids.max", "max")])
    );
    assert_eq!(
        settings(json!({"blockIO": {"weight": 1000}})),
        pairs(&[("io.weight", "default 10000")])
    );
    assert_eq!(
        settings(json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 5}],
            "unified": {"memory.high": "7"}})),
        pairs(&[
            ("hugetlb.2MB.max", "5"),
            ("hugetlb.2MB.rsvd.max", "5"),
            ("memory.high", "7")
        ])
    );
    assert!(error(json!({"unified": {"a/b.c": "1"}})).starts_with("linux.resources.unified: "));
    assert!(
        error(json!({"hugepageLimits": [{"pageSize": "../x", "limit": 5}]})).contains("page size")
    );
    assert!(
        error(json!({"rdma": {"mlx5": {"hcaHandles": 1}}})).starts_with("linux.resources.rdma: ")
    );
}

/// Runs a device program: registers are 64 bits wide, the context is three words.
fn run(program: &[Instruction], context: [u32; 3]) -> u64 {
    let mut registers = [0u64; 11];
    let mut at = 0;
    loop {
        let instruction = program[at];
        at += 1;
        let (to, from) = (
            usize::from(instruction.registers & 15),
            usize::from(instruction.registers >> 4),
        );
        let immediate = u64::from(instruction.immediate.cast_unsigned());
        let jump = |taken: bool| {
            if taken {
                usize::try_from(instruction.offset).unwrap()
            } else {
                0
            }
        };
        match instruction.code {
            0x61 => {
                registers[to] = context[usize::try_from(instruction.offset).unwrap() / 4].into()
            }
            0xbc => registers[to] = registers[from] & 0xffff_ffff,
            0xb7 => registers[to] = immediate,
            0x54 => registers[to] = (registers[to] & immediate) & 0xffff_ffff,
            0x74 => registers[to] = (registers[to] & 0xffff_ffff) >> immediate,
            0x55 => at += jump(registers[to] != immediate),
            0x45 => at += jump(registers[to] & immediate != 0),
            0x05 => at += jump(true),
            0x95 => return registers[0],
            other => panic!("unknown instruction {other:#x}"),
        }
    }
}

fn allowed(
    rules: &[LinuxDeviceCgroup],
    device_type: u32,
    major: u32,
    minor: u32,
    access: u32,
) -> bool {
    let program = devices::program(&devices::rules(rules, &[]).unwrap());
    run(&program, [access << 16 | device_type, major, minor]) == 1
}

const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;

#[test]
fn usual_devices_are_allowed_and_others_are_not() {
    let rules: Vec<_> = serde_json::from_value(json!([{"allow": false, "access": "rwm"}])).unwrap();
    for rules in [&rules[..], &[]] {
        assert!(allowed(rules, CHARACTER, 1, 3, READ | WRITE));
        assert!(allowed(rules, CHARACTER, 136, 77, READ | WRITE));
        assert!(allowed(rules, BLOCK, 8, 0, MKNOD));
        assert!(!allowed(rules, BLOCK, 8, 0, READ));
        assert!(!allowed(rules, CHARACTER, 1, 1, READ));
        assert!(!allowed(rules, CHARACTER, 10, 229, READ | WRITE));
    }
    let all: Vec<_> = serde_json::from_value(json!([{"allow": true, "access": "rwm"}])).unwrap();
    assert!(allowed(&all, BLOCK, 8, 0, READ | WRITE | MKNOD));
}

#[test]
fn the_default_devices_are_those_of_runc() {
    // `AllowedDevices` of runc's libcontainer/specconv/spec_linux.go.
    let opened = [
        (1, 3),
        (1, 5),
        (1, 7),
        (1, 8),
        (1, 9),
        (5, 0),
        (5, 2),
        (10, 200),
        (136, 0),
    ];
    let rules: Vec<_> = serde_json::from_value(json!([{"allow": false, "access": "rwm"}])).unwrap();
    for major in 0..256 {
        for minor in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 199, 200, 201, 255] {
            let expected = opened.contains(&(major, minor)) || major == 136;
            let found = allowed(&rules, CHARACTER, major, minor, READ | WRITE | MKNOD);
            assert_eq!(found, expected, "c {major}:{minor}");
            assert!(
                !allowed(&rules, BLOCK, major, minor, READ),
                "b {major}:{minor}"
            );
            assert!(
                allowed(&rules, BLOCK, major, minor, MKNOD),
                "b {major}:{minor}"
            );
        }
    }
}

#[test]
fn a_later_refusal_takes_a_part_away() {
    let rules: Vec<_> = serde_json::from_value(json!([
        {"allow": true, "type": "b", "major": 8, "access": "rw"},
        {"allow": false, "type": "b", "major": 8, "minor": 1, "access": "w"},
    ]))
    .unwrap();
    assert!(allowed(&rules, BLOCK, 8, 0, READ | WRITE));
    assert!(allowed(&rules, BLOCK, 8, 1, READ));
    assert!(!allowed(&rules, BLOCK, 8, 1, WRITE));
    assert!(!allowed(&rules, BLOCK, 8, 1, READ | WRITE));
}

fn any_rule() -> impl Strategy<Value = devices::Rule> {
    let part = prop::option::of(0..3u32);
    (
        any::<bool>(),
        prop::option::of(1..3u32),
        part.clone(),
        part,
        1..8u32,
    )
        .prop_map(
            |(allow, device_type, major, minor, access)| match device_type {
                None => devices::Rule {
                    allow,
                    device_type,
                    major: None,
                    minor: None,
                    access: 7,
                },
                Some(_) => devices::Rule {
                    allow,
                    device_type,
                    major,
                    minor,
                    access,
                },
            },
        )
}

proptest! {
    #[test]
    fn the_last_rule_for_each_kind_of_access_decides(
        rules in prop::collection::vec(any_rule(), 0..8),
        device_type in 1..3u32,
        major in 0..3u32,
        minor in 0..3u32,
        access in 1..8u32,
    ) {
        let fits = |rule: &&devices::Rule| {
            rule.device_type.is_none_or(|wanted| wanted == device_type)
                && rule.major.is_none_or(|wanted| wanted == major)
                && rule.minor.is_none_or(|wanted| wanted == minor)
        };
        let expected = [MKNOD, READ, WRITE].iter().filter(|kind| access & **kind != 0).all(|kind| {
            let last = rules.iter().rev().filter(fits).find(|rule| rule.access & kind != 0);
            last.is_some_and(|rule| rule.allow)
        });
        let program = devices::program(&rules);
        prop_assert_eq!(run(&program, [access << 16 | device_type, major, minor]) == 1, expected);
    }
}

#[test]
fn a_process_is_found_in_the_containers_own_cgroups() {
    let own = std::path::Path::new("/sys/fs/cgroup/pod/d");
    for (text, expected) in [
        (
            "0::/pod/d/sub/deep\n",
            Some("/sys/fs/cgroup/pod/d/sub/deep"),
        ),
        ("0::/pod/d/pod/d\n", Some("/sys/fs/cgroup/pod/d/pod/d")),
        (
            "1:name=x:/pod/d/a\n0::/pod/d/b\n",
            Some("/sys/fs/cgroup/pod/d/b"),
        ),
        ("0::/pod/e/sub\n", None),
        ("0::/pod/d/../e\n", None),
        ("0::/pod/d//etc\n", None),
        ("", None),
    ] {
        let found = super::home_in(text, own);
        assert_eq!(
            found.as_deref(),
            expected.map(std::path::Path::new),
            "{text:?}"
        );
    }
}
