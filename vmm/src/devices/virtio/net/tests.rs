//! The device between a driver's double and a real tap in a network namespace of the test's own.

use std::{
    net::UdpSocket,
    os::fd::{AsFd, OwnedFd},
    process::Command as Process,
    sync::atomic::Ordering,
    time::Duration,
};

use nix::sched::{CloneFlags, unshare};
use pericarp_sys::tap;

use super::{
    Net, Parameters,
    open::Error,
    request::{
        F_CSUM, F_CTRL_VQ, F_GUEST_CSUM, F_GUEST_TSO4, F_MAC, F_MQ, F_MRG_RXBUF, HEADER_BYTES,
        PACKET_BYTES_MAX,
    },
};
use crate::devices::virtio::{
    device::{Command, VirtioDevice},
    driver::{BUFFERS, Driver, HOSTILE_CHAINS, Part, assert_hostile_chains_break},
    rate_limiter::{Rate, Rates},
    saved::{DeviceState, Saved},
};

const QUEUE_SIZE: u16 = 256;
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const HOST: &str = "10.9.0.1";
const GUEST: &str = "10.9.0.2";
const PORT: u16 = 9000;
const UDP_OFFSET: usize = HEADER_BYTES + 14 + 20;
const PAYLOAD_OFFSET: usize = UDP_OFFSET + 8;
/// Bytes between the receive buffers of the driver's double.
const SLOT: u64 = 4096;

fn ip(arguments: &str) -> bool {
    Process::new("ip")
        .args(arguments.split(' '))
        .status()
        .is_ok_and(|status| status.success())
}

/// Runs a test with `queues` tap queues in a network namespace of its own, or says why it cannot.
fn with_taps(queues: usize, mtu: u32, test: impl FnOnce(Vec<OwnedFd>) + Send) {
    std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
                println!("skipped: no network namespace can be made here: {error}");
                return;
            }
            let taps: Result<Vec<_>, _> =
                (0..queues).map(|_| tap::open("tap0", queues > 1)).collect();
            let taps = match taps {
                Ok(taps) => taps,
                Err(error) => {
                    println!("skipped: no tap can be made here: {error}");
                    return;
                }
            };
            let mac = "02:00:00:00:00:01";
            let set_up = std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").is_ok()
                | ip(&format!("link set tap0 address {mac} mtu {mtu} up"))
                && ip(&format!("addr add {HOST}/24 dev tap0"))
                && ip(&format!(
                    "neigh add {GUEST} lladdr 02:00:00:00:00:02 dev tap0 nud permanent"
                ));
            if !set_up {
                println!("skipped: no `ip` command that sets a tap up");
                return;
            }
            test(taps);
        });
        if let Err(panic) = run.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn parameters() -> Parameters {
    Parameters {
        mac: GUEST_MAC,
        mtu: 1500,
        queue_size: QUEUE_SIZE,
        offloads: true,
        receive: Rates::NONE,
        transmit: Rates::NONE,
    }
}

fn device(taps: Vec<OwnedFd>) -> Net {
    Net::new("eth0".into(), &parameters(), taps, Vec::new()).unwrap()
}

fn sum(bytes: &[u8], start: u32) -> u32 {
    bytes.chunks(2).fold(start, |sum, pair| {
        let word = u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        let sum = sum + word;
        (sum & 0xffff) + (sum >> 16)
    })
}

fn checksum(bytes: &[u8], start: u32) -> u16 {
    !u16::try_from(sum(bytes, start)).unwrap()
}

/// Sum of the pseudo header of UDP from guest to host or back.
fn pseudo(udp_len: usize) -> u32 {
    let addresses = [10, 9, 0, 1, 10, 9, 0, 2, 0, 17];
    let len = u16::try_from(udp_len).unwrap().to_be_bytes();
    sum(&len, sum(&addresses, 0))
}

