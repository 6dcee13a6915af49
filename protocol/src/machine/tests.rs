//! Every message comes back as it went, and nothing else is accepted.

use proptest::prelude::*;

use super::wire::Wire;
use super::*;

fn text<const N: usize>(text: &str) -> Text<N> {
    Text::new("test", text).unwrap()
}

fn descriptor(position: u8) -> Descriptor {
    Descriptor { position }
}

fn machine() -> Machine {
    Machine {
        vcpus: 1,
        vcpus_max: 4,
        memory_bytes: 128 << 20,
        memory_max_bytes: 512 << 20,
        pages: PageKind::Base,
        cpu: CpuMode::Host,
        cpu_features: text("-xsave"),
        kvm: descriptor(0),
        memory: descriptor(1),
        pluggable: List::new("pluggable", vec![descriptor(3)]).unwrap(),
        saved: List::default(),
        kernel: descriptor(2),
        initramfs: List::default(),
        command_line: text("quiet panic=-1"),
        uid: 1000,
        gid: 1000,
    }
}

fn net() -> Net {
    Net {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        taps: List::new("taps", vec![descriptor(0), descriptor(1)]).unwrap(),
        vhosts: List::default(),
        offloads: true,
        receive_limit: RateLimit::default(),
        transmit_limit: RateLimit::default(),
    }
}

fn device(kind: DeviceKind) -> Request {
    Request::AddDevice(Device {
        name: text("dev-0"),
        kind,
    })
}

fn blk() -> Blk {
    Blk {
        file: descriptor(0),
        read_only: true,
        serial: text("serial"),
        queues: 2,
        cache: CacheMode::WriteBack,
        limit: RateLimit::default(),
    }
}

fn devices() -> Vec<DeviceKind> {
    let ports = List::new(
        "ports",
        vec![VsockPort {
            port: 1024,
            socket: descriptor(1),
        }],
    );
    vec![
        DeviceKind::Blk(blk()),
        DeviceKind::Net(net()),
        DeviceKind::Fs(Fs {
            tag: text("pericarp"),
            socket: List::new("socket", vec![descriptor(0)]).unwrap(),
            queues: 1,
        }),
        DeviceKind::Vsock(Vsock {
            cid: 3,
            listener: descriptor(0),
            ports: ports.unwrap(),
        }),
        DeviceKind::Pmem(Pmem {
            file: descriptor(0),
        }),
        DeviceKind::Rng(super::Rng {}),
        DeviceKind::Console(Console {
            output: descriptor(0),
        }),
        DeviceKind::Balloon(Balloon {
            deflate_on_oom: true,
            free_page_reporting: true,
        }),
        DeviceKind::Mem(Mem {
            block_bytes: 2 << 20,
            requested_bytes: 0,
        }),
    ]
}

fn requests() -> Vec<Request> {
    let mut requests: Vec<Request> = devices().into_iter().map(device).collect();
    let named = || Named {
        device: text("dev-0"),
    };
    requests.extend([
        Request::Start(machine()),
        Request::Run(Nothing {}),
        Request::RemoveDevice(named()),
        Request::ResizeMemory(Bytes { bytes: 1 << 30 }),
        Request::ResizeVcpus(Vcpus { count: 2 }),
        Request::SetRateLimit(NewLimit {
            device: text("net0"),
            direction: Direction::Receive,
            limit: RateLimit::default(),
        }),
        Request::DeviceStatistics(named()),
        Request::Shutdown(Nothing {}),
    ]);
    requests
}

#[test]
fn requests_round_trip() {
    for request in requests() {
        let bytes = encode_request(7, &request);
        assert_eq!(bytes.len(), REQUEST_BYTES);
        assert_eq!(decode_request(&bytes), Ok((7, request)));
    }
}

#[test]
fn messages_round_trip() {
    let counter = Counter {
        name: text("read_bytes"),
        value: 9,
    };
    let counters = List::new("counters", vec![counter; COUNTERS_MAX]).unwrap();
    let address = PciAddress {
        segment: 0,
        bus: 0,
        device: 5,
        function: 0,
    };
    assert_eq!(address.to_string(), "0000:00:05.0");
    for message in [
        Message::Success(Success::Done(Nothing {})),
        Message::Success(Success::Added(address)),
        Message::Success(Success::Statistics(Statistics::default())),
        Message::Success(Success::DeviceStatistics(DeviceStatistics { counters })),
        Message::Failure(Failure {
            code: ErrorCode::Invalid,
            reason: text("Machine.vcpus: 0 is not between 1 and 4"),
        }),
        Message::Event(Event::VcpuError(VcpuError {
            vcpu: 3,
            reason: Text::lossy("why"),
        })),
    ] {
        let bytes = encode_message(1, &message);
        assert_eq!(bytes.len(), MESSAGE_BYTES);
        assert_eq!(decode_message(&bytes), Ok((1, message)));
    }
}

