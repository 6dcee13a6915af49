//! What a hostile guest may try: the device breaks or the one connection ends, and nothing grows,
//! hangs or panics.

use std::io::Write;

use proptest::prelude::*;

use super::{
    super::{
        super::{
            device::VirtioDevice,
            driver::{BUFFERS, Driver, Part, assert_hostile_chains_break},
        },
        Parameters, Vsock,
        muxer::REPLIES_MAX,
        packet::{HEADER_BYTES, Header, Operation},
        table::room_bytes,
    },
    guest::{CID, Guest, drain},
};

fn device() -> Vsock {
    let parameters = Parameters { guest_cid: CID };
    Vsock::new("vsock0".to_owned(), parameters, None, []).unwrap()
}

#[test]
fn malformed_chains_break_the_device() {
    assert_hostile_chains_break(device, &[8, 8, 8], &[1]);
    let header = u32::try_from(HEADER_BYTES).unwrap();
    for parts in [
        &[Part::Read(BUFFERS, header - 1)][..],
        &[Part::Write(BUFFERS, header)],
        &[Part::Read(BUFFERS, header), Part::Write(BUFFERS, 8)],
    ] {
        let mut device = device();
        let mut driver = Driver::new(&[8, 8, 8]);
        device.activate(driver.activation(0)).unwrap();
        driver.queues[1].offer(parts).unwrap();
        assert!(device.queue_kicked(1).is_err(), "{parts:?}");
    }
}

#[test]
fn a_length_past_the_buffers_breaks_the_device() {
    let (mut guest, _) = Guest::new(&[]);
    let (_host, ports) = guest.connect(1);
    for len in [6, u32::MAX] {
        let mut header = guest.header(ports, Operation::Data);
        header.len = len;
        assert!(guest.offer(&header, b"12345"));
        assert!(guest.device.queue_kicked(1).is_err());
        guest.boot();
    }
}

#[test]
fn unfit_receive_buffers_break_the_device_when_they_are_needed() {
    let header = u32::try_from(HEADER_BYTES).unwrap();
    for parts in [
        [Part::Write(BUFFERS, header)],
        [Part::Write(BUFFERS, 0)],
        [Part::Read(BUFFERS, 4096)],
    ] {
        let (mut guest, _) = Guest::new(&[]);
        guest.refills = false;
        guest.boot();
        guest.driver.queues[0].offer(&parts).unwrap();
        let mut host = guest.dial();
        host.write_all(b"CONNECT 1\n").unwrap();
        let broken = (0..10).any(|_| guest.driver.turn(&mut guest.device, 0).is_err());
        assert!(broken, "{parts:?}");
    }
}

#[test]
fn more_than_its_credit_ends_the_connection_and_no_other() {
    let (mut guest, _) = Guest::new(&[]);
    let (mut host, ports) = guest.connect(1);
    let (mut other, other_ports) = guest.connect(1);
    let piece = vec![1; 32 << 10];
    let mut header = guest.header(ports, Operation::Data);
    header.len = 32 << 10;
    // Enough for the unix socket, the room, and one more.
    for _ in 0..64 {
        guest.send(&header, &piece);
    }
    guest.run();
    assert!(guest.sockets[&ports].reset);
    assert!(guest.counter("bytes_buffered") <= u64::from(room_bytes(0)));
    assert!(guest.counter("connections_reset") >= 1);
    while drain(&mut host).is_some() {}
    guest.write(other_ports, b"fine");
    assert_eq!(drain(&mut other).unwrap(), b"fine");
}

#[test]
fn packets_of_no_connection_are_answered_and_answers_are_bounded() {
    let (mut guest, _) = Guest::new(&[]);
    guest.refills = false;
    guest.boot();
    let mut sent = 0;
    // No receive buffers: the transmit queue stalls instead of the answers growing.
    for _ in 0..10 {
        for port in 0..200 {
            let header = guest.header((port, 9), Operation::Data);
            sent += u64::from(guest.offer(&header, &[]));
        }
        guest.device.queue_kicked(1).unwrap();
        guest.run();
    }
    assert_eq!(guest.counter("connections_refused"), REPLIES_MAX as u64);
    assert!(sent > REPLIES_MAX as u64);
    guest.refills = true;
    guest.refill();
    guest.device.queue_kicked(0).unwrap();
    guest.run();
    assert_eq!(guest.counter("connections_refused"), sent);
    assert_eq!(guest.others.len() as u64, sent);
    // No answer to RST, nor to a guest that says that it is another one.
    guest.others.clear();
    guest.control((1, 9), Operation::Reset, 0);
    let mut header = guest.header((1, 9), Operation::Request);
    header.source_cid = 99;
    guest.send(&header, &[]);
    guest.run();
    assert!(guest.others.is_empty());
}