/// A frame from the guest with its virtio-net header; the checksum is left to the host when
/// `offload`.
fn frame(payload: &[u8], offload: bool) -> Vec<u8> {
    let mut frame = vec![0; HEADER_BYTES];
    frame.extend(HOST_MAC);
    frame.extend(GUEST_MAC);
    frame.extend([8, 0]);
    let udp_len = 8 + payload.len();
    let mut header = vec![0x45, 0];
    header.extend(u16::try_from(20 + udp_len).unwrap().to_be_bytes());
    header.extend([0, 0, 0x40, 0, 64, 17, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1]);
    let header_sum = checksum(&header, 0).to_be_bytes();
    header[10..12].copy_from_slice(&header_sum);
    frame.extend(header);
    let mut udp = Vec::new();
    udp.extend(PORT.to_be_bytes());
    udp.extend(PORT.to_be_bytes());
    udp.extend(u16::try_from(udp_len).unwrap().to_be_bytes());
    udp.extend([0, 0]);
    udp.extend(payload);
    let field = if offload {
        frame[0] = 1; // VIRTIO_NET_HDR_F_NEEDS_CSUM: the field holds the pseudo header's sum
        frame[6..8].copy_from_slice(&34u16.to_le_bytes());
        frame[8..10].copy_from_slice(&6u16.to_le_bytes());
        u16::try_from(pseudo(udp_len)).unwrap()
    } else {
        match checksum(&udp, pseudo(udp_len)) {
            0 => 0xffff,
            sum => sum,
        }
    };
    udp[6..8].copy_from_slice(&field.to_be_bytes());
    frame.extend(udp);
    frame
}

/// Payload of a packet that the guest received, its UDP checksum verified unless the header says it
/// is not there.
fn payload(packet: &[u8]) -> &[u8] {
    assert_eq!(packet[12..18], GUEST_MAC);
    let udp = &packet[UDP_OFFSET..];
    let udp_len = usize::from(u16::from_be_bytes([udp[4], udp[5]]));
    let udp = &udp[..udp_len];
    let partial = packet[0] & 1 != 0;
    if partial {
        let field = u32::from(u16::from_be_bytes([udp[6], udp[7]]));
        assert_eq!(field, pseudo(udp_len));
    } else if packet[0] & 2 == 0 {
        assert_eq!(checksum(udp, pseudo(udp_len)), 0);
    }
    &packet[PAYLOAD_OFFSET..HEADER_BYTES + 14 + 20 + udp_len]
}

/// Bytes that tell where they belong.
fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|index| u8::try_from((index * 7 + seed * 13 + index / 251) % 256).unwrap())
        .collect()
}

fn sockets() -> UdpSocket {
    let socket = UdpSocket::bind((HOST, PORT)).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    socket
}

/// A guest with its buffers: slot `n` of queue `q` serves descriptor `n`.
struct Guest {
    driver: Driver,
    buffer_bytes: u32,
    slots: std::collections::HashMap<(usize, u16), u64>,
}

impl Guest {
    fn new(net: &Net, buffer_bytes: u32) -> Self {
        Self {
            driver: Driver::new(net.queue_sizes()),
            buffer_bytes,
            slots: std::collections::HashMap::new(),
        }
    }

    fn activate(&self, net: &mut Net, features: u64) {
        net.activate(self.driver.activation(features)).unwrap();
    }

    fn receive_slot(queue: usize, slot: u64) -> u64 {
        BUFFERS + queue as u64 * u64::from(QUEUE_SIZE) * SLOT + slot * SLOT
    }

    fn fill(&mut self, queue: usize, count: usize) {
        for slot in 0..count as u64 {
            let address = Self::receive_slot(queue, slot);
            let head = self.driver.queues[queue]
                .offer(&[Part::Write(address, self.buffer_bytes)])
                .unwrap();
            self.slots.insert((queue, head), address);
        }
    }

    /// Takes one packet that the device delivered on `queue`, and offers its buffers again.
    fn take(&mut self, queue: usize) -> Option<Vec<u8>> {
        let (head, len) = self.driver.queues[queue].take_used()?;
        let mut packet = Vec::new();
        let mut piece = (head, len);
        let mut left = 0;
        loop {
            let address = self.slots.remove(&(queue, piece.0)).unwrap();
            packet.extend(self.driver.get(address, piece.1 as usize));
            if left == 0 {
                left = u16::from_le_bytes([packet[10], packet[11]]);
                assert!(left > 0, "num_buffers is never zero");
            }
            let head = self.driver.queues[queue]
                .offer(&[Part::Write(address, self.buffer_bytes)])
                .unwrap();
            self.slots.insert((queue, head), address);
            left -= 1;
            if left == 0 {
                return Some(packet);
            }
            piece = self.driver.queues[queue]
                .take_used()
                .expect("all buffers of a packet are shown at once");
        }
    }

    /// Offers one frame on a transmit queue, in pieces of `piece` bytes.
    fn send(&mut self, queue: usize, frame: &[u8], piece: usize) {
        let at = BUFFERS + (32 << 20) + queue as u64 * (1 << 20);
        self.driver.put(at, frame);
        let mut parts = Vec::new();
        for start in (0..frame.len()).step_by(piece) {
            let len = piece.min(frame.len() - start);
            parts.push(Part::Read(at + start as u64, u32::try_from(len).unwrap()));
        }
        self.driver.queues[queue].offer(&parts).unwrap();
    }

