//! One fuzz entry for each kind of device: makes it and plays a program against it.
//!
//! virtio-fs has none: its queues are read by the daemon, and of a driver's bytes this process sees
//! registers alone, which [`super::machine`] plays with.

use std::{
    cell::RefCell,
    fs::File,
    io::{Read, Write},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::memfd::{MFdFlags, memfd_create},
};
use pericarp_sys::tap;

use super::program::{MEMORY_BYTES, play};
use crate::devices::virtio::{
    balloon::{self as balloon_device, Balloon},
    blk::{self as blk_device, Blk},
    console::Console,
    discard::Discard,
    mem::{self as mem_device, Mem},
    net::{self as net_device, Net},
    pmem::Pmem,
    rate_limiter::Rates,
    rng::Rng,
    vsock::{self as vsock_device, Vsock},
};

/// Connections of host programs that one program may open.
const STREAMS_MAX: usize = 8;
/// Port that the guest may dial, once.
const GUEST_DIALS: u32 = 1024;

pub(super) fn file(bytes: u64) -> File {
    let file = memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).expect("a file in memory");
    let file = File::from(file);
    file.set_len(bytes).expect("a small file");
    file
}

/// The disk.
pub fn blk(data: &[u8]) {
    thread_local! {
        // Made once: a ring costs more than a program.
        static DISK: RefCell<Option<Blk>> = const { RefCell::new(None) };
    }
    let make = || {
        let parameters = blk_device::Parameters {
            read_only: false,
            serial: "fuzz".to_owned(),
            queues: 2,
            cache: blk_device::Cache::WriteBack,
            limit: Rates::NONE,
        };
        Blk::new("fuzz".to_owned(), &parameters, file(1 << 20).into()).expect("a disk")
    };
    DISK.with_borrow_mut(|disk| {
        play(disk.get_or_insert_with(make), &mut |_| {}, data);
    });
}

/// The network device, on a tap that nothing else uses. Needs the right to make one.
pub fn net(data: &[u8]) {
    thread_local! {
        // Made once: a device leaves the queues of its taps detached.
        static DEVICE: RefCell<Option<Net>> = RefCell::new(device());
    }
    DEVICE.with_borrow_mut(|device| {
        if let Some(device) = device {
            play(device, &mut |_| {}, data);
        }
    });
}

fn device() -> Option<Net> {
    // A network of this thread's own: nobody else gets its packets.
    unshare(CloneFlags::CLONE_NEWNET).ok()?;
    let taps = (0..2).map(|_| tap::open("fuzz0", true).ok());
    let taps = taps.collect::<Option<Vec<_>>>()?;
    let parameters = net_device::Parameters {
        mac: [2, 0, 0, 0, 0, 2],
        mtu: 1500,
        queue_size: 256,
        offloads: true,
        receive: Rates::NONE,
        transmit: Rates::NONE,
    };
    let device = Net::new("fuzz".to_owned(), &parameters, taps, Vec::new());
    Some(device.expect("a device on sound taps"))
}

/// The sockets, with host programs that dial, write, read and hang up.
pub fn vsock(data: &[u8]) {
    thread_local! {
        static LISTENER: UnixListener = {
            let listener = UnixListener::bind_addr(&fresh_address()).expect("a fresh name");
            listener.set_nonblocking(true).expect("a listener");
            listener
        };
    }
    let listener = LISTENER.with(|listener| listener.try_clone().expect("a second handle"));
    let address = listener.local_addr().expect("it has a name");
    let (near, far) = UnixStream::pair().expect("a pair of sockets");
    near.set_nonblocking(true).expect("a socket");
    let mut streams = vec![near];
    let parameters = vsock_device::Parameters { guest_cid: 3 };
    let dialled = [(GUEST_DIALS, far)];
    let vsock = Vsock::new("fuzz".to_owned(), parameters, Some(listener), dialled);
    play(
        &mut vsock.expect("a vsock device"),
        &mut |bytes| host_program(&mut streams, &address, bytes),
        data,
    );
    // What nobody accepted must not reach the next program.
    LISTENER.with(|listener| while listener.accept().is_ok() {});
}

/// A name that this process has not used.
pub(super) fn fresh_address() -> SocketAddr {
    static USED: AtomicU64 = AtomicU64::new(0);
    let number = USED.fetch_add(1, Relaxed);
    let name = format!("pericarp-fuzz-{}-{number}", std::process::id());
    SocketAddr::from_abstract_name(name).expect("a short name")
}

fn host_program(streams: &mut Vec<UnixStream>, address: &SocketAddr, bytes: &[u8]) {
    let Some((act, rest)) = bytes.split_first() else {
        return;
    };
    let chosen = usize::from(act >> 2) % streams.len().max(1);
    let has_room = streams.len() < STREAMS_MAX;
    match (act & 3, streams.get_mut(chosen)) {
        (0, _) if has_room => {
            if let Ok(mut stream) = UnixStream::connect_addr(address) {
                let _ = stream.set_nonblocking(true);
                let _ = stream.write_all(b"CONNECT 7\n");
                streams.push(stream);
            }
        }
        (1, Some(stream)) => drop(stream.write(rest)),
        (2, Some(stream)) => drop(stream.read(&mut [0; 4096])),
        (3, Some(_)) => drop(streams.swap_remove(chosen)),
        _ => {}
    }
}

/// The balloon.
pub fn balloon(data: &[u8]) {
    let parameters = balloon_device::Parameters {
        deflate_on_oom: true,
        free_page_reporting: true,
    };
    let balloon = Balloon::new("fuzz".to_owned(), parameters, Discard::default());
    play(&mut balloon.expect("a balloon"), &mut |_| {}, data);
}

/// Pluggable memory, a block of it: the whole of the program's memory.
pub fn mem(data: &[u8]) {
    let parameters = mem_device::Parameters {
        address: 0,
        region_bytes: MEMORY_BYTES,
        block_bytes: MEMORY_BYTES,
        requested_bytes: MEMORY_BYTES,
    };
    let mem = Mem::new("fuzz".to_owned(), parameters, Discard::default());
    play(&mut mem.expect("pluggable memory"), &mut |_| {}, data);
}

/// Persistent memory.
pub fn pmem(data: &[u8]) {
    let mut pmem = Pmem::new("fuzz".to_owned(), file(4096)).expect("persistent memory");
    play(&mut pmem, &mut |_| {}, data);
}

/// Random numbers.
pub fn rng(data: &[u8]) {
    play(&mut Rng::new("fuzz".to_owned()), &mut |_| {}, data);
}

/// The console, with a reader that may stop.
pub fn console(data: &[u8]) {
    let (mut near, far) = UnixStream::pair().expect("a pair of sockets");
    near.set_nonblocking(true).expect("a socket");
    let mut console = Console::new("fuzz".to_owned(), far.into()).expect("a console");
    let mut read = |_: &[u8]| drop(near.read(&mut [0; 4096]));
    play(&mut console, &mut read, data);
}
