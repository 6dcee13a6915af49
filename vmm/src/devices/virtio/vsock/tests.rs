//! The device from both ends: host programs on unix sockets, and a guest on the driver's side of
//! the queues.

mod guest;
mod hostile;

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
};

use guest::{GUEST_ROOM, Guest, Ports, drain, pattern};

use super::{
    super::{
        device::VirtioDevice,
        driver::{BUFFERS, Part},
        saved::Saved,
    },
    device::{Error, PACKETS_PER_TURN_MAX, Parameters, Vsock},
    packet::{Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND},
    table::room_bytes,
};

const BOTH: u32 = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;

#[test]
fn a_host_program_dials_the_guest_and_talks() {
    let (mut guest, _) = Guest::new(&[]);
    let (mut host, ports) = guest.connect(1025);
    host.write_all(b"process 1\n").unwrap();
    guest.run();
    assert_eq!(guest.sockets[&ports].read, b"process 1\n");
    assert_eq!(guest.write(ports, b"ok\n"), 3);
    assert_eq!(drain(&mut host).unwrap(), b"ok\n");
    drop(host);
    guest.run();
    assert_eq!(guest.sockets[&ports].host_shutdown, BOTH);
    assert_eq!(guest.counter("connections"), 0, "the guest answered by RST");
}

#[test]
fn bytes_behind_the_line_belong_to_the_connection_and_lines_may_come_in_pieces() {
    let (mut guest, _) = Guest::new(&[]);
    let mut host = guest.dial();
    for piece in ["CON", "NECT 10", "25", "\nfirst "] {
        host.write_all(piece.as_bytes()).unwrap();
        guest.run();
    }
    host.write_all(b"second").unwrap();
    guest.run();
    let (_, socket) = guest.sockets.iter().next().unwrap();
    assert_eq!(socket.read, b"first second");
}

#[test]
fn lines_that_are_none_and_deadlines_close_the_stream() {
    let (mut guest, _) = Guest::new(&[]);
    for line in [&b"HELLO\n"[..], b"CONNECT x\n", &[b'C'; 40]] {
        let mut host = guest.dial();
        host.write_all(line).unwrap();
        guest.run();
        // Unread bytes of the refused line may show as a reset.
        let mut byte = [0];
        let outcome = std::io::Read::read(&mut host, &mut byte);
        assert!(
            matches!(&outcome, Ok(0))
                || outcome.is_err_and(|e| e.raw_os_error() == Some(libc::ECONNRESET))
        );
    }
    let mut silent = guest.dial();
    guest.run();
    assert_eq!(guest.counter("connections"), 1);
    for _ in 0..20 {
        guest.device.tick();
    }
    assert_eq!(drain(&mut silent), None);
    assert_eq!(
        (
            guest.counter("connections"),
            guest.counter("connections_refused")
        ),
        (0, 4)
    );
}

#[test]
fn a_guest_that_refuses_or_never_answers_closes_the_stream() {
    let (mut guest, _) = Guest::new(&[]);
    guest.refills = false;
    guest.boot();
    let mut host = guest.dial();
    host.write_all(b"CONNECT 7\n").unwrap();
    guest.run();
    for _ in 0..20 {
        guest.device.tick();
    }
    assert_eq!(
        drain(&mut host),
        None,
        "no receive buffer, so no answer in time"
    );
    assert_eq!(
        guest.counter("connections"),
        0,
        "the guest never heard of it"
    );

    guest.refills = true;
    guest.boot();
    let (mut host, ports) = guest.connect(7);
    guest.control(ports, Operation::Reset, 0);
    assert_eq!(drain(&mut host), None);
}

#[test]
fn a_guest_dials_the_ports_that_it_was_given_and_no_other() {
    let (mut guest, mut hosts) = Guest::new(&[1024]);
    assert!(!guest.dial_host((5000, 1023)));
    assert!(
        guest
            .others
            .pop_front()
            .is_some_and(|rst| rst.destination_port == 5000)
    );
    assert!(guest.dial_host((5001, 1024)));
    assert!(!guest.dial_host((5002, 1024)), "one socket, one connection");
    let host = &mut hosts[0];
    host.set_nonblocking(true).unwrap();
    guest.write((5001, 1024), b"hello");
    assert_eq!(drain(host).unwrap(), b"hello");
    host.write_all(b"world").unwrap();
    guest.run();
    assert_eq!(guest.sockets[&(5001, 1024)].read, b"world");
}