    fn turn(&self, net: &mut Net) -> bool {
        self.driver.turn(net, 1000).unwrap()
    }
}

#[test]
fn every_size_reaches_the_host() {
    with_taps(1, 9000, |taps| {
        let mut net = device(taps);
        let mut guest = Guest::new(&net, 2048);
        guest.activate(&mut net, F_MAC | F_CSUM);
        let socket = sockets();
        let mut seen = vec![0; 65536];
        for len in (0..200).chain([1471, 1472, 4000, 8971, 8972]) {
            for (offload, piece) in [(false, 65536), (true, 65536), (true, 61)] {
                let sent = pattern(len, len);
                guest.send(1, &frame(&sent, offload), piece);
                net.queue_kicked(1).unwrap();
                let got = socket.recv(&mut seen).unwrap();
                assert_eq!(
                    &seen[..got],
                    sent,
                    "{len} bytes, checksum left to the host: {offload}"
                );
                assert!(guest.driver.queues[1].take_used().is_some());
            }
        }
        assert_eq!(net.counters()[5], ("transmit_refused", 0));
    });
}

#[test]
fn every_size_reaches_the_guest() {
    for (features, buffer_bytes) in [
        (F_MRG_RXBUF, 1600),
        (F_MRG_RXBUF | F_GUEST_CSUM, 200),
        (F_MRG_RXBUF | F_GUEST_CSUM | F_GUEST_TSO4, 4096),
        (F_GUEST_CSUM, 4096),
    ] {
        with_taps(1, 9000, |taps| {
            let mut net = device(taps);
            let mut guest = Guest::new(&net, buffer_bytes);
            guest.activate(&mut net, features);
            guest.fill(0, usize::from(QUEUE_SIZE));
            net.queue_kicked(0).unwrap();
            let socket = sockets();
            let longest = if features & F_MRG_RXBUF == 0 {
                4000
            } else {
                8972
            };
            for len in (0..200).chain([1471, 1472, 3000, 4000, longest]) {
                let sent = pattern(len, len);
                socket.send_to(&sent, (GUEST, PORT)).unwrap();
                let packet = loop {
                    if let Some(packet) = guest.take(0) {
                        break packet;
                    }
                    assert!(guest.turn(&mut net), "the packet of {len} bytes never came");
                };
                assert_eq!(payload(&packet), sent, "{len} bytes");
                net.queue_kicked(0).unwrap();
            }
        });
    }
}

#[test]
fn a_card_goes_on_where_another_one_stood() {
    with_taps(1, 1500, |taps| {
        let second = vec![taps[0].try_clone().unwrap()];
        let mut net = device(taps);
        let mut guest = Guest::new(&net, 2048);
        guest.activate(&mut net, F_MAC | F_MRG_RXBUF);
        guest.fill(0, 8);
        net.queue_kicked(0).unwrap();
        let socket = sockets();
        let exchange = |guest: &mut Guest, net: &mut Net, seed: usize| {
            let sent = pattern(500, seed);
            guest.send(1, &frame(&sent, false), 65536);
            net.queue_kicked(1).unwrap();
            let mut seen = [0; 1000];
            let got = socket.recv(&mut seen).unwrap();
            assert_eq!(&seen[..got], sent);
            assert!(guest.driver.queues[1].take_used().is_some());
            socket.send_to(&sent, (GUEST, PORT)).unwrap();
            let packet = loop {
                if let Some(packet) = guest.take(0) {
                    break packet;
                }
                assert!(guest.turn(net), "the packet never came");
            };
            assert_eq!(payload(&packet), sent);
        };
        exchange(&mut guest, &mut net, 1);
        let text = serde_json::to_string(&net.save()).unwrap();
        drop(net);
        let saved: Saved = serde_json::from_str(&text).unwrap();
        let mut net = device(second);
        net.restore(&saved.state).unwrap();
        assert!(
            net.restore(&DeviceState::Net { pairs: 2 }).is_err(),
            "it has one"
        );
        let activation = guest
            .driver
            .activation_at(F_MAC | F_MRG_RXBUF, &saved.queues);
        net.activate(activation).unwrap();
        net.queue_kicked(0).unwrap();
        exchange(&mut guest, &mut net, 2);
    });
}

