//! Filters against an interpreter of the instructions and against the meaning of the profile,
//! evaluated directly.

use oci_spec::runtime::{LinuxSeccompArg, LinuxSeccompOperator};
use proptest::prelude::*;
use serde_json::json;

use super::*;

const ALLOW: u32 = 0x7fff_0000;
const X86_64: u32 = 0xc000_003e;

/// What `struct seccomp_data` holds.
#[derive(Debug, Clone, Copy)]
struct Call {
    number: u32,
    audit: u32,
    args: [u64; 6],
}

impl Call {
    fn new(number: u32, args: [u64; 6]) -> Self {
        Self {
            number,
            audit: X86_64,
            args,
        }
    }

    fn word(&self, offset: u32) -> u32 {
        let mut bytes = Vec::new();
        bytes.extend(self.number.to_le_bytes());
        bytes.extend(self.audit.to_le_bytes());
        bytes.extend([0; 8]);
        bytes.extend(self.args.iter().flat_map(|arg| arg.to_le_bytes()));
        let at = offset as usize;
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }
}

/// Runs a filter as the kernel would.
fn run(filter: &Filter, call: Call) -> u32 {
    let program = filter.program();
    let (mut at, mut accumulator) = (0, 0);
    loop {
        let instruction = program[at];
        at += 1;
        let taken = match instruction.code {
            0x20 => {
                accumulator = call.word(instruction.k);
                continue;
            }
            0x54 => {
                accumulator &= instruction.k;
                continue;
            }
            0x05 => {
                at += instruction.k as usize;
                continue;
            }
            0x06 => return instruction.k,
            0x15 => accumulator == instruction.k,
            0x25 => accumulator > instruction.k,
            0x35 => accumulator >= instruction.k,
            other => panic!("unknown instruction {other:#x}"),
        };
        at += usize::from(if taken {
            instruction.jump_true
        } else {
            instruction.jump_false
        });
    }
}

fn profile(value: serde_json::Value) -> LinuxSeccomp {
    serde_json::from_value(value).unwrap()
}

fn compiled(value: serde_json::Value) -> Filter {
    compile(&profile(value)).unwrap()
}

fn errno(errno: u32) -> u32 {
    0x0005_0000 | errno
}

fn number(name: &str) -> u32 {
    Architecture::X86_64.number(name).unwrap()
}

#[test]
fn names_decide() {
    let filter = compiled(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [
            {"names": ["read", "write", "mseal", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["uname"], "action": "SCMP_ACT_ERRNO", "errnoRet": 42},
            {"names": ["ptrace"], "action": "SCMP_ACT_KILL_PROCESS"},
            {"names": ["chroot"], "action": "SCMP_ACT_TRAP"},
            {"names": ["chmod"], "action": "SCMP_ACT_LOG"},
            {"names": ["chown"], "action": "SCMP_ACT_TRACE", "errnoRet": 7},
        ],
    }));
    let result = |name| run(&filter, Call::new(number(name), [0; 6]));
    assert_eq!(result("read"), ALLOW);
    assert_eq!(result("write"), ALLOW);
    assert_eq!(result("open"), errno(1));
    assert_eq!(result("uname"), errno(42));
    assert_eq!(result("ptrace"), 0x8000_0000);
    assert_eq!(result("chroot"), 0x0003_0000);
    assert_eq!(result("chmod"), 0x7ffc_0000);
    assert_eq!(result("chown"), 0x7ff0_0007);
    // Newer than mseal, the newest that the profile names: the C library may fall back.
    assert_eq!(
        run(&filter, Call::new(number("mseal") + 1, [0; 6])),
        errno(38)
    );
    // x86's read is 3, x86-64's is 0.
    let x86 = Call {
        audit: 0x4000_0003,
        ..Call::new(3, [0; 6])
    };
    assert_eq!(run(&filter, x86), ALLOW);
    // x32 and a foreign processor are not in the profile.
    assert_eq!(run(&filter, Call::new(table::X32_BIT, [0; 6])), 0);
    assert_eq!(
        run(
            &filter,
            Call {
                audit: 7,
                ..Call::new(0, [0; 6])
            }
        ),
        0
    );
}

#[test]
fn x32_is_a_section_of_its_own() {
    let filter = compiled(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X32"],
        "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}],
    }));
    assert_eq!(run(&filter, Call::new(table::X32_BIT, [0; 6])), ALLOW);
    assert_eq!(
        run(&filter, Call::new(table::X32_BIT + 1, [0; 6])),
        errno(38)
    );
    assert_eq!(run(&filter, Call::new(0, [0; 6])), ALLOW);
}

#[test]
fn masked_conditions_of_clone() {
    // As containerd's default profile: clone without any CLONE_NEW* flag.
    let filter = compiled(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 2_114_060_288_u64, "valueTwo": 0,
                       "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
        ],
    }));
    let clone = |flags| run(&filter, Call::new(number("clone"), [flags, 0, 0, 0, 0, 0]));
    assert_eq!(clone(0x11), ALLOW);
    assert_eq!(clone(0x1000_0000), errno(1));
    assert_eq!(run(&filter, Call::new(number("clone3"), [0; 6])), errno(38));
}

