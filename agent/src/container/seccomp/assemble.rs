//! Instructions of classic BPF for verdicts: a search tree over the numbers, then the conditions of
//! the number found.
//!
//! Jumps of classic BPF only go forward, conditional ones by at most 255 instructions; longer ones
//! go by an unconditional jump. Fields of `struct seccomp_data` (seccomp(2)): number at 0,
//! architecture at 4, arguments of 8 bytes from 16 on, in the byte order of the processor, which is
//! little-endian on all that this knows.

use std::collections::BTreeMap;

use oci_spec::runtime::LinuxSeccompOperator;
use pericarp_sys::seccomp::Instruction;

use super::{
    Verdict,
    table::{Architecture, X32_BIT},
};

/// `SECCOMP_RET_KILL_THREAD`.
const KILL_THREAD: u32 = 0;

// uapi/linux/bpf_common.h.
const LOAD_WORD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_OR_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;

const NUMBER_OFFSET: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;
const ARGUMENTS_OFFSET: u32 = 16;

/// A comparison of one argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Condition {
    pub(super) argument: usize,
    pub(super) operator: LinuxSeccompOperator,
    pub(super) value: u64,
    pub(super) value_two: u64,
}

/// `result` when all conditions hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) conditions: Vec<Condition>,
    pub(super) result: u32,
}

pub(super) fn pack(instruction: Instruction) -> u64 {
    u64::from(instruction.code) << 48
        | u64::from(instruction.jump_true) << 40
        | u64::from(instruction.jump_false) << 32
        | u64::from(instruction.k)
}

pub(super) fn unpack(packed: u64) -> Instruction {
    let bytes = packed.to_be_bytes();
    Instruction {
        code: u16::from_be_bytes([bytes[0], bytes[1]]),
        jump_true: bytes[2],
        jump_false: bytes[3],
        k: u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
    }
}

fn statement(code: u16, k: u32) -> Instruction {
    Instruction {
        code,
        jump_true: 0,
        jump_false: 0,
        k,
    }
}

fn branch(code: u16, k: u32, jump_true: u8, jump_false: u8) -> Instruction {
    Instruction {
        code,
        jump_true,
        jump_false,
        k,
    }
}

/// The whole filter: finds the section of the calling program's architecture.
///
/// Sections of one architecture word (x86-64 and x32) are told apart by the bit in the number.
pub(super) fn program(sections: Vec<(Architecture, Vec<Instruction>)>) -> Vec<Instruction> {
    let mut words: Vec<(u32, Vec<Instruction>)> = Vec::new();
    let has = |wanted| {
        sections
            .iter()
            .any(|(architecture, _)| *architecture == wanted)
    };
    let (x32, x86_64) = (has(Architecture::X32), has(Architecture::X86_64));
    let body = |wanted| {
        let found = sections
            .iter()
            .find(|(architecture, _)| *architecture == wanted);
        found.map_or_else(
            || vec![statement(RETURN, KILL_THREAD)],
            |(_, body)| body.clone(),
        )
    };
    if x32 || x86_64 {
        let mut both = vec![statement(LOAD_WORD, NUMBER_OFFSET)];
        both.extend(split(
            X32_BIT,
            body(Architecture::X86_64),
            body(Architecture::X32),
        ));
        words.push((Architecture::X86_64.audit(), both));
    }
    for wanted in [Architecture::X86, Architecture::Aarch64, Architecture::Arm] {
        if has(wanted) {
            let mut one = vec![statement(LOAD_WORD, NUMBER_OFFSET)];
            one.extend(body(wanted));
            words.push((wanted.audit(), one));
        }
    }
    let mut program = vec![statement(LOAD_WORD, ARCHITECTURE_OFFSET)];
    for (word, body) in words {
        // Equal: into the body. Else: over it, to the next comparison.
        program.push(branch(JUMP_EQUAL, word, 1, 0));
        program.push(statement(JUMP, length(&body)));
        program.extend(body);
    }
    program.push(statement(RETURN, KILL_THREAD));
    program
}

/// The instructions for one architecture; the number is loaded already.
pub(super) fn section(
    verdicts: &BTreeMap<u32, Verdict>,
    default: u32,
    unknown: u32,
    architecture: Architecture,
) -> Vec<Instruction> {
    let first = if architecture == Architecture::X32 {
        X32_BIT
    } else {
        0
    };
    let mut ranges: Vec<(u32, Vec<Instruction>)> = vec![(first, vec![statement(RETURN, default)])];
    let mut next = first;
    for (number, verdict) in verdicts {
        if *number > next {
            push(&mut ranges, next, vec![statement(RETURN, default)]);
        }
        push(&mut ranges, *number, leaf(verdict, default));
        next = number + 1;
    }
    // Beyond the newest call that the profile names; without any name there is nothing to be newer
    // than.
    let beyond = if verdicts.is_empty() {
        default
    } else {
        unknown
    };
    push(&mut ranges, next, vec![statement(RETURN, beyond)]);
    tree(&ranges)
}

/// Lets `body` begin at `number`, merging it with what stands before when that is the same.
fn push(ranges: &mut Vec<(u32, Vec<Instruction>)>, number: u32, body: Vec<Instruction>) {
    if ranges.last().is_some_and(|(start, _)| *start == number) {
        ranges.pop();
    }
    if ranges.last().is_none_or(|(_, last)| *last != body) {
        ranges.push((number, body));
    }
}