#[test]
fn packets_wait_for_buffers_and_are_not_cut() {
    with_taps(1, 9000, |taps| {
        let mut net = device(taps);
        let mut guest = Guest::new(&net, 1000);
        guest.activate(&mut net, F_MRG_RXBUF);
        let socket = sockets();
        for seed in 0..20 {
            socket.send_to(&pattern(5000, seed), (GUEST, PORT)).unwrap();
        }
        while guest.driver.turn(&mut net, 0).unwrap() {
            // The tap is left alone once the device knows that there are no buffers.
        }
        for seed in 0..20 {
            // Two buffers hold less than half of the packet; four more complete it.
            for count in [2, 4] {
                assert!(guest.take(0).is_none());
                for slot in 0..count {
                    let address = Guest::receive_slot(0, slot + count);
                    let head = guest.driver.queues[0]
                        .offer(&[Part::Write(address, 1000)])
                        .unwrap();
                    guest.slots.insert((0, head), address);
                }
                net.queue_kicked(0).unwrap();
            }
            let (head, _) = guest.driver.queues[0].take_used().unwrap();
            let mut packet = guest.driver.get(guest.slots[&(0, head)], 1000);
            while let Some((head, len)) = guest.driver.queues[0].take_used() {
                packet.extend(guest.driver.get(guest.slots[&(0, head)], len as usize));
            }
            assert_eq!(packet[10..12], [6, 0]);
            assert_eq!(payload(&packet), pattern(5000, seed));
        }
    });
}

#[test]
fn four_pairs_share_the_flows() {
    with_taps(4, 1500, |taps| {
        let mut net = device(taps);
        assert_eq!(net.queue_sizes().len(), 9);
        assert_ne!(net.features() & F_MQ, 0);
        let mut config = [0; 12];
        net.read_config(0, &mut config);
        assert_eq!(config[8..10], [4, 0]);
        let mut guest = Guest::new(&net, 2048);
        guest.activate(&mut net, F_MRG_RXBUF | F_CTRL_VQ | F_MQ);
        for queue in [0, 2, 4, 6] {
            guest.fill(queue, usize::from(QUEUE_SIZE));
            net.queue_kicked(u16::try_from(queue).unwrap()).unwrap();
        }
        assert_eq!(control(&mut guest, &mut net, &[4, 0, 4, 0]), 0);
        let flows = 64;
        let sockets: Vec<_> = (0..flows)
            .map(|_| UdpSocket::bind((HOST, 0)).unwrap())
            .collect();
        for (seed, socket) in sockets.iter().enumerate() {
            socket.send_to(&pattern(500, seed), (GUEST, PORT)).unwrap();
        }
        let mut per_queue = [0; 4];
        let mut seen = Vec::new();
        while per_queue.iter().sum::<usize>() < flows {
            assert!(guest.turn(&mut net), "{per_queue:?}");
            for (pair, count) in per_queue.iter_mut().enumerate() {
                while let Some(packet) = guest.take(pair * 2) {
                    *count += 1;
                    seen.push(payload(&packet).to_vec());
                }
            }
        }
        seen.sort();
        let mut sent: Vec<_> = (0..flows).map(|seed| pattern(500, seed)).collect();
        sent.sort();
        assert_eq!(seen, sent);
        assert!(
            per_queue.iter().filter(|count| **count > 0).count() > 1,
            "{per_queue:?}"
        );
        // Every transmit queue reaches the host.
        let socket = self::sockets();
        let mut bytes = [0; 100];
        for pair in 0..4 {
            guest.send(pair * 2 + 1, &frame(&pattern(80, pair), false), 4096);
            net.queue_kicked(u16::try_from(pair * 2 + 1).unwrap())
                .unwrap();
            assert_eq!(socket.recv(&mut bytes).unwrap(), 80);
            assert_eq!(bytes[..80], pattern(80, pair));
        }
        // Back to one pair: everything comes there.
        assert_eq!(control(&mut guest, &mut net, &[4, 0, 1, 0]), 0);
        for (seed, socket) in sockets.iter().enumerate() {
            socket.send_to(&pattern(500, seed), (GUEST, PORT)).unwrap();
        }
        let mut count = 0;
        while count < flows {
            assert!(guest.turn(&mut net), "{count}");
            while guest.take(0).is_some() {
                count += 1;
            }
        }
        for bad in [
            &[4, 0, 0, 0][..],
            &[4, 0, 5, 0],
            &[4, 0],
            &[9, 9, 9, 9],
            &[4, 0, 1, 0, 0],
        ] {
            assert_eq!(control(&mut guest, &mut net, bad), 1, "{bad:?}");
        }
    });
}