#[test]
fn machine_refusals_name_the_field() {
    type Change = fn(&mut Machine);
    let cases: [(&str, Change); 8] = [
        ("Machine.vcpus", |m| m.vcpus = 0),
        ("Machine.vcpus", |m| m.vcpus = 5),
        ("Machine.vcpus_max", |m| m.vcpus_max = VCPUS_MAX + 1),
        ("Machine.memory_bytes", |m| m.memory_bytes = 1 << 20),
        ("Machine.memory_bytes", |m| m.memory_bytes += 4096),
        ("Machine.memory_max_bytes", |m| {
            m.memory_max_bytes = MEMORY_BYTES_MAX + ALIGNMENT_BYTES;
        }),
        ("Machine.memory_max_bytes", |m| {
            m.memory_max_bytes = 64 << 20
        }),
        ("Machine.uid", |m| m.uid = 0),
    ];
    for (field, change) in cases {
        let mut machine = machine();
        change(&mut machine);
        let bytes = encode_request(1, &Request::Start(machine));
        assert_eq!(decode_request(&bytes).unwrap_err().field, field);
    }
}

#[test]
fn device_refusals_name_the_field() {
    let cases = [
        ("Blk.queues", DeviceKind::Blk(Blk { queues: 0, ..blk() })),
        ("Net.mtu", DeviceKind::Net(Net { mtu: 20, ..net() })),
        (
            "Net.taps",
            DeviceKind::Net(Net {
                taps: List::default(),
                ..net()
            }),
        ),
        (
            "Net.vhosts",
            DeviceKind::Net(Net {
                vhosts: List::new("", vec![descriptor(1)]).unwrap(),
                ..net()
            }),
        ),
        (
            "Mem.block_bytes",
            DeviceKind::Mem(Mem {
                block_bytes: 3 << 20,
                requested_bytes: 0,
            }),
        ),
    ];
    for (field, kind) in cases {
        let bytes = encode_request(1, &device(kind));
        assert_eq!(decode_request(&bytes).unwrap_err().field, field);
    }
}

#[test]
fn another_version_or_length_is_refused() {
    let mut bytes = encode_request(1, &Request::Run(Nothing {}));
    bytes[0] ^= 2;
    assert_eq!(decode_request(&bytes).unwrap_err().field, "version");
    let bytes = encode_request(1, &Request::Run(Nothing {}));
    assert_eq!(decode_request(&bytes[1..]).unwrap_err().field, "version");
    assert_eq!(
        decode_request(&bytes[..bytes.len() - 1]).unwrap_err().field,
        "length"
    );
    assert_eq!(decode_request(&[]).unwrap_err().field, "version");
}

#[test]
fn texts_are_bounded_and_clean() {
    assert!(Text::<4>::new("t", "12345").is_err());
    assert!(Text::<4>::new("t", "1\u{0}2").is_err());
    assert_eq!(Text::<4>::lossy("12ä45").as_str(), "12ä");
    assert_eq!(Text::<3>::lossy("12ä").as_str(), "12");
}

proptest! {
    #[test]
    fn any_bytes_decode_to_one_spelling(
        index in 0..requests().len(),
        changes in prop::collection::vec((0..REQUEST_BYTES, any::<u8>()), 0..8),
    ) {
        let mut bytes = encode_request(1, &requests()[index]);
        for (position, value) in changes {
            bytes[position] = value;
        }
        if let Ok((number, request)) = decode_request(&bytes) {
            prop_assert_eq!(encode_request(number, &request), bytes);
        }
    }

    #[test]
    fn noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..MESSAGE_BYTES + 8)) {
        let _ = decode_request(&noise);
        let _ = decode_message(&noise);
        let _ = <Message as Wire>::get(&mut noise.as_slice(), "noise");
    }
}