fn tree(ranges: &[(u32, Vec<Instruction>)]) -> Vec<Instruction> {
    match ranges {
        [] => Vec::new(),
        [(_, body)] => body.clone(),
        _ => {
            let (low, high) = ranges.split_at(ranges.len() / 2);
            split(high[0].0, tree(low), tree(high))
        }
    }
}

/// `low` for numbers below `start`, `high` for the others; both end in a return.
fn split(start: u32, low: Vec<Instruction>, high: Vec<Instruction>) -> Vec<Instruction> {
    let mut result = Vec::with_capacity(low.len() + high.len() + 2);
    match u8::try_from(low.len()) {
        Ok(skip) => result.push(branch(JUMP_GREATER_OR_EQUAL, start, skip, 0)),
        Err(_) => {
            result.push(branch(JUMP_GREATER_OR_EQUAL, start, 0, 1));
            result.push(statement(JUMP, length(&low)));
        }
    }
    result.extend(low);
    result.extend(high);
    result
}

fn length(body: &[Instruction]) -> u32 {
    // Programs beyond BPF_MAXINSNS are refused whole, so a length that does not fit is never
    // installed.
    u32::try_from(body.len()).unwrap_or(u32::MAX)
}

fn leaf(verdict: &Verdict, default: u32) -> Vec<Instruction> {
    let mut body = Vec::new();
    for rule in &verdict.rules {
        body.extend(rule_code(rule));
    }
    body.push(statement(RETURN, verdict.otherwise.unwrap_or(default)));
    body
}

/// Falls through behind its end when the rule does not match.
fn rule_code(rule: &Rule) -> Vec<Instruction> {
    let mut body = vec![statement(RETURN, rule.result)];
    // Built from the end, so that the distance to it is known: six conditions of seven instructions
    // stay far below 255.
    for condition in rule.conditions.iter().rev() {
        let to_end = u8::try_from(body.len()).unwrap_or(u8::MAX);
        let mut code = condition_code(condition, to_end);
        code.extend(body);
        body = code;
    }
    body
}

/// Falls through when the condition holds, else skips `to_end` instructions behind its own.
fn condition_code(condition: &Condition, to_end: u8) -> Vec<Instruction> {
    let offset = ARGUMENTS_OFFSET + 8 * u32::try_from(condition.argument).unwrap_or(0);
    let (low, high) = (
        statement(LOAD_WORD, offset),
        statement(LOAD_WORD, offset + 4),
    );
    let [value_high, value_low] = halves(condition.value);
    match condition.operator {
        LinuxSeccompOperator::ScmpCmpEq => vec![
            high,
            branch(JUMP_EQUAL, value_high, 0, to_end + 2),
            low,
            branch(JUMP_EQUAL, value_low, 0, to_end),
        ],
        LinuxSeccompOperator::ScmpCmpNe => vec![
            high,
            branch(JUMP_EQUAL, value_high, 0, 2),
            low,
            branch(JUMP_EQUAL, value_low, to_end, 0),
        ],
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            // `value` is the mask; bits outside of it in the datum are ignored.
            let [datum_high, datum_low] = halves(condition.value_two & condition.value);
            vec![
                high,
                statement(AND, value_high),
                branch(JUMP_EQUAL, datum_high, 0, to_end + 3),
                low,
                statement(AND, value_low),
                branch(JUMP_EQUAL, datum_low, 0, to_end),
            ]
        }
        LinuxSeccompOperator::ScmpCmpGt => {
            ordered(high, low, condition.value, JUMP_GREATER, to_end)
        }
        LinuxSeccompOperator::ScmpCmpGe => {
            ordered(high, low, condition.value, JUMP_GREATER_OR_EQUAL, to_end)
        }
        LinuxSeccompOperator::ScmpCmpLt => {
            reversed(high, low, condition.value, JUMP_GREATER_OR_EQUAL, to_end)
        }
        LinuxSeccompOperator::ScmpCmpLe => {
            reversed(high, low, condition.value, JUMP_GREATER, to_end)
        }
    }
}

/// Holds when the argument stands above `value`; `code` decides the lower half.
fn ordered(
    high: Instruction,
    low: Instruction,
    value: u64,
    code: u16,
    to_end: u8,
) -> Vec<Instruction> {
    let [value_high, value_low] = halves(value);
    vec![
        high,
        branch(JUMP_GREATER, value_high, 3, 0),
        branch(JUMP_EQUAL, value_high, 0, to_end + 2),
        low,
        branch(code, value_low, 0, to_end),
    ]
}

/// Holds when the argument does not stand above `value`.
fn reversed(
    high: Instruction,
    low: Instruction,
    value: u64,
    code: u16,
    to_end: u8,
) -> Vec<Instruction> {
    let [value_high, value_low] = halves(value);
    vec![
        high,
        branch(JUMP_GREATER, value_high, to_end + 3, 0),
        branch(JUMP_EQUAL, value_high, 0, 2),
        low,
        branch(code, value_low, to_end, 0),
    ]
}

/// The upper and the lower half.
fn halves(value: u64) -> [u32; 2] {
    [value >> 32, value & u64::from(u32::MAX)]
        .map(|half| u32::try_from(half).expect("a half of a u64 has 32 bits"))
}