/// Sends a control command and gives the answer.
fn control(guest: &mut Guest, net: &mut Net, command: &[u8]) -> u8 {
    let at = BUFFERS + (60 << 20);
    guest.driver.put(at, command);
    guest.driver.put(at + 64, &[0xff]);
    let index = net.queue_sizes().len() - 1;
    let len = u32::try_from(command.len()).unwrap();
    guest.driver.queues[index]
        .offer(&[Part::Read(at, len), Part::Write(at + 64, 1)])
        .unwrap();
    if net.owns_kicks() {
        guest.driver.kick(index).write(1).unwrap();
        for (token, readiness) in guest.driver.poller.wait(1000) {
            net.descriptor_ready(token, readiness).unwrap();
        }
    } else {
        net.queue_kicked(u16::try_from(index).unwrap()).unwrap();
    }
    assert_eq!(guest.driver.queues[index].take_used().unwrap().1, 1);
    guest.driver.get(at + 64, 1)[0]
}

#[test]
fn limits_hold_and_can_be_changed() {
    with_taps(1, 1500, |taps| {
        let limit = Rates {
            operations: Rate {
                per_second: 200,
                burst: 10,
            },
            ..Rates::NONE
        };
        let mut net = Net::new(
            "eth0".into(),
            &Parameters {
                receive: limit,
                transmit: limit,
                ..parameters()
            },
            taps,
            Vec::new(),
        )
        .unwrap();
        let mut guest = Guest::new(&net, 2048);
        guest.activate(&mut net, F_MRG_RXBUF);
        guest.fill(0, usize::from(QUEUE_SIZE));
        let socket = sockets();
        let start = std::time::Instant::now();
        for seed in 0..50 {
            socket.send_to(&pattern(100, seed), (GUEST, PORT)).unwrap();
            guest.send(1, &frame(&pattern(100, 1), false), 4096);
        }
        net.queue_kicked(0).unwrap();
        net.queue_kicked(1).unwrap();
        let mut bytes = [0; 200];
        let (mut received, mut sent) = (0, 0);
        while received < 50 || sent < 50 {
            guest.turn(&mut net);
            while let Some(packet) = guest.take(0) {
                assert_eq!(payload(&packet), pattern(100, received));
                received += 1;
            }
            while guest.driver.queues[1].take_used().is_some() {
                socket.recv(&mut bytes).unwrap();
                sent += 1;
            }
        }
        // 40 packets beyond the burst at 200 a second.
        assert!(
            start.elapsed() >= Duration::from_millis(190),
            "{:?}",
            start.elapsed()
        );
        net.command(Command::ReceiveLimit(Rates::NONE)).unwrap();
        net.command(Command::TransmitLimit(Rates::NONE)).unwrap();
        assert!(net.command(Command::FileResized).is_err());
    });
}

#[test]
fn what_is_no_packet_is_refused() {
    with_taps(1, 1500, |taps| {
        let mut net = device(taps);
        let mut guest = Guest::new(&net, 2048);
        guest.activate(&mut net, F_CSUM);
        let mut bad_header = frame(&pattern(10, 0), true);
        bad_header[6..8].copy_from_slice(&u16::MAX.to_le_bytes());
        let mut bad_kind = frame(&pattern(10, 0), true);
        bad_kind[1] = 0x77;
        for bytes in [
            vec![0],
            vec![0; HEADER_BYTES],
            vec![0; HEADER_BYTES + 13],
            vec![0; PACKET_BYTES_MAX + 1],
            bad_header,
            bad_kind,
        ] {
            guest.send(1, &bytes, 1 << 20);
            net.queue_kicked(1).unwrap();
            assert!(guest.driver.queues[1].take_used().is_some());
        }
        assert_eq!(net.counters()[5], ("transmit_refused", 6));
    });
}

