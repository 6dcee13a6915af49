//! What crosses between shim and agent, and first inputs for the agent's own parsers.

use pericarp_protocol::{
    guest::{DiagnosticsResponse, Event, Hello, PidsResponse, StatsResponse, WaitResponse, event},
    limits::{HELLO_BYTES_MAX, STREAM_HEADER_BYTES_MAX},
    stream::Header,
};
use protobuf::Message;

/// A header line is refused, or is what it is written as again.
pub(crate) fn stream_header(data: &[u8]) {
    if let Ok(header) = Header::parse(data) {
        let line = header.to_string();
        assert!(line.len() <= STREAM_HEADER_BYTES_MAX, "{line:?}");
        assert_eq!(Header::parse(line.trim_end().as_bytes()), Ok(header));
    }
}

/// The first byte says which message it is; what is read can be written and read again.
pub(crate) fn answer(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    match kind % 6 {
        0 => again::<Hello>(&data[..data.len().min(HELLO_BYTES_MAX)]),
        1 => again::<StatsResponse>(data),
        2 => again::<Event>(data),
        3 => again::<DiagnosticsResponse>(data),
        4 => again::<PidsResponse>(data),
        _ => again::<WaitResponse>(data),
    }
}

fn again<T: Message + PartialEq>(data: &[u8]) {
    let Ok(message) = T::parse_from_bytes(data) else {
        return;
    };
    let bytes = message
        .write_to_bytes()
        .expect("what was read can be written");
    assert!(T::parse_from_bytes(&bytes).expect("and read") == message);
}

/// A function with one BAR of 16 KiB (2 to the 14th), a list of three capabilities (MSI-X, PCI
/// Express, vendor's own), and writes: command, BAR, message control, device control.
pub(crate) fn functions() -> Vec<Vec<u8>> {
    let mut space = [0; 256];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x00, &[0x36, 0x1b, 0x10, 0x00, 0x07, 0x04, 0x10, 0x00]);
    put(0x10, &[0x04]);
    put(0x34, &[0x40]);
    put(0x40, &[0x11, 0x80, 0x40, 0, 0, 0x20, 0, 0, 0, 0x30, 0, 0]);
    put(0x80, &[0x10, 0xc0, 0x02]);
    put(0xc0, &[0x09, 0x00, 0x08]);
    let mut input = vec![14, 64, 64, 64, 64, 64];
    input.extend(space);
    for (at, bytes) in [
        (0x04_u16, &[0x06, 0x04][..]),
        (0x10, &[0xff; 8]),
        (0x42, &[0x00, 0xc0]),
        (0x88, &[0xff, 0xff]),
    ] {
        input.extend(at.to_le_bytes());
        input.push(u8::try_from(bytes.len()).expect("few bytes"));
        input.extend(bytes);
    }
    vec![input]
}

pub(crate) fn stream_headers() -> Vec<Vec<u8>> {
    texts(&["process 7", "tcp ::1 8080", "tcp 127.0.0.1 80"])
}

pub(crate) fn answers() -> Vec<Vec<u8>> {
    let hello = Hello {
        protocol_major: 1,
        agent_version: "0.1.0".to_owned(),
        features: vec!["apparmor".to_owned()],
        ..Default::default()
    };
    let mut oom = Event::new();
    oom.event = Some(event::Event::OutOfMemory(Default::default()));
    let bytes = [hello.write_to_bytes(), oom.write_to_bytes()];
    let bytes = bytes.into_iter().map(|bytes| bytes.expect("a message"));
    [0u8, 2]
        .into_iter()
        .zip(bytes)
        .map(|(kind, bytes)| [vec![kind], bytes].concat())
        .collect()
}

pub(crate) fn paths() -> Vec<Vec<u8>> {
    texts(&[
        "l>../../x\na/b/c\nl/d/",
        "etc/\nout>/../../e\nout/file",
        "one>two\ntwo>one\none",
        "a>.\nb>a/..\nb/../b/f",
    ])
}

pub(crate) fn passwd() -> Vec<Vec<u8>> {
    texts(&[
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
        "# comment\nno:x:0\nr:x:0:0:c:relative:s\n",
    ])
}