/// Connections end with the device that is saved; the driver is told by the one that goes on.
#[test]
fn a_device_that_goes_on_tells_that_connections_are_gone() {
    let (mut guest, _hosts) = Guest::new(&[]);
    let (mut stream, _) = guest.connect(7);
    let saved = guest.device.save();
    assert_eq!(
        stream.read(&mut [0; 8]).unwrap(),
        0,
        "the host's program sees its end"
    );
    let text = serde_json::to_string(&saved).unwrap();
    let saved: Saved = serde_json::from_str(&text).unwrap();
    guest.device.restore(&saved.state).unwrap();
    let event = BUFFERS + (8 << 20);
    guest.driver.put(event, &[0xff; 4]);
    guest.driver.queues[2]
        .offer(&[Part::Write(event, 4)])
        .unwrap();
    let activation = guest.driver.activation_at(0, &saved.queues);
    guest.device.activate(activation).unwrap();
    assert_eq!(guest.driver.get(event, 4), [0; 4], "transport reset");
    assert_eq!(
        guest.driver.queues[2].take_used().map(|used| used.1),
        Some(4)
    );
    guest.sockets.clear();
    let (_stream, ports) = guest.connect(8);
    assert!(guest.sockets[&ports].open, "the queues go on");
}

#[test]
fn directions_end_one_by_one() {
    let (mut guest, _) = Guest::new(&[]);
    let (mut host, ports) = guest.connect(1025);
    host.write_all(b"last words").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    guest.run();
    let socket = &guest.sockets[&ports];
    assert_eq!(
        (socket.read.as_slice(), socket.host_shutdown),
        (&b"last words"[..], SHUTDOWN_SEND)
    );
    assert_eq!(guest.write(ports, b"answer"), 6);
    assert_eq!(drain(&mut host).unwrap(), b"answer");
    guest.control(ports, Operation::Shutdown, SHUTDOWN_SEND);
    guest.run();
    assert_eq!(drain(&mut host), None);
    drop(host);
    guest.run();
    assert_eq!(guest.counter("connections"), 0);

    let (mut host, ports) = guest.connect(1025);
    guest.control(ports, Operation::Shutdown, SHUTDOWN_SEND);
    guest.run();
    assert_eq!(drain(&mut host), None);
    host.write_all(b"still read").unwrap();
    guest.run();
    assert_eq!(guest.sockets[&ports].read, b"still read");
}

#[test]
fn a_guest_that_closes_loses_nothing_and_its_peer_sees_an_end_in_order() {
    let (mut guest, _) = Guest::new(&[]);
    let room = usize::try_from(room_bytes(0)).unwrap();
    let sent = pattern(1, 2 * room);
    for answered in [true, false] {
        let (mut host, ports) = guest.connect(1025);
        host.write_all(b"never read by the guest").unwrap();
        let mut written = 0;
        // The host does not read: socket and backlog fill.
        loop {
            let count = guest.write(ports, &sent[written..]);
            if count == 0 {
                break;
            }
            written += count;
            guest.run();
        }
        assert!(guest.counter("bytes_buffered") > 0);
        guest.control(ports, Operation::Shutdown, BOTH);
        if !answered {
            // What Linux does when its close times out.
            guest.control(ports, Operation::Reset, 0);
        }
        let mut received = Vec::new();
        while let Some(piece) = drain(&mut host) {
            received.extend(piece);
            guest.run();
        }
        assert_eq!(received.len(), written);
        assert!(received == sent[..written]);
        guest.run();
        assert_eq!(
            (guest.counter("connections"), guest.sockets[&ports].reset),
            (0, answered)
        );
    }
}