#[test]
fn hostile_chains_break_the_card() {
    with_taps(1, 1500, |taps| {
        let sizes = [QUEUE_SIZE; 2];
        let clone = || taps[0].try_clone().unwrap();
        assert_hostile_chains_break(|| device(vec![clone()]), &sizes, &[0, 1]);
    });
    with_taps(2, 1500, |taps| {
        let mut net = device(taps);
        for (what, break_queue) in HOSTILE_CHAINS {
            let mut driver = Driver::new(net.queue_sizes());
            net.activate(driver.activation(F_CTRL_VQ | F_MQ)).unwrap();
            break_queue(&mut driver.queues[4]);
            assert!(net.queue_kicked(4).is_err(), "{what}");
            net.reset();
        }
        // A command without room for the answer.
        let mut driver = Driver::new(net.queue_sizes());
        net.activate(driver.activation(F_CTRL_VQ | F_MQ)).unwrap();
        driver.queues[4].offer(&[Part::Read(BUFFERS, 4)]).unwrap();
        assert!(net.queue_kicked(4).is_err());
    });
}

#[test]
fn a_reset_at_every_step_leaves_a_working_card() {
    with_taps(1, 1500, |taps| {
        let mut net = device(taps);
        let socket = sockets();
        let mut seen = [0; 200];
        for step in 0..8 {
            let mut guest = Guest::new(&net, 2048);
            for at in 0..8 {
                if at == step {
                    net.reset();
                    break;
                }
                match at {
                    0 => guest.activate(&mut net, F_MRG_RXBUF),
                    1 => guest.fill(0, 8),
                    2 => net.queue_kicked(0).unwrap(),
                    3 => drop(socket.send_to(&pattern(100, 3), (GUEST, PORT)).unwrap()),
                    4 => drop(guest.turn(&mut net)),
                    5 => guest.send(1, &frame(&pattern(100, 4), false), 50),
                    6 => net.queue_kicked(1).unwrap(),
                    _ => drop(guest.turn(&mut net)),
                }
            }
            net.queue_kicked(0).unwrap();
            net.queue_kicked(1).unwrap();
            net.reset();
            let mut guest = Guest::new(&net, 2048);
            guest.activate(&mut net, F_MRG_RXBUF);
            socket.set_nonblocking(true).unwrap();
            while socket.recv(&mut seen).is_ok() {}
            socket.set_nonblocking(false).unwrap();
            guest.send(1, &frame(&pattern(150, step), false), 4096);
            net.queue_kicked(1).unwrap();
            assert_eq!(socket.recv(&mut seen).unwrap(), 150);
            assert_eq!(seen[..150], pattern(150, step));
            net.reset();
        }
    });
}

#[test]
fn a_driver_that_offers_the_same_buffer_for_ever_gains_nothing() {
    with_taps(1, 1500, |taps| {
        let mut net = device(taps);
        let mut guest = Guest::new(&net, 1);
        guest.activate(&mut net, F_MRG_RXBUF);
        let queue = &mut guest.driver.queues[0];
        queue.write_descriptor(0, BUFFERS, 1, 2, 0);
        for _ in 0..1000 {
            for _ in 0..QUEUE_SIZE {
                guest.driver.queues[0].publish(0);
            }
            net.queue_kicked(0).unwrap();
        }
        assert!(guest.driver.queues[0].take_used().is_none());
    });
}

#[test]
fn a_tap_that_goes_away_breaks_the_device() {
    with_taps(1, 1500, |taps| {
        let mut net = device(taps);
        let mut guest = Guest::new(&net, 2048);
        guest.activate(&mut net, F_MRG_RXBUF);
        guest.fill(0, 256);
        assert!(ip("link del tap0"));
        let broken = guest.driver.turn(&mut net, 1000).unwrap_err();
        assert_eq!(
            broken.to_string(),
            "virtio-net eth0: the tap's interface is gone"
        );
        // Broken is said once; until it is reset, nothing happens.
        net.queue_kicked(0).unwrap();
        net.queue_kicked(1).unwrap();
        assert!(!guest.driver.turn(&mut net, 0).unwrap());
    });
}

/// Without buffers nothing is read, so only the poller can tell.
#[test]
fn a_tap_that_goes_away_breaks_a_device_without_buffers() {
    with_taps(1, 1500, |taps| {
        let mut net = device(taps);
        let guest = Guest::new(&net, 2048);
        guest.activate(&mut net, F_MRG_RXBUF);
        while guest.driver.turn(&mut net, 0).unwrap() {}
        assert!(ip("link del tap0"));
        let broken = guest.driver.turn(&mut net, 1000).unwrap_err();
        assert_eq!(
            broken.to_string(),
            "virtio-net eth0: the tap's interface is gone"
        );
        assert!(!guest.driver.turn(&mut net, 0).unwrap(), "it is quiet");
    });
}

