//! `bpf(2)`, as far as the device rules of a cgroup need it: load a program, attach it, take it
//! away.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

// uapi/linux/bpf.h; libc has none of them.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_DETACH: libc::c_int = 9;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// `struct bpf_insn` of uapi/linux/bpf.h.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// Operation.
    pub code: u8,
    /// Destination register in the low half, source in the high half.
    pub registers: u8,
    /// Signed jump or memory offset.
    pub offset: i16,
    /// Signed constant.
    pub immediate: i32,
}

// The members of `union bpf_attr` that the commands read; the kernel takes shorter unions than its
// own.
#[repr(C)]
struct LoadAttributes {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
struct AttachAttributes {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

/// Loads a program that decides on the use of devices: 1 allows, 0 refuses.
///
/// # Errors
/// `EINVAL` or `EACCES` when the kernel's verifier refuses it, `EPERM` without the right to load
/// programs.
pub fn load_device_program(instructions: &[Instruction]) -> io::Result<OwnedFd> {
    // Nothing to expect: the type says where it may be attached.
    load(BPF_PROG_TYPE_CGROUP_DEVICE, 0, instructions)
}

/// Loads a program of a type, to be attached as `expected_attach_type`.
pub(crate) fn load(
    prog_type: u32,
    expected_attach_type: u32,
    instructions: &[Instruction],
) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let attributes = LoadAttributes {
        prog_type,
        insn_cnt: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        insns: instructions.as_ptr().expose_provenance() as u64,
        license: license.as_ptr().expose_provenance() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name: [0; 16],
        prog_ifindex: 0,
        expected_attach_type,
    };
    // SAFETY: `insns` and `license` point to live memory of the stated length that the kernel only
    // reads.
    let fd = unsafe { bpf(BPF_PROG_LOAD, &attributes) }?;
    // SAFETY: the kernel just made this descriptor for this call, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a device program to the cgroup whose directory is `cgroup`, beside others: all of them
/// must allow.
///
/// # Errors
/// The kernel's.
pub fn attach_device_program(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    attachment(BPF_PROG_ATTACH, cgroup, program, BPF_F_ALLOW_MULTI)
}

/// Takes away what [`attach_device_program`] attached.
///
/// # Errors
/// The kernel's.
pub fn detach_device_program(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    attachment(BPF_PROG_DETACH, cgroup, program, 0)
}

fn attachment(
    command: libc::c_int,
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    attach_flags: u32,
) -> io::Result<()> {
    let attributes = AttachAttributes {
        target_fd: cgroup.as_raw_fd().cast_unsigned(),
        attach_bpf_fd: program.as_raw_fd().cast_unsigned(),
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags,
    };
    // SAFETY: the attributes hold numbers only.
    unsafe { bpf(command, &attributes) }.map(|_| ())
}

/// # Safety
/// Pointers in `attributes` point to live memory as `command` wants it.
pub(crate) unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<RawFd> {
    // SAFETY: the structure lives through the call and its true size is given; for what it points
    // to, the caller answers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    RawFd::try_from(result).map_err(io::Error::other)
}
