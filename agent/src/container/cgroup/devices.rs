//! Device rules as a program of the kernel's (bpf(2), `BPF_PROG_TYPE_CGROUP_DEVICE`).
//!
//! A rule list means: for each kind of access asked for, the last rule that concerns the device and
//! that kind decides; none refuses. The program goes through the list from its end and strikes out
//! the kinds that are allowed; a rule against a kind that still stands refuses.

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};
use pericarp_sys::bpf::Instruction;

use super::super::{error::ContainerError, plan};

// BPF_DEVCG_ACC_* and BPF_DEVCG_DEV_* of uapi/linux/bpf.h.
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;

/// One rule; what is `None` fits all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::container) struct Rule {
    pub(super) allow: bool,
    pub(super) device_type: Option<u32>,
    pub(super) major: Option<u32>,
    pub(super) minor: Option<u32>,
    pub(super) access: u32,
}

const fn allow(device_type: u32, major: Option<u32>, minor: Option<u32>, access: u32) -> Rule {
    Rule {
        allow: true,
        device_type: Some(device_type),
        major,
        minor,
        access,
    }
}

const ALL: u32 = MKNOD | READ | WRITE;

/// Devices that every container may use. The list is runc's (`AllowedDevices` of
/// `libcontainer/specconv/spec_linux.go`): a container may create a node for any device, and it may
/// open the default devices of the specification (config-linux.md, "Default Devices"),
/// pseudo-terminals, and `/dev/net/tun`, which VPN clients open without asking for it.
const DEFAULTS: [Rule; 11] = [
    allow(CHARACTER, None, None, MKNOD),
    allow(BLOCK, None, None, MKNOD),
    allow(CHARACTER, Some(1), Some(3), ALL),
    allow(CHARACTER, Some(1), Some(5), ALL),
    allow(CHARACTER, Some(1), Some(7), ALL),
    allow(CHARACTER, Some(1), Some(8), ALL),
    allow(CHARACTER, Some(1), Some(9), ALL),
    allow(CHARACTER, Some(5), Some(0), ALL),
    allow(CHARACTER, Some(5), Some(2), ALL),
    allow(CHARACTER, Some(136), None, ALL),
    allow(CHARACTER, Some(10), Some(200), ALL),
];

/// The rules of the specification, then for devices that the caller adds, then the default ones, as
/// runc orders them.
pub(in crate::container) fn rules(
    given: &[LinuxDeviceCgroup],
    added: &[LinuxDevice],
) -> Result<Vec<Rule>, ContainerError> {
    plan::bounded(given.len() + added.len(), "linux.resources.devices")?;
    let mut rules = Vec::new();
    for (index, rule) in given.iter().enumerate() {
        rules.push(parse(rule, &format!("linux.resources.devices[{index}]"))?);
    }
    for device in added {
        let device_type = if device.typ() == LinuxDeviceType::B {
            BLOCK
        } else {
            CHARACTER
        };
        let number = |value| u32::try_from(value).ok();
        rules.push(allow(
            device_type,
            number(device.major()),
            number(device.minor()),
            ALL,
        ));
    }
    rules.extend(DEFAULTS);
    Ok(rules)
}

fn parse(rule: &LinuxDeviceCgroup, field: &str) -> Result<Rule, ContainerError> {
    let device_type = match rule.typ().unwrap_or_default() {
        LinuxDeviceType::A => None,
        LinuxDeviceType::B => Some(BLOCK),
        LinuxDeviceType::C | LinuxDeviceType::U => Some(CHARACTER),
        LinuxDeviceType::P => {
            return Err(ContainerError::invalid(
                format!("{field}.type"),
                "\"p\" is not a device",
            ));
        }
    };
    let number = |value: Option<i64>, part: &str| match value {
        // -1 is how the first version's tools write a star.
        None | Some(-1) => Ok(None),
        Some(value) => u32::try_from(value).map(Some).map_err(|_| {
            ContainerError::invalid(
                format!("{field}.{part}"),
                format!("{value} is out of range"),
            )
        }),
    };
    let mut access = 0;
    for letter in rule.access().as_deref().unwrap_or_default().chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            other => {
                let reason = format!("{other:?} is not r, w or m");
                return Err(ContainerError::invalid(format!("{field}.access"), reason));
            }
        };
    }
    // Rules of type "a" stand for every device and every access, whatever else they say
    // (cgroup-v1/devices.rst).
    let everything = device_type.is_none();
    Ok(Rule {
        allow: rule.allow(),
        device_type,
        major: if everything {
            None
        } else {
            number(rule.major(), "major")?
        },
        minor: if everything {
            None
        } else {
            number(rule.minor(), "minor")?
        },
        access: if everything || access == 0 {
            ALL
        } else {
            access
        },
    })
}