#[test]
fn interrupts_follow_the_event_index() {
    with_taps(1, 1500, |taps| {
        let mut net = device(taps);
        let mut guest = Guest::new(&net, 2048);
        let mut activation = guest.driver.activation(F_MRG_RXBUF);
        for active in &mut activation.queues {
            virtio_queue::QueueT::set_event_idx(&mut active.queue, true);
        }
        net.activate(activation).unwrap();
        guest.fill(0, 256);
        let socket = sockets();
        // used_event is 0 at first: the first packet interrupts, the next ones do not until the
        // driver asks again.
        for _ in 0..5 {
            socket.send_to(&pattern(100, 0), (GUEST, PORT)).unwrap();
            while guest.driver.queues[0].take_used().is_none() {
                assert!(guest.turn(&mut net));
            }
        }
        assert_eq!(guest.driver.signals.queue.load(Ordering::SeqCst), 1);
    });
}

#[test]
fn wrong_parameters_name_the_field() {
    with_taps(1, 1500, |taps| {
        let tap = || vec![taps[0].try_clone().unwrap()];
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let make = |parameters: Parameters, taps, vhosts| {
            Net::new("eth0".into(), &parameters, taps, vhosts)
                .unwrap_err()
                .to_string()
        };
        let text = make(parameters(), Vec::new(), Vec::new());
        assert!(text.contains("0 taps"), "{text}");
        let text = make(parameters(), vec![null()], Vec::new());
        assert!(
            text.contains("tap 0 is not a tap with IFF_VNET_HDR"),
            "{text}"
        );
        let two = vec![taps[0].try_clone().unwrap(), taps[0].try_clone().unwrap()];
        let text = make(parameters(), two, Vec::new());
        assert!(text.contains("IFF_MULTI_QUEUE"), "{text}");
        let text = make(parameters(), tap(), vec![null(), null()]);
        assert!(text.contains("2 vhost descriptors for 1 taps"), "{text}");
        let limited = Parameters {
            receive: Rates {
                bytes: Rate {
                    per_second: 1,
                    burst: 1,
                },
                ..Rates::NONE
            },
            ..parameters()
        };
        let text = make(limited, tap(), vec![null()]);
        assert!(text.contains("receive_limit"), "{text}");
        let text = make(parameters(), tap(), vec![null()]);
        assert!(text.contains("vhost 0"), "{text}");
        for queue_size in [0, 1, 3, 2048] {
            let wrong = Parameters {
                queue_size,
                ..parameters()
            };
            let text = make(wrong, tap(), Vec::new());
            assert!(text.contains("queue_size"), "{text}");
        }
        let wrong = Parameters {
            mtu: 67,
            ..parameters()
        };
        assert!(make(wrong, tap(), Vec::new()).contains("mtu 67"));
        let wrong = Parameters {
            mac: [1, 0, 0, 0, 0, 0],
            ..parameters()
        };
        assert!(make(wrong, tap(), Vec::new()).contains("mac"));
        assert!(matches!(
            Net::new("eth0".into(), &parameters(), tap(), Vec::new()),
            Ok(_) | Err(Error::Tap { .. })
        ));
        assert!(taps[0].as_fd().try_clone_to_owned().is_ok());
    });
}

