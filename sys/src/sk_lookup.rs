//! One TCP listener for every port of a network namespace, by a `BPF_PROG_TYPE_SK_LOOKUP` program
//! (Linux 5.9, `Documentation/bpf/prog_sk_lookup.rst`).
//!
//! The program is asked for a listener when a connection request arrives for the namespace's own
//! stack, and answers with the one socket of its map. The accepted connection's local address is
//! the one that the peer dialled.

use std::{
    io,
    net::TcpListener,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use crate::bpf::{self, Instruction, bpf};

// uapi/linux/bpf.h.
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;
const HELPER_MAP_LOOKUP_ELEM: i32 = 1;
const HELPER_SK_RELEASE: i32 = 86;
const HELPER_SK_ASSIGN: i32 = 124;
const SK_PASS: i32 = 1;

#[repr(C)]
struct MapAttributes {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

#[repr(C)]
struct ElementAttributes {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct LinkAttributes {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// Holds the redirection; dropping it ends it.
#[derive(Debug)]
pub struct AllPorts {
    _link: OwnedFd,
}

/// Makes `listener` the one that answers every TCP port of `network_namespace` that nobody listens
/// on more specifically.
///
/// # Errors What bpf(2) says: `EPERM` without the right to, `EINVAL` on a kernel without socket
/// lookup programs.
pub fn listen_on_all_ports(
    network_namespace: BorrowedFd<'_>,
    listener: &TcpListener,
) -> io::Result<AllPorts> {
    let map = make_map(listener)?;
    let instructions = program(map.as_raw_fd());
    let program = bpf::load(BPF_PROG_TYPE_SK_LOOKUP, BPF_SK_LOOKUP, &instructions)?;
    let attributes = LinkAttributes {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        target_fd: network_namespace.as_raw_fd().cast_unsigned(),
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: the attributes hold numbers only.
    let link = unsafe { bpf(BPF_LINK_CREATE, &attributes) }?;
    // SAFETY: the kernel just made this descriptor for this call, so nothing else owns it.
    let link = unsafe { OwnedFd::from_raw_fd(link) };
    // The link holds the program, and the program its map.
    Ok(AllPorts { _link: link })
}

fn make_map(listener: &TcpListener) -> io::Result<OwnedFd> {
    let attributes = MapAttributes {
        map_type: BPF_MAP_TYPE_SOCKMAP,
        key_size: 4,
        value_size: 8,
        max_entries: 1,
        map_flags: 0,
    };
    // SAFETY: the attributes hold numbers only.
    let fd = unsafe { bpf(BPF_MAP_CREATE, &attributes) }?;
    // SAFETY: the kernel just made this descriptor for this call, so nothing else owns it.
    let map = unsafe { OwnedFd::from_raw_fd(fd) };
    let key = 0_u32;
    let value = u64::from(listener.as_fd().as_raw_fd().cast_unsigned());
    let attributes = ElementAttributes {
        map_fd: map.as_raw_fd().cast_unsigned(),
        padding: 0,
        key: std::ptr::from_ref(&key).expose_provenance() as u64,
        value: std::ptr::from_ref(&value).expose_provenance() as u64,
        flags: 0,
    };
    // SAFETY: key and value are of the sizes that the map was made with, and live through the call;
    // the kernel only reads them.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &attributes) }?;
    Ok(map)
}

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: to | (from << 4),
        offset,
        immediate,
    }
}

/// `sk = map[0]; if sk { bpf_sk_assign(ctx, sk, 0); bpf_sk_release(sk) } return SK_PASS`. An
/// assignment that the kernel refuses (UDP, another family) leaves the ordinary lookup.
fn program(map: i32) -> Vec<Instruction> {
    const MOVE_REGISTER: u8 = 0xbf;
    const MOVE_CONSTANT: u8 = 0xb7;
    const ADD_CONSTANT: u8 = 0x07;
    const STORE_WORD_CONSTANT: u8 = 0x62;
    const LOAD_DOUBLE_CONSTANT: u8 = 0x18;
    const PSEUDO_MAP: u8 = 1;
    const CALL: u8 = 0x85;
    const JUMP_IF_EQUAL: u8 = 0x15;
    const EXIT: u8 = 0x95;
    vec![
        instruction(MOVE_REGISTER, 6, 1, 0, 0),
        instruction(STORE_WORD_CONSTANT, 10, 0, -4, 0),
        instruction(LOAD_DOUBLE_CONSTANT, 1, PSEUDO_MAP, 0, map),
        instruction(0, 0, 0, 0, 0),
        instruction(MOVE_REGISTER, 2, 10, 0, 0),
        instruction(ADD_CONSTANT, 2, 0, 0, -4),
        instruction(CALL, 0, 0, 0, HELPER_MAP_LOOKUP_ELEM),
        instruction(JUMP_IF_EQUAL, 0, 0, 7, 0),
        instruction(MOVE_REGISTER, 7, 0, 0, 0),
        instruction(MOVE_REGISTER, 1, 6, 0, 0),
        instruction(MOVE_REGISTER, 2, 7, 0, 0),
        instruction(MOVE_CONSTANT, 3, 0, 0, 0),
        instruction(CALL, 0, 0, 0, HELPER_SK_ASSIGN),
        instruction(MOVE_REGISTER, 1, 7, 0, 0),
        instruction(CALL, 0, 0, 0, HELPER_SK_RELEASE),
        instruction(MOVE_CONSTANT, 0, 0, 0, SK_PASS),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use std::{fs::File, net::TcpStream};

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    /// In a network namespace of its own, so that the machine's connections are left alone.
    #[test]
    fn every_port_of_both_families_is_answered() {
        let tested = std::thread::spawn(|| {
            if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
                println!("skipped: no network namespace of its own: {error}");
                return;
            }
            crate::loopback::bring_up().unwrap();
            let listener = TcpListener::bind("[::]:0").unwrap();
            let namespace = File::open("/proc/thread-self/ns/net").unwrap();
            let _held = match listen_on_all_ports(namespace.as_fd(), &listener) {
                Ok(held) => held,
                Err(error) => {
                    println!("skipped: this kernel has no socket lookup programs: {error}");
                    return;
                }
            };
            for address in ["127.0.0.1:80", "127.0.0.1:65535", "[::1]:8080"] {
                let client = TcpStream::connect(address).unwrap();
                let (accepted, _) = listener.accept().unwrap();
                assert_eq!(
                    accepted.local_addr().unwrap().port(),
                    client.peer_addr().unwrap().port()
                );
            }
        });
        tested.join().unwrap();
    }
}