#[test]
fn conditions_on_one_argument_are_alternatives() {
    let filter = compiled(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [{"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [
            {"index": 0, "value": 0, "op": "SCMP_CMP_EQ"},
            {"index": 0, "value": 8, "op": "SCMP_CMP_EQ"},
        ]}],
    }));
    let personality = |value| {
        run(
            &filter,
            Call::new(number("personality"), [value, 0, 0, 0, 0, 0]),
        )
    };
    assert_eq!(
        [personality(0), personality(8), personality(4)],
        [ALLOW, ALLOW, errno(1)]
    );
}

#[test]
fn allow_by_default_stays_so_for_new_calls() {
    let filter = compiled(json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
                  "SECCOMP_FILTER_FLAG_TSYNC"],
        "syscalls": [{"names": ["uname"], "action": "SCMP_ACT_ERRNO"}],
    }));
    assert_eq!(filter.flags, 6);
    assert_eq!(run(&filter, Call::new(9999, [0; 6])), ALLOW);
    assert_eq!(run(&filter, Call::new(number("uname"), [0; 6])), errno(1));
}

#[test]
fn a_profile_without_names_is_its_default() {
    let filter = compiled(json!({"defaultAction": "SCMP_ACT_KILL"}));
    assert_eq!(run(&filter, Call::new(5, [0; 6])), 0);
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    let notify = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}],
    });
    let error = compile(&profile(notify)).unwrap_err().to_string();
    assert!(
        error.starts_with("linux.seccomp.syscalls[0].action: "),
        "{error}"
    );
    let index = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_ERRNO",
                      "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}],
    });
    let error = compile(&profile(index)).unwrap_err().to_string();
    assert!(
        error.starts_with("linux.seccomp.syscalls[0].args[0].index: "),
        "{error}"
    );
}

#[test]
fn every_known_call_fits_into_a_filter() {
    // The worst case for the tree: neighbours never share a verdict.
    let names: Vec<_> = syscalls::x86_64::Sysno::iter()
        .map(|call| call.name())
        .collect();
    let entry = |remainder| {
        let names: Vec<_> = names
            .iter()
            .enumerate()
            .filter(|(i, _)| i % 2 == remainder)
            .map(|(_, n)| *n)
            .collect();
        json!({"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": 100 + remainder})
    };
    let filter = compiled(json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [entry(0), entry(1)],
    }));
    for (index, name) in names.iter().enumerate() {
        let expected = errno(100 + u32::try_from(index % 2).unwrap());
        assert_eq!(
            run(&filter, Call::new(number(name), [0; 6])),
            expected,
            "{name}"
        );
    }
}

fn holds(arg: &LinuxSeccompArg, args: [u64; 6]) -> bool {
    let (actual, value) = (args[arg.index()], arg.value());
    match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => actual != value,
        LinuxSeccompOperator::ScmpCmpLt => actual < value,
        LinuxSeccompOperator::ScmpCmpLe => actual <= value,
        LinuxSeccompOperator::ScmpCmpEq => actual == value,
        LinuxSeccompOperator::ScmpCmpGe => actual >= value,
        LinuxSeccompOperator::ScmpCmpGt => actual > value,
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            actual & value == arg.value_two().unwrap_or(0) & value
        }
    }
}

/// Values that differ in one half alone are where comparisons of halves go wrong.
fn interesting() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0..4u64,
        (0..4u64, 0..4u64).prop_map(|(high, low)| high << 32 | low),
        Just(u64::MAX),
        Just(u64::from(u32::MAX)),
    ]
}

fn operators() -> impl Strategy<Value = LinuxSeccompOperator> {
    prop::sample::select(vec![
        LinuxSeccompOperator::ScmpCmpNe,
        LinuxSeccompOperator::ScmpCmpLt,
        LinuxSeccompOperator::ScmpCmpLe,
        LinuxSeccompOperator::ScmpCmpEq,
        LinuxSeccompOperator::ScmpCmpGe,
        LinuxSeccompOperator::ScmpCmpGt,
        LinuxSeccompOperator::ScmpCmpMaskedEq,
    ])
}

proptest! {
    #[test]
    fn conditions_mean_what_they_say(
        conditions in prop::collection::vec((operators(), interesting(), interesting()), 1..6),
        args in prop::array::uniform6(interesting()),
    ) {
        let args_json: Vec<_> = conditions.iter().enumerate().map(|(index, (op, value, two))| {
            json!({"index": index, "op": op, "value": value, "valueTwo": two})
        }).collect();
        let profile = profile(json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{"names": ["ioctl"], "action": "SCMP_ACT_ALLOW", "args": args_json}],
        }));
        let entry = &profile.syscalls().as_ref().unwrap()[0];
        let all = entry.args().as_ref().unwrap().iter().all(|arg| holds(arg, args));
        let filter = compile(&profile).unwrap();
        let expected = if all { ALLOW } else { errno(1) };
        prop_assert_eq!(run(&filter, Call::new(number("ioctl"), args)), expected);
    }

    #[test]
    fn packing_is_lossless(code: u16, jump_true: u8, jump_false: u8, k: u32) {
        let instruction =
            pericarp_sys::seccomp::Instruction { code, jump_true, jump_false, k };
        prop_assert_eq!(assemble::unpack(assemble::pack(instruction)), instruction);
    }
}