#[test]
fn the_kernel_moves_packets_with_vhost_net() {
    with_taps(2, 9000, |taps| {
        let open = || {
            std::fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/vhost-net")
        };
        let vhosts: Result<Vec<OwnedFd>, _> = (0..2).map(|_| open().map(OwnedFd::from)).collect();
        let vhosts = match vhosts {
            Ok(vhosts) => vhosts,
            Err(error) => {
                println!("skipped: no /dev/vhost-net here: {error}");
                return;
            }
        };
        let mut net = Net::new("eth0".into(), &parameters(), taps, vhosts).unwrap();
        assert!(net.owns_kicks());
        let limit = Command::ReceiveLimit(Rates {
            bytes: Rate {
                per_second: 1,
                burst: 1,
            },
            ..Rates::NONE
        });
        assert!(net.command(limit).is_err());
        let socket = sockets();
        // Twice: a reset gives the rings back and a new driver starts with empty ones.
        for _ in 0..2 {
            let mut guest = Guest::new(&net, 2048);
            guest.activate(&mut net, F_MRG_RXBUF | F_CSUM | F_CTRL_VQ | F_MQ);
            for queue in [0, 2] {
                guest.fill(queue, usize::from(QUEUE_SIZE));
                guest.driver.kick(queue).write(1).unwrap();
            }
            let mut seen = vec![0; 65536];
            for pairs in [1, 2, 1] {
                assert_eq!(control(&mut guest, &mut net, &[4, 0, pairs, 0]), 0);
                for len in (0..100).chain([1471, 1472, 8972]) {
                    let queue = usize::from(pairs) * 2 - 1;
                    guest.send(queue, &frame(&pattern(len, len), len % 2 == 0), 500);
                    guest.driver.kick(queue).write(1).unwrap();
                    let got = socket.recv(&mut seen).unwrap();
                    assert_eq!(seen[..got], pattern(len, len));
                    let deadline = std::time::Instant::now() + Duration::from_secs(10);
                    while guest.driver.queues[queue].take_used().is_none() {
                        assert!(std::time::Instant::now() < deadline);
                        std::thread::yield_now();
                    }
                    socket.send_to(&pattern(len, 1), (GUEST, PORT)).unwrap();
                    let packet = loop {
                        if let Some(packet) = guest.take(0).or_else(|| guest.take(2)) {
                            break packet;
                        }
                        assert!(
                            std::time::Instant::now() < deadline,
                            "{len} bytes, {pairs} pairs"
                        );
                        std::thread::yield_now();
                    };
                    assert_eq!(payload(&packet), pattern(len, 1));
                    for queue in [0, 2] {
                        guest.driver.kick(queue).write(1).unwrap();
                    }
                }
            }
            net.reset();
        }
        // A hostile driver's ring: said once, as broken.
        let mut driver = Driver::new(net.queue_sizes());
        net.activate(driver.activation(F_MRG_RXBUF)).unwrap();
        HOSTILE_CHAINS[0].1(&mut driver.queues[1]);
        driver.kick(1).write(1).unwrap();
        let mut broken = None;
        for _ in 0..100 {
            for (token, readiness) in driver.poller.wait(50) {
                broken = broken.or(net.descriptor_ready(token, readiness).err());
            }
        }
        println!("hostile ring under vhost-net: {broken:?}");
        net.reset();
    });
}

/// A gibibyte each way with jumbo frames over four queues, every byte compared.
#[test]
#[ignore = "takes minutes without optimisation: run with --release --ignored"]
fn a_gibibyte_each_way() {
    const LEN: usize = 8192;
    const PACKETS: usize = (1 << 30) / LEN;
    with_taps(4, 9000, |taps| {
        let mut net = device(taps);
        let mut guest = Guest::new(&net, 4096);
        guest.activate(
            &mut net,
            F_MRG_RXBUF | F_CSUM | F_GUEST_CSUM | F_CTRL_VQ | F_MQ,
        );
        for queue in [0, 2, 4, 6] {
            guest.fill(queue, usize::from(QUEUE_SIZE));
            net.queue_kicked(u16::try_from(queue).unwrap()).unwrap();
        }
        assert_eq!(control(&mut guest, &mut net, &[4, 0, 4, 0]), 0);
        let patterns: Vec<_> = (0..256).map(|seed| pattern(LEN, seed)).collect();
        let socket = sockets();
        let flows: Vec<_> = (0..8)
            .map(|_| UdpSocket::bind((HOST, 0)).unwrap())
            .collect();
        let start = std::time::Instant::now();
        let mut seen = vec![0; LEN + 1];
        for packet in 0..PACKETS {
            let queue = packet % 4 * 2 + 1;
            guest.send(queue, &frame(&patterns[packet % 256], true), 65536);
            net.queue_kicked(u16::try_from(queue).unwrap()).unwrap();
            assert_eq!(socket.recv(&mut seen).unwrap(), LEN);
            assert_eq!(seen[..LEN], patterns[packet % 256]);
            while guest.driver.queues[queue].take_used().is_some() {}
        }
        println!("1 GiB to the host: {:?}", start.elapsed());
        let start = std::time::Instant::now();
        let mut received = 0;
        let mut sent = 0;
        while received < PACKETS {
            while sent < PACKETS && sent < received + 64 {
                flows[sent % 8]
                    .send_to(&patterns[sent % 8], (GUEST, PORT))
                    .unwrap();
                sent += 1;
            }
            assert!(guest.turn(&mut net), "{received} of {PACKETS}");
            for pair in 0..4 {
                while let Some(packet) = guest.take(pair * 2) {
                    let got = payload(&packet);
                    assert!(patterns[..8].iter().any(|pattern| pattern == got));
                    received += 1;
                }
                net.queue_kicked(u16::try_from(pair * 2).unwrap()).unwrap();
            }
        }
        println!("1 GiB to the guest: {:?}", start.elapsed());
    });
}