#[test]
fn other_types_hosts_and_operations_are_refused() {
    let (mut guest, _hosts) = Guest::new(&[1024]);
    let good = guest.header((5, 1024), Operation::Request);
    for bad in [
        Header {
            socket_type: 2,
            ..good
        },
        Header {
            operation: 0,
            ..good
        },
        Header {
            operation: 77,
            ..good
        },
        Header {
            operation: Operation::Response.number(),
            ..good
        },
    ] {
        guest.send(&bad, &[]);
        guest.run();
        let rst = guest.others.pop_front().unwrap();
        assert_eq!((rst.operation, rst.socket_type), (3, bad.socket_type));
    }
    assert_eq!(guest.counter("connections"), 0);
}

#[test]
fn a_reset_at_every_step_leaves_a_device_that_works() {
    for step in 0..8 {
        let (mut guest, _hosts) = Guest::new(&[1024]);
        let mut host = guest.dial();
        let mut done = 0;
        let mut act = |guest: &mut Guest, what: &mut dyn FnMut(&mut Guest)| {
            if done < step {
                what(guest);
            }
            done += 1;
        };
        act(&mut guest, &mut |guest| guest.run());
        act(&mut guest, &mut |_| host.write_all(b"CONNECT 1\n").unwrap());
        act(&mut guest, &mut |guest| {
            guest.driver.turn(&mut guest.device, 0).unwrap();
        });
        act(&mut guest, &mut |guest| guest.run());
        act(&mut guest, &mut |guest| assert!(guest.dial_host((9, 1024))));
        act(&mut guest, &mut |guest| {
            guest.write((9, 1024), b"data");
        });
        act(&mut guest, &mut |guest| {
            guest.control((9, 1024), Operation::Shutdown, 3)
        });
        guest.device.reset();
        guest.device.reset();
        for queue in 0..4 {
            guest.device.queue_kicked(queue).unwrap();
            guest
                .device
                .descriptor_ready(u32::from(queue), 0x1f)
                .unwrap();
        }
        assert_eq!(guest.counter("connections"), 0);
        guest.boot();
        let (mut host, ports) = guest.connect(1);
        guest.write(ports, b"again");
        assert_eq!(drain(&mut host).unwrap(), b"again");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Random packets on two real connections and around them.
    #[test]
    fn random_packets_never_do_harm(
        packets in prop::collection::vec(
            (
                0..3u32, 0..3u32, 0..9u16, 0..4u32,
                any::<u32>(), any::<u32>(), 0..9000usize, any::<bool>(),
            ),
            1..60,
        ),
    ) {
        let (mut guest, _hosts) = Guest::new(&[0, 1, 2]);
        let (_host, host_ports) = guest.connect(0);
        for (guest_port, host_port, operation, flags, buf_alloc, fwd_cnt, len, dialled) in packets {
            let ports = if dialled { host_ports } else { (guest_port, host_port) };
            let mut header = guest.header(ports, Operation::Data);
            header.operation = operation;
            header.flags = flags;
            (header.buf_alloc, header.fwd_cnt) = (buf_alloc, fwd_cnt);
            let data = vec![5; if operation == 5 { len } else { 0 }];
            header.len = u32::try_from(data.len()).unwrap();
            guest.sockets.clear();
            guest.send(&header, &data);
            guest.run();
            prop_assert!(guest.counter("connections") <= 4);
            prop_assert!(guest.counter("bytes_buffered") <= 4 * u64::from(room_bytes(0)));
        }
        guest.boot();
        prop_assert_eq!(guest.counter("connections"), 0);
    }
}