pub(crate) fn specification() -> Vec<Vec<u8>> {
    texts(&[
        r#"{"ociVersion":"1.2.0","root":{"path":"/r","readonly":true},"hostname":"h",
        "process":{"terminal":true,"consoleSize":{"height":1,"width":2},"args":["sh"],"cwd":"/",
        "env":["A=b"],"user":{"uid":1,"gid":2,"additionalGids":[3],"umask":18},
        "capabilities":{"bounding":["CAP_CHOWN"]},"rlimits":[{"type":"RLIMIT_NOFILE","soft":1,
        "hard":2}],"noNewPrivileges":true,"oomScoreAdj":5},
        "mounts":[{"destination":"/a/../b","type":"bind","source":"/s","options":["rbind","rro",
        "rslave","idmap"],"uidMappings":[{"containerID":0,"hostID":1,"size":2}],
        "gidMappings":[{"containerID":0,"hostID":1,"size":2}]},
        {"destination":"/t","type":"tmpfs","source":"tmpfs","options":["size=1","tmpcopyup"]}],
        "linux":{"namespaces":[{"type":"mount"},{"type":"pid"},{"type":"network"},{"type":"user"},
        {"type":"ipc"},{"type":"uts"}],
        "uidMappings":[{"containerID":0,"hostID":1000,"size":10}],
        "gidMappings":[{"containerID":0,"hostID":1000,"size":10}],
        "sysctl":{"net.ipv4.ip_forward":"1"},"maskedPaths":["/proc/kcore"],
        "devices":[{"path":"/dev/x","type":"c","major":1,"minor":3}],
        "seccomp":{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64",
        "SCMP_ARCH_X32"],"syscalls":[{"names":["read","clone"],"action":"SCMP_ACT_ALLOW",
        "args":[{"index":0,"value":1,"valueTwo":2,"op":"SCMP_CMP_MASKED_EQ"}]}]}}}"#,
    ])
}

pub(crate) fn resources() -> Vec<Vec<u8>> {
    texts(&[
        r#"{"devices":[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":1,
        "minor":-1,"access":"rw"}],"memory":{"limit":1000,"swap":2000,"reservation":1},
        "cpu":{"shares":2,"quota":-1,"period":7,"cpus":"0-3,5","mems":"0","idle":1},
        "pids":{"limit":-1},"hugepageLimits":[{"pageSize":"2MB","limit":4}],
        "unified":{"memory.high":"max","io.max":"8:0 rbps=1\n8:1 rbps=2"},
        "blockIO":{"weight":10}}"#,
        r#"{"blockIO":{"weightDevice":[{"major":8,"minor":0,"weight":10}],
        "throttleReadBpsDevice":[{"major":8,"minor":0,"rate":0}]}}"#,
    ])
}

pub(crate) fn drivers() -> Vec<Vec<u8>> {
    texts(&[
        "# comment\na/b.ko x=1\n\nc.ko\n",
        r#"{"cdiVersion":"0.6.0","kind":"v/c","annotations":{"pericarp.dev/pci":"class:03,10de:1"},
        "containerEdits":{"env":["A=b"],"additionalGids":[1]},"devices":[{"name":"d",
        "annotations":{"pericarp.dev/pci":"vendor:10de"},"containerEdits":{
        "deviceNodes":[{"path":"/dev/x","hostPath":"/dev/y","type":"c","major":1,"minor":2,
        "fileMode":438,"permissions":"rw","uid":1,"gid":2}],
        "mounts":[{"hostPath":"/l","containerPath":"/m","type":"bind","options":["ro"]}],
        "hooks":[{"hookName":"poststop","path":"/h","args":["h"],"env":["C=d"],"timeout":1}]}}]}"#,
    ])
}

pub(crate) fn uevent() -> Vec<Vec<u8>> {
    texts(&["remove@/d\0ACTION=remove\0SUBSYSTEM=pci\0PCI_SLOT_NAME=0000:00:05.0\0"])
}

pub(crate) fn cgroup() -> Vec<Vec<u8>> {
    texts(&[
        "0::/pod/c/sub\n",
        "1:name=a:/\n0::/pod/c/../d\n",
        "0::/pod/c//etc",
    ])
}

pub(crate) fn report() -> Vec<Vec<u8>> {
    texts(&[
        r#"{"Cloned":{"pid":7}}"#,
        r#"{"Failed":{"ExecutableNotFound":{"program":"p","reason":"r"}}}"#,
        r#"{"Failed":{"InvalidSpec":{"field":"f","reason":"r"}}}"#,
    ])
}

pub(crate) fn figures() -> Vec<Vec<u8>> {
    texts(&[
        "a\nb\n  eth0: 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\n",
        "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n",
        "some avg10=1.05 avg60=0.00 avg300=99.99 total=4211\nfull avg10=0.00 total=7\n",
        "usage_usec 1\nnr_throttled 2\nanon 3\n",
    ])
}

pub(crate) fn kernel_log() -> Vec<Vec<u8>> {
    texts(&["6,339,5140900,-;text\n KEY=value\n", "4,1,x;y\0;\0a;b"])
}

fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}