#[test]
fn memory_stays_bounded_when_the_host_stops_reading() {
    let (mut guest, _) = Guest::new(&[]);
    let data = pattern(2, 1 << 20);
    let mut hosts: Vec<(UnixStream, Ports)> = (0..70).map(|_| guest.connect(1025)).collect();
    let mut written = vec![0; hosts.len()];
    let mut progress = true;
    while progress {
        progress = false;
        for ((_, ports), written) in hosts.iter().zip(&mut written) {
            let count = guest.write(*ports, &data[*written..]);
            *written += count;
            progress |= count > 0;
            guest.run();
        }
    }
    let rooms: u64 = (0..70).map(|slot| u64::from(room_bytes(slot))).sum();
    let buffered = guest.counter("bytes_buffered");
    assert!(buffered > 0 && buffered <= rooms, "{buffered} of {rooms}");
    assert!(
        !guest.driver.turn(&mut guest.device, 0).unwrap(),
        "nothing to do, so no spinning"
    );
    // The readers come back.
    for ((host, ports), written) in hosts.iter_mut().zip(&mut written) {
        let mut received = Vec::new();
        while received.len() < data.len() {
            received.extend(drain(host).unwrap());
            guest.run();
            *written += guest.write(*ports, &data[*written..]);
        }
        assert!(received == data);
    }
    assert_eq!(guest.counter("bytes_buffered"), 0);
}

#[test]
fn memory_stays_bounded_when_the_guest_stops_reading() {
    let (mut guest, _) = Guest::new(&[]);
    let (mut host, ports) = guest.connect(1025);
    guest.reads = false;
    let data = pattern(3, 4 << 20);
    let mut written = 0;
    while let Ok(count) = host.write(&data[written..]) {
        written += count;
        guest.run();
    }
    assert_eq!(guest.sockets[&ports].unread.len(), GUEST_ROOM as usize);
    assert_eq!(guest.counter("bytes_buffered"), 0);
    assert!(
        !guest.driver.turn(&mut guest.device, 0).unwrap(),
        "nothing to do, so no spinning"
    );
    // The host gives up; the guest still gets what was written, then the end.
    drop(host);
    guest.run();
    assert!(
        !guest.driver.turn(&mut guest.device, 0).unwrap(),
        "a hang-up does not spin either"
    );
    guest.reads = true;
    guest.read(ports);
    guest.run();
    let socket = &guest.sockets[&ports];
    assert_eq!((socket.read.len(), socket.host_shutdown), (written, BOTH));
    assert!(socket.read == data[..written]);
    assert_eq!(guest.counter("connections"), 0);
}

#[test]
fn a_guest_without_buffers_delays_and_does_not_spin() {
    let (mut guest, _) = Guest::new(&[]);
    let (mut host, ports) = guest.connect(1025);
    guest.refills = false;
    let data = pattern(4, 4 << 20);
    let mut written = 0;
    while let Ok(count) = host.write(&data[written..]) {
        written += count;
        guest.run();
    }
    assert!(!guest.driver.turn(&mut guest.device, 0).unwrap());
    guest.refills = true;
    guest.refill();
    guest.device.queue_kicked(0).unwrap();
    guest.run();
    assert!(guest.sockets[&ports].read == data[..written]);
}

#[test]
fn a_whole_turn_that_empties_the_queue_leaves_no_driver_unheard() {
    let (mut guest, _) = Guest::new(&[]);
    let header = guest.header((1, 2), Operation::Reset);
    guest.driver.put(BUFFERS + 0x10_0000, &header.to_bytes());
    for _ in 0..PACKETS_PER_TURN_MAX {
        let part = Part::Read(BUFFERS + 0x10_0000, 44);
        guest.driver.queues[1].offer(&[part]).unwrap();
    }
    guest.device.queue_kicked(1).unwrap();
    while guest.driver.turn(&mut guest.device, 0).unwrap() {}
    assert!(guest.driver.queues[1].wants_notification());
}

#[test]
fn a_shutdown_that_the_guest_ignores_ends_by_rst() {
    let (mut guest, _) = Guest::new(&[]);
    let (mut host, ports) = guest.connect(1025);
    guest.reads = false;
    host.write_all(b"unread").unwrap();
    guest.run();
    drop(host);
    guest.run();
    assert_eq!(guest.counter("connections"), 1);
    for _ in 0..20 {
        guest.device.tick();
    }
    guest.run();
    assert!(guest.sockets[&ports].reset);
    assert_eq!(guest.counter("connections"), 0);
}