// Operations of uapi/linux/bpf.h that the program uses; the second register operand stands in the
// upper half of `registers`.
const LOAD_WORD: u8 = 0x61;
const MOVE_REGISTER: u8 = 0xbc;
const MOVE: u8 = 0xb7;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const JUMP_NOT_EQUAL: u8 = 0x55;
const JUMP_SET: u8 = 0x45;
const JUMP: u8 = 0x05;
const EXIT: u8 = 0x95;

// Registers: the context comes in R1, the answer goes out in R0.
const ANSWER: u8 = 0;
const CONTEXT: u8 = 1;
const DEVICE_TYPE: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

fn operation(code: u8, registers: u8, offset: i16, immediate: u32) -> Instruction {
    Instruction {
        code,
        registers,
        offset,
        immediate: immediate.cast_signed(),
    }
}

/// Puts `rules` into instructions.
pub(in crate::container) fn program(rules: &[Rule]) -> Vec<Instruction> {
    // struct bpf_cgroup_dev_ctx: access in the upper half of the first word, type in the lower;
    // then major, minor.
    let mut program = vec![
        operation(LOAD_WORD, CONTEXT << 4 | DEVICE_TYPE, 0, 0),
        operation(MOVE_REGISTER, DEVICE_TYPE << 4 | ACCESS, 0, 0),
        operation(SHIFT_RIGHT, ACCESS, 0, 16),
        operation(AND, DEVICE_TYPE, 0, 0xffff),
        operation(LOAD_WORD, CONTEXT << 4 | MAJOR, 4, 0),
        operation(LOAD_WORD, CONTEXT << 4 | MINOR, 8, 0),
    ];
    for rule in rules.iter().rev() {
        program.extend(rule_code(rule));
        if rule.device_type.is_none() && rule.access == ALL {
            // Everything before it is overruled, and the kernel's verifier refuses what cannot be
            // reached.
            return program;
        }
    }
    program.extend([operation(MOVE, ANSWER, 0, 0), operation(EXIT, 0, 0, 0)]);
    program
}

fn rule_code(rule: &Rule) -> Vec<Instruction> {
    let verdict = |allowed| {
        [
            operation(MOVE, ANSWER, 0, allowed),
            operation(EXIT, 0, 0, 0),
        ]
    };
    if rule.device_type.is_none() && rule.access == ALL {
        return verdict(u32::from(rule.allow)).to_vec();
    }
    let mut action = Vec::new();
    if rule.allow {
        // Strike out what is allowed; when nothing is left, all of it was.
        action.push(operation(AND, ACCESS, 0, !rule.access));
        action.push(operation(JUMP_NOT_EQUAL, ACCESS, 2, 0));
        action.extend(verdict(1));
    } else {
        action.push(operation(JUMP_SET, ACCESS, 1, rule.access));
        action.push(operation(JUMP, 0, 2, 0));
        action.extend(verdict(0));
    }
    let tests = [
        (DEVICE_TYPE, rule.device_type),
        (MAJOR, rule.major),
        (MINOR, rule.minor),
    ];
    let tests: Vec<_> = tests
        .iter()
        .filter_map(|(reg, value)| Some((*reg, (*value)?)))
        .collect();
    let mut code = Vec::new();
    for (index, (register, value)) in tests.iter().enumerate() {
        let behind = i16::try_from(tests.len() - 1 - index + action.len());
        let behind = behind.expect("a rule has at most seven instructions");
        code.push(operation(JUMP_NOT_EQUAL, *register, behind, *value));
    }
    code.extend(action);
    code
}