/// `count` connections move `len` bytes each way at the same time, checked byte by byte.
fn exchange(guest: &mut Guest, count: usize, len: usize) {
    struct Pair {
        host: UnixStream,
        ports: Ports,
        to_guest: Vec<u8>,
        to_host: Vec<u8>,
        host_written: usize,
        guest_written: usize,
        host_read: Vec<u8>,
    }
    let mut pairs: Vec<Pair> = (0..count)
        .map(|index| {
            let (host, ports) = guest.connect(1025);
            Pair {
                host,
                ports,
                to_guest: pattern(index as u64, len),
                to_host: pattern(!index as u64, len),
                host_written: 0,
                guest_written: 0,
                host_read: Vec::new(),
            }
        })
        .collect();
    assert_eq!(guest.counter("connections"), count as u64);
    let mut open = true;
    while open {
        open = false;
        for pair in &mut pairs {
            if let Ok(count) = pair.host.write(&pair.to_guest[pair.host_written..]) {
                pair.host_written += count;
            }
            pair.guest_written += guest.write(pair.ports, &pair.to_host[pair.guest_written..]);
            if pair.host_read.len() < len {
                pair.host_read.extend(drain(&mut pair.host).unwrap());
            }
            let guest_read = guest.sockets[&pair.ports].read.len();
            open |= pair.host_read.len() < len || guest_read < len;
        }
        guest.run();
    }
    for pair in pairs {
        assert!(pair.host_read == pair.to_host);
        assert!(guest.sockets[&pair.ports].read == pair.to_guest);
        drop(pair.host);
    }
    guest.run();
    assert_eq!(guest.counter("connections"), 0);
    assert_eq!(guest.counter("connections_reset"), 0);
}

#[test]
fn a_thousand_connections_at_once_keep_their_bytes() {
    raise_descriptor_limit();
    let (mut guest, _) = Guest::new(&[]);
    exchange(&mut guest, 1000, 24 << 10);
    assert_eq!(guest.counter("connections_opened"), 1000);
}

#[test]
fn a_few_connections_move_many_bytes() {
    let (mut guest, _) = Guest::new(&[]);
    exchange(&mut guest, 4, 3 << 20);
}

/// `cargo test -p pericarp-vmm -- --ignored --nocapture gibibyte` runs it and says the time.
#[test]
#[ignore = "takes half a minute without optimisation"]
fn a_gibibyte_each_way() {
    const TOTAL: usize = 1 << 30;
    let (mut guest, _) = Guest::new(&[]);
    let (mut host, ports) = guest.connect(1025);
    // A prime length, so that no buffer size hides a shift.
    let period = pattern(9, 1_048_573);
    let doubled = [period.as_slice(), period.as_slice()].concat();
    let expected = |at: usize, len: usize| {
        let start = at % period.len();
        &doubled[start..start + len]
    };
    let began = std::time::Instant::now();
    let (mut to_guest, mut to_host, mut at_guest, mut at_host) = (0, 0, 0, 0);
    while at_guest < TOTAL || at_host < TOTAL {
        let len = (TOTAL - to_guest).min(256 << 10);
        if let Ok(count) = host.write(expected(to_guest, len)) {
            to_guest += count;
        }
        let len = (TOTAL - to_host).min(256 << 10);
        to_host += guest.write(ports, expected(to_host, len));
        if at_host < TOTAL {
            let piece = drain(&mut host).unwrap();
            assert!(piece == expected(at_host, piece.len()));
            at_host += piece.len();
        }
        guest.run();
        let piece = std::mem::take(&mut guest.sockets.get_mut(&ports).unwrap().read);
        assert!(piece == expected(at_guest, piece.len()));
        at_guest += piece.len();
    }
    let seconds = began.elapsed().as_secs_f64();
    println!("1 GiB each way in {seconds:.2} s, both ends and all checks on one thread");
}

/// Both ends of each connection are in this process: 2 x 1000 descriptors.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(4096).min(hard), hard).unwrap();
}

#[test]
fn reserved_context_ids_are_refused_by_name() {
    for guest_cid in [0, 1, 2, u64::from(u32::MAX), 1 << 32] {
        let outcome = Vsock::new("v".to_owned(), Parameters { guest_cid }, None, []);
        assert!(matches!(&outcome, Err(Error::GuestCid(cid)) if *cid == guest_cid));
        assert!(outcome.unwrap_err().to_string().contains("guest_cid"));
    }
    let (guest, _) = Guest::new(&[]);
    let mut config = [0xff; 12];
    guest.device.read_config(0, &mut config);
    assert_eq!(config, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}
